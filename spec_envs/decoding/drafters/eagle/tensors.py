"""The tensors of an EAGLE-3 checkpoint under one set of names, each of them read or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from spec_envs.decoding.drafters.eagle.config import Variant

# Tensors left over from training (speculators' copy of the target's last norm and output rows), and tables that are
# computed here.
UNREAD = ("verifier_norm.weight", "verifier_lm_head.weight")
TABLES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
GROUPS = (  # biases and norms that a layer has together or not at all
    ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    ("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAY_BE = ("fc.bias", "embed_tokens.weight", "lm_head.weight")


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names of the first published heads: ``midlayer.`` for ``layers.0.``, no ``model.``
    prefix.

    Raises:
        ValueError: two tensors have one name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        own = name.removeprefix("model.")
        own = f"midlayer.{own.removeprefix('layers.0.')}" if own.startswith("layers.0.") else own
        if own in UNREAD or own.endswith(TABLES):
            continue
        if own in found:
            raise ValueError(f"two tensors are called {own}")
        found[own] = tensor.reshape(1, 1, -1) if own == "mask_hidden" else tensor  # some tools keep fewer dimensions
    return found


def optional(names: Iterable[str], variant: Variant) -> frozenset[str]:
    """Return the optional tensors that a head has, according to the ``names`` in its checkpoint and its config.json."""
    there = set(names)
    chosen = {name for name in MAY_BE if name in there} | {f"{part}.bias" for part in variant.biased if part == "fc"}
    for layer in {layer_of(name) for name in there} - {""}:
        promised = [f"{part}.bias" for part in variant.biased if part != "fc"]
        promised += GROUPS[2] if variant.head_norms else []
        singles = ("self_attn.o_proj.bias", "mlp.down_proj.bias")
        for group in (*GROUPS, *((single,) for single in singles)):
            if any(layer + name in there or name in promised for name in group):
                chosen |= {layer + name for name in group}
    return frozenset(chosen)


def layer_of(name: str) -> str:
    """Return the prefix of a layer's tensor; empty for a tensor outside the layers."""
    parts = name.split(".")
    if parts[0] == "midlayer":
        return "midlayer."
    return f"layers.{parts[1]}." if parts[0] == "layers" and len(parts) > 1 else ""


def refuse_others(found: Mapping[str, Tensor], head: nn.Module) -> None:
    """Check the tensors of a checkpoint against those of a head.

    Raises:
        ValueError: tensors are unknown, missing, of another shape or dtype, or not finite.
    """
    expected = head.state_dict()
    if extra := sorted(found.keys() - expected.keys()):
        raise ValueError(f"nothing reads the tensors {some(extra)}; they may change what the head computes")
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"it does not have the tensors {some(missing)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but {tuple(expected[name].shape)} would fit config.json"
            )
        if expected[name].is_floating_point() and tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is in {tensor.dtype}; expected float32, float16 or bfloat16")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are not finite")


def some(names: list[str]) -> str:
    """Return the first three names as text, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def draft_vocabulary(found: dict[str, Tensor], drafted: int | None, vocab: int) -> None:
    """Check ``d2t`` and ``t2d`` in ``found``, and add them where they are missing.

    They map the draft vocabulary to the target's ids and back: target id = i + d2t[i] (in EAGLE, SpecForge, ModelOpt,
    speculators, vLLM and sglang alike), and t2d is the mask of these ids. A head without d2t drafts from the whole
    vocabulary.

    Args:
        found: tensors of the head.
        drafted: size of the draft vocabulary according to config.json, or None.
        vocab: size of the target's vocabulary.

    Raises:
        ValueError: the tensors contradict each other, the output rows or the vocabulary.
    """
    rows = len(found["lm_head.weight"]) if "lm_head.weight" in found else None
    mapped = len(found["d2t"]) if "d2t" in found and found["d2t"].dim() == 1 else None
    size = next((n for n in (mapped, rows, drafted) if n is not None), vocab)
    for what, count in (("rows of lm_head.weight", rows), ("draft_vocab_size", drafted)):
        if count not in (None, size):
            raise ValueError(f"{what} are {count}, but {size} tokens can be drafted by d2t or lm_head.weight")
    if "d2t" not in found:
        if size != vocab:
            raise ValueError(
                f"it has no d2t, without which {size} draft tokens cannot be mapped to the {vocab} of the target"
            )
        found["d2t"] = torch.zeros(vocab, dtype=torch.long)
    offsets = found["d2t"]
    if offsets.dim() != 1 or offsets.is_floating_point() or offsets.dtype == torch.bool:
        raise ValueError(f"d2t is {offsets.dtype} of shape {tuple(offsets.shape)}; expected a list of whole numbers")
    found["d2t"] = offsets = offsets.long()
    ids = offsets + torch.arange(len(offsets))
    if not bool(((ids >= 0) & (ids < vocab)).all()):
        raise ValueError(f"d2t leads to ids outside of the target's {vocab}; expected offsets, target id = i + d2t[i]")
    if len(torch.unique(ids)) != len(ids):
        raise ValueError("d2t leads to one id twice")
    mask = torch.zeros(vocab, dtype=torch.bool)
    mask[ids] = True
    given = found.get("t2d", mask)
    if given.shape != mask.shape or not torch.equal(given.float(), mask.float()):
        raise ValueError(f"t2d is not the mask of the {len(ids)} ids that d2t leads to, of {vocab} of the target")
    found["t2d"] = mask
