"""Prompt lookup drafts copies of earlier text, alone or before a draft model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from spec_envs.agents import AGENTS
from spec_envs.controls import make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.copying import CopyingDrafter
from spec_envs.decoding.drafters.lookup import LookedUp, Occurrences, copy_probability
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.env import SpecEnv
from spec_envs.prompts.sets import encode_prompt, load_prompts
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.tiny import REAL
from tests.support.texts import deviation, plain

TABLE = CostTable("made up", {1: 1.0, 9: 2.0}, {1: 0.1, 8: 0.2})


def copying(tiny: dict[str, Any], draft: Path | str, **settings: Any) -> Decoder:
    """Return a decoder that tries prompt lookup before a draft model."""
    return load_decoder(tiny["target"], f"lookup+{draft}", "cpu", "float32", width=1, max_depth=7, **settings)


def test_lookup_copies_what_followed_before(tiny: dict[str, Any], rng: np.random.Generator) -> None:
    decoder = load_decoder(tiny["target"], "lookup", "cpu", "float32", width=1, max_depth=7)
    drafter = decoder.drafter
    assert drafter is not None
    for text, expected in [
        ([3, 4, 5, 6, 7, 3, 4, 5], [6, 7, 3, 4, 5]),  # three tokens match; the copy ends with the text
        ([5, 9, 4, 5, 8, 6, 5], [8, 6, 5]),  # one token matches; its latest occurrence is copied
        ([3, 4, 5, 6], []),
    ]:
        drafter.start(text, 20, np.zeros(0), rng)  # type: ignore[arg-type]
        decoder.tree.clear()
        drafter.root(decoder.tree)
        for _ in range(7):
            drafter.expand(decoder.tree)
        assert decoder.tree.tokens.tolist() == expected
    drafter.start([3, 4, 5], 20, np.zeros(0), rng)  # type: ignore[arg-type]
    drafter.commit([6, 3, 4], np.zeros(0))  # type: ignore[arg-type]
    drafter.root(decoder.tree)
    assert decoder.tree.tokens.tolist() == [5]


def test_longest_match_includes_the_chain() -> None:
    seen = Occurrences([3, 4, 5, 6, 9, 9, 4, 5, 7, 3, 4], 2, longest=4)
    assert seen.find() == (2, 2)  # (3, 4) occurred before, followed by 5
    assert seen.find([5]) == (8, 2)  # two tokens are looked up; the latest (4, 5) is followed by 7
    seen.append([5])
    assert seen.find() == (8, 2)
    assert seen.find([6]) == (4, 4)  # (5, 6) occurred once, after (3, 4)
    assert Occurrences([3, 4, 5], 2).find() is None


@pytest.mark.parametrize("seed", range(6))
def test_greedy_text_is_plain_text_under_random_lengths(tiny: dict[str, Any], tiny_draft: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    decoder, prompt = copying(tiny, tiny_draft), rng.integers(2, 16, int(rng.integers(1, 40))).tolist()
    decoder.eos = frozenset()
    decoder.start(prompt, 80, rng)
    while not decoder.finished:
        decoder.cycle(int(rng.integers(0, 9)))
    assert decoder.tokens == plain(tiny, prompt, 80, frozenset())
    assert max(cycle.accepted for cycle in decoder.cycles) > 0


@pytest.mark.parametrize("seed", range(4))
def test_with_target_as_draft_model_only_copies_are_rejected(tiny: dict[str, Any], seed: int) -> None:
    """Whenever it is asked, the draft model has read the text so far and the chain with its copied tokens.

    Its drafts cost by the rows it reads; copies cost nothing.
    """
    decoder = copying(tiny, tiny["target"], clock=PricedClock(TABLE))
    drafter, drafts = decoder.drafter, []
    assert isinstance(drafter, CopyingDrafter)
    draft = drafter.model.draft

    def recorded(chain: list[int]) -> Any:
        children, rows = draft(chain)
        drafts.append((len(chain), rows))
        return children, rows

    drafter.model.draft = recorded  # type: ignore[method-assign]
    rng, copied, rejected = np.random.default_rng(seed), 0, 0
    decoder.eos = frozenset()
    decoder.start(rng.integers(2, 16, 12).tolist(), 200, rng)
    while not decoder.finished:
        drafts.clear()
        cycle = decoder.cycle(int(rng.integers(0, 9)))
        if cycle.accepted < min(cycle.drafted, cycle.emitted):
            assert cycle.accepted not in [at for at, _ in drafts]
            rejected += 1
        assert cycle.seconds["draft"] == pytest.approx(sum(TABLE.seconds("draft", rows) for _, rows in drafts))
        copied += cycle.drafted - len(drafts)
        assert len(cycle.nodes.probabilities) == len(cycle.nodes.entropies) == cycle.drafted
    assert copied > 10 and rejected > 3 and len(decoder.cycles) > 20


def test_sampling_proposes_copies_with_probability_1(tiny: dict[str, Any], tiny_draft: Path) -> None:
    """The acceptance rule is exact for any proposal, so sampled text keeps the target's distribution."""
    decoder, copied = copying(tiny, tiny_draft, temperature=0.8), 0
    decoder.eos = frozenset()
    decoder.start([3, 4, 5, 6, 7, 3, 4, 5], 100, np.random.default_rng(0))
    while not decoder.finished:
        free = []
        for _ in range(5):
            assert isinstance(decoder.drafter, CopyingDrafter)
            free.append(decoder.drafter.source(decoder.tree.tokens.tolist()) is not None)
            decoder.expand() if decoder.drafting else decoder.begin()
        assert len(decoder.tree.proposals) == 5
        for token, proposal, is_copy in zip(decoder.tree.tokens, decoder.tree.proposals, free, strict=True):
            assert proposal.probability(token) == 1.0 if is_copy else proposal.probability(token) > 0
        copied += sum(free)
        decoder.verify()
    assert copied > 5
    assert deviation(tiny, f"lookup+{tiny_draft}", 0.8, 0.9) > 0.001


