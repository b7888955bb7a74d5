"""The early exit of a target, as the settings of a problem name it."""

from __future__ import annotations

from dataclasses import dataclass

from spec_envs.decoding.drafters.names import EXIT


@dataclass(frozen=True)
class ExitPoint:
    """An exit that drafts for its own target.

    Attributes:
        target, device, dtype: names of the target, of its device and of its dtype.
        exit_layer: layers before the exit.
        adapter: what may be trained, one of ``spec_envs.decoding.exits.adapter.KINDS``.
        rank: rank of the low-rank weights; None is the kind's default.
        draft_temperature: temperature at which drafts are drawn during training; 0 takes the most probable token.
    """

    target: str
    device: str
    dtype: str
    exit_layer: int
    adapter: str
    rank: int | None
    draft_temperature: float

    @property
    def drafter(self) -> str:
        """Name of the untrained exit among drafters."""
        return f"{EXIT}{self.exit_layer}"
