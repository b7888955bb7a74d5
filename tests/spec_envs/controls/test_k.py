"""SpecK-v0: observations, actions, kinds of text, and that the text is the target's own under any actions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from spec_envs.controls.k import DRAFT, VERIFY, KControl
from spec_envs.controls.observation.text_kind import KINDS, context_kind
from spec_envs.env import SpecEnv
from tests.support.texts import plain


@pytest.fixture
def pair(tiny: dict[str, Any], tiny_draft: Path) -> dict[str, Any]:
    """Return keyword arguments over the tiny target and a random draft model."""
    return {**tiny, "drafter": str(tiny_draft)}


def make(keywords: dict[str, Any], **own: Any) -> SpecEnv:
    env = gym.make("SpecK-v0", **(keywords | own)).unwrapped
    assert isinstance(env, SpecEnv)
    return env


@pytest.mark.parametrize(
    "own",
    [
        {},
        {"decision": "token", "k_max": 5},
        {"adjustment_interval": 6},
        {"observation": "counters"},
        {"decision": "token", "observation": "counters", "cost_features": True},
        {"drafter": "lookup"},
        {"temperature": 1.0},
    ],
)
def test_gymnasium_accepts_every_variant(pair: dict[str, Any], own: dict[str, Any]) -> None:
    env = gym.make("SpecK-v0", **{**pair, **own})
    spec = env.spec
    assert spec is not None
    spec.nondeterministic = False  # the clock is priced, so everything follows from the seed
    check_env(env.unwrapped, skip_render_check=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("own", [{}, {"decision": "token"}, {"adjustment_interval": 8}, {"drafter": "lookup"}])
def test_greedy_text_is_plain_text_under_random_actions(pair: dict[str, Any], own: dict[str, Any], seed: int) -> None:
    env = make(pair, **own)
    rng = np.random.default_rng(seed)
    env.reset(seed=seed, options={"prompt": "the a of and in to the a of"})
    done = False
    while not done:
        _, _, done, _, info = env.step(int(rng.integers(env.action_space.n)))
    assert env.decoder.tokens == plain(pair, env.decoder.prompt, 24, env.decoder.eos)
    assert info["tokens"] == len(env.decoder.tokens)


def test_observation_per_cycle(pair: dict[str, Any]) -> None:
    """Every entry equals the value computed again from what the decoder recorded."""
    env = make(pair, k_max=8)
    rng = np.random.default_rng(3)
    control = env.control
    seen, _ = env.reset(seed=3)
    read = lambda name: seen[control.slices[name]]  # noqa: E731
    assert not np.any(
        [read(n).any() for n in ("confidence", "entropy", "match", "acceptance", "last_k", "last_acceptance")]
    )
    done, chosen = False, []
    while not done:
        action = int(rng.integers(9))
        chosen.append(action)
        seen, _, done, _, info = env.step(action)
        cycles, last = env.decoder.cycles, env.decoder.cycles[-1]
        assert info["drafted"] == action == last.drafted
        for n, value in zip((4, 16), read("acceptance"), strict=True):
            drafted = sum(c.drafted for c in cycles[-n:])
            of_chains = sum(c.accepted - c.beside for c in cycles[-n:])
            assert value == pytest.approx(of_chains / drafted if drafted else 0.0)
        assert read("last_k")[0] == pytest.approx(action / 8)
        of_chain = last.accepted - last.beside
        assert read("last_acceptance")[0] == pytest.approx(of_chain / action if action else 0.0)
        assert len(last.nodes.probabilities) == len(last.nodes.entropies) == action
        if action:
            assert read("confidence")[0] == pytest.approx(last.nodes.probabilities.mean(), abs=1e-6)
            assert read("entropy")[0] == pytest.approx(last.nodes.entropies.mean() / 10, abs=1e-6)
            assert (last.nodes.entropies <= np.log(16) + 1e-5).all() and (
                last.nodes.probabilities >= 1 / 16 - 1e-6
            ).all()
        assert read("kind").sum() == read("task").sum() == 1
    assert len(chosen) > 3


def test_alternatives_are_accepted_where_the_chain_is_rejected(pair: dict[str, Any]) -> None:
    """They change no text; a cycle that accepts one emits it and one token more."""
    emitted, texts = {}, {}
    for alternatives in (0, 1, 3):
        env = make(pair, alternatives=alternatives, alternative_chance=0.01)
        env.reset(seed=1)
        done, counts = False, []
        while not done:
            _, _, done, _, info = env.step(3)
            counts.append((info["emitted"], info["beside"]))
            last = env.decoder.cycles[-1]
            assert info["accepted"] == last.accepted and last.verified <= 3 * (1 + alternatives)
            assert last.emitted == last.accepted + 1 or done
            if info["beside"]:
                chain, place = last.nodes.tokens[: last.drafted], last.accepted - 1
                assert last.tokens[place] != chain[place] and last.tokens[:place] == chain[:place].tolist()
                assert last.nodes.path[-1] >= last.drafted
        emitted[alternatives], texts[alternatives] = counts, env.decoder.tokens
    assert texts[0] == texts[1] == texts[3]
    assert len(emitted[3]) < len(emitted[0]) and not any(beside for _, beside in emitted[0])
    assert 0 < sum(beside for _, beside in emitted[1]) <= sum(beside for _, beside in emitted[3])


def test_unlikely_alternatives_are_not_verified(pair: dict[str, Any]) -> None:
    verified = []
    for chance in (0.01, 0.1, 0.9):
        env = make(pair, alternative_chance=chance)
        env.reset(seed=1)
        env.step(3)
        verified.append(env.decoder.cycles[-1].verified)
    assert verified[0] > verified[1] >= verified[2] == 3


def test_alternatives_are_of_this_process_and_of_single_cycles() -> None:
    assert KControl().alternatives == 3 and KControl(adjustment_interval=8).alternatives == 0
    assert KControl(engine="llama-server").alternatives == 0
    with pytest.raises(ValueError, match="alternatives is 4; expected 0 to 3"):
        KControl(alternatives=4)
    with pytest.raises(ValueError, match="decided one by one; leave out adjustment_interval"):
        KControl(alternatives=1, adjustment_interval=8)
    with pytest.raises(ValueError, match=r"alternative_chance is 0; expected a number in \(0, 1\)"):
        KControl(alternative_chance=0)


def test_observation_per_token(pair: dict[str, Any]) -> None:
    """The first entries describe the current chain; the others stay as they were at the start of the cycle."""
    env = make(pair, decision="token", k_max=4)
    at_start, _ = env.reset(seed=1)
    assert at_start[:5].tolist() == [0, 1, 0, 1, 0]
    path = 1.0
    for drafted in (1, 2, 3):
        seen, reward, _, _, info = env.step(DRAFT)
        assert info["emitted"] == 0 and reward < 0  # it costs time, and no token has been emitted yet
        path *= float(seen[1])
        assert seen[0] == pytest.approx(drafted / 4) and seen[3] == pytest.approx(path, rel=1e-5)
        assert seen[4] == 0 and np.array_equal(seen[5:], at_start[5:]) and 0 < seen[2] < 0.3
    seen, _, _, _, info = env.step(DRAFT)  # the fourth token reaches k_max, so the chain is verified in this step
    assert info["drafted"] == 4 and info["emitted"] >= 1
    assert seen[:4].tolist() == [0, 1, 0, 1] or env.decoder.finished
    if not env.decoder.finished:
        assert env.step(VERIFY)[-1]["drafted"] == 0  # nothing was drafted: plain decoding


def test_decision_holds_for_a_segment(pair: dict[str, Any]) -> None:
    env = make({**pair, "max_new_tokens": 40}, adjustment_interval=8)
    env.reset(seed=0)
    env.decoder.eos = frozenset()
    while not env.decoder.finished:
        before = len(env.decoder.cycles)
        info = env.step(3)[-1]
        made = env.decoder.cycles[before:]
        assert info["emitted"] == sum(c.emitted for c in made) and info["drafted"] == sum(c.drafted for c in made)
        assert info["emitted"] >= 8 or env.decoder.finished
        assert sum(c.emitted for c in made[:-1]) < 8
        assert sum(info["seconds"].values()) == pytest.approx(sum(sum(c.seconds.values()) for c in made))


def test_tasks_switch_after_switch_every_texts(pair: dict[str, Any]) -> None:
    env = make(pair, switch_every=3)
    tasks = []
    for i in range(12):
        env.reset(seed=0 if i == 0 else None)
        assert env.prompt is not None
        tasks.append(env.prompt.task)
    blocks = [tasks[i : i + 3] for i in range(0, 12, 3)]
    assert all(len(set(block)) == 1 for block in blocks)
    assert all(a[0] != b[0] for a, b in itertools.pairwise(blocks))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"k_max": 1}, "k_max is 1; expected 2 to 4096"),
        ({"decision": "word"}, "decision is 'word'; expected one of cycle, token"),
        ({"engine": "vllm"}, "engine is 'vllm'; expected one of torch, llama-server"),
        ({"decision": "token", "adjustment_interval": 64}, "leave out adjustment_interval and llama-server"),
        ({"adjustment_interval": -1}, "adjustment_interval is -1; expected tokens"),
        ({"switch_every": -1}, "switch_every is -1; expected texts"),
    ],
)
def test_invalid_keywords_are_refused(pair: dict[str, Any], own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(pair, **own)


def test_chain_is_verified_when_drafter_has_no_more_tokens(tiny: dict[str, Any]) -> None:
    """An agent that always drafts another token still ends every cycle."""
    env = make({**tiny, "drafter": "lookup"}, decision="token")
    env.reset(seed=0)
    for _ in range(24 * 17):
        if env.step(DRAFT)[2]:
            break
    assert env.decoder.finished


@pytest.mark.parametrize(
    ("snippet", "kind"),
    [
        ("def f(x): return {x[0]: (x[1], [2])}", "code"),
        ("Here it is:\n```python\nprint", "code"),
        ("x" * 95 + "(" * 5, "prose"),  # a twentieth, which is not above the limit
        ("x" * 94 + "(" * 6, "code"),
        ('{"name": "a"}', "json"),
        ('  {\n "name"', "json"),
        ('Sure. "type": "object" is what it says', "json"),
        ("∀ x ∃ y", "math"),
        ("x → y ⇒ z, ∑ and ∫", "math"),
        ("Therefore it follows", "math"),
        ("a proof of it", "math"),
        ("waterproof boots", "prose"),
        ("- milk\n- bread\n- eggs", "list"),
        ("1. milk\n2. bread", "list"),
        ("- one item", "prose"),
        ("It was a sunny day.", "prose"),
        ("", "prose"),
    ],
)
def test_kind_of_snippet(snippet: str, kind: str) -> None:
    assert context_kind(snippet) == kind and kind in KINDS


def test_answer_that_starts_as_json_is_json(pair: dict[str, Any]) -> None:
    """It is JSON although its last tokens look like code and the prompt comes before them."""
    env = make(pair)
    env.decoder.detokenize = lambda ids: '{"a": [1, 2]}' if len(ids) <= 8 else 'write {"a": [1, 2]}; now'
    seen, _ = env.reset(seed=0, options={"prompt": "the a of and in to the a of and in"})
    assert seen[env.control.slices["kind"]].tolist() == [0, 0, 0, 1, 0]


def test_kind_is_recomputed_as_the_text_grows(pair: dict[str, Any]) -> None:
    env = make(pair, max_new_tokens=24)
    env.reset(seed=0, options={"prompt": "the a of and in to"})
    chosen: list[list[int]] = []
    env.decoder.detokenize = lambda ids: chosen.append(ids) or "- a\n- b"  # type: ignore[func-returns-value]
    env.decoder.eos = frozenset()
    while not env.decoder.finished:
        seen = env.step(1)[0]
    assert 2 <= len(chosen) <= 4 and all(len(ids) <= 96 for ids in chosen)
    assert seen[env.control.slices["kind"]].tolist() == [0, 0, 0, 0, 1]


def test_counters_observation_has_what_a_server_reports() -> None:
    control = KControl(adjustment_interval=64, observation="counters")
    assert list(control.slices) == ["acceptance", "last_k", "last_acceptance", "position", "context"]
    assert "confidence" not in KControl(adjustment_interval=64).slices
    assert KControl(engine="llama-server").adjustment_interval == 64
