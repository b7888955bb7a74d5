"""Seconds by part: measured with the wall clock, or priced by a calibrated table.

The parts are ``prefill`` (never part of a cycle), ``draft``, ``verify``, ``network`` and ``policy``. With a priced
clock every environment is deterministic by seed.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from spec_envs.checked import first_error, read_checked
from spec_envs.files import DATA, find_json

PARTS = ("prefill", "draft", "verify", "network", "policy")
COSTS = DATA / "costs"
DRAFTER = "draft:"  # before the name of one of several drafters, the curve of its forwards


class Forward:
    """A forward that is being timed, in a ``with`` block; one that fails is not charged.

    Attributes:
        part: to which it is charged.
        drafter: name of the one of several drafters that makes it, ``""`` where there is one.
        rows, times: its rows and how often it is made, which may be set while it runs. A priced clock charges nothing
            where either is 0.
    """

    __slots__ = ("begin", "clock", "drafter", "part", "rows", "times")

    def __init__(self, clock: WallClock, part: str, rows: int):
        self.clock, self.part, self.rows, self.times = clock, part, rows, 1
        self.drafter = ""

    @property
    def curve(self) -> str:
        """Name of the curve of a cost table that prices it; see ``CostTable.seconds``."""
        return f"{self.part}:{self.drafter}" if self.drafter else self.part

    def __enter__(self) -> Forward:
        self.clock.synchronize()
        self.begin = time.perf_counter()
        return self

    def __exit__(self, failure: type[BaseException] | None, *rest: object) -> None:
        if failure is None:
            self.clock.made(self)


class WallClock:
    """Measures seconds; the device is synchronised before and after every part.

    Attributes:
        priced: True if the seconds come from a table instead.
        totals: seconds charged to each part since the text began.
        simulated: seconds among them that did not pass in reality, such as those of a simulated network.
        forwards: number of forwards since the text began that were measured, by curve and rows, with which a cost table
            can price the same text afterwards.
    """

    priced = False

    def __init__(self, device: torch.device):
        self.device, self.waits = device, device.type == "cuda"
        self.restart()

    def synchronize(self) -> None:
        """Wait until the device has computed what it was given."""
        if self.waits:
            torch.cuda.synchronize()

    def restart(self) -> None:
        """Count from 0 at the start of a text, so that its seconds do not depend, to the last bit, on earlier texts."""
        self.totals = dict.fromkeys(PARTS, 0.0)
        self.simulated = 0.0
        self.forwards: Counter[tuple[str, int]] = Counter()

    def time(self, part: str, rows: int = 0) -> Forward:
        """Return a ``with`` block whose seconds are charged to ``part``; ``rows`` are those of its forward, if known
        beforehand."""
        return Forward(self, part, rows)

    def made(self, forward: Forward) -> None:
        """Charge a forward that has just ended."""
        self.synchronize()
        self.charge(forward.part, time.perf_counter() - forward.begin)
        self.forwards[forward.curve, forward.rows] += forward.times

    def charge(self, part: str, seconds: float) -> None:
        """Add seconds to ``part`` that were measured elsewhere."""
        self.totals[part] += seconds

    def travel(self, seconds: float, part: str, simulated: bool) -> None:
        """Charge the seconds that a message took to ``network``, or to ``prefill`` if ``part`` is the prefill.

        Simulated seconds, and all under a priced clock, are added. Measured ones are already contained in what was
        charged to ``part``, and are moved from there.
        """
        into = "prefill" if part == "prefill" else "network"
        if simulated or self.priced:
            self.simulated += seconds
        else:
            self.totals[part] -= seconds
        self.charge(into, seconds)

    def since(self, earlier: dict[str, float]) -> dict[str, float]:
        """Return the seconds of each part since ``earlier``, a copy of ``totals``."""
        return {part: total - earlier[part] for part, total in self.totals.items()}


Rows = Annotated[int, Field(ge=1, le=10**9)]
Seconds = Annotated[float, Field(ge=1e-12, le=1e9)]  # 1 / seconds and sums over many forwards stay finite
Curve = Annotated[dict[Rows, Seconds], Field(min_length=1)]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
CURVE = TypeAdapter(Curve, config=STRICT)
EXPECTED = 'expected {"verify": {"1": seconds, …}, "draft": {…}}, rows and their positive seconds'


@with_config(STRICT)
@dataclass(frozen=True)
class Curves:
    """The curves in a cost table's file; its other keys are for people."""

    verify: Curve
    draft: Curve
    drafters: dict[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class CostTable:
    """Seconds of a forward by its number of rows, on one machine and for one pair of models.

    Between the listed numbers of rows the seconds are interpolated, beyond them extrapolated from the last two.

    Attributes:
        name: of the table.
        verify, draft: seconds by number of rows, of the target and of the drafter.
        drafters: the same of each of several drafters by its name; one that is not listed has the curve ``draft``.

    Raises:
        ValueError: a curve is empty, or has rows that are not whole numbers or seconds that are not positive.
    """

    name: str
    verify: dict[int, float]
    draft: dict[int, float]
    drafters: dict[str, dict[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part, curve in self.curves.items():
            try:
                CURVE.validate_python(curve)
            except ValidationError as error:
                raise ValueError(f"{self.name} is not a cost table ({part} {first_error(error)}); {EXPECTED}") from None

    @classmethod
    def load(cls, source: str) -> CostTable:
        """Read a shipped table by name, or a JSON file by path.

        Raises:
            ValueError: there is no such table, or it is malformed.
        """
        path = find_json(source, COSTS, "cost table", "wall")
        curves = read_checked(Curves, path, "a cost table", EXPECTED)
        return cls(path.stem, curves.verify, curves.draft, curves.drafters)

    @classmethod
    def of(cls, name: str, curves: Mapping[str, dict[int, float]]) -> CostTable:
        """Return a table of these curves, those of several drafters under ``"draft:NAME"``."""
        drafters = {part.removeprefix(DRAFTER): curve for part, curve in curves.items() if part.startswith(DRAFTER)}
        return cls(name, curves["verify"], curves["draft"], drafters)

    def seconds(self, part: str, rows: int) -> float:
        """Return the seconds of a forward of ``rows`` rows.

        Args:
            part: ``"draft"``, ``"draft:NAME"`` for one of several drafters, or any other for the target.
        """
        if not rows:
            return 0.0
        key = (part, rows)
        if key not in self._priced:  # the same few are asked for at every step
            self._priced[key] = self._interpolated(*key)
        return self._priced[key]

    @functools.cached_property
    def _priced(self) -> dict[tuple[str, int], float]:
        """Seconds by part and rows, as far as they were asked for."""
        return {}

    @property
    def curves(self) -> dict[str, dict[int, float]]:
        """The curves by the part that they price."""
        return {"verify": self.verify, "draft": self.draft} | {
            f"{DRAFTER}{name}": curve for name, curve in self.drafters.items()
        }

    def _interpolated(self, part: str, rows: int) -> float:
        """Return the seconds of a forward by its curve."""
        curve = part if part in self._points else "draft" if part.startswith(DRAFTER) else "verify"
        known, costs = self._points[curve]
        if rows > known[-1] and len(known) > 1:
            slope = max(0.0, costs[-1] - costs[-2]) / (known[-1] - known[-2])  # noise may make a flat curve fall
            return float(costs[-1] + (rows - known[-1]) * slope)
        return float(np.interp(rows, known, costs))

    @functools.cached_property
    def _points(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Both curves as arrays of rows, ascending, and of their seconds."""
        curves = {part: sorted(curve.items()) for part, curve in self.curves.items()}
        return {
            part: (np.array([n for n, _ in curve]), np.array([s for _, s in curve])) for part, curve in curves.items()
        }


class PricedClock(WallClock):
    """Charges the seconds of a cost table, independently of the machine."""

    priced = True

    def __init__(self, table: CostTable):
        super().__init__(torch.device("cpu"))
        self.table = table

    def made(self, forward: Forward) -> None:
        self.charge(forward.part, forward.times * self.table.seconds(forward.curve, forward.rows))
