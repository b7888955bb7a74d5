"""Traces are recorded completely, replayed exactly, and refused if damaged or foreign."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs.decoding.drafters.vocabulary import TOGETHER, same_vocabulary
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.traces.full_trees import grown, level_slice
from spec_envs.decoding.traces.recorder import Recorder
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.stream import policy_of
from spec_envs.experiments.traces.plan import Plan, default_folder
from spec_envs.experiments.traces.record import record_texts, recorded, shard_of
from spec_envs.prompts.sets import sets_named
from tests.support.models.tiny import REAL
from tests.support.recordings import TEXTS, recorded_at_costs

DEPTH = 4


def assert_replay_equals_live(env_id: str, trace: Trace, plan: Plan, folder: Path, **keywords: Any) -> int:
    """Run both environments under random actions on the same texts and compare all results; return the number of
    cycles."""
    costs = folder / "costs.json"
    costs.write_text(json.dumps(trace.manifest.costs))
    sizes = {key: plan.env[key] for key in ("max_depth", "width", "k_max", "max_new_tokens") if key in plan.env}
    shared = {"split": "test", **sizes, **keywords}
    models = {key: plan.env[key] for key in ("target", "drafter", "device", "dtype") if key in plan.env}
    replay = gym.make(env_id, trace=str(trace.folder), **shared).unwrapped
    live = gym.make(env_id, clock=str(costs), **models, **shared).unwrapped
    prompts = {tuple(ids): prompt for prompt, ids in live.prompts.encoded.items()}  # type: ignore[attr-defined]
    rng, cycles = np.random.default_rng(0), 0
    for prompt, ids in replay.prompts.encoded.items():  # type: ignore[attr-defined]
        from_trace, _ = replay.reset(seed=3, options={"prompt": prompt})
        seen, _ = live.reset(seed=3, options={"prompt": prompts[tuple(ids)]})
        while not live.decoder.finished:  # type: ignore[attr-defined]
            np.testing.assert_allclose(from_trace, seen, atol=1e-4)  # float32, in forwards of other shapes
            action = rng.integers(live.action_space.n)  # type: ignore[attr-defined]
            from_trace, mine, done, _, info = replay.step(action)
            seen, theirs, ended, _, actual = live.step(action)
            assert done == ended and mine == pytest.approx(theirs, abs=1e-9)
            for name in ("emitted", "accepted", "drafted", "verified", "text", "tokens", "seconds", "saved"):
                assert info.get(name) == pytest.approx(actual.get(name)), name
            cycles += info["emitted"] > 0
            if done and not live.decoder.finished:  # type: ignore[attr-defined]
                from_trace, seen = replay.reset()[0], live.reset()[0]
    return cycles


@pytest.mark.parametrize(
    ("env_id", "name", "keywords"),
    [
        ("SpecDepth-v0", "tree", {"budget": 5}),
        ("SpecDepth-v0", "tree", {"observation": "ltd", "reward": "ltd", "episode": "cycle"}),
        ("SpecBudget-v0", "tree", {"depth": "random", "budgets": (0, 1, 3, 9, 30)}),
        ("SpecTree-v0", "tree", {"cost_features": True}),
        ("SpecDepth-v0", "copied tree", {"budget": 2}),
        ("SpecDepth-v0", "copied tree", {"observation": "ltd", "episode": "cycle"}),
        ("SpecBudget-v0", "copied tree", {"depth": "random", "budgets": (0, 1, 3, 9, 30)}),
        ("SpecBudget-v0", "suffix tree", {"depth": 2, "observation": "ltd"}),
        ("SpecTree-v0", "copied tree", {"cost_features": True, "max_depth": 2}),
        ("SpecTree-v0", "suffix tree", {}),
        ("SpecDepth-v0", "blocks", {"budget": 5}),
        ("SpecBudget-v0", "blocks", {"depth": "random", "budgets": (0, 1, 3, 9, 30)}),
        ("SpecK-v0", "chain", {}),
        ("SpecK-v0", "copies", {}),
        ("SpecK-v0", "copies", {"decision": "token"}),
        ("SpecK-v0", "lookup", {"decision": "token"}),
        ("SpecK-v0", "suffix copies", {"decision": "token"}),
        ("SpecK-v0", "suffix", {}),
    ],
)
def test_replay_equals_live_environment(
    env_id: str, name: str, keywords: dict, traces: dict[str, Trace], plans: dict[str, Plan], tmp_path: Path
) -> None:
    assert assert_replay_equals_live(env_id, traces[name], plans[name], tmp_path, **keywords) > 10


@pytest.mark.model
@pytest.mark.parametrize("env_id", ["SpecTree-v0", "SpecK-v0"])
def test_replay_of_real_models_equals_live_environment(env_id: str, tmp_path: Path) -> None:
    plan = Plan(
        env_id,
        {"target": REAL, "max_new_tokens": 24} | ({"k_max": 6} if env_id == "SpecK-v0" else {"max_depth": 3}),
        (1, 0, 1),
    )
    assert assert_replay_equals_live(env_id, recorded(plan, tmp_path / "trace"), plan, tmp_path) > 3


@pytest.mark.parametrize("name", ["{}", "lookup+{}", "suffix+{}", "suffix"])
def test_recorded_trees_equal_those_of_decoder(name: str, tiny: dict[str, Any]) -> None:
    """One forward over many positions gives each the tree that a decoder would have grown there."""
    decoder = load_decoder(tiny["target"], name.format(tiny["drafter"]), "cpu", "float32", width=4, max_depth=3)
    prompt, chains, full = [5, 6, 7, 8, 5, 6, 9, 7], 0, 0
    columns = Recorder(decoder).record(prompt, 24)
    decoder.start(prompt, 24, np.random.default_rng(0))
    trees = grown(columns["log_probs"], 4)
    for row in range(len(columns["tokens"]) - 1):
        for _ in range(3):
            decoder.expand()
        tree = decoder.tree
        there = np.isfinite(trees.scores[row])
        places = np.append(there.cumsum() - 1, -1)  # of each node of a full tree among those that there are
        np.testing.assert_array_equal(columns["drafted"][row, there], tree.tokens)
        np.testing.assert_array_equal(places[trees.parents[row, there]], tree.parents)
        np.testing.assert_allclose(trees.scores[row, there], tree.scores, atol=1e-5)
        chains += columns["copied"][row] and tree.is_chain and tree.size > 0
        full += not columns["copied"][row] and there.all()
        decoder.verify(0)
    assert decoder.tokens == columns["tokens"].tolist()
    assert (chains > 0) == (name != "{}") and (full > 0) == (name != "suffix")


def test_drafts_that_do_not_follow_from_the_text_are_not_recorded(tiny: dict[str, Any]) -> None:
    for name, message in (
        ("suffix@stream", "take suffix without @stream"),
        (f"suffix@stream+{tiny['drafter']}", "take suffix without @stream"),
        ("lookup,suffix", "has a Portfolio, whose drafts are not recorded"),
        (None, "has no drafter, whose drafts are not recorded"),
    ):
        with pytest.raises(ValueError, match=message):
            Recorder(load_decoder(tiny["target"], name, "cpu", "float32", width=4, max_depth=3))


@pytest.mark.parametrize("name", ["chain", "copies", "suffix copies", "lookup", "suffix"])
def test_recorded_chains_equal_those_of_decoder(name: str, plans: dict[str, Plan]) -> None:
    decoder = plans[name].decoder()
    prompt = [5, 6, 7, 8, 5, 6, 9, 7]
    columns = Recorder(decoder).record(prompt, 24)
    decoder.start(prompt, 24, np.random.default_rng(0))
    longest, copied = decoder.max_depth + 1, 0
    for row in range(len(columns["tokens"]) - 1):
        while decoder.tree.size < longest:
            before = decoder.tree.size
            if not decoder.drafting:
                decoder.begin()
            elif before:
                decoder.expand()
            if decoder.tree.size == before:
                break
        size = decoder.tree.size
        assert columns["length"][row] == size
        np.testing.assert_array_equal(columns["drafted"][row, :size], decoder.tree.tokens)
        np.testing.assert_allclose(columns["log_probs"][row, :size].cumsum(), decoder.tree.scores, atol=1e-4)
        copied += columns["copied"][row, :size].sum()
        decoder.verify(0)
    assert decoder.tokens == columns["tokens"].tolist()
    assert (copied > 0) == (name != "chain")


def test_positions_of_one_forward_have_the_same_vocabulary() -> None:
    class Words:
        known = np.zeros(9, bool)
        output_rows = True

        def add(self, tokens: list[int]) -> None:
            self.known[tokens] = True

        def grows_by(self, token: int) -> bool:
            return not self.known[token]

    text = [3, 3, 5, 3, 5, 7, *[3] * 40]
    found = list(same_vocabulary(Words(), text))  # type: ignore[arg-type]
    assert [(run.start, run.stop) for run in found[:3]] == [(0, 2), (2, 5), (5, 5 + TOGETHER)]
    assert found[-1].stop == len(text)
    assert [(run.start, run.stop) for run in same_vocabulary(None, text[:20])] == [(0, TOGETHER), (TOGETHER, 20)]
    assert list(same_vocabulary(None, [])) == []


def test_ranks_count_candidates_above_a_node(traces: dict[str, Trace]) -> None:
    trace = traces["tree"]
    scores = grown(np.asarray(trace.columns["log_probs"]), 4).scores
    path, ranks = trace.columns["path"], trace.columns["ranks"]
    found = 0
    for row in range(trace.rows):
        for level in range(DEPTH + 1):
            for depth in range(level, DEPTH + 1):
                order = np.argsort(-scores[row, : level_slice(depth, 4).stop], kind="stable").tolist()
                node = path[row, level]
                assert ranks[row, depth, level] == (order.index(node) if node >= 0 else -1)
                found += node >= 0
    assert found > 20


def test_killed_recording_resumes(plans: dict[str, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, folder = plans["chain"], tmp_path / "trace"
    original, made = Recorder.record, []

    def dies(*args: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return original(*args)

    monkeypatch.setattr(Recorder, "record", dies)
    with pytest.raises(KeyboardInterrupt):
        recorded(plan, folder)
    with pytest.raises(ValueError, match="there is no trace"):
        Trace.load(folder)
    assert len(list((folder / "texts").glob("*.npz"))) == 3
    monkeypatch.setattr(Recorder, "record", lambda *args: (made.append(1), original(*args))[1])
    whole = recorded(plan, folder)
    assert len(made) == sum(TEXTS)  # no text was recorded twice
    assert [text.split for text in whole.texts] == ["train"] * 4 + ["validation"] + ["test"] * 2


def test_shards_make_the_same_trace(plans: dict[str, Plan], traces: dict[str, Trace], tmp_path: Path) -> None:
    plans["tree"].claim(tmp_path)
    for shard in ((0, 2), (1, 2)):
        record_texts(plans["tree"], tmp_path, shard)
    assert len(list((tmp_path / "texts").glob("*.npz"))) == sum(TEXTS)
    whole = recorded_at_costs(plans["tree"], tmp_path)
    assert whole.manifest.arrays == traces["tree"].manifest.arrays


def test_damaged_and_foreign_traces_are_refused(
    plans: dict[str, Plan], traces: dict[str, Trace], tmp_path: Path
) -> None:
    source = traces["chain"].folder
    for name in ("broken", "cut", "old"):
        (tmp_path / name).mkdir()
        for path in source.glob("*.*"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    array = tmp_path / "broken" / "drafted.npy"
    array.write_bytes(array.read_bytes()[:-1] + b"\x7f")
    (tmp_path / "cut" / "manifest.json").write_text("{")
    manifest = tmp_path / "old" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 3', '"version": 0'))
    with pytest.raises(ValueError, match=r"damaged \(drafted.npy is not the file"):
        Trace.load(tmp_path / "broken")
    with pytest.raises(ValueError, match="damaged"):
        Trace.load(tmp_path / "cut")
    with pytest.raises(ValueError, match="version 0"):
        Trace.load(tmp_path / "old")
    with pytest.raises(ValueError, match="was begun with another drafter"):
        plans["copies"].claim(source)
    with pytest.raises(ValueError, match="has chains, which do not replay SpecDepth-v0"):
        gym.make("SpecDepth-v0", trace=str(source), max_new_tokens=8)
    with pytest.raises(ValueError, match="recorded with drafter"):
        gym.make("SpecK-v0", trace=str(source), drafter="lookup", k_max=6, max_new_tokens=8)
    with pytest.raises(ValueError, match="but max_depth is 15"):
        gym.make("SpecK-v0", trace=str(source), max_new_tokens=8)
    with pytest.raises(ValueError, match="were recorded to 24"):
        gym.make("SpecK-v0", trace=str(source), k_max=6, max_new_tokens=100)
    with pytest.raises(ValueError, match=r"with temperature 0\.0, not 1\.0"):
        gym.make("SpecK-v0", trace=str(source), k_max=6, max_new_tokens=8, temperature=1.0)
    with pytest.raises(ValueError, match="no trace folder and no synthetic profile"):
        gym.make("SpecK-v0", trace=str(tmp_path / "none"))
    env = gym.make("SpecK-v0", trace=str(source), k_max=6, max_new_tokens=8)
    with pytest.raises(ValueError, match="prompts of its own"):
        env.reset(options={"prompt": "Why?"})


def test_default_max_new_tokens_is_that_of_the_trace(traces: dict[str, Trace]) -> None:
    recorded = {"trace": str(traces["chain"].folder), "k_max": 6}
    env, longest = gym.make("SpecK-v0", **recorded), traces["chain"].manifest.max_new_tokens
    assert env.unwrapped.max_new_tokens == longest < 128
    many = gym.make_vec("SpecK-v0", num_envs=2, vectorization_mode="vector_entry_point", **recorded)
    assert many.max_new_tokens == longest
    assert gym.make("SpecK-v0", **recorded, max_new_tokens=longest - 1).unwrapped.max_new_tokens == longest - 1


@pytest.mark.parametrize(
    ("texts", "tokens", "match"),
    [
        ((0, 0, 0), 20, "expected numbers of train"),
        ((3, -1, 0), 20, "expected numbers of train"),
        ((1, 0, 0), 1, "expected 2"),
    ],
)
def test_invalid_numbers_of_texts_are_refused(texts: tuple[int, int, int], tokens: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Plan("SpecK-v0", {"max_new_tokens": tokens}, texts)


def test_prompts_select_texts_by_task(traces: dict[str, Trace]) -> None:
    trace = traces["tree"]
    task = trace.texts[0].task
    assert {trace.texts[i].task for i in trace.of_split("train", task)} == {task}
    with pytest.raises(ValueError, match="no texts of the prompts 'nowhere'"):
        trace.of_split("train", "nowhere")


@pytest.mark.parametrize("text", ["4/4", "x", "1", "-1/2"])
def test_invalid_shards_are_refused(text: str) -> None:
    with pytest.raises(Exception, match="expected i/n"):
        shard_of(text)


def test_plans_of_other_settings_have_separate_folders(plans: dict[str, Plan], tmp_path: Path) -> None:
    """Neither recording has to be deleted for the other, and the same plan finds its own folder again."""
    first = default_folder(plans["chain"], tmp_path)
    plans["chain"].claim(first)
    assert default_folder(plans["chain"], tmp_path) == first
    other = default_folder(plans["copies"], tmp_path)
    assert other != first and other.name.startswith(first.name)
    plans["copies"].claim(other)
    assert default_folder(plans["copies"], tmp_path) == other


def test_plans_say_what_all_prompts_are() -> None:
    """A trace of fewer sets, recorded when these were all, is not taken for one of all."""
    every = Plan("SpecK-v0", {"drafter": "lookup"}, (1, 1, 1)).settings
    assert every["prompts"].split(",") == list(sets_named("all"))
    assert Plan("SpecK-v0", {"drafter": "lookup", "prompts": "gsm8k"}, (1, 1, 1)).settings["prompts"] == "gsm8k"


def test_several_drafters_are_recorded_for_their_environment_alone() -> None:
    with pytest.raises(ValueError, match="'lookup,suffix'; SpecK-v0 has one, SpecDrafter-v0 chooses between several"):
        _ = Plan("SpecK-v0", {"drafter": "lookup,suffix"}, (1, 1, 1)).settings
    with pytest.raises(ValueError, match="'lookup,suffix'; SpecDepth-v0 has one, SpecDrafter-v0 chooses"):
        policy_of(None, "lookup,suffix")
