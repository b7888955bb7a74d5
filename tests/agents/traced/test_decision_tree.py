"""The decision tree imitates its teacher, is read back as it was, and observes only what it compares."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml

from spec_envs import agents
from spec_envs.agents import AGENTS
from spec_envs.agents.run import Run
from spec_envs.agents.traced.base import FILE
from spec_envs.agents.traced.decision_tree import DecisionTreeAgent, stakes
from spec_envs.agents.traced.hindsight import LEAST, HindsightAgent
from spec_envs.agents.traced.nodes import LEAF
from spec_envs.controls.base import layout
from spec_envs.controls.k import KControl
from spec_envs.decoding.traces.trace import Trace
from spec_envs.sealed import read_weights, write_weights
from spec_envs.vector.env import ReplayVectorEnv
from tests.support.lessons import random_lessons
from tests.support.rollouts import generation_under
from tests.support.traced import CASES, control_of, costs_in

LEARNED = ("depth", "budget", "tree", "k", "token")
TEACHER = {"hidden": 16, "cycles": 512, "steps": 150, "batch_size": 64, "learning_rate": 1e-2}
SMALL = {"decisions": 1024, "rounds": 1}


def run_of(folder: Path, case: str, name: str, hyperparameters: dict[str, Any], env: dict[str, Any]) -> str:
    """Write the config of a run of an agent on a case, and return the folder."""
    env_id, _, keywords = CASES[case]
    config = {"id": env_id, "env": keywords | env, "agent": name, "hyperparameters": hyperparameters}
    (folder / "config.yml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
    return str(folder)


@pytest.fixture(scope="session")
def teachers(
    vectors: dict[str, ReplayVectorEnv], traces: dict[str, Trace], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Return the folder of a run of hindsight on each case."""
    found = {}
    for case in LEARNED:
        folder = tmp_path_factory.mktemp(case)
        HindsightAgent(control_of(case), seed=4, **TEACHER).learn(0, copy.deepcopy(vectors[case])).save(folder)
        env = {"trace": str(traces[CASES[case][1]].folder), "clock": costs_in(folder)}
        found[case] = run_of(folder, case, "hindsight", TEACHER, env)
    return found


@pytest.fixture(scope="session")
def learned(teachers: dict[str, str], vectors: dict[str, ReplayVectorEnv]) -> dict[str, DecisionTreeAgent]:
    """Return a tree for each case, distilled from hindsight."""
    return {case: distilled(case, vectors, teacher=teachers[case], depth=8) for case in LEARNED}


def distilled(case: str, vectors: dict[str, ReplayVectorEnv], **hyperparameters: Any) -> DecisionTreeAgent:
    """Return a tree that is distilled on a case."""
    return DecisionTreeAgent(control_of(case), **SMALL | hyperparameters).learn(0, copy.deepcopy(vectors[case]))


def decided_along(env: ReplayVectorEnv, agent: Any, steps: int = 60) -> np.ndarray:
    """Return the observations ``[n, …]`` along the decisions of an agent, from another seed than those of learning."""
    env, seen = copy.deepcopy(env), []
    observations, _ = env.reset(seed=77)
    for _ in range(steps):
        seen.append(observations)
        observations = env.step(agent.predict(observations, deterministic=True)[0])[0]
    return np.concatenate(seen)


@pytest.mark.parametrize("case", LEARNED)
def test_tree_decides_as_hindsight(
    case: str,
    teachers: dict[str, str],
    learned: dict[str, DecisionTreeAgent],
    vectors: dict[str, ReplayVectorEnv],
) -> None:
    """It loses next to nothing of what is at stake in the decisions along its own path."""
    _, teacher = agents.load(teachers[case])
    seen = decided_along(vectors[case], learned[case])
    assert isinstance(teacher, HindsightAgent)
    same = teacher.price(vectors[case].cost_tables[0]).actions(seen) == learned[case].predict(seen)[0]
    weight = stakes(teacher, seen)
    assert weight[same].sum() > 0.95 * weight.sum()


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_tree_finds_the_threshold_of_a_rule(
    threshold: float, vectors: dict[str, ReplayVectorEnv], tmp_path: Path
) -> None:
    """The first token is always drafted, and a further one where the last is likely enough."""
    folder = run_of(tmp_path, "drafted", "confidence", {"threshold": threshold}, {})
    tree = distilled("drafted", vectors, teacher=folder, depth=2, decisions=4096)
    seen = decided_along(vectors["drafted"], tree)
    drafted, probability = (seen[:, tree.control.slices[name].start] for name in ("drafted", "probability"))
    drafts = (drafted == 0) | (probability >= threshold)
    assert 0.1 < drafts.mean() < 0.9
    assert (tree.predict(seen)[0] == drafts).mean() > 0.98
    assert set(tree.looks_at or ()) <= {"drafted", "probability", "path", "free"}


