"""Every keyword argument has an effect or is refused, and any value gives an environment or one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from spec_envs.controls import CONTROLS
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.traces.recording import DEFAULTS
from spec_envs.decoding.traces.synthetic import PROFILES, Profile
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.traces.plan import Plan
from spec_envs.network.link import load_link
from spec_envs.settings import Settings, keyword_types
from spec_envs.vector.env import ReplayVectorEnv
from tests.support.recordings import sizes

NAME = "qwen2.5-coder-32b-cpu"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def shared(traces: dict[str, Trace], plans: dict[str, Plan]) -> dict[str, Any]:
    """Return keyword arguments of an environment that replays trees."""
    return {"trace": str(traces["tree"].folder), "max_new_tokens": 20, **sizes(plans["tree"])}


def test_listed_defaults_are_those_of_settings() -> None:
    assert {name: Settings.model_fields[name].default for name in DEFAULTS} == DEFAULTS


def test_settings_are_frozen() -> None:
    settings = Settings.read(CONTROLS["k"], {"pace": np.float32(2), "k_max": 4})
    assert settings.pace == 2.0 and settings == Settings.shared({"pace": 2.0, "decision": "token"})
    with pytest.raises(ValidationError, match="frozen"):
        settings.pace = 3.0  # type: ignore[misc]


WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"target": "another"},
    {"drafter": "another"},
    {"dtype": "bfloat16"},
    {"device": "meta"},
    {"data_dir": "/tmp"},
    {"template": "none"},
    {"top_p": 0.5},
    {"top_p": 3.0},
    {"top_p": NAN},
    {"temperature": 0.5},
    {"temperature": NAN},
    {"prompts": "nonsense"},
    {"prompts": "all,nonsense"},
    {"split": "nonsense"},
]


@pytest.mark.parametrize("keywords", WITHOUT_EFFECT, ids=str)
def test_keywords_without_effect_are_refused(keywords: dict[str, Any], shared: dict[str, Any]) -> None:
    """The same rule holds on a profile, on a recorded trace and in NumPy."""
    makers: tuple[Callable[[], Any], ...] = (
        lambda: gym.make("SpecK-v0", trace=NAME, max_new_tokens=20, **keywords),
        lambda: gym.make("SpecDepth-v0", **shared | keywords),
        lambda: ReplayVectorEnv("depth", 2, **shared | keywords),
        lambda: gym.make("SpecTopK-v0", trace="smollm2-135m-topk", max_new_tokens=20, **keywords),
    )
    [name] = keywords
    for make in makers:
        with pytest.raises(
            ValueError, match=rf"^{name} is|recorded with {name}|no texts of the prompts|device .* cannot"
        ):
            make()


def test_defaults_and_recorded_values_are_accepted(shared: dict[str, Any], traces: dict[str, Trace]) -> None:
    manifest = traces["tree"].manifest
    same = {name: getattr(manifest, name) for name in ("target", "drafter", "dtype", "template")}
    same |= {"device": "cpu", "temperature": 0.0, "top_p": 1.0, "data_dir": None}
    gym.make("SpecDepth-v0", **shared | same)
    ReplayVectorEnv("depth", 2, **shared | same)
    default = {"target": "smollm2-135m", "drafter": "auto", "dtype": "auto", "device": "auto"}
    gym.make("SpecK-v0", trace=NAME, **default, temperature=None)
    for split in ("train", "validation", "test", "all"):
        gym.make("SpecK-v0", trace=NAME, split=split)


def test_prompts_of_profile_are_its_kinds() -> None:
    env: Any = gym.make("SpecK-v0", trace=NAME, prompts="code,math").unwrapped
    assert {prompt.task for prompt in env.prompts} == {"code", "math"}
    env = gym.make("SpecK-v0", trace=NAME).unwrapped
    assert {prompt.task for prompt in env.prompts} == {"code", "math", "prose"}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"trace": ""}, "trace is ''; expected a folder"),
        ({"trace": "x" * 5000}, "no trace folder and no synthetic profile"),
        ({"trace": "a\0b"}, "no trace folder and no synthetic profile"),
        ({"trace": "~nobody/x"}, "no trace folder and no synthetic profile"),
        ({"clock": "x" * 5000}, "no cost table"),
        ({"clock": ["wall", "qwen3-14b-a6000"]}, "several clocks need cost tables"),
        ({"clock": []}, "clock is an empty list"),
        *(({"policy_seconds": value}, "policy_seconds is") for value in (NAN, INF, -1e-9, -1.0)),
        *(({"pace": value}, "pace is") for value in (NAN, INF, -0.1)),
        ({"max_new_tokens": 10**30}, "max_new_tokens is"),
        ({"k_max": 10**9}, "k_max is 1000000000; expected 2 to 4096"),
        ({"switch_every": -1}, "switch_every is -1"),
        ({"reward": "ltd"}, 'reward="ltd" needs episode="cycle"'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_out_of_range_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make("SpecK-v0", **{"trace": NAME, "max_new_tokens": 20, **keywords})


@pytest.mark.parametrize("name", ["policy_seconds", "pace", "top_p", "temperature", "max_new_tokens", "k_max"])
@pytest.mark.parametrize("value", ["1", True, [1], 1 + 0j])
def test_values_of_another_type_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} is"):
        gym.make("SpecK-v0", **{"trace": NAME, name: value})


def test_clock_list_with_one_entry(shared: dict[str, Any]) -> None:
    env = ReplayVectorEnv("depth", 2, **shared, clock=["qwen3-14b-a6000"])
    assert [table.name for table in env.cost_tables] == ["qwen3-14b-a6000"]
    assert ReplayVectorEnv("depth", 2, **shared, clock=["wall"]).cost_tables[0].name == shared["trace"]


@pytest.mark.parametrize("temperature", [NAN, INF, -INF, -0.1, 1e-320, 1e-9, "1", True, None])
def test_invalid_temperatures_are_refused(temperature: Any, tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"temperature is .*; expected 0 \(greedy\) or 1e-06 or more"):
        load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32", temperature)
    if isinstance(temperature, float):
        with pytest.raises(ValueError, match="temperature is"):
            gym.make("SpecDepth-v0", **tiny, temperature=temperature)
        with pytest.raises(ValueError, match="draft_temperature is"):
            gym.make("SpecDVI-v0", **tiny | {"drafter": "auto"}, draft_temperature=temperature)


@pytest.mark.parametrize("top_p", [NAN, INF, 0.0, -0.5, 1.0001, "1", True])
def test_invalid_top_p_is_refused(top_p: Any, tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"top_p is .*; expected a number in \(0, 1\]"):
        load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32", 1.0, top_p)


def test_smallest_temperature_is_greedy(tiny: dict[str, Any]) -> None:
    decoder = load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32", 1e-6)
    greedy = load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32")
    for made in (decoder, greedy):
        made.start([2, 3, 4], 20, np.random.default_rng(0))
        while not made.finished:
            made.cycle(2)
    assert decoder.tokens == greedy.tokens


def table(rows: str = '"1"', verify: str = "0.1", draft: str = '{"1": 0.1}') -> str:
    """Return the text of a cost table, valid by default."""
    return f'{{"verify": {{{rows}: {verify}}}, "draft": {draft}}}'


TABLES = [
    *(table(verify=bad) for bad in ("NaN", "Infinity", "-1", "0", "1e-320", "1e999")),
    *(table(draft=f'{{"1": {bad}}}') for bad in ("NaN", '"0.1"', "true", "null", "[1]", "{}")),
    *(table(rows=f'"{bad}"') for bad in ("x", "1.5", "0", "-1", "true", "", "1e3")),
    *(table(draft=bad) for bad in ("{}", "[]", "1", "null", '"a"')),
    *(
        '{"verify": {"1": 0.1}}',
        '{"verify": {}, "draft": {}}',
        "{}",
        "[]",
        "null",
        "1",
        "",
        "{",
        "nonsense",
        "\x00",
        "[" * 10000,
    ),
]


@pytest.mark.parametrize("text", TABLES, ids=range(len(TABLES)))
def test_invalid_cost_table_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine.json is not a cost table \(.*\); expected") as error:
        CostTable.load(str(path))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="is not a cost table"):
        gym.make("SpecK-v0", trace=NAME, clock=str(path))


def test_cost_tables_from_dictionaries(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text(table())
    assert CostTable.load(str(good)).seconds("verify", 1) == 0.1
    for bad in ({1: NAN}, {1: True}, {True: 1.0}, {}, {"1": 1.0}, {1: 0.0}, {0: 1.0}, [1.0]):
        with pytest.raises(ValueError, match="mine is not a cost table"):
            CostTable("mine", bad, {1: 1.0})  # type: ignore[arg-type]
    assert CostTable("mine", {1: 1}, {1: np.float64(0.5)}).seconds("draft", 1) == 0.5


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(
            ((name,), bad)
            for name in ("static_over_plain", "concentration")
            for bad in (NAN, INF, 0, -1, "4", True, 1e-320)
        ),
        *((("prompt_tokens",), bad) for bad in (0, -1, 1.5, 10**9, "64")),
        *((("kinds", "code", "weight"), bad) for bad in (0, -1, 1.5, 10**9, "2", True)),
        *(
            (("kinds", "code", "acceptance"), bad)
            for bad in ([], [NAN], [0.0], [1.0], [1.5], [-0.1], ["0.5"], 0.5, [1e-320])
        ),
        (("kinds", "code", "snippet"), 5),
        (("clock",), 5),
        (("kinds",), []),
        (("kindz",), {}),
    ],
    ids=str,
)
def test_invalid_profiles_are_refused(path: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    raw = json.loads((PROFILES / f"{NAME}.json").read_text())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"mine.json is not a synthetic profile \(.*\); see those in"):
        Profile.load(str(file))


@pytest.mark.parametrize(
    "bad", ["up=nan", "up=inf", "up=-1", "up=0", "up=1e-320", "rtt=nan", "rtt=1e300", "loss=1", "loss=0.999999"]
)
def test_invalid_links_are_refused(bad: str) -> None:
    name = bad.partition("=")[0]
    parts = [part for part in ("up=46", "down=563", "rtt=50") if not part.startswith(name)]
    with pytest.raises(ValueError, match="is not a link"):
        load_link("constant:" + ",".join([*parts, bad]))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 20),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=12),
    st.sampled_from(
        ["all", "cycle", "prompt", "saved", "ltd", "default", "token", "wall", "auto", "cpu", "random", "test"]
    ),
    st.lists(st.integers(-2, 40), max_size=4),
    st.lists(st.text(max_size=4), max_size=2),
    st.sampled_from([NAN, INF, -INF, 1e-320, 1e308, 2**63, -(2**70), np.int64(3), np.float32(0.5), b"x", {}, object()]),
)
KEYWORDS = {
    name: sorted(set(keyword_types(CONTROLS[name])) - {"trace", "engine", "render_mode"}) for name in ("k", "depth")
}


def some_of(control: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(KEYWORDS[control]), VALUES, min_size=1, max_size=3)


def works_or_is_refused(make: Callable[[], Any]) -> None:
    """Assert that the arguments give an environment that can be stepped, or one sentence."""
    try:
        env = make()
    except (TypeError, ValueError) as error:
        assert re.fullmatch(r"[^\n]{10,}", str(error)), error
        return
    count = () if isinstance(env, gym.Env) else (env.num_envs,)
    env.reset(seed=0)
    for _ in range(3):
        _, reward, *_ = env.step(np.zeros(count, int))
        assert np.isfinite(reward).all()
        env.reset()
    env.close()


@pytest.mark.fuzz
@settings(max_examples=settings.default.max_examples * 2)
@given(keywords=some_of("k"))
def test_any_keywords_on_profile_work_or_are_refused(keywords: dict[str, Any]) -> None:
    works_or_is_refused(lambda: gym.make("SpecK-v0", **{"trace": NAME, "max_new_tokens": 16, **keywords}))


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixture only reads
@given(keywords=some_of("depth"))
def test_any_keywords_on_trace_work_or_are_refused(keywords: dict[str, Any], shared: dict[str, Any]) -> None:
    works_or_is_refused(lambda: gym.make("SpecDepth-v0", **shared | keywords))
    works_or_is_refused(lambda: ReplayVectorEnv("depth", 2, **shared | keywords))
