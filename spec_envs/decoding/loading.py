"""Load a decoder over models: target, drafter and clock, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import Drafter
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.drafters.loaders import Target, layers_config, load_sides, verifier_of
from spec_envs.decoding.drafters.names import HEADS, DrafterName, default_drafter
from spec_envs.decoding.drafters.portfolio import Portfolio, is_portfolio, members
from spec_envs.decoding.exits.decoder import ExitDecoder
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.decoding.weights.checkpoints import (
    eos_ids,
    fit_together,
    load_target,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from spec_envs.processes import trim
from spec_envs.text import Detokenizer

DEFAULT_TARGET = "smollm2-135m"


@dataclass(frozen=True)
class Models:
    """The models that decode and the target's sampling settings, named as the arguments of ``load_decoder``."""

    target: str
    drafter: str
    device: str
    dtype: str
    temperature: float
    top_p: float


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
    """Return a decoder for a pair of models; the weights are shared with every other decoder of the process.

    Args:
        target: name of models.yml, hub id, folder or GGUF file.
        drafter: an EAGLE-3 head or a draft model: name of models.yml, folder, hub id or GGUF file; ``"lookup"`` is
            prompt lookup and ``"suffix"`` suffix decoding, ``"lookup+NAME"`` and ``"suffix+NAME"`` try it before the
            head, draft model or exit NAME, ``"suffix@stream"`` also drafts from the answers that this decoder wrote
            before, ``"exit:N"`` is an untrained exit of the target after N layers, and the folder of a trained exit is
            that exit. ``"auto"`` is the target's own drafter in models.yml; None decodes plainly. Several names, joined
            by commas, are a ``Portfolio``, of which ``decoder.drafter.choose`` lets one draft. A draft model drafts from
            a shortlist, the first quarter of its vocabulary (at least 8,192 tokens), and from the tokens of the text;
            ``"NAME@N"`` sets another size, ``"NAME@all"`` drafts from all tokens.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        dtype: ``"auto"``, ``"int8"``, ``"q4"``, ``"bfloat16"``, ``"float16"`` or ``"float32"``. ``"auto"`` is int8 on
            a CPU that has instructions for it, elsewhere bfloat16 or float32; ``"q4"`` multiplies the blocks of a GGUF
            file as they are stored.
        temperature, top_p: sampling of the target; temperature 0 is greedy.
        clock: charged for every forward; by default it measures wall time.
        width, max_depth: children per node (1 drafts a chain), and most expansions after the first level.
        adapter, rank: the trainable part of an untrained exit (see ``ExitAdapter``).
        stop: probability below which an exit stops drafting (see ``EarlyExitDrafter``).

    Raises:
        ValueError: a name that is not found, models that do not fit together or the width, or a model that cannot be
            computed in the dtype.
    """
    at = resolve_device(device)
    if drafter == "auto":
        drafter = default_drafter(target, chain=width == 1)
    several = drafter is not None and is_portfolio(drafter)
    names = () if drafter is None else members(drafter) if several else (DrafterName.parse(drafter),)
    for name in names:
        check_fits(name, 1 if several and name.single else width)
    model = load_target(target, at, dtype_for(dtype, at, target, names))
    fit_together(target, model.shape.vocab)
    asked = Target(target, model, temperature, top_p, width, max_depth, adapter, rank, stop)
    verifier: LocalVerifier
    loaded: Drafter | None
    if several:
        verifier, loaded = load_portfolio(names, asked)
    else:
        verifier, loaded = load_sides(names[0], asked) if names else (verifier_of(asked), None)
    made = ExitDecoder if isinstance(loaded, EarlyExitDrafter) else Decoder
    words = Detokenizer.of(load_tokenizer(target))
    trim()
    return made(verifier, loaded, clock or WallClock(at), eos_ids(target), max_depth, words)


def check_fits(name: DrafterName, width: int) -> None:
    """Refuse a drafter of chains for trees.

    Raises:
        ValueError: the drafter is one.
    """
    if name.chain and width != 1:
        raise ValueError(
            f"{str(name)!r} drafts a chain, not a tree of width {width}; pass width=1, or take an EAGLE-3 head or suffix"
        )


def load_portfolio(names: Sequence[DrafterName], target: Target) -> tuple[LocalVerifier, Portfolio]:
    """Load several drafters and return both sides of a decoder over them.

    Raises:
        ValueError: one of them cannot be loaded, or is an early exit.
    """
    for name in names:
        if name.kind == "exit":
            raise ValueError(
                f"{str(name)!r} drafts with layers whose states the verifier continues, so it is not one of several "
                "drafters; leave it out"
            )
    alone = [load_sides(name, replace(target, width=1) if name.single else target)[1] for name in names]
    portfolio = Portfolio(names, alone, target.width)
    return verifier_of(target, portfolio.capture), portfolio


def dtype_for(dtype: str, device: torch.device, target: str, drafters: Sequence[DrafterName]) -> str:
    """Return the name of the dtype that is computed; ``"auto"`` is one in which target and drafters are all
    computed."""
    models, heads = [target], []
    for drafter in drafters:
        if drafter.kind == "model":
            models.append(str(drafter.folder))
        elif drafter.kind in HEADS:
            heads.append(layers_config(drafter))
    return resolve_dtype(dtype, device, models, heads)
