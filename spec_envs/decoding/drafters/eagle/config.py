"""The config.json of an EAGLE-3 head, in every published layout.

A head reads the hidden states at some boundaries of the target's layers: boundary i is the input of layer i, which is
the output of layer i - 1, and boundary n is the output of the last of n layers, before the final norm. Tools count
differently:

- SafeAILab/EAGLE (modeling_llama_kv.py), and sglang and vLLM for a head that names no layers: boundaries 2, n/2, n - 3.
- vLLM reads ``eagle_aux_hidden_state_layer_ids`` as boundaries, 0 being the embedding and n allowed
  (``EagleModelMixin._maybe_add_hidden_state``, pull request 36063). So does speculators, whose heads vLLM serves
  (speculators/models/utils.py, ``resolve_target_layer_ids``: distinct, from 0 to n).
- SpecForge and ModelOpt collect the outputs of the named layers, by default 1, n/2 - 1, n - 4, and write these ids
  under ``eagle_config`` (modelopt/torch/speculative/plugins: ``_set_default_aux_hidden_state_layers``). These are again
  the boundaries 2, n/2, n - 3.
- sglang distinguishes the two by the first id: if it is 1, the ids are outputs, otherwise boundaries (pull request
  25454, "drop +1 offset on aux layer ids when first id != 1"). The same is done here with ids under ``eagle_config``.
- AngelSlim writes no ids (angelslim/compressor/speculative/train/configs); its heads are served with the default ones.

EAGLE-3.1 and its relatives add norms: ``fc_norm`` (formerly ``use_aux_norm``) of each hidden state before ``fc``,
``norm_before_fc`` of all of them side by side, and ``norm_output``, with which a step passes its normed output to the
next step (vLLM pull request 42764, sglang's llama_eagle3.py, speculators/models/eagle3/core.py). NVIDIA's heads have
these keys under ``eagle_config`` (vLLM pull request 42143). With ``norm_before_residual`` the residual of the first
layer is the normed state (vLLM's llama_eagle3.py).

A parallel head (P-EAGLE, arXiv 2602.01469) predicts a block of tokens in one forward. Its unknown positions read one
token, ``mask_token_id``, and one learned vector in place of the target's states, the tensor ``mask_hidden``. In
speculators' layout the block has ``speculative_tokens`` positions; the others name no size.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from spec_envs.decoding.drafters.eagle.config_keys import (
    EAGLE,
    FLAGS,
    FLAT,
    IDS,
    MASK_TOKENS,
    SPECULATORS,
    opened,
    refuse_unknown,
    sentence,
    short,
)
from spec_envs.decoding.drafters.formats import read_json, refuse_foreign_config

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
Size = Annotated[int, Meta(ge=1, le=1 << 24)]
Vocabulary = Annotated[int, Meta(ge=1, le=1 << 20)]  # tables of that many ids are made before the target is known
Positive = Annotated[float, Meta(gt=0, lt=1e12)]


class Numbers(msgspec.Struct):
    """The numbers and switches of a head's layers, with their allowed ranges."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Meta(ge=1, le=64)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    vocab_size: Vocabulary
    max_position_embeddings: Size
    rms_norm_eps: Positive
    hidden_act: Literal["silu", "swish"]  # two names of one activation
    attention_bias: bool
    tie_word_embeddings: bool
    mlp_bias: bool = False


class RopeNumbers(msgspec.Struct, forbid_unknown_fields=True):
    """The parameters of the supported rotary positions (see ``rope.py``)."""

    rope_theta: Positive
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    type: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: Positive | None = None
    original_max_position_embeddings: Size | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    attention_factor: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool | None = None
    partial_rotary_factor: Annotated[float, Meta(ge=1, le=1)] | None = None


class Extras(msgspec.Struct):
    """The keys that only heads have."""

    draft_vocab_size: Vocabulary | None = None
    target_vocab_size: Size | None = None
    target_hidden_size: Size | None = None
    num_aux_hidden_states: Annotated[int, Meta(ge=1, le=64)] | None = None
    sliding_window: Size | None = None
    use_sliding_window: bool | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    bias: bool | None = None
    qkv_bias: bool | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool | None = None
    fc_norm: bool | None = None
    norm_output: bool | None = None
    mask_token_id: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None
    parallel_drafting: bool | None = None


@dataclass(frozen=True)
class Variant:
    """The differences of a head from the first published ones.

    Attributes:
        boundaries: of the target's layers whose hidden states it reads, ascending; None means 2, n/2, n - 3.
        target_hidden: width of these hidden states; None means the head's own.
        norm_before_residual, norm_before_fc, fc_norm, norm_output: see above.
        biased: names of the parts that have a bias according to the config.
        head_norms: True if queries and keys are normed according to the config, as in Qwen3.
        window: of sliding attention, in tokens.
        verifier: name of the target for which it was trained, if the config has one.
        mask_token: what the unknown positions of a parallel head read; None for a head that drafts a token at a time.
        block: how many positions a parallel head was trained to predict in one forward; None means any number.
    """

    boundaries: tuple[int, ...] | None = None
    target_hidden: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    biased: tuple[str, ...] = ()
    head_norms: bool = False
    window: int | None = None
    verifier: str | None = None
    mask_token: int | None = None
    block: int | None = None

    @property
    def states(self) -> int:
        """Number of hidden states that it reads."""
        return 3 if self.boundaries is None else len(self.boundaries)


