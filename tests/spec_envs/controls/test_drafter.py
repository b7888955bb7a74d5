"""SpecDrafter-v0: who drafts is what was asked, what is observed is what is known, and every text stays the target's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs import generate
from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.controls import make_control
from spec_envs.controls.drafter import NEUTRAL, RATE
from spec_envs.decoding.drafters.portfolio import Portfolio, default_members, members
from spec_envs.decoding.loading import load_decoder
from tests.support.models.tiny import REAL

SIZES: dict[str, Any] = {"sizes": (1, 2, 4), "depths": (0, 1, 1), "width": 3}


def several(tiny: dict, tiny_draft: Path) -> str:
    """Return the names of a copier, a head and a draft model."""
    return f"lookup,{tiny['drafter']},{tiny_draft}@9"


@pytest.fixture
def env(tiny: dict, tiny_draft: Path) -> Any:
    keywords = {**tiny, **SIZES, "drafter": several(tiny, tiny_draft), "max_new_tokens": 200}
    made = gym.make("SpecDrafter-v0", **keywords).unwrapped
    made.reset(seed=0)
    return made


def entry(env: Any, observation: np.ndarray, name: str) -> list[float]:
    """Return what an observation shows under a name."""
    return observation[env.control.slices[name]].tolist()


def test_who_drafts_and_how_much(env: Any) -> None:
    names = env.control.drafters
    infos = [env.step(action)[4] for action in range(10)]
    assert [info["drafter"] for info in infos] == ["", *np.repeat(names, 3)]
    assert [info["drafted"] for info in infos[4:7]] == [3, 12, 12]  # trees of a width of 3
    assert [info["verified"] for info in infos[4:]] == [1, 2, 4, 1, 2, 4]
    assert infos[0]["drafted"] == 0 and infos[0]["emitted"] == 1
    assert all(info["drafted"] <= size for info, size in zip(infos[1:4], (1, 2, 4), strict=True))
    assert infos[1]["seconds"]["draft"] == 0 < infos[4]["seconds"]["draft"]


def test_settings_are_actions_by_name(env: Any, tiny: dict) -> None:
    control, observation = env.control, np.zeros(env.observation_space.shape, np.float32)
    settings = control.settings()
    assert settings[:4] == ("plain", "lookup:1", "lookup:2", "lookup:4") and settings[6] == f"{tiny['drafter']}:4"
    assert [control.follow(setting, observation) for setting in settings] == list(range(10))
    assert control.followed([0, 3], [0, 4]) == ["plain", "lookup:4"]
    with pytest.raises(ValueError, match="there is no setting 'lookup:3'; expected one of plain, lookup:1"):
        control.follow("lookup:3", observation)


def test_rows_to_catch_up_are_observed_and_charged(env: Any) -> None:
    """A drafter that is left out reads all that it missed in its next forward."""
    table = env.decoder.clock.table
    for asked, action in ((1, 4), (2, 7)):
        missed = 0
        for _ in range(5):
            observation, _, _, _, info = env.step(0)
            missed += info["emitted"]
        lag = round(64 * entry(env, observation, "lag")[asked])
        assert lag > missed and entry(env, observation, "lag")[0] == 0
        *_, info = env.step(action)
        assert info["seconds"]["draft"] == pytest.approx(table.seconds("draft", lag))
    observation, *_ = env.step(0)
    assert entry(env, observation, "last") == [1.0, *[0.0] * 9]


def test_known_scores(env: Any) -> None:
    """The one that was asked and the one without weights are known, the others are not."""
    for action, known in ((0, [1, 0, 0]), (2, [1, 0, 0]), (6, [1, 1, 0]), (9, [1, 0, 1])):
        chain = env.decoder.drafter.ahead(0, 4)
        before = env.control.survival.copy()
        observation, _, _, _, info = env.step(action)
        emitted = env.decoder.tokens[-info["emitted"] :]
        right = next((i for i, pair in enumerate(zip(chain, emitted, strict=False)) if pair[0] != pair[1]), None)
        right = min(len(chain), len(emitted)) if right is None else right
        assert entry(env, observation, "known") == known
        assert entry(env, observation, "scores")[0] == right / 4
        if action > 3:
            asked = (action - 1) // 3
            assert entry(env, observation, "scores")[asked] == info["accepted"] / 4
            share, size = info["accepted"] / 4, env.control.survival[asked, 2]
            assert size == pytest.approx(before[asked, 2] + RATE * (share - before[asked, 2]))
        unknown = [i for i in (1, 2) if not known[i]]
        np.testing.assert_array_equal(env.control.survival[unknown], before[unknown])


def test_chain_tells_about_other_lengths_and_tree_does_not(env: Any) -> None:
    control = env.control
    control.reset(np.random.default_rng(0))
    control._learn(2, 1, known=True)  # the second token was rejected
    assert control.survival[2].tolist() == pytest.approx([NEUTRAL + RATE * (s - NEUTRAL) for s in (1, 1 / 2, 1 / 4)])
    control._learn(2, 2, known=False)  # a chain of two was accepted: nothing is known of four
    assert control.survival[2, 2] == pytest.approx(NEUTRAL + RATE * (1 / 4 - NEUTRAL))
    control._move(1, 1, 2)
    assert control.survival[1].tolist() == pytest.approx([NEUTRAL, NEUTRAL + RATE * (1 - NEUTRAL), NEUTRAL])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_text_is_plain_text(seed: int, tiny: dict, tiny_draft: Path) -> None:
    control = make_control("SpecDrafter-v0", {**tiny, **SIZES, "drafter": several(tiny, tiny_draft)})
    decoder = control.open(target=tiny["target"], drafter=several(tiny, tiny_draft), device="cpu", dtype="float32")
    prompt = np.random.default_rng(seed).integers(2, 16, 9).tolist()
    done = generate(decoder, control, RandomAgent(control, seed=seed), prompt, 60, seed=1).run()
    assert done.tokens == generate(decoder.plain(), None, None, prompt, 60).run().tokens
    assert sum(cycle.accepted for cycle in done.cycles) > 5


def test_text_that_is_sampled_depends_on_seed_alone(tiny: dict, tiny_draft: Path) -> None:
    """Chains of the draft model are drawn, the head's trees are not, and both have their turns."""
    keywords = {**tiny, **SIZES, "drafter": several(tiny, tiny_draft), "temperature": 1.0}
    texts = []
    for seed in (1, 1, 2):
        env: Any = gym.make("SpecDrafter-v0", **keywords).unwrapped
        rng, done = np.random.default_rng(0), False
        env.reset(seed=seed, options={"prompt": "the a of and in"})
        while not done:
            done = env.step(int(rng.integers(10)))[2]
        texts.append(env.decoder.tokens)
    assert texts[0] == texts[1] != texts[2]


