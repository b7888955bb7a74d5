"""A model's config.json and generation_config.json, as any tool may have written them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from spec_envs.decoding.model.shape import ARCHITECTURES, Shape

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
# Prefix of the model_type of a draft model that is stored without its target's embedding. With it transformers refuses
# to load the model instead of drawing an embedding at random.
ON_TARGET = "spec-envs-draft-"
QUANTISED = ("quantization_config", "compression_config", "quantization")  # keys that describe quantised weights
# Keys with which other models of these shapes compute something else, and the values at which they change nothing.
# transformers ignores them in these architectures, and so would compute another model than the one that was trained.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attention_sink": (False,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_routed_experts": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "scale_emb": (1,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
}
# Keys of generation_config.json, or of an older config.json, with which transformers alters a greedy text, and the
# values at which they change nothing. None of them is applied here: texts are the model's own.
ALTERING: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "watermarking_config": (),
}
LARGEST = 1 << 24  # most bytes of a JSON file
LAYERS = 4096  # most layers: a config class makes lists of that length before the weights are read


def load_config(folder: Path) -> PretrainedConfig:
    """Return the transformers config of a folder.

    Raises:
        ValueError: it is missing or damaged, or the model is not supported.
    """
    path = folder / "config.json"
    raw = read_json(path)
    kind, layers = raw.get("model_type"), raw.get("num_hidden_layers", 1)
    if isinstance(kind, str):
        kind = kind.removeprefix(ON_TARGET)
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"cannot read {path} (model_type {kind!r:.60}); supported architectures: {', '.join(ARCHITECTURES)}"
        )
    if type(layers) is not int or not 0 < layers <= LAYERS:
        raise ValueError(f"cannot read {path} (num_hidden_layers {layers!r:.60}); expected up to {LAYERS} layers")
    refuse_others(path, raw)
    try:
        config = CONFIGS[kind].from_dict({k: v for k, v in raw.items() if k not in QUANTISED} | {"model_type": kind})
        Shape.from_config(config)
    except Exception as error:  # values of a wrong type make transformers raise any exception
        raise ValueError(f"cannot read {path} ({first_line(error)}); fetch it again, or take another model") from None
    return config


def refuse_others(path: Path, raw: dict[str, Any]) -> None:
    """Raise ValueError if the weights are quantised, or if a key changes what a model of this type computes."""
    for key in QUANTISED:
        if (found := raw.get(key)) and not in_fp8(raw):
            method = found.get("quant_method", found.get("format")) if isinstance(found, dict) else found
            raise ValueError(
                f"the model of {path} is quantised ({key}: {method!r:.60}), which is not read here; take its weights "
                "in bfloat16, float16, float32 or blockwise fp8, or a GGUF file"
            )
    for key, neutral in NEUTRAL.items():
        if (value := raw.get(key)) is not None and value not in neutral:
            raise ValueError(f"the model of {path} has {key} = {value!r:.60}, which is not supported")


def in_fp8(raw: dict[str, Any]) -> bool:
    """Return whether the weights are in FP8 with a scale per block, which transformers can dequantise on any device."""
    found = raw.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "fp8" and not raw.get("compression_config")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ValueError: the file is missing, damaged, larger or deeper nested than such files are, or holds a number that is
            not finite.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST >> 20} MB")
        found = json.loads(path.read_bytes(), parse_constant=finite, parse_float=finite)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} ({first_line(error)}); fetch it again, or take another model") from None
    return found


def finite(text: str) -> float:
    """Return a number of a JSON file; raise ValueError for NaN and infinity."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text}, expected finite numbers")
    return number


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the first two where the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def altering(folder: Path) -> list[str]:
    """Return the settings of a folder, as ``key = value``, with which transformers would alter the model's own text."""
    path = folder / "generation_config.json"
    found = read_json(path if path.is_file() else folder / "config.json")
    set_to = {key: found.get(key) for key, neutral in ALTERING.items() if found.get(key) not in (None, *neutral)}
    return [f"{key} = {value!r:.40}" for key, value in set_to.items()]


def configured_eos(folder: Path, config: PretrainedConfig) -> set[int]:
    """Return the ids that end a text according to config.json and generation_config.json.

    Raises:
        ValueError: ``eos_token_id`` is neither an id nor a list of ids.
    """
    path = folder / "generation_config.json"
    listed = read_json(path).get("eos_token_id") if path.is_file() else None
    ids: set[int] = set()
    for found in (config.eos_token_id, listed):
        for i in found if isinstance(found, list) else [found]:
            if i is not None and type(i) is not int:
                raise ValueError(f"eos_token_id is {found!r:.60} in {folder}; expected an id or a list of ids")
            if i is not None and 0 <= i < config.vocab_size:  # another id is never drawn
                ids.add(i)
    return ids
