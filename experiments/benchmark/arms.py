"""Arms of the benchmark: agents that are trained on a trace, rules that are tuned on it, and their replay."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spec_envs.agents import AGENTS, load
from spec_envs.agents.base import Agent
from spec_envs.controls import Control, Policy, make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.traces.replay import replayed
from spec_envs.decoding.traces.trace import Trace
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.experiments.benchmark.problems import LTD
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.hyperparameters import set_by_run
from spec_envs.experiments.measure.arms import Encoded, Sample, decoded, run_arms
from spec_envs.experiments.measure.encoding import from_json, to_json
from spec_envs.experiments.measure.price_list import file_of
from spec_envs.experiments.measure.statistics import throughput
from spec_envs.experiments.train import train_stages
from spec_envs.files import read_json, write_json
from spec_envs.settings import Keywords
from spec_envs.text import Detokenizer
from spec_envs.vector.env import ReplayVectorEnv

ENVS = 64  # environments that PPO learns from in parallel
PRICES = "clock.json"  # in the folder of an arm: the cost table that it was trained under
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
OWN_ENV: dict[str, Keywords] = {"ucb": {"decision": "cycle"}}  # keyword arguments of arms with a decision of their own


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
        prices: file of the cost table under which all arms are trained, tuned, bounded and scored.
    """

    env_id: str
    env: Keywords
    trace: str
    prices: str

    @functools.cached_property
    def table(self) -> CostTable:
        """The cost table of all arms."""
        return CostTable.load(self.prices)

    def control(self, arm: str = "") -> Control:
        """Return the control for an arm, with the decision and the observation of that arm."""
        return make_control(self.env_id, self.env | OWN_ENV.get(arm, {}))

    def environments(self, count: int, **changes: Any) -> ReplayVectorEnv:
        """Return ``count`` environments in NumPy on the training texts; ``changes`` are further keyword arguments."""
        return ReplayVectorEnv(self.env_id, count, **{**self.env, "trace": self.trace, "clock": self.prices, **changes})


def samples_of(
    problem: Problem, policy: Policy, split: str, texts: Sequence[int] | None = None, foreign: CostTable | None = None
) -> list[Sample]:
    """Replay texts under a policy, and return their samples; the time of decisions is included.

    Args:
        texts: indices of the trace; by default all texts of the split.
        foreign: a cost table that replaces the problem's, to see what becomes of a policy under prices that it has not
            seen.
    """
    table = foreign or problem.table
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


def arm_of(name: str, env_id: str) -> TrainedArm:
    """Return an arm; PPO is that of the environment's default stanza."""
    if name in ARMS:
        return ARMS[name]
    stanza = load_experiment(env_id, name)
    episode = stanza.env.get("episode", "prompt")
    return TrainedArm(stanza.agent, ENVS, {"episode": episode}, stanza.hyperparameters)


def train(problem: Problem, arm: str, seed: int, steps: int, folder: str, texts: int | None = None) -> Training:
    """Train an arm on the trace, unless it is trained already, and save it in a folder that ``trained_policy`` reads.

    Args:
        steps: environment steps of PPO; for Learning to Draft those of each policy, 0 for those of its stanza.
        texts: number of training texts to learn from; by default all.
    """
    place, note = Path(folder), Path(folder) / "training.json"
    check_prices(place, problem)
    if note.exists():
        return from_json(Training, read_json(note, f"delete {folder} to train again"))
    place.mkdir(parents=True, exist_ok=True)
    write_json(place / PRICES, file_of(problem.table))
    begin, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on it
    if arm == LTD:
        forwards = train_in_turn(problem, seed, steps, place)
    else:
        forwards = train_agent(problem, arm, seed, steps, place, texts)
    torch.set_num_threads(threads)
    training = Training(time.perf_counter() - begin, forwards)
    write_json(note, to_json(training))
    return training


