"""Tune the hyper-parameters of a published rule or of an agent that is trained with Optuna (`spec-envs tune ENV --agent …`).

Every trial of a rule decodes the same training prompts with other hyper-parameters. Every trial of an agent that is
trained trains it anew on the training texts of a trace, which is recorded when the study begins (`record`) or named by
`env.trace`, and replays the validation texts. Forwards are priced by a cost table of this machine, which is measured then
as well, so that other load on the machine does not influence the choice, and decisions are charged. If the process is
killed at any moment, the same command continues and ends with the same settings. Writes study.log, clock.json, best.yml,
which states the budget, and history.png into runs/tune/<EnvId>/<stanza>/.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import optuna
import yaml
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState
from optuna.visualization.matplotlib import plot_optimization_history
from tqdm import trange

from spec_envs import ENVIRONMENTS, recordings
from spec_envs.agents import AGENTS
from spec_envs.agents.base import Agent
from spec_envs.agents.traced.lessons import replay_of
from spec_envs.arguments import POSITIVE, TOKENS, Parser, output_folder
from spec_envs.controls import Control, Policy, make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.decoder import over_models
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.decoding.traces.trace import Trace
from spec_envs.env import SpecEnv
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import Experiment, load_experiment
from spec_envs.experiments.hyperparameters import set_by_run
from spec_envs.experiments.measure.arms import Encoded, decoded, run_arms
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts
from spec_envs.experiments.measure.price_list import file_of, prices
from spec_envs.experiments.measure.statistics import throughput
from spec_envs.experiments.reports.figures import write_png
from spec_envs.experiments.reports.pages import counted
from spec_envs.experiments.traces.of_runs import plan_of, trace_of
from spec_envs.experiments.traces.plan import default_folder
from spec_envs.experiments.traces.record import is_recorded
from spec_envs.experiments.train import CLOCK, price_of
from spec_envs.experiments.work_folder import claim
from spec_envs.files import held, whole, write_bytes, write_json
from spec_envs.settings import Keywords

LEARNING = ("rewards", "trace")  # what agents learn from that every trial trains anew


def tune(env_id: str, stanza: str, overrides: list[str], trials: int, prompts: int, tokens: int, folder: Path) -> None:
    """Continue the study of a folder to ``trials`` trials in all, and write the best settings.

    Args:
        prompts: number of training prompts that a rule decodes, and most validation texts that a trained agent replays.
        tokens: most new tokens of each.

    Raises:
        ValueError: the agent or the engine cannot be tuned, or the folder is held by another process or was begun with
            other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    experiment = load_experiment(env_id, stanza, overrides)
    control, kind = make_control(env_id, experiment.env), AGENTS[experiment.agent]
    agent, anew = kind(control=control, **experiment.hyperparameters), kind.learns_from in LEARNING
    check_tunable(agent, experiment, anew)
    env, trace, sets = experiment.env, None, experiment.env.get("prompts", "all")
    if anew:
        trace = recorded_for(experiment, env_id, folder)
        env, tokens = {**env, "trace": str(trace.folder)}, min(tokens, trace.max_new_tokens)
        chosen = [Encoded(*prompt) for prompt in trace.prompts("validation", sets)[:prompts]]
    else:
        chosen = encoded_prompts(env, "train", prompts)
    learned = {"hyperparameters": experiment.hyperparameters, "total_timesteps": experiment.total_timesteps}
    recording = {"record": experiment.record} if anew else {}
    with held(folder):
        claim(folder, {"env": experiment.env, "prompts": prompts, "tokens": tokens, **learned, **recording}, "--root")
        if trace and env.get("clock", "wall") == "wall":
            table = price_of(trace, folder / CLOCK, experiment.env, control)
        else:
            table = priced(folder, env, control)
        study = opened(folder)
        costs, env = CostTable.load(str(table)), {**env, "clock": str(table)}
        control.costs = costs
        if not finished(study):
            if not anew:
                train(agent, env, env_id, experiment.total_timesteps, folder)
            if not study.get_trials(states=(TrialState.WAITING,)):
                study.enqueue_trial(published(agent))
        decoder = decoder_for(env, control)

        def speed(trial: optuna.Trial) -> float:
            settings = {**experiment.hyperparameters, **agent.space(trial)}
            trial.set_user_attr("hyperparameters", settings)
            if anew:
                candidate = trained_anew(experiment, settings, control, env_id, env)
            else:
                candidate = kind(control=control, **settings)
                candidate.load(folder)
            decoder.clock = PricedClock(costs)  # a new clock, because sums over all trials would round differently
            arms = {"candidate": decoded(decoder, Policy(control, candidate))}
            return throughput(run_arms(arms, chosen, tokens, "", quiet=True)["candidate"])

        search(study, speed, trials)
        effort = f"decoded {counted(len(chosen), 'training prompt')}"
        if trace:
            every = "every choice" if kind.learns_from == "trace" else f"{experiment.total_timesteps:,} decisions"
            known = counted(len(trace.of_split("train", sets)), "text")
            effort = f"trained on {every} in {known} and replayed {counted(len(chosen), 'validation text')}"
        report(study, folder, f"each {effort} of at most {tokens} tokens")


