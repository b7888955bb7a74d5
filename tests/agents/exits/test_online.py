"""Agents that improve an exit: what they learn from, that they learn, and that a killed run resumes exactly."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from spec_envs import generate
from spec_envs.agents import AGENTS
from spec_envs.agents.exits.replay import UNDRAFTED, Replay, Segment, joined
from spec_envs.agents.journal import Journal
from spec_envs.agents.run import Run
from spec_envs.controls import make_control
from spec_envs.decoding.exits.adapter import KINDS
from spec_envs.decoding.exits.files import load_exit
from spec_envs.decoding.loading import load_decoder
from tests.support.cloud_process import FORKS
from tests.support.exits import EXIT, collect_segments, make_exit_agent
from tests.support.texts import plain_text


@pytest.mark.parametrize("block", [1, 4])
def test_segments_hold_every_verified_row(block: int, tiny: dict) -> None:
    """Every emitted token is one row, with the states from which the exit and the target predicted the next token."""
    env, agent = make_exit_agent(tiny, "dvi", "head", {"block": block})
    segments = [*collect_segments(env, agent, 3), *agent.pending]
    target, rows = agent.adapter.target, 0
    for segment in segments:
        x = target.embed(segment.ids)[None]
        positions = torch.arange(len(segment.ids))[None]
        finals, [exits] = target.forward(x, target.cache(128), positions, capture=(3,))
        torch.testing.assert_close(segment.exits, exits[0, segment.places], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(segment.finals, finals[0, segment.places], rtol=1e-3, atol=1e-3)
        choices = target.head(segment.finals).argmax(-1)
        following = segment.ids[segment.places[:-1] + 1]
        assert torch.equal(choices[:-1], following)  # greedy: the emitted text is the target's own
        drafted = segment.drafted != UNDRAFTED
        assert torch.equal(segment.rewards, ((segment.drafted == choices) & drafted).float())
        rows += len(segment)
    assert rows == agent.tokens and agent.tokens > 40
    assert int(agent.counts.sum()) == agent.tokens


@pytest.mark.parametrize(
    ("name", "kind"), [("dvi", "head"), ("dvi", "kangaroo"), ("dvi", "layers"), ("reinforce", "head")]
)
def test_training_raises_acceptance(name: str, kind: str, tiny: dict, tmp_path: Path) -> None:
    """Training repeatedly on a few texts raises the acceptance rate of their drafts far above its start."""
    log = tmp_path / "log.jsonl"
    rows = [{"conversations": [{"from": "human", "value": w}], "split": "train"} for w in ("the a", "we is", "in to")]
    log.write_text("\n".join(map(json.dumps, rows)))
    shared = {"prompts": str(log), "max_new_tokens": 40, "rank": 8}

    def acceptance(folder: str, texts: int, learning_rate: float) -> list[float]:
        schedule = {"kl_steps": 60, "anneal_steps": 60} if name == "dvi" else {}
        own = {"texts": texts, "learning_rate": learning_rate, "updates_per_batch": 4, "order": "logged"}
        env, agent = make_exit_agent(tiny, name, kind, shared, **own, **schedule)
        (tmp_path / folder).mkdir()
        agent.learn(10**6, env, Run(tmp_path / folder))
        lines = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        assert set(lines[0]) >= {"step", "loss_rl", "loss_slow", "accept_rate", "ppl_sample", "tokens", "texts"}
        return [line["accept_rate"] for line in lines]

    before = np.mean(acceptance("before", 9, 0.0))
    after = np.mean(acceptance("after", 60, 2e-2)[-10:])
    assert after > before + (0.25 if name == "dvi" else 0.1), (before, after)


@pytest.mark.parametrize("kind", KINDS)
def test_exits_train_in_bfloat16(kind: str, tiny: dict, tmp_path: Path) -> None:
    """Where gradients do not flow through the target's dtype they flow through a float32 copy."""
    env, agent = make_exit_agent(tiny, "dvi", kind, {"dtype": "bfloat16", "max_new_tokens": 30}, texts=4)
    agent.learn(10**6, env)
    assert agent.updates > 2 and all(torch.isfinite(w).all() for w in agent.adapter.parameters())
    assert any(w.abs().sum() > 0 for name, w in agent.adapter.named_parameters() if name.endswith("lora_B"))
    agent.save(tmp_path)
    decoder = load_decoder(tiny["target"], str(tmp_path), "cpu", "bfloat16", width=1)
    decoder.start([2, 3, 4], 20, np.random.default_rng(0))
    while not decoder.finished:
        decoder.cycle(3)


