"""The edge's command and streams against a real cloud in a separate process, also while the cloud is away."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.experiments.network.cloud_process import cloud
from spec_envs.network.edge import __main__ as edge
from spec_envs.network.edge.__main__ import FallbackVerifier, Screen, Stream, address, connected
from spec_envs.network.edge.linked import choose_mode, linked
from spec_envs.network.link import load_link
from spec_envs.network.proxy import ShapedProxy
from spec_envs.prompts.sets import decode, encode
from spec_envs.text import Detokenizer
from tests.support.commands import run_command

PROMPT, TOKENS, FAST = "the a of and in to", 40, "constant:up=1000,down=1000,rtt=1"


@pytest.fixture(scope="module")
def models(tiny_target: Path, tiny_draft: Path) -> dict[str, Any]:
    return {"target": str(tiny_target), "drafter": str(tiny_draft), "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def url(tiny_target: Path) -> Iterator[str]:
    arguments = ["--target", str(tiny_target), "--dtype", "float32", "--threads", "1", "--sessions", "4"]
    with cloud(*arguments) as found:
        yield found


@pytest.fixture
def unused_url() -> str:
    """Return an address at which no process listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"ws://127.0.0.1:{probe.getsockname()[1]}"


def command(monkeypatch: pytest.MonkeyPatch, models: dict[str, Any], *arguments: str) -> None:
    given = [text for name, value in models.items() for text in (f"--{name}", value)]
    settings = ["--prompt", PROMPT, "--max-new-tokens", str(TOKENS), "--seed", "4", "--patience", "0.1"]
    run_command(monkeypatch, edge, *arguments, *given, *settings)


@pytest.mark.parametrize("mode", ["topk", "scalar", "ids"])
def test_command_prints_text_of_the_decoder(
    mode: str,
    url: str,
    models: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    temperature = 0.0 if mode == "ids" else 1.0
    arguments = ["--mode", mode, "--top-k", "9", "--k", "3", "--temperature", str(temperature)]
    command(monkeypatch, models, url, *arguments)
    text, last = capsys.readouterr().out.split("\n\n")
    local = load_decoder(**models, temperature=temperature, width=1, max_depth=2)
    decoder = linked(local, FAST, models["target"])
    choose_mode(decoder, mode, 9)
    decoder.start(encode(load_tokenizer(models["target"]), PROMPT), TOKENS, np.random.default_rng(4))
    while not decoder.finished:
        decoder.cycle(3)
    assert text == decode(load_tokenizer(models["target"]), decoder.tokens)
    accepted, drafted = sum(c.accepted for c in decoder.cycles), sum(c.drafted for c in decoder.cycles)
    assert last.startswith(f"{len(decoder.tokens)} tokens, ") and "unverified" not in last
    assert f"{100 * accepted / drafted:.0f} % of {drafted} drafted tokens accepted" in last
    assert f"in {len(decoder.cycles) + 1} rounds" in last


def test_fallback_while_the_cloud_is_away(url: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "RETRY", 0.0)
    monkeypatch.setattr(edge, "ATTEMPT", 0.1)
    host, _, port = url.removeprefix("ws://").partition(":")
    tokenizer, out, marks = load_tokenizer(models["target"]), io.StringIO(), []
    screen = Screen(Detokenizer.of(tokenizer), out)
    with ExitStack() as links:
        first = links.enter_context(ShapedProxy(load_link(FAST), (host, int(port))))
        decoder = connected(f"ws://127.0.0.1:{first.port}", **models, k=2, patience=0.1, fallback=True)
        decoder.eos = frozenset()
        stream = Stream(decoder, encode(tokenizer, PROMPT), TOKENS, 2)
        for verified in stream:
            marks.append(verified)
            screen.show(decoder.tokens, verified)
            if len(marks) == 3:
                links.close()
                monkeypatch.setattr(edge, "RETRY", 60.0)
            if len(marks) == 6:  # one draft was sent when the cloud was lost, two while no attempt is made to reconnect
                links.enter_context(ShapedProxy(load_link(FAST), (host, int(port)), ("127.0.0.1", first.port)))
                monkeypatch.setattr(edge, "RETRY", 0.0)
    screen.close()
    assert isinstance(decoder.verifier, FallbackVerifier)
    assert marks == [True] * 3 + [False] * 3 + [True] * (len(marks) - 6) and len(marks) > 8
    assert not decoder.verifier.away and decoder.verifier.channel.patience == 0.1
    assert [cycle.unverified for cycle in decoder.cycles[1:6]] == [0, 0, 2, 2, 0]
    assert stream.unverified == 6 and stream.rounds == len(marks) - 3
    begin = 1 + sum(cycle.emitted for cycle in decoder.cycles[:2])
    before, middle = (decode(tokenizer, decoder.tokens[:n]) for n in (begin, begin + 6))
    whole = decode(tokenizer, decoder.tokens)
    assert out.getvalue() == f"{before}[unverified: {middle[len(before) :]}]{whole[len(middle) :]}\n"
    decoder.verifier.channel.close()


def test_command_without_a_cloud(
    unused_url: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = rf"^error: the cloud at {unused_url} does not answer .*`spec-envs cloud`"
    with pytest.raises(SystemExit, match=expected) as end:
        command(monkeypatch, models, unused_url)
    assert "\n" not in str(end.value.code) and not capsys.readouterr().out
    command(monkeypatch, models, unused_url, "--offline-fallback")
    text, last = capsys.readouterr().out.split("\n\n")
    assert text.startswith("[unverified: ") and text.endswith("]") and text.count("[") == 1
    tokens = last.split()[0]
    assert "0 bytes up, 0 down in 0 rounds; network 0.00 s" in last and f"; {tokens} tokens unverified" in last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafter": "lookup", "fallback": True}, "cannot continue without the cloud"),
        ({"mode": "ids"}, "mode is 'ids', which is for temperature 0"),
        ({"k": 65}, "k is 65; expected a draft of 1 to 64"),
        ({"drafter": "lookup,suffix"}, "an edge has one, SpecDrafter-v0 chooses between several"),
        ({"patience": 0}, "patience is 0 s"),
        ({"top_k": 0}, "top_k is 0"),
    ],
)
def test_invalid_settings_are_refused(
    changes: dict[str, Any], message: str, unused_url: str, models: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        connected(unused_url, **models | changes)


def test_head_that_reads_target_states_is_refused(tiny: dict[str, Any]) -> None:
    decoder = load_decoder(tiny["target"], tiny["drafter"], "cpu", "float32")
    with pytest.raises(ValueError, match="reads the target's states, which are not sent over a network"):
        linked(decoder, FAST, tiny["target"])


def test_screen_prints_complete_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    out, tokens = io.StringIO(), list("aé€\x1b".encode())
    monkeypatch.setattr(out, "isatty", lambda: True)
    screen, seen = Screen(Detokenizer(lambda ids: bytes(ids).decode(errors="replace")), out), []
    for n in range(1, len(tokens) + 1):  # the first byte of é was not verified
        screen.show(tokens[:n], verified=n != 2)
        seen.append(out.getvalue())
    screen.show([*tokens, 0xE2], verified=True)
    screen.close()
    assert seen[:3] == ["a", "a", "a\033[33mé"] and seen[3:5] == [seen[2]] * 2
    assert out.getvalue() == "a\033[33mé\033[0m€\ufffd\ufffd\n"


@pytest.mark.parametrize(
    ("host", "url"),
    [("there", "ws://there:1"), ("::1", "ws://[::1]:1"), ("wss://there/", "wss://there/")],
)
def test_address_of_host_and_port(host: str, url: str) -> None:
    assert address(host, 1) == url
