"""The comparison of decoding speed with other software, on the tiny models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from spec_envs.controls import candidates
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.loading import load_decoder
from spec_envs.experiments.comparisons import decoding
from spec_envs.experiments.comparisons.quality import Judge
from spec_envs.experiments.measure.arms import Encoded, Sample
from spec_envs.experiments.measure.references import assisted_arms, transformers_arms
from tests.support.commands import run_command
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.tiny import save_draft
from tests.support.texts import plain_text


def test_writes_figures_and_cost_table(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(candidates, "DEPTHS", (1, 4))
    monkeypatch.setattr(candidates, "BUDGETS", (8, 16))
    arguments = ["--target", tiny["target"], "--drafter", tiny["drafter"], "--dtype", "float32", "--device", "cpu"]
    places = ["--out", tmp_path, "--clock", tmp_path / "clock.json"]
    run_command(monkeypatch, decoding, *arguments, "--count", "3", *places)
    results = json.loads((tmp_path / "decoding.json").read_text())
    assert set(results["ratios"]) >= {"plain_over_transformers", "static_over_plain", "static_over_assisted"}
    assert set(results) >= {
        "emitted_per_cycle",
        "overhead_share",
        "curves_by_dtype",
        "quality",
        "verify_curve",
        "expand_ratio",
    }
    assert results["verify_curve"]["1"] == 1.0 and results["expand_ratio"] > 0
    assert results["verify_ratio"] == {n: results["verify_curve"][n] for n in ("8", "16", "32", "64")}
    assert results["processor"] == results["machine"]["processor"] and "context_ratio" not in results
    assert results["static_over_plain"] == results["ratios"]["static_over_plain"]["value"]
    assert results["quality"]["float32"] == pytest.approx({**results["quality"]["float32"], "agreement": 1, "kl": 0})
    found = results["dtypes"]["float32"]
    assert found["own_argmax_share"] == found["same_text"] == 1 and found["plain_tokens_per_s"] > 0
    assert results["own_argmax_share"] == dict.fromkeys(results["arms"], 1.0)
    assert WITHOUT_KERNELS or results["floor"]["share_of_floor"] == results["share_of_floor"] > 0
    assert results["curves_by_dtype"]["float32"]["verify"]["96"] > 0
    assert 0 < results["overhead_share"] < 1 and results["emitted_per_cycle"] >= 1
    assert CostTable.load(str(tmp_path / "clock.json")).seconds("verify", 30) > 0
    printed, page = capsys.readouterr().out, (tmp_path / "decoding.md").read_text()
    assert (tmp_path / "decoding.png").exists() and page in printed
    assert "| static_over_plain | static | plain |" in page and "## Quality of the dtypes" in page
    assert "## Fidelity of the texts" in page and "| verify_ratio, 64 |" in page
    (tmp_path / "decoding.md").unlink()
    run_command(monkeypatch, decoding, "--from-json", tmp_path / "decoding.json")
    assert (tmp_path / "decoding.md").read_text() == page


def test_comparison_with_draft_model(
    tiny: dict, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(candidates, "KS", (1, 4))
    arguments = ["--target", tiny["target"], "--drafter", str(tiny_draft), "--dtype", "float32", "--device", "cpu"]
    arguments += ["--count", "3", "--dtypes", "float32"]
    run_command(monkeypatch, decoding, *arguments, "--out", tmp_path, "--clock", tmp_path / "clock.json")
    results, printed = json.loads((tmp_path / "decoding.json").read_text()), capsys.readouterr()
    assert results["static"]["best"][0] in (1, 4) and f"k {results['static']['best'][0]}" in printed.out
    assert results["ratios"]["static_over_assisted"]["value"] > 0 and set(results["seconds"]["draft"]) >= {"1", "8"}
    assert "llama.cpp is left out" in printed.err
    with pytest.raises(SystemExit):
        run_command(monkeypatch, decoding, "--dtypes", "int8,bf16")
    assert "bf16 is unknown; expected some of int8, q4, bfloat16" in capsys.readouterr().err


def test_best_chain_is_an_arm_beside_a_tree(tiny: dict, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "KS", (1, 4))
    env = {**tiny, "dtype": "float32", "device": "cpu", "max_new_tokens": 12}
    decoder = load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32")
    assert decoding.best_chain(env, decoder) == {}
    monkeypatch.setattr(decoding, "default_drafter", lambda target, chain: str(tiny_draft))
    arm, policy = decoding.best_chain(env, decoder)["chain"]
    sample = arm(Encoded("t", [5, 6, 7, 8]), 12, 0)
    assert sample.ids == plain_text(decoder, [5, 6, 7, 8], 12) and sample.verified and not sample.forwards
    assert policy.control.name == "k"


def test_judge_counts_tokens_of_another_target(tiny: dict) -> None:
    decoder = load_decoder(tiny["target"], None, "cpu", "float32")
    prompt = Encoded("t", [5, 6, 7, 8])
    text = plain_text(decoder, prompt.ids, 8)
    changed = [*text[:-1], (text[-1] + 1) % decoder.verifier.vocab]
    judge = Judge(decoder.local.target)
    own, other = (Sample(prompt, 7, 1.0, 0.0, ids) for ids in (text, changed))
    assert judge.own_share([own]) == 1 and judge.own_share([own, other]) == 15 / 16


def test_assistant_of_other_vocabulary_is_left_out(
    tiny: dict, tiny_target: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    padded = save_draft(tmp_path / "padded", tiny_target, vocab_size=99)
    decoder = load_decoder(tiny["target"], str(padded), "cpu", "float32", width=1)
    assert set(assisted_arms(tiny["target"], decoder, (str(padded), 4))) == {"transformers generate"}
    assert "needs models of the same vocabulary size" in caplog.text


def test_transformers_uses_its_own_end_tokens(tiny_target: Path, tmp_path: Path) -> None:
    """Other software does not get our end tokens: where they differ, the texts differ, and the table shows it."""
    folder = shutil.copytree(tiny_target, tmp_path / "target")
    decoder = load_decoder(str(folder), None, "cpu", "float32")
    prompt = Encoded("t", [5, 6, 7, 8])
    text = plain_text(decoder, prompt.ids, 20)
    stop = text[4]
    decoder.eos = frozenset({stop})
    arm = transformers_arms(str(folder), decoder)["transformers generate"]
    assert arm(prompt, 20, 0).ids == text
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, stop]}))
    arm = transformers_arms(str(folder), decoder)["transformers generate"]
    assert arm(prompt, 20, 0).ids == text[: text.index(stop) + 1]
