"""Segments on a real llama-server: lengths take effect, all give the same text, and no process remains."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.llama_cpp.engine import LlamaEngine
from spec_envs.decoding.llama_cpp.server import LlamaServer, gguf_of
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.env import SpecEnv
from spec_envs.prompts.sets import encode
from tests.support.models.tiny import REAL
from tests.support.processes import alive, needs_llama_server

pytestmark = [pytest.mark.server, pytest.mark.model, needs_llama_server]

STORY = "Write a short story about a fox."


def ids(text: str) -> list[int]:
    return encode(load_tokenizer(REAL), text)


@pytest.fixture(scope="module")
def worse_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the target with a few weights from the middle of its file zeroed, so that many of its drafts are wrong."""
    data = bytearray(gguf_of(REAL)[0].read_bytes())
    middle = slice(len(data) * 6 // 10, len(data) * 6 // 10 + 2_000_000)
    data[middle] = bytes(2_000_000)
    path = tmp_path_factory.mktemp("draft") / "worse.gguf"
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def decoder(worse_draft: Path) -> Iterator[LlamaEngine]:
    decoder = LlamaEngine(REAL, str(worse_draft), 4, segment=39, threads=1)
    yield decoder
    decoder.close()


def test_text_is_the_servers_own_at_any_length(decoder: LlamaEngine, rng: np.random.Generator) -> None:
    """Wrong drafts are rejected, and after a restart the server reads the text again.

    The last restart is 78 tokens before a near-tie, which forwards larger than the decoder's decide differently on some
    processors.
    """
    prompt, file = ids(STORY), gguf_of(REAL)
    with LlamaServer(*file, threads=1) as plain:
        own = plain.complete(prompt, 44)["tokens"]
    for ks in ([4, 4], [0, 2]):
        decoder.start(prompt, 44, rng)
        cycles = [decoder.cycle(k) for k in ks]
        assert decoder.tokens == own and decoder.finished and decoder.length == len(prompt) + 44
        assert [cycle.emitted for cycle in cycles] == [39, 4]
        for k, cycle in zip(ks, cycles, strict=True):
            assert cycle.depth == k and cycle.verified == cycle.drafted and len(cycle.nodes.tokens) == 0
            assert (cycle.drafted > 0) == (k > 0) and cycle.accepted <= min(cycle.drafted, cycle.emitted)
            assert cycle.seconds["verify"] > 0 == cycle.seconds["draft"]
        assert sum(cycle.accepted for cycle in cycles) < sum(cycle.drafted for cycle in cycles)
    assert decoder.clock.totals["prefill"] > 0


def test_lengths_take_effect_and_restarts_are_timed_separately(rng: np.random.Generator) -> None:
    """The target is its own draft: the first of 12 tokens comes from the prompt, and every cycle emits k + 1 of the
    others."""
    decoder = LlamaEngine(REAL, REAL, 4, segment=12, threads=1)
    decoder.start(ids(STORY), 40, rng)
    assert decoder.cycle(4).drafted == 8 and decoder.restart_seconds == 0
    before = decoder.metrics()["llamacpp:spec_decode_num_draft_tokens_total"]
    again = decoder.cycle(4)
    drafted, accepted = (f"llamacpp:spec_decode_num_{what}_tokens_total" for what in ("draft", "accepted"))
    assert decoder.metrics()[drafted] - before == again.drafted == again.accepted
    assert decoder.metrics()[accepted] <= decoder.metrics()[drafted]
    first = decoder.server.process.pid
    spent = sum(decoder.clock.totals.values())
    shorter = decoder.cycle(1)
    assert shorter.drafted == 5 and sum(decoder.clock.totals.values()) - spent == pytest.approx(
        shorter.seconds["verify"]
    )
    assert decoder.per_request == (decoder.restart_seconds == 0) == alive(first)
    assert decoder.plain_seconds() == decoder.plain_seconds() > 0
    last = decoder.server.process.pid
    decoder.close()
    decoder.close()
    assert not alive(last)


def test_text_ends_at_eos_and_invalid_arguments_are_refused(decoder: LlamaEngine, rng: np.random.Generator) -> None:
    decoder.start(ids("Repeat ten times: one two three."), 24, rng)
    cycle = decoder.cycle(4)
    assert decoder.finished and decoder.tokens[-1] in decoder.eos and len(decoder.tokens) < 24
    assert cycle.tokens == decoder.tokens[1:] and cycle.accepted <= cycle.emitted
    with pytest.raises(RuntimeError, match="the text has ended"):
        decoder.cycle(0)
    decoder.start(ids(STORY), 2, rng)
    with pytest.raises(ValueError, match="k is 5; expected 0 to 4"):
        decoder.cycle(5)
    for prompt, count, message in (
        ([], 4, "empty"),
        ([5], 0, "max_new_tokens is 0"),
        ([5] * decoder.context, 4, "the context is"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.start(prompt, count, rng)
    for arguments, message in (
        ({"k_max": 0}, "k_max is 0"),
        ({"segment": 0}, "segment 0"),
        ({"drafter": "lookup"}, "GGUF"),
    ):
        with pytest.raises(ValueError, match=message):
            LlamaEngine(**({"target": REAL, "drafter": REAL, "k_max": 4} | arguments))
    with pytest.raises(ValueError, match="no cost table can price"):
        LlamaEngine(REAL, REAL, 4, clock=PricedClock(CostTable.load("qwen3-14b-a6000")))


def test_environment_on_server(rng: np.random.Generator) -> None:
    """The shipped draft model also drafts in llama.cpp; one step is a segment, and no process remains."""
    env = gym.make("SpecK-v0", engine="llama-server", adjustment_interval=16, k_max=4, max_new_tokens=40).unwrapped
    assert isinstance(env, SpecEnv) and isinstance(env.decoder, LlamaEngine)
    env.reset(seed=0, options={"prompt": STORY})
    done, k, accepted = False, 4, 0
    while not done:
        see, reward, done, _, info = env.step(k)
        assert env.observation_space.contains(see) and np.isfinite(reward)
        assert info["emitted"] == 16 or done
        assert (info["drafted"] > 0) == (k > 0)
        accepted += info["accepted"]
        k = 0
    assert accepted > 0  # the GGUF file of the draft model predicts what the draft model predicts
    assert info["tokens"] == 40 and info["restart_seconds"] > 0 and info["speedup"] > 0
    process = env.decoder.server.process.pid
    env.close()
    env.close()
    assert not alive(process)


@pytest.mark.parametrize("ending", ["killed", "hanging"])
def test_failure_during_request_is_reported_in_one_sentence(ending: str, rng: np.random.Generator) -> None:
    decoder = LlamaEngine(REAL, REAL, 2, segment=12, threads=1)
    decoder.start(ids(STORY), 24, rng)
    process = decoder.server.process.pid
    os.kill(process, signal.SIGSTOP)  # so that the request is still running when the server fails
    if ending == "killed":
        threading.Timer(0.5, os.kill, (process, signal.SIGKILL)).start()
    else:
        decoder.timeout = 1.0
    message = r"did not answer \(" if ending == "killed" else "did not answer within 1 s"
    with pytest.raises(ValueError, match=f"llama-server {message}.*; the last lines of its log: .*slot"):
        decoder.cycle(2)
    assert not alive(process)
    decoder.close()
    decoder.close()


def test_draft_model_of_other_vocabulary_is_refused(tmp_path: Path) -> None:
    """The server itself would only log a warning and decode plainly."""
    data = gguf_of(REAL)[0].read_bytes()
    token, another = (len(text.encode()).to_bytes(8, "little") + text.encode() for text in ("Ġelephant", "Ġelephanz"))
    assert data.count(token) == 1
    other = tmp_path / "other.gguf"
    other.write_bytes(data.replace(token, another))
    with pytest.raises(ValueError, match=r"drafts nothing with .*other\.gguf.*; the last lines of its log: .*vocab"):
        LlamaEngine(REAL, str(other), 2, threads=1)


def test_server_with_length_per_request_is_not_restarted(tmp_path: Path, rng: np.random.Generator) -> None:
    """Builds of 2025 accept a length per request and have other options; a program that answers like one replaces
    them."""
    program = tmp_path / "llama-server"
    program.write_text(f"#!{sys.executable}\n" + textwrap.dedent(OLDER_BUILD))
    program.chmod(0o755)
    decoder = LlamaEngine(REAL, REAL, 4, segment=6, binary=str(program))
    process = decoder.server.process.pid
    decoder.start([5, 6], 20, rng)
    assert [decoder.cycle(k).drafted for k in (3, 0, 4)] == [3, 0, 4]
    assert decoder.per_request and decoder.restart_seconds == 0 and decoder.server.process.pid == process
    decoder.close()
    assert not alive(process)


OLDER_BUILD = """
    import json, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    if "--help" in sys.argv:
        sys.exit(print("--draft-max N  --draft-min N  --draft-p-min P"))
    assert sys.argv[sys.argv.index("--draft-max") + 1] == "4" and "--cache-ram" not in sys.argv

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"default_generation_settings": {"n_ctx": 64}})

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            drafted = asked.get("speculative.n_max", 0)
            timings = {"prompt_ms": 1.0, "predicted_ms": 2.0, "draft_n": drafted, "draft_n_accepted": drafted}
            self.answer({"tokens": [7] * asked["n_predict"], "stop_type": "limit", "timings": timings})

        def answer(self, body):
            data = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
