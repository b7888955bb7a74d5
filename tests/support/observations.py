"""Observations with given entries, to ask rules about them."""

from __future__ import annotations

from typing import Any

import numpy as np

from spec_envs.controls.base import Control


def observation_of(control: Control, **entries: Any) -> np.ndarray:
    """Return an observation with these entries (a number, or values from the entry's start); all others are 0."""
    vector = np.zeros(control.observation_space.shape, np.float32)  # type: ignore[arg-type]
    for name, values in entries.items():
        start = control.slices[name].start
        vector[start : start + np.size(values)] = values
    return vector
