"""The trained parts of an early exit: low-rank weights and, for Kangaroo, an attention, beside the target's own
weights.

An exit follows the first layers of a target. Its projection, at first the target's final norm and output rows, turns
their hidden state into a distribution of the next token: a drafter inside the target. An adapter belongs to one
decoder; the target's weights are shared and never written to.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spec_envs.decoding.model.layers import Layers
from spec_envs.decoding.model.lora import Additions, LayersLoRA, LowRank, additions
from spec_envs.decoding.model.rope import Rope
from spec_envs.decoding.model.shape import part
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.blocks import dense
from spec_envs.decoding.weights.checkpoints import model_folder
from spec_envs.decoding.weights.files import load_stored

KINDS = ("head", "kangaroo", "layers")
HEAD_RANK, HEAD_SCALE = 64, 2.0
LAYERS_RANK, LAYERS_SCALE = 8, 2.0


@dataclass(frozen=True)
class ExitSettings:
    """The target and the exit of an adapter, and its shape.

    Attributes:
        base_model: the target's name.
        fingerprint: fingerprint of the target's weights; an adapter of other weights is refused.
        exit_layer: number of layers before the exit.
        kind: ``"head"``: low-rank weights on the exit's projection; ``"kangaroo"``: the same after norm, attention and
            norm (arXiv 2404.18911); ``"layers"``: low-rank weights on the target's layers, before the exit and after
            it.
        rank: of the low-rank weights.
    """

    base_model: str
    fingerprint: str
    exit_layer: int
    kind: str
    rank: int


class ExitAdapter(nn.Module):
    """An early exit of a target, with its trained parts.

    Args:
        target: the model, whose weights stay as they are.
        settings: the exit, and the adapter's shape.

    Attributes:
        shortlist: ascending ids that a drafter proposes besides those of the text; None means all ids.
        version: counts changes; a change takes effect in a decoder when its next text begins.

    Raises:
        ValueError: the target has no such exit, the kind or rank is wrong, or the settings belong to another target.
    """

    def __init__(self, target: Transformer, settings: ExitSettings):
        super().__init__()
        check(target, settings)
        self.target, self.settings = target, settings
        self.shortlist: np.ndarray | None = None
        self.version = 0
        shape, rank = target.shape, settings.rank
        if settings.kind == "layers":
            parts = inject_lora(target, settings.exit_layer, rank, LAYERS_SCALE * rank)
            self.lora_S, self.lora_D = parts["lora_S"], parts["lora_D"]
        else:
            self.exit_proj = LowRank(shape.hidden, shape.vocab, rank, HEAD_SCALE * rank)
        if settings.kind == "kangaroo":
            self.attention = Attention(target, settings)
        self.to(target.device)

    @classmethod
    def fresh(
        cls, target: Transformer, name: str, exit_layer: int, kind: str = "head", rank: int | None = None
    ) -> Self:
        """Return an untrained adapter.

        At first its exit predicts with the target's own final norm and output rows; the attention of ``"kangaroo"``
        starts as that of the next layer.

        Args:
            target: the model.
            name: of the target.
            exit_layer, kind: see ``ExitSettings``.
            rank: of the low-rank weights; by default 64 for a projection, 8 for layers.
        """
        rank = default_rank(kind) if rank is None else rank
        return cls(target, ExitSettings(name, target.fingerprint, exit_layer, kind, rank))

    @property
    def exit_layer(self) -> int:
        return self.settings.exit_layer

    @property
    def kind(self) -> str:
        return self.settings.kind

    @property
    def lossless(self) -> bool:
        """Return whether the verifier is the unchanged target."""
        return self.kind != "layers"

    @property
    def norm(self) -> Tensor:
        """Gain of the norm before the projection, ``[hidden]``, float32."""
        return self.attention.norm if self.kind == "kangaroo" else self.target.norm.weight.float()

    def snapshot(self) -> ExitAdapter:
        """Return a copy that does not learn; it shares the target."""
        shared = [self.target, self.__dict__.get("_output")]
        return copy.deepcopy(self, {id(x): x for x in shared}).requires_grad_(False)

    def initialise(self, seed: int) -> None:
        """Draw new low-rank weights, as those of an untrained exit."""
        generator = torch.Generator(self.target.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, LowRank):
                module.initialise(generator)

    def touched(self) -> None:
        """Note that the weights have changed, so that decoders read them again."""
        self.version += 1

    def additions(self) -> Additions | None:
        """Return the additions to the target's layers, with gradients; None where the layers stay as they are."""
        return None if self.lossless else additions([self.lora_S, self.lora_D], self.target.shape.layers)

    def deployed_additions(self) -> Additions | None:
        """Return the additions in the dtype in which the target decodes, without gradients."""
        with torch.no_grad():
            added = self.additions()
        return None if added is None else added.frozen(self.target.precision.hidden)

    def read(self, states: Tensor) -> Tensor:
        """Return what the projection reads ``[batch, n, hidden]`` of exit states of whole texts, padded on the
        right."""
        return self.attention(states) if self.kind == "kangaroo" else states

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits ``[n, vocab]`` (float32) of ``states`` ``[n, hidden]`` as the projection reads them.

        Gradients flow to the adapter's weights, and to ``states`` unless they come from frozen layers alone.
        """
        normed = F.rms_norm(states.float(), self.norm.shape, self.norm, self.target.shape.norm_eps)
        if self.kind == "head":
            with torch.no_grad():
                base = self.target.head(states.detach().to(self.target.precision.hidden)).float()
        else:
            base = F.linear(normed.to(self._output.dtype), self._output).float()
        logits: Tensor = base if self.kind == "layers" else base + self.exit_proj(normed)
        return logits

    @functools.cached_property
    def _output(self) -> Tensor:
        """The target's output rows ``[vocab, hidden]``, bfloat16 where it is computed in int8."""
        return self.target.output_weight().to(self.target.precision.cache)  # read once: may be a copy

    @torch.no_grad()
    def rows(self, ids: Tensor) -> Tensor:
        """Return the output rows ``[n, hidden]`` (float32) of the exit's projection for ``ids`` ``[n]``, adapter
        included."""
        rows = self.target.output_rows(ids).to(self.target.precision.cache).float()
        if self.kind != "layers":
            rows = rows + self.exit_proj.lora_B[ids] @ self.exit_proj.lora_A * self.exit_proj.scale
        return rows


