from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.model.batch import generate_batch
from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer
from spec_envs.decoding.weights.files import load_weights
from spec_envs.experiments.drafters import __main__ as drafter
from spec_envs.experiments.drafters import selftext
from spec_envs.experiments.drafters.turns import composed_turn, library_functions, shipped_prompts
from spec_envs.prompts.sets import encode
from tests.support.commands import run_command
from tests.support.models.tiny import CPU, WORDS


def conversations(path: Path, count: int = 30) -> Path:
    """Write random conversations to a file, and return its path."""
    rng = random.Random(0)
    words = lambda: " ".join(rng.choice(["a", "b", "c", "d"]) for _ in range(12))  # noqa: E731
    path.write_text("".join(json.dumps({"user": words(), "assistant": words()}) + "\n" for _ in range(count)))
    return path


def make(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    run_command(monkeypatch, drafter, *arguments)


def test_head_from_given_conversations(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = conversations(tmp_path / "given.jsonl")
    common = ["--target", tiny_target, "--conversations", given, "--tokens", 0, "--work", tmp_path / "work"]
    common += ["--steps", 2, "--draft-vocab", 16, "--dtype", "float32", "--device", "cpu"]
    make(monkeypatch, *common, "--epochs", 2)
    report = json.loads((tmp_path / "work" / "eagle3" / "report.json").read_text())
    assert len(report["chain_acceptance"]) == 12 and report["positions"] > 0
    head = EagleHead.load(str(tmp_path / "work" / "eagle3"))
    assert len(head.draft_ids) == report["draft_vocab"]
    recorded = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("0*.safetensors")}
    # continues training; nothing is recorded again
    make(monkeypatch, *common, "--epochs", 3)
    assert recorded == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("0*.safetensors")}
    assert json.loads((tmp_path / "work" / "eagle3" / "report.json").read_text())["epochs"] == 3
    with pytest.raises(SystemExit, match="was begun with another seed; choose another --work"):
        make(monkeypatch, *common, "--seed", 1)
    with pytest.raises(SystemExit, match=r"--text and --work are both .*; expected two folders"):
        make(monkeypatch, *common, "--text", tmp_path / "work")
    given.write_text('{"user": "a b", "answer_ids": [9999]}\n' * 2)
    with pytest.raises(SystemExit, match=r"answer_ids that are not below 16; expected text that .* wrote"):
        make(monkeypatch, *common, "--work", tmp_path / "other")


def test_init_continues_from_given_head(
    tiny_target: Path, tiny_drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = conversations(tmp_path / "given.jsonl")
    common = ["--target", tiny_target, "--conversations", given, "--tokens", 0, "--dtype", "float32"]
    common += ["--steps", 2, "--epochs", 4]
    make(monkeypatch, *common, "--work", tmp_path / "work", "--init", tiny_drafter)
    before, after = EagleHead.load(str(tiny_drafter)), EagleHead.load(str(tmp_path / "work" / "eagle3"))
    ids, target = after.draft_ids, load_target(str(tiny_target), CPU, "float32")
    assert len(ids) < len(before.draft_ids)  # the text has few tokens; the output rows are the target's
    assert torch.allclose(after.lm_head.weight, target.output_rows(ids), atol=1e-3)
    moved = (before.fc.weight - after.fc.weight).abs().max()
    assert 1e-4 < moved < 0.05  # moved a little from its start, so it did not begin at the target's last layer
    make(monkeypatch, *common, "--work", tmp_path / "work", "--init", tiny_drafter, "--kind", "parallel")
    blocks = EagleHead.load(str(tmp_path / "work" / "parallel"))
    assert blocks.variant.block == 2 and blocks.mask_hidden.abs().max() > 0
    assert 1e-4 < (before.fc.weight - blocks.fc.weight).abs().max() < 0.05
    before.lm_head.weight.data += 1
    before.save(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"has output rows of its own; expected a head that `spec-envs drafter` made"):
        make(monkeypatch, *common, "--work", tmp_path / "again", "--init", tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 0], "--steps is 0; expected 1 or more"),
        (["--deep-share", 5], "--deep-share is 5; expected above 0 and at most 1"),
        (
            ["--deep-share", 0.5, "--kind", "draft-model"],
            "--deep-share has an effect only with --kind eagle3 or parallel",
        ),
        (["--layers", 2], "--layers has an effect only with --kind draft-model or parallel"),
        (["--kind", "parallel", "--steps", 1], "--steps is 1; expected 2 or more, the size of a parallel head's block"),
        (["--init", "x", "--intermediate", 9], "--intermediate has an effect only with no --init"),
        (["--target", "nowhere/nothing-to-find"], "nowhere/nothing-to-find"),
    ],
)
def test_refused_options_leave_no_folder(
    arguments: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        make(monkeypatch, "--work", tmp_path / "work", *arguments)
    assert message in f"{ended.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "line",
    [
        "3",
        '{"prompt": "x"}',
        '{"user": "x"}',
        "{",
        '{"user": "x", "answer_ids": ["a"]}',
        '{"user": "\udcff"}',
        "[" * 9999,
    ],
)
def test_malformed_conversations_are_refused(line: str, tmp_path: Path) -> None:
    good = '{"user": "a\u2028b", "assistant": "c"}\n'
    path = tmp_path / "given.jsonl"
    path.write_text(line + "\n" + good, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"given.jsonl:1 is not a conversation"):
        selftext.read_conversations(path)
    path.write_text(
        good + line, encoding="utf-8", errors="surrogateescape"
    )  # an incomplete last line, as after a kill, is ignored
    assert len(selftext.read_conversations(path)) == 1


