"""SpecTopK-v0: actions, observations, rewards, costs of messages, links and expected-acceptance traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs import generate
from spec_envs.agents import AGENTS
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.agents.selector.agent import RLAdapterAgent
from spec_envs.controls import make_control
from spec_envs.controls.topk import TopKControl, log_scaled
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.sampling import Proposal
from spec_envs.experiments.measure.link_references import Outcome, per_state
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.traces import record_expected as topk_trace
from spec_envs.experiments.traces.record_expected import expected_acceptance
from spec_envs.network import expected_trace as expected
from spec_envs.network.expected_trace import ExpectedTrace
from spec_envs.network.link import load_link
from tests.support.cloud_process import CloudProcess
from tests.support.commands import run_command
from tests.support.rollouts import rollout
from tests.support.texts import plain_text

JOINT: dict[str, Any] = {"actions": "joint", "k": 4, "ks": [0, 3, 8]}
TRACE = "smollm2-135m-topk"


AS_RECORDED = {"trace": TRACE, "target": "smollm2-135m", "drafter": "auto", "dtype": "auto"}


@pytest.fixture
def chain(tiny: dict, tiny_draft: Path) -> dict[str, Any]:
    """Return keyword arguments of an environment over the tiny target with a draft model."""
    return tiny | {"drafter": str(tiny_draft)}


def make(chain: dict, **keywords: Any) -> Any:
    return gym.make("SpecTopK-v0", **{**chain, **keywords})


def test_actions_are_published_candidates() -> None:
    assert TopKControl().action_space.n == 11
    assert [str(choice) for choice in TopKControl(k=4).choices[:3]] == ["4xscalar", "4x50", "4x100"]
    joint = TopKControl(**JOINT, edge_value=0.5)
    assert [str(choice) for choice in joint.choices] == [
        *("1xscalar", "1x3", "1x8", "2xscalar", "2x3", "2x8", "4xscalar", "4x3", "4x8"),
        *("1xfull", "2xfull", "4xfull", "cloud 16", "cloud 64", "edge 4"),
    ]
    assert {choice.mode for choice in TopKControl(protocol="scalar", **JOINT).choices} == {"scalar", "cloud"}


def test_default_temperature_is_1(chain: dict) -> None:
    assert make(chain).unwrapped.decoder.temperature == 1.0
    assert make(chain, temperature=0.0).unwrapped.decoder.temperature == 0.0
    assert gym.make("SpecK-v0", **chain).unwrapped.decoder.temperature == 0.0


def test_round_costs_follow_from_table_and_link(chain: dict) -> None:
    """Seconds are those of the cost table and of the link for the bytes of the encoded messages."""
    env = make(chain, ks=[0, 2, 5], k=3, link="constant:up=0.1,down=1,rtt=20", max_new_tokens=200)
    spec_env = env.unwrapped
    table, link = spec_env.decoder.clock.table, load_link("constant:up=0.1,down=1,rtt=20")
    spec_env.decoder.eos = frozenset()
    env.reset(seed=0)
    sizes = []
    for action in (1, 1, 2):
        _, _, _, _, info = env.step(action)
        assert info["seconds"]["network"] == pytest.approx(link.seconds(info["bytes_up"], info["bytes_down"]))
        assert info["seconds"]["verify"] == pytest.approx(table.seconds("verify", 4))
        sizes.append(info["bytes_up"])
    # three more entries for each of three tokens: two bytes of id, two of weight
    assert sizes[2] - sizes[1] == 3 * 3 * 4


def test_link_states_do_not_depend_on_actions(chain: dict) -> None:
    def states(action: int) -> list:
        env = make(chain, **JOINT, max_new_tokens=60).unwrapped
        env.reset(seed=5)
        found = []
        for _ in range(6):
            found.append(env.decoder.verifier.channel.link.state)
            if env.step(action)[2]:
                break
        return found

    short, other = states(0), states(8)
    assert short == other[: len(short)] or other == short[: len(other)]
    assert len({state.up_mbps for seed in range(20) for state in states(seed % 3)}) > 1


def test_cloud_action_emits_a_stream_of_plain_tokens(chain: dict) -> None:
    env = make(chain, **JOINT, max_new_tokens=40).unwrapped
    cloud = [str(choice) for choice in env.control.choices].index("cloud 16")
    env.reset(seed=3)
    _, _, _, _, info = env.step(cloud)
    assert info["emitted"] <= 16 and info["drafted"] == info["verified"] == 0
    assert info["seconds"]["verify"] == pytest.approx(info["emitted"] * 0.0496)


def test_episode_depends_on_its_seed_only(chain: dict) -> None:
    """The same seed gives the same episode whatever ran before: bytes, seconds, and the edge's estimate of its link."""
    env = make(chain, **JOINT, max_new_tokens=50).unwrapped

    def run_episode(seed: int) -> list:
        rng, found = np.random.default_rng(0), [env.reset(seed=seed)[0].tolist()]
        while not env.decoder.finished:
            seen, *_, info = env.step(int(rng.integers(env.action_space.n)))
            seconds = {part: round(s, 9) for part, s in info["seconds"].items()}
            found.append((seen.tolist(), info["bytes_up"], info["bytes_down"], info["emitted"], seconds))
        return found

    first = run_episode(4)
    run_episode(5)
    assert run_episode(4) == first


