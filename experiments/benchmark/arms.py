"""Arms of the benchmark: agents that are trained on a trace, rules that are tuned on it, and their replay."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from spec_envs.experiments.measure.encoding import from_json, to_json
from spec_envs.experiments.measure.statistics import throughput
from spec_envs.files import read_json, write_json
from spec_envs.settings import Keywords
from spec_envs.text import Detokenizer
from spec_envs.vector.env import ReplayVectorEnv

ENVS = 64  # environments that PPO learns from in parallel
LTD = {"observation": "ltd", "reward": "ltd", "episode": "cycle"}
PPO = {"n_steps": 32, "batch_size": 512, "n_epochs": 6, "gamma": 1.0, "gae_lambda": 0.95, "ent_coef": 0.002}
LTD_PPO = {
    "n_steps": 8,  # in each of 16 environments, 128 in all
    "batch_size": 64,
    "n_epochs": 1,
    "gamma": 0.99,
    "ent_coef": 0.0,
    "lr_schedule": "adawm",
}
LTD_NETS = {"pi_arch": [512, 256], "vf_arch": [1024, 512]}
Grid = dict[str, Sequence[float]]
"""Values of hyper-parameters to try, by name."""
GRIDS: dict[str, dict[str, Grid]] = {  # for each published rule, by environment
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
LTD_PARTS = {"SpecDepth-v0": {}, "SpecBudget-v0": {"depth": 2}}  # problems of its two policies, trained separately
OWN_ENV: dict[str, Keywords] = {  # keyword arguments of arms with an observation or a decision of their own
    "ltd": {"observation": "ltd"},
    "ucb": {"decision": "cycle"},
}


@dataclass(frozen=True)
class TrainedArm:
    """An arm that is trained on a trace.

    Attributes:
        agent: a name of ``AGENTS``.
        envs: environments that it learns from in parallel.
        env: keyword arguments of these environments that override the problem's.
        hyperparameters: settings of the agent, except seed and total of steps.
    """

    agent: str
    envs: int = ENVS
    env: Keywords = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)


ARMS = {
    "ppo": TrainedArm("ppo", ENVS, {"episode": "cycle"}, PPO | {"learning_rate": 1e-3, "num_envs": ENVS}),
    "ltd": TrainedArm("ppo", ENVS // 4, LTD, LTD_PPO | LTD_NETS | {"learning_rate": 3e-4, "num_envs": ENVS // 4}),
    "hindsight": TrainedArm("hindsight"),
    "exact-pg": TrainedArm("exact-pg"),
}


@dataclass(frozen=True)
class Training:
    """The cost of a training.

    Attributes:
        seconds: seconds that it took.
        forwards: forwards of the target that the same training takes live: one for each cycle of PPO, and one for each
            token of the training texts for agents that learn from the trace itself.
    """

    seconds: float
    forwards: int


@dataclass(frozen=True)
class Problem:
    """A problem of the benchmark.

    Attributes:
        env: keyword arguments of the environment.
        trace: folder of the trace that is replayed.
    """

    env_id: str
    env: Keywords
    trace: str

    def control(self, arm: str = "") -> Control:
        """Return the control for an arm, with the decision and the observation of that arm."""
        return make_control(self.env_id, self.env | OWN_ENV.get(arm, {}))

    def environments(self, count: int, **changes: Any) -> ReplayVectorEnv:
        """Return ``count`` environments in NumPy on the training texts; ``changes`` are further keyword arguments."""
        return ReplayVectorEnv(self.env_id, count, **{**self.env, "trace": self.trace, **changes})


def samples_of(
    problem: Problem, policy: Policy, split: str, table: CostTable, texts: Sequence[int] | None = None
) -> list[Sample]:
    """Replay texts under a policy and a cost table, and return their samples; the time of decisions is included.

    Args:
        texts: indices of the trace; by default all texts of the split.
    """
    trace = Trace.load(problem.trace)
    chosen = trace.of_split(split) if texts is None else texts
    prompts = [Encoded(trace.texts[i].task, trace.texts[i].prompt) for i in chosen]
    control = policy.control
    decoder = replayed(trace, PricedClock(table), control.max_depth, words(trace))
    arms = {"policy": decoded(decoder, policy)}
    return run_arms(arms, prompts, problem.env["max_new_tokens"], "", quiet=True)["policy"]


def words(trace: Trace) -> Detokenizer:
    """Return the detokenizer of a trace's target."""
    return Detokenizer.of(load_tokenizer(trace.manifest.target))


def train(problem: Problem, arm: str, seed: int, steps: int, folder: str, texts: int | None = None) -> Training:
    """Train an arm on the trace, unless it is trained already, and save it in a folder that ``agents.load`` reads.

    Args:
        steps: environment steps of PPO.
        texts: number of training texts to learn from; by default all.
    """
    place, note = Path(folder), Path(folder) / "training.json"
    if note.exists():
        return from_json(Training, read_json(note, f"delete {folder} to train again"))
    if arm == "ltd" and problem.env_id == "SpecTree-v0":
        parts = [Problem(env_id, problem.env | own, problem.trace) for env_id, own in LTD_PARTS.items()]
        both = [train(part, arm, seed, steps, str(place / part.env_id)) for part in parts]
        return Training(sum(made.seconds for made in both), sum(made.forwards for made in both))
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
    config = {"id": problem.env_id, "env": problem.env | OWN_ENV.get(arm, {}), "agent": chosen.agent}
    write_json(place / "config.yml", config | {"hyperparameters": hyperparameters})
    write_json(note, to_json(training := Training(seconds, forwards)))
    return training


def trained_policy(folder: str, table: CostTable) -> Policy:
    """Return the policy of a trained arm under a cost table; its decisions are timed now, as the table was."""
    if (Path(folder) / "config.yml").exists():
        control, agent = load(folder)
        control.costs = table
        agent.decision_seconds = agent.measure()
        return Policy(control, agent)
    depth, budget = (load(f"{folder}/{env_id}") for env_id in LTD_PARTS)
    (control, agent), (partner, sizing) = depth, budget
    control.compose(partner, sizing)
    for part in (agent, sizing):
        part.decision_seconds = part.measure()
    return Policy(control, agent)


def tuned(problem: Problem, rule: str, table: CostTable, texts: int) -> tuple[Policy, dict[str, Any]]:
    """Return a published rule in its initial state, with the hyper-parameters of its grid that are best on the first
    ``texts`` training texts, and these hyper-parameters."""
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
    """Return the samples of the test texts under the best policy that could be learned from what an agent observes.

    The agents that learn from a trace are cross-fitted: for each fold of the test texts they learn from all other texts
    and are replayed on the fold. The samples of the fastest agent are returned.
    """
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
