"""Arms of the benchmark: those trained on a trace, those tuned on it, and the replayed speed of each."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from spec_envs.agents import AGENTS, load
from spec_envs.controls import Control, Policy, make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.traces.replay import replayed
from spec_envs.decoding.traces.trace import Trace
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.experiments.hyperparameters import set_by_run
from spec_envs.experiments.measure.arms import Encoded, Sample, decoded, run_arms
from spec_envs.experiments.measure.mixes import mixed
from spec_envs.experiments.measure.statistics import throughput
from spec_envs.files import write_json
from spec_envs.text import Detokenizer

ENVS = 64  # environments that PPO learns from at once
LTD = {"observation": "ltd", "reward": "ltd", "episode": "cycle"}
PPO = {"n_steps": 32, "batch_size": 512, "n_epochs": 6, "gamma": 1.0, "gae_lambda": 0.95, "ent_coef": 0.002}
LTD_PPO = {
    "n_steps": 8,  # of each of 16 environments, 128 in all
    "batch_size": 64,
    "n_epochs": 1,
    "gamma": 0.99,
    "ent_coef": 0.0,
    "lr_schedule": "adawm",
}
LTD_NETS = {"pi_arch": [512, 256], "vf_arch": [1024, 512]}
GRIDS: dict[str, dict[str, dict[str, Sequence[Any]]]] = {  # hyper-parameters that are tried of published rules
    "SpecDepth-v0": {"ddd": {"threshold": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)}},
    "SpecBudget-v0": {
        "expected-gain": {"scale": (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)},
        "ucb-budget": {"exploration": (0.01, 0.05, 0.2), "discount": (0.99, 0.999, 1.0)},
    },
    "SpecTree-v0": {
        "ddd": {"threshold": (0.3, 0.5, 0.7, 0.9), "budget": (1, 3, 7, 15)},
        "svip-tree": {"threshold": (0.3, 0.6, 1.0, 1.5), "budget": (1, 3, 7, 15)},
        "expected-gain": {"scale": (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)},
    },
    "SpecK-v0": {
        "confidence": {"threshold": (0.3, 0.45, 0.6, 0.75), "copy_threshold": (0.1, 0.25, 0.5)},
        "svip": {"threshold": (0.8, 1.2, 1.6), "copy_threshold": (0.1, 0.25, 0.5)},
        "ucb": {"cost": (0.1, 0.2, 0.4), "exploration": (0.01, 0.05, 0.2), "discount": (0.99, 0.999, 1.0)},
    },
}
LTD_APART = {"SpecDepth-v0": {}, "SpecBudget-v0": {"depth": 2}}  # what its two policies decide, the other one fixed
SEEN: dict[str, dict[str, Any]] = {  # keyword arguments of arms that see or decide something of their own
    "ltd": {"observation": "ltd"},
    "ucb": {"decision": "cycle"},
}


@dataclass(frozen=True)
class TrainedArm:
    """A kind of agent that is trained on a trace.

    Attributes:
        agent: a name of ``AGENTS``.
        envs: environments that it learns from at once.
        env: keyword arguments of these over the problem's.
        hyperparameters: of the agent, but for those that the run sets.
    """

    agent: str
    envs: int = ENVS
    env: dict[str, Any] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)


ARMS = {
    "ppo": TrainedArm("ppo", ENVS, {"episode": "cycle"}, PPO | {"learning_rate": 1e-3, "num_envs": ENVS}),
    "ltd": TrainedArm("ppo", ENVS // 4, LTD, LTD_PPO | LTD_NETS | {"learning_rate": 3e-4, "num_envs": ENVS // 4}),
    "hindsight": TrainedArm("hindsight"),
    "exact-pg": TrainedArm("exact-pg"),
}


@dataclass(frozen=True)
class Problem:
    """An environment of the benchmark: its keyword arguments and the trace that stands for it."""

    env_id: str
    env: dict[str, Any]
    trace: str

    def control(self, arm: str = "") -> Control:
        """Return the control of an arm: its decisions and its observation."""
        return make_control(self.env_id, self.env | SEEN.get(arm, {}))

    def environments(self, count: int, **changes: Any) -> Any:
        """Return ``count`` environments in NumPy on the training texts."""
        keywords = {**self.env, "trace": self.trace, **changes}
        return gym.make_vec(self.env_id, num_envs=count, vectorization_mode="vector_entry_point", **keywords)


def samples_of(
    problem: Problem, policy: Policy, split: str, table: CostTable, texts: Sequence[int] | None = None
) -> list[Sample]:
    """Return the texts of a split under a policy, replayed under a cost table, the time of its decisions included."""
    trace = Trace.load(problem.trace)
    chosen = trace.of_split(split) if texts is None else texts
    prompts = [Encoded(trace.texts[i].task, trace.texts[i].prompt) for i in chosen]
    control = policy.control
    decoder = replayed(trace, PricedClock(table), control.max_depth, words(trace))
    arms = {"policy": decoded(decoder, policy)}
    return run_arms(arms, prompts, problem.env["max_new_tokens"], "", quiet=True)["policy"]


def words(trace: Trace) -> Detokenizer:
    """Return what gives the text of a trace's ids."""
    return Detokenizer.of(load_tokenizer(trace.manifest.target))


