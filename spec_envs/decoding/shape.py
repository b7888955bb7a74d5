"""The numbers of an architecture, and the tensors of its parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PretrainedConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """The numbers of an architecture, read from a transformers config."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Shape:
        """Read ``config``; raises ValueError for an architecture this forward does not compute."""
        if config.model_type not in ARCHITECTURES:
            raise ValueError(
                f"architecture {config.model_type!r} is not supported; use a model of one of: {', '.join(ARCHITECTURES)}"
            )
        if config.hidden_act != "silu":
            raise ValueError(f"activation {config.hidden_act!r} is not supported; expected 'silu'")
        context = config.max_position_embeddings
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True):
            context = min(context, window)  # within the window, sliding attention is plain attention
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            context=context,
            norm_eps=config.rms_norm_eps,
        )


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix``, without it."""
    found = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not found:
        raise KeyError(f"{prefix}*")
    return found
