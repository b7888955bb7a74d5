"""Train an agent of the zoo from YAML and show what it is worth (`make train`).

The run folder is `runs/<EnvId>/<stanza>-<seed>/`, held by one process at a time. Killed at any moment, the same command
goes on from the last checkpoint; a finished run prints its table again.
"""

from __future__ import annotations

import argparse
import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml

from spec_envs import ENVIRONMENTS, agents
from spec_envs.agents import AGENTS
from spec_envs.agents.exits.online import OnlineAgent
from spec_envs.agents.resuming import CHECKPOINT
from spec_envs.agents.sb3.agent import SB3Agent
from spec_envs.arguments import SEED, Parser, output_folder
from spec_envs.controls import CONTROLS, Policy, make_control
from spec_envs.decoding.traces.trace import Trace
from spec_envs.env import SpecEnv
from spec_envs.experiments.callbacks import Keeper, Monitor
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import Experiment, first_stanza, load_experiment
from spec_envs.experiments.evaluate import evaluate_run, save
from spec_envs.experiments.exits.runs import CONVERSATIONS, improve, write_own_text
from spec_envs.experiments.measure.arms import decoded, run_arms
from spec_envs.experiments.measure.costs import measured as measured_costs
from spec_envs.experiments.measure.encoding import load, to_json
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts, local_decoder
from spec_envs.experiments.measure.machine import revision, versions
from spec_envs.experiments.measure.report import markdown
from spec_envs.experiments.measure.results import Results
from spec_envs.experiments.measure.static import best_static
from spec_envs.experiments.measure.statistics import ratio
from spec_envs.experiments.preflight import check_evaluation, check_partner
from spec_envs.experiments.traces.record import Plan, recorded_by_default
from spec_envs.files import LOCK, TEMPORARY, held, whole
from spec_envs.network.edge.linked import is_address
from spec_envs.prompts.templates import DATE
from spec_envs.sealed import number_of, read_sealed, write_sealed
from spec_envs.settings import Settings

MEASURED = "delete it to measure again"
TRAINED = ("policy.safetensors", "rl_adapter.pth", "exit.json")  # what a trained agent leaves behind


def run_folder(root: Path, env_id: str, stanza: str, seed: int) -> Path:
    """Where a run lies."""
    return root / env_id / f"{stanza}-{seed}"


def resolved(experiment: Experiment, env_id: str, stanza: str, seed: int) -> dict[str, Any]:
    """The settings of a run as they are written beside its results."""
    hyperparameters = dict(experiment.hyperparameters)
    parameters = agents.parameters(experiment.agent)
    for name, value in (("seed", seed), ("total_timesteps", experiment.total_timesteps)):
        if name in parameters:
            hyperparameters[name] = value
    env = experiment.env if experiment.env.get("trace") else {"date": DATE} | experiment.env  # a trace has its own
    return {
        "id": env_id,
        "stanza": stanza,
        "seed": seed,
        **experiment.model_dump(exclude={"hyperparameters", "stages"}),
        "env": env,
        "partner": str(Path(experiment.partner).resolve()) if experiment.partner else None,
        "hyperparameters": hyperparameters,
    }


def open_run(folder: Path, config: dict[str, Any]) -> None:
    """Make the folder of a run, which this process holds, or check that it is this run's.

    Raises:
        ValueError: the folder belongs to a run with other settings that has trained or was evaluated already.
    """
    for left in folder.rglob(f"*{TEMPORARY}"):  # by a process that was killed while it wrote
        left.unlink()
    if (folder / "config.yml").exists():
        found = agents.read_config(folder)
        differing = sorted(key for key in config if found.get(key) != config[key])
        if not differing:
            return
        if any((folder / name).exists() for name in ("last/checkpoint.pt", *TRAINED, "results.json")):
            raise ValueError(
                f"{folder} holds a run with another {', '.join(differing)}; "
                "choose another SEED or ROOT, or delete that folder to start over"
            )
        clear(folder)  # there was nothing in it to go on from
    for part in (folder, folder / "best", folder / "last"):
        part.mkdir(parents=True, exist_ok=True)
    made_with = {"versions": versions(), "revision": revision()}
    with whole(folder / "config.yml") as temporary:
        temporary.write_text(yaml.safe_dump(config | made_with, sort_keys=False))


