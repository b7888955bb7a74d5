"""Write episodes that are replayed from a trace as a Minari data set, for offline learning.

`spec-envs minari runs/traces/NAME --policy static:6 --name spec-envs/depth-static-v0` writes a data set that
`minari.load_dataset` reads. In `recover_environment()`, the seed and the actions of an episode reproduce it, as long as
the trace is not moved.
"""

from __future__ import annotations

import argparse
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from tqdm import tqdm

from spec_envs import ENVIRONMENTS, __version__, agents
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.arguments import POSITIVE, SEED, Parser, nonempty
from spec_envs.controls import CONTROLS, Predictor, make_control
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import apply_override, check_env
from spec_envs.files import held, write_bytes
from spec_envs.settings import Keywords

PLACE = "MINARI_DATASETS_PATH"  # environment variable with the folder of the data sets
SUMMARY = ("task", "tokens", "speedup")  # entries of the last info of a text


Info = dict[str, Any]
"""The information that Gymnasium returns beside an observation."""


@dataclass
class Episode:
    """The observations and actions from a reset to the end of the episode.

    Attributes:
        seed: seed of the reset; None if a text continued over the reset.
        observations: ``[steps + 1]``.
        actions, rewards: ``[steps]``.
        infos: ``[steps + 1]``, the reset's first.
    """

    seed: int | None
    observations: list[np.ndarray]
    infos: list[Info]
    actions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


