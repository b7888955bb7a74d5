"""The published chain controllers follow their papers, decode, and can be tuned."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

from spec_envs.agents import AGENTS
from spec_envs.agents.rules.adaptive_k import AdaptiveKAgent, AdaptiveSpecController, SpecConfig
from spec_envs.agents.rules.base import ChainRule
from spec_envs.controls import Policy, make_control
from spec_envs.controls.k import KControl
from spec_envs.decoding.traces.synthetic import PROFILES
from spec_envs.experiments import tune
from spec_envs.experiments.config import load_experiment
from spec_envs.generation import Generation
from tests.support.observations import observation_of
from tests.support.rollouts import generation_under

NAME = "qwen2.5-coder-32b-cpu"
RULES = sorted(name for name, kind in AGENTS.items() if isinstance(kind, type) and issubclass(kind, ChainRule))


def controller(rate: float, k: int = 12, **settings: Any) -> AdaptiveSpecController:
    """Return a controller that has seen 1,000 drafted tokens with this rate of acceptance."""
    found = AdaptiveSpecController(SpecConfig(k_current=k, acceptance_window=1000, **settings))
    found.record_acceptance(round(1000 * rate), 1000)
    return found


def test_published_defaults() -> None:
    config = SpecConfig()
    assert (config.k_min, config.k_max, config.k_current) == (4, 24, 8)
    assert (config.target_acceptance, config.adjustment_interval, config.acceptance_window) == (0.55, 64, 128)
    assert AdaptiveSpecController().get_rolling_acceptance() == 0.5


@pytest.mark.parametrize(
    ("rate", "change"),
    [
        (1.0, 4), (0.651, 4), (0.65, 2), (0.551, 2), (0.55, 0), (0.5, 0), (0.45, 0), (0.449, -2), (0.35, -2),
        (0.349, -4), (0.0, -4),
    ],
)  # fmt: skip
def test_rate_decides_change_of_k(rate: float, change: int) -> None:
    assert controller(rate).compute_new_k() == 12 + change


@pytest.mark.parametrize(
    ("rate", "k", "expected"),
    [(0.9, 22, 24), (0.9, 24, 24), (0.6, 23, 24), (0.1, 6, 4), (0.1, 4, 4), (0.4, 5, 4), (0.5, 4, 4), (0.5, 24, 24)],
)
def test_k_stays_within_bounds(rate: float, k: int, expected: int) -> None:
    found = controller(rate, k)
    assert found.compute_new_k() == expected == found.config.k_current


@pytest.mark.parametrize(
    ("snippet", "k", "expected"),
    [
        ("def f(x): return {x[0]: (x[1])};", 8, 16),
        ("def f(x): return {x[0]: (x[1])};", 20, 24),
        ("```python", 8, 16),
        ("∀ x ∃ y", 12, 8),
        ("hence, therefore, x", 6, 4),
        ('{"a": 1}', 16, 6),
        ('and "type": "x" it is', 16, 6),
        ("A sunny day.", 9, 9),
        ("- one\n- two", 9, 9),
    ],
)
def test_k_for_context(snippet: str, k: int, expected: int) -> None:
    found = AdaptiveSpecController(SpecConfig(k_current=k))
    assert found.get_k_for_context(snippet) == expected
    assert found.config.k_current == k


def test_k_for_json_is_at_least_k_min() -> None:
    assert AdaptiveSpecController(SpecConfig(k_min=7)).get_k_for_context('{"a"') == 7


def test_rolling_acceptance_is_ratio_of_sums_over_window() -> None:
    found = AdaptiveSpecController(SpecConfig(acceptance_window=16))
    found.record_acceptance(0, 1)
    found.record_acceptance(8, 8)
    assert found.get_rolling_acceptance() == 8 / 9  # the mean of rates would be 1/2
    for _ in range(2):
        found.record_acceptance(2, 8)
    assert found.get_rolling_acceptance() == 4 / 16  # the first two have left the window


def test_adjusts_once_per_interval() -> None:
    found = AdaptiveSpecController(SpecConfig(adjustment_interval=10))
    found.record_acceptance(8, 8)
    assert not found.should_adjust()  # nine tokens: eight accepted and one from the target
    found.record_acceptance(0, 8)
    assert found.should_adjust()
    found.compute_new_k()
    assert not found.should_adjust()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k_min": 9}, "k_min, k_current and k_max are 9, 8 and 24; expected ascending"),
        ({"target_acceptance": 1.5}, "target_acceptance is 1.5"),
        ({"acceptance_window": 0}, "expected 1 or more tokens"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpecConfig(**settings)
    with pytest.raises(ValueError, match="accepted is 3 of 2 drafted; expected 0 to 2"):
        AdaptiveSpecController().record_acceptance(3, 2)


def test_audit_log_records_each_change_of_k(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "audit.jsonl"
    found = AdaptiveSpecController(SpecConfig(k_current=22), log, session="s1")
    for accepted in (8, 8, 0, 0, 0, 0, 0, 0):
        found.record_acceptance(accepted, 8)
        found.compute_new_k()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(set(line) == {"ts", "session", "level", "cat", "msg", "details"} for line in lines)
    assert {line["cat"] for line in lines} == {"SPEC_ADJUST"} and {line["session"] for line in lines} == {"s1"}
    moves = [tuple(map(int, line["msg"].removeprefix("K: ").split(" -> "))) for line in lines]
    assert moves[0] == (22, 24)  # limited to k_max, and no line where K stays the same
    assert all(a != b for a, b in moves) and all(b == c for (_, b), (c, _) in itertools.pairwise(moves))


def test_schedule_adds_two_and_subtracts_one() -> None:
    control = KControl(8)
    agent = AGENTS["hf-schedule"](control=control)
    chosen = [agent.predict(observation_of(control), episode_start=np.array([True]))[0]]
    for accepted in (1.0, 1.0, 0.9, 0.0, 0.0):
        chosen.append(agent.predict(observation_of(control, last_k=0.5, last_acceptance=accepted))[0])
    assert chosen == [5, 7, 8, 7, 6, 5]


@pytest.mark.parametrize(
    ("name", "settings", "continuing", "stopping"),
    [
        ("confidence", {}, {"probability": 0.41}, {"probability": 0.39}),
        ("confidence", {"cumulative": True}, {"path": 0.41, "probability": 0.1}, {"path": 0.39, "probability": 1.0}),
        ("svip", {"threshold": 0.6}, {"entropy": 0.035}, {"entropy": 0.037}),  # √0.36 = 0.6 nats^½
        ("adaedl", {"threshold": 0.4}, {"entropy": 0.17}, {"entropy": 0.19}),  # 1 − √(0.2 H) = 0.4 at H = 1.8
    ],
)
def test_rules_stop_at_threshold(name: str, settings: dict[str, Any], continuing: dict, stopping: dict) -> None:
    control = KControl(8, decision="token")
    agent = AGENTS[name](control=control, **settings)
    assert agent.predict(observation_of(control))[0] == 1  # the first token is always drafted
    assert agent.predict(observation_of(control, drafted=0.125, **continuing))[0] == 1
    assert agent.predict(observation_of(control, drafted=0.25, **stopping))[0] == 0


def test_adaedl_threshold_follows_acceptance_rate() -> None:
    control = KControl(8, decision="token")
    agent = AGENTS["adaedl"](control=control)
    before = agent.threshold
    for _ in range(5):
        agent.predict(observation_of(control, last_k=0.5, last_acceptance=0.2))
    assert agent.threshold == pytest.approx(before + 5 * 0.1 * 0.01)  # acceptance is below the desired rate: stricter
    raised = agent.threshold
    for _ in range(20):
        agent.predict(observation_of(control, last_k=0.5, last_acceptance=1.0))
    assert agent.threshold < raised


@pytest.mark.parametrize(
    ("decision", "entries", "drafted"),
    [("token", {"free": 1.0}, 3), ("token", {}, 2), ("cycle", {"match": 2 / 16}, 3), ("cycle", {"match": 1 / 16}, 2)],
)
def test_copy_k_decides_by_the_first_token(decision: str, entries: dict[str, float], drafted: int) -> None:
    control = KControl(4, decision=decision)
    agent = AGENTS["copy-k"](control=control, k=2, k_copied=3)
    if decision == "cycle":
        assert agent.predict(observation_of(control, **entries))[0] == drafted
        return
    chain = [
        observation_of(control, drafted=n / 4, **(entries if n == 0 else {"free": 1.0 - len(entries)}))
        for n in range(4)
    ]
    assert [agent.predict(seen)[0] for seen in chain] == [1] * drafted + [0] * (4 - drafted)
    assert AGENTS["copy-k"](control=KControl(4), k_copied=9).predict(observation_of(KControl(4), match=1.0))[0] == 4


def test_gammatune_follows_accepted_length() -> None:
    control = KControl(16)
    agent = AGENTS["gammatune"](control=control, k=8, memory=0.5, growth=2.0, slack=1.0)
    assert agent.predict(observation_of(control), episode_start=np.array([True]))[0] == 8
    assert agent.predict(observation_of(control, last_k=0.5, last_acceptance=0.375))[0] == 6  # (7 + 3)/2 + 1
    assert agent.predict(observation_of(control, last_k=0.375, last_acceptance=1.0))[0] == 9  # 6 + 2 + 1


def test_ucb_finds_best_k() -> None:
    """Each token is accepted with probability 0.5; enumeration gives the best length at this cost."""
    control, rng, cost = KControl(8), np.random.default_rng(0), 0.1
    agent = AGENTS["ucb"](control=control, cost=cost, exploration=0.05, discount=1.0)
    worth = {k: sum(0.5**i for i in range(k + 1)) / (1 + cost * k) for k in agent.arms.tolist()}
    chosen: list[int] = []
    observation, start = observation_of(control), np.array([True])
    for _ in range(3000):
        k, _ = agent.predict(observation, episode_start=start)
        accepted = int(np.argmin(np.append(rng.random(k) < 0.5, False)))
        observation, start = (
            observation_of(control, last_k=k / 8, last_acceptance=accepted / k if k else 0.0),
            np.array([False]),
        )
        chosen.append(k)
    common = max(set(chosen[-1000:]), key=chosen[-1000:].count)
    assert worth[common] > 0.98 * max(worth.values())


def test_specdec_learns_acceptance_and_saves_it(tmp_path: Path) -> None:
    """On the profile a token's reported probability is its chance of acceptance, which a head fitted without extra
    weight has to find."""
    keywords = {"trace": NAME, "decision": "token", "max_new_tokens": 256}
    env = gym.make("SpecK-v0", **keywords).unwrapped
    agent = AGENTS["specdec++"](control=env.control, rejection_weight=1.0).learn(4000, env)
    rng, done, errors = np.random.default_rng(1), True, []
    for _ in range(400):
        if done:
            observation, _ = env.reset()
        observation, _, done, _, info = env.step(int(rng.random() < 0.8))
        if not info["emitted"]:
            found = agent.acceptance(observation)
            errors.append(abs(found - float(observation[env.control.slices["probability"]][0])))
    assert np.mean(errors) < 0.12
    agent.save(tmp_path)
    again = AGENTS["specdec++"](control=env.control)
    again.load(tmp_path)
    assert again.acceptance(observation) == agent.acceptance(observation)
    with pytest.raises(ValueError, match="cannot read the policy"):
        again.load(tmp_path / "nowhere")


@pytest.mark.parametrize("stanza", ["ucb", "ppo-live"])
def test_useless_drafter_is_not_used(stanza: str, tmp_path: Path) -> None:
    """If almost nothing is accepted, learning controllers end at K = 0: on held-out texts at least 0.97 of plain
    speed."""
    profile = json.loads((PROFILES / f"{NAME}.json").read_text())
    for kind in profile["kinds"].values():
        kind["acceptance"] = [0.01]
    path = tmp_path / "useless.json"
    path.write_text(json.dumps(profile | {"static_over_plain": 1.0}))
    overrides = [f"env.trace={path}", "env.max_new_tokens=256"]
    experiment = load_experiment("SpecK-v0", stanza, overrides)
    env = gym.make("SpecK-v0", **experiment.env).unwrapped
    agent = AGENTS[experiment.agent](control=env.control, **experiment.hyperparameters)
    if stanza == "ppo-live":
        agent.learn(8192, env)
    rates = [
        Generation(env.decoder, Policy(env.control, agent), [2] * 64, 1024, np.random.default_rng(seed)).run()
        for seed in range(4)
    ]
    assert np.mean([done.tokens_per_second for done in rates[1:]]) > 0.97 * env.plain_rate


def test_adaptive_agent_changes_k_with_kind_of_text(tmp_path: Path) -> None:
    control = KControl(24)
    agent = AdaptiveKAgent(control, audit_log=str(tmp_path / "log.jsonl"))
    code, prose = np.zeros((2, *control.observation_space.shape), np.float32)  # type: ignore[misc]
    code[control.slices["kind"].start] = prose[control.slices["kind"].start + 1] = 1
    start = np.array([True])
    assert agent.predict(prose, episode_start=start)[0] == 8
    for _ in range(3):  # the rule's addition for code is undone for prose
        assert agent.predict(code, episode_start=start)[0] == 16
        assert agent.predict(prose, episode_start=start)[0] == 8
    assert agent.predict(code, episode_start=start)[0] == 16  # K is adjusted from here on
    code[control.slices["last_k"]], code[control.slices["last_acceptance"]] = 16 / 24, 1.0
    chosen = [agent.predict(code)[0] for _ in range(4)]
    assert chosen == [16, 16, 16, 20]  # 17 tokens a cycle: the interval of 64 ends in the fourth
    details = [json.loads(x)["details"] for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert details == [*[{"context": "code"}, {"context": "prose"}] * 3, {"context": "code"}, {"acceptance": 1.0}]
    assert agent.predict(prose, episode_start=start)[0] == 12


def test_adaptive_agent_adjusts_after_each_segment() -> None:
    """A segment shows only its acceptance rate: its 64 tokens are an interval whatever was accepted, and segments
    of plain decoding do not count."""
    control = KControl(24, adjustment_interval=64)
    agent = AdaptiveKAgent(control, use_context=False)
    assert agent.predict(observation_of(control), episode_start=np.array([True]))[0] == 8
    assert agent.predict(observation_of(control, last_k=8 / 24, last_acceptance=0.2))[0] == 4
    assert agent.controller.get_rolling_acceptance() == pytest.approx(0.2, abs=0.01)
    agent.predict(observation_of(control, last_k=0.0, last_acceptance=0.0))
    assert agent.controller.get_rolling_acceptance() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("name", RULES)
def test_controllers_are_faster_than_plain(name: str) -> None:
    """Each stanza of the YAML, run by ``generate`` on the profile, is faster than plain decoding and varies K."""
    stricter = ["hyperparameters.threshold=0.7"] if name == "adaedl" else []  # the profile's entropies are low
    experiment = load_experiment("SpecK-v0", name, [f"env.trace={NAME}", *stricter])
    control = make_control("SpecK-v0", experiment.env)
    env = gym.make("SpecK-v0", **experiment.env).unwrapped
    agent = AGENTS[experiment.agent](control=control, **experiment.hyperparameters).learn(2000, env)
    rates, lengths = [], set()
    for seed in range(3):
        done = generation_under(env, control, agent, 96, seed)
        rates.append(done.tokens_per_second)
        lengths |= {cycle.drafted for cycle in done.cycles}
    assert np.mean(rates) > env.plain_rate
    assert len(lengths) > 1


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("svip", {}, 'SvipAgent needs a control of SpecK-v0 with decision="token", not one with decision="cycle"'),
        ("hf-schedule", {"decision": "token"}, 'ScheduleAgent needs a control of SpecK-v0 with decision="cycle"'),
        (
            "svip",
            {"decision": "token", "observation": "counters"},
            "SvipAgent looks at drafted, entropy, free, path, which",
        ),
    ],
)
def test_controllers_refuse_unsuitable_problems(name: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AGENTS[name](control=KControl(**own))


@pytest.mark.parametrize("name", RULES)
def test_tuning_writes_valid_hyperparameters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best hyper-parameters are valid for the stanza; an interrupted study continues; other settings are
    refused."""
    arguments = ["tune", "SpecK-v0", "--agent", name, "--root", str(tmp_path), "--prompts", "3", "--tokens", "48"]
    arguments += ["--set", f"env.trace={NAME}", "total_timesteps=600"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--trials", "2"])
    tune.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--trials", "4"])
    tune.main()
    assert "4 trials, each decoded 3 training prompts of at most 48 tokens; first " in capsys.readouterr().out
    folder = tmp_path / "SpecK-v0" / name
    note = (folder / "best.yml").read_text()
    assert note.startswith("# Budget: 4 trials, each decoded 3 training prompts of at most 48 tokens\n")
    best = yaml.safe_load(note)["hyperparameters"]
    overrides = [f"hyperparameters.{key}={json.dumps(value)}" for key, value in best.items()]
    experiment = load_experiment("SpecK-v0", name, overrides)
    AGENTS[name](control=make_control("k", experiment.env), **experiment.hyperparameters)
    assert (folder / "history.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", [*arguments, "--trials", "4", "--tokens", "32"])
    with pytest.raises(SystemExit, match="was begun with another tokens; choose another --root, or delete it"):
        tune.main()
