"""Passes over whole texts that gradients flow through, for the trained weights of an exit."""

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
    """Computes the inputs of an exit's projection, and of the layers after the exit, at every token of a text, with the
    current weights.

    Args:
        adapter: the adapter that is trained.
    """

    def __init__(self, adapter: ExitAdapter):
        self.adapter = adapter

    def weights(self) -> list[nn.Parameter]:
        """Return the weights that make the exit a better drafter."""
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
        if target.device.type == "cuda" or target.dtype == "float32":
            return target
        return load_target(self.adapter.settings.base_model, target.device, "float32")

    def additions(self) -> Additions | None:
        """Return the adapter's additions to the layers of ``model``, with gradients."""
        added = self.adapter.additions()
        return None if added is None else added.to(self.model.precision.hidden)

    def rows(self, segments: Sequence[Segment]) -> Tensor:
        """Return the projection's inputs ``[n, hidden]`` at the rows of segments."""
        if self.adapter.kind == "head":  # which does not depend on what is trained
            return joined(segments, "exits")
        return torch.cat([self.text(segment.ids)[segment.places] for segment in segments])

    def text(self, ids: Tensor) -> Tensor:
        """Return the projection's inputs ``[m, hidden]`` at every token of a text ``[m]``."""
        adapter, shallow = self.adapter, range(self.adapter.exit_layer)
        if not adapter.lossless:
            model = self.model
            states: Tensor = model.layers.read(model.embed(ids)[None], model.rope, shallow, self.additions())[0]
            return states
        return adapter.read(self.through(ids, shallow)[None])[0]

    @torch.no_grad()
    def through(self, ids: Tensor, layers: range) -> Tensor:
        """Return the hidden states ``[m, hidden]`` of a text ``[m]`` after the last of ``layers`` of the unadapted
        target, in its own dtype, without gradients."""
        target, positions = self.adapter.target, torch.arange(len(ids), device=ids.device)[None]
        return target.forward(target.embed(ids)[None], target.cache(len(ids)), positions, layers=layers)[0][0]

    def adapted(self, ids: Tensor) -> Tensor:
        """Return the hidden states ``[m, hidden]`` of a text after the last layer of the adapted target, with gradients
        for ``lora_D`` only."""
        model, layers = self.model, range(self.adapter.exit_layer, self.model.shape.layers)
        shallow = self.text(ids).detach()
        states: Tensor = model.layers.read(shallow[None], model.rope, layers, self.additions())[0]
        return states

    @torch.no_grad()
    def frozen(self, ids: Tensor) -> Tensor:
        """Return the hidden states ``[m, hidden]`` of a text after the last layer of the unadapted target."""
        states: Tensor = self.model.layers.read(self.model.embed(ids)[None], self.model.rope)[0]
        return states
