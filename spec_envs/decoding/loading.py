"""From names to a live decoder: target, drafter, clock."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import ChainDrafter, Drafter
from spec_envs.decoding.drafters.copying import CopyingDrafter
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter, on_the_target
from spec_envs.decoding.drafters.eagle.config import read_config
from spec_envs.decoding.drafters.eagle.drafter import EagleDrafter, EagleModel
from spec_envs.decoding.drafters.eagle.head import EagleHead, drafter_folder
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.drafters.formats import is_head, refuse_foreign_tensors
from spec_envs.decoding.drafters.lookup import LookupDrafter
from spec_envs.decoding.exits.adapter import ExitAdapter
from spec_envs.decoding.exits.decoder import ExitDecoder
from spec_envs.decoding.exits.files import is_exit, load_exit
from spec_envs.decoding.exits.split import SplitVerifier
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.decoding.weights.checkpoints import (
    eos_ids,
    fit_together,
    load_target,
    load_tokenizer,
    registry,
    resolve_device,
    resolve_dtype,
)
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.files import at_home
from spec_envs.text import Detokenizer

DEFAULT_TARGET = "smollm2-135m"
LOOKUP = "lookup"  # the drafter without weights; in front of another's name and a plus sign, it goes first
EXIT = "exit:"  # in front of a number of layers, an untrained exit of the target behind these


@dataclass(frozen=True)
class Models:
    """Which models decode, and how the target samples: the arguments of ``load_decoder`` of the same names."""

    target: str
    drafter: str
    device: str
    dtype: str
    temperature: float
    top_p: float


@functools.cache
def load_eagle(name: str, target: Transformer) -> EagleModel:
    """The EAGLE-3 head ``name`` in its inference form, loaded once per target and shared.

    Raises:
        ValueError: it leads nowhere, is damaged, does something that is not computed, or belongs to another target.
    """
    head = EagleHead.load(name)
    try:
        return EagleModel(head, target)
    except ValueError as error:
        raise ValueError(f"cannot use the EAGLE-3 head in {drafter_folder(name)}: {error}") from None


def load_draft_model(name: str, target: str, model: Transformer, temperature: float, top_p: float) -> DraftModelDrafter:
    """The draft model ``name`` for the target of that name and these weights.

    Raises:
        ValueError: it has another tokenizer, lacks some of its tokens, or was made for another target.
    """
    folder = drafter_folder(name)
    if not (folder / "tokenizer_config.json").is_file():  # it shares the target's
        draft, shortlist = load_shared(folder, model)
        return DraftModelDrafter(draft, model, temperature, top_p, shortlist)
    if load_tokenizer(name).get_vocab() != load_tokenizer(target).get_vocab():
        raise ValueError(f"the draft model {name!r} has another tokenizer than {target!r}; take one of the same family")
    draft, known = load_target(name, model.device, model.dtype), len(load_tokenizer(name))
    if draft.shape.vocab < known:
        raise ValueError(
            f"the draft model {name!r} knows {draft.shape.vocab} of its tokenizer's {known} tokens; take another"
        )
    return DraftModelDrafter(draft, model, temperature, top_p)


@functools.cache
def load_shared(folder: Path, target: Transformer) -> tuple[Transformer, np.ndarray]:
    """A draft model on a target's embedding and output rows, loaded once per target, and its shortlist.

    Raises:
        ValueError: it is damaged, of another format, or belongs to another target.
    """
    weights = load_weights(folder)
    refuse_foreign_tensors(weights, folder)
    config = load_config(folder)
    try:
        return on_the_target(config, weights, target)
    except ValueError as error:
        raise ValueError(f"cannot use the draft model in {folder}: {error}") from None


def without_lookup(drafter: str) -> str:
    """The name of the model of ``lookup+model``; any other name as it is."""
    return drafter.removeprefix(f"{LOOKUP}+")


def drafts_chains(drafter: str) -> bool:
    """Whether a drafter is a draft model, an exit or prompt lookup, which draft chains, and not a head, which drafts
    trees."""
    if drafter == LOOKUP or drafter != without_lookup(drafter) or exits(drafter):
        return True
    return not is_head(drafter_folder(drafter))


def exits(drafter: str) -> bool:
    """Whether a drafter is an early exit of the target: ``exit:N``, or a folder of a trained one."""
    return drafter.startswith(EXIT) or is_exit(drafter)


def open_exit(drafter: str, target: str, model: Transformer, kind: str, rank: int | None) -> ExitAdapter:
    """The exit of that name, for this decoder alone.

    Args:
        kind, rank: of the adapter of an untrained one; see ``ExitAdapter.fresh``.

    Raises:
        ValueError: an exit that the target does not have, or a trained one of another target.
    """
    if not drafter.startswith(EXIT):
        return load_exit(at_home(drafter), model, target)
    layers = drafter.removeprefix(EXIT)
    if not layers.isdecimal():
        raise ValueError(f"drafter is {drafter!r}; expected {EXIT} and a number of layers, such as {EXIT}2")
    return ExitAdapter.fresh(model, target, int(layers), kind, rank)


def default_drafter(target: str, chain: bool = False) -> str:
    """Return the drafter that models.yml has for a target: the first one, or the first that drafts chains.

    Raises:
        ValueError: there is none.
    """
    known = [name for name, entry in registry()["drafters"].items() if entry["target"] == target]
    found = next((name for name in known if not chain or drafts_chains(name)), None)
    if found is None:
        raise ValueError(
            f"no drafter is known for {target!r}, only for "
            f"{', '.join(dict.fromkeys(e['target'] for e in registry()['drafters'].values()))}; "
            "name one with drafter= (folder or hub id of an EAGLE-3 head or a draft model, 'lookup', or 'lookup+' and a "
            "draft model), or train one with `make drafter`"
        )
    return found


def static_over_plain(target: str, drafter: str) -> float:
    """Speed of the pair's best static setting in units of plain decoding; 1 where it was never measured."""
    entry = registry()["drafters"].get(drafter, {})
    return entry.get("static_over_plain", 1.0) if entry.get("target") == target else 1.0