def read_config(folder: Path) -> tuple[PretrainedConfig, Variant]:
    """Read a head's config.json.

    Returns:
        The config of its layers, with ``draft_vocab_size`` (None if the file has none), and its variant.

    Raises:
        ValueError: the file cannot be read, has another format, or has an unknown key that may change the computation;
            the sentence names the folder and the key.
    """
    raw = read_json(folder / "config.json")
    refuse_foreign_config(raw, folder)
    try:
        config, variant = of_speculators(raw) if "speculators_model_type" in raw else of_others(raw)
        if variant.mask_token is not None and variant.mask_token >= config.vocab_size:
            raise ValueError(f"mask_token_id is {variant.mask_token}, expected a token below {config.vocab_size}")
        return config, variant
    except ValueError as error:  # msgspec's are among them
        raise ValueError(f"cannot use the EAGLE-3 head in {folder}: config.json: {sentence(error)}") from None


def of_others(raw: dict[str, Any]) -> tuple[PretrainedConfig, Variant]:
    """Read the layout of SafeAILab, SpecForge and ModelOpt; see ``read_config``."""
    nested = raw.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"eagle_config is {nested!r}, expected an object")
    refuse_unknown(raw, FLAT, "")
    refuse_unknown(nested, EAGLE, "eagle_config: ")
    if raw.get("model_type", "llama") not in MODEL_TYPES:
        raise ValueError(f"model_type is {raw['model_type']!r}, expected one of {', '.join(MODEL_TYPES)}")
    if lacking := {"hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"} - raw.keys():
        raise ValueError(f"it has no {', '.join(sorted(lacking))}")
    return config_of(raw, LlamaConfig), variant_of(joined(raw, nested), boundaries_of(raw, nested), False)


def of_speculators(raw: dict[str, Any]) -> tuple[PretrainedConfig, Variant]:
    """Read the layout of vllm-project/speculators; see ``read_config``."""
    found, block = opened(raw, SPECULATORS), None
    if raw["speculators_model_type"] == "peagle":
        if raw.get("mask_token_id") is None:
            raise ValueError("it has no mask_token_id, which a parallel head needs")
        block = block_of(found.about)
    if raw.get("norm_before_residual") is None:  # vLLM takes this for true, the library for false
        raise ValueError("norm_before_residual is missing, and tools disagree on its default; write true or false")
    config = config_of(found.layers | {"draft_vocab_size": raw.get("draft_vocab_size")}, found.kind)
    ids, norms = boundaries_of(raw, {}, boundaries_at_top=True), found.kind is Qwen3Config
    return config, variant_of(found.layers | raw, ids, norms, found.verifier, block)


def block_of(about: Mapping[str, Any]) -> int:
    """Return how many positions a parallel head predicts in one forward, from its ``speculators_config``."""
    methods = about.get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else None
    block = first.get("speculative_tokens") if isinstance(first, dict) else None
    if not isinstance(block, int) or isinstance(block, bool) or not 1 <= block <= 64:
        raise ValueError(f"speculative_tokens is {block!r}, expected the size of a block from 1 to 64")
    return block


def config_of(raw: Mapping[str, Any], kind: type[PretrainedConfig]) -> PretrainedConfig:
    """Return the checked transformers config of a head's layers, of class ``kind``."""
    refuse_quantised(raw)
    refuse_two_ropes(raw)
    for part in msgspec.structs.fields(Numbers):  # before transformers allocates lists of any claimed size
        if raw.get(part.name) is not None:
            try:
                msgspec.convert(raw[part.name], part.type)
            except msgspec.ValidationError as error:
                raise ValueError(f"{part.name} is {short(raw[part.name])}: {error}") from None
    kept = [*Numbers.__struct_fields__, "rope_theta", "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id"]
    kept += [] if raw.get("rope_parameters") else ["rope_scaling"]
    try:
        config = kind(**{key: raw[key] for key in kept if raw.get(key) is not None})
    except Exception as error:  # values of a wrong type make transformers raise any exception
        raise ValueError(f"{type(error).__name__}: {error}") from None
    found = {name: getattr(config, name) for name in Numbers.__struct_fields__ if hasattr(config, name)}
    numbers = msgspec.convert(found, Numbers)
    msgspec.convert(dict(config.rope_parameters), RopeNumbers)
    if numbers.num_attention_heads % numbers.num_key_value_heads or numbers.head_dim % 2:
        raise ValueError(
            f"{numbers.num_attention_heads} heads of width {numbers.head_dim} cannot share "
            f"{numbers.num_key_value_heads} keys and values; expected a divisor and an even width"
        )
    config.draft_vocab_size = extras_of(raw).draft_vocab_size
    return config


def extras_of(raw: Mapping[str, Any]) -> Extras:
    """Return the checked keys that only heads have."""
    return msgspec.convert({key: raw[key] for key in Extras.__struct_fields__ if key in raw}, Extras)