def test_real_cloud_gives_the_simulated_episode(chain: dict, tmp_path: Path) -> None:
    """Same seed and actions give the same tokens and bytes over a simulated link and through a socket to another
    process."""

    def run_episode(link: str) -> list:
        env = make(chain, **JOINT, link=link, max_new_tokens=60).unwrapped
        found = []
        for seed in range(3):
            env.reset(seed=seed)
            rng = np.random.default_rng(seed)
            while not env.decoder.finished:
                info = env.step(int(rng.integers(env.action_space.n)))[4]
                found.append((info["bytes_up"], info["bytes_down"], list(env.decoder.tokens)))
        env.close()
        return found

    with CloudProcess(tmp_path, "--target", chain["target"], "--dtype", "float32", "--device", "cpu") as cloud:
        assert run_episode(cloud.url) == run_episode("markov-1-500") == run_episode("constant-5g")


def test_greedy_text_is_plain_text_under_random_actions(chain: dict) -> None:
    env = make(chain, **JOINT, temperature=0.0, max_new_tokens=60).unwrapped
    rng = np.random.default_rng(0)
    for seed in range(4):
        env.reset(seed=seed)
        while not env.decoder.finished:
            env.step(int(rng.integers(env.action_space.n)))
        assert env.decoder.tokens == plain_text(env.decoder.plain(), env.decoder.prompt, 60)


def test_unverified_tokens_are_rewarded_by_edge_value(chain: dict) -> None:
    env = make(chain, **JOINT, edge_value=0.25, pace=0.0, max_new_tokens=60).unwrapped
    env.decoder.eos = frozenset()
    env.reset(seed=0)
    _, reward, _, _, info = env.step(env.action_space.n - 1)
    assert info["unverified"] == info["emitted"] > 0 and info["bytes_up"] == 0
    assert reward == pytest.approx(0.25 * info["emitted"])
    _, reward, _, _, info = env.step(1)  # the cloud is sent the tokens that it has not seen
    assert info["unverified"] == 0 and reward == info["emitted"]


def test_published_observation_and_reward(chain: dict) -> None:
    env = make(chain, observation="rl_adapter", reward="rl_adapter", episode="cycle").unwrapped
    seen, _ = env.reset(seed=0)
    assert seen.shape == (10,) and seen[0] == pytest.approx(env.decoder.verifier.estimate.up_mbps / 1000, rel=1e-5)
    _, reward, done, _, info = env.step(2)
    assert done and reward == pytest.approx(info["accepted"] / sum(info["seconds"].values()))
    with pytest.raises(ValueError, match='reward="rl_adapter" needs episode="cycle"'):
        make(chain, reward="rl_adapter")
    with pytest.raises(ValueError, match="reward is 'ltd'; expected one of saved, rl_adapter"):
        make(chain, reward="ltd")


