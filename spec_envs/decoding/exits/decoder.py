"""A decoder that drafts from the target's own exit, for an agent that chooses the drafted tokens."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.exits.split import SplitVerifier
from spec_envs.decoding.tree import Children


class ExitDecoder(Decoder):
    """A ``Decoder`` whose drafter is an exit of its target, which an agent may draft in place of."""

    verifier: SplitVerifier
    drafter: EarlyExitDrafter

    def look(self) -> Tensor:
        """Return ``[hidden]``, what the exit's projection reads after the text and the chain under way. Its forward is
        made once, however often it is asked for."""
        self._check_alive()
        with self.clock.time("draft") as forward:
            state, forward.rows = self.drafter.look(self.tree.tokens.tolist())
        return state[0]

    def put(self, token: int) -> None:
        """Append a token that was chosen outside to the chain."""
        self._check_alive()
        children = Children(np.array([[token]]), np.zeros((1, 1), np.float32), np.zeros(1, np.float32))
        if self.tree.size:
            self.tree.grow(children)
        else:
            self.tree.start(children)
        self.drafting = True