def test_members_and_their_mistakes(tiny: dict, tiny_draft: Path) -> None:
    assert [str(name) for name in members("lookup, lookup+a")] == ["lookup", "lookup+a"]
    for wrong, message in (
        ("lookup", "drafter is 'lookup'; expected two or more names of drafters, joined by commas"),
        ("lookup,", "expected two or more names of drafters, joined by commas"),
        ("lookup,,a", "expected two or more names of drafters, joined by commas"),
        ("lookup,a,lookup", "'lookup' is there twice, name it once"),
    ):
        with pytest.raises(ValueError, match=message):
            make_control("SpecDrafter-v0", {"drafter": wrong})
    for sizes, message in (
        ({"sizes": (4, 2)}, r"sizes is \[4, 2\]; expected ascending numbers of tokens, 1 to 4096"),
        ({"sizes": (0, 2)}, "expected ascending numbers of tokens"),
        ({"sizes": ()}, "expected ascending numbers of tokens"),
        ({"sizes": (2, 4)}, r"depths is \[0, 1, 2\]; expected expansions for each of the 2 sizes"),
        ({"depths": (0, 2, 1)}, "0 or more and not fewer for a larger size"),
        ({"width": 0}, "width is 0; expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_control("SpecDrafter-v0", {"drafter": "lookup,a"} | sizes)
    with pytest.raises(ValueError, match=r"no drafters are known for 'nobody'; name them with drafter="):
        make_control("SpecDrafter-v0", {"target": "nobody"})
    shared = {"device": "cpu", "dtype": "float32", "target": tiny["target"]}
    with pytest.raises(ValueError, match="one of several drafters; leave it out"):
        gym.make("SpecDrafter-v0", **shared, drafter="lookup,exit:1")
    with pytest.raises(ValueError, match="SpecK-v0 has one, SpecDrafter-v0 chooses between several"):
        gym.make("SpecK-v0", **shared, drafter=f"lookup,{tiny_draft}")
    with pytest.raises(ValueError, match=r"tokenizer|vocabulary"):
        gym.make("SpecDrafter-v0", **shared, drafter=f"lookup,{REAL}")
    control = make_control("SpecDrafter-v0", {"drafter": f"lookup,{tiny_draft}"} | SIZES)
    with pytest.raises(ValueError, match=r"the decoder's drafters are .*, the control was made for lookup"):
        control.open(**shared, drafter=several(tiny, tiny_draft))
    alone = load_decoder(tiny["target"], str(tiny_draft), "cpu", "float32", width=1)
    alone.start([3, 4], 9, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"does not have the drafters lookup,.*; open it with control.open"):
        control.act(alone, 1)


def test_default_members_are_lookup_and_all_bare_drafters() -> None:
    assert default_members(REAL) == "lookup,suffix,smollm2-135m-eagle3,smollm2-135m-draft"
    assert default_members("qwen2.5-coder-1.5b") == "lookup,suffix,qwen2.5-coder-0.5b"


def test_nobody_is_chosen_at_first(tiny: dict, tiny_draft: Path) -> None:
    decoder = load_decoder(tiny["target"], several(tiny, tiny_draft), "cpu", "float32", width=3, max_depth=3)
    assert isinstance(decoder.drafter, Portfolio)
    decoder.start([3, 4, 5], 30, np.random.default_rng(0))
    assert decoder.cycle(3).drafted == 0
    decoder.drafter.choose(2)
    assert decoder.cycle(3).drafted == 3
    decoder.drafter.choose(None)
    assert decoder.cycle(3).drafted == 0


@pytest.mark.model
def test_drafter_left_out_for_hundreds_of_rows_drafts_as_if_asked_all_the_time() -> None:
    """Drafters of int8 keep memory for few rows, and a head keeps states of all that it has not read."""
    names = "lookup,smollm2-135m-eagle3,smollm2-135m-draft"
    often, seldom = (load_decoder(REAL, names, "cpu", width=4, max_depth=5) for _ in range(2))
    prompt, tokens = list(range(300, 340)), 240
    for decoder in (often, seldom):
        decoder.start(prompt, tokens, np.random.default_rng(0))
        decoder.eos = frozenset()
    for _ in range(tokens - 20):
        for asked in (1, 2):
            often.drafter.choose(asked)  # type: ignore[union-attr]
            often.tree.clear()
            often.drafting = False
            often.begin()
        often.tree.clear()
        often.drafting = False
        often.verify(0)
        seldom.verify(0)
    for asked in (1, 2):
        trees = []
        for decoder in (often, seldom):
            decoder.drafter.choose(asked)  # type: ignore[union-attr]
            decoder.begin()
            decoder.expand()
            trees.append((decoder.tree.tokens.tolist(), decoder.tree.scores.tolist()))
            decoder.verify(0)
        assert trees[0] == trees[1]
