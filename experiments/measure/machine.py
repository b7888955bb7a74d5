"""The machine and the software with which figures were measured."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from spec_envs.decoding.clock import PricedClock
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.weights.checkpoints import model_folder
from spec_envs.decoding.weights.files import weight_files
from spec_envs.decoding.weights.gguf_weights import linked

PACKAGES = ("torch", "transformers", "gymnasium", "stable-baselines3", "sb3-contrib", "numpy")


@dataclass(frozen=True)
class Machine:
    """The machine and the software with which figures were measured.

    Attributes:
        clock: "wall" or the name of a cost table; None if only the wall clock is possible.
    """

    processor: str
    threads: int
    dtype: str
    versions: dict[str, str]
    revision: str
    clock: str | None = None

    def __str__(self) -> str:
        clock = f", clock {self.clock}" if self.clock else ""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return f"{self.processor}, {self.threads} thread{'s' * (self.threads != 1)}, {self.dtype}{clock}; {versions}; revision {self.revision}"


def machine(decoder: Engine) -> Machine:
    """Return the machine that a decoder runs on."""
    clock = decoder.clock.table.name if isinstance(decoder.clock, PricedClock) else "wall"
    return this_machine(decoder.device, decoder.dtype, clock)


def this_machine(device: torch.device, dtype: str, clock: str | None = None) -> Machine:
    """Return this machine as it computes on a device in a dtype."""
    return Machine(processor(device), torch.get_num_threads(), dtype, versions(), revision(), clock)


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {name: version(name) for name in PACKAGES}


def processor(device: torch.device) -> str:
    """Return the name of the device that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def revision() -> str:
    """Return the git revision of the checkout, or ``"unknown"`` outside one, such as where the package is installed in
    a folder of another project, and without git. It ends with ``-dirty`` if a file that is not documentation differs
    from it."""
    if not shutil.which("git"):
        return "unknown"
    file = Path(__file__).resolve()  # git does not look through a link to a folder
    git = ["git", "-C", str(file.parent)]
    if subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True).returncode:
        return "unknown"
    found = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True).stdout.strip()
    if not found:  # nothing is committed
        return "unknown"
    code = [":/", *(f":(top,exclude){name}" for name in ("docs", "README.md", "RESULTS.md"))]
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True).returncode
    return found + ("-dirty" if changed else "")


def weights_sha256(target: str, drafter: str) -> dict[str, str]:
    """Return the SHA-256 of the weights of ``target`` and ``drafter``; prompt lookup has none."""
    folders = {"target": model_folder(target)}
    name = DrafterName.parse(drafter)
    if name.model:
        folders["drafter"] = name.folder
    hashes = {}
    for side, folder in folders.items():
        digest = hashlib.sha256()
        for path in linked(folder) or weight_files(folder)[0]:
            digest.update(path.read_bytes())
        hashes[side] = digest.hexdigest()
    return hashes
