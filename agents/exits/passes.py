"""Passes over whole texts that gradients flow through, for what is trained of an exit."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spec_envs.agents.exits.replay import Segment, joined
from spec_envs.decoding.exits.adapter import ExitAdapter
from spec_envs.decoding.model.lora import Additions
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import load_target


class ExitPass:
    """What an exit's projection, and the layers behind the exit, read at every token of a text, by today's weights.

    Args:
        adapter: what is trained.
    """

    def __init__(self, adapter: ExitAdapter):
        self.adapter = adapter

    def weights(self) -> list[nn.Parameter]:
        """Those that make the exit a better drafter."""
        adapter = self.adapter
        if not adapter.lossless:
            return list(adapter.lora_S.parameters())
        return [
            *adapter.exit_proj.parameters(),
            *(adapter.attention.parameters() if adapter.kind == "kangaroo" else ()),
        ]

    @functools.cached_property
    def model(self) -> Transformer:
        """The target in a dtype that gradients flow through."""
        target = self.adapter.target
        if target.device.type == "cuda" or target.dtype == torch.float32:
            return target
        return load_target(self.adapter.settings.base_model, target.device, torch.float32)

    def additions(self) -> Additions | None:
        """What the adapter adds to the layers of ``model``, with gradients."""
        added = self.adapter.additions()
        return None if added is None else added.to(self.model.dtype)

    def rows(self, segments: Sequence[Segment]) -> Tensor:
        """What the projection reads at the rows of segments, ``[n, hidden]``."""
        if self.adapter.kind == "head":  # which does not depend on what is trained
            return joined(segments, "exits")
        return torch.cat([self.text(segment.ids)[segment.places] for segment in segments])

    def text(self, ids: Tensor) -> Tensor:
        """What the projection reads at every token of a text ``[m]``, ``[m, hidden]``."""
        adapter, shallow = self.adapter, range(self.adapter.exit_layer)
        if not adapter.lossless:
            model = self.model
            return model.layers.read(model.embed(ids)[None], model.rope, shallow, self.additions())[0]
        return adapter.read(self.through(ids, shallow)[None])[0]

    @torch.no_grad()
    def through(self, ids: Tensor, layers: range) -> Tensor:
        """What the target as it is makes of a text ``[m]`` up to the last of ``layers``, in its own dtype, without
        gradients."""
        target, positions = self.adapter.target, torch.arange(len(ids), device=ids.device)[None]
        return target.forward(target.embed(ids)[None], target.cache(len(ids)), positions, layers=layers)[0][0]

    def behind(self, ids: Tensor) -> Tensor:
        """Hidden states of a text behind the last layer of the adapted target, ``[m, hidden]``, with gradients for
        ``lora_D`` only."""
        model, layers = self.model, range(self.adapter.exit_layer, self.model.shape.layers)
        states = self.text(ids).detach()
        return model.layers.read(states[None], model.rope, layers, self.additions())[0]

    @torch.no_grad()
    def frozen(self, ids: Tensor) -> Tensor:
        """The same of the target as it is, computed likewise."""
        return self.model.layers.read(self.model.embed(ids)[None], self.model.rope)[0]