def test_log_scaled() -> None:
    assert log_scaled(0.1, (0.1, 1e4)) == 0 and log_scaled(1e4, (0.1, 1e4)) == pytest.approx(1)
    assert log_scaled(10, (0.1, 1e4)) - log_scaled(1, (0.1, 1e4)) == pytest.approx(0.2)
    assert log_scaled(0, (0.1, 1e4)) == 0 and log_scaled(1e9, (0.1, 1e4)) == 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"k": 0}, "k is 0; expected 1 or more"),
        ({"ks": [5, 5]}, "ks is .*; expected different numbers"),
        ({"actions": "both"}, "actions is 'both'; expected one of k, joint"),
        ({"protocol": "topk"}, "protocol is 'topk'; expected one of auto, scalar, full"),
        ({"protocol": "scalar"}, "sends every distribution alike"),
        ({"k": 65}, "k is 65; expected at most 64"),
        ({"edge_value": 0.5}, 'edge_value is 0.5; expected 0 to 1, with actions="joint"'),
        ({"link": "tin-can"}, "no link 'tin-can'"),
        ({"observation": "rl_adapter", "actions": "joint"}, "is the published state"),
        (AS_RECORDED | {"link": "ws://127.0.0.1:1"}, "takes the place of the cloud"),
        (AS_RECORDED | {"target": "another"}, "recorded with target 'smollm2-135m', not"),
        (AS_RECORDED | {"temperature": 0.5}, "recorded with temperature 1.0"),
        (AS_RECORDED | {"dtype": "float32"}, "dtype is 'float32', which has no effect"),
        ({"trace": "nothing.npz"}, "no expected-acceptance trace 'nothing.npz'"),
    ],
)
def test_invalid_keywords_are_refused(keywords: dict, message: str, chain: dict) -> None:
    with pytest.raises(ValueError, match=message):
        make(chain, **keywords)


def test_head_that_reads_target_states_is_refused(tiny: dict) -> None:
    with pytest.raises(ValueError, match="take a draft model"):
        make(tiny)


def test_expected_acceptance_is_probability_of_acceptance(rng: np.random.Generator) -> None:
    p, q = rng.dirichlet(np.ones(12)), Proposal(np.arange(12), rng.dirichlet(np.ones(12)))
    for k in (0, 1, 4, 12):
        cut = q.truncated(k) if k else q
        hits = 0
        for _ in range(4000):
            token = cut.draw(rng.random())
            hits += rng.random() * cut.probability(token) < p[token]
        assert hits / 4000 == pytest.approx(expected_acceptance(p, q, k), abs=0.035)