def train_agent(problem: Problem, arm: str, seed: int, steps: int, place: Path, texts: int | None) -> int:
    """Train an arm of one agent, and return the forwards of the target that this takes live; see ``train``."""
    trace, chosen = Trace.load(problem.trace), arm_of(arm, problem.env_id)
    control, kind = problem.control(arm), AGENTS[chosen.agent]
    vector = problem.environments(chosen.envs, **chosen.env)
    if texts is not None:
        vector.texts = vector.texts[:texts]
    hyperparameters = {**chosen.hyperparameters, **set_by_run(chosen.agent, seed, steps)}
    agent = kind(control=control, **hyperparameters).learn(steps, vector)
    agent.save(place)
    config = {"id": problem.env_id, "env": problem.env | OWN_ENV.get(arm, {}), "agent": chosen.agent}
    write_json(place / "config.yml", config | {"hyperparameters": hyperparameters})
    from_trace = kind.learns_from == "trace"
    return int(sum(trace.texts[i].tokens for i in vector.texts)) if from_trace else vector.forwards


def train_in_turn(problem: Problem, seed: int, steps: int, place: Path) -> int:
    """Train the policies of Learning to Draft as published, but for texts and models, which are the problem's, and return
    the forwards of the target that this takes live; see ``train``."""
    stanza = load_experiment("SpecDepth-v0", LTD)
    sizes = {name: value for name, value in problem.env.items() if name in stanza.env}
    total = steps or stanza.total_timesteps
    changes = {
        "env": stanza.env | sizes | {"trace": problem.trace, "clock": problem.prices},
        "eval_env": {"trace": None},  # which need not have test texts
        "record": [],
        "total_timesteps": total,
        "eval_freq": max(1, total * stanza.eval_freq // stanza.total_timesteps),
        "eval_prompts": len(Trace.load(problem.trace).of_split("validation")),
    }
    train_stages(stanza.model_copy(update=changes), LTD, seed, place)
    logs = [log.read_text().splitlines() for log in place.glob("*/log.jsonl")]
    return sum(json.loads(line)["cycles"] for lines in logs for line in lines)


def check_prices(place: Path, problem: Problem) -> None:
    """Refuse an arm that was trained under another cost table than the problem's.

    Raises:
        ValueError: the message names the arm's folder.
    """
    for file in sorted(place.rglob(PRICES)):
        own = CostTable.load(str(file))
        if own.curves != problem.table.curves:
            raise ValueError(
                f"{file.parent} was trained under other prices than the table has that it is compared in; delete it to "
                "train again"
            )


def trained_policy(folder: str, problem: Problem, foreign: CostTable | None = None) -> Policy:
    """Return the policy of a trained arm; its decisions are timed now.

    Args:
        foreign: see ``samples_of``.

    Raises:
        ValueError: it was trained under another cost table than the problem's.
    """
    check_prices(Path(folder), problem)
    stages = sorted(Path(folder).glob("*/config.yml"))  # the last of several decides with its partner
    control, agent = load(stages[-1].parent if stages else folder)
    control.costs = foreign or problem.table
    partner = control.partner.agent if control.partner else None
    for part in (agent, partner):
        if isinstance(part, Agent):
            part.decision_seconds = part.measure()
    return Policy(control, agent)


def tuned(problem: Problem, rule: str, texts: int) -> tuple[Policy, dict[str, Any]]:
    """Return a published rule in its initial state, with the hyper-parameters of its grid that are best on the first
    ``texts`` training texts, and these hyper-parameters."""
    grid = GRIDS[problem.env_id][rule]
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    chosen = Trace.load(problem.trace).of_split("train")[:texts]

    def policy(hyperparameters: dict[str, Any]) -> Policy:
        control = problem.control(rule)
        control.costs = problem.table
        return Policy(control, AGENTS[rule](control=control, **hyperparameters))

    rates = [throughput(samples_of(problem, policy(h), "train", chosen)) for h in settings]
    best = settings[int(np.argmax(rates))]
    return policy(best), best
