"""Weights of an EAGLE-3 head (arXiv 2503.01840): the published checkpoint layout, read, written and initialised.

The module exists for its parameter names, which are those of published checkpoints, and for training.
``drafters/eagle.py`` turns it into the inference form.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig

from spec_envs.decoding.checkpoints import load_weights, model_folder, registry
from spec_envs.decoding.transformer import Transformer
from spec_envs.files import whole, write_bytes

DATA = Path(__file__).resolve().parents[2] / "data"


def drafter_folder(name: str) -> Path:
    """The folder of a drafter: one shipped with the package, or any model that has a name here.

    Raises:
        ValueError: the name leads nowhere.
    """
    shipped = registry()["drafters"].get(name, {})
    return DATA / shipped["path"] if "path" in shipped else model_folder(name)


def is_head(folder: Path) -> bool:
    """Whether a folder says of itself that it holds an EAGLE head, not a language model."""
    config = read_json(folder / "config.json")
    return "draft_vocab_size" in config or any("eagle" in name.lower() for name in config.get("architectures") or ())


def read_json(path: Path) -> dict[str, Any]:
    """A drafter's config.json.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path} of the drafter ({error}); fetch or train it again") from None


class EagleAttention(nn.Module):
    """Projections of the layer's attention; queries, keys and values read twice the hidden size."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        width, head_dim = 2 * config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, config.hidden_size, bias=False)


class EagleMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class EagleLayer(nn.Module):
    """The one decoder layer."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.self_attn = EagleAttention(config)
        self.mlp = EagleMLP(config)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class EagleHead(nn.Module):
    """An EAGLE-3 head.

    Attributes:
        config: a Llama config with ``draft_vocab_size``.
        d2t: ``[draft_vocab]`` offsets, target id = i + d2t[i].
        t2d: ``[vocab]`` mask of the target ids that can be drafted.
    """

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = EagleLayer(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.d2t: Tensor
        self.t2d: Tensor
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))

    @property
    def draft_ids(self) -> Tensor:
        """Target ids of the draft vocabulary, ``[draft_vocab]``."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @property
    def captured_layers(self) -> tuple[int, ...] | None:
        """Layers of the target whose inputs the head reads, where its config names them."""
        nested = getattr(self.config, "eagle_config", None) or {}
        name = "eagle_aux_hidden_state_layer_ids"
        named = getattr(self.config, name, None) or nested.get(name)
        return tuple(named) if named else None

    @classmethod
    def from_target(cls, target: Transformer, weights: dict[str, Tensor], draft_ids: Tensor) -> EagleHead:
        """A head for ``target`` that starts as the target's own last layer; its output rows stay the target's.

        Args:
            weights: the target's state dict.
            draft_ids: ascending target ids of the draft vocabulary.
        """
        source = target.config
        config = LlamaConfig(
            architectures=["LlamaForCausalLMEagle3"],
            hidden_size=source.hidden_size,
            intermediate_size=source.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=source.num_attention_heads,
            num_key_value_heads=source.num_attention_heads,  # the next token is read through the values only
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
        head = cls(config)
        hidden, last = config.hidden_size, f"model.layers.{source.num_hidden_layers - 1}."
        state = head.state_dict()
        for name in ("o_proj", "gate_proj", "up_proj", "down_proj"):
            block = "self_attn" if name == "o_proj" else "mlp"
            state[f"midlayer.{block}.{name}.weight"] = weights[f"{last}{block}.{name}.weight"]
        for name in ("q_proj", "k_proj", "v_proj"):  # reads the hidden state as the target's layer does
            projection = state[f"midlayer.self_attn.{name}.weight"].zero_()
            heads = weights[f"{last}self_attn.{name}.weight"].unflatten(0, (-1, target.shape.head_dim))
            heads = heads.repeat_interleave(config.num_attention_heads // len(heads), 0)
            projection[:, hidden:] = heads.flatten(0, 1)
        for name, origin in (("hidden_norm", "input_layernorm"), ("post_attention_layernorm",) * 2):
            state[f"midlayer.{name}.weight"] = weights[f"{last}{origin}.weight"]
        state["fc.weight"].zero_()[:, 2 * hidden :] = torch.eye(hidden)  # the highest of the three layers
        state["norm.weight"] = weights["model.norm.weight"]
        state["lm_head.weight"] = target.output_weight()[draft_ids.to(target.device)]
        state["d2t"] = draft_ids - torch.arange(len(draft_ids))
        state["t2d"][draft_ids] = True
        head.load_state_dict(state)
        head.lm_head.requires_grad_(False)
        return head

    @classmethod
    def load(cls, name: str) -> EagleHead:
        """Read a head by its short name, folder or hub id.

        Raises:
            ValueError: missing or corrupt files, or tensors that are not an EAGLE-3 head's.
        """
        folder = drafter_folder(name)
        raw = read_json(folder / "config.json")
        config = LlamaConfig(**{k: v for k, v in raw.items() if k != "model_type"})
        weights = load_weights(folder)
        if missing := {"fc.weight", "midlayer.self_attn.q_proj.weight", "lm_head.weight"} - weights.keys():
            raise ValueError(f"{folder} is not an EAGLE-3 head: it lacks {', '.join(sorted(missing))}")
        rows = weights["lm_head.weight"].shape[0]
        config.draft_vocab_size = rows
        if "d2t" not in weights:  # a head over the whole vocabulary
            weights["d2t"] = torch.zeros(rows, dtype=torch.long)
            weights["t2d"] = torch.ones(config.vocab_size, dtype=torch.bool)
        head = cls(config)
        weights = {key: weights[key] for key in head.state_dict() if key in weights}
        try:
            head.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"the weights of {folder} do not fit its config.json: {reason}") from None
        return head

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write config.json and model.safetensors in the published layout."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
            for name, tensor in self.state_dict().items()
        }
        write_bytes(folder / "model.safetensors", save(state))
        self.config.dtype = dtype
        with whole(folder / "config.json") as path:
            self.config.to_json_file(path, use_diff=False)
