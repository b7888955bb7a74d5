"""The language model in a GGUF file: its config, its tokenizer and the ids that end its texts.

Keys and tensors that change what is computed are read or refused by name; none is skipped silently.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from spec_envs.decoding.weights.blocks import dequantised
from spec_envs.decoding.weights.gguf_file import GGUF
from spec_envs.decoding.weights.gguf_weights import ROPE_FACTORS, weights_of

FAMILIES: dict[str, type[PretrainedConfig]] = {  # a Mistral's file is labelled llama, whose forward is the same
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # keys of an architecture, with the values at which they change nothing
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
DESCRIBING = ("rope.scaling.finetuned", "tensor_data_layout", "vocab_size")  # change nothing at any value
PRE_TOKENIZERS = {  # those for which transformers has an expression, and those for which GPT-2's is right
    *("default", "gpt-2", "smollm"),  # SmolLM splits digits, which its merges never join anyway
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe", "midm-2.0", "lfm2", "tekken"),
    *("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "gpt-4o", "llama4", "kanana2"),
}
CONTROL, USER_DEFINED = 3, 4  # kinds of tokens
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# llama.cpp also ends a text at these tokens, whatever the keys are.
END_TOKENS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("</s>", "<eos>"),
}


class Keys:
    """The keys of a file's architecture, each of which is read or refused.

    Raises:
        ValueError: the architecture is not supported.
    """

    def __init__(self, gguf: GGUF):
        self.architecture = str(gguf.metadata.get("general.architecture", "not named"))
        if self.architecture not in FAMILIES:
            raise ValueError(f"its architecture is {self.architecture[:60]}; expected one of {', '.join(FAMILIES)}")
        prefix = f"{self.architecture}."
        found = gguf.metadata.items()
        self.unread = {key.removeprefix(prefix): value for key, value in found if key.startswith(prefix)}

    def number(self, key: str, default: float | None = None, whole: bool = True) -> Any:
        """Return the positive number of a key, which counts as read.

        Args:
            key: without the architecture's prefix.
            default: used where the key is missing; None requires the key.
            whole: True if it must be an int.

        Raises:
            ValueError: the key is missing, or its value is no such number.
        """
        value = self.unread.pop(key, default)
        kinds = (int,) if whole else (int, float)
        if type(value) not in kinds or not 0 < value < float("inf"):
            reason = "is missing" if value is None else f"is {value!r}"
            raise ValueError(
                f"{self.architecture}.{key} {reason}; expected a positive {'whole ' if whole else ''}number"
            )
        return value

    def refuse_rest(self) -> None:
        """Raise ValueError for a key that changes the model and that has not been read."""
        for key, value in self.unread.items():
            if key not in DESCRIBING and value not in NEUTRAL.get(key, ()):
                shown = repr(value) if len(repr(value)) < 40 else f"{repr(value)[:40]}…"
                raise ValueError(f"{self.architecture}.{key} is {shown}, which is not supported here")


def config_of(gguf: GGUF) -> PretrainedConfig:
    """Return the transformers config of a file.

    Raises:
        ValueError: the architecture is not supported, or keys are missing, wrong or not supported.
    """
    kind = gguf.metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"it holds {kind!r}; expected a model")
    keys = Keys(gguf)
    hidden, heads = keys.number("embedding_length"), keys.number("attention.head_count")
    head_dim = keys.number("attention.key_length", max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (width := keys.number(key, head_dim)) != head_dim:
            raise ValueError(f"{keys.architecture}.{key} is {width}; expected the width of its heads, {head_dim}")
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": keys.number("feed_forward_length"),
        "num_hidden_layers": keys.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", whole=False),
        "max_position_embeddings": keys.number("context_length"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": rows(gguf, "token_embd.weight"),
        "dtype": "float32",
    }
    if settings["num_hidden_layers"] > len(gguf.tensors):
        raise ValueError(f"it holds {len(gguf.tensors)} tensors for {settings['num_hidden_layers']} layers")
    settings["rope_parameters"] = rope_of(gguf, keys, settings["max_position_embeddings"], head_dim)
    if keys.architecture != "qwen2":  # its queries, keys and values always have biases
        settings["attention_bias"] = has_bias(gguf, "attn_")
    if keys.architecture == "llama":
        settings["mlp_bias"] = has_bias(gguf, "ffn_")
    keys.refuse_rest()
    settings |= {"bos_token_id": token_id(gguf, "bos_token_id"), "pad_token_id": token_id(gguf, "padding_token_id")}
    return FAMILIES[keys.architecture](**settings | {"eos_token_id": end_ids(gguf) or None})


def rope_of(gguf: GGUF, keys: Keys, context: int, head_dim: int) -> dict[str, Any]:
    """Return the rope parameters as transformers names them."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10_000.0, whole=False)}
    kind = keys.unread.pop("rope.scaling.type", "linear")  # llama.cpp's default, which does nothing without a factor
    linear = keys.unread.pop("rope.scale_linear", 0)
    factor = keys.unread.pop("rope.scaling.factor", linear)
    original = keys.unread.pop("rope.scaling.original_context_length", context)
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{keys.architecture}.rope.scaling.type is {kind!r}; expected none, linear or yarn")
    if kind == "none" or factor in (0, 1):
        kind = "none"
    else:
        keys.unread["rope.scaling.factor"] = factor
        found |= {"rope_type": kind, "factor": keys.number("rope.scaling.factor", whole=False)}
    if kind == "yarn":
        keys.unread["rope.scaling.original_context_length"] = original
        found["original_max_position_embeddings"] = keys.number("rope.scaling.original_context_length")
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if f"rope.scaling.{key}" in keys.unread:
                found[name] = keys.number(f"rope.scaling.{key}", whole=False)
    if keys.architecture == "llama" and ROPE_FACTORS in gguf.tensors:
        stored = gguf.tensors[ROPE_FACTORS]
        factors = dequantised(stored.data, stored.kind).tolist()
        if len(factors) != head_dim // 2 or not all(0 < factor < float("inf") for factor in factors):
            raise ValueError(f"{ROPE_FACTORS} holds {len(factors)} numbers; expected {head_dim // 2} positive ones")
        if kind != "none":
            raise ValueError(f"it scales its positions twice, by {ROPE_FACTORS} and by rope.scaling.type {kind!r}")
        long = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0, "factor": 1.0}
        found |= {"rope_type": "longrope", "original_max_position_embeddings": context, **long}
    return found