def test_decisions_weigh_what_depends_on_them(
    vectors: dict[str, ReplayVectorEnv], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the first token matters, which is always drafted, the tree always drafts."""
    first = control_of("drafted").slices["drafted"].start
    monkeypatch.setattr(
        "spec_envs.agents.traced.decision_tree.stakes", lambda _, seen: (seen[:, first] == 0).astype(float)
    )
    folder = run_of(tmp_path, "drafted", "confidence", {"threshold": 0.6}, {})
    assert distilled("drafted", vectors, teacher=folder).nodes.action == [1]


def test_named_teacher_is_trained_first(
    vectors: dict[str, ReplayVectorEnv], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Any] = []

    class Small(HindsightAgent):
        def __init__(self, control: Any, **hyperparameters: Any):
            super().__init__(control, **hyperparameters | TEACHER)
            made.append(self)

    monkeypatch.setitem(AGENTS, "hindsight", Small)
    tree = DecisionTreeAgent(control_of("token"), seed=3, depth=8, **SMALL)
    tree.learn(0, copy.deepcopy(vectors["token"]), Run(tmp_path))
    [teacher] = made
    assert teacher.kept is not None and teacher.settings.seed == 3
    seen = decided_along(vectors["token"], tree)
    assert (teacher.predict(seen)[0] == tree.predict(seen)[0]).mean() > 0.9
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1024, 2048]
    assert all(0.9 < line["agreement"] <= 1 for line in lines)


def test_tree_is_trained_on_its_own_path(
    teachers: dict[str, str], vectors: dict[str, ReplayVectorEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first round the tree decides; the teacher only labels."""
    env, rounds = copy.deepcopy(vectors["token"]), []
    tree = DecisionTreeAgent(control_of("token"), teacher=teachers["token"], depth=1, decisions=160, rounds=1)
    step = env.step

    def watched(actions: np.ndarray) -> Any:
        rounds.append((tree.predict(seen[-1])[0] == actions).all())
        result = step(actions)
        seen.append(result[0])
        return result

    reset = env.reset

    def begun(**keywords: Any) -> Any:
        result = reset(**keywords)
        seen.append(result[0])
        return result

    seen: list[np.ndarray] = []
    monkeypatch.setattr(env, "step", watched)
    monkeypatch.setattr(env, "reset", begun)
    tree.learn(0, env)
    assert len(rounds) == 40 and not all(rounds[:20]) and all(rounds[20:])


def test_actions_of_hindsight_have_the_most_value(
    teachers: dict[str, str], vectors: dict[str, ReplayVectorEnv]
) -> None:
    for case in LEARNED:
        control, teacher = agents.load(teachers[case])
        assert isinstance(teacher, HindsightAgent) and control.costs is not None
        teacher.price(control.costs)
        lessons = random_lessons(vectors[case], control)
        for level in range(teacher.plans.first, teacher.plans.levels):
            seen = lessons.seen[:, level]
            values = teacher.values(seen)
            assert values.shape == (len(seen), control.action_space.n)
            np.testing.assert_array_equal(values.argmax(1), teacher.actions(seen))
            closed = np.zeros(values.shape[1], bool)
            if teacher.plans.stepwise and level == teacher.plans.deepest:
                closed[teacher.plans.drafts] = True
            np.testing.assert_array_equal(np.isfinite(values), np.broadcast_to(~closed, values.shape))
            ranked = np.sort(values[:, ~closed], 1)
            expected = ranked[:, -1] - ranked[:, -2] if ranked.shape[1] > 1 else np.zeros(len(seen))
            np.testing.assert_allclose(stakes(teacher, seen), expected + LEAST, atol=1e-9)
    np.testing.assert_array_equal(stakes(AGENTS["exact-pg"](control=control_of("k"), hidden=4), lessons.seen[:, 0]), 1)


@pytest.mark.parametrize("case", LEARNED)
def test_tree_is_small(case: str, teachers: dict[str, str], learned: dict[str, DecisionTreeAgent]) -> None:
    """It is no deeper than it may be, every comparison decides something, and it reads no more than its teacher."""
    nodes = learned[case].nodes
    depth, leaves = [0] * len(nodes.feature), [set[int]() for _ in nodes.feature]
    for node, feature in enumerate(nodes.feature):
        for child in (nodes.left[node], nodes.right[node]) if feature != LEAF else ():
            depth[child] = depth[node] + 1
    for node in reversed(range(len(nodes.feature))):
        inner = nodes.feature[node] != LEAF
        leaves[node] = leaves[nodes.left[node]] | leaves[nodes.right[node]] if inner else {nodes.action[node]}
        assert not inner or len(leaves[node]) > 1
    assert max(depth) <= 8
    assert max(depth) > 0 or case in ("depth", "budget", "tree")  # where one action is the best everywhere
    control, teacher = agents.load(teachers[case])
    read = {number for name in teacher.looks_at or () for number in range(1000)[control.slices[name]]}
    assert set(nodes.feature) - {LEAF} <= read


@pytest.mark.parametrize("case", LEARNED)
def test_tree_observes_only_what_it_compares(
    case: str, learned: dict[str, DecisionTreeAgent], traces: dict[str, Trace], tmp_path: Path
) -> None:
    tree = learned[case]
    for name, place in tree.control.slices.items():
        assert (name in (tree.looks_at or ())) == bool(set(tree.nodes.feature) & set(range(1000)[place]))
    env_id, trace, keywords = CASES[case]
    shared = {"trace": str(traces[trace].folder), "clock": costs_in(tmp_path), "max_new_tokens": 20, **keywords}
    env: Any = gym.make(env_id, **shared).unwrapped
    assert generation_under(env, env.control, tree, 20, seed=0).cycles


@pytest.mark.parametrize("case", LEARNED)
def test_rules_are_those_of_the_tree(
    case: str, learned: dict[str, DecisionTreeAgent], vectors: dict[str, ReplayVectorEnv]
) -> None:
    """The text is the tree: as a program it decides alike."""
    tree = learned[case]
    program = "".join(f"    {line}\n" for line in tree.rules().replace("action ", "return ").splitlines())
    names: dict[str, Any] = {}
    exec(f"def decide({', '.join(tree.control.slices)}):\n{program}", names)
    seen = decided_along(vectors[case], tree)
    found = [names["decide"](*(one[place] for place in tree.control.slices.values())) for one in seen]
    assert (np.array(found) == tree.predict(seen)[0]).mean() > 0.99  # the text has six digits of a threshold


def test_two_trees_of_one_seed_are_equal(
    teachers: dict[str, str], vectors: dict[str, ReplayVectorEnv], tmp_path: Path
) -> None:
    files = []
    for _ in range(2):
        tree = distilled("tree", vectors, teacher=teachers["tree"], seed=5)
        tree.decision_seconds = tree.priced_seconds
        tree.save(tmp_path)
        files.append((tmp_path / FILE).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("case", LEARNED)
def test_loaded_tree_is_the_saved_one(case: str, learned: dict[str, DecisionTreeAgent], tmp_path: Path) -> None:
    """Its teacher's folder is not needed."""
    learned[case].save(tmp_path)
    control, loaded = agents.load(run_of(tmp_path, case, "decision-tree", {"teacher": "elsewhere"}, {}))
    assert isinstance(loaded, DecisionTreeAgent) and control.costs is None
    assert loaded.nodes == learned[case].nodes
    assert (loaded.looks_at, loaded.decision_seconds) == (learned[case].looks_at, learned[case].decision_seconds)


def whole(*numbers: int) -> torch.Tensor:
    """Return whole numbers as a tree's file holds them."""
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": None}, "does not hold the arrays feature, threshold, left, right, action of a tree"),
        ({"action": torch.zeros(3)}, "does not hold the arrays"),
        ({"action": whole(0, 0)}, "all of one length"),
        ({"feature": whole(999, -1, -1)}, "feature of node 0 is 999, expected -1 to "),
        ({"feature": whole(0, -2, -1)}, "feature of node 1 is -2"),
        ({"threshold": torch.full((3,), torch.nan).double()}, "threshold of node 0 is nan, expected a finite number"),
        ({"left": whole(0, 0, 0)}, "left of node 0 is 0, expected a later node, at most 2"),
        ({"right": whole(3, 0, 0)}, "right of node 0 is 3"),
        ({"action": whole(7, 0, 2)}, "action of node 2 is 2, expected 0 to 1"),
        ({"action": whole(7, -1, 1)}, "action of node 1 is -1"),
        (
            {**dict.fromkeys(("feature", "left", "right", "action"), whole()), "threshold": torch.zeros(0).double()},
            "has no nodes",
        ),
    ],
)
def test_arrays_that_are_no_tree_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    control = control_of("token")
    tree = DecisionTreeAgent(control)
    tensors = {"feature": whole(0, -1, -1), "left": whole(1, 0, 0), "right": whole(2, 0, 0), "action": whole(7, 0, 1)}
    tensors["threshold"] = torch.zeros(3, dtype=torch.float64)
    write_weights(tmp_path / FILE, tensors, decision_seconds="1e-5", observation=layout(control))
    tree.load(tmp_path)
    changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    write_weights(tmp_path / FILE, changed, decision_seconds="1e-5", observation=layout(control))
    with pytest.raises(ValueError, match=rf"cannot read the policy in .*{message}.*; delete it to train again"):
        tree.load(tmp_path)


