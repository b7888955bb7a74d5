"""Agents that learn from a trace: they improve on static settings, and save and load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from spec_envs import agents, generate
from spec_envs.agents import AGENTS
from spec_envs.agents.traced.base import FILE, TracedAgent
from spec_envs.agents.traced.exact_pg import ExactPGAgent
from spec_envs.agents.traced.hindsight import HindsightAgent
from spec_envs.agents.traced.lessons import Lessons, collected
from spec_envs.controls.base import Control
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.controls.plans import Plans
from spec_envs.controls.tree import TreeControl
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.config import Experiment
from spec_envs.experiments.measure.bounds import Bounds
from spec_envs.experiments.runs import open_run, resolved
from spec_envs.vector.env import ReplayVectorEnv
from tests.support.lessons import random_lessons
from tests.support.traced import CASES, TABLE, TREE, control_of, costs_in

LEARNED = ("depth", "budget", "tree", "k", "token")
FREE = CostTable("free", {1: 1.0, 50: 1.0}, {1: 1e-6})
DEAR = CostTable("dear", {1: 1.0, 8: 1.2, 50: 2.0}, {1: 2.0})
SMALL = {"hidden": 32, "cycles": 512, "steps": 400, "batch_size": 64, "learning_rate": 1e-2}


@pytest.fixture(scope="session")
def learned(vectors: dict[str, ReplayVectorEnv]) -> dict[tuple[str, str], Any]:
    """Return both agents trained on each case, by name and case."""
    return {
        (name, case): AGENTS[name](control=control_of(case), seed=4, **SMALL).learn(0, copy.deepcopy(vectors[case]))
        for case in LEARNED
        for name in ("hindsight", "exact-pg")
    }


def seconds_under(env: ReplayVectorEnv, agent: TracedAgent) -> np.ndarray:
    """Return seconds ``[texts]`` of the training texts under an agent."""
    env = copy.deepcopy(env)
    texts = np.resize(env.texts, env.num_envs)
    seen, _ = env.reset(seed=0, options={"texts": texts})
    alive, spent = np.ones(env.num_envs, bool), np.zeros(env.num_envs)
    while alive.any():
        seen, _, terminated, _, _ = env.step(agent.actions(seen))
        spent += alive * sum(env.brought["seconds"].values())
        alive &= ~terminated
    return spent[: len(env.texts)]


@pytest.mark.parametrize("case", LEARNED)
@pytest.mark.parametrize("name", ["hindsight", "exact-pg"])
def test_agents_beat_mean_of_best_and_worst_static_setting(
    name: str, case: str, learned: dict[tuple[str, str], Any], vectors: dict[str, ReplayVectorEnv]
) -> None:
    env = vectors[case]
    bounds = Bounds(env.trace, control_of(case), TABLE, env.texts.tolist(), 20)
    static = bounds.static().sum(0)
    worst, best = static[np.isfinite(static)].max(), static.min()
    seconds = seconds_under(env, learned[name, case])
    assert (seconds >= bounds.clairvoyant() - 1e-9).all()
    assert seconds.sum() < (worst + best) / 2


@pytest.mark.parametrize("case", LEARNED)
def test_hindsight_chooses_only_open_plans(
    case: str, learned: dict[tuple[str, str], Any], vectors: dict[str, ReplayVectorEnv]
) -> None:
    for agent in (learned["hindsight", case], HindsightAgent(control_of(case), seed=1, hidden=16)):
        agent = copy.deepcopy(agent)
        agent.nodes = None  # the network decides
        lessons = random_lessons(vectors[case], agent.control)
        for table in (TABLE, DEAR):
            agent.price(table)
            for level in range(agent.plans.first, agent.plans.levels):
                at = np.full(len(lessons.seen), level)
                plan = agent._best(lessons.seen[:, level], at)
                assert agent.plans.open(at)[np.arange(len(plan)), plan].all()
                np.testing.assert_array_equal(agent.plans.level(lessons.seen[:, level]), at)
                chosen = agent.actions(lessons.seen[:, level])
                np.testing.assert_array_equal(chosen, agent.plans.actions(at, plan))
                assert [agent.predict(seen)[0] for seen in lessons.seen[:5, level]] == chosen[:5].tolist()


@pytest.mark.parametrize("name", ["hindsight", "exact-pg"])
@pytest.mark.parametrize("case", LEARNED)
def test_agents_read_past_cycles_only_if_asked(
    name: str, case: str, learned: dict[tuple[str, str], Any], vectors: dict[str, ReplayVectorEnv]
) -> None:
    agent = learned[name, case]
    lessons = random_lessons(vectors[case], agent.control)
    other = lessons.seen.copy()
    of_cycle = {"frontier", "survival", "gains", "entropy", "expansions", "drafted", "probability", "path", "free"}
    for entry, place in agent.control.slices.items():
        if entry not in of_cycle:
            other[..., place] = 1 - other[..., place]
    assert (
        sum(agent.control.slices[name].stop - agent.control.slices[name].start for name in agent.looks_at)
        == agent.width
    )
    same = decided(agent, lessons) == decided(agent, lessons._replace(seen=other))
    everything = AGENTS[name](control=control_of(case), seed=3, **SMALL, reads="everything")
    assert everything.network[0].in_features == agent.control.observation_space.shape[0]
    if case == "k":  # decided before anything is drafted, so it reads everything
        assert agent.network[0].in_features == everything.network[0].in_features
        assert not same.all()
    else:
        assert agent.network[0].in_features < everything.network[0].in_features
        assert same.all()


@pytest.mark.parametrize("case", LEARNED)
def test_hindsight_decides_by_a_tree_that_imitates_its_network(
    case: str, learned: dict[tuple[str, str], Any], vectors: dict[str, ReplayVectorEnv]
) -> None:
    """It is fitted anew under every cost table, and loses next to nothing of what is at stake where it decides."""
    agent = copy.deepcopy(learned["hindsight", case])
    for table in (FREE, DEAR):
        agent.price(table)
        seen, _ = (env := copy.deepcopy(vectors[case])).reset(seed=77)
        lost = staked = 0.0
        for _ in range(30):
            decided, stakes = agent.predict(seen)[0], agent.stakes(seen)
            lost += stakes[decided != agent.actions(seen)].sum()
            staked += stakes.sum()
            seen = env.step(decided)[0]
        assert lost < 0.05 * staked + 1e-3  # next to nothing is at stake where one action is the best everywhere


def test_decision_cache_is_bounded(
    learned: dict[tuple[str, str], Any], vectors: dict[str, ReplayVectorEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = copy.deepcopy(learned["exact-pg", "tree"])
    monkeypatch.setattr("spec_envs.agents.traced.base.KNOWN", 3)
    agent.known.clear()
    observations = random_lessons(vectors["tree"], agent.control).seen[:20, 1]
    for action, seen in zip(agent.actions(observations), observations, strict=True):
        assert agent.predict(seen)[0] == agent.predict(seen)[0] == action
        assert len(agent.known) <= 3


def test_unknown_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="reads is 'task'; expected one of cycle, everything"):
        HindsightAgent(control_of("depth"), reads="task")


def decided(agent: TracedAgent, lessons: Lessons) -> np.ndarray:
    """Return actions at every level, ``[levels, n]``."""
    return np.stack([agent.actions(lessons.seen[:, level]) for level in range(agent.plans.first, agent.plans.levels)])


@pytest.mark.parametrize("case", LEARNED)
def test_loaded_hindsight_adapts_to_another_cost_table(
    case: str, learned: dict[tuple[str, str], Any], vectors: dict[str, ReplayVectorEnv], tmp_path: Path
) -> None:
    agent = copy.deepcopy(learned["hindsight", case])
    lessons = random_lessons(vectors[case], agent.control)
    agent.save(tmp_path)
    loaded = HindsightAgent(control_of(case), seed=9, **SMALL)
    loaded.load(tmp_path)
    assert loaded.decision_seconds == agent.decision_seconds
    weights = copy.deepcopy(loaded.network.state_dict())
    paces, actions = [], []
    for table in (FREE, DEAR):
        agent.price(table)
        loaded.price(table)
        assert loaded.pace == pytest.approx(agent.pace, rel=1e-3)  # observations are stored in float16
        assert (decided(loaded, lessons) == decided(agent, lessons)).mean() > 0.99
        paces.append(loaded.pace)
        actions.append(decided(loaded, lessons))
    assert paces[1] != paces[0]
    if case != "token":  # that case can still use copies, which are free
        assert paces[1] < paces[0]
    if case not in ("budget", "k"):  # budget decides nothing about drafting, and k uses only copies under both tables
        assert (actions[0] != actions[1]).any()
    assert all(torch.equal(weights[name], kept) for name, kept in loaded.network.state_dict().items())
    loaded.save(tmp_path)
    again = HindsightAgent(control_of(case), **SMALL)
    again.load(tmp_path)
    assert again.price(FREE).pace == paces[0]
    np.testing.assert_array_equal(decided(again, lessons), actions[0])


def test_pace_of_hindsight_is_its_throughput(
    learned: dict[tuple[str, str], Any], vectors: dict[str, ReplayVectorEnv]
) -> None:
    for case in LEARNED:
        agent = copy.deepcopy(learned["hindsight", case])
        seconds = seconds_under(vectors[case], agent.price(TABLE)).sum()
        tokens = sum(min(vectors[case].trace.texts[i].tokens, 20) - 1 for i in vectors[case].texts)
        assert agent.pace == pytest.approx(tokens / seconds, rel=0.2), case


@pytest.mark.parametrize(("env_id", "own"), [("SpecDepth-v0", {"budget": 5}), ("SpecBudget-v0", {"depth": 3})])
def test_hindsight_prices_a_block_as_one_forward(
    env_id: str, own: dict[str, Any], traces: dict[str, Trace], tmp_path: Path
) -> None:
    """Deeper levels of a block cost nothing, and its one forward has the rows of the block, also once loaded."""
    table = CostTable("rows", {1: 1.0, 9: 1.2}, {1: 0.1, 9: 0.5})
    shared = {"trace": str(traces["blocks"].folder), "clock": costs_in(tmp_path, table), "max_depth": 4, "width": 3}
    env = ReplayVectorEnv(env_id, 4, **shared, **own)
    agent = HindsightAgent(env.control, hidden=4, cycles=16, steps=1, rounds=1).learn(0, env)
    agent.save(tmp_path)
    loaded = HindsightAgent(env.control, hidden=4)
    loaded.load(tmp_path)
    env.reset(seed=0)
    for found in (agent, loaded.price(table)):
        assert found.plans.forward(table) == 0
        np.testing.assert_allclose(found.plans.before(table), env.pending)
    assert loaded.pace == pytest.approx(agent.pace, rel=1e-3)


@pytest.mark.parametrize(
    ("env_id", "own"), [("SpecDepth-v0", {"budget": 5}), ("SpecBudget-v0", {"depth": 0}), ("SpecTree-v0", {})]
)
def test_hindsight_expects_no_more_copies_than_can_be_accepted(
    env_id: str, own: dict[str, Any], traces: dict[str, Trace], tmp_path: Path
) -> None:
    """A chain of copies in front of a head may be longer than the tree is deep; also once loaded."""
    keywords = {"trace": str(traces["copied tree"].folder), "clock": costs_in(tmp_path), "max_depth": 4, "width": 4}
    env = ReplayVectorEnv(env_id, 4, **keywords, **own)
    agent = HindsightAgent(env.control, hidden=4, cycles=512, steps=1, rounds=1)
    deeper = agent.outcomes.most
    agent.learn(0, env).save(tmp_path)
    loaded = HindsightAgent(env.control, hidden=4)
    loaded.load(tmp_path)
    lessons = collected(env, agent.actions, agent.plans, 512, seed=0)
    assert (lessons.accepted > deeper).any()
    for found in (agent, loaded):
        assert (lessons.accepted <= found.outcomes.most).all()


def test_hindsight_reports_what_is_missing(
    tiny: dict[str, Any], learned: dict[tuple[str, str], Any], tmp_path: Path
) -> None:
    control = control_of("depth")
    agent = HindsightAgent(control, **SMALL)
    with pytest.raises(ValueError, match="nothing to save"):
        agent.save(tmp_path)
    with pytest.raises(ValueError, match="pass trace=FOLDER"):
        agent.learn(0, gym.make("SpecDepth-v0", **tiny, **CASES["depth"][2]))
    with pytest.raises(ValueError, match="control's costs"):
        agent.predict(np.zeros(control.observation_space.shape, np.float32))
    learned["hindsight", "depth"].save(tmp_path)
    agent.load(tmp_path)
    with pytest.raises(ValueError, match="control's costs"):
        agent.predict(np.zeros(control.observation_space.shape, np.float32))
    control.costs = TABLE
    assert control.action_space.contains(agent.predict(np.zeros(control.observation_space.shape, np.float32))[0])
    assert agent.table is TABLE


@pytest.mark.parametrize("name", ["hindsight", "exact-pg"])
def test_unreadable_policy_is_refused(name: str, learned: dict[tuple[str, str], Any], tmp_path: Path) -> None:
    agent = AGENTS[name](control=control_of("depth"), **SMALL)
    with pytest.raises(ValueError, match="cannot read the policy in"):
        agent.load(tmp_path)
    learned[name, "tree"].save(tmp_path)
    with pytest.raises(ValueError, match="cannot read the policy in"):  # of another control
        agent.load(tmp_path)
    learned[name, "depth"].save(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    agent.load(tmp_path)
    for damaged in (b"", whole[: len(whole) // 2], whole[8:]):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot read the policy in"):
            agent.load(tmp_path)


def enumerated(control: Control, plans: Plans, chances: np.ndarray) -> np.ndarray:
    """Return the probability of each plan ``[plans]``, summed over all sequences of actions with these
    probabilities ``[levels, actions]``."""
    found = np.zeros(len(plans.sizes))

    def end(size: int, budget: int, chance: float) -> None:
        found[np.flatnonzero(plans.sizes == size)[budget]] += chance

    def walk(level: int, chance: float) -> None:
        for action, own in enumerate(chances[level] * chance):
            if isinstance(control, DepthControl):
                if action == 0 or level + 1 == control.max_depth:
                    end(level + action, 0, own)
                else:
                    walk(level + 1, own)
            elif isinstance(control, TreeControl):
                if action or level == control.max_depth:
                    end(level, (action or len(control.budgets)) - 1, own)
                else:
                    walk(level + 1, own)
            elif not isinstance(control, KControl):
                end(control.depth, action, own)  # type: ignore[attr-defined]
            elif control.decision == "cycle":
                end(action, 0, own)
            elif action == 0 or level + 1 == control.k_max:
                end(level + action, 0, own)
            else:
                walk(level + 1, own)

    walk(plans.first, 1.0)
    return found


@pytest.mark.parametrize("case", ["depth", "budget", "tree", "one budget", "k", "token"])
def test_plan_probabilities_follow_from_policy(case: str, vectors: dict[str, ReplayVectorEnv]) -> None:
    agent = ExactPGAgent(control_of(case), seed=4, hidden=16)
    seen = torch.from_numpy(random_lessons(vectors[case], agent.control, 20).seen)
    with torch.no_grad():
        agent.network[-1].weight *= 4  # makes the policy far from uniform
        chances, policy = agent._chances(seen).numpy(), agent.network(seen[..., : agent.width]).softmax(-1).numpy()
    np.testing.assert_allclose(chances.sum(1), 1.0, atol=1e-5)
    assert chances.std(0).max() > 1e-3 and chances[:, agent.plans.sizes == agent.plans.sizes.max()].max() > 0.01
    for found, own in zip(chances, policy, strict=True):
        np.testing.assert_allclose(found, enumerated(agent.control, agent.plans, own), atol=1e-5)


@pytest.mark.parametrize("case", LEARNED)
def test_exact_pg_improves_and_saves(
    case: str, learned: dict[tuple[str, str], Any], vectors: dict[str, ReplayVectorEnv], tmp_path: Path
) -> None:
    agent, before = learned["exact-pg", case], ExactPGAgent(control_of(case), seed=3, **SMALL)
    lessons = random_lessons(vectors[case], agent.control)
    rate = agent.tokens / agent.seconds
    seconds = lessons.begun[:, None] + lessons.forwards * agent.plans.forward(TABLE) + agent.plans.verification(TABLE)
    worth = lessons.accepted + 1 - rate * seconds

    def expected(policy: ExactPGAgent) -> float:
        with torch.no_grad():
            return float((policy._chances(torch.from_numpy(lessons.seen)).numpy() * worth).sum(1).mean())

    assert expected(agent) > expected(before) + 0.05
    agent.save(tmp_path)
    before.load(tmp_path)
    assert before.decision_seconds == agent.decision_seconds
    np.testing.assert_array_equal(decided(before, lessons), decided(agent, lessons))
    np.testing.assert_allclose(expected(before), expected(agent))


def test_hindsight_run_is_lossless(
    learned: dict[tuple[str, str], Any],
    traces: dict[str, Trace],
    tiny: dict[str, Any],
    tmp_path: Path,
) -> None:
    env = {"trace": str(traces["tree"].folder), "max_new_tokens": 20, **CASES["tree"][2], "budgets": [0, 2, 30]}
    experiment = Experiment(agent="hindsight", env=env, hyperparameters=SMALL)
    run = tmp_path / "run"
    open_run(run, resolved(experiment, "SpecTree-v0", "hindsight", 0))
    learned["hindsight", "tree"].save(run)
    Path(costs_in(run)).rename(run / "clock.json")
    control, agent = agents.load(run)
    assert control.costs is not None and control.costs.seconds("draft", 4) == TABLE.seconds("draft", 4)
    decoder = load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32", **TREE)
    verified = set()
    for prompt in ([5, 6, 7, 8], [3, 4, 3, 4], [9, 2, 11]):
        done = generate(decoder, control, agent, prompt, 24).run()
        verified |= {cycle.verified for cycle in done.cycles}
        assert done.tokens == generate(decoder.plain(), None, None, prompt, 24).run().tokens
    assert max(verified) > 0
    assert agent.pace == pytest.approx(learned["hindsight", "tree"].pace, rel=1e-2)
