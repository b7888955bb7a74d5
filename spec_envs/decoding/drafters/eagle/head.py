"""Weights of an EAGLE-3 head (arXiv 2503.01840): read from and written to published checkpoints, and initialised.

The modules exist for their parameter names, which are those of published checkpoints, and for training. ``EagleModel``
in ``drafter.py`` is the form for inference.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig

from spec_envs.decoding.drafters.eagle.config import Variant, read_config
from spec_envs.decoding.drafters.eagle.tensors import draft_vocabulary, optional, refuse_others, renamed
from spec_envs.decoding.drafters.eagle.written import ARCHITECTURE, written_config
from spec_envs.decoding.drafters.formats import refuse_foreign_tensors
from spec_envs.decoding.drafters.names import drafter_folder
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.files import load_weights
from spec_envs.files import write_bytes, write_json

PLAIN = Variant()


class EagleAttention(nn.Module):
    """Projections of a layer's attention.

    Args:
        config: of the head.
        width: of the rows from which queries, keys and values are computed.
        has: names of the layer's optional tensors.
    """

    def __init__(self, config: PretrainedConfig, width: int, has: Collection[str]):
        super().__init__()
        head_dim, bias = config.head_dim, "self_attn.q_proj.bias" in has
        attended, kept = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.q_proj = nn.Linear(width, attended, bias)
        self.k_proj = nn.Linear(width, kept, bias)
        self.v_proj = nn.Linear(width, kept, bias)
        self.o_proj = nn.Linear(attended, config.hidden_size, "self_attn.o_proj.bias" in has)
        if "self_attn.q_norm.weight" in has:
            self.q_norm, self.k_norm = (nn.RMSNorm(head_dim, config.rms_norm_eps) for _ in range(2))


class EagleMLP(nn.Module):
    """SwiGLU feed-forward part of a layer; the arguments are those of ``EagleAttention``."""

    def __init__(self, config: PretrainedConfig, has: Collection[str] = ()):
        super().__init__()
        bias = "mlp.gate_proj.bias" in has
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, "mlp.down_proj.bias" in has)

    def forward(self, x: Tensor) -> Tensor:
        fed: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return fed


class EagleLayer(nn.Module):
    """A decoder layer; the attention of the first one reads twice the hidden size, an embedding and a hidden state."""

    def __init__(self, config: PretrainedConfig, has: Collection[str] = (), first: bool = True):
        super().__init__()
        self.self_attn = EagleAttention(config, (1 + first) * config.hidden_size, has)
        self.mlp = EagleMLP(config, has)
        if first:
            self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class EagleHead(nn.Module):
    """An EAGLE-3 head.

    Args:
        config: a Llama or Qwen3 config with ``draft_vocab_size``.
        variant: how it differs from the first published heads.
        has: names of its optional tensors.

    Attributes:
        d2t: offsets ``[draft_vocab]``; target id = i + d2t[i].
        t2d: mask ``[vocab]`` of the target ids that can be drafted.
        lm_head: output rows of the draft vocabulary; None for a head that uses those of an embedding or of the target.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        variant: Variant = PLAIN,
        has: Collection[str] = ("lm_head.weight",),
    ):
        super().__init__()
        self.config, self.variant = config, variant
        hidden, eps = config.hidden_size, config.rms_norm_eps
        read = variant.target_hidden or hidden
        if variant.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(read, eps) for _ in range(variant.states))
        if variant.norm_before_fc:
            self.input_norm = nn.RMSNorm(variant.states * read, eps)
        self.fc = nn.Linear(variant.states * read, hidden, "fc.bias" in has)
        if variant.mask_token is not None:
            self.mask_hidden = nn.Parameter(torch.zeros(1, 1, variant.states * read))
        if "embed_tokens.weight" in has:
            self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.midlayer = EagleLayer(config, below(has, "midlayer."))
        if config.num_hidden_layers > 1:
            deeper = {str(i): below(has, f"layers.{i}.") for i in range(1, config.num_hidden_layers)}
            self.layers = nn.ModuleDict({i: EagleLayer(config, own, first=False) for i, own in deeper.items()})
        self.norm = nn.RMSNorm(hidden, eps)
        drafted = config.draft_vocab_size
        self.lm_head = nn.Linear(hidden, drafted, bias=False) if "lm_head.weight" in has else None
        self.d2t: Tensor
        self.t2d: Tensor
        self.register_buffer("d2t", torch.zeros(drafted, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @property
    def draft_ids(self) -> Tensor:
        """Target ids of the draft vocabulary, ``[draft_vocab]``."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @classmethod
    def from_target(
        cls,
        target: Transformer,
        weights: dict[str, Tensor],
        draft_ids: Tensor,
        variant: Variant = PLAIN,
        layers: int = 1,
    ) -> EagleHead:
        """Return a head for ``target`` that starts as the target's own last layers; its output rows are not trained.

        Args:
            target: the model for which the head drafts.
            weights: the target's state dict, whose feed-forward parts may be narrower than the target's.
            draft_ids: ascending target ids of the draft vocabulary.
            variant: a parallel head has a ``mask_token``, best one that the target never writes.
            layers: of the head.
        """
        source, depth = target.config, target.config.num_hidden_layers
        origins = [f"model.layers.{i}." for i in range(depth - layers, depth)]
        config = LlamaConfig(
            architectures=[ARCHITECTURE],
            hidden_size=source.hidden_size,
            intermediate_size=len(weights[f"{origins[0]}mlp.gate_proj.weight"]),
            num_hidden_layers=layers,
            num_attention_heads=source.num_attention_heads,
            num_key_value_heads=source.num_attention_heads,  # the next token enters through the values only
            head_dim=target.shape.head_dim,
            rms_norm_eps=source.rms_norm_eps,
            max_position_embeddings=source.max_position_embeddings,
            rope_parameters=source.rope_parameters,
            vocab_size=source.vocab_size,
            tie_word_embeddings=False,
            bos_token_id=source.bos_token_id,
            eos_token_id=source.eos_token_id,
        )
        config.draft_vocab_size = len(draft_ids)
        head = cls(config, variant)
        hidden, state = config.hidden_size, head.state_dict()
        for i, origin in enumerate(origins):
            place = f"layers.{i}." if i else "midlayer."
            for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
                state[f"{place}{name}.weight"] = weights[f"{origin}{name}.weight"]
            for name in ("q_proj", "k_proj", "v_proj"):  # the hidden state enters as it does in the target's layer
                projection = state[f"{place}self_attn.{name}.weight"].zero_()
                weight = weights[f"{origin}self_attn.{name}.weight"]
                heads = weight.reshape(-1, target.shape.head_dim, *weight.shape[1:])
                heads = heads.repeat_interleave(config.num_attention_heads // len(heads), 0)
                projection[:, -hidden:] = heads.flatten(0, 1)
            entry = "input_layernorm" if i else "hidden_norm"
            for name, norm in ((entry, "input_layernorm"), ("post_attention_layernorm",) * 2):
                state[f"{place}{name}.weight"] = weights[f"{origin}{norm}.weight"]
        state["fc.weight"].zero_()[:, -hidden:] = torch.eye(hidden)  # the highest of the layers
        state["norm.weight"] = weights["model.norm.weight"]
        head.load_state_dict(state)
        head.draft_from(draft_ids, target)
        return head

    def draft_from(self, draft_ids: Tensor, target: Transformer) -> None:
        """Draft these ascending target ids from now on, with the target's output rows, which are not trained."""
        size = self.config.draft_vocab_size = len(draft_ids)
        self.lm_head = nn.Linear(self.config.hidden_size, size, bias=False).requires_grad_(False)
        self.lm_head.weight.copy_(target.output_rows(draft_ids.to(target.device)))
        self.d2t = draft_ids - torch.arange(size)
        self.t2d = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        self.t2d[draft_ids] = True

    @classmethod
    def load(cls, name: str) -> EagleHead:
        """Read a head by its short name, folder or hub id.

        Raises:
            ValueError: files are missing or damaged, or are not those of an EAGLE-3 head.
        """
        folder = drafter_folder(name)
        config, variant = read_config(folder)
        if (folder / "adapter_config.json").exists():
            raise ValueError(f"the head in {folder} belongs to a target with the adapter beside it, which is not read")
        weights = load_weights(folder)
        refuse_foreign_tensors(weights, folder)
        try:
            return cls.of(config, variant, renamed(weights))
        except ValueError as error:
            raise ValueError(f"cannot use the EAGLE-3 head in {folder}: {error}") from None

    @classmethod
    def of(cls, config: PretrainedConfig, variant: Variant, weights: dict[str, Tensor]) -> EagleHead:
        """Return a head of these tensors, in float32.

        Raises:
            ValueError: tensors are missing, unknown, or do not fit.
        """
        draft_vocabulary(weights, config.draft_vocab_size, config.vocab_size)
        config.draft_vocab_size = len(weights["d2t"])
        with torch.device("meta"):  # sizes that a file claims are compared before anything is allocated
            head = cls(config, variant, optional(weights, variant))
        refuse_others(weights, head)
        floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        head.load_state_dict(floats, assign=True)
        return head

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write config.json and model.safetensors: a parallel head in speculators' layout, which vLLM serves, any other
        in the layout of the first published heads.

        Raises:
            ValueError: this layout cannot describe the head.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parallel, norms = self.variant.mask_token is not None, any("q_norm" in name for name in self.state_dict())
        config = written_config(self.config, self.variant, dtype, norms)
        state = {
            name.replace("midlayer.", "layers.0.") if parallel else name: (
                tensor.to(dtype) if tensor.is_floating_point() else tensor
            ).contiguous()
            for name, tensor in self.state_dict().items()
        }
        write_bytes(folder / "model.safetensors", save(state))
        write_json(folder / "config.json", config)


def below(names: Collection[str], prefix: str) -> frozenset[str]:
    """Return the names that begin with ``prefix``, without it."""
    return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