def check_tunable(agent: Agent, experiment: Experiment, anew: bool) -> None:
    """Refuse an agent that has nothing to tune, or that cannot be tuned with these settings; ``anew``: each trial trains
    it.

    Raises:
        ValueError: the message says why.
    """
    name, given = experiment.agent, experiment.env.get("trace")
    if agent.control.engine != "torch":
        raise ValueError(
            f"a {agent.control.engine} cannot be priced; tune on engine=torch, at the same adjustment_interval"
        )
    if anew and not (recordings.is_exact(given) if given else experiment.record):
        raise ValueError(
            f"{name} is trained in every trial, on recorded texts; expected record=[60,12,30] without env.trace, or "
            "env.trace=FOLDER of a recorded trace"
        )
    if not agent.space(optuna.create_study().ask()):
        raise ValueError(
            f"{name} has nothing to tune here; expected a published rule, an agent of Stable-Baselines3, or one that "
            "learns from a trace"
        )


def recorded_for(experiment: Experiment, env_id: str, folder: Path) -> Trace | PortfolioTrace:
    """Return the trace that an agent learns from in every trial: the one that is named, one that was recorded for runs
    beside the folder of all studies, or one that is recorded there."""
    config = {"id": env_id, "env": experiment.env, "record": experiment.record}
    runs = folder.resolve().parents[2]
    if not experiment.env.get("trace") and is_recorded(plan := plan_of(config), runs):
        return recordings.exact(str(default_folder(plan, runs)))
    return trace_of(folder, config)


def trained_anew(
    experiment: Experiment, settings: dict[str, Any], control: Control, env_id: str, env: Keywords
) -> Agent:
    """Return an agent with these hyper-parameters, trained in an environment that replays a trace; its decisions are
    priced."""
    given = settings | set_by_run(experiment.agent, 0, experiment.total_timesteps)
    agent = AGENTS[experiment.agent](control=control, **given)
    agent.decision_seconds = env.get("policy_seconds", agent.priced_seconds)
    made = gym.make(env_id, **{**env, "policy_seconds": agent.decision_seconds})
    several = settings.get("num_envs", 1)
    agent.learn(experiment.total_timesteps, replay_of(made, several) if several > 1 else made)
    made.close()
    return agent


def search(study: optuna.Study, speed: Callable[[optuna.Trial], float], trials: int) -> None:
    """Run the trials that are missing of ``trials``. Each has its own seed, so that interruptions do not change the
    search."""
    done = len(finished(study))
    for number in trange(done, trials, initial=min(done, trials), total=trials, desc="tuning", unit="trial"):
        study.sampler = optuna.samplers.TPESampler(seed=number)
        study.optimize(speed, 1)