def rows(gguf: GGUF, name: str) -> int:
    """Return the number of rows of a tensor; raise ValueError if it is missing."""
    if name not in gguf.tensors:
        raise ValueError(f"the tensor {name} is missing")
    return gguf.tensors[name].shape[0]


def has_bias(gguf: GGUF, part: str) -> bool:
    """Return whether the layers have biases in the modules whose names begin with ``part``."""
    return any(re.fullmatch(rf"blk\.\d+\.{part}\w+\.bias", name) for name in gguf.tensors)


def token_list(gguf: GGUF) -> list[str]:
    """Return the tokens of a file, in order of their ids; raise ValueError if it has none."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError("it has no tokenizer (tokenizer.ggml.tokens)")
    return tokens


def token_id(gguf: GGUF, name: str) -> int | None:
    """Return the id of a special token, or None if the file names none; raise ValueError for anything but an id."""
    found = gguf.metadata.get(f"tokenizer.ggml.{name}")
    if found is None:
        return None
    if type(found) is not int or not 0 <= found < len(token_list(gguf)):
        raise ValueError(f"tokenizer.ggml.{name} is {found!r}; expected an id of its {len(token_list(gguf))} tokens")
    return found


def end_ids(gguf: GGUF) -> list[int]:
    """Return all ids that end a text, ascending: those of the keys, and those of the tokens in ``END_TOKENS``."""
    named = {i for i in (token_id(gguf, key) for key in END_KEYS) if i is not None}
    return sorted(named | {i for i, token in enumerate(token_list(gguf)) if token in END_TOKENS})


def write_tokenizer(gguf: GGUF, folder: Path) -> None:
    """Write the tokenizer of a file to ``folder``, its tokens at the ids that they have in the file.

    Raises:
        ValueError: transformers cannot read the tokenizer.
    """
    tokens = token_list(gguf)
    refuse_tokenizer(gguf.metadata)
    with tempfile.TemporaryDirectory() as apart:  # transformers would read other files beside it as well
        Path(apart, gguf.path.name).symlink_to(gguf.path.resolve())
        source = AutoTokenizer.from_pretrained(apart, gguf_file=gguf.path.name, trust_remote_code=False)
    source.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    respell(content, tokens, gguf.metadata.get("tokenizer.ggml.token_type", []))
    path.write_text(json.dumps(content, ensure_ascii=False))
    written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if wrong := [i for i in written.get_vocab().values() if i >= len(tokens)]:
        raise ValueError(f"its tokenizer cannot be read: {written.convert_ids_to_tokens(wrong[0])!r} has no id in it")


def refuse_tokenizer(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if transformers would not treat text as the file's tokenizer does."""
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind == "gpt2" and cut not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {cut!r}, a way to cut text into words that transformers does not know")
    if kind == "llama" and not metadata.get("tokenizer.ggml.add_space_prefix", True):
        raise ValueError("tokenizer.ggml.add_space_prefix is false, which transformers does not read")


def respell(content: dict[str, Any], tokens: list[str], kinds: list[int]) -> None:
    """Give a tokenizer.json exactly the special tokens of the file.

    transformers adds default tokens of its own classes, and it spells those of a byte-level vocabulary in bytes, so
    that it takes tokens such as DeepSeek's for new ones.

    Args:
        content: the tokenizer.json, which is changed in place.
        tokens, kinds: tokens of the file and their kinds, by id.
    """
    vocab = content["model"]["vocab"]
    spelled = {i: token for token, i in vocab.items()}
    added = {entry["id"]: entry for entry in content["added_tokens"] if entry["id"] < len(tokens)}
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False)):
        if kind in (CONTROL, USER_DEFINED) and i in spelled and spelled[i] != token and token not in vocab:
            del vocab[spelled[i]]
            vocab[token] = i
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            added[i] = {"id": i, "content": token, **plain, "special": kind == CONTROL}
    content["added_tokens"] = [added[i] for i in sorted(added)]


def write_model(gguf: GGUF, folder: Path) -> None:
    """Write config, tokenizer and generation config to a folder in the Hugging Face layout; the weights are checked and
    stay in the file.

    Raises:
        ValueError: a part of the file that matters is not supported.
    """
    config = config_of(gguf)
    write_tokenizer(gguf, folder)
    config.architectures = [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.model_type] + "ForCausalLM"]
    config.save_pretrained(folder)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(folder)
    weights_of(gguf, config)
