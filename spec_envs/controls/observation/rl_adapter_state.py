"""Observation and actions of the published selector of k for speculation over a link."""

from __future__ import annotations

import math

import numpy as np

from spec_envs.controls.observation.entries import TASKS

KS = (0, 50, 100, 200, 300, 500, 1000, 2000, 5000, 10000, 32000)
TASKS_PUBLISHED = (*TASKS, "unknown")
UNITS = {"bandwidth_mbps": 1000.0, "latency_ms": 500.0, "draft_acc_prob": 1.0, "entropy": 10.0}  # shown as 1


def published_state(
    bandwidth_mbps: float, latency_ms: float, draft_acc_prob: float, entropy: float, task_name: str
) -> np.ndarray:
    """Return the ten numbers of the published selector's observation, float32, each cut to [0, 1].

    - 0: bandwidth of the link / 1000 Mbps
    - 1: latency of the link / 500 ms
    - 2: probability that a drafted token is accepted
    - 3: entropy of the drafter's distribution / 10 nats
    - 4–9: one-hot of mt_bench, gsm8k, cnndm, xsum, humaneval, any other

    Raises:
        ValueError: one of the first four is not a number.
    """
    given = dict(zip(UNITS, (bandwidth_mbps, latency_ms, draft_acc_prob, entropy), strict=True))
    state = np.zeros(len(UNITS) + len(TASKS_PUBLISHED), np.float32)
    for place, (name, value) in enumerate(given.items()):
        if math.isnan(value):
            raise ValueError(f"{name} is {value}; expected a number, what was last measured if there is no newer")
        state[place] = min(1.0, max(0.0, value / UNITS[name]))
    known = task_name in TASKS_PUBLISHED
    state[len(UNITS) + TASKS_PUBLISHED.index(task_name if known else "unknown")] = 1.0
    return state
