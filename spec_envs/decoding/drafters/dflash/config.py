"""The config.json of a DFlash drafter (arXiv 2602.06036), in both published layouts.

It reads the target's hidden states at some boundaries of its layers, counted as in ``eagle/config.py``:

- z-lab/dflash names outputs of layers, ``target_layer_ids`` below ``dflash_config`` (dflash.py,
  ``extract_context_feature`` adds 1); without it they are spread over the layers 1 to n - 3 of a target of
  ``num_target_layers`` (``build_target_layer_ids``). sglang, vLLM and SpecForge read these.
- speculators names boundaries, ``aux_hidden_state_layer_ids`` (vLLM's ``update_dflash`` subtracts 1 for the former).

A block has ``block_size`` rows, the text's last token and mask tokens. A mask row predicts the token at its own place;
with ``sample_from_anchor`` each row predicts the token after it, and the first one is used, too. All rows of a block see
each other, except in layers of sliding attention, where a row sees those before it unless ``sliding_window_non_causal``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from transformers import PretrainedConfig, Qwen3Config

from spec_envs.decoding.drafters.eagle.config import config_of
from spec_envs.decoding.drafters.eagle.config_keys import MODEL, opened, refuse_unknown, sentence, short, words
from spec_envs.decoding.drafters.formats import read_json, refuse_foreign_config

SPECULATORS = words("""
    speculators_model_type speculators_config transformer_layer_config draft_vocab_size target_hidden_size block_size
    aux_hidden_state_layer_ids mask_token_id sliding_window_non_causal sample_from_anchor tie_word_embeddings
""")
FLAT = MODEL | words("block_size dflash_config num_target_layers draft_vocab_size")
NESTED = words("mask_token_id target_layer_ids")
Layers = Annotated[list[Annotated[int, Meta(ge=0, le=1 << 16)]], Meta(min_length=1, max_length=64)]


class Keys(msgspec.Struct):
    """The keys that only DFlash drafters have, with their allowed values."""

    block_size: Annotated[int, Meta(ge=2, le=64)]
    mask_token_id: Annotated[int, Meta(ge=0, le=1 << 24)]
    layers: Layers
    sample_from_anchor: bool = False
    sliding_window_non_causal: bool = False
    target_hidden_size: int | None = None


@dataclass(frozen=True)
class Block:
    """What a drafter reads, and how its blocks are made.

    Attributes:
        boundaries: of the target's layers whose hidden states it reads, in the order in which it reads them.
        size: rows of a block, the last token of the text included.
        mask_token: what the other rows read.
        from_anchor: True if each row predicts the token after it; False if it predicts the one at its place, so that
            the first row predicts nothing.
        causal: for each layer whether a row of a block sees no later ones.
        window: of sliding attention, in tokens.
        verifier: name of the target for which it was trained, if the config has one.
    """

    boundaries: tuple[int, ...]
    size: int
    mask_token: int
    from_anchor: bool
    causal: tuple[bool, ...]
    window: int | None = None
    verifier: str | None = None

    @property
    def predicted(self) -> int:
        """Number of tokens that a block predicts."""
        return self.size if self.from_anchor else self.size - 1


def read_config(folder: Path) -> tuple[PretrainedConfig, Block]:
    """Read a drafter's config.json.

    Returns:
        The config of its layers, with ``draft_vocab_size`` (None if the file has none), and its block.

    Raises:
        ValueError: the file cannot be read, has another format, or has an unknown key that may change the computation;
            the sentence names the folder and the key.
    """
    raw = read_json(folder / "config.json")
    refuse_foreign_config(raw, folder)
    try:
        config, block = of_speculators(raw) if "speculators_model_type" in raw else of_others(raw)
        if block.mask_token >= config.vocab_size:
            raise ValueError(f"mask_token_id is {block.mask_token}, expected a token below {config.vocab_size}")
        if len(set(block.boundaries)) < len(block.boundaries):
            raise ValueError(f"the boundaries {list(block.boundaries)} of the target's layers are not different")
        return config, block
    except ValueError as error:  # msgspec's are among them
        raise ValueError(f"cannot use the DFlash drafter in {folder}: config.json: {sentence(error)}") from None


def of_others(raw: dict[str, Any]) -> tuple[PretrainedConfig, Block]:
    """Read z-lab's layout; see ``read_config``."""
    nested = raw.get("dflash_config") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"dflash_config is {nested!r}, expected an object")
    refuse_unknown(raw, FLAT, "")
    refuse_unknown(nested, NESTED, "dflash_config: ")
    if raw.get("model_type", "qwen3") != "qwen3":
        raise ValueError(f"model_type is {raw['model_type']!r}, expected 'qwen3'")
    config = config_of(raw, Qwen3Config)
    ids = nested.get("target_layer_ids")
    if ids is None:
        ids = spread(raw.get("num_target_layers"), config.num_hidden_layers)
    keys = convert({"block_size": raw.get("block_size"), "layers": ids, "mask_token_id": nested.get("mask_token_id")})
    if any(sliding(raw, config.num_hidden_layers)):
        raise ValueError("layers of sliding attention are not computed in this layout; expected full_attention")
    return config, block_of(keys, [i + 1 for i in keys.layers], (False,) * config.num_hidden_layers)


