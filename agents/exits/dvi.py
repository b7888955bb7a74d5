"""Draft, verify, improve: the exact gradient of acceptance, after a beginning by distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from spec_envs.agents.exits.losses import distillation, expected_acceptance, masked_cross_entropy
from spec_envs.agents.exits.online import OnlineAgent, adamw
from spec_envs.agents.exits.replay import Segment, joined
from spec_envs.agents.settings import Amount, Count, Natural


class DVIAgent(OnlineAgent):
    """Improves an early exit while it decodes: distillation first, then the exact gradient of the chance that the target
    accepts the next draft (after Bhansali and Heck 2025, DVI, arXiv 2510.05421).

    Every emitted token is a lesson, because the verifier's distribution is known at each: the exact gradient of the
    chance that it accepts the next draft replaces the samples of the published policy gradient. With s updates made,
    the loss is (1 − t) · KL + t · (−acceptance + kl_floor · KL) + ce_weight · CE, where t goes from 0 at ``kl_steps``
    to 1 in ``anneal_steps`` more; KL is that of the verifier to the exit, and CE is on accepted drafts.
    """

    class Settings(OnlineAgent.Settings):
        kl_steps: Natural = Field(40, description="updates of distillation alone")
        anneal_steps: Count = Field(80, description="updates in which the weights change")
        kl_floor: Amount = Field(0.05, description="final weight of distillation")
        ce_weight: Amount = Field(0.1, description="weight of cross-entropy on accepted drafts")
        learning_rate: Amount = Field(1e-3, description="learning rate of AdamW")

    settings: Settings

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"fast": adamw(self.passes.weights(), self.settings.learning_rate)}

    def fast_update(self, segments: Sequence[Segment]) -> tuple[float, float]:
        """Make an update, and return the losses of acceptance and of distillation with cross-entropy."""
        policy, teacher = self.weights()
        verifier = self.decoder.verifier if self.decoder else None
        drawing = (verifier.temperature, verifier.top_p) if verifier else (0.0, 1.0)
        finals, drafted, rewards = (joined(segments, name) for name in ("finals", "drafted", "rewards"))
        sums = [0.0, 0.0]

        def loss(rows: slice, logits: Tensor) -> Tensor:
            with torch.no_grad():
                verifier_logits = self.adapter.target.head(finals[rows]).float()
            accepted = expected_acceptance(logits, verifier_logits, *drawing)
            taken = masked_cross_entropy(logits, drafted[rows], rewards[rows])
            supervised = teacher * distillation(logits, verifier_logits) + self.settings.ce_weight * taken
            for i, part in enumerate((-accepted, supervised)):
                sums[i] += part.detach().sum().item() / len(finals)
            return supervised - policy * accepted

        self.descend("fast", segments, loss)
        return sums[0], sums[1]

    def weights(self) -> tuple[float, float]:
        """Return the weights of acceptance and of distillation at this update."""
        t = min(1.0, max(0.0, (self.updates - self.settings.kl_steps) / self.settings.anneal_steps))
        return t, (1 - t) + self.settings.kl_floor * t
