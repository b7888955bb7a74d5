"""Train an agent from a stanza of experiments/<EnvId>.yml and measure it (`spec-envs train`).

The run folder is `runs/<EnvId>/<stanza>-<seed>/`; one process at a time may use it. If the process is killed at any
moment, the same command continues from the last checkpoint; for a finished run it prints the table again.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gymnasium as gym

from spec_envs import ENVIRONMENTS
from spec_envs.agents import AGENTS, load
from spec_envs.agents.base import Agent
from spec_envs.agents.loading import DECISION, cost_table
from spec_envs.agents.run import Run
from spec_envs.agents.traced.lessons import replay_of
from spec_envs.arguments import SEED, Parser, output_folder
from spec_envs.controls import CONTROLS, Control, make_control
from spec_envs.decoding.clock import PricedClock
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.decoding.traces.trace import Trace
from spec_envs.decoding.weights.checkpoints import resolve_device
from spec_envs.env import SpecEnv
from spec_envs.experiments.command import COSTS, RECORDING, STATIC, TRAINING, WRITING, Stages, one_sentence
from spec_envs.experiments.config import Experiment, load_experiment
from spec_envs.experiments.evaluate import CHOSEN, evaluate_run, save, stages_left
from spec_envs.experiments.exits.runs import CONVERSATIONS, write_own_text
from spec_envs.experiments.measure.encoding import load as load_json
from spec_envs.experiments.measure.encoding import to_json
from spec_envs.experiments.measure.live import local_decoder
from spec_envs.experiments.measure.machine import this_machine
from spec_envs.experiments.measure.price_list import file_of, price_list, same_machine, training_prompts
from spec_envs.experiments.measure.results import Results
from spec_envs.experiments.measure.static import best_static, search_in_words
from spec_envs.experiments.preflight import check_evaluation, check_partner
from spec_envs.experiments.reports.screen import screen
from spec_envs.experiments.runs import (
    CONFIG,
    RESULTS,
    RunConfig,
    clear,
    is_trained,
    open_run,
    resolved,
    run_folder,
    save_trained,
)
from spec_envs.experiments.stanzas import ExperimentFile
from spec_envs.experiments.traces.of_runs import plan_of, root_of, trace_of
from spec_envs.experiments.traces.record import is_recorded
from spec_envs.experiments.validation import VALIDATIONS
from spec_envs.files import held
from spec_envs.network.edge.linked import is_address
from spec_envs.sealed import number_of, read_sealed, write_sealed
from spec_envs.settings import Keywords, Settings

LOG = logging.getLogger(__name__)

CLOCK = "clock.json"  # in a run: the cost table that prices its training
MEASURED = "delete it to measure again"


def make_env(folder: Path, config: RunConfig, stages: Stages) -> gym.Env:
    """Return the training environment of a run, with its partner. Its cost table, trace and prompts are made first."""
    keywords = dict(config.env)
    control = make_control(config.id, keywords)
    if config.calibrate and not config.record and is_timed_here(keywords, control):
        stages.begin(
            COSTS,
            "measuring what forwards cost on this machine; training is priced by that (at most about a minute, unless the machine is busy)",
        )
        keywords["clock"] = str(calibrated(folder / CLOCK, keywords, control))
    if config.record:
        stages.begin(RECORDING, f"recording {sum(config.record)} texts, which know the result of every decision")
        trace = trace_of(folder, vars(config))
        prices = price_of(trace, folder / CLOCK, config.env, control)
        keywords |= {"trace": str(trace.folder)} | (
            {"clock": str(prices)} if keywords.get("clock", "wall") == "wall" else {}
        )
    if config.own_text:
        written = folder / CONVERSATIONS
        if not written.exists():
            stages.begin(WRITING, f"the target writes {config.own_text} user turns, from which its exit learns")
            write_own_text(written, keywords, config.own_text, config.seed)
        keywords["prompts"] = str(written)
    env = gym.make(config.id, **keywords)
    if config.partner:
        spec_env_of(env).control.compose(*load(config.partner))
    return env


def is_timed_here(env: Keywords, control: Control) -> bool:
    """Return True if an environment measures forwards with the wall clock of this machine."""
    by_wall = env.get("clock", "wall") == "wall" and not env.get("trace")
    return by_wall and control.engine == "torch" and not is_address(env.get("link", ""))


def calibrated(table: Path, env: Keywords, control: Control) -> Path:
    """Return the file of this machine's cost table, which is measured if it does not exist yet."""
    if not table.exists():
        made = price_list(local_decoder(env, control), control, training_prompts(env), env.get("max_new_tokens"))
        write_sealed(table, to_json(made))
    read_sealed(table, MEASURED)
    return table


