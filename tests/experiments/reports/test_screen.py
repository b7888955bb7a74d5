"""The words above a table, for every outcome that a table can have, and the screen at the end of a command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spec_envs.experiments.measure.encoding import from_json, to_json
from spec_envs.experiments.measure.machine import Machine
from spec_envs.experiments.measure.results import Best, Divergence, Drift, Exit, Interval, Priced, Results, Row
from spec_envs.experiments.reports.report import aligned, draw, markdown
from spec_envs.experiments.reports.screen import screen, sentences

ONE, FASTER, SLOWER, SAME = (
    Interval(1.0, 1.0, 1.0),
    Interval(1.5, 1.4, 1.6),
    Interval(0.8, 0.7, 0.9),
    Interval(1, 0.9, 1.1),
)
NOISE, QUIET = Interval(1.08, 0.32, 2.62), Interval(1.0, 0.98, 1.02)
CURVES = {"verify": {1: 0.01, 8: 0.012}, "draft": {1: 0.001}}


def row(**over: Interval) -> Row:
    return Row(
        tokens_per_second=100.0,
        over=over,
        emitted_per_cycle=2.0,
        accepted_per_verified=0.2,
        verified_per_cycle=7.0,
        prefill_seconds=0.1,
        seconds=1.0,
        parts={},
        prompts=15,
    )


def results(
    again: Interval = QUIET,
    static_again: Interval = QUIET,
    priced: bool = True,
    actions: dict[str, Any] | None = None,
    **ppo: Interval,
) -> Results:
    """Return the table of a run with the given ratios of its agent, timed; the priced ones are ``SAME``."""
    against = {"plain": FASTER, "static": SAME, "random": FASTER} | ppo
    arms = {
        "plain": row(plain=ONE, static=SAME, random=SAME),
        "plain again": row(plain=again, static=SAME, random=SAME),
        "transformers generate": row(plain=SLOWER, static=SLOWER, random=SLOWER),
        "random": row(plain=SAME, static=SAME, random=ONE),
        "static": row(plain=FASTER, static=ONE, random=FASTER),
        "static again": row(plain=FASTER, static=static_again, random=FASTER),
        "ppo": row(**against),
    }
    same = {name: row(plain=SAME, static=SAME, random=SAME) for name in arms if name != "transformers generate"}
    return Results(
        arms=arms,
        references=["plain", "static"],
        prompts=15,
        tasks=["math", "code"],
        max_new_tokens=96,
        temperature=0.0,
        machine=Machine("a processor", 2, "int8", {"torch": "2"}, "abc", "wall"),
        seconds=CURVES,
        curves="T_verify(1) 10.0 ms",
        actions={"ppo": {"math": {"1": 97, "2": 3}, "code": {"1": 99, "2": 1}}} if actions is None else actions,
        decisions={"ppo": "depth"},
        by_task={name: {"math": 100.0, "code": 100.0} for name in arms},
        divergences={name: Divergence(0.0, 0.0, 1.0) for name in ("plain", "ppo")},
        static=Best(best=[1, 7], tokens_per_second={"depth 1, budget 7": 2.0, "depth 2, budget 7": 1.0}),
        at_prices=Priced(arms=same, costs=CURVES, source="measured when the run began") if priced else None,
    )


STATIC = "ppo chooses depth 1 in 98 % of its cycles: it is a static setting."
ON = "On 15 held-out prompts it "


@pytest.mark.parametrize(
    ("found", "second"),
    [
        (
            results(),
            "is 1.50 [1.40, 1.60] times as fast as plain decoding, and cannot be told from the best static setting "
            "(1.00 [0.90, 1.10]).",
        ),
        (
            results(plain=SLOWER, static=SLOWER, random=SLOWER),
            "is only 0.80 [0.70, 0.90] times as fast as plain decoding, is only 0.80 [0.70, 0.90] times as fast as the "
            "best static setting, and is only 0.80 [0.70, 0.90] times as fast as random decisions.",
        ),
        (
            results(plain=SAME, static=FASTER, random=SAME),
            "cannot be told from plain decoding (1.00 [0.90, 1.10]), is 1.50 [1.40, 1.60] times as fast as the best "
            "static setting, and cannot be told from random decisions (1.00 [0.90, 1.10]).",
        ),
    ],
)
def test_two_sentences_tell_every_outcome(found: Results, second: str) -> None:
    assert sentences(found) == [STATIC, ON + second]


def test_policy_that_varies_or_has_no_settings() -> None:
    varying = results(actions={"ppo": {"math": {"1": 60, "2": 30, "4": 8, "6": 2}}})
    assert sentences(varying)[0] == (
        "ppo varies its depth from cycle to cycle: it chooses 1 in 60 %, 2 in 30 %, 4 in 8 % of its cycles."
    )
    free = results(actions={})
    arms = {name: arm for name, arm in free.arms.items() if "static" not in name}
    free.arms = {name: replace(arm, over={"plain": arm.over["plain"]}) for name, arm in arms.items()}
    assert sentences(replace(free, references=["plain"], static=None)) == [
        "ppo has 7.0 drafted tokens verified per cycle, and a cycle emits 2.00 tokens.",
        ON + "is 1.50 [1.40, 1.60] times as fast as plain decoding.",
    ]


def test_void_timing_gives_way_to_the_priced_table() -> None:
    found = results(again=NOISE)
    assert not found.quiet and found.agrees
    assert sentences(found)[1].startswith(
        "On 15 held-out prompts, at this machine's cost curve (the timing is void, see below), it cannot be told from "
        "plain decoding (1.00 [0.90, 1.10])"
    )
    assert "make the figures void" in sentences(results(again=NOISE, priced=False))[1]


@pytest.mark.parametrize(
    ("again", "quiet", "words"),
    [
        (QUIET, True, "plain 1.000 [0.980, 1.020], static 1.000 [0.980, 1.020]: contains 1, within ±5 %."),
        (NOISE, False, "wider than ±5 %. TIMED ON A BUSY MACHINE OR ON TOO FEW PROMPTS, so these timings are void."),
        (Interval(1.0, 0.94, 1.0), False, "TIMED ON A BUSY MACHINE"),
        (Interval(1.02, 1.01, 1.03), False, "EXCLUDES 1"),
    ],
)
@pytest.mark.parametrize("arm", ["again", "static_again"])
def test_aa_check_passes_only_if_it_is_narrow(arm: str, again: Interval, quiet: bool, words: str) -> None:
    """Noise that only one of the arms met voids the table, too."""
    found = results(**{arm: again})
    assert found.quiet == quiet and words in found.aa_check()
    table = markdown(found)
    assert words in table and ("VOID" in table) == (not quiet)
    shown = " ".join(screen(found, Path("runs/x"), "spec-envs eval runs/x", Path("runs/x")).split())
    todo = "Read the priced table, or time again while the machine does nothing else: spec-envs eval runs/x"
    assert (todo in shown) == (not quiet)


def test_link_exit_and_priced_tables() -> None:
    assert "as fast as the cloud alone" in sentences(replace(results(), link="4g-driving"))[1]
    priced = results(priced=False)
    priced.machine = replace(priced.machine, clock="my-table")
    assert sentences(priced)[1].startswith("On 15 held-out prompts, priced by the cost table my-table, it is 1.50")
    table = markdown(priced)
    assert "Priced: every forward costs what the cost table my-table lists" in table and "Timed:" not in table
    exits = replace(results(), decisions={}, actions={})
    exits.arms["trained exit"] = row(**{"plain": SLOWER, "untrained exit": FASTER})
    found = Exit(
        exit_layer=2, adapter="head", k=3, accept_rate_before=0.41, accept_rate_after=0.55, emitted_per_cycle_before=1.4,
        emitted_per_cycle_after=1.7, tokens_per_s=1.0, plain_tokens_per_s=1.0, drift=Drift(1.0, 0.0, 0.0),
        cost_of_a_cycle={"draft": 0.3, "verify": 1.0, "whole": 1.4},
    )  # fmt: skip
    assert sentences(replace(exits, exit=found)) == [
        "Learning raised the accepted share of the exit's drafts from 0.41 to 0.55.",
        "On 15 held-out prompts decoding with the trained exit is only 0.80 [0.70, 0.90] times as fast as plain decoding, "
        "and is 1.50 [1.40, 1.60] times as fast as with the untrained exit.",
    ]
    same = replace(found, accept_rate_after=0.41)
    assert sentences(replace(exits, exit=same))[0] == "Learning left the accepted share of the exit's drafts at 0.41."


def test_screen_is_short_and_says_where_to_look_next() -> None:
    shown = screen(results(again=NOISE), Path("runs/x"), "spec-envs eval runs/x", Path("runs/x"))
    assert len(shown.splitlines()) <= 42
    for part in (
        "ppo chooses depth 1",
        "Timed: ",
        "Priced: ",
        "| transformers generate | – ",
        "static: depth 1, budget 7, the best of 2 fixed settings",
        "the text stays the target's own",
        "picture:   runs/x/results.png",
        "tensorboard --logdir runs/x",
        "--run runs/x",
    ):
        assert part in shown or part in " ".join(shown.split()), part
    assert "--run" not in screen(results(), Path("runs/mixes/a"), "spec-envs eval", None)
    replayed = results()
    replayed = replace(replayed, divergences=None, machine=replace(replayed.machine, clock="a trace's costs"))
    assert "spec-envs generate" not in screen(replayed, Path("runs/x"), "spec-envs eval runs/x", Path("runs/x"))


def test_results_survive_json_and_those_of_before_are_read(tmp_path: Path) -> None:
    found = results()
    written = json.loads(json.dumps(to_json(found)))
    assert from_json(Results, written) == found
    del written["at_prices"]
    assert from_json(Results, written) == replace(found, at_prices=None)
    for some in (found, replace(found, at_prices=None)):
        draw(some, tmp_path / "results.png")
        assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_columns_are_aligned() -> None:
    assert aligned(["a", "long"], [["wide cell", "1"], ["x", "22"]]) == [
        "| a         | long |",
        "|-----------|------|",
        "| wide cell | 1    |",
        "| x         | 22   |",
    ]