def test_composed_turns_include_text_and_code() -> None:
    rng = random.Random(0)
    turns = [composed_turn(rng, ["An article about bees."]) for _ in range(40)]
    assert any("An article about bees." in turn for turn in turns) and any("def " in turn for turn in turns)
    assert len(library_functions()) > 500 and all(head.startswith("def ") for head in library_functions())
    assert len({prompt.task for prompt in shipped_prompts()[:13]}) == 13


def mean_accepted(target: Path, drafter: Path) -> float:
    """Return how many of two drafted tokens are accepted."""
    decoder = load_decoder(str(target), str(drafter), "cpu", "float32", width=1, max_depth=5)
    decoder.eos = frozenset()
    decoder.start([3, 4, 5], 200, np.random.default_rng(0))
    while not decoder.finished:
        decoder.cycle(2)
    return sum(cycle.accepted for cycle in decoder.cycles) / len(decoder.cycles)


def test_kinds_learn_from_the_same_recordings(
    tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft model and a parallel head improve with training, and draft for their target once saved."""
    target, tokenizer = load_target(str(tiny_target), CPU, "float32"), load_tokenizer(str(tiny_target))
    users = [" ".join(random.Random(i).choices(WORDS[2:14], k=6)) for i in range(60)]
    answers = generate_batch(target, [encode(tokenizer, user) for user in users], 40, set())
    given, work = tmp_path / "given.jsonl", tmp_path / "work"
    rows = [
        {"user": user, "answer_ids": answer, "kind": "ab"[i % 2]}
        for i, (user, answer) in enumerate(zip(users, answers, strict=True))
    ]
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--target", tiny_target, "--conversations", given, "--tokens", 0, "--work", work, "--draft-vocab", 16]
    common += ["--dtype", "float32", "--device", "cpu", "--learning-rate", 3e-3, "--batch-tokens", 512]
    shapes = {"draft-model": ["--layers", 4, "--steps", 3], "parallel": ["--intermediate", 40, "--steps", 3]}
    recorded = set[int]()
    for kind, shape in shapes.items():
        make(monkeypatch, *common, "--kind", kind, *shape, "--epochs", 1)
        make(monkeypatch, *common, "--kind", kind, *shape, "--epochs", 12, "--out", tmp_path / kind)
        before, after = (json.loads((f / "report.json").read_text()) for f in (work / kind, tmp_path / kind))
        assert before["kind"] == after["kind"] == kind
        assert sum(figures["positions"] for figures in after["held_out"].values()) == after["positions"]
        assert after["validation"] == after["held_out"]  # there was no other text
        assert after["curve"][-1]["tokens"] == after["tokens_seen"] and after["command"].startswith("spec-envs drafter")
        names = load_weights(tmp_path / kind)
        assert not {name for name in names if "embed" in name}  # read from the target
        assert mean_accepted(tiny_target, tmp_path / kind) > mean_accepted(tiny_target, work / kind) + 0.1
        recorded |= {path.stat().st_mtime_ns for path in (work / "recorded").glob("0*")}
    assert len(recorded) == 1
    assert EagleHead.load(str(tmp_path / "parallel")).config.intermediate_size == 40
    first, start = (mean_accepted(tiny_target, folder / "draft-model") for folder in (work, tmp_path))
    shape = ["--kind", "draft-model", "--steps", 3, "--epochs", 1, "--init", tmp_path / "draft-model"]
    make(monkeypatch, *common, *shape, "--out", tmp_path / "continued")
    assert json.loads((tmp_path / "continued" / "config.json").read_text())["num_hidden_layers"] == 4
    assert mean_accepted(tiny_target, tmp_path / "continued") > (first + start) / 2  # it continued from there
    report = json.loads((tmp_path / "draft-model" / "report.json").read_text())
    [earlier] = json.loads((tmp_path / "continued" / "report.json").read_text())["earlier"]
    assert earlier == {key: report[key] for key in ("command", "tokens_seen", "minutes")} and report["earlier"] == []
    with pytest.raises(SystemExit, match="parallel', a head; expected a draft model that"):
        make(monkeypatch, *common, *shape[:-1], tmp_path / "parallel", "--out", tmp_path / "refused")
    with pytest.raises(SystemExit, match=r"training was begun with another intermediate, steps; choose another --out"):
        make(monkeypatch, *common, "--kind", "parallel", "--epochs", 1)
    with pytest.raises(SystemExit, match="layers are 8; expected 1 to 7"):
        make(monkeypatch, *common, "--kind", "draft-model", "--layers", 8, "--out", tmp_path / "other")
