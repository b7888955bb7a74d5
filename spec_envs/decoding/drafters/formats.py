"""Detect which kind of drafter a folder holds: an EAGLE-3 head, a parallel one, a DFlash drafter, a draft model, or a
format that is not read here.

The config.json decides, and where it states nothing the names of the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from spec_envs.decoding.drafters.eagle.config_keys import MASK_TOKENS, short

READ = (
    "read are EAGLE-3 and P-EAGLE heads (layouts of SafeAILab, SpecForge, ModelOpt, speculators), DFlash drafters "
    "(z-lab, speculators) and draft models"
)
SPECULATORS_KINDS = ("eagle3", "peagle", "dflash")  # kinds of that library's drafters that are read
EAGLE_1 = "an EAGLE-1, EAGLE-2 or HASS head"
MLA = "an EAGLE-3 head with multi-head latent attention (DeepSeek, Kimi)"
# In lower case: what an architecture may hold, and the format. The first that fits counts.
ARCHITECTURES = (
    ("medusa", "a Medusa head"),
    ("hydra", "a Hydra head"),
    ("mlpspeculator", "an MLP speculator"),
    ("dflash2", "a DFlash 2 drafter"),
    ("dspark", "a DSpark drafter"),
    ("domino", "a Domino drafter"),
    ("eagle3deepseek", MLA),
    ("eagle3mla", MLA),
    ("eagle3kimi", MLA),
    ("mtp", "a multi-token prediction (MTP) module"),
    ("nextn", "a multi-token prediction (MTP) module"),
)
KEYS = (  # of a config.json, with a value that is neither null nor false
    ("medusa_num_heads", "a Medusa head"),
    ("hydra_num_heads", "a Hydra head"),
    ("kv_lora_rank", MLA),
)
TENSORS = (
    (r"(^|\.)medusa|^\d+\.\d+\.linear\.weight$", "a Medusa head"),
    (r"(^|\.)hydra", "a Hydra head"),
    (r"(^|\.)(eh_proj|enorm|hnorm)\.|^mtp\.", "a multi-token prediction (MTP) module"),
    (r"kv_a_proj_with_mqa", MLA),
)


def read_json(path: Path) -> dict[str, Any]:
    """Return a drafter's config.json.

    Raises:
        ValueError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"cannot read {path} of the drafter ({reason}); fetch or train it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} of the drafter holds no JSON object; fetch or train it again")
    return content


def kind_of_folder(folder: Path) -> Literal["eagle3", "parallel", "dflash", "model"]:
    """Return what a folder holds, as its config.json shows: an EAGLE-3 head, a parallel one, a DFlash drafter, or a
    language model.

    Raises:
        ValueError: it holds a drafter of a format that is not read; the sentence names it.
    """
    config = read_json(folder / "config.json")
    refuse_foreign_config(config, folder)
    names = architectures(config)
    if config.get("speculators_model_type") == "dflash" or any("dflash" in name for name in [*names, *config]):
        return "dflash"
    head = (
        config.get("speculators_model_type") in SPECULATORS_KINDS
        or any(key in config for key in ("draft_vocab_size", "eagle_config"))
        or any("eagle" in name for name in names)
    )
    if not head:
        return "model"
    return "parallel" if any(config.get(key) is not None for key in MASK_TOKENS) else "eagle3"


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the names of a config.json's architectures, in lower case without punctuation."""
    names = config.get("architectures")
    names = [*names] if isinstance(names, list) else []
    return [re.sub(r"[^a-z0-9]", "", str(name).lower()) for name in [*names, config.get("model_type", "")]]


def refuse_foreign_config(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a drafter whose config.json names a format that is not read."""
    kind = config.get("speculators_model_type")
    if kind is not None and kind not in SPECULATORS_KINDS:
        refuse(f"a {short(kind)} drafter of speculators", folder)
    names = architectures(config)
    for word, what in ARCHITECTURES:
        if any(word in name for name in names):
            refuse(what, folder)
    for key, what in KEYS:
        if config.get(key) not in (None, False):
            refuse(what, folder)
    if "draft_vocab_size" not in config and any(re.search("(?<!p)eagle(?!3)", name) for name in names):
        refuse(EAGLE_1, folder)


def refuse_foreign_tensors(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a drafter whose tensors are those of a format that is not read."""
    for pattern, what in TENSORS:
        if any(re.search(pattern, name) for name in weights):
            refuse(what, folder)
    fc = weights.get("fc.weight", weights.get("model.fc.weight"))
    # The first EAGLE joins one hidden state and the embedding in front of its layer, EAGLE-3 several states.
    two_wide = fc is not None and fc.dim() == 2 and fc.shape[1] == 2 * fc.shape[0]
    if two_wide and not any(name.endswith("hidden_norm.weight") for name in weights):
        refuse(EAGLE_1, folder)


def refuse(what: str, folder: Path) -> None:
    """Raise ValueError: a folder holds something that is not read."""
    raise ValueError(f"{folder} holds {what}, which is not read; {READ}")
