"""A real llama-server: asked, refused, killed, and never left behind."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.arms import Encoded
from experiments.references import llamacpp_arms
from spec_envs.decoding import llama_server
from spec_envs.decoding.checkpoints import load_tokenizer
from spec_envs.decoding.llama_server import LlamaServer, gguf_of
from spec_envs.prompts import encode
from tests.conftest import REAL

needs_a_server = pytest.mark.skipif(
    shutil.which("llama-server") is None and (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="no llama-server on PATH, and the wheel is for Linux on x86-64",
)
pytestmark = [pytest.mark.server, pytest.mark.model, needs_a_server]


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"


def test_a_server_continues_ids_and_is_gone_afterwards() -> None:
    file, arguments = gguf_of(REAL)
    prompt = encode(load_tokenizer(REAL), "What is the capital of France?")
    with LlamaServer(file, arguments) as server:
        answer = server.complete(prompt, 12)
        again = server.complete(prompt, 12)
        with pytest.raises(ValueError, match="refused the request with status 400"):
            server.complete([10**9], 4)
        with pytest.raises(ValueError, match=r"refused the request with status 501: .*metrics"):
            server.metrics()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        with pytest.raises(ValueError, match=r"did not answer .*the last lines of its log: "):
            server.complete(prompt, 4)
    assert answer["tokens"] == again["tokens"]
    assert load_tokenizer(REAL).decode(answer["tokens"]) == answer["content"] != ""
    assert answer["timings"]["prompt_n"] == len(prompt) and answer["timings"]["predicted_ms"] > 0
    assert not alive(server.process.pid) and not server.log.exists()
    server.close()


def test_a_model_that_cannot_be_loaded_ends_with_the_log(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"ended with status .* while it started; the last lines of its log: .*load"):
        LlamaServer(broken)
    with pytest.raises(ValueError, match="'/nowhere/llama-server' is no program"):
        LlamaServer(broken, binary="/nowhere/llama-server")


def test_a_server_does_not_outlive_its_process() -> None:
    code = (
        "from spec_envs.decoding.llama_server import *\n"
        f"server = LlamaServer(*gguf_of({REAL!r}))\n"
        "print(server.process.pid, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server = int(parent.stdout.readline())
    assert alive(server)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not alive(server):
            break
        time.sleep(0.1)
    assert not alive(server)


def test_arms_count_the_servers_own_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    arms = llamacpp_arms(REAL, 2, None)
    prompt = Encoded("chat", encode(load_tokenizer(REAL), "Repeat ten times: one two three."))
    samples = {name: arm(prompt, 24, 0) for name, arm in arms.items()}
    assert set(samples) == {"llama.cpp", "llama.cpp drafting"}
    for sample in samples.values():
        assert 0 < sample.tokens < 24 and sample.seconds > 0 and sample.prefill_seconds > 0
    assert samples["llama.cpp"].cycles == samples["llama.cpp"].tokens
    assert llamacpp_arms("some/hub-id", 2, None) == {}
    assert "llama.cpp is left out: 'some/hub-id' is no GGUF file" in capsys.readouterr().err
    assert set(llamacpp_arms(REAL, 2, ("some/hub-id", 4))) == {"llama.cpp"}


def test_a_draft_model_is_played_at_the_given_length() -> None:
    """The target as its own draft: every draft is accepted, so each cycle makes one token more than it drafts."""
    drafting = llamacpp_arms(REAL, 2, (REAL, 8))["llama.cpp drafting"]
    sample = drafting(Encoded("chat", encode(load_tokenizer(REAL), "Write a short story about a fox.")), 41, 0)
    assert sample.tokens == 40 and sample.cycles <= 8  # the server's own default of 3 would need 10


def test_a_wheel_with_another_hash_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"something else")
    monkeypatch.setattr(llama_server, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(llama_server, "download_wheels", lambda requirements, scratch: [wheel])
    with pytest.raises(ValueError, match=r"has SHA-256 .*, expected .*; it is not used"):
        llama_server.fetch_binary()
    assert not list((tmp_path / "cache" / "llama-server").iterdir())
