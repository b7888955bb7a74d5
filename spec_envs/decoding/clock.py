"""Seconds by part: measured on the wall, or priced from a calibrated table.

Parts are ``prefill`` (never part of a cycle), ``draft``, ``verify``, ``network`` and ``policy``. A priced clock makes every environment deterministic by seed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from spec_envs.checked import first_error, read_checked
from spec_envs.files import DATA, find_json

PARTS = ("prefill", "draft", "verify", "network", "policy")
COSTS = DATA / "costs"


@dataclass
class Forward:
    """A forward being timed; its rows, and how often it is made, may be set while it runs. 0 costs nothing under a
    table."""

    rows: int
    times: int = 1


class WallClock:
    """Measured seconds; the device is synchronised on both sides of every part.

    Attributes:
        totals: seconds charged so far by part, since the text began.
        simulated: those among them, of a measured clock, that nobody waited for.
    """

    priced = False

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def synchronize(self) -> None:
        """Wait for what the device still computes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def restart(self) -> None:
        """A text begins: count from 0, so that its seconds are the same to the last bit whatever came before it."""
        self.totals = dict.fromkeys(PARTS, 0.0)
        self.simulated = 0.0

    @contextmanager
    def time(self, part: str, rows: int = 0) -> Iterator[Forward]:
        """Charge what runs inside to ``part``; ``rows`` are those of its forward, as far as they are known before."""
        self.synchronize()
        begin = time.perf_counter()
        yield Forward(rows)
        self.synchronize()
        self.charge(part, time.perf_counter() - begin)

    def charge(self, part: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        self.totals[part] += seconds

    def travel(self, seconds: float, part: str, simulated: bool) -> None:
        """Charge seconds of a network: on top of what else was charged, or as a share of what was measured as ``part``.
        Those of a prompt are part of the prefill."""
        into = "prefill" if part == "prefill" else "network"
        if simulated or self.priced:
            self.simulated += seconds
        else:
            self.totals[part] -= seconds
        self.charge(into, seconds)

    def since(self, earlier: dict[str, float]) -> dict[str, float]:
        """Seconds by part since a copy of ``totals`` was taken."""
        return {part: total - earlier[part] for part, total in self.totals.items()}


Rows = Annotated[int, Field(ge=1, le=10**9)]
Seconds = Annotated[float, Field(ge=1e-12, le=1e9)]  # 1 / seconds and seconds of many forwards are finite
Curve = Annotated[dict[Rows, Seconds], Field(min_length=1)]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
CURVE = TypeAdapter(Curve, config=STRICT)
EXPECTED = 'expected {"verify": {"1": seconds, …}, "draft": {…}}, rows and their positive seconds'


@with_config(STRICT)
@dataclass(frozen=True)
class Curves:
    """The two curves of a cost table; whatever else its file says is for people."""

    verify: Curve
    draft: Curve


@dataclass(frozen=True)
class CostTable:
    """Seconds of a forward by its number of rows, for one machine and one pair of models.

    Between the rows listed the cost is interpolated, beyond them extrapolated from the last two.

    Raises:
        ValueError: a curve is empty, or has rows that are not whole numbers or seconds that are not positive.
    """

    name: str
    verify: dict[int, float]
    draft: dict[int, float]

    def __post_init__(self) -> None:
        for part, curve in (("verify", self.verify), ("draft", self.draft)):
            try:
                CURVE.validate_python(curve)
            except ValidationError as error:
                raise ValueError(f"{self.name} is not a cost table ({part} {first_error(error)}); {EXPECTED}") from None

    @classmethod
    def load(cls, source: str) -> CostTable:
        """Read a shipped table by name, or a JSON file by path.

        Raises:
            ValueError: no such table, or one that is malformed.
        """
        path = find_json(source, COSTS, "cost table", "wall")
        curves = read_checked(Curves, path, "a cost table", EXPECTED)
        return cls(path.stem, curves.verify, curves.draft)

    def seconds(self, part: str, rows: int) -> float:
        """Seconds of a forward of ``rows`` rows."""
        if not rows:
            return 0.0
        known, costs = self._points["draft" if part == "draft" else "verify"]
        if rows > known[-1] and len(known) > 1:
            slope = max(0.0, costs[-1] - costs[-2]) / (known[-1] - known[-2])  # noise may bend a flat curve down
            return float(costs[-1] + (rows - known[-1]) * slope)
        return float(np.interp(rows, known, costs))

    @functools.cached_property
    def _points(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Both curves as rows, ascending, and their seconds."""
        curves = {"verify": sorted(self.verify.items()), "draft": sorted(self.draft.items())}
        return {
            part: (np.array([n for n, _ in curve]), np.array([s for _, s in curve])) for part, curve in curves.items()
        }


class PricedClock(WallClock):
    """Seconds from a table, whatever the machine does."""

    priced = True

    def __init__(self, table: CostTable):
        super().__init__(torch.device("cpu"))
        self.table = table

    @contextmanager
    def time(self, part: str, rows: int = 0) -> Iterator[Forward]:
        forward = Forward(rows)
        yield forward
        self.charge(part, forward.times * self.table.seconds(part, forward.rows))