class Attention(nn.Module):
    """Kangaroo's adapter (arXiv 2404.18911, section 3.1): norm, attention with a residual connection, and another norm.

    It starts as the attention of the layer after the exit and the target's final norm.
    """

    def __init__(self, target: Transformer, settings: ExitSettings):
        super().__init__()
        weights = load_stored(model_folder(settings.base_model))
        layer = part(weights, f"model.layers.{settings.exit_layer}.")
        read = ("self_attn.", "input_layernorm.")
        kept = {name: dense(weight).float().clone() for name, weight in layer.items() if name.startswith(read)}
        self.names = list(kept)
        self.weights = nn.ParameterList(kept.values())
        self.norm = nn.Parameter(dense(weights["model.norm.weight"]).float().clone())
        self.shape = target.shape
        self.rope = Rope(target.config, self.shape.head_dim, self.shape.context, torch.float32, target.device)

    def layer(self) -> dict[str, Tensor]:
        """Return the weights of the attention and of the norm before it, by the names that they have in a layer."""
        return dict(zip(self.names, self.weights, strict=True))

    def forward(self, states: Tensor) -> Tensor:
        """Return the output ``[batch, n, hidden]`` for exit states; the second norm is left to the projection."""
        return Layers([self.layer()], self.shape).read(states.float(), self.rope)


def inject_lora(
    base_model: Transformer,
    exit_layer: int,
    rank: int = LAYERS_RANK,
    alpha: float = LAYERS_SCALE * LAYERS_RANK,
    products: Sequence[str] = ("q_proj", "v_proj"),
) -> dict[str, LayersLoRA]:
    """Return low-rank adapters for the layers on both sides of an exit.

    The model does not change: pass ``spec_envs.decoding.model.lora.additions(adapters.values(), layers)`` to its
    forward.

    Args:
        base_model: the target.
        exit_layer: number of layers before the exit.
        rank, alpha, products: settings of both; see ``LayersLoRA``.

    Returns:
        ``lora_S`` on the layers before the exit, ``lora_D`` on those after it.

    Raises:
        ValueError: the model has no such exit.
    """
    check_exit(base_model, exit_layer)
    layers = {"lora_S": range(exit_layer), "lora_D": range(exit_layer, base_model.shape.layers)}
    return {name: LayersLoRA(base_model.shape, where, rank, alpha, products) for name, where in layers.items()}


def default_rank(kind: str) -> int:
    """Return the default rank of the low-rank weights of a kind of adapter."""
    return LAYERS_RANK if kind == "layers" else HEAD_RANK


def check_exit(target: Transformer, exit_layer: int) -> None:
    """Raise ValueError if the target has no such exit."""
    if not 1 <= exit_layer < target.shape.layers:
        raise ValueError(
            f"exit_layer is {exit_layer}; expected 1 to {target.shape.layers - 1}, for the target has "
            f"{target.shape.layers} layers"
        )


def check(target: Transformer, settings: ExitSettings) -> None:
    """Raise ValueError if the settings do not fit the target."""
    if settings.fingerprint != target.fingerprint:
        raise ValueError(
            f"the adapter was trained on {settings.base_model!r}, whose weights are others than those of this target; "
            "take the target that it is for, or train one of its own"
        )
    check_exit(target, settings.exit_layer)
    if settings.kind not in KINDS:
        raise ValueError(f"adapter is {settings.kind!r}; expected one of {', '.join(KINDS)}")
    if settings.rank < 1:
        raise ValueError(f"rank is {settings.rank}; expected 1 or more")