def of_speculators(raw: dict[str, Any]) -> tuple[PretrainedConfig, Block]:
    """Read the layout of vllm-project/speculators; see ``read_config``."""
    found = opened(raw, SPECULATORS)
    config = config_of(found.layers | {"draft_vocab_size": raw.get("draft_vocab_size")}, found.kind)
    keys = convert(raw | {"layers": raw.get("aux_hidden_state_layer_ids")})
    if keys.target_hidden_size not in (None, config.hidden_size):
        raise ValueError(f"target_hidden_size is {keys.target_hidden_size}, expected {config.hidden_size}")
    slides = sliding(found.layers, config.num_hidden_layers)
    window = found.layers.get("sliding_window") if any(slides) else None
    causal = tuple(slide and not keys.sliding_window_non_causal for slide in slides)
    return config, block_of(keys, keys.layers, causal, window, found.verifier)


def convert(found: Mapping[str, Any]) -> Keys:
    """Return the checked keys, those that are None left out."""
    return msgspec.convert({k: found[k] for k in Keys.__struct_fields__ if found.get(k) is not None}, Keys)


def block_of(
    keys: Keys,
    boundaries: list[int],
    causal: tuple[bool, ...],
    window: int | None = None,
    verifier: str | None = None,
) -> Block:
    """Return the block that the keys describe; the other arguments are those of ``Block``."""
    return Block(
        tuple(boundaries), keys.block_size, keys.mask_token_id, keys.sample_from_anchor, causal, window, verifier
    )


def sliding(raw: Mapping[str, Any], layers: int) -> list[bool]:
    """Return for each layer whether its attention slides.

    Raises:
        ValueError: another number of layers is named, or there is no size of the window.
    """
    kinds, window = raw.get("layer_types") or ["full_attention"] * layers, raw.get("sliding_window")
    slides = [kind == "sliding_attention" for kind in kinds]
    if len(slides) != layers:
        raise ValueError(f"layer_types names {len(slides)} layers, expected {layers}")
    if any(slides) and window is None:
        raise ValueError("it has layers of sliding_attention, but no sliding_window")
    return slides


def spread(target_layers: Any, layers: int) -> list[int]:
    """Return the outputs of the target's layers that a drafter of so many layers reads if it names none.

    Raises:
        ValueError: the config does not say how many layers the target has.
    """
    if not isinstance(target_layers, int) or not 5 <= target_layers <= 1 << 16:
        raise ValueError(f"it has no target_layer_ids, and num_target_layers is {short(target_layers)}")
    if layers == 1:
        return [target_layers // 2]
    return [round(1 + i * (target_layers - 4) / (layers - 1)) for i in range(layers)]