def test_slow_updates_change_only_layers_after_the_exit(tiny: dict) -> None:
    env, agent = make_exit_agent(tiny, "reinforce", "layers", texts=4, slow_every=2, slow_learning_rate=1e-3)
    agent.learn(10**6, env)
    moved = {
        name: max(low_rank.lora_B.abs().max().item() for _, _, low_rank in part.parts())
        for name, part in (("lora_S", agent.adapter.lora_S), ("lora_D", agent.adapter.lora_D))
    }
    assert 0 < moved["lora_D"] < 0.05 and moved["lora_S"] > 0
    assert agent.adapter.lora_D.range == range(3, 8)


def test_greedy_text_is_unchanged_by_learning(tiny: dict) -> None:
    """The text equals plain decoding before, during and after learning, for ``head`` and ``kangaroo``."""
    for kind in ("head", "kangaroo"):
        env, agent = make_exit_agent(tiny, "dvi", kind, {"max_new_tokens": 30}, learning_rate=2e-2, texts=6)
        texts: list[tuple[list[int], list[int]]] = []
        step = env.unwrapped.step

        def recorded(action: int, step: Any = step, env: gym.Env = env, texts: list = texts) -> Any:
            result = step(action)
            if result[2]:
                texts.append((env.unwrapped.decoder.prompt, list(env.unwrapped.decoder.tokens)))
            return result

        env.unwrapped.step = recorded
        agent.learn(10**6, env)
        assert len(texts) == 6 and agent.updates > 4
        plain = env.unwrapped.decoder.plain()
        for prompt, tokens in texts:
            assert plain_text(plain, prompt, 30) == tokens


def test_saved_exit_predicts_as_the_trained_one(tiny: dict, tmp_path: Path) -> None:
    """A loaded run predicts the tokens that its environment's drafter drafts, restricted to its shortlist."""
    env, agent = make_exit_agent(tiny, "dvi", "head", learning_rate=2e-2, texts=8, shortlist=9)
    agent.learn(10**6, env)
    agent.save(tmp_path)
    again = make_exit_agent(tiny, "dvi", "head")[1]
    with pytest.raises(ValueError, match="DVIAgent has no exit yet"):
        again.predict(np.zeros(32, np.float32), deterministic=True)
    again.load(tmp_path)
    decoder = env.unwrapped.decoder
    assert again.adapter.shortlist is not None and len(again.adapter.shortlist) == 9
    observation, _ = env.reset(seed=5)
    logits = again.adapter.logits(torch.from_numpy(observation)[None])[0]
    best = int(again.adapter.shortlist[logits[torch.from_numpy(again.adapter.shortlist)].argmax()])
    assert again.predict(observation, deterministic=True)[0] == best
    drafter = decoder.drafter
    drafter.use(load_exit(tmp_path, decoder.local.target, tiny["target"]))
    decoder.start([2], 20, np.random.default_rng(0))  # a text with few tokens outside the shortlist
    decoder.begin()
    logits = again.adapter.logits(decoder.look()[None])[0]
    allowed = sorted({*again.adapter.shortlist.tolist(), *decoder.prompt, *decoder.tokens})
    if decoder.tree.size > 1:
        raise AssertionError("one token was drafted")
    logits = agent.adapter.logits(drafter.look([])[0])[0]
    assert int(decoder.tree.tokens[0]) == allowed[int(logits[allowed].argmax())]
    other = AGENTS["dvi"](control=make_control("dvi", {**tiny, **EXIT, "exit_layer": 2}))
    with pytest.raises(
        ValueError, match=r"has exit_layer, adapter and rank \(3, 'head', 4\), this agent's problem has"
    ):
        other.load(tmp_path)