def train(problem: Problem, arm: str, seed: int, steps: int, folder: str, texts: int | None = None) -> dict[str, Any]:
    """Train an arm on the trace, or read it if it is there; its folder is one that ``spec_envs.agents.load`` reads.

    Args:
        steps: environment steps of PPO.
        texts: only the first so many training texts.

    Returns:
        ``seconds`` of training, and ``forwards`` of the target that the same training takes live: for PPO one per cycle
        that it ran; for agents that learn from the trace itself one per token of the training texts.
    """
    place, note = Path(folder), Path(folder) / "training.json"
    if note.exists():
        return json.loads(note.read_text())
    if arm == "ltd" and problem.env_id == "SpecTree-v0":
        parts = [Problem(env_id, problem.env | own, problem.trace) for env_id, own in LTD_APART.items()]
        both = [train(part, arm, seed, steps, str(place / part.env_id)) for part in parts]
        return {key: sum(made[key] for made in both) for key in both[0]}
    place.mkdir(parents=True, exist_ok=True)
    trace, chosen = Trace.load(problem.trace), ARMS[arm]
    control, kind = problem.control(arm), AGENTS[chosen.agent]
    begin, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on it
    vector = problem.environments(chosen.envs, **chosen.env)
    if texts is not None:
        vector.texts = vector.texts[:texts]
    hyperparameters = {**chosen.hyperparameters, **set_by_run(chosen.agent, seed, steps)}
    agent = kind(control=control, **hyperparameters).learn(steps, vector)
    from_trace = kind.learns_from == "trace"
    forwards = int(sum(trace.texts[i].tokens for i in vector.texts)) if from_trace else vector.forwards
    torch.set_num_threads(threads)
    seconds = time.perf_counter() - begin
    agent.save(place)
    write_json(place / "clock.json", trace.manifest.costs)
    config = {"id": problem.env_id, "env": problem.env | SEEN.get(arm, {}), "agent": chosen.agent}
    write_json(place / "config.yml", config | {"hyperparameters": hyperparameters})
    write_json(note, {"seconds": seconds, "forwards": forwards})
    return {"seconds": seconds, "forwards": forwards}


def trained_policy(folder: str, table: CostTable) -> Policy:
    """Return a trained arm under a cost table."""
    if not (Path(folder) / "config.yml").exists():  # both of LTD's
        depth, budget = (f"{folder}/{env_id}" for env_id in LTD_APART)
        policy = mixed(depth, budget, {})
        assert policy.control.partner is not None
        for part in (policy.agent, policy.control.partner.agent):
            part.decision_seconds = part.measure()  # type: ignore[attr-defined]
        return policy
    control, agent = load(folder)
    control.costs = table
    agent.decision_seconds = agent.measure()  # here and now, as the table is
    return Policy(control, agent)


def tuned(problem: Problem, rule: str, table: CostTable, texts: int) -> tuple[Policy, dict[str, Any]]:
    """Return a published rule with the best hyper-parameters of its grid on the first training texts, in its initial
    state."""
    grid = GRIDS[problem.env_id][rule]
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    chosen = Trace.load(problem.trace).of_split("train")[:texts]

    def policy(hyperparameters: dict[str, Any]) -> Policy:
        control = problem.control(rule)
        control.costs = table
        return Policy(control, AGENTS[rule](control=control, **hyperparameters))

    rates = [throughput(samples_of(problem, policy(h), "train", table, chosen)) for h in settings]
    best = settings[int(np.argmax(rates))]
    return policy(best), best


def informed(problem: Problem, table: CostTable, folds: int, seed: int = 0) -> list[Sample]:
    """Return the test texts under the best policy of what an agent sees, as far as learning finds it: those that learn
    from the trace, reading all or less, fitted to all texts of every split but a fold of the test texts, and replayed
    on that fold; the fastest one."""
    trace, found = Trace.load(problem.trace), []
    test = trace.of_split("test")
    others = [i for i in trace.of_split("all") if i not in set(test)]
    for arm, reads in itertools.product(("hindsight", "exact-pg"), ("cycle", "everything")):
        samples = []
        for fold in range(folds):
            held_out = test[fold::folds]
            vector = problem.environments(ENVS, split="all")
            vector.texts = np.array(others + [i for i in test if i not in set(held_out)])
            control = problem.control()
            agent = AGENTS[arm](control=control, seed=seed, steps=400, reads=reads).learn(0, vector)
            samples += samples_of(problem, Policy(control, agent), "test", table, held_out)
        found.append(samples)
    return max(found, key=throughput)
