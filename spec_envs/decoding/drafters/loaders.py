"""Loaders of drafters, one per kind: from a parsed name to both sides of a decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from spec_envs.decoding.drafters.base import ChainDrafter, Drafter
from spec_envs.decoding.drafters.copying import Copies, CopyingDrafter, CopyingTrees
from spec_envs.decoding.drafters.dflash.config import read_config as read_dflash_config
from spec_envs.decoding.drafters.dflash.drafter import DFlashDrafter, DFlashModel
from spec_envs.decoding.drafters.dflash.head import DFlashHead
from spec_envs.decoding.drafters.draft_model import DraftModelDrafter, on_the_target
from spec_envs.decoding.drafters.eagle.config import read_config
from spec_envs.decoding.drafters.eagle.drafter import EagleDrafter, EagleModel
from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.drafters.eagle.parallel import ParallelDrafter
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.drafters.formats import refuse_foreign_tensors
from spec_envs.decoding.drafters.lookup import LookedUp, LookupDrafter
from spec_envs.decoding.drafters.names import EXIT, SUFFIX, DrafterName, Kind, drafter_folder
from spec_envs.decoding.drafters.shortlist import Shortlist, shortened, size_of
from spec_envs.decoding.drafters.suffix import LIKELY, REMEMBERED, SuffixDrafter, Suffixes
from spec_envs.decoding.exits.adapter import ExitAdapter
from spec_envs.decoding.exits.files import load_exit
from spec_envs.decoding.exits.split import SplitVerifier
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.decoding.weights.checkpoints import eos_ids, load_draft, load_tokenizer
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.files import at_home


@dataclass(frozen=True)
class Target:
    """A loaded target, and how a decoder over it drafts and samples: see the arguments of ``load_decoder``."""

    name: str
    model: Transformer
    temperature: float
    top_p: float
    width: int
    max_depth: int
    adapter: str
    rank: int | None
    stop: float


def load_sides(name: DrafterName, target: Target) -> tuple[LocalVerifier, Drafter]:
    """Load a drafter and return the target's side and the drafter's side of a decoder.

    Raises:
        ValueError: the drafter is damaged, or made for another target, or has no shortlist of another size.
    """
    if name.shortlist != "auto" and name.kind != "model":
        raise ValueError(f"drafter is {str(name)!r}; only a whole draft model takes a size of its shortlist after an @")
    return LOADERS[name.kind](name, target)


def load_copies(name: DrafterName, target: Target) -> tuple[LocalVerifier, Drafter]:
    """Return the sides of prompt lookup or suffix decoding alone, which have no weights."""
    vocab, context = target.model.shape.vocab, target.model.shape.context
    if name.copies == SUFFIX:
        return verifier_of(target), SuffixDrafter(vocab, context, target.width, remembered(name))
    return verifier_of(target), LookupDrafter(vocab, context)


def load_head(name: DrafterName, target: Target) -> tuple[LocalVerifier, Drafter]:
    """Return the sides of an EAGLE-3 head, which reads states of the target."""
    return behind_copies(
        name, target, EagleDrafter(load_eagle(name.model, target.model), target.width, target.max_depth)
    )


def load_parallel(name: DrafterName, target: Target) -> tuple[LocalVerifier, Drafter]:
    """Return the sides of a parallel head, which reads states of the target."""
    head = ParallelDrafter(load_eagle(name.model, target.model), target.width, target.max_depth)
    return behind_copies(name, target, head)


def load_dflash(name: DrafterName, target: Target) -> tuple[LocalVerifier, Drafter]:
    """Return the sides of a DFlash drafter, which reads states of the target."""
    head = DFlashDrafter(load_dflash_model(name.model, target.model), target.width, target.max_depth)
    return behind_copies(name, target, head)


def load_model(name: DrafterName, target: Target) -> tuple[LocalVerifier, Drafter]:
    """Return the sides of a draft model."""
    return verifier_of(target), copying(name, load_draft_model(name, target))


def load_early_exit(name: DrafterName, target: Target) -> tuple[LocalVerifier, Drafter]:
    """Return the sides of an exit, whose verifier continues from the drafter's states."""
    adapter = load_adapter(name.model, target.name, target.model, target.adapter, target.rank)
    verifier = SplitVerifier(adapter, target.temperature, target.top_p)
    return verifier, copying(name, EarlyExitDrafter(verifier, target.stop))


LOADERS: dict[Kind, Callable[[DrafterName, Target], tuple[LocalVerifier, Drafter]]] = {
    "none": load_copies,
    "eagle3": load_head,
    "parallel": load_parallel,
    "dflash": load_dflash,
    "model": load_model,
    "exit": load_early_exit,
}