def report(study: optuna.Study, folder: Path, effort: str) -> None:
    """Write the best settings, with the budget that found them, and the picture of a study, and print the settings.

    Args:
        effort: what each trial did, in words.
    """
    best, done = study.best_trial, finished(study)
    with whole(folder / "best.yml") as path:
        settings = yaml.safe_dump({"hyperparameters": best.user_attrs["hyperparameters"]}, sort_keys=False)
        path.write_text(f"# Budget: {counted(len(done), 'trial')}, {effort}\n{settings}")
    warnings.simplefilter("ignore", ExperimentalWarning)  # the picture's look may change
    if (figure := plot_optimization_history(study).get_figure(root=True)) is None:
        raise RuntimeError("Optuna has drawn its picture in no figure")
    write_png(figure, folder / "history.png")
    print(
        f"{counted(len(done), 'trial')}, {effort}; first {done[0].value:.1f}, best {best.value:.1f} priced tokens/s with"
    )
    print(yaml.safe_dump(best.user_attrs["hyperparameters"], sort_keys=False).strip())
    print(f"written: {folder}/best.yml, history.png; study.log holds every trial")


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that were completed, not those that were interrupted."""
    return study.get_trials(states=(TrialState.COMPLETE,))


def priced(folder: Path, env: Keywords, control: Control) -> Path:
    """Return the file of a study's cost table: a copy of the environment's, or this machine's, which is measured if the
    file does not exist yet."""
    table = folder / CLOCK
    recording = recordings.load(env["trace"]) if env.get("trace") is not None else None
    clock = recordings.clocks_for(env.get("clock", "wall"), env.get("device", "auto"), recording)[0]
    if isinstance(clock, PricedClock):
        write_json(table, file_of(clock.table))
    elif not table.exists():
        print("measuring this machine's cost table", file=sys.stderr)
        write_json(table, file_of(prices(over_models(decoder_for(env, control)), env, control)))
    return table


class Unlocked(JournalFileOpenLock):
    """Replaces Optuna's lock of the journal, which outlives a killed process, by none: the process that writes the
    journal holds the whole folder."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def opened(folder: Path) -> optuna.Study:
    """Return the study of a folder that this process holds; it is created if it does not exist yet.

    The remains of a killed process are removed: Optuna's lock of the journal, a truncated last line, and the trial that
    was running, which counts as failed.

    Raises:
        ValueError: the journal is damaged.
    """
    journal = folder / "study.log"
    for lock in folder.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if journal.exists():
        lines = journal.read_bytes()
        write_bytes(journal, lines[: lines.rfind(b"\n") + 1])
    try:
        study = optuna.create_study(
            study_name="tune",
            storage=JournalStorage(JournalFileBackend(str(journal), Unlocked(str(journal)))),
            direction="maximize",
            load_if_exists=True,
        )
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{journal} is damaged ({reason[0]}); delete {folder} to tune again") from None
    return study


def train(agent: Agent, env: Keywords, env_id: str, total_timesteps: int, folder: Path) -> None:
    """Train an agent once for all trials, if it learns at all."""
    spec_env = SpecEnv(env_id, **env)
    agent.learn(total_timesteps, spec_env)
    agent.save(folder)
    spec_env.close()


def published(agent: Agent) -> dict[str, Any]:
    """Return the settings that the study tries first: the agent's values of those that are tuned."""
    tuned = agent.space(optuna.create_study().ask())
    return {name: value for name, value in agent.settings.model_dump().items() if name in tuned}


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("env", help=f"environment id: {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--agent", required=True, help="stanza of experiments/<env>.yml")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the stanza"
    )
    parser.add_argument("--trials", type=POSITIVE, default=30, help="number of trials in all (default 30)")
    parser.add_argument(
        "--prompts",
        type=POSITIVE,
        default=13,
        help="number of training prompts, or of validation texts of agents that are trained (default 13)",
    )
    parser.add_argument("--tokens", type=TOKENS, default=64, help="most new tokens per prompt (default 64)")
    parser.add_argument(
        "--root", type=output_folder, default=Path("runs/tune"), help="where studies are written (default runs/tune)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command continues with the next trial"):
        folder = args.root / args.env / args.agent
        tune(args.env, args.agent, args.set, args.trials, args.prompts, args.tokens, folder)


if __name__ == "__main__":
    main()