def load_decoder(
    target: str = DEFAULT_TARGET,
    drafter: str | None = "auto",
    device: str = "auto",
    dtype: str = "auto",
    temperature: float = 0.0,
    top_p: float = 1.0,
    clock: WallClock | None = None,
    width: int = 10,
    max_depth: int = 12,
    adapter: str = "head",
    rank: int | None = None,
    stop: float = 0.0,
) -> Decoder:
    """A decoder for a pair of models; the weights are shared with every other decoder of the process.

    Args:
        target: name of models.yml, hub id, folder or GGUF file.
        drafter: an EAGLE-3 head or a draft model: name of models.yml, folder, hub id or GGUF file; ``"lookup"`` is
            prompt lookup, ``"lookup+NAME"`` that of a draft model where the text does not repeat itself, ``"exit:N"`` an
            untrained exit of the target behind N layers, the folder of a trained one that exit, ``"auto"`` the
            target's own in models.yml, None decodes plainly.
        device, dtype: ``"auto"``, or as in torch.
        temperature, top_p: 0 is greedy.
        clock: None measures on the wall.
        width, max_depth: children per node (1 drafts a chain), and most expansions after the first level.
        adapter, rank: of an untrained exit, what may be trained of it (see ``ExitAdapter``).
        stop: of an exit, see ``EarlyExitDrafter``.

    Raises:
        ValueError: a name that leads nowhere, or models that do not fit together or the width.
    """
    at, models = resolve_device(device), [target]
    if drafter == "auto":
        drafter = default_drafter(target, chain=width == 1)
    chain = drafter is not None and drafts_chains(drafter)
    if chain and width != 1:
        raise ValueError(
            f"{drafter!r} drafts a chain, not a tree of width {width}; pass width=1, or take an EAGLE-3 head"
        )
    name = without_lookup(drafter) if drafter else ""
    if name != (drafter or "") and (not name or not drafts_chains(name)):
        raise ValueError(f"drafter is {drafter!r}; expected the name of a draft model or an exit behind the plus sign")
    if chain and drafter != LOOKUP and not exits(name):
        models.append(str(drafter_folder(name)))
    heads = [read_config(drafter_folder(drafter))[0]] if drafter is not None and not chain else []
    model = load_target(target, at, resolve_dtype(dtype, at, models, heads))
    fit_together(target, model.shape.vocab)
    loaded: Drafter | None = None
    verifier: LocalVerifier | None = None
    if drafter == LOOKUP:
        loaded = LookupDrafter(model.shape.vocab, model.shape.context)
    elif drafter is not None and chain:
        if exits(name):
            verifier = SplitVerifier(open_exit(name, target, model, adapter, rank), temperature, top_p)
            drafting: ChainDrafter = EarlyExitDrafter(verifier, stop)
        else:
            drafting = load_draft_model(name, target, model, temperature, top_p)
        loaded = drafting if name == drafter else CopyingDrafter(drafting)
    elif drafter is not None:
        loaded = EagleDrafter(load_eagle(drafter, model), width, max_depth)
    verifier = verifier or LocalVerifier(model, loaded.capture if loaded else (), temperature, top_p)
    made = ExitDecoder if isinstance(loaded, EarlyExitDrafter) else Decoder
    return made(
        verifier,
        loaded,
        clock or WallClock(at),
        eos_ids(target),
        max_depth,
        Detokenizer.of(load_tokenizer(target)),
    )