def test_generate_with_learn_trains_agent(tiny: dict, tmp_path: Path) -> None:
    """``generate(learn=True)`` trains a loaded run, which can be saved again."""
    env, first = make_exit_agent(tiny, "dvi", "kangaroo", texts=3)
    first.learn(10**6, env)
    first.save(tmp_path)
    keywords = {**tiny, **EXIT, "adapter": "kangaroo", "rank": 4, "block": 2}
    control = make_control("dvi", keywords)
    agent = AGENTS["dvi"](control=control, fast_batch=16, learning_rate=1e-2)
    agent.load(tmp_path)
    decoder = load_decoder(tiny["target"], str(tmp_path), "cpu", "float32", width=1, max_depth=control.max_depth)
    with pytest.raises(ValueError, match=r"DVIAgent is bound to no decoder; call bind\(decoder\)"):
        generate(decoder, control, agent, [2, 3, 4], 20, learn=True).run()
    agent.bind(decoder)
    before = agent.adapter.exit_proj.lora_B.clone()
    for prompt in ([2, 3, 4], [5, 6], [9, 8, 7]):
        done = generate(decoder, control, agent, prompt, 30, learn=True).run()
        assert done.tokens == generate(decoder.plain(), None, None, prompt, 30).run().tokens
    assert agent.updates >= 2 and not torch.equal(agent.adapter.exit_proj.lora_B, before)
    assert agent.adapter is decoder.drafter.adapter
    updates = agent.updates
    generate(decoder, control, agent, [2, 3, 4], 30).run()  # without learn=True nothing is learned
    assert agent.updates == updates
    agent.save(tmp_path / "again")
    load_exit(tmp_path / "again", decoder.local.target, tiny["target"])


@pytest.mark.parametrize("block", [1, 3])
def test_abandoned_text_gives_segments_of_its_own(block: int, tiny: dict) -> None:
    keywords = {**tiny, **EXIT, "adapter": "kangaroo", "rank": 4, "block": block}
    control = make_control("dvi", keywords)
    agent = AGENTS["dvi"](control=control, fast_batch=40, replay_batch=0)
    decoder = gym.make("SpecDVI-v0", **keywords).unwrapped.decoder
    agent.bind(decoder)
    segments: list[Segment] = []
    agent.fast_update = lambda found: segments.extend(found) or (0.0, None)  # type: ignore[method-assign]
    for prompt in ([2, 3, 4, 5, 6, 7, 8, 9, 10], [5, 6], [9, 8, 7]):
        for count, _ in enumerate(generate(decoder, control, agent, prompt, 60, learn=True)):
            if count == 9:  # the consumer stops reading
                break
    generate(decoder, control, agent, [4, 4], 60, learn=True).run()
    assert len({tuple(segment.ids[:2].tolist()) for segment in segments}) == 4
    for segment in segments:
        assert int(segment.places.max()) == len(segment.ids) - 1
        drawn = agent.adapter.logits(agent.passes.rows([segment])).log_softmax(-1)
        known = segment.drafted != UNDRAFTED
        expected = drawn[known].gather(1, segment.drafted[known, None])[:, 0]
        torch.testing.assert_close(segment.behaviour[known], expected, rtol=1e-2, atol=1e-2)


def test_texts_setting_limits_stream(tiny: dict, tmp_path: Path) -> None:
    """Each prompt is read once by default, duplicates included; further texts start from the first prompt again."""
    log = tmp_path / "log.jsonl"
    rows = [{"conversations": [{"from": "human", "value": w}], "split": "train"} for w in ("the a", "the a", "in to")]
    log.write_text("\n".join(map(json.dumps, rows)))
    for texts, expected in ((None, 3), (2, 2), (5, 5)):
        env, agent = make_exit_agent(tiny, "dvi", "head", {"prompts": str(log), "max_new_tokens": 20}, texts=texts)
        assert agent.learn(10**6, env).texts_read == expected


