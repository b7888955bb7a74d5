from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spec_envs.experiments.network.link_profiles import PROFILES, log_csv
from spec_envs.network.link import LINKS, Link, LinkState, LogLink, MarkovLink, load_link
from spec_envs.network.proxy import ShapedProxy, main

SHIPPED = sorted(path.stem for path in LINKS.glob("*.json"))


def run_text(link: Link, seed: int, sizes: tuple[int, int], rounds: int = 50) -> tuple[list[LinkState], list[float]]:
    """Return the states and seconds of a text that exchanges the same numbers of bytes in every round."""
    link.reset(np.random.default_rng(seed))
    states, seconds = [], []
    for _ in range(rounds):
        states.append(link.state)
        seconds.append(link.seconds(*sizes) + link.push(sizes[1]))
        link.move()
    return states, seconds


def test_shipped_links() -> None:
    assert SHIPPED == ["5g-mmwave", "constant-5g", "lte", "markov-1-500", "wifi"]
    assert load_link("constant-5g").states == (LinkState(46, 563, 50),)
    up = [state.up_mbps for state in load_link("markov-1-500").states]
    assert (min(up), max(up)) == (1, 500)
    for name, low, high in (("5g-mmwave", 5, 1500), ("lte", 5, 60), ("wifi", 5, 500)):
        down = [state.down_mbps for state in load_link(name).states]
        assert low <= min(down) and max(down) <= high and max(down) > 5 * min(down)


@pytest.mark.parametrize("name", [*SHIPPED, "constant:up=4,down=8,rtt=20,jitter=3,loss=0.1"])
def test_states_depend_on_seed_and_not_on_bytes(name: str) -> None:
    link, again = load_link(name), load_link(name)
    states, seconds = run_text(link, 3, (3000, 500))
    assert (states, seconds) == run_text(again, 3, (3000, 500))
    assert states == run_text(again, 3, (200_000, 0))[0]
    assert link.name == name and set(states) <= set(link.states)
    if len(link.states) > 1:
        assert states != run_text(link, 4, (3000, 500))[0]


def test_texts_differ_and_the_generator_is_not_advanced() -> None:
    link, rng = load_link("5g-mmwave"), np.random.default_rng(0)
    starts = set()
    for _ in range(20):
        link.reset(rng)
        starts.add(link.state)
    assert len(starts) > 10
    assert rng.random() == np.random.default_rng(0).random()


def test_seconds_equal_calculation() -> None:
    """8 Mbps are 1,000,000 bytes per second, 80 Mbps ten times that."""
    link = load_link("constant:up=8,down=80,rtt=50")
    assert link.seconds(0, 0) == 0.05
    assert link.seconds(10_000, 10_000) == pytest.approx(0.05 + 0.010 + 0.001)
    assert link.push(10_000) == pytest.approx(0.001)
    state = link.state
    assert (state.up, state.down, state.rtt) == (1e6, 1e7, 0.05)


def test_mean_of_jitter_and_retransmissions(rng: np.random.Generator) -> None:
    """One packet costs p/(1 − p) more round trips and transmissions; many packets cost that share of their bytes."""
    link = load_link("constant:up=8,down=8,rtt=50,loss=0.2")
    link.reset(rng)
    assert np.mean([link.seconds(1000, 0) for _ in range(4000)]) == pytest.approx(0.05 + 0.001 + 0.25 * 0.051, rel=0.02)
    assert np.mean([link.push(150_000) for _ in range(1000)]) == pytest.approx(0.15 * 1.25, rel=0.02)
    assert max(link.seconds(0, 0) for _ in range(50)) == 0.05  # zero bytes are never lost
    link = load_link("constant:up=8,down=8,rtt=50,jitter=10")
    link.reset(rng)
    assert np.mean([link.seconds(0, 0) for _ in range(4000)]) == pytest.approx(0.06, rel=0.02)


def write(folder: Path, **data: object) -> str:
    path = folder / "mine.json"
    path.write_text(json.dumps(data))
    return str(path)


STATES = [{"up_mbps": 10.0**i, "down_mbps": 5, "rtt_ms": 7} for i in range(3)]


def test_markov_link_keeps_its_stationary_distribution(rng: np.random.Generator, tmp_path: Path) -> None:
    transitions = [[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 1.0, 0.0]]
    link = load_link(write(tmp_path, kind="markov", states=STATES, transitions=transitions))
    assert isinstance(link, MarkovLink) and link.name == "mine"
    balanced = np.array([2, 4, 1]) / 7  # flows between states balance: 2 · 0.5 = 4 · 0.25; 4 · 0.25 = 1 · 1
    assert link.stationary == pytest.approx(balanced)
    first, tenth = np.zeros(3), np.zeros(3)
    for _ in range(3000):
        link.reset(rng)
        first[link.index] += 1
        for _ in range(9):
            link.move()
        tenth[link.index] += 1
        assert link.state is link.states[link.index]
    assert first / 3000 == pytest.approx(balanced, abs=0.03)
    assert tenth / 3000 == pytest.approx(balanced, abs=0.03)


