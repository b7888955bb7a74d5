"""The priced table beside a timed one, and the stages that a command announces."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from spec_envs.agents import AGENTS
from spec_envs.controls import Policy, make_control
from spec_envs.decoding.clock import CostTable
from spec_envs.experiments import train
from spec_envs.experiments.command import COSTS, RECORDING, STATIC, TABLE, TRAINING, Stages, about
from spec_envs.experiments.evaluate import stages_left
from spec_envs.experiments.measure.arms import Encoded, Sample, decoded, run_arms
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.experiments.measure.machine import machine
from spec_envs.experiments.measure.price_list import kept
from spec_envs.experiments.measure.statistics import at_prices
from spec_envs.experiments.measure.tables import run_tables
from spec_envs.experiments.runs import resolved
from spec_envs.sealed import write_sealed
from tests.support.runs import Run, run_of

PROMPT = Encoded("chat", [2, 3, 4, 5])
SAMPLE = Sample(PROMPT, 1, 1.0, 0.1, [0])
LINK = "constant:up=0.1,down=1,rtt=20"


@pytest.mark.parametrize("env_id", ["depth", "budget", "tree", "k", "topk", "dvi"])
def test_timed_samples_get_the_prices_of_a_priced_clock(env_id: str, tiny: dict[str, Any], tiny_draft: Path) -> None:
    """A text that was timed is priced afterwards, to rounding, as a priced clock charges it while it is decoded."""
    env = dict(tiny)
    if env_id in ("k", "topk"):
        env["drafter"] = str(tiny_draft)
    if env_id == "topk":
        env |= {"link": LINK, "temperature": 0.0}
    if env_id == "dvi":
        del env["drafter"]
        env["exit_layer"] = 3
    control = make_control(env_id, env)
    table = CostTable.load(tiny["clock"])
    samples = {}
    for clock in ("wall", tiny["clock"]):
        decoder = decoder_for(env | {"clock": clock}, control)
        agent = AGENTS["random"](control=control, seed=3)
        agent.decision_seconds = 0.001
        plain, own = decoded(decoder.plain(), None), decoded(decoder, Policy(control, agent))
        samples[clock] = [plain(PROMPT, 24, 0), own(PROMPT, 24, 0)]
    for timed, priced in zip(samples["wall"], samples[tiny["clock"]], strict=True):
        found = at_prices(timed, table)
        assert found.ids == priced.ids and not priced.forwards
        assert found.seconds == pytest.approx(priced.seconds) and found.parts == pytest.approx(priced.parts)
        assert found.prefill_seconds > 0 and found.seconds != timed.seconds


def test_table_prices_its_own_arms_only(tiny: dict[str, Any]) -> None:
    env = {**tiny, "clock": "wall", "prompts": "gsm8k"}
    control = make_control("depth", env)
    policies = {"random": Policy(control, AGENTS["random"](control=control, seed=0))}
    decoder = decoder_for(env, control)

    def other(prompt: Encoded, most: int, seed: int) -> Any:
        sample = decoded(decoder.plain(), None)(prompt, most, seed)
        return replace(sample, forwards={})

    said: list[str] = []
    costs = CostTable.load(tiny["clock"])
    found = run_tables(policies, env, decoder, 2, ["plain"], ["random"], {"other": other}, costs, said.append)
    assert found.at_prices and set(found.at_prices.arms) == {"plain", "plain again", "random"}
    assert found.at_prices.arms["plain again"].over["plain"].value == 1.0
    assert found.at_prices.costs["verify"] == costs.verify and "the run began" in found.at_prices.source
    assert len(said) == 1 and said[0].startswith("measuring 4 arms on 2 held-out prompts in turn (")
    without = run_tables(policies, env, decoder, 2, ["plain"], [], {})
    assert without.at_prices and without.seconds and without.at_prices.costs["verify"] == without.seconds["verify"]
    priced = decoder_for(tiny, control)
    assert run_tables(policies, tiny | {"prompts": "gsm8k"}, priced, 2, ["plain"], []).at_prices is None


def test_costs_of_a_run_are_used_on_its_machine_only(tiny: dict[str, Any], tmp_path: Path) -> None:
    here = machine(decoder_for(tiny | {"clock": "wall"}, make_control("depth", tiny)))
    assert kept(tmp_path, here) is None
    curves = {"verify": {1: 1.0}, "draft": {1: 0.5}}
    write_sealed(tmp_path / "clock.json", {**curves, "machine": asdict(here)})
    found = kept(tmp_path, here)
    assert found and found.verify == {1: 1.0}
    for other in ({"processor": "another"}, {"threads": 99}, {"dtype": "int8"}):
        assert kept(tmp_path, replace(here, **other)) is None
    write_sealed(tmp_path / "clock.json", curves)
    assert kept(tmp_path, here) is None


def own(tiny: dict[str, Any], *changes: str) -> list[str]:
    return [*(f"env.{key}={value}" for key, value in tiny.items() if key != "clock"), *changes]


@pytest.mark.parametrize(
    ("agent", "changes", "done", "expected"),
    [
        ("ppo-live", [], [], [COSTS, TRAINING, STATIC, TABLE]),
        ("ppo-live", [], ["clock.json"], [TRAINING, STATIC, TABLE]),
        ("ppo-live", ["env.clock=qwen3-14b-a6000"], [], [TRAINING, STATIC, TABLE]),
        ("ppo-live", ["calibrate=false"], ["static.json"], [TRAINING, TABLE]),
        ("ppo-live", [], ["clock.json", "policy.safetensors", "static.json"], [TABLE]),
        ("ddd", [], [], [COSTS, STATIC, TABLE]),
        ("ppo", [], [], [RECORDING, TRAINING, STATIC, TABLE]),
        ("hindsight", [], [], [RECORDING, TRAINING, STATIC, TABLE]),
    ],
)
def test_stages_are_those_that_are_left(
    agent: str, changes: list[str], done: list[str], expected: list[str], tiny: dict[str, Any], tmp_path: Path
) -> None:
    run: Run = run_of("SpecDepth-v0", agent, *own(tiny, *changes))
    folder = tmp_path / "SpecDepth-v0" / "run-0"
    folder.mkdir(parents=True)
    for name in done:
        (folder / name).write_text("{}")
    config = resolved(run.experiment, run.env_id, agent, 0)
    assert train.stages_of(folder, config, with_table=True) == expected
    assert train.stages_of(folder, config, with_table=False) == [s for s in expected if s not in (STATIC, TABLE)]


def test_pace_over_a_link_is_found_before_training(tiny: dict[str, Any], tiny_draft: Path, tmp_path: Path) -> None:
    env = tiny | {"drafter": str(tiny_draft), "temperature": 0.0}
    run = run_of("SpecTopK-v0", "ppo", *own(env, f"env.link={LINK}", "env.trace=null", "env.clock=wall"))
    config = resolved(run.experiment, run.env_id, "ppo", 0)
    assert train.stages_of(tmp_path, config, with_table=True) == [COSTS, STATIC, TRAINING, TABLE]
    assert stages_left(tmp_path, make_control("topk", env)) == [STATIC, TABLE]


def test_stages_are_numbered_and_those_done_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stages = Stages([TRAINING, TABLE])
    stages.begin(COSTS, "measuring")
    stages.begin(TRAINING, "training ppo")
    stages.begin(TABLE, "measuring 6 arms")
    assert caplog.messages == ["[1/2] training ppo", "[2/2] measuring 6 arms"]


def test_durations_in_words() -> None:
    assert [about(s) for s in (0.2, 9, 28, 74, 100, 3000, 9000)] == [
        "a few seconds",
        "a few seconds",
        "about 30 s",
        "about 70 s",
        "about 2 min",
        "about 50 min",
        "about 2.5 h",
    ]


def test_expected_duration_is_that_of_whole_answers() -> None:
    """The warm-up decodes a few tokens of each arm, and what it takes is scaled to the most tokens of all prompts."""

    def arm(prompt: Encoded, most: int, seed: int) -> Any:
        return replace(SAMPLE, tokens=most - 1, ids=[0] * most)

    said: list[str] = []
    run_arms({"a": arm, "b": arm}, [PROMPT] * 3, 96, "prompts", quiet=True, announce=said.append)
    assert said == ["measuring 2 arms on 3 prompts in turn (a few seconds)"]
