"""REINFORCE at an early exit: drafts are drawn, and the agent learns only from their acceptance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from pydantic import Field
from torch import Tensor

from spec_envs.agents.exits.losses import distillation, reinforce
from spec_envs.agents.exits.online import OnlineAgent, adamw
from spec_envs.agents.exits.replay import UNDRAFTED, Segment, joined
from spec_envs.agents.settings import Amount, Count
from spec_envs.controls.base import Control


class ReinforceAgent(OnlineAgent):
    """Improves an early exit while it decodes, by policy gradient on drafts that are drawn (Williams 1992), with a moving
    baseline and replay.

    After every ``fast_batch`` verified rows it makes an update with the loss −E[(r − b) · log π(t|h)] on them and on
    replayed ones: r is 1 for an accepted draft t, h the exit's state, and b the exponential moving average of r. With
    ``adapter="layers"`` the states are computed again with gradients, so that ``lora_S``, in front of the exit, learns;
    and after every ``slow_every`` such updates CE(verifier, text) + ``beta_kl`` · KL(verifier ‖ frozen verifier) trains
    ``lora_D``, after the exit.

    It learns from the same tokens less than ``dvi`` does, because it sees only whether the drawn token was accepted.

    Raises:
        ValueError: a value out of its range, or an environment in which nothing is drawn.
    """

    class Settings(OnlineAgent.Settings):
        slow_every: Count = Field(8, description="fast updates between slow ones")
        beta_kl: Amount = Field(0.1, description="weight of the divergence from the frozen verifier")
        baseline_momentum: Annotated[float, Ge(0), Lt(1)] = Field(0.9, description="momentum of the moving baseline")
        learning_rate: Amount = Field(2e-4, description="learning rate of AdamW for the drafting weights")
        slow_learning_rate: Amount = Field(5e-6, description="learning rate of AdamW for `lora_D`")

    settings: Settings

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        if self.exit.draft_temperature == 0:
            raise ValueError(
                "draft_temperature is 0, at which nothing is drawn and nothing can be learned from draws; set it above "
                "0, for example to 1"
            )
        self.baseline = 0.0

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        found: dict[str, torch.optim.Optimizer] = {"fast": adamw(self.passes.weights(), self.settings.learning_rate)}
        if not self.adapter.lossless:
            found["slow"] = adamw(self.adapter.lora_D.parameters(), self.settings.slow_learning_rate)
        return found

    def fast_update(self, segments: Sequence[Segment]) -> tuple[float, float | None]:
        """Make an update, and return the losses of the policy and, where there was a slow step, of the verifier."""
        fast = self.descend("fast", segments, self.policy_loss(segments))
        rewards = joined(segments, "rewards")[joined(segments, "drafted") != UNDRAFTED]
        momentum = self.settings.baseline_momentum
        self.baseline = momentum * self.baseline + (1 - momentum) * rewards.mean().item()
        slow = None
        if not self.adapter.lossless and (self.updates + 1) % self.settings.slow_every == 0:
            slow = self.slow_update(segments[-1])
        return fast, slow

    def policy_loss(self, segments: Sequence[Segment]) -> Callable[[slice, Tensor], Tensor]:
        """Return the policy-gradient loss as a function of rows and logits; rows after which nothing was drawn
        contribute 0."""
        drafted, rewards, behaviour = (joined(segments, name) for name in ("drafted", "rewards", "behaviour"))
        drawn = (drafted != UNDRAFTED).float()

        def loss(rows: slice, logits: Tensor) -> Tensor:
            tempered = logits / self.exit.draft_temperature
            tokens = drafted[rows].clamp(min=0)
            return drawn[rows] * reinforce(tempered, tokens, rewards[rows], self.baseline, behaviour[rows])

        return loss

    def slow_update(self, segment: Segment) -> float | None:
        """Take a supervised step of ``lora_D`` on one text, and return its loss; None where no next token is known."""
        places = segment.places[:-1]  # whose next tokens are known
        if not len(places):
            return None
        head = self.passes.model.head
        verifier = head(self.passes.adapted(segment.ids)[places]).float()
        with torch.no_grad():
            frozen = head(self.passes.frozen(segment.ids)[places]).float()
        loss = F.cross_entropy(verifier, segment.ids[places + 1])
        loss = loss + self.settings.beta_kl * distillation(frozen, verifier).mean()
        self.step("slow", loss)
        return loss.item()

    def extra_state(self) -> dict[str, Any]:
        return {"baseline": self.baseline}

    def take_extra_state(self, state: dict[str, Any]) -> None:
        self.baseline = state["baseline"]