def price_of(trace: Trace | PortfolioTrace, table: Path, env: Keywords, control: Control) -> Path:
    """Return the file of the cost table that prices a run on a trace: that of the trace, or if it was recorded for the
    run on another machine, this machine's, which is measured."""
    made = dict(trace.manifest.made_with)
    here = this_machine(resolve_device(env.get("device", "auto")), trace.manifest.dtype)
    if not table.exists():
        if env.get("trace") or same_machine(made, here):
            write_sealed(table, {**file_of(trace.costs()), "machine": made})
        else:
            LOG.info(f"{trace.folder} was recorded on another machine; measuring what forwards cost on this one")
    return calibrated(table, env, control)


def stages_of(folder: Path, config: RunConfig, with_table: bool) -> list[str]:
    """Return the stages of a run that are still to come, in order."""
    control, kind = make_control(config.id, config.env), AGENTS[config.agent]
    found: list[str] = []
    if not is_trained(folder):
        if config.record:
            if not (config.env.get("trace") or is_recorded(plan_of(vars(config)), root_of(folder))):
                found.append(RECORDING)
        elif config.calibrate and is_timed_here(config.env, control) and not (folder / CLOCK).exists():
            found.append(COSTS)
        if config.own_text and not (folder / CONVERSATIONS).exists():
            found.append(WRITING)
        if kind.learns_from == "rewards" and control.link and not (folder / CHOSEN).exists():
            found.append(STATIC)  # its throughput is the pace of the reward
        if kind.learns_from != "nothing":
            found.append(TRAINING)
    return list(dict.fromkeys([*found, *(stages_left(folder, control) if with_table else [])]))


def build(folder: Path, config: RunConfig, stages: Stages) -> tuple[gym.Env, Agent]:
    """Return environment and agent of a run that is to be trained.

    Raises:
        ValueError: the settings cannot be trained, or the result could not be evaluated.
    """
    control = make_control(config.id, config.env)
    agent = AGENTS[config.agent](control=control, **config.hyperparameters)
    check_partner(config)
    check_evaluation(config)
    for key, start in (("checkpoint", config.checkpoint), ("init", config.init)):
        if start and key not in agent.starts_from:
            raise ValueError(f"{key} is {start!r}, which the agent {config.agent} does not take; leave it out")
    if not Run(folder).begun:
        if config.checkpoint:
            agent.load_checkpoint(Path(config.checkpoint))
        elif config.init:
            agent.load(Path(config.init))
    env = make_env(folder, config, stages)
    if control.cost_features or agent.needs_costs:
        cost_table(folder, config.env)  # refuse now what would fail after the training
    return env, agent


def seconds_of_decision(folder: Path, config: RunConfig, agent: Agent) -> float:
    """Return the seconds that the run charges for a decision, the same in training, validation and table. They are
    given by the settings, or priced where forwards are priced (two runs of one seed are then equal), or else measured
    once and kept in the folder."""
    note, env = folder / DECISION, config.env
    if not note.exists():
        if "policy_seconds" in env:
            found = {"seconds": env["policy_seconds"], "how": "given"}
        elif env.get("clock", "wall") != "wall" or env.get("trace") or config.record:
            found = {"seconds": agent.priced_seconds, "how": "priced"}
        else:
            found = {"seconds": agent.decision_seconds, "how": "measured"}
        write_sealed(note, found)
    return number_of(read_sealed(note, MEASURED), "seconds", note, MEASURED)


