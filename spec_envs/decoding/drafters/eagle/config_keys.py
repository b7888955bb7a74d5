"""Keys of a head's config.json: those that are read, those that change nothing, and the check for all others; and the
parts of a file in the layout of speculators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
IDS = "eagle_aux_hidden_state_layer_ids"


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


MODEL = words("""
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    rms_norm_eps vocab_size max_position_embeddings rope_theta rope_scaling rope_parameters tie_word_embeddings
    attention_bias mlp_bias bias qkv_bias sliding_window use_sliding_window layer_types quantization_config
    target_vocab_size
""")  # keys of the layers
# The token that unknown positions of a parallel head read: speculators' name of the key, and two of vLLM's.
MASK_TOKENS = ("mask_token_id", "ptd_token_id", "pard_token")
BESIDE = frozenset({"draft_vocab_size", "target_hidden_size", IDS, "tie_word_embeddings", *FLAGS, *MASK_TOKENS})
FLAT = MODEL | BESIDE | {"eagle_config", "num_aux_hidden_states", "use_aux_norm", "parallel_drafting"}
SPECULATORS = BESIDE | {"speculators_model_type", "speculators_config", "transformer_layer_config"}
EAGLE = frozenset({IDS, "use_aux_norm", *FLAGS})
# Switches and factors, with the only value that is supported.
FIXED: Mapping[str, Any] = {
    "partial_rotary_factor": 1,
    "logit_scale": 1,
    "logits_scaling": 1,
    "residual_multiplier": 1,
    "embedding_multiplier": 1,
    "is_causal": True,
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "next_layer_regular": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
    "eagle_decoder_type": "llama",
    "has_lm_head": True,
}
# Keys that Hugging Face's tools write on training, generation and bookkeeping.
HARMLESS = words("""
    architectures model_type dtype torch_dtype transformers_version speculators_version auto_map
    attention_dropout hidden_dropout initializer_range pretraining_tp use_cache max_window_layers embed_requires_grad
    parallel_draft_heads_num_layers bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    unk_token_id chunk_size_feed_forward is_decoder id2label label2id problem_type finetuning_task
    task_specific_params tokenizer_class output_attentions output_hidden_states return_dict torchscript
    use_bfloat16 tf_legacy_loss prefix remove_invalid_values attn_implementation unsloth_fixed base_model_name_or_path
    top_k top_p temperature typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences num_beams num_beam_groups diversity_penalty
    do_sample early_stopping max_length min_length max_new_tokens forced_bos_token_id forced_eos_token_id
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens output_scores
    return_dict_in_generate
""")


def refuse_unknown(found: Mapping[str, Any], read: frozenset[str], where: str) -> None:
    """Refuse keys that nothing reads and that may change what a head computes.

    A key that is null, false or empty switches nothing on. All others must be among ``read``, in ``FIXED`` with that
    value, or in ``HARMLESS``.

    Args:
        found: keys and values of the config.json.
        read: keys that are read.
        where: prefix of the error's sentence.

    Raises:
        ValueError: there is such a key.
    """
    for key, value in found.items():
        if key in FIXED:
            if value is not None and value != FIXED[key]:
                raise ValueError(f"{where}{key} is {short(value)}, which is not computed; expected {FIXED[key]}")
        elif key in read or key in HARMLESS or key.startswith("_") or key.endswith("_version"):
            continue
        elif not (value is None or value is False or value == {} or value == []):
            raise ValueError(
                f"{where}{key} is {short(value)}, a key that is not known here and may change what the head computes; "
                "remove it if it does not"
            )


class Opened(NamedTuple):
    """The parts of a config.json in speculators' layout.

    Attributes:
        layers: the keys of the drafter's layers.
        kind: class of their config.
        about: ``speculators_config``.
        verifier: name of the target for which the drafter was trained, if the file has one.
    """

    layers: dict[str, Any]
    kind: type[PretrainedConfig]
    about: dict[str, Any]
    verifier: str | None


def opened(raw: Mapping[str, Any], read: frozenset[str]) -> Opened:
    """Return the parts of a config.json in the layout of vllm-project/speculators.

    Args:
        read: keys that are read.

    Raises:
        ValueError: a part is missing, has another type or has an unknown key.
    """
    layers, about = raw.get("transformer_layer_config"), raw.get("speculators_config") or {}
    if not isinstance(layers, dict) or not isinstance(about, dict):
        raise ValueError("transformer_layer_config and speculators_config should be objects")
    refuse_unknown(raw, read, "")
    refuse_unknown(layers, MODEL, "transformer_layer_config: ")
    expected = raw["speculators_model_type"]
    if about.get("algorithm", expected) != expected:
        raise ValueError(f"algorithm is {about['algorithm']!r}, expected {expected!r}")
    kinds: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen3": Qwen3Config}
    kind = layers.get("model_type", "qwen3")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"transformer_layer_config has model_type {kind!r}, expected one of {', '.join(kinds)}")
    verifier = about.get("verifier")
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return Opened(layers, kinds[kind], about, str(name) if name else None)


def short(value: Any) -> str:
    """Return a value as it is shown in a sentence, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sentence(error: Exception) -> str:
    """Return an error's text in one line, cut to 400 characters: it may quote a value of any length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:397]}..."
