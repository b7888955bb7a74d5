"""The cloud as a server: admission, sessions, shutdown, TLS and metrics."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from spec_envs.network.websocket import CloudUnavailable
from spec_envs.network.wire import (
    VERSION,
    Hello,
    Plain,
    Verify,
    encode,
    pack_ids,
)
from tests.support.cloud_process import CloudProcess
from tests.support.edges import KINDS, PROMPT, VOCAB, Edges, replaced, send_frames, wait_for


def test_incompatible_edges_are_refused_in_one_sentence(
    options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CloudProcess(tmp_path, *options, SPEC_ENVS_TOKEN="secret") as cloud:
        wants = "needs a bearer token; set SPEC_ENVS_TOKEN to its own"
        for token in ("", "wrong"):
            with pytest.raises(ValueError, match=wants):
                edges(cloud.url, token=token).start(40)
        assert cloud.page("/healthz") == (200, "ok\n") and cloud.page("/metrics")[0] == 401
        assert "spec_envs_cloud_sessions 0.0" in cloud.page("/metrics", Authorization="Bearer secret")[1]
        assert cloud.page("/other", Authorization="Bearer secret")[0] == 404
        assert edges(cloud.url, token="secret").text(40) == texts["topk"]
        monkeypatch.setenv("SPEC_ENVS_TOKEN", "secret")
        other = edges(cloud.url)
        other.decoder.verifier.vocabulary = bytes(16)  # type: ignore[attr-defined]
        with pytest.raises(
            ValueError, match=r"^the cloud at ws:\S+ refused: the edge's tokenizer is not the target's; give both"
        ):
            other.start(40)
        monkeypatch.setattr("spec_envs.network.edge.remote.VERSION", VERSION + 1)
        with pytest.raises(
            ValueError, match=r"refused: the edge speaks version 2, this cloud 1; update the older one$"
        ):
            edges(cloud.url).start(40)
    with pytest.raises(
        CloudUnavailable, match=r"does not answer \(.*refused.*\); start one with `spec-envs cloud`, or check the"
    ):
        edges(cloud.url, patience=0.3).start(40)


def test_failed_start_is_reported_in_one_sentence(cloud: CloudProcess, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "pem").write_text("no certificate")
    cases = {
        "host is 0.0.0.0, which others can reach; set the environment variable SPEC_ENVS_TOKEN to a secret that edges have "
        "to send, or listen on 127.0.0.1": ["--host", "0.0.0.0"],
        "TLS needs both --tls-certificate and --tls-key": ["--tls-key", str(tmp_path / "pem")],
        f"could not load the TLS certificate {tmp_path}/pem with the key {tmp_path}/pem (": [
            *("--tls-certificate", str(tmp_path / "pem")),
            *("--tls-key", str(tmp_path / "pem")),
        ],
        f"could not listen on 127.0.0.1:{cloud.port} (Address already in use); choose another address": [
            "--port",
            str(cloud.port),
        ],
        "--port is 70000; expected 0 to 65535": ["--port", "70000"],
        "--sessions is 0; expected 1 to 65536": ["--sessions", "0"],
    }
    command = [sys.executable, "-m", "spec_envs.network.cloud", *options, "--sessions", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as real:
        processes = [CloudProcess(tmp_path, *options, *arguments) for arguments in cases.values()]
        for sentence, process in zip(cases, processes, strict=True):
            assert process.end() == (2 if sentence.startswith("--") else 1)
            assert process.printed.startswith(f"error: {sentence}") and process.printed.count("\n") == 1, (
                process.printed
            )
        assert real.communicate(timeout=60)[1].startswith(f"error: {sentence}; --help") and real.returncode == 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_edges_connect_over_tls(
    options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path, monkeypatch: Any
) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=cloud", "-addext",
         "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    pem = str(tmp_path / "certificate.pem")
    with CloudProcess(tmp_path, *options, "--tls-certificate", pem, "--tls-key", str(tmp_path / "key.pem")) as cloud:
        assert cloud.url.startswith("wss://")
        begin = time.monotonic()
        with pytest.raises(CloudUnavailable, match="certificate verify failed"):
            edges(cloud.url).start(40)
        assert time.monotonic() - begin < 5
        with pytest.raises(CloudUnavailable):
            edges(cloud.url.replace("wss", "ws"), patience=0.3).start(40)
        monkeypatch.setenv("SSL_CERT_FILE", pem)
        for kind in ("topk", "mixed"):
            edge = edges(cloud.url, kind)
            edge.start(40)
            edge.advance(10)
            edge.channel._drop()
            assert edge.advance() == texts[kind]


def test_many_edges_beside_a_misbehaving_client(cloud: CloudProcess, edges: Edges, hello: Hello) -> None:
    count, expected = 6, {kind: edges(cloud.url, kind).text(6) for kind in KINDS}
    first, ids = encode(hello), pack_ids(PROMPT, VOCAB)
    over = threading.Event()

    def misbehave() -> None:
        rng, turn = np.random.default_rng(0), 0
        while not over.is_set():
            turn += 1
            key = rng.bytes(16)
            own = encode(replaced(hello, session=key))
            send_frames(cloud.url, [b"", rng.bytes(100), own[:20], bytes(5000)][turn % 4])
            send_frames(cloud.url, own, encode(Plain(1, 0, ids, 2**20, b"")))
            with connect(cloud.url, compression=None, proxy=None) as lost:
                for frame in (own, encode(Plain(1, 0, ids, 1000, b"")), own, encode(Verify(2, 0, ids, b"", "ids"))):
                    lost.send(frame)
                lost.socket.sendall(b"\x82\xfe\x00")
                lost.close_socket()
            with connect(cloud.url, compression=None, proxy=None) as taken, ThreadPoolExecutor(1) as pool:
                taken.send(own)  # the session of a connection that may still hold it
                taken.send(encode(Plain(1, 0, ids, 500, b"")))
                other = encode(replaced(hello, session=key, temperature=0.0))
                pool.submit(send_frames, cloud.url, other, encode(Verify(1, 0, ids, ids, "ids")), b"").result()
            send_frames(cloud.url, first[:-1])

    sizes = []
    for _ in range(4):
        over.clear()
        with ThreadPoolExecutor(33) as pool:
            bad = pool.submit(misbehave)
            texts = {}
            for i in range(31):
                kind = KINDS[i % len(KINDS)]
                texts[i] = pool.submit(edges(cloud.url, kind).text, count)
            for i, text in texts.items():
                assert text.result() == expected[KINDS[i % len(KINDS)]]
            over.set()
            bad.result()
        wait_for(lambda: cloud.metric("sessions") == 0)
        sizes.append(cloud.resident)
    assert sizes[-1] - sizes[0] < 8 * 1024, sizes
    assert 'refused_total{code="message"}' in cloud.page("/metrics")[1]


def test_edges_wait_for_free_sessions(
    options: list[str], edges: Edges, texts: dict[str, list[int]], hello: Hello, tmp_path: Path
) -> None:
    with CloudProcess(tmp_path, *options, "--sessions", "2", "--idle", "4") as cloud, ThreadPoolExecutor(1) as pool:
        one, two = edges(cloud.url), edges(cloud.url)
        for edge in (one, two):
            edge.start(15, 2)
            edge.advance()
            edge.start(40)  # another text replaces the last one
            edge.advance(10)
        assert cloud.metric("sessions") == 2
        with pytest.raises(CloudUnavailable, match=r"all 2 sessions are taken; try again later\); start one with"):
            edges(cloud.url, patience=0.3).start(40)
        third = pool.submit(edges(cloud.url).text, 40)
        time.sleep(0.3)
        assert not third.done()
        one.channel._drop()
        assert third.result() == texts["topk"]  # in the slot of a lost connection
        assert one.advance() == two.advance() == texts["topk"]
        assert cloud.metric("sessions") == 2

        two.start(40)
        two.advance(10)
        wait_for(lambda: cloud.metric("sessions") == 0)  # idle, closed, and finally forgotten
        assert two.channel.connection is not None
        with pytest.raises(ConnectionClosed):
            two.channel.connection.recv(timeout=5)
        assert two.advance() == texts["topk"]
        two.channel.close()

        held = [connect(cloud.url, proxy=None).__enter__() for _ in range(4)]
        with pytest.raises(CloudUnavailable, match="HTTP 503"):
            edges(cloud.url, patience=0.3).start(40)
        for connection in held:
            connection.close()
        assert edges(cloud.url).text(40) == texts["topk"]


def test_stream_may_last_longer_than_idle_limit(options: list[str], edges: Edges, tmp_path: Path) -> None:
    with CloudProcess(tmp_path, *options, "--idle", "0.4") as cloud:
        edge = edges(cloud.url)
        edge.start(1500)
        begin, connection = time.monotonic(), edge.channel.connection
        edge.decoder.verifier.decode(1400, ())
        assert time.monotonic() - begin > 0.8 and edge.channel.connection is connection


def test_terminated_cloud_finishes_texts_within_grace(
    options: list[str], edges: Edges, texts: dict[str, list[int]], tmp_path: Path
) -> None:
    with CloudProcess(tmp_path, *options) as cloud:
        edge = edges(cloud.url, "mixed")
        edge.start(40)
        edge.advance(10)
        cloud.process.terminate()
        wait_for(lambda: cloud.page("/healthz") == (503, "draining\n"))
        with pytest.raises(CloudUnavailable, match="the cloud is shutting down and takes no new texts"):
            edges(cloud.url, patience=0.3).start(40)
        edge.advance(20)
        edge.channel._drop()  # its text is still there when it reconnects
        assert edge.advance() == texts["mixed"] and cloud.process.is_alive()
        edge.channel.close()
        assert cloud.end(5) == 0
    with CloudProcess(tmp_path, *options, "--grace", "0.1") as cloud, ThreadPoolExecutor(len(KINDS)) as pool:
        running = {kind: pool.submit(edges(cloud.url, kind).text, 40) for kind in KINDS}
        wait_for(lambda: cloud.metric("sessions") == len(KINDS))
        cloud.process.terminate()
        assert cloud.end(10) == 0 and "Traceback" not in cloud.printed
        cloud.launch()
        assert {kind: text.result() for kind, text in running.items()} == texts


def test_metrics_count_sessions_tokens_and_bytes(options: list[str], edges: Edges, tmp_path: Path) -> None:
    with CloudProcess(tmp_path, *options) as cloud:
        edge = edges(cloud.url)
        edge.start(40)
        edge.advance()
        assert cloud.page("/healthz") == (200, "ok\n") and cloud.page("/nothing")[0] == 404
        assert cloud.metric("sessions") == 1
        cycles = edge.decoder.cycles
        assert cloud.metric("drafted_tokens_total") == sum(cycle.drafted for cycle in cycles)
        assert cloud.metric("forward_seconds_count") == len(cycles) + 1  # one more for the first token
        assert cloud.metric("sent_bytes_total") > sum(cycle.bytes_down for cycle in cycles)
        edge.channel.close()
        wait_for(lambda: cloud.metric("sessions") == 0)