def settle_pace(folder: Path, config: RunConfig, env: SpecEnv, stages: Stages) -> None:
    """Keep the pace of the reward in the folder, so that a resumed run computes the same rewards. Over a link it is the
    throughput of the best static choice, on a measured clock the pace that this machine was measured at."""
    clock = env.decoder.clock
    if env.control.link:
        if env.given_pace is not None:
            return
        note = folder / CHOSEN
        if not note.exists():
            costs = clock.table if isinstance(clock, PricedClock) else None
            stages.begin(STATIC, search_in_words(config.env, env.control, costs))
            write_sealed(note, to_json(best_static(config.env, env.control, costs)))
    elif clock.priced:
        return
    else:
        note = folder / "last" / "pace.json"
        if not note.exists():
            write_sealed(note, {"pace": env.pace})
    env.given_pace = number_of(read_sealed(note, MEASURED), "pace", note, MEASURED)


def train_agent(folder: Path, config: RunConfig, env: gym.Env, agent: Agent, stages: Stages) -> None:
    """Train an agent to the run's total of steps, continuing from its checkpoint, and save it in the folder."""
    spec_env = spec_env_of(env)
    if agent.charges_training:
        spec_env.policy_seconds = agent.decision_seconds = seconds_of_decision(folder, config, agent)
    if agent.learns_from == "rewards" and spec_env.reward_name == "saved":
        settle_pace(folder, config, spec_env, stages)
    make_validation = VALIDATIONS.get(agent.validated_by)
    validation = make_validation(folder, where_validated(config, env)) if make_validation else None
    eval_freq = config.eval_freq if validation else 0
    stages.begin(TRAINING, training_in_words(config, agent, Run(folder).begun))
    several = config.hyperparameters.get("num_envs", 1)  # of a trace, which many environments replay at once
    learning = replay_of(env, several, policy_seconds=spec_env.policy_seconds) if several > 1 else env
    agent.learn(config.total_timesteps, learning, Run(folder, config.checkpoint_freq, eval_freq, validation, True))
    save_trained(agent, folder)
    env.close()
    if validation:
        validation.close()


def where_validated(config: RunConfig, env: gym.Env) -> RunConfig:
    """Return the settings of a run's validations: on the trace and at the prices that it learns from, if it records one,
    else those of the run itself."""
    learned = env.spec.kwargs if config.record and env.spec else {}
    return replace(config, env=config.env | {name: learned[name] for name in ("trace", "clock") if name in learned})


def run(experiment: Experiment, env_id: str, stanza: str, seed: int, folder: Path) -> None:
    """Train and evaluate a run, as far as this is not done yet, and print its table.

    Raises:
        ValueError: another process holds the folder, or one of its files is damaged.
    """
    with held(folder):
        stages = Stages()
        train_in_held_folder(experiment, env_id, stanza, seed, folder, stages)
        again = shlex.join(["spec-envs", "eval", str(folder)])
        if (folder / RESULTS).exists():
            table = read_results(folder / RESULTS, again)
            print(f"{folder} is finished; delete it to train again\n")
            print(table)
        else:
            save(evaluate_run(folder, {}, experiment.test_prompts, stages), folder, again, folder)


def read_results(path: Path, again: str) -> str:
    """Return what a finished run shows at its end; ``again`` is the command that makes its table again.

    Raises:
        ValueError: the file is damaged.
    """
    results = load_json(Results, path, remedy := "delete it to make the table again")
    try:
        return screen(results, path.parent, again, path.parent)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no table ({error}); {remedy}") from None


def trained(experiment: Experiment, env_id: str, stanza: str, seed: int, folder: Path) -> None:
    """Train a run to its end, unless it is trained already.

    Raises:
        ValueError: another process holds the folder, or one of its files is damaged.
    """
    with held(folder):
        train_in_held_folder(experiment, env_id, stanza, seed, folder)


