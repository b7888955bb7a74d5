"""Model folders from other sources, and their greedy texts here and in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spec_envs.decoding.loading import load_decoder
from tests.support.texts import plain_text

IDS = [5, 6, 7, 8]


def edit_config(folder: Path, **settings: Any) -> None:
    """Change settings in config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Apply a change to the tensors of model.safetensors."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def ours(folder: Path, ids: list[int] = IDS, count: int = 20) -> list[int]:
    """Return the greedy text of this package."""
    return plain_text(load_decoder(str(folder), None, "cpu", "float32"), ids, count)


def theirs(folder: Path, ids: list[int] = IDS, count: int = 20) -> list[int]:
    """Return the greedy text of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()
