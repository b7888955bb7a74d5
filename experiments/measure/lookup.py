"""Prompt lookup alone, the static setting of a pair in which nothing but copies is drafted."""

from __future__ import annotations

from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.controls import Policy
from spec_envs.controls.k import KControl
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.lookup import LookupDrafter
from spec_envs.decoding.engine import Engine


class LookupControl(KControl):
    """Chains of ``k`` tokens that the drafter ``lookup`` copies, whichever drafter the arms beside it have.

    Args:
        k: tokens of a chain.
    """

    def __init__(self, k: int):
        super().__init__(max(2, k), alternatives=0, observation="counters")

    def separate(self, decoder: Engine) -> Decoder:
        """Return a decoder of the same target and sampling, or of the same recorded texts, that drafts by prompt lookup
        alone.

        Raises:
            ValueError: the target is that of a server.
        """
        plain = decoder.plain()
        if not isinstance(plain, Decoder):
            raise ValueError("prompt lookup alone needs a target that verifies chains; a server drafts by itself")
        drafter = LookupDrafter(plain.verifier.vocab, plain.verifier.context)
        return Decoder(plain.verifier, drafter, plain.clock, plain.eos, self.max_depth, plain.detokenize)


def lookup_policy(k: int) -> Policy:
    """Return the policy that drafts ``k`` tokens by prompt lookup alone in every cycle."""
    control = LookupControl(k)
    return Policy(control, FixedAgent(control, value=k))
