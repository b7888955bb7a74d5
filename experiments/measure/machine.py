"""What a figure was made on."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spec_envs.decoding.clock import PricedClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.eagle.head import drafter_folder
from spec_envs.decoding.loading import LOOKUP, without_lookup
from spec_envs.decoding.weights.checkpoints import model_folder

PACKAGES = ("torch", "transformers", "gymnasium", "stable-baselines3", "sb3-contrib", "numpy")


def machine(decoder: Decoder) -> dict[str, Any]:
    """Processor, threads, dtype, versions and revision, for the head of a table."""
    return {
        "processor": processor(decoder.device),
        "threads": torch.get_num_threads(),
        "dtype": decoder.dtype,
        "clock": decoder.clock.table.name if isinstance(decoder.clock, PricedClock) else "wall",
        "versions": versions(),
        "revision": revision(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: version(name) for name in PACKAGES}


def processor(device: torch.device) -> str:
    """Name of the device that computes."""
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
    """Git revision of the checkout, or ``"unknown"`` outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def weights_sha256(target: str, drafter: str) -> dict[str, str]:
    """SHA-256 of the weights of ``target`` and ``drafter``; prompt lookup has none."""
    folders = {"target": model_folder(target)}
    if drafter != LOOKUP:
        folders["drafter"] = drafter_folder(without_lookup(drafter))
    hashes = {}
    for side, folder in folders.items():
        digest = hashlib.sha256()
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(path.read_bytes())
        hashes[side] = digest.hexdigest()
    return hashes