def test_prompt_order_follows_settings(tiny: dict, tmp_path: Path) -> None:
    for name, words in (("a", ("the", "of", "in")), ("b", ("is", "it", "on"))):
        rows = [{"conversations": [{"from": "human", "value": f"{w} {w}"}], "split": "train"} for w in words]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    logs = ",".join(str(tmp_path / f"{name}.jsonl") for name in "ab")

    def order(**own: Any) -> list[str]:
        env, agent = make_exit_agent(
            tiny, "dvi", "head", {"prompts": logs, "switch_every": own.pop("switch_every", 0)}, **own
        )
        return [prompt.text.split()[0] for prompt in agent._order(env.unwrapped)]

    assert order(order="logged") == ["the", "of", "in", "is", "it", "on"]
    assert order(order="logged", switch_every=2) == ["the", "of", "is", "it", "in", "on"]
    assert order() == order(seed=0) != order(seed=1) and sorted(order()) == sorted(order(order="logged"))


def learning(name: str, folder: str, keywords: dict, own: dict) -> None:
    """Train in a separate process, with validation every 40 texts and checkpoints every 60."""
    torch.set_num_threads(1)
    agent = AGENTS[name](control=make_control("dvi", keywords), **own)

    def validate(agent: Any) -> dict[str, float]:
        return {"norm": float(sum(p.norm() for p in agent.adapter.parameters()))}

    agent.learn(10**6, gym.make("SpecDVI-v0", **keywords), Run(Path(folder), 40, 60, validate))
    agent.save(Path(folder))