@pytest.mark.skipif(WITHOUT_KERNELS, reason="int8 needs a C++ compiler")
def test_reported_probability_of_copies_is_calibrated() -> None:
    """The default model answers held-out prompts, with one copied token per cycle."""
    decoder, tokenizer = load_decoder(REAL, "lookup", "cpu", "int8", width=1), load_tokenizer(REAL)
    reported, right = [], []
    for prompt in load_prompts("all", "test")[::9]:
        decoder.start(encode_prompt(tokenizer, prompt), 64, np.random.default_rng(0))
        while not decoder.finished:
            cycle = decoder.cycle(1)
            reported += cycle.nodes.probabilities.tolist()
            right += [cycle.accepted] * cycle.drafted
    reported_array, right_array = np.array(reported), np.array(right)
    for low, high in ((0.45, 0.7), (0.7, 0.9), (0.9, 1.0)):
        picked = (reported_array >= low) & (reported_array < high)
        assert picked.sum() > 20 and abs(reported_array[picked].mean() - right_array[picked].mean()) < 0.15


def test_copy_probability_grows_with_match() -> None:
    chances = [copy_probability(n) for n in range(2, 20)]
    assert chances[0] == 0.5 and chances == sorted(chances) and chances[-1] < 1


def test_observation_of_matches_and_free_tokens(tiny: dict[str, Any], tiny_draft: Path) -> None:
    keywords = {**tiny, "drafter": f"lookup+{tiny_draft}", "decision": "token"}
    env = gym.make("SpecK-v0", **keywords)
    assert env.spec is not None
    env.spec.nondeterministic = False
    check_env(env.unwrapped, skip_render_check=True)
    spec_env = env.unwrapped
    assert isinstance(spec_env, SpecEnv) and isinstance(spec_env.decoder.drafter, CopyingDrafter)
    at, drafter, matches, free = spec_env.control.slices, spec_env.decoder.drafter, set(), []
    assert isinstance(drafter.copies, LookedUp)
    see, _ = spec_env.reset(seed=1)
    for _ in range(80):
        if not spec_env.decoder.tree.size:
            found = drafter.copies.seen.find()
            assert see[at["match"]][0] == pytest.approx(min(16, found.matched if found else 0) / 16)
            matches.add(float(see[at["match"]][0]))
        free.append(bool(see[at["free"]][0]))
        see, _, done, _, info = spec_env.step(int(spec_env.np_random.random() < 0.8))
        if not info["emitted"]:  # the drafted token cost nothing if it was observed as free
            assert (info["seconds"]["draft"] == 0) == free[-1]
        if done:
            see, _ = spec_env.reset()
    assert len(matches) > 2 and 10 < sum(free) < 70
    with pytest.raises(ValueError, match="a llama-server does not support prompt lookup"):
        gym.make("SpecK-v0", drafter="lookup+smollm2-135m-draft", engine="llama-server")
    with pytest.raises(ValueError, match="dtype is 'int8'; a llama-server computes its file's own weights on the CPU"):
        gym.make("SpecK-v0", dtype="int8", engine="llama-server")


@pytest.mark.parametrize("name", ["confidence", "svip", "adaedl"])
def test_rules_continue_copying_while_path_is_probable(name: str) -> None:
    """The rules stop where the next token costs a forward."""
    control = make_control("k", {"decision": "token"})
    rule, at = AGENTS[name](control=control, copy_threshold=0.2), control.slices
    see = np.zeros(control.observation_space.shape, np.float32)
    # values at which each of them stops
    see[at["drafted"]], see[at["probability"]], see[at["entropy"]] = 0.5, 0.01, 0.5

    def decide(path: float, free: int) -> int:
        see[at["path"]], see[at["free"]] = path, free
        return rule.predict(see)[0]

    assert decide(0.21, 1) == 1
    assert decide(0.19, 1) == decide(0.21, 0) == decide(0.19, 0) == 0