def clear(folder: Path) -> None:
    """Remove all that is in a folder but its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def make_env(folder: Path, config: dict[str, Any]) -> gym.Env:
    """The training environment of a run, its partner composed in, its clock calibrated."""
    keywords = dict(config["env"])
    control = make_control(config["id"], keywords)
    measured = keywords.get("clock", "wall") == "wall" and not keywords.get("trace") and control.engine == "torch"
    if config["calibrate"] and not config["record"] and measured and not is_address(keywords.get("link", "")):
        table = folder / "clock.json"
        if not table.exists():
            print("measuring this machine's cost table", file=sys.stderr)
            write_sealed(table, to_json(measured_costs(local_decoder(keywords, control))))
        read_sealed(table, MEASURED)
        keywords["clock"] = str(table)
    if config["record"]:
        trace = trace_of(folder, config, keywords)
        write_sealed(folder / "clock.json", trace.manifest.costs)
        keywords["trace"] = str(trace.folder)
    if config["own_text"]:
        written = folder / CONVERSATIONS
        if not written.exists():
            write_own_text(written, keywords, config["own_text"], config["seed"])
        keywords["prompts"] = str(written)
    env = gym.make(config["id"], **keywords)
    spec_env = env.unwrapped
    assert isinstance(spec_env, SpecEnv)
    if config["partner"]:
        spec_env.control.compose(*agents.load(config["partner"]))
    return env


def trace_of(folder: Path, config: dict[str, Any], keywords: dict[str, Any]) -> Trace:
    """What a run learns from: the trace that it names, or one recorded for it."""
    if keywords.get("trace"):
        return Trace.load(keywords["trace"])
    return recorded_by_default(Plan(config["id"], keywords, tuple(config["record"])), folder.parents[1])


def build(folder: Path, config: dict[str, Any]) -> tuple[gym.Env, Any]:
    """Environment and agent, as far as a run that was interrupted had come.

    Raises:
        ValueError: settings that cannot be trained, or whose result could not be evaluated.
    """
    control = make_control(config["id"], config["env"])
    agent = AGENTS[config["agent"]](control=control, **config["hyperparameters"])
    check_partner(config)
    check_evaluation(config)
    for key, kinds in (("checkpoint", SB3Agent), ("init", (SB3Agent, OnlineAgent))):
        if config[key] and not isinstance(agent, kinds):
            raise ValueError(f"{key} is {config[key]!r}, which the agent {config['agent']} does not take; leave it out")
    if isinstance(agent, OnlineAgent) and config["init"]:
        agent.load(config["init"])
    if isinstance(agent, SB3Agent) and not (folder / CHECKPOINT).exists():
        if config["checkpoint"]:
            agent.load_checkpoint(Path(config["checkpoint"]))
        elif config["init"]:
            agent.load(Path(config["init"]))
    env = make_env(folder, config)
    if agents.needs_costs(control, agent):
        agents.cost_table(folder, config["env"])
    return env, agent


def seconds_of_decision(folder: Path, config: dict[str, Any], agent: Any) -> float:
    """Seconds that the run charges for a decision, in training, validation and table alike: those that its settings give;
    priced where forwards are, so that two runs of one seed are alike; else measured, once, and kept in the folder."""
    note, env = folder / agents.DECISION, config["env"]
    if not note.exists():
        if "policy_seconds" in env:
            found = {"seconds": env["policy_seconds"], "how": "given"}
        elif env.get("clock", "wall") != "wall" or env.get("trace") or config["record"]:
            found = {"seconds": agent.priced_seconds, "how": "priced"}
        else:
            found = {"seconds": agent.decision_seconds, "how": "measured"}
        write_sealed(note, found)
    return number_of(read_sealed(note, MEASURED), "seconds", note, MEASURED)


def train_agent(folder: Path, config: dict[str, Any], env: gym.Env, agent: SB3Agent) -> None:
    """Train to the run's total and keep the best agent in the folder."""
    spec_env = env.unwrapped
    assert isinstance(spec_env, SpecEnv)
    history = []
    if (folder / CHECKPOINT).exists():
        history = agent.load_checkpoint(folder / "last")["history"]
        print(f"going on at step {agent.model.num_timesteps} of {config['total_timesteps']}", file=sys.stderr)
    spec_env.policy_seconds = agent.decision_seconds = seconds_of_decision(folder, config, agent)
    if spec_env.control.link and spec_env.given_pace is None:
        static = folder / "static.json"
        if not static.exists():
            write_sealed(static, to_json(best_static(config["env"], spec_env.control)))
        spec_env.given_pace = number_of(read_sealed(static, MEASURED), "pace", static, MEASURED)
    elif not spec_env.decoder.clock.priced:
        pace = folder / "last" / "pace.json"  # measured once: a resumed run is paid by the same yardstick
        if not pace.exists():
            write_sealed(pace, {"pace": spec_env.pace})
        spec_env.given_pace = number_of(read_sealed(pace, MEASURED), "pace", pace, MEASURED)

    played = make_control(config["id"], config["env"])  # a validation must not disturb the episode
    if config["partner"]:
        played.compose(*agents.load(config["partner"]))
    if played.cost_features:
        played.costs = agents.cost_table(folder, config["env"])
    decoder = decoder_for(config["env"], played)
    prompts = encoded_prompts(config["env"], "validation", config["eval_prompts"]) if config["eval_freq"] else []
    plain_decoder = decoder.plain()
    plain = decoded(plain_decoder, None)

    def validate() -> float:
        arms = {"plain": plain, "agent": decoded(decoder, Policy(played, agent))}
        samples = run_arms(arms, prompts, config["env"].get("max_new_tokens", 128), "validation")
        return ratio(samples["agent"], samples["plain"]).value

    keeper = Keeper(agent, folder, config["checkpoint_freq"], config["eval_freq"], validate, history)
    shown = {"agent": config["agent"], **config["hyperparameters"]}
    callbacks = [keeper, Monitor(folder / "log.jsonl", shown)]
    agent.learn(config["total_timesteps"], env, callbacks, folder, progress_bar=True)
    if (folder / "best" / "policy.safetensors").exists():
        agent.load(folder / "best")
    agent.save(folder)
    for used in (env, decoder, plain_decoder):
        used.close()