def library() -> Any:
    """Return the Minari library.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import h5py  # noqa: F401 - Minari would miss it only when it writes
        import minari
    except ImportError:
        raise ValueError(
            "a Minari data set needs the library: install the extra `minari`, as in pip install 'spec-envs[minari]'"
        ) from None
    return minari


def free(name: str) -> Path:
    """Return the folder of a new data set of that name.

    Raises:
        ValueError: Minari does not accept the name, or there is a data set of that name.
    """
    library()
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage import get_dataset_path

    try:
        parse_dataset_id(name)
    except (ValueError, TypeError):  # the latter if there is no version
        raise ValueError(f"name is {name!r}; expected one such as spec-envs/depth-random-v0") from None
    if (path := get_dataset_path(name)).exists():
        raise ValueError(f"there is a data set {name} in {path}; choose another --name, or delete that folder")
    return Path(path)


@contextmanager
def hidden(name: str) -> Iterator[Path]:
    """Let Minari write its data sets into a hidden folder while the block runs, and yield that folder. So a process
    that is killed leaves no incomplete data set.

    Raises:
        ValueError: the name is not free, or another process writes a data set of that name.
    """
    place = free(name)
    folder = place.parents[len(Path(name).parts) - 1] / ".spec-envs" / name.replace("/", "--")
    before = os.environ.get(PLACE)
    with held(folder):
        shutil.rmtree(folder / "datasets", ignore_errors=True)
        os.environ[PLACE] = str(folder / "datasets")
        try:
            yield folder / "datasets"
        finally:
            os.environ.pop(PLACE)
            if before is not None:
                os.environ[PLACE] = before
            shutil.rmtree(folder / "datasets", ignore_errors=True)
    with suppress(OSError):  # it is not empty while another data set is written
        folder.parent.rmdir()


def moved(name: str, made: Path, place: Path) -> None:
    """Move a data set from the folder ``made`` to its place, after the folders of its namespace and the files with
    which Minari marks them."""
    for parent in list(Path(name).parents)[-2::-1]:
        there = place.parents[len(Path(name).parts) - 1] / parent
        there.mkdir(parents=True, exist_ok=True)
        for mark in (made / parent).glob("*.json"):
            if not (there / mark.name).exists():
                write_bytes(there / mark.name, mark.read_bytes())
    (made / name).replace(place)


def prepared(
    trace: Trace, env_id: str, policy: str, seed: int = 0, overrides: Sequence[str] = ()
) -> tuple[Keywords, Predictor]:
    """Return keyword arguments of the environment, and the agent that decides in it.

    Args:
        policy: ``"random"``, ``"static:VALUE"`` (see ``FixedAgent``), or a run folder. The first two use the whole size
            of the trace's trees or chains. A run uses the keyword arguments that it was trained with, and its decisions
            are charged.
        seed: seed of a random policy.
        overrides: ``key=value`` for keyword arguments of the environment.

    Raises:
        ValueError: the run is of another environment or has a partner, or overrides change the problem that it has
            learned.
    """
    manifest = trace.manifest
    rule = policy == "random" or policy.startswith("static:")
    env: Keywords = {"max_new_tokens": manifest.max_new_tokens}
    if rule:
        sizes = {"width": manifest.width, "max_depth": manifest.max_depth}
        env |= {"k_max": manifest.max_depth + 1} if CONTROLS[env_id].trace_kind == "chain" else sizes
    else:
        config = agents.read_config(Path(policy))
        if config["id"] != env_id:
            raise ValueError(f"{policy} is a run of {config['id']}, not of {env_id}; give --env {config['id']}")
        if config.get("partner"):
            raise ValueError(f"{policy} decides with a partner, which the environment of a data set would lack")
        env = dict(config["env"])
    for override in overrides:
        apply_override(override, env)
    check_env(env, env_id, lambda key: "--set")
    env["trace"] = str(trace.folder)
    control = make_control(env_id, env)
    if policy == "random":
        return env, RandomAgent(control, seed=seed)
    if rule:
        value = policy.partition(":")[2]
        return env, FixedAgent(control, value=int(value) if value.isdecimal() else value)
    learned, agent = agents.load(policy)
    control.check_layout(learned, policy)
    return {"policy_seconds": agent.decision_seconds, **env}, agent


def episodes_of(env: gym.Env, agent: Predictor, episodes: int, seed: int) -> Iterator[Episode]:
    """Yield episodes of a ``SpecEnv``. The i-th is reset with ``seed + i``, unless its text continues
    (``episode="cycle"``)."""
    begins, state, decoder = True, None, env.get_wrapper_attr("decoder")
    for i in range(episodes):
        own = seed + i if begins else None
        observation, info = env.reset(seed=own)
        episode, done = Episode(own, [observation], [info]), False
        while not done:
            state = None if begins else state
            action, state = agent.predict(observation, state, np.array([begins]), deterministic=True)
            observation, reward, done, _, info = env.step(action)
            begins = decoder.finished
            episode.observations.append(observation)
            episode.actions.append(int(action))
            episode.rewards.append(float(reward))
            episode.infos.append(info)
        yield episode


def columns(infos: Sequence[Info]) -> Info:
    """Return infos as one info of lists, for the keys that all of them have."""
    found: Info = {}
    for name, first in infos[0].items():
        values = [info[name] for info in infos]
        found[name] = columns(values) if isinstance(first, dict) else values
    return found


def exported(
    name: str, folder: Path, env_id: str, policy: str, episodes: int, seed: int = 0, overrides: Sequence[str] = ()
) -> Any:
    """Replay episodes of the trace in a folder, and write them as the data set ``name``; see ``prepared``.

    Every step has its info. The metadata of an episode that ends a text have ``task``, ``tokens`` and ``speedup``.

    Returns:
        The ``minari.MinariDataset``.

    Raises:
        ValueError: Minari is not installed, the name is not free, or settings do not go together.
    """
    minari = library()
    place = free(name)
    if episodes < 1:
        raise ValueError(f"the number of episodes is {episodes}; expected 1 or more")
    trace = Trace.load(folder)
    keywords, agent = prepared(trace, env_id, policy, seed, overrides)
    env = gym.make(env_id, **keywords)
    done = list(tqdm(episodes_of(env, agent, episodes, seed), total=episodes, desc="replaying", unit="episode"))
    buffers = [
        minari.data_collector.EpisodeBuffer(
            seed=episode.seed,
            observations=np.array(episode.observations),
            actions=np.array(episode.actions),
            rewards=np.array(episode.rewards),
            terminations=np.arange(len(episode.actions)) == len(episode.actions) - 1,
            truncations=np.zeros(len(episode.actions), bool),
            infos=columns(episode.infos),
        )
        for episode in done
    ]
    summaries = [{key: episode.infos[-1][key] for key in SUMMARY if key in episode.infos[-1]} for episode in done]
    with hidden(name) as made:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a data set that is not published needs no author
            dataset = minari.create_dataset_from_buffers(
                name,
                buffers,
                env=env,
                algorithm_name=policy,
                description=f"{policy} in {env_id} on texts of {trace.manifest.target}, "
                f"drafted by {trace.manifest.drafter}",
                requirements=[f"spec-envs=={__version__}"],
            )
        dataset.storage.update_episode_metadata(summaries)
        moved(name, made, place)
    env.close()
    return minari.load_dataset(name)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    replayed = [env_id for env_id in ENVIRONMENTS if CONTROLS[env_id].trace_kind]
    parser.add_argument("trace", type=Path, help="folder of a trace (`spec-envs trace`)")
    parser.add_argument("--env", default="SpecDepth-v0", choices=replayed, help="environment id (default SpecDepth-v0)")
    parser.add_argument("--policy", default="random", help="random, static:VALUE or a run folder (default random)")
    parser.add_argument("--episodes", type=POSITIVE, default=1000, help="number of episodes (default 1000)")
    parser.add_argument(
        "--seed", type=SEED, default=0, help="seed of the first episode; each further one adds 1 (default 0)"
    )
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="keyword arguments of the environment",
    )
    parser.add_argument(
        "--name", type=nonempty, required=True, help="name of the data set, such as spec-envs/depth-random-v0"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    with one_sentence():
        dataset = exported(args.name, args.trace, args.env, args.policy, args.episodes, args.seed, args.set)
        print(f"{dataset.storage.data_path}: {dataset.total_episodes} episodes, {dataset.total_steps} steps")
        print(f'load it with minari.load_dataset("{args.name}")')


if __name__ == "__main__":
    main()