def test_markov_link_stays_with_given_probability(rng: np.random.Generator, tmp_path: Path) -> None:
    link = load_link(write(tmp_path, kind="markov", states=STATES, stay=0.8))
    assert isinstance(link, MarkovLink)
    assert link.transitions == pytest.approx(np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]))
    states, _ = run_text(link, 0, (0, 0), 4000)
    assert np.mean([a is b for a, b in itertools.pairwise(states)]) == pytest.approx(0.8, abs=0.03)


def test_recorded_log_repeats_cyclically(tmp_path: Path) -> None:
    path = tmp_path / "recorded.csv"
    path.write_text("ms,mbps,rtt_ms\n1000,10,1\n1200,20,2\n1500,30,3\n")  # the last row lasts 300 ms as well
    link = load_link(str(path))
    assert isinstance(link, LogLink) and link.name == "recorded" and link.period == 800
    rows = [LinkState(10, 10, 1), LinkState(20, 20, 2), LinkState(30, 30, 3)]
    assert link.states == tuple(rows)
    link.reset(np.random.default_rng(0))
    link.at = 150.0  # advances by 200 ms: 350, 550, 750, 150, …
    seen = []
    for _ in range(5):
        link.move()
        seen.append(link.state)
    assert seen == [rows[1], rows[2], rows[2], rows[0], rows[1]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("5g-mmwav", "no link '5g-mmwav': .*lte"),
        ("nowhere.csv", "no link 'nowhere.csv'"),
        ("constant:up=46,down=563", "down=563' is not a link .*rtt_ms: Field required.*expected 'constant:up=46"),
        ("constant:up=x,down=563,rtt=1", "'up=x' is not one of up, down, rtt, jitter, loss with a number"),
        ("constant:up=1,down=563,rtt=1,los=0", "'los=0' is not one of"),
        ("constant:up=0,down=563,rtt=1", "up_mbps: Input should be greater than or equal to 0.000001"),
        ("constant:up=nan,down=563,rtt=1", "up_mbps: Input should be a finite number"),
    ],
)
def test_unknown_links_are_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_link(source)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "fibre"}, "does not match any of the expected tags"),
        ({"kind": "constant", "up_mbps": "1", "down_mbps": 1, "rtt_ms": 1}, "up_mbps: Input should be a valid number"),
        ({"kind": "constant", "up_mbps": 1, "down_mbps": 1, "rtt_ms": 1, "los": 1}, "los: Extra inputs"),
        (
            {"kind": "constant", "up_mbps": 1, "down_mbps": 1, "rtt_ms": 1, "loss": 1},
            "loss: Input should be less than or equal to 0.99",
        ),
        ({"kind": "markov", "states": STATES[:1], "stay": 0.5}, "states: List should have at least 2"),
        ({"kind": "markov", "states": STATES}, "expected either stay or transitions"),
        ({"kind": "markov", "states": STATES[:2], "transitions": [[1]]}, "2 rows of 2"),
        ({"kind": "markov", "states": STATES[:2], "transitions": [[0.5, 0.4], [1, 0]]}, "has to sum to 1"),
        ({"kind": "markov", "states": STATES[:2], "transitions": [[1, 0], [0.5, 0.5]]}, "within reach"),
        ({"kind": "trace", "csv": "none.csv"}, "none.csv does not exist"),
        ({"kind": "trace", "csv": "mine.csv"}, "mine.csv is not a link.s log"),
    ],
)
def test_malformed_links_are_refused(data: dict[str, object], message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("time,rate\n0,1\n1,1\n")
    with pytest.raises(ValueError, match=message) as error:
        load_link(write(tmp_path, **data))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least 2 items"),
        ("ms,mbps\n0,1\n", "at least 2 items"),
        ("ms,mbps\n0,1\n1,\n", "1.mbps: Input should be a valid number"),
        ("ms,mbps,up_mbps\n0,1,1\n1,1\n", "1.up_mbps: Input should be a valid number"),
        ("ms,mbps\n0,1\n1,1,1\n", "Keys should be strings"),
        ("ms,mbps\n0,1\n0,1\n", "row 1: ms does not ascend"),
        ("ms,mbps\n0,1\n1,0\n", "1.mbps: Input should be greater than or equal to 0.000001"),
    ],
)
def test_malformed_logs_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_link(str(path))
    assert "\n" not in str(error.value)


def test_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a link"):
        load_link(str(path))