def test_trace_replays_saves_and_loads(tmp_path: Path) -> None:
    keywords = {"trace": TRACE, **JOINT, "ks": [0, 50, 300], "max_new_tokens": 64}
    env = gym.make("SpecTopK-v0", **keywords)
    assert rollout(env, 1, 40) == rollout(gym.make("SpecTopK-v0", **keywords), 1, 40)
    recorded = ExpectedTrace.load(TRACE)
    assert {text.split for text in recorded.texts} == {"train", "validation", "test"}
    recorded.save(tmp_path / "again.npz")
    again = ExpectedTrace.load(str(tmp_path / "again.npz"))
    assert [t.tokens for t in again.texts] == [t.tokens for t in recorded.texts]
    assert encoded_prompts({"trace": TRACE}, "test", 3)[0].ids in [
        t.prompt for t in recorded.texts if t.split == "test"
    ]
    (tmp_path / "broken.npz").write_bytes((tmp_path / "again.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not an expected-acceptance trace"):
        ExpectedTrace.load(str(tmp_path / "broken.npz"))


@pytest.mark.parametrize("k", [50, 300])
def test_replay_accepts_at_recorded_rate(k: int) -> None:
    env = gym.make("SpecTopK-v0", trace=TRACE, k=1, ks=[k], max_new_tokens=96).unwrapped
    drafter, recorded, accepted = env.decoder.drafter, [], []
    for seed in range(60):
        env.reset(seed=seed)
        while not env.decoder.finished:
            recorded.append(float(drafter.text.acceptance[drafter.at, drafter.columns[k]]))
            info = env.step(0)[4]
            assert info["drafted"] == 1
            accepted.append(info["accepted"])
    rates = np.array(recorded)
    assert len(rates) > 3000
    assert abs(np.sum(accepted) - rates.sum()) < 4 * np.sqrt((rates * (1 - rates)).sum())


def test_per_state_is_the_best_policy(tmp_path: Path) -> None:
    """Its throughput is the largest over all policies of a small problem, computed from the Markov chain of
    decisions."""
    link = load_link("markov-1-500")
    outcomes = {
        "1x50": Outcome(1.6, 0.06, 800, 30),
        "cloud 16": Outcome(16, 0.8, 12, 400),
        "2x9": Outcome(1.9, 0.065, 9000, 30),
    }
    chosen, rate = per_state(outcomes, link)
    names = list(outcomes)
    moves = [np.linalg.matrix_power(link.transitions, n) for n in (1, 16, 1)]
    best = 0.0
    for code in range(3**6):
        policy = [code // 3**i % 3 for i in range(6)]
        p = np.array([moves[a][s] for s, a in enumerate(policy)])
        visits = np.linalg.matrix_power(p, 4096)[0]
        tokens = sum(v * outcomes[names[a]].tokens for v, a in zip(visits, policy, strict=True))
        seconds = sum(
            v * outcomes[names[a]].over(s, link.jitter_ms / 1e3)
            for v, a, s in zip(visits, policy, link.states, strict=True)
        )
        best = max(best, tokens / seconds)
    assert rate == pytest.approx(best, rel=1e-6) and len(set(chosen.values())) > 1


def test_generate_with_learn_trains_agent(chain: dict) -> None:
    control = make_control("topk", {"observation": "rl_adapter"})
    models = {name: chain[name] for name in ("target", "drafter", "device", "dtype")}
    decoder = control.open(PricedClock(CostTable.load(chain["clock"])), **models)
    decoder.eos = frozenset()
    agent = RLAdapterAgent(control, batch_size=4)
    before = len(agent.adapter.replay)
    done = generate(decoder, control, agent, [3, 4, 5], 60, seed=0, learn=True).run()
    assert len(agent.adapter.replay) - before == len(done.cycles) and agent.adapter.update_count > 0
    frozen = agent.adapter.update_count
    generate(decoder, control, agent, [3, 4, 5], 60, seed=0).run()
    assert agent.adapter.update_count == frozen
    with pytest.raises(ValueError, match="FixedAgent does not learn while it decodes"):
        generate(decoder, control, FixedAgent(control, value="4x50"), [3], 20, learn=True)


@pytest.mark.parametrize("name", ["ppo", "ddqn", "rl-adapter"])
def test_agents_control_it(name: str, chain: dict) -> None:
    keywords = (
        {"observation": "rl_adapter", "reward": "rl_adapter", "episode": "cycle"} if name == "rl-adapter" else JOINT
    )
    env = make(chain, **keywords)
    agent = AGENTS[name](control=env.unwrapped.control, seed=0)
    observation, _ = env.reset(seed=0)
    for _ in range(5):
        action, _ = agent.predict(observation, deterministic=True)
        observation, _, done, _, _ = env.step(int(action))
        if done:
            observation, _ = env.reset()


@pytest.mark.model
def test_recording_does_not_touch_shipped_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped = {path: path.read_bytes() for path in expected.TRACES.iterdir()}
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        run_command(monkeypatch, topk_trace, "--scale", "0.01", "--prompts", "gsm8k", *arguments)
        return "".join(capsys.readouterr())

    assert "runs/traces/smollm2-135m-topk.npz: 3 texts" in command("--max-new-tokens", "4")
    assert {path: path.read_bytes() for path in expected.TRACES.iterdir()} == shipped
    assert [path.name for path in Path("runs/traces").iterdir()] == ["smollm2-135m-topk.npz"]
    assert "recorded already" in command("--max-new-tokens", "4")
    with pytest.raises(SystemExit, match="was recorded with other settings; choose another --out, or delete it"):
        command("--max-new-tokens", "5")
    with pytest.raises(SystemExit, match=r"--out is trace.txt; expected a name that ends in .npz"):
        command("--out", "trace.txt")
