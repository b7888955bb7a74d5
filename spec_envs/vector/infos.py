"""Infos of many environments, as Gymnasium's vector environments gather them."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.decoding.clock import PARTS

SHOWN = tuple(part for part in PARTS if part != "prefill")
COUNTS = ("emitted", "accepted", "drafted", "verified", "beside", "bytes_up", "bytes_down")


def gathered(values: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """Return ``values`` with a mask ``_name`` for every name; where it is false, values are 0, or None for objects."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out[name] = gathered(value, mask) if isinstance(value, dict) else within(value, mask)
        out[f"_{name}"] = mask.copy()
    return out


def cleared(values: dict[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """Return the values of a step, with 0 or no name where ``mask`` is true, as after a reset."""
    return {
        name: cleared(value, mask) if isinstance(value, dict) else within(value, ~mask, "")
        for name, value in values.items()
    }


def within(value: np.ndarray, mask: np.ndarray, nothing: Any = None) -> np.ndarray:
    """Return an array with 0, or for objects ``nothing``, where a mask is false."""
    if mask.all():
        return value
    return np.where(mask, value, nothing if value.dtype == object else value.dtype.type(0))


def blank(count: int, several: bool) -> dict[str, Any]:
    """Return the infos of a reset.

    Args:
        several: True if several drafters share a text, so that infos name the one that was asked.
    """
    named = {"drafter": np.full(count, "", object)} if several else {}
    return {
        **named,
        **{name: np.zeros(count, np.int64) for name in COUNTS},
        "seconds": {part: np.zeros(count) for part in SHOWN},
        "saved": np.zeros(count),
    }
