"""How long a chain to draft."""

from __future__ import annotations

from gymnasium import spaces

from spec_envs.controls.base import Control, Entry, read_context, read_position
from spec_envs.decoding.decoder import Cycle, Decoder

WINDOWS = (4, 16)  # cycles over which acceptance is observed


class KControl(Control):
    """
    The control of fixed lengths in `make bench`; no environment has it yet.

    ## Description

    A draft model proposes a chain of K tokens, each read by its next forward, and the target verifies all of them in
    one. Every cycle the agent decides K. Long chains pay where the draft model is nearly always right; where it is
    not, K = 0, plain decoding, is the fastest. The length is that of Leviathan et al. 2023 (arXiv 2211.17192).

    ## Action Space

    `Discrete(k_max + 1)`: action K drafts K tokens and verifies them; 0 is a step of plain decoding.

    ## Observation Space

    A `Box` of float32:

    | Num | Observation | Min | Max |
    |-----|-------------|-----|-----|
    | 0–1 | `acceptance`: accepted / drafted tokens over 4 and 16 cycles (0 where nothing was drafted) | 0 | 1 |
    | 2 | `last_k`: K of the last cycle / `k_max` | 0 | 1 |
    | 3 | `position`: emitted tokens / `max_new_tokens` | 0 | 1 |
    | 4 | `context`: tokens of the text / 4096 | 0 | 1 |

    `cost_features=True` appends `costs`, as in SpecDepth-v0.

    ## Arguments

    - `k_max=16`: longest chain.
    """

    name, partner_name = "k", None
    observations = ("default",)
    width = 1

    def __init__(self, k_max: int = 16, observation: str = "default", cost_features: bool = False):
        super().__init__(observation, cost_features)
        if k_max < 2:
            raise ValueError(f"k_max is {k_max}; expected 2 or more")
        self.k_max, self.max_depth = k_max, k_max - 1
        self.action_space = spaces.Discrete(k_max + 1)
        self._declare(
            [
                Entry("acceptance", len(WINDOWS), 0.0, 1.0, read_acceptance),
                Entry("last_k", 1, 0.0, 1.0, self._read_last_k),
                Entry("position", 1, 0.0, 1.0, read_position),
                Entry("context", 1, 0.0, 1.0, read_context),
            ]
        )

    def prepare(self, decoder: Decoder) -> None:
        """Nothing is drafted before K is decided."""

    def act(self, decoder: Decoder, action: int) -> Cycle:
        return decoder.cycle(action)

    def _read_last_k(self, decoder: Decoder) -> float:
        return decoder.cycles[-1].drafted / self.k_max if decoder.cycles else 0.0


def read_acceptance(decoder: Decoder) -> list[float]:
    """Accepted over drafted tokens of the last cycles: a ratio of sums, not a mean of ratios."""
    recent = [decoder.cycles[-n:] for n in WINDOWS]
    return [sum(c.accepted for c in cycles) / max(1, sum(c.drafted for c in cycles)) for cycles in recent]
