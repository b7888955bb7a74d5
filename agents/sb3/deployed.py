"""The network of a Stable-Baselines3 policy without the library around it: the part that is deployed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from spec_envs.agents.exits.policy import BareExit, ExitPolicy
from spec_envs.agents.timing import priced_network

FUNCTIONS: dict[type[nn.Module], Callable[[np.ndarray], np.ndarray]] = {
    nn.ReLU: lambda x: np.maximum(x, 0),
    nn.Tanh: np.tanh,
    nn.ELU: lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    nn.GELU: lambda x: x * ndtr(x),
}


class Bare:
    """The layers from an observation to a preference for each action, computed in NumPy, which for so small a network
    takes a fraction of the time that torch takes.

    Args:
        layers: linear layers and activations; their weights are copied.
        logits: True if preferences are log-probabilities up to a constant, False if they are values.
        lstm: recurrent layer before them, which torch computes; None if there is none.
        quantiles: number of quantiles that the layers return of each action's value; the value is their mean.
    """

    def __init__(self, layers: nn.Module, logits: bool, lstm: nn.LSTM | None = None, quantiles: int = 1):
        self.logits, self.lstm, self.quantiles = logits, lstm, quantiles
        leaves = [module for module in layers.modules() if not isinstance(module, nn.Sequential)]
        self.priced_seconds = priced_network(layers if lstm is None else nn.Sequential(lstm, layers))
        self.steps = [in_numpy(module) for module in leaves]

    @torch.inference_mode()
    def remember(self, x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        """Pass an observation through the recurrent part."""
        assert self.lstm is not None
        out, state = self.lstm(torch.from_numpy(x)[None, None], state)
        return out[0, 0].numpy(), state

    def __call__(self, x: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        if self.lstm is not None:
            x, state = self.remember(x, state)
        for step in self.steps:
            x = step(x)
        return x.reshape(self.quantiles, -1).mean(0), state


def in_numpy(module: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """Return a linear layer or an activation as a function of one vector."""
    if isinstance(module, nn.Linear):
        weight, bias = module.weight.detach().numpy().copy(), module.bias.detach().numpy().copy()
        # not `weight @ x`: BLAS computes larger products on threads of its own, which stay awake for a while and get in
        # the way of the decoder's (a verification took four times as long)
        return lambda x: np.einsum("ij,j->i", weight, x) + bias
    return FUNCTIONS[type(module)]


def bare(policy: Any) -> Bare | BareExit:
    """Return the network that a policy's deterministic action is the argmax of."""
    if isinstance(policy, ExitPolicy):
        return BareExit(policy.adapter)
    if isinstance(policy, ActorCriticPolicy):
        layers = nn.Sequential(policy.mlp_extractor.policy_net, policy.action_net)
        return Bare(layers, logits=True, lstm=getattr(policy, "lstm_actor", None))
    if hasattr(policy, "quantile_net"):
        return Bare(policy.quantile_net.quantile_net, logits=False, quantiles=policy.quantile_net.n_quantiles)
    return Bare(policy.q_net.q_net, logits=False)
