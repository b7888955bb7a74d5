"""A real llama-server: its answers, refusals and failures, and that no process or log remains."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from spec_envs.controls.k import KControl
from spec_envs.decoding.llama_cpp import server as llama_server
from spec_envs.decoding.llama_cpp.server import LlamaServer, gguf_of
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.experiments.measure.arms import Encoded
from spec_envs.experiments.measure.references import llamacpp_arms
from spec_envs.prompts.sets import encode
from tests.support.models.tiny import REAL
from tests.support.processes import alive, needs_llama_server

pytestmark = [pytest.mark.server, pytest.mark.model, needs_llama_server]


def test_server_continues_ids_and_exits() -> None:
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
        with pytest.raises(
            ValueError, match=r"did not answer .*the last lines of its log: .*\(all of it is in "
        ) as error:
            server.complete(prompt, 4)
    assert answer["tokens"] == again["tokens"]
    assert load_tokenizer(REAL).decode(answer["tokens"]) == answer["content"] != ""
    assert answer["timings"]["prompt_n"] == len(prompt) and answer["timings"]["predicted_ms"] > 0
    assert not alive(server.process.pid)
    server.close()
    kept = Path(re.findall(r"all of it is in (\S+)\)", str(error.value))[0])
    assert "model" in kept.read_text() and logs() == {kept}


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a separate temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def logs() -> set[Path]:
    """Return the logs that remain in the temporary folder."""
    return set(Path(tempfile.gettempdir()).glob("llama-server-*"))


def test_server_outlives_starting_thread() -> None:
    """Two servers are started at the same time; no process or log remains."""
    servers: list[LlamaServer] = []
    threads = [threading.Thread(target=lambda: servers.append(LlamaServer(*gguf_of(REAL)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.5)
    one, two = servers
    assert one.port != two.port and one.complete([1, 2, 3], 4)["tokens"] == two.complete([1, 2, 3], 4)["tokens"]
    for server in servers:
        server.close()
    assert not any(alive(server.process.pid) for server in servers) and not logs()


def test_taken_port_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        ports = iter([taken, llama_server.free_port()])
        monkeypatch.setattr(llama_server, "free_port", lambda: next(ports))
        with LlamaServer(*gguf_of(REAL)) as server:
            assert server.port != taken and len(server.complete([1, 2, 3], 4)["tokens"]) == 4
        monkeypatch.setattr(llama_server, "free_port", lambda: taken)
        with pytest.raises(ValueError, match=r"llama-server ended with status .*the last lines of its log"):
            LlamaServer(*gguf_of(REAL))


def test_program_that_never_gets_ready_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "slow"
    program.write_text("#!/bin/sh\nprintf '\\033[31mloading\\n'\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(llama_server, "START_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"was not ready after 0.5 s; .*: \s*\[31mloading") as error:
        LlamaServer(tmp_path / "any.gguf", binary=str(program))
    assert str(error.value).isprintable() and len(logs()) == 1
    program.write_text("no program")
    with pytest.raises(OSError, match="Exec format error"):
        LlamaServer(tmp_path / "any.gguf", binary=str(program))


def test_server_args(capfd: pytest.CaptureFixture[str]) -> None:
    """A user's arguments are passed to the program and replace ``--device none``; arguments that are set here are
    refused."""
    given = ["--device", "none", "--verbosity", "1", "--alias", "mine"]
    with LlamaServer(*gguf_of(REAL), server_args=given) as server:
        assert Path(f"/proc/{server.process.pid}/cmdline").read_text().count("none") == 1
        assert json.loads(server._ask("/v1/models"))["data"][0]["id"] == "mine"
    for word in ("--port", "--port=1", "-m", "--host", "--spec-type", "--draft-max", "--api-key", "--parallel"):
        with pytest.raises(ValueError, match=rf"server_args has {word.partition('=')[0]}, which is set here"):
            llama_server.check_server_args(["--device", "none", word])
    for wrong in ("--device none", [3], ["a\033[31m"]):
        with pytest.raises(ValueError, match=r"server_args is .*expected a list of words"):
            llama_server.check_server_args(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the last lines of its log: .*no-such-option"):
        LlamaServer(*gguf_of(REAL), server_args=["--no-such-option"])
    with pytest.raises(ValueError, match="which is for engine='llama-server', not 'torch'"):
        KControl(server_args=["--device", "none"])
    assert KControl(engine="llama-server", server_args=["--device", "none"]).server_args == ["--device", "none"]


def test_unloadable_model_is_reported_with_the_log(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"ended with status .* while it started; the last lines of its log: .*load"):
        LlamaServer(broken)
    with pytest.raises(ValueError, match="'/nowhere/llama-server' is not a program"):
        LlamaServer(broken, binary="/nowhere/llama-server")


def test_server_ends_with_its_parent() -> None:
    code = (
        "from spec_envs.decoding.llama_cpp.server import *\n"
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


def test_arms_count_tokens_and_cycles(caplog: pytest.LogCaptureFixture) -> None:
    arms = llamacpp_arms(REAL, 2, None)
    prompt = Encoded("chat", encode(load_tokenizer(REAL), "Repeat ten times: one two three."))
    samples = {name: arm(prompt, 24, 0) for name, arm in arms.items()}
    assert set(samples) == {"llama.cpp", "llama.cpp drafting"}
    for sample in samples.values():
        assert 0 < sample.tokens < 24 and sample.seconds > 0 and sample.prefill_seconds > 0
    assert samples["llama.cpp"].cycles == samples["llama.cpp"].tokens
    caplog.set_level(logging.INFO)
    assert llamacpp_arms("some/hub-id", 2, None) == {}
    assert "llama.cpp is left out: 'some/hub-id' is not a GGUF file" in caplog.text
    assert set(llamacpp_arms(REAL, 2, ("some/hub-id", 4))) == {"llama.cpp"}


def test_arm_drafts_at_given_length() -> None:
    """The target is its own draft: every draft is accepted, so each cycle emits one token more than it drafts."""
    drafting = llamacpp_arms(REAL, 2, (REAL, 8))["llama.cpp drafting"]
    sample = drafting(Encoded("chat", encode(load_tokenizer(REAL), "Write a short story about a fox.")), 41, 0)
    assert sample.tokens == 40 and sample.cycles <= 8  # the server's default of 3 would need 10


def test_wheel_with_other_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"something else")
    monkeypatch.setattr(llama_server, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(llama_server, "download_wheels", lambda requirements, scratch: [wheel])
    with pytest.raises(ValueError, match=r"has SHA-256 .*, expected .*; it is not used"):
        llama_server.fetch_binary()
    assert not list((tmp_path / "cache" / "llama-server").iterdir())