def verifier_of(target: Target, capture: tuple[int, ...] = ()) -> LocalVerifier:
    """Return the target's side where the drafter does not share it."""
    return LocalVerifier(target.model, capture, target.temperature, target.top_p)


def copying(name: DrafterName, drafter: ChainDrafter) -> Drafter:
    """Return a drafter of chains, with copies before it if the name has any."""
    return CopyingDrafter(drafter, copies_of(name)) if name.copies else drafter


def behind_copies(name: DrafterName, target: Target, head: Drafter) -> tuple[LocalVerifier, Drafter]:
    """Return the sides of a drafter of trees that reads states of the target, with copies before it if the name has
    any."""
    return verifier_of(target, head.capture), CopyingTrees(head, copies_of(name)) if name.copies else head


def copies_of(name: DrafterName) -> Copies:
    """Return what finds the copies that are drafted before a model is asked."""
    return Suffixes(remembered(name), LIKELY) if name.copies == SUFFIX else LookedUp()


def remembered(name: DrafterName) -> int:
    """Return how many tokens of earlier answers suffix decoding keeps."""
    return REMEMBERED if name.stream else 0


@functools.cache
def load_eagle(name: str, target: Transformer) -> EagleModel:
    """Return an EAGLE-3 head in its inference form, loaded once per target and shared.

    Raises:
        ValueError: it is not found, is damaged, needs a computation that is not supported, or belongs to another
            target.
    """
    head = EagleHead.load(name)
    try:
        return EagleModel(head, target)
    except ValueError as error:
        raise ValueError(f"cannot use the EAGLE-3 head in {drafter_folder(name)}: {error}") from None


@functools.cache
def load_dflash_model(name: str, target: Transformer) -> DFlashModel:
    """Return a DFlash drafter in its inference form, loaded once per target and shared; raises as ``load_eagle``
    does."""
    head = DFlashHead.load(name)
    try:
        return DFlashModel(head, target)
    except ValueError as error:
        raise ValueError(f"cannot use the DFlash drafter in {drafter_folder(name)}: {error}") from None


def layers_config(name: DrafterName) -> PretrainedConfig:
    """Return the config of the layers of a drafter that reads states of the target.

    Raises:
        ValueError: its config.json cannot be used.
    """
    read: Callable[[Path], tuple[PretrainedConfig, object]]
    read = read_dflash_config if name.kind == "dflash" else read_config
    return read(name.folder)[0]


def load_draft_model(name: DrafterName, target: Target) -> DraftModelDrafter:
    """Return a draft model for a target.

    Raises:
        ValueError: it has another tokenizer, does not have some of its tokens, was made for another target, or has a
            fixed shortlist where the name has the size of one.
    """
    model, sampling = target.model, (target.temperature, target.top_p)
    if not (name.folder / "tokenizer_config.json").is_file():  # it shares the target's
        if name.shortlist != "auto":
            raise ValueError(f"drafter is {str(name)!r}; the shortlist of {name.model!r} is fixed, leave out the @")
        draft, shortlist = load_shared(name.folder, model)
        return DraftModelDrafter(draft, model, *sampling, shortlist)
    tokenizer = load_tokenizer(name.model)
    if tokenizer.get_vocab() != load_tokenizer(target.name).get_vocab():
        raise ValueError(
            f"the draft model {name.model!r} has another tokenizer than {target.name!r}; take one of the same family"
        )
    draft, known = load_draft(name.model, model), len(tokenizer)
    vocab = draft.shape.vocab
    if vocab < known:
        raise ValueError(
            f"the draft model {name.model!r} knows {vocab} of its tokenizer's {known} tokens; take another"
        )
    size = size_of(name.shortlist, vocab)
    if size >= vocab:
        return DraftModelDrafter(draft, model, *sampling)
    ends = frozenset(eos_ids(target.name))
    return DraftModelDrafter(draft, model, *sampling, shortened(draft, model.shape.vocab, size, ends))


@functools.cache
def load_shared(folder: Path, target: Transformer) -> tuple[Transformer, Shortlist]:
    """Return a draft model on a target's embedding and output rows, loaded once per target, and its shortlist.

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


def load_adapter(name: str, target: str, model: Transformer, kind: str, rank: int | None) -> ExitAdapter:
    """Return the exit of that name, not shared with other decoders.

    Args:
        kind, rank: adapter of an untrained exit; see ``ExitAdapter.fresh``.

    Raises:
        ValueError: an exit that the target does not have, or a trained one of another target.
    """
    if not name.startswith(EXIT):
        return load_exit(at_home(name), model, target)
    layers = name.removeprefix(EXIT)
    if not layers.isdecimal():
        raise ValueError(f"drafter is {name!r}; expected {EXIT} and a number of layers, such as {EXIT}2")
    return ExitAdapter.fresh(model, target, int(layers), kind, rank)
