"""Learning-rate schedules, as functions of Stable-Baselines3's remaining progress (1 at the start, 0 at the end)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["constant", "linear", "adawm"]


def schedule(
    name: ScheduleName, peak: float, total_timesteps: int, warmup_timesteps: int | None = None
) -> Callable[[float], float]:
    """Return a learning-rate schedule.

    ``adawm`` (arXiv 2603.01639): with T total and w warm-up steps (1 % of T by default), peak · t / w while t < w,
    then peak · (1 − (t − w) / (T − w)), never below 0.

    Raises:
        ValueError: the warm-up takes all steps.
    """
    if name == "constant":
        return lambda remaining: peak
    if name == "linear":
        return lambda remaining: peak * max(0.0, remaining)
    warmup = max(1, total_timesteps // 100) if warmup_timesteps is None else warmup_timesteps
    if not 0 <= warmup < total_timesteps:
        raise ValueError(f"warmup_timesteps is {warmup}; expected less than total_timesteps ({total_timesteps})")

    def adawm(remaining: float) -> float:
        done = (1.0 - remaining) * total_timesteps
        if done < warmup:
            return peak * done / warmup
        return peak * max(0.0, 1.0 - (done - warmup) / (total_timesteps - warmup))

    return adawm
