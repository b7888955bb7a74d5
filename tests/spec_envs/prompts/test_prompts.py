from __future__ import annotations

import json
import re
from pathlib import Path

import gymnasium as gym
import pytest

from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.measure import static
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.files import DATA
from spec_envs.prompts.rows import FINAL
from spec_envs.prompts.sets import SPLITS, encode, encode_all, load_prompts, sets_named
from tests.support import ROOT
from tests.support.models.tiny import REAL


def test_shipped_prompts_are_disjoint_and_cover_every_task() -> None:
    texts: set[tuple[tuple[tuple[str, str], ...], str]] = set()
    for split in SPLITS:
        prompts = load_prompts("all", split)
        assert {p.task for p in prompts} == {path.stem for path in (DATA / "prompts").iterdir()}
        new = {(p.history, p.text) for p in prompts}
        assert len(new) == len(prompts) and not new & texts
        texts |= new


@pytest.mark.parametrize("name", sets_named("all"))
def test_every_set_has_four_splits_that_never_mix(name: str) -> None:
    splits = {split: [(p.history, p.text) for p in load_prompts(name, split)] for split in (*SPLITS, FINAL)}
    assert min(map(len, splits.values())) >= 3
    assert len({one for texts in splits.values() for one in texts}) == sum(map(len, splits.values()))
    everything = {(p.history, p.text) for p in load_prompts(name, "all")}
    assert everything == {one for split in SPLITS for one in splits[split]}  # and nothing of the final split


def test_page_states_sizes_of_splits_and_every_set() -> None:
    page = (ROOT / "docs/guides/prompts.md").read_text()
    train, validation, test = (len(load_prompts("all", split)) for split in SPLITS)
    assert f'({train} prompts in `prompts="all"`), `"validation"` ({validation}) and\n`"test"` ({test})' in page
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == list(sets_named("all"))


@pytest.mark.parametrize("split", SPLITS)
def test_validations_and_searches_decode_every_set(split: str, tiny: dict) -> None:
    count = load_experiment("SpecDepth-v0", "ppo-live").eval_prompts
    assert count == static.PROMPTS
    assert {prompt.task for prompt in encoded_prompts(tiny, split, count)} == set(sets_named("all"))


@pytest.mark.model
def test_shipped_prompts_fit_small_contexts() -> None:
    """Behind the longest, 128 tokens are written and 32 drafted."""
    lengths = [len(ids) for _, ids in encode_all(load_tokenizer(REAL), load_prompts("all", "all"))]
    assert f"{max(lengths):,} tokens" in (ROOT / "docs/guides/prompts.md").read_text()
    assert max(lengths) + 128 + 32 < 2048


def test_environments_do_not_draw_the_final_split() -> None:
    with pytest.raises(ValueError, match="split is 'final'; expected one of train, validation, test, all"):
        gym.make("SpecK-v0", trace="qwen2.5-coder-32b-cpu", split=FINAL)


def test_question_files_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    rows = [{"question_id": i, "turns": [f"question {i}", "and then?"]} for i in range(200)]
    (tmp_path / "mine" / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = {split: {p.text for p in load_prompts("mine", split, str(tmp_path))} for split in SPLITS}
    assert sum(map(len, splits.values())) == 200 and not splits["train"] & splits["test"]
    assert len(splits["train"]) > len(splits["test"]) > len(splits["validation"]) > 5
    (tmp_path / "mine" / "question.jsonl").write_text('{"turns": ["a"]}\n{"turn": 1}\n')
    with pytest.raises(ValueError, match=r"question.jsonl:2 is not a question; expected"):
        load_prompts("mine", "train", str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no prompts; expected NAME/question.jsonl"):
        load_prompts("all", "train", str(tmp_path / "empty"))


def test_data_sets_in_hub_layout(tmp_path: Path) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"question": f"q {i}", "other": "x"}) for i in range(50)))
    found = load_prompts(str(folder), "all")
    assert len(found) == 50 and found[0].text.startswith("q ")
    assert {p.text for p in load_prompts(f"{folder}:other", "all")} == {"x"}
    with pytest.raises(ValueError, match=r"has no column 'turn' of prompts; name one: .*:question\|other"):
        load_prompts(f"{folder}:turn", "all")
    with pytest.raises(ValueError, match="cannot load the data set 'no/such' from the hub"):
        load_prompts("no/such", "all")


@pytest.mark.skipif(not Path("../shared/data").is_dir(), reason="development prompt sets are not beside the checkout")
def test_development_prompt_sets() -> None:
    prompts = load_prompts("humaneval,gsm8k", "all", "../shared/data")
    assert len(prompts) == 160 and {p.task for p in prompts} == {"humaneval", "gsm8k"}


def test_encode_applies_templates(tiny: dict) -> None:
    tokenizer = load_tokenizer(tiny["target"])
    assert encode(tokenizer, "the a") == tokenizer("the a .")["input_ids"]
    assert encode(tokenizer, "the a", "none") == tokenizer("the a")["input_ids"]
    assert encode(tokenizer, "the", "{{ messages[0]['content'] }} of") == tokenizer("the of")["input_ids"]
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="has no chat template; give template="):
            encode(tokenizer, "the a")
    finally:
        tokenizer.chat_template = template