def test_unreadable_trees_are_refused(learned: dict[str, DecisionTreeAgent], tmp_path: Path) -> None:
    tree = DecisionTreeAgent(control_of("depth"))
    with pytest.raises(ValueError, match="cannot read the policy in"):
        tree.load(tmp_path)
    learned["tree"].save(tmp_path)
    with pytest.raises(ValueError, match=r"its tree reads .*, but here SpecDepth-v0 has .*; delete it to train again"):
        tree.load(tmp_path)
    learned["depth"].save(tmp_path)
    written = (tmp_path / FILE).read_bytes()
    for damaged in (b"", written[: len(written) // 2], written[8:]):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot read the policy in"):
            tree.load(tmp_path)
    (tmp_path / FILE).write_bytes(written)
    tensors, metadata = read_weights(tmp_path / FILE, "", "")
    write_weights(tmp_path / FILE, tensors, observation=metadata["observation"])
    with pytest.raises(ValueError, match="decision_seconds is None"):
        tree.load(tmp_path)


def test_unfit_teachers_are_refused(
    teachers: dict[str, str], vectors: dict[str, ReplayVectorEnv], tiny: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("ppo", "decision-tree"):
        with pytest.raises(
            ValueError, match=f"teacher is '{name}'; expected one of exact-pg, hindsight, or the folder"
        ):
            DecisionTreeAgent(control_of("token"), teacher=name)
    with pytest.raises(ValueError, match="not of SpecK-v0 with these settings"):
        DecisionTreeAgent(KControl(k_max=6, adjustment_interval=8))
    with pytest.raises(ValueError, match="nowhere is not a readable run folder"):
        distilled("token", vectors, teacher=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"the teacher .* was made for SpecTree-v0 with .*, but here SpecK-v0 has"):
        distilled("token", vectors, teacher=teachers["tree"])
    with pytest.raises(ValueError, match="pass trace=FOLDER"):
        DecisionTreeAgent(control_of("depth")).learn(0, gym.make("SpecDepth-v0", **tiny, **CASES["depth"][2]))


def test_price_counts_comparisons() -> None:
    shallow, deep = (DecisionTreeAgent(control_of("k"), depth=depth).priced_seconds for depth in (2, 12))
    assert deep - shallow == pytest.approx(1e-6)
    assert deep < HindsightAgent(control_of("k"), comparisons=0).priced_seconds
    assert HindsightAgent(control_of("k"), comparisons=12).priced_seconds == deep
