"""The floor of a forward's seconds: the time that reading the weights takes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from spec_envs.decoding.model import integers


@dataclass(frozen=True)
class Floor:
    """The time that reading the target's weights takes, and its share of a plain step."""

    weight_bytes: int
    read_bytes_per_second: float
    floor_seconds: float
    share_of_floor: float

    @classmethod
    def of(cls, size: int, seconds: float) -> Floor:
        """Measure the floor of a plain step of ``seconds`` that reads ``size`` bytes of weights."""
        floor = read_seconds(size)
        return cls(size, size / floor, floor, floor / seconds)


def read_seconds(size: int, repeats: int = 15) -> float:
    """Return the seconds of reading ``size`` bytes of memory once, on all threads."""
    data = torch.zeros(size // 4)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        integers.read_all(data)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
