"""The cost of a decision: measured, or priced where nothing is measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from torch import nn

REPEATS = 20
CACHE = 16 << 20  # bytes, more than a core has for itself
# Seconds of a decision on one core of a server of 2023: the Python around it, a layer in NumPy, one in torch, a weight, and
# a comparison of a decision tree.
OVERHEAD, LAYER, IN_TORCH, WEIGHT, COMPARISON = 10e-6, 2e-6, 150e-6, 1e-10, 0.1e-6


def cold_seconds(decide: Callable[[], object]) -> float:
    """Return the median seconds of a decision with cold caches, as between forwards of a model: two to three times those
    of a decision that is repeated in a loop."""
    weights, timings = np.zeros(CACHE // 8), []
    for _ in range(REPEATS):
        weights += 1
        begin = time.perf_counter()
        decide()
        timings.append(time.perf_counter() - begin)
    return float(np.median(timings))


def priced(weights: int = 0, layers: int = 0, in_torch: int = 0, comparisons: int = 0) -> float:
    """Return the seconds of a decision that reads so many weights, in layers computed in NumPy or in torch, and compares
    so many numbers. Under a cost table forwards are priced, and so are decisions: a measured time would make two runs of
    one seed differ."""
    return OVERHEAD + LAYER * layers + IN_TORCH * in_torch + WEIGHT * weights + COMPARISON * comparisons


def priced_network(network: nn.Module) -> float:
    """Return the priced seconds of a decision by a small network: linear layers in NumPy, recurrent ones in torch."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.LSTM)]
    recurrent = sum(isinstance(layer, nn.LSTM) for layer in layers)
    weights = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    return priced(weights, len(layers) - recurrent, recurrent)