@pytest.mark.parametrize(("name", "kind"), [("dvi", "kangaroo"), ("reinforce", "layers")])
def test_killed_run_resumes_exactly(name: str, kind: str, tiny: dict, tmp_path: Path) -> None:
    """Log, validations and weights of a run killed at random moments are those of an uninterrupted run."""
    drawn = {"draft_temperature": 1.0} if name == "reinforce" else {}
    keywords = {**tiny, **EXIT, "adapter": kind, "rank": 4, "max_new_tokens": 30, **drawn}
    own = {"fast_batch": 16, "replay_batch": 32, "replay_size": 100, "texts": 24, "learning_rate": 5e-3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()

    def start(folder: Path) -> Any:
        process = FORKS.Process(target=learning, args=(name, str(folder), keywords, own), daemon=True)
        process.start()
        return process

    def ended(process: Any) -> bool:
        """Wait, and return whether the process exited with status 0."""
        process.join(120)
        return process.exitcode == 0

    assert ended(start(whole))
    moments, kills = random.Random(1), 0
    while kills < 3:
        process, log = start(killed), killed / "log.jsonl"
        size = log.stat().st_size if log.exists() else 0
        while process.is_alive():  # kill it shortly after it has written new lines
            if log.exists() and log.stat().st_size > size + 300:
                time.sleep(moments.random() * 0.3)
                process.kill()
                break
            time.sleep(0.01)
        if ended(process):
            break
        kills += 1
    assert kills >= 1 and ended(start(killed))
    for log in ("log.jsonl", "validation.jsonl"):
        assert (killed / log).read_text() == (whole / log).read_text()
    for file in sorted(whole.rglob("*.safetensors")):
        assert file.read_bytes() == (killed / file.relative_to(whole)).read_bytes()
    last = (torch.load(folder / "last" / "checkpoint.pt", weights_only=True) for folder in (whole, killed))
    assert str(next(last)) == str(next(last))


def test_damaged_checkpoint_is_refused(tiny: dict, tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    env, agent = make_exit_agent(tiny, "dvi", "head")
    with pytest.raises(ValueError, match=r"cannot read the checkpoint .*checkpoint.pt: .*; delete it to start over"):
        agent.learn(100, env, Run(tmp_path))


def test_journal_drops_lines_after_checkpoint(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, 0, {"seed": 0}, "dvi", "accept_rate")
    for step in range(1, 6):
        journal.write("log", {"step": step, "texts": step // 2, "loss_rl": 0.5, "loss_slow": None})
    journal.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # an incomplete line, as of a process killed while writing
    Journal(tmp_path, 3, 1, {}, "dvi", "accept_rate").close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    Journal(tmp_path, 0, 0, {}, "dvi", "accept_rate").close()
    assert not (tmp_path / "log.jsonl").exists()
    assert list((tmp_path / "events").glob("events*"))


def test_journal_writes_non_finite_numbers_as_null(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, 0, {}, "dvi", "accept_rate")
    journal.write("log", {"step": 1, "texts": 1, "loss_rl": float("nan"), "ppl_sample": float("inf")})
    journal.close()
    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "texts": 1, "loss_rl": None, "ppl_sample": None}


def test_skipped_slow_update_logs_no_loss(tiny: dict, tmp_path: Path) -> None:
    """Every second update trains the verifier; a text of one row has no next token to learn from and is skipped."""
    own = {"fast_batch": 1, "replay_batch": 0, "slow_every": 2, "texts": 6}
    env, agent = make_exit_agent({**tiny, "draft_temperature": 1.0}, "reinforce", "layers", **own)
    agent.learn(10**6, env, Run(tmp_path))
    lines = [json.loads(x, parse_constant=pytest.fail) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) > 4
    assert all(line["loss_slow"] is None for line in lines if line["step"] % 2)
    assert any(line["loss_slow"] for line in lines) and not any(line["loss_slow"] == 0.0 for line in lines)
    assert {line["ppl_sample"] is None for line in lines} == {True, False}


@pytest.mark.parametrize("damage", [b'{"step": NaN, "texts": 1}\n', b'{"step": 1}\n', b"{\n", b"\xff\n", b"[1]\n"])
def test_damaged_journal_line_is_reported(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "texts": 1}\n' + damage)
    with pytest.raises(ValueError, match=r"log.jsonl is damaged in line 2 \(.*\); delete it"):
        Journal(tmp_path, 3, 2, {}, "dvi", "accept_rate")


def test_replay_drops_oldest_segments(tiny: dict) -> None:
    env, agent = make_exit_agent(tiny, "dvi", "head")
    segments = collect_segments(env, agent, 4)
    replay = Replay(40)
    replay.add(segments)
    assert sum(map(len, replay.segments)) <= 40 and replay.segments[-1] is segments[-1]
    drawn = replay.sample(20, np.random.default_rng(0))
    assert len({id(s) for s in drawn}) == len(drawn) and len(joined(drawn, "places")) >= 20


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("dvi", {"fast_batch": 0}, "fast_batch is 0; expected a whole number of 1 or more"),
        ("dvi", {"replay_batch": -1}, "replay_batch is -1; expected a whole number of 0 or more"),
        ("dvi", {"order": "random"}, "order is 'random'; expected one of shuffled, logged"),
        ("dvi", {"anneal_steps": 0}, "anneal_steps is 0; expected a whole number of 1 or more"),
        ("dvi", {"lr_schedule": "cosine"}, "lr_schedule is 'cosine'; expected one of constant, linear"),
        ("reinforce", {"slow_every": 0}, "slow_every is 0; expected a whole number of 1 or more"),
        ("reinforce", {"baseline_momentum": 1.0}, "baseline_momentum is 1.0; expected a number of 0 or more below 1"),
    ],
)
def test_invalid_hyperparameters_are_refused(name: str, own: dict, message: str, tiny: dict) -> None:
    with pytest.raises(ValueError, match=message):
        make_exit_agent(tiny, name, "head", **own)


def test_agents_refuse_controls_without_trainable_exit(tiny: dict) -> None:
    with pytest.raises(
        ValueError, match="DVIAgent improves an early exit: SpecK-v0 drafts with another model; take SpecDVI-v0"
    ):
        AGENTS["dvi"](control=make_control("k", {}))
    with pytest.raises(ValueError, match="draft_temperature is 0, at which nothing is drawn"):
        AGENTS["reinforce"](control=make_control("dvi", {**tiny, **EXIT}))
    assert set(AGENTS["dvi"].Settings.model_fields) >= {"fast_batch", "kl_steps", "texts"}
