"""A Stable-Baselines3 policy for SpecDVI-v0, whose action net starts as the exit's own projection."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from torch import Tensor, nn

from spec_envs.agents.timing import priced
from spec_envs.controls.exit_point import ExitPoint
from spec_envs.decoding.drafters.early_exit import Projection
from spec_envs.decoding.exits.adapter import ExitAdapter
from spec_envs.decoding.loading import DEFAULT_TARGET
from spec_envs.decoding.weights.checkpoints import load_target, resolve_device, resolve_dtype


class ExitPolicy(ActorCriticPolicy):
    """Drafts by the exit's projection from the first step on: one that starts at random is right once in a vocabulary.
    Trained are low-rank weights of that projection (``adapter``), and a value network.

    Args:
        target, exit_device, dtype, exit_layer: as given to the environment (there ``device``; a policy's own is that of
            its other layers).
        rank: of the low-rank weights.
        base: arguments of ``ActorCriticPolicy``; of ``net_arch`` the value network's layers (``vf``) count.

    >>> PPO(ExitPolicy, gym.make("SpecDVI-v0"), policy_kwargs={"target": "smollm2-135m"})
    """

    def __init__(
        self,
        *args: Any,
        target: str = DEFAULT_TARGET,
        exit_device: str = "auto",
        dtype: str = "auto",
        exit_layer: int = 2,
        rank: int | None = None,
        **base: Any,
    ):
        at = resolve_device(exit_device)
        model = load_target(target, at, resolve_dtype(dtype, at, [target]))
        self._exit = partial(ExitAdapter.fresh, model, target, exit_layer, "head", rank)
        super().__init__(*args, **{**base, "ortho_init": False})

    @staticmethod
    def keywords(exit: ExitPoint) -> dict[str, Any]:
        """Return the arguments with which a policy starts as the projection of an exit."""
        names = {"target": exit.target, "exit_device": exit.device, "dtype": exit.dtype}
        return names | {"exit_layer": exit.exit_layer, "rank": exit.rank}

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net: ExitNet = ExitNet(self._exit())
        layers = self.net_arch["vf"] if isinstance(self.net_arch, dict) else self.net_arch
        extractor = ExitExtractor(self.action_net.adapter, list(layers), self.activation_fn)
        self.mlp_extractor = extractor
        self.value_net = nn.Linear(extractor.latent_dim_vf, 1)
        settings = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.parameters(), **settings)

    @property
    def adapter(self) -> ExitAdapter:
        """The adapter that is trained; ``save_exit`` makes a drafter of it."""
        return self.action_net.adapter


class ExitNet(nn.Module):
    """Maps exit states ``[n, hidden]``, with whatever follows them, to logits ``[n, vocab]``."""

    def __init__(self, adapter: ExitAdapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, observations: Tensor) -> Tensor:
        return self.adapter.logits(observations[:, : self.adapter.target.shape.hidden])


class ExitExtractor(MlpExtractor):
    """Passes observations unchanged to the action net; normalises them and passes them through layers for the value."""

    def __init__(self, adapter: ExitAdapter, layers: list[int], activation: type[nn.Module]):
        self.hidden, self.eps = adapter.target.shape.hidden, adapter.target.shape.norm_eps
        super().__init__(self.hidden, {"pi": [], "vf": layers}, activation)

    def forward_critic(self, features: Tensor) -> Tensor:
        return super().forward_critic(F.rms_norm(features[:, : self.hidden], (self.hidden,), None, self.eps))


class BareExit:
    """The projection alone, as it is deployed."""

    logits = True

    def __init__(self, adapter: ExitAdapter):
        self.projection, self.target = Projection(adapter), adapter.target
        self.priced_seconds = priced(self.target.shape.vocab * self.target.shape.hidden, in_torch=1)

    @torch.inference_mode()
    def __call__(self, x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        hidden = torch.from_numpy(x[: self.target.shape.hidden])[None]
        logits = self.projection.head(hidden.to(self.target.device, self.target.precision.hidden))
        return logits[0].float().cpu().numpy(), state
