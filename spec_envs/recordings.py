"""Load recordings and clocks by name."""

from __future__ import annotations

from collections.abc import Sequence

from spec_envs.decoding.clock import CostTable, PricedClock, WallClock
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.decoding.traces.recording import Recording
from spec_envs.decoding.traces.synthetic import Profile
from spec_envs.decoding.traces.trace import Trace
from spec_envs.decoding.weights.checkpoints import resolve_device
from spec_envs.network.expected_trace import ExpectedTrace


def load(name: str) -> Recording:
    """Return the recording of a name: the folder of a trace, or of the traces of several drafters, an expected-acceptance trace (a shipped name or an
    ``.npz`` file) or a synthetic profile (a shipped name or a JSON file).

    Raises:
        ValueError: the recording is not found, or damaged.
    """
    if not name.strip():
        raise ValueError(f"trace is {name!r}; expected a folder, a file or a name, or None for models")
    for kind in (Trace, PortfolioTrace, ExpectedTrace):
        if kind.named(name):
            return kind.load(name)
    return Profile.load(name)


def exact(folder: str) -> Trace | PortfolioTrace:
    """Return the recorded trace in a folder, of one drafter or of several.

    Raises:
        ValueError: the folder holds no trace, or a damaged one.
    """
    return PortfolioTrace.load(folder) if PortfolioTrace.named(folder) else Trace.load(folder)


def is_exact(name: str) -> bool:
    """Return True if a name is the folder of a recorded trace, of one drafter or of several."""
    return Trace.named(name) or PortfolioTrace.named(name)


def clocks_for(clock: str | Sequence[str], device: str, recording: Recording | None = None) -> list[WallClock]:
    """Return the clocks of those names.

    Args:
        clock: ``"wall"``, or the names of one or several cost tables. A recording's own table replaces the wall.
        device: device whose forwards a measured clock waits for.

    Raises:
        ValueError: a table is not found, or one of several clocks measures.
    """
    names = [clock] if isinstance(clock, str) else list(clock)
    if not names:
        raise ValueError("clock is an empty list; expected 'wall' or cost tables")
    if len(names) > 1 and "wall" in names:
        raise ValueError(f"clock is {clock!r}; several clocks need cost tables, a measured clock has none")
    if names != ["wall"]:
        return [PricedClock(CostTable.load(name)) for name in names]
    return [PricedClock(recording.costs()) if recording else WallClock(resolve_device(device))]
