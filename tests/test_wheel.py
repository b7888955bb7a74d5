"""The wheel installs one package with all its files, which works from any directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from spec_envs import __version__
from spec_envs.decoding.traces.trace import Trace

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
LINKED = ("agents", "experiments")  # folders at the top level that are installed inside the package
FETCHED = "spec_envs/data/drafters/*/model.safetensors"  # files of the repository that an installed package fetches
LARGEST = 10_000_000  # bytes that a wheel may have
SCRIPT = """
import json, sys
import gymnasium as gym
import spec_envs
from spec_envs import agents

for env_id, keywords in json.loads(sys.argv[1]).items():
    env = gym.make(env_id, **keywords)
    env.reset(seed=0)
    env.step(0)
    env.close()
loaded = [agents.load(folder.name)[0].name for folder in sorted(agents.SHIPPED.iterdir())]
print(json.dumps([spec_envs.__file__, agents.__file__, loaded]))
"""
DRAFTERS = """
import sys
from spec_envs.decoding.drafters.names import DrafterName, default_drafter, drafter_folder
from spec_envs.decoding.weights import assets
from spec_envs.decoding.weights.files import load_weights

assets.CACHE.joinpath("drafters").mkdir(parents=True)
names = [DrafterName.parse(default_drafter("smollm2-135m", chain=chain)).model for chain in (False, True)]
assert not [*assets.CACHE.glob("drafters/*")]  # names are told apart by the files of the package
for name in names:
    print(name, drafter_folder(name).relative_to(assets.CACHE).parts[0], len(load_weights(drafter_folder(name))))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the packaged files, so that building leaves nothing in the repository."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", *LINKED, "spec_envs"):
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(place, folder / name)
    return folder


def wheel(source: Path, into: Path) -> Path:
    """Build a wheel without the network, and return its path."""
    subprocess.run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", into, source], check=True)
    [made] = into.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def built(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(sources, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", folder, built], check=True)
    return folder


def run(installed: Path, directory: Path, *arguments: str, **variables: str) -> str:
    """Run Python in another directory, where only the installed package is found; return its output."""
    return output_of(installed, directory, sys.executable, *arguments, **variables)


def output_of(installed: Path, directory: Path, *command: str | Path, **variables: str) -> str:
    """Run a command in another directory, where only the installed package is found; return its output."""
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.check_output(command, cwd=directory, env=environment, text=True)


def files_of(archive: Path) -> set[str]:
    """Return the names of a wheel's files without its metadata."""
    return {name for name in zipfile.ZipFile(archive).namelist() if ".dist-info/" not in name}


def test_wheel_has_every_file_of_the_package_but_weights_that_are_fetched(sources: Path, built: Path) -> None:
    wanted = {
        str(place.relative_to(sources))
        for folder in ("spec_envs", *(f"spec_envs/{name}" for name in LINKED))
        for place in (sources / folder).glob("**/*")
        if place.is_file()
    }
    fetched = {name for name in wanted if fnmatch(name, FETCHED)}
    assert files_of(built) == wanted - fetched and len(fetched) == 2
    assert built.stat().st_size < LARGEST


def test_source_distribution_gives_the_same_wheel(sources: Path, built: Path, tmp_path: Path) -> None:
    """Folders that are links in the repository are folders in the source distribution."""
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=sources, check=True, stdout=subprocess.DEVNULL)
    [made] = tmp_path.glob("*.tar.gz")
    assert files_of(wheel(made, tmp_path / "wheel")) == files_of(built)


def test_only_one_name_is_installed(installed: Path) -> None:
    assert {place.name.partition("-")[0] for place in installed.iterdir()} == {"spec_envs", "bin"}
    assert [place.name for place in (installed / "bin").iterdir()] == ["spec-envs"]


def test_environments_and_agents_work_from_another_directory(
    installed: Path, tmp_path: Path, tiny: dict[str, Any], traces: dict[str, Trace]
) -> None:
    """Each environment is made and stepped, and each shipped agent loads."""
    trees = {"trace": str(traces["tree"].folder), "max_depth": 4, "width": 4, "max_new_tokens": 20}
    keywords = dict.fromkeys(("SpecDepth-v0", "SpecBudget-v0", "SpecTree-v0"), trees)
    keywords |= {"SpecK-v0": {"trace": "qwen2.5-coder-32b-cpu"}, "SpecTopK-v0": {"trace": "smollm2-135m-topk"}}
    keywords |= {"SpecDVI-v0": tiny | {"drafter": "auto"}}
    package, agents, loaded = json.loads(run(installed, tmp_path, "-c", SCRIPT, json.dumps(keywords)))
    assert [Path(package).parents[1], Path(agents).parents[2]] == [installed, installed]
    assert loaded == ["budget", "depth", "k", "tree"]


def test_installed_package_fetches_the_default_drafters(installed: Path, tmp_path: Path) -> None:
    """Here from the repository's own folder, into a cache folder of the test's own."""
    places = {"SPEC_ENVS_ASSETS": str(ROOT / "spec_envs" / "data"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert run(installed, tmp_path, "-c", DRAFTERS, **places).splitlines() == [
        "smollm2-135m-eagle3 drafters 15",
        "smollm2-135m-draft drafters 29",
    ]


@pytest.mark.model
def test_installed_package_steps_the_default_environment(installed: Path, tmp_path: Path) -> None:
    script = SCRIPT.replace("env.step(0)", "env.step(0); env.step(1)")
    keywords = {"SpecDepth-v0": {"clock": "qwen3-14b-a6000", "max_new_tokens": 64}}
    shown = run(
        installed, tmp_path, "-c", script, json.dumps(keywords), SPEC_ENVS_ASSETS=str(ROOT / "spec_envs" / "data")
    )
    assert json.loads(shown)[0].startswith(str(installed))


def test_commands_run_from_another_directory(installed: Path, tmp_path: Path) -> None:
    """The console command and the modules do."""
    command = installed / "bin" / "spec-envs"
    assert output_of(installed, tmp_path, command, "--version") == f"spec-envs {__version__}\n"
    for shown in (
        output_of(installed, tmp_path, command, "train", "--help"),
        run(installed, tmp_path, "-m", "spec_envs.experiments.train", "--help"),
    ):
        assert "environment id: SpecDepth-v0, SpecBudget-v0" in " ".join(shown.split())
