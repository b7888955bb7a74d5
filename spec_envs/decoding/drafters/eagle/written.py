"""The config.json that a head is saved with."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import PretrainedConfig

from spec_envs.decoding.drafters.eagle.config import Variant
from spec_envs.decoding.drafters.eagle.config_keys import FLAGS, IDS

ARCHITECTURE = "LlamaForCausalLMEagle3"
PARALLEL = "PEagleDraftModel"


def written_config(config: PretrainedConfig, variant: Variant, dtype: torch.dtype, head_norms: bool) -> dict[str, Any]:
    """Return the contents of config.json: for a parallel head in speculators' layout, else as the first published heads
    had it.

    Rotary positions and dtype are also under their older names, the only ones that vLLM, sglang and speculators'
    converter read.

    Args:
        config: of the layers.
        variant: of the head.
        dtype: of the saved tensors.
        head_norms: True if queries and keys are normed, as in Qwen3.

    Raises:
        ValueError: the layout cannot describe the head.
    """
    config.dtype = dtype
    content: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    rope = content["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaled = None if scaling.get("rope_type", "default") == "default" else scaling
    content |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaled, "torch_dtype": content["dtype"]}
    if variant.mask_token is None:
        return dict(sorted((content | {"architectures": [ARCHITECTURE], **first_keys(variant)}).items()))
    inner = content | {"model_type": "qwen3" if head_norms else "llama", "sliding_window": variant.window}
    beside = {key: inner.pop(key) for key in ("draft_vocab_size", "dtype", "torch_dtype")}
    inner.pop("architectures")
    written = {"transformer_layer_config": dict(sorted(inner.items())), **beside, **parallel_keys(variant)}
    return dict(sorted(written.items()))


def first_keys(variant: Variant) -> dict[str, Any]:
    """Return the keys that describe a variant beside those of its layers, as the first published heads have them.

    Raises:
        ValueError: tools would read the boundaries as outputs.
    """
    written: dict[str, Any] = {name: True for name in FLAGS if getattr(variant, name)}
    if variant.boundaries and variant.boundaries[0] == 1:
        raise ValueError(
            f"boundaries {list(variant.boundaries)} would be read as outputs of layers; keep the head as it is"
        )
    if variant.boundaries:
        written["eagle_config"] = {IDS: list(variant.boundaries), "use_aux_hidden_state": True}
    optional = {"target_hidden_size": variant.target_hidden, "sliding_window": variant.window}
    return written | {key: value for key, value in optional.items() if value is not None}


def parallel_keys(variant: Variant) -> dict[str, Any]:
    """Return the keys that describe a parallel head beside those of its layers, in speculators' layout.

    Raises:
        ValueError: the variant names no size of a block.
    """
    if variant.block is None:
        raise ValueError("the parallel head names no size of a block; keep it as it is")
    return {
        "architectures": [PARALLEL],
        "speculators_model_type": "peagle",
        "speculators_config": {
            "algorithm": "peagle",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": variant.block}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": variant.verifier, "architectures": []},
        },
        "mask_token_id": variant.mask_token,
        "target_hidden_size": variant.target_hidden,
        "tie_word_embeddings": False,
        IDS: None if variant.boundaries is None else list(variant.boundaries),
        **{name: getattr(variant, name) for name in FLAGS},
    }
