"""From a control and an environment's names to a live decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spec_envs.controls.base import Control
from spec_envs.controls.dvi import DVIControl, exit_of
from spec_envs.controls.k import KControl
from spec_envs.controls.topk import TopKControl
from spec_envs.decoding.clock import PricedClock, WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.loading import DEFAULT_TARGET, make_clocks, open_decoder
from spec_envs.decoding.traces.replay import replayed
from spec_envs.decoding.traces.synthetic import Profile
from spec_envs.decoding.traces.trace import Trace, tasks_named
from spec_envs.decoding.weights.checkpoints import load_tokenizer, resolve_device
from spec_envs.network.edge.linked import is_address, linked
from spec_envs.network.expected_trace import ExpectedTrace
from spec_envs.network.link import load_link
from spec_envs.text import Detokenizer

DEFAULTS: dict[str, Any] = {  # of keyword arguments that say nothing where a trace is played
    "target": DEFAULT_TARGET,
    "drafter": "auto",
    "device": "auto",
    "dtype": "auto",
    "data_dir": None,
    "template": None,
    "date": None,
    "temperature": None,
    "top_p": 1.0,
}


def clocks_for(clock: str | Sequence[str], device: str, trace: str | None) -> list[WallClock]:
    """Return the clocks of those names; a trace's own table stands in for the wall.

    Raises:
        ValueError: no such table, or several clocks one of which measures.
    """
    clock = clock[0] if not isinstance(clock, str) and len(clock) == 1 else clock
    if trace and Trace.named(trace):
        if clock == "wall":
            return [PricedClock(Trace.load(trace).costs())]
        trace = None
    elif trace and ExpectedTrace.named(trace):
        clock, trace = ExpectedTrace.load(trace).clock if clock == "wall" else clock, None
    clocks = make_clocks(clock, resolve_device(device), trace)
    if len(clocks) > 1 and not all(made.priced for made in clocks):
        raise ValueError(f"clock is {clock!r}; several clocks need cost tables, a measured clock has none")
    return clocks


def check_settings(trace: str | None, given: dict[str, Any]) -> None:
    """Refuse settings of models and prompts where a trace stands for these: they would have no effect.

    Args:
        given: keyword arguments of an environment or of ``load_decoder``. Defaults are allowed, and what the trace was
            recorded with.

    Raises:
        ValueError: another value, or no name of a trace.
    """
    if trace is None:
        return
    if not trace.strip():
        raise ValueError(f"trace is {trace!r}; expected a folder, a file or a name, or None for models")
    made = recorded_settings(trace)
    for name, default in DEFAULTS.items():
        value = given.get(name, default)
        if value in (default, made.get(name, default)):
            continue
        if name in made:
            raise ValueError(f"the trace {trace!r} was recorded with {name} {made[name]!r}, not {value!r}")
        raise ValueError(f"{name} is {value!r}, which has no effect where the trace {trace!r} is played; leave it out")


def recorded_settings(trace: str) -> dict[str, Any]:
    """Return the keyword arguments that a trace was recorded with; it is played on the CPU."""
    made: dict[str, Any] = {"device": "cpu", "temperature": 0.0}
    if Trace.named(trace):
        manifest = Trace.load(trace).manifest
        return made | {name: getattr(manifest, name) for name in ("target", "drafter", "dtype", "template", "date")}
    if ExpectedTrace.named(trace):
        recorded = ExpectedTrace.load(trace)
        return made | {name: getattr(recorded, name) for name in ("target", "drafter", "temperature")}
    return made


def recorded_prompts(trace: str, split: str, names: str = "all") -> list[tuple[str, list[int]]]:
    """Return task and ids of a trace's prompts; those of a synthetic profile are the same in every split.

    Args:
        names: prompt sets, or kinds of text of a profile, separated by commas; ``"all"`` is every one.

    Raises:
        ValueError: there are none of that split or of those names.
    """
    if Trace.named(trace):
        recorded = Trace.load(trace)
        return [(recorded.texts[i].task, recorded.texts[i].prompt) for i in recorded.of_split(split, names)]
    expected = ExpectedTrace.named(trace)
    prompts = ExpectedTrace.load(trace).prompts("all") if expected else Profile.load(trace).prompts()
    chosen = tasks_named(names, {task for task, _ in prompts}, trace)
    if expected:
        prompts = ExpectedTrace.load(trace).prompts(split)
    prompts = [(task, ids) for task, ids in prompts if task in chosen]
    if not prompts:
        raise ValueError(f"the trace {trace!r} has no texts of the prompts {names!r} in the split {split!r}")
    return prompts


def decoder_under(control: Control, trace: str | None, clock: WallClock, **models: Any) -> Decoder:
    """What decodes under a control: models here, a server, a cloud behind a link, or a trace that plays them.

    Args:
        models: ``target``, ``drafter``, ``device``, ``dtype``, ``temperature`` and ``top_p`` of ``load_decoder``.

    Raises:
        ValueError: settings that do not go together.
    """
    if isinstance(control, DVIControl) and trace:
        raise ValueError(f"trace is {trace!r}; no trace plays SpecDVI-v0, whose states are those of a model")
    check_settings(trace, models)
    if isinstance(control, TopKControl) and trace:
        recorded = ExpectedTrace.load(trace)
        if is_address(control.link):
            raise ValueError(f"trace is {trace!r}, which takes the place of the cloud; give a simulated link")
        if unknown := sorted(set(control.ks) - set(recorded.ks)):
            raise ValueError(f"ks has {unknown}; the trace {trace!r} knows {', '.join(map(str, recorded.ks))}")
        return recorded.decoder(clock, control.max_depth, load_link(control.link))
    if isinstance(control, DVIControl):
        return decoder_at_exit(control, clock, **models)
    if trace and Trace.named(trace):
        return replay_under(control, Trace.load(trace), clock)
    opened = (control.engine, trace, control.segment, clock, control.width, control.max_depth, control.server_args)
    decoder = open_decoder(*opened, **models)
    if isinstance(control, TopKControl):
        if control.edge_value is not None and not isinstance(decoder.drafter, ChainDrafter):
            raise ValueError(
                "edge_value is for a drafter that can always say more; take a draft model, not lookup alone"
            )
        decoder = linked(decoder, control.link, models.get("target", DEFAULT_TARGET))
    return decoder


def replay_under(control: Control, trace: Trace, clock: WallClock) -> Decoder:
    """A decoder that replays a trace.

    Raises:
        ValueError: a trace of other settings, or of another kind than the control decides about.
    """
    chain = isinstance(control, KControl)
    if control.engine != "torch":
        raise ValueError(
            f"trace is {str(trace.folder)!r}, which takes the place of {control.engine}; give one of the two"
        )
    if trace.kind != ("chain" if chain else "tree"):
        raise ValueError(
            f"the trace {trace.folder} is one of {trace.kind}s, which {control.name} does not decide about"
        )
    trace.check(control.width, control.max_depth)
    return replayed(
        trace, clock, control.max_depth, Detokenizer.when_needed(lambda: load_tokenizer(trace.manifest.target))
    )


def decoder_at_exit(control: DVIControl, clock: WallClock, **models: Any) -> Decoder:
    """A decoder that drafts from the target's own exit."""
    if models.get("drafter", "auto") == "auto":
        models["drafter"] = control.default_drafter(control.target)
    models |= {"adapter": control.adapter, "rank": control.rank}
    decoder = open_decoder(clock=clock, width=control.width, max_depth=control.max_depth, **models)
    found = exit_of(decoder).settings
    for name, wanted, has in (
        ("exit_layer", control.exit_layer, found.exit_layer),
        ("adapter", control.adapter, found.kind),
        ("rank", control.rank or found.rank, found.rank),
    ):
        if wanted != has:
            raise ValueError(f"{name} is {wanted}, but the exit {models['drafter']!r} has {has}; pass {name}={has!r}")
    return decoder
