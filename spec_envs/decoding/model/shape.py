"""The numbers of an architecture, and the tensors of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from transformers import PretrainedConfig

from spec_envs.decoding.model.rope import static_context

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
SILU = ("silu", "swish")  # two names of one activation
LONGEST = 1 << 20  # most positions: the rotary tables hold all of them, and a config may claim any number
T = TypeVar("T")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Shape:
    """The numbers of an architecture.

    Attributes:
        hidden: width of the hidden states.
        layers: number of layers.
        heads, kv_heads: number of query heads, and of key/value heads.
        head_dim: size of a head.
        vocab: number of token ids.
        context: most tokens of a text.
        norm_eps: of the RMS norms.

    Raises:
        ValueError: no model can have these numbers.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "vocab", "context"):
            if (number := getattr(self, name)) < 1:
                raise ValueError(f"the model's config has {name} = {number}; expected 1 or more")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"the model's config has {self.heads} attention heads over {self.kv_heads} key/value heads; expected a "
                "multiple of them"
            )
        if self.head_dim % 2:
            raise ValueError(f"the model's config has heads of size {self.head_dim}; rotary positions need an even one")
        if not 0 <= self.norm_eps < float("inf"):
            raise ValueError(f"the model's config has rms_norm_eps = {self.norm_eps}; expected a finite number from 0")

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Shape:
        """Read the numbers of a transformers config.

        Raises:
            ValueError: the architecture is not supported.
        """
        if config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"architecture {config.model_type!r} is not supported; use a model of one of: "
                f"{', '.join(ARCHITECTURES)}"
            )
        if config.is_heterogeneous:
            raise ValueError("the model's config has layers of different shapes, which are not supported")
        if config.hidden_act not in SILU:
            raise ValueError(f"activation {config.hidden_act!r} is not supported; expected 'silu'")
        if not getattr(config, "is_causal", True):
            raise ValueError("the model's config says is_causal = false: it does not predict the next token")
        context, window = min(static_context(config), LONGEST), sliding_window(config)
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1),
            vocab=config.vocab_size,
            context=context
            if window is None
            else min(context, window),  # within the window attention is full attention
            norm_eps=config.rms_norm_eps,
        )


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return the size of the sliding window in positions; None where all layers see the whole text.

    Raises:
        ValueError: a layer has another kind of attention, or the window is empty.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    if unknown := kinds - {FULL, SLIDING}:
        raise ValueError(f"layers of {', '.join(sorted(unknown))} are not supported; expected {FULL} or {SLIDING}")
    window = getattr(config, "sliding_window", None)
    if config.model_type in ("qwen2", "qwen3") and SLIDING not in kinds:
        return None  # the other architectures ignore layer_types
    if window is None and SLIDING not in kinds:
        return None
    if window is None or window < 1:
        raise ValueError(f"the model's config has sliding_window = {window} for {SLIDING}; expected 1 or more")
    return int(window)


def part(weights: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Return the tensors whose names begin with ``prefix``, by their names without it.

    Raises:
        KeyError: there are none.
    """
    found = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not found:
        raise KeyError(f"{prefix}*")
    return found