def run(experiment: Experiment, env_id: str, stanza: str, seed: int, folder: Path) -> None:
    """One run from settings to table.

    Raises:
        ValueError: another process holds the folder, or one of its files is damaged.
    """
    with held(folder):
        train_alone(experiment, env_id, stanza, seed, folder)
        results = folder / "results.json"
        if results.exists():
            table = read_results(results)
            print(f"{folder} is finished; delete it to train again\n")
            print(table)
        else:
            save(evaluate_run(folder, {}, experiment.test_prompts), folder)
            print(f"run: {folder}")


def read_results(path: Path) -> str:
    """The table of a run that is finished."""
    results = load(Results, path, remedy := "delete it to make the table again")
    try:
        return markdown(results)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no table ({error}); {remedy}") from None


def trained(experiment: Experiment, env_id: str, stanza: str, seed: int, folder: Path) -> None:
    """Train a run as far as it is not trained yet.

    Raises:
        ValueError: another process holds the folder, or one of its files is damaged.
    """
    with held(folder):
        train_alone(experiment, env_id, stanza, seed, folder)


def train_alone(experiment: Experiment, env_id: str, stanza: str, seed: int, folder: Path) -> None:
    """The same in a folder that this process holds."""
    config = resolved(experiment, env_id, stanza, seed)
    fresh = not (folder / "config.yml").exists()
    open_run(folder, config)
    if not any((folder / name).exists() for name in TRAINED):
        try:
            env, agent = build(folder, config)
        except Exception:
            if fresh:  # settings that cannot be built must not claim the folder
                clear(folder)
            raise
        if isinstance(agent, SB3Agent):
            print(f"training {stanza} for {config['total_timesteps']} steps", file=sys.stderr)
            train_agent(folder, config, env, agent)
        elif isinstance(agent, OnlineAgent):
            improve(folder, config, env, agent)
            env.close()
        else:
            spec_env = env.unwrapped
            assert isinstance(spec_env, SpecEnv)
            spec_env.policy_seconds = agent.decision_seconds = seconds_of_decision(folder, config, agent)
            agent.learn(config["total_timesteps"], env, folder, config["checkpoint_freq"])
            agent.save(folder)
            env.close()


def run_stages(experiment: Experiment, stanza: str, seed: int, folder: Path) -> None:
    """Policies in turn: each stage trains one problem with the newest policy of the other as its partner."""
    newest: dict[str, Path] = {}
    for number, stage in enumerate(experiment.stages, 1):
        kind = CONTROLS[stage.id]
        own = set(inspect.signature(kind).parameters) | set(Settings.model_fields)
        partner = next((path for env_id, path in newest.items() if env_id != stage.id), None) if stage.partner else None
        settings = experiment.model_copy(
            update={
                "env": {k: v for k, v in experiment.env.items() if k in own} | stage.env,
                "total_timesteps": stage.total_timesteps or experiment.total_timesteps,
                "partner": str(partner) if partner else None,
                "checkpoint": None,
                "init": str(newest[stage.id]) if stage.id in newest else experiment.init,
                "stages": [],
            }
        )
        print(f"stage {number} of {len(experiment.stages)}: {stage.id}, partner {partner}", file=sys.stderr)
        part = folder / f"{number}-{stage.id}"
        run(settings, stage.id, stanza, seed, part)
        newest[stage.id] = part


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("env", help=f"environment id: {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--agent", default="", help="stanza of experiments/<env>.yml (default: its first)")
    parser.add_argument("--seed", type=SEED, default=0, help="of agent and environment (default 0)")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="override keys of the stanza"
    )
    parser.add_argument(
        "--root", type=output_folder, default=Path("runs"), help="where runs are written (default runs)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command goes on from the last checkpoint, if one was written yet"):
        stanza = args.agent or first_stanza(args.env)
        experiment = load_experiment(args.env, stanza, args.set)
        folder = run_folder(args.root, args.env, stanza, args.seed)
        if experiment.stages:
            run_stages(experiment, stanza, args.seed, folder)
        else:
            run(experiment, args.env, stanza, args.seed, folder)


if __name__ == "__main__":
    main()