def train_in_held_folder(
    experiment: Experiment, env_id: str, stanza: str, seed: int, folder: Path, stages: Stages | None = None
) -> None:
    """Train a run to its end, unless it is trained already; the caller holds the lock of its folder. Where ``stages`` are
    given, they become those of the run, its table included."""
    config = resolved(experiment, env_id, stanza, seed)
    fresh = not (folder / CONFIG).exists()
    open_run(folder, config)
    own = stages or Stages()
    try:
        own.names = stages_of(folder, config, stages is not None)
        if is_trained(folder):
            return
        env, agent = build(folder, config, own)
    except Exception:
        if fresh:  # settings that cannot be built must not claim the folder
            clear(folder)
        raise
    train_agent(folder, config, env, agent, own)


def training_in_words(config: RunConfig, agent: Agent, begun: bool) -> str:
    """Return what a training does; ``begun``: it continues from a checkpoint."""
    doing = f"continuing to train {config.stanza} from its last checkpoint," if begun else f"training {config.stanza}"
    if agent.learns_from == "trace":
        return f"{doing} on every choice in the recorded texts"
    until = f"{'to' if begun else 'for'} {config.total_timesteps:,} decisions{' in all' if begun else ''}"
    return f"{doing} {until} in {config.id} (the bar shows the time that is left)"


def spec_env_of(env: gym.Env) -> SpecEnv:
    """Return the environment inside Gymnasium's wrappers.

    Raises:
        TypeError: it is not an environment of this project.
    """
    inner = env.unwrapped
    if not isinstance(inner, SpecEnv):
        raise TypeError(f"{env} is not an environment of this project")
    return inner


def staged(experiment: Experiment, folder: Path) -> Iterator[tuple[Experiment, str, Path]]:
    """Yield the settings, the environment and the folder of each stage, in order. Its partner is the newest policy of the
    other problem, and it starts from the weights of the newest one of its own."""
    newest: dict[str, Path] = {}
    for number, stage in enumerate(experiment.stages, 1):
        own = set(inspect.signature(CONTROLS[stage.id]).parameters) | set(Settings.model_fields)
        partner = next((path for env_id, path in newest.items() if env_id != stage.id), None) if stage.partner else None
        settings = experiment.model_copy(
            update={
                "env": {k: v for k, v in experiment.env.items() if k in own} | stage.env,
                "total_timesteps": stage.total_timesteps or experiment.total_timesteps,
                "hyperparameters": experiment.hyperparameters | stage.hyperparameters,
                "partner": str(partner) if partner else None,
                "checkpoint": None,
                "init": str(newest[stage.id]) if stage.id in newest else experiment.init,
                "stages": [],
            }
        )
        part = folder / f"{number}-{stage.id}"
        yield settings, stage.id, part
        newest[stage.id] = part


def train_stages(experiment: Experiment, stanza: str, seed: int, folder: Path) -> tuple[Experiment, str, Path]:
    """Train policies in turn, as far as this is not done yet. Return the settings, the environment and the folder of the
    last one, which decides together with its partner."""
    for number, (settings, env_id, part) in enumerate(staged(experiment, folder), 1):
        LOG.info(f"policy {number} of {len(experiment.stages)}: {env_id}, with the partner {settings.partner}")
        trained(settings, env_id, stanza, seed, part)
    return settings, env_id, part


def run_stages(experiment: Experiment, stanza: str, seed: int, folder: Path) -> None:
    """Train policies in turn, then evaluate the last one with its partner, and print its table."""
    settings, env_id, last = train_stages(experiment, stanza, seed, folder)
    run(settings, env_id, stanza, seed, last)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__, epilog=Experiment.described())
    parser.add_argument("env", help=f"environment id: {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--agent", default="", help="stanza of experiments/<env>.yml (default: its first)")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of agent and environment (default 0)")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the stanza"
    )
    parser.add_argument(
        "--root", type=output_folder, default=Path("runs"), help="where runs are written (default runs)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command continues from the last checkpoint, if one was written yet"):
        stanza = args.agent or ExperimentFile.of(args.env).first
        experiment = load_experiment(args.env, stanza, args.set)
        folder = run_folder(args.root, args.env, stanza, args.seed)
        if experiment.stages:
            run_stages(experiment, stanza, args.seed, folder)
        else:
            run(experiment, args.env, stanza, args.seed, folder)


if __name__ == "__main__":
    main()