def variant_of(
    raw: Mapping[str, Any],
    boundaries: tuple[int, ...] | None,
    head_norms: bool,
    verifier: str | None = None,
    block: int | None = None,
) -> Variant:
    """Return the variant of a head.

    Args:
        raw: all keys of its config.json on one level.
        boundaries, head_norms, verifier, block: see ``Variant``.
    """
    extras = extras_of(raw)
    if extras.parallel_drafting and extras.mask_token_id is None:
        raise ValueError(f"parallel_drafting is true, but none of {', '.join(MASK_TOKENS)} names the token it reads")
    if extras.target_vocab_size not in (None, raw.get("vocab_size")):
        raise ValueError(f"target_vocab_size is {extras.target_vocab_size} and vocab_size {raw.get('vocab_size')}")
    if extras.norm_before_fc and extras.fc_norm:
        raise ValueError("norm_before_fc and fc_norm are both true; expected one of them")
    named = 3 if boundaries is None else len(boundaries)
    if extras.num_aux_hidden_states not in (None, named):
        raise ValueError(f"num_aux_hidden_states is {extras.num_aux_hidden_states}, but {named} layers are read")
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    parts = [*attention] if raw.get("attention_bias") or extras.qkv_bias else []
    parts += [*mlp] if raw.get("mlp_bias") else []
    slides = extras.use_sliding_window is not False and "sliding_attention" in (
        extras.layer_types or ["sliding_attention"]
    )
    return Variant(
        boundaries=boundaries,
        target_hidden=extras.target_hidden_size,
        **{name: bool(getattr(extras, name)) for name in FLAGS},
        biased=(*parts, *(["fc"] if extras.bias else [])),
        head_norms=head_norms,
        window=extras.sliding_window if slides else None,
        verifier=verifier,
        mask_token=extras.mask_token_id,
        block=block,
    )


def joined(raw: Mapping[str, Any], nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config.json and its ``eagle_config`` on one level, without those that are None.

    Raises:
        ValueError: they contradict each other.
    """
    together = {key: value for key, value in raw.items() if value is not None}
    for key, value in nested.items():
        if value is not None and together.setdefault(key, value) != value:
            raise ValueError(f"{key} is {together[key]!r}, but {value!r} in eagle_config")
    for newer, older in (("fc_norm", "use_aux_norm"), *((MASK_TOKENS[0], name) for name in MASK_TOKENS[1:])):
        value = together.get(older)
        if value is not None and together.setdefault(newer, value) != value:
            raise ValueError(f"{newer} is {together[newer]!r} and {older} {value!r}")
    return together


def boundaries_of(
    raw: Mapping[str, Any], nested: Mapping[str, Any], boundaries_at_top: bool = False
) -> tuple[int, ...] | None:
    """Return the boundaries that a head reads, or None if it names no layers.

    Args:
        raw, nested: the config.json and its ``eagle_config``.
        boundaries_at_top: True if ids in ``raw`` are boundaries, as in speculators' layout.
    """
    top, inner = raw.get(IDS), nested.get(IDS)
    ids = top if inner is None else inner
    if ids is None or ids == []:
        return None
    ids = msgspec.convert(ids, Annotated[list[Annotated[int, Meta(ge=0, le=1 << 16)]], Meta(max_length=64)])
    if any(a >= b for a, b in itertools.pairwise(ids)):
        raise ValueError(f"{IDS} is {ids}, expected ascending numbers")
    if top is not None and inner is not None and top != inner:
        raise ValueError(f"{IDS} is {top}, but {inner} in eagle_config")
    if boundaries_at_top or ids[0] != 1:
        return tuple(ids)
    if inner is None:
        raise ValueError(
            f"{IDS} is {ids}, which vLLM takes for inputs and the tools that train for outputs; write "
            f"{[i + 1 for i in ids]} for the outputs of these layers, or move the key below eagle_config"
        )
    return tuple(i + 1 for i in ids)


def refuse_two_ropes(raw: Mapping[str, Any]) -> None:
    """Refuse rotary positions for which transformers' older keys contradict its newer one.

    Raises:
        ValueError: they do.
    """
    parameters = raw.get("rope_parameters")
    if not isinstance(parameters, dict) or not parameters:
        return
    older = dict(raw["rope_scaling"]) if isinstance(raw.get("rope_scaling"), dict) else {}
    older |= {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") is not None else {}
    if differing := [key for key, value in older.items() if parameters.get(key, value) != value]:
        raise ValueError(
            f"{differing[0]} is {older[differing[0]]!r}, but {parameters[differing[0]]!r} in rope_parameters"
        )


def refuse_quantised(raw: Mapping[str, Any]) -> None:
    """Refuse a quantised head.

    Raises:
        ValueError: it is one.
    """
    quantised = raw.get("quantization_config")
    if quantised:
        method = (
            quantised.get("quant_method") or quantised.get("quant_algo") if isinstance(quantised, dict) else quantised
        )
        raise ValueError(f"it is quantised ({method or 'quantization_config'}); expected one in floating point")
