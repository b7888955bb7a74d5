"""Traces of several drafters over the same texts answer every choice between them as live decoding does."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs import recordings
from spec_envs.controls import make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.traces.portfolio import CONTENTS, PortfolioTrace, check_same_texts
from spec_envs.decoding.traces.recorder import Recorder
from spec_envs.decoding.traces.trace import Trace
from tests.support.recordings import costs_of

if TYPE_CHECKING:
    from spec_envs.experiments.traces.plan import Plan

CYCLES = 400


def test_replay_equals_live_environment(portfolio: PortfolioTrace, portfolio_plan: Plan, tmp_path: Path) -> None:
    """Observations, accepted and emitted tokens, and seconds, which differ if any forward has other rows."""
    costs = costs_of(portfolio, tmp_path)
    sizes = {
        key: portfolio_plan.env[key] for key in ("sizes", "depths", "width", "max_new_tokens", "drafter", "target")
    }
    shared = {"split": "all", "clock": costs, **sizes}
    replay: Any = gym.make("SpecDrafter-v0", trace=str(portfolio.folder), **shared).unwrapped
    models = {key: portfolio_plan.env[key] for key in ("device", "dtype")}
    live: Any = gym.make("SpecDrafter-v0", **models, **shared).unwrapped
    prompts = {tuple(ids): prompt for prompt, ids in live.prompts.encoded.items()}
    rng, cycles, asked = np.random.default_rng(0), 0, set()
    while cycles < CYCLES:
        for prompt, ids in replay.prompts.encoded.items():
            if tuple(ids) not in prompts:
                continue
            from_trace, _ = replay.reset(seed=3, options={"prompt": prompt})
            seen, _ = live.reset(seed=3, options={"prompt": prompts[tuple(ids)]})
            done = False
            while not done:
                np.testing.assert_allclose(from_trace, seen, atol=1e-6)
                # the same drafter for a while, so that the others have much to catch up with
                action = int(rng.integers(live.action_space.n)) if rng.random() < 0.5 else 0
                from_trace, mine, done, _, info = replay.step(action)
                seen, theirs, ended, _, actual = live.step(action)
                assert done == ended and mine == pytest.approx(theirs, abs=1e-9)
                for name in ("emitted", "accepted", "drafted", "verified", "drafter", "tokens", "seconds", "saved"):
                    assert info.get(name) == pytest.approx(actual.get(name)), name
                cycles += 1
                asked.add(action)
    assert len(asked) == live.action_space.n


def test_traces_are_those_of_each_drafter(portfolio: PortfolioTrace, portfolio_plan: Plan) -> None:
    """Each is a trace of its own, which its own problem replays."""
    kinds = [trace.kind for trace in portfolio.traces.values()]
    assert kinds == ["chain", "tree", "chain", "chain", "chain", "tree"]
    lookup, tree, *_ = portfolio.traces.values()
    lookup.check(make_control("SpecK-v0", {"k_max": 5}))
    tree.check(make_control("SpecTree-v0", {"max_depth": 2, "width": 3}))
    assert portfolio.settings()["drafter"] == portfolio_plan.env["drafter"]
    assert portfolio.rows == tree.rows and portfolio.of_split("test") == tree.of_split("test")


def test_costs_have_a_curve_for_every_drafter_with_weights(portfolio: PortfolioTrace) -> None:
    table = portfolio.costs()
    free = {"lookup", "suffix"}
    assert list(table.drafters) == [name for name in portfolio.traces if name not in free]
    for name, trace in portfolio.traces.items():
        assert name in free or table.seconds(f"draft:{name}", 1) == trace.costs().seconds("draft", 1)


def test_one_copy_per_process(portfolio: PortfolioTrace) -> None:
    assert recordings.load(str(portfolio.folder)) is PortfolioTrace.load(portfolio.folder)
    assert pickle.loads(pickle.dumps(portfolio)).folder == portfolio.folder


def test_foreign_and_damaged_traces_are_refused(
    portfolio: PortfolioTrace, traces: dict[str, Trace], portfolio_plan: Plan, tmp_path: Path
) -> None:
    sizes = {key: portfolio_plan.env[key] for key in ("sizes", "depths", "width", "target")}
    clock = PricedClock(CostTable("made up", {1: 1.0}, {1: 0.1}))
    other = make_control("SpecDrafter-v0", sizes | {"drafter": "lookup,suffix"})
    with pytest.raises(
        ValueError, match=r"is of the drafters lookup,.*, but the problem has lookup,suffix; pass drafter="
    ):
        portfolio.decoder(other, clock)
    given = sizes | {"drafter": portfolio_plan.env["drafter"]}
    for wrong, message in (
        ({"sizes": (1, 2, 9)}, "is 4 expansions deep, but max_depth is 8"),
        ({"depths": (0, 1, 3)}, "is 2 expansions deep, but max_depth is 3"),
        ({"width": 4}, "was recorded with width 3, not 4"),
    ):
        with pytest.raises(ValueError, match=message):
            portfolio.check(make_control("SpecDrafter-v0", given | wrong))
    with pytest.raises(ValueError, match="is of several drafters; give SpecK-v0 the trace of one of them"):
        portfolio.check(make_control("SpecK-v0", {}))
    with pytest.raises(ValueError, match="has trees, which do not replay SpecDrafter-v0"):
        traces["tree"].check(make_control("SpecDrafter-v0", given))
    with pytest.raises(ValueError, match="are of different texts; delete both and record them again"):
        check_same_texts([traces["tree"], with_other_texts(traces["chain"])])
    damaged = tmp_path / "damaged"
    shutil.copytree(portfolio.folder, damaged)
    for place in ("../elsewhere", ".."):
        (damaged / CONTENTS).write_text(f'{{"version": 1, "drafters": {{"lookup": "{place}"}}}}')
        with pytest.raises(ValueError, match=r"is damaged .*not folders beside it.*record the trace again"):
            PortfolioTrace.load(damaged)
    exchanged = tmp_path / "exchanged"
    shutil.copytree(portfolio.folder, exchanged)
    (exchanged / CONTENTS).write_text('{"version": 1, "drafters": {"lookup": "4-suffix", "suffix": "0-lookup"}}')
    with pytest.raises(ValueError, match=r"4-suffix is of the drafter 'suffix', but .* says 'lookup'; delete"):
        PortfolioTrace.load(exchanged)


def with_other_texts(trace: Trace) -> Trace:
    """Return a trace in which a token differs."""
    columns = dict(trace.columns)
    columns["tokens"] = np.array(columns["tokens"])
    columns["tokens"][3] += 1
    return Trace(trace.folder, trace.manifest, columns)


def test_text_is_written_once_for_all_drafters(portfolio: PortfolioTrace, portfolio_plan: Plan) -> None:
    """What a drafter proposes is the same whether the target writes the text or reads it."""
    name, head = list(portfolio.traces.items())[1]
    decoder, text = portfolio_plan.parts[name].decoder(), head.texts[0]
    written = Recorder(decoder).record(text.prompt, head.max_new_tokens)
    read = Recorder(decoder).record(text.prompt, head.max_new_tokens, written)
    assert set(written) == set(read) and written["tokens"].tolist() == head.columns["tokens"][: text.tokens].tolist()
    for column in written:
        np.testing.assert_allclose(read[column], written[column], atol=1e-4)  # float32, in forwards of other shapes