@pytest.mark.parametrize("name", PROFILES)
def test_shipped_logs_are_those_of_their_script(name: str) -> None:
    assert (LINKS / f"{name}.csv").read_text() == log_csv(name)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send everything back, then close."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def echoed_through(source: str, *messages: bytes) -> tuple[list[bytes], float]:
    """Return the bytes that an echo server sends back over a link to several connections at once, and the seconds
    taken."""

    async def exchange(port: int, message: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(message)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer

    async with await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        server_address = server.sockets[0].getsockname()
        async with ShapedProxy(load_link(source), server_address) as proxy:
            begin = time.perf_counter()
            answers = await asyncio.gather(*(exchange(proxy.port, message) for message in messages))
            return answers, time.perf_counter() - begin


def test_proxy_passes_bytes_unchanged(rng: np.random.Generator) -> None:
    messages = [rng.bytes(3_000_000), rng.bytes(100_001), b"", b"x"]
    answers, _ = asyncio.run(echoed_through("constant:up=2000,down=2000,rtt=4,jitter=2", *messages))
    assert answers == messages


def test_proxy_is_no_faster_than_its_link() -> None:
    """Two connections share 4 Mbps up, which are 0.5 MB/s; one byte takes a round trip."""
    _, seconds = asyncio.run(echoed_through("constant:up=4,down=400,rtt=40", bytes(100_000), bytes(100_000)))
    assert seconds > 0.9 * (0.4 + 0.04)
    _, seconds = asyncio.run(echoed_through("constant:up=400,down=4,rtt=40", bytes(200_000)))
    assert seconds > 0.9 * (0.4 + 0.04)
    _, seconds = asyncio.run(echoed_through("constant:up=400,down=400,rtt=100", b"x"))
    assert seconds > 0.09


def ended(side: socket.socket) -> bool:
    """Return True if the other side has closed."""
    try:
        return side.recv(1) == b""
    except ConnectionError:
        return True


def test_proxy_changes_link_state_and_closes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        with ShapedProxy(load_link("wifi"), server.getsockname(), interval=0.01) as proxy:
            near = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
            far, _ = server.accept()
            far.settimeout(10)
            near.sendall(b"up")
            assert far.recv(2) == b"up"
            begin, deadline = proxy.link.state, time.monotonic() + 10
            while proxy.link.state == begin and time.monotonic() < deadline:
                time.sleep(0.01)
            assert proxy.link.state != begin
            with pytest.raises(OSError, match=r"could not listen on 127.0.0.1:\d+ \(Address already in use\)"):
                ShapedProxy(proxy.link, ("127.0.0.1", 1), ("127.0.0.1", proxy.port)).__enter__()
        for side in (near, far):  # both are notified
            with side:
                assert ended(side)
        assert not proxy.thread.is_alive()


def test_proxy_without_a_server_closes_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nowhere = probe.getsockname()
    with (
        ShapedProxy(load_link("constant-5g"), nowhere) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as near,
    ):
        assert ended(near)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--listen", "0", "--to", "1", "--link", "nope"], "error: no link 'nope'"),
        (["--listen", "x", "--to", "1", "--link", "lte"], "'x' is not an address; expected PORT or HOST:PORT"),
        (["--listen", "0", "--to", "1", "--link", "lte", "--interval-ms", "0"], "'0' is not a time"),
    ],
)
def test_command_refuses_invalid_arguments_in_one_sentence(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["proxy", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert message in f"{end.value}{capsys.readouterr().err}"


def test_command_forwards_bytes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        to = f"127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "spec_envs.network.proxy", "--listen", "0", "--to", to, "--link", "lte"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUTF8": "1"}
        ) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line.endswith(f" → {to} over lte\n")
                port = int(line.split()[0].split(":")[1])
                with socket.create_connection(("127.0.0.1", port), timeout=10) as near:
                    near.sendall(b"hello")
                    far, _ = server.accept()
                    with far:
                        far.settimeout(10)
                        assert far.recv(5) == b"hello"
            finally:
                process.terminate()


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "1e-320", "1e300", "null", '"5"', "[" * 100_000])
def test_numbers_out_of_range_are_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for key in ("up_mbps", "down_mbps", "rtt_ms", "jitter_ms", "loss"):
        if value == "1e-320" and not key.endswith("mbps"):
            continue  # such a small delay is allowed
        fields = {"up_mbps": "1", "down_mbps": "1", "rtt_ms": "1"} | {key: value}
        path.write_text('{"kind": "constant", ' + ", ".join(f'"{k}": {v}' for k, v in fields.items()) + "}")
        with pytest.raises(ValueError, match=r"mine\.json is not a link") as error:
            load_link(str(path))
        assert len(str(error.value)) < 500


def test_files_with_byte_order_mark_are_read(tmp_path: Path) -> None:
    data, rows = tmp_path / "mine.json", tmp_path / "mine.csv"
    data.write_text('{"kind": "constant", "up_mbps": 4, "down_mbps": 8, "rtt_ms": 2}', encoding="utf-8-sig")
    rows.write_text("ms,mbps\n0,3\n100,5\n", encoding="utf-8-sig")
    assert load_link(str(data)).states == (LinkState(4, 8, 2),)
    assert {state.down_mbps for state in load_link(str(rows)).states} == {3, 5}
