"""Run folders, and the settings that are written into them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from spec_envs.agents import read_config
from spec_envs.agents.base import Agent
from spec_envs.agents.run import CHECKPOINT
from spec_envs.experiments.config import Experiment
from spec_envs.experiments.hyperparameters import set_by_run
from spec_envs.experiments.measure.machine import revision, versions
from spec_envs.files import LOCK, TEMPORARY, whole
from spec_envs.prompts.templates import DATE
from spec_envs.sealed import read_sealed, write_sealed
from spec_envs.settings import Keywords

CONFIG = "config.yml"
RESULTS = "results.json"
TRAINED = "trained.json"  # written when training has ended: the files in which the agent was saved
WEIGHTS = ("policy.safetensors", "rl_adapter.pth", "exit.json")  # one of them is in a trained run without TRAINED


@dataclass(frozen=True)
class RunConfig:
    """The settings of a run, as they are written into its folder.

    Attributes:
        id: id of the environment.
        stanza: name of the stanza that the run comes from.
        seed: seed of agent and environment.
        partner: absolute path of the partner's run folder.
        hyperparameters: settings of the agent, with the seed and the total of steps if it has settings of those names.

    The other attributes are those of ``Experiment``.
    """

    id: str
    stanza: str
    seed: int
    agent: str
    env: Keywords
    eval_env: Keywords
    total_timesteps: int
    eval_freq: int
    eval_prompts: int
    test_prompts: int
    checkpoint_freq: int
    own_text: int
    record: list[int]
    calibrate: bool
    partner: str | None
    init: str | None
    checkpoint: str | None
    hyperparameters: dict[str, Any]

    @property
    def table_env(self) -> Keywords:
        """Keyword arguments of the environment with which the final table is measured."""
        return {**self.env, **self.eval_env}


def resolved(experiment: Experiment, env_id: str, stanza: str, seed: int) -> RunConfig:
    """Return the settings of a run of a stanza."""
    env = experiment.env if experiment.env.get("trace") else {"date": DATE} | experiment.env  # a trace has its own date
    given = set_by_run(experiment.agent, seed, experiment.total_timesteps)
    return RunConfig(
        **experiment.model_dump(exclude={"env", "partner", "hyperparameters", "stages"}),
        id=env_id,
        stanza=stanza,
        seed=seed,
        env=env,
        partner=str(Path(experiment.partner).resolve()) if experiment.partner else None,
        hyperparameters={**experiment.hyperparameters, **given},
    )


def run_folder(root: Path, env_id: str, stanza: str, seed: int) -> Path:
    """Return the folder of a run."""
    return root / env_id / f"{stanza}-{seed}"


def is_trained(folder: Path) -> bool:
    """Return True if the agent of a run has been trained to its end, and the files in which it was saved are there.
    Runs of versions that did not write ``TRAINED`` are recognised by the agent's weights.

    Raises:
        ValueError: the record of the training is damaged.
    """
    note = folder / TRAINED
    if note.exists():
        files = read_sealed(note, remedy := f"delete {folder} to train again").get("files")
        if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
            raise ValueError(f"{note} is damaged (it names no files); {remedy}")
        return all((folder / name).exists() for name in files)
    return any((folder / name).exists() for name in WEIGHTS)


def save_trained(agent: Agent, folder: Path) -> None:
    """Save an agent in the folder of its run, then record that its training has ended."""
    before = written(folder)
    agent.save(folder)
    files = sorted(name for name, state in written(folder).items() if state != before.get(name))
    write_sealed(folder / TRAINED, {"files": files})


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the files in a folder by relative path, each with numbers that change when it is written again."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {path.relative_to(folder).as_posix(): (at.st_ino, at.st_mtime_ns) for path, at in found.items()}


def open_run(folder: Path, config: RunConfig) -> None:
    """Create the folder of a run, or check that it belongs to this run. This process must hold the folder.

    Raises:
        ValueError: the folder belongs to a run with other settings that is trained or has a checkpoint or results, or
            it holds files but no run.
    """
    for unfinished in folder.rglob(f"*{TEMPORARY}"):  # left by a process that was killed while it wrote
        unfinished.unlink()
    if (folder / CONFIG).exists():
        found = read_config(folder)
        settings = asdict(config)
        differing = sorted(field.name for field in fields(config) if found.get(field.name) != settings[field.name])
        if not differing:
            return
        if is_trained(folder) or any((folder / name).exists() for name in (TRAINED, CHECKPOINT, RESULTS)):
            raise ValueError(
                f"{folder} holds a run with other settings: {differences(found, settings, differing)}; "
                "choose another SEED or ROOT, or delete that folder to start over"
            )
        clear(folder)  # it holds nothing to continue from
    elif any(path.is_file() and path.name != LOCK for path in folder.rglob("*")):
        raise ValueError(
            f"{folder} holds files, but no {CONFIG} of a run; choose another SEED or ROOT, or delete that folder"
        )
    for part in (folder, folder / "best", folder / "last"):
        part.mkdir(parents=True, exist_ok=True)
    made_with = {"versions": versions(), "revision": revision()}
    with whole(folder / CONFIG) as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config) | made_with, sort_keys=False))


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return in words where the settings of a run in its folder differ from those that are wanted now."""
    words = []
    for name in names:
        old, new = found.get(name), wanted[name]
        if isinstance(old, dict) and isinstance(new, dict):
            inner = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            words += [f"{name}.{key} {old.get(key)!r} instead of {new.get(key)!r}" for key in inner]
        else:
            words.append(f"{name} {old!r} instead of {new!r}")
    return ", ".join(words)


def clear(folder: Path) -> None:
    """Remove everything in a folder except its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
