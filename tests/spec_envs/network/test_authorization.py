"""Which requests a cloud admits, and where an edge sends its token."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_envs.network.authorization import check_served, denied, is_loopback
from spec_envs.network.websocket import SocketChannel
from tests.support.cloud_process import CloudProcess
from tests.support.edges import UPGRADE

TOKEN = "0123456789abcdef-~+/=="
CASES: list[tuple[list[str], int, str]] = [
    ([f"Bearer {TOKEN}"], 101, ""),
    ([f"bearer {TOKEN}"], 101, ""),
    ([f"BEARER   {TOKEN}  "], 101, ""),
    ([], 401, 'Bearer realm="spec-envs"'),
    ([TOKEN], 401, 'Bearer realm="spec-envs"'),
    ([f"Basic {TOKEN}"], 401, 'Bearer realm="spec-envs"'),
    ([f"Bearer{TOKEN}"], 401, 'Bearer realm="spec-envs"'),
    (["Bearer"], 401, 'error="invalid_token"'),
    (["Bearer "], 401, 'error="invalid_token"'),
    ([f"Bearer {TOKEN[:-1]}"], 401, 'error="invalid_token"'),
    ([f"Bearer {TOKEN}x"], 401, 'error="invalid_token"'),
    ([f"Bearer {TOKEN} {TOKEN}"], 401, 'error="invalid_token"'),
    (["Bearer \x80\xff"], 401, 'error="invalid_token"'),
    ([f"Bearer {TOKEN}"] * 2, 400, 'error="invalid_request"'),
    ([f"Bearer {TOKEN}", "Bearer wrong"], 400, 'error="invalid_request"'),
]


@pytest.fixture(scope="module")
def cloud(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudProcess]:
    options = ["--target", str(tiny_target), "--dtype", "float32", "--device", "cpu"]
    with CloudProcess(tmp_path_factory.mktemp("cloud"), *options, SPEC_ENVS_TOKEN=TOKEN) as process:
        yield process


def get(cloud: CloudProcess, path: str, headers: list[str]) -> tuple[int, str]:
    """Return the status and head of the answer to a request with these Authorization headers."""
    lines = "".join(f"Authorization: {header}\r\n" for header in headers)
    with socket.create_connection(("127.0.0.1", cloud.port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\n".encode() + UPGRADE + f"{lines}\r\n".encode("latin-1"))
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(4096)
    return int(head.split()[1]), head.decode("latin-1")


@pytest.mark.parametrize(("headers", "status", "challenge"), CASES)
def test_requests_are_answered_as_in_rfc_6750(
    cloud: CloudProcess, headers: list[str], status: int, challenge: str
) -> None:
    for path, allowed in (("/", 101), ("/metrics", 200)):
        found, head = get(cloud, path, headers)
        assert found == (allowed if status == 101 else status)
        assert ("WWW-Authenticate: Bearer" in head) == (found >= 400) and challenge in head
        assert TOKEN not in head
    assert get(cloud, "/healthz", headers)[0] == 200
    assert cloud.printed.count("\n") == 1 and TOKEN not in cloud.printed


@given(st.lists(st.text(st.characters(max_codepoint=0xDFFF), max_size=30), max_size=2))
def test_requests_without_the_token_are_denied(headers: list[str]) -> None:
    found = denied(headers, TOKEN)
    assert found is not None and found[0] in (400, 401)


def test_cloud_without_a_token_needs_none() -> None:
    assert denied([], "") is None and denied(["Basic x"], "") is None
    assert denied(["Bearer x"] * 2, "") is not None


@pytest.mark.parametrize(
    ("token", "host", "sentence"),
    [
        ("", "0.0.0.0", "host is 0.0.0.0, which others can reach; set the environment variable SPEC_ENVS_TOKEN"),
        ("x", "0.0.0.0", "the token in SPEC_ENVS_TOKEN has 1 characters, and others can reach 0.0.0.0; expected 16"),
        ("x" * 15, "::", "has 15 characters"),
        ("x" * 15, "example.org", "has 15 characters"),
        ("x" * 16 + "\n", "127.0.0.1", "has characters that no bearer token may have"),
        ("ünbelievable-token", "0.0.0.0", "has characters that no bearer token may have"),
        ("two words and more", "::1", "has characters that no bearer token may have"),
    ],
)
def test_weak_or_invalid_tokens_are_refused(token: str, host: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        check_served(token, host)
    assert "\n" not in str(error.value) and (len(token) < 2 or token not in str(error.value))


def test_valid_tokens_are_accepted() -> None:
    for token, host in (("", "127.0.0.1"), ("", "localhost"), ("x", "::1"), ("x" * 16, "0.0.0.0"), (TOKEN, "::")):
        check_served(token, host)
    assert [is_loopback(host) for host in ("127.8.9.1", "LOCALHOST", "0.0.0.0", "localhost.example")] == [
        True,
        True,
        False,
        False,
    ]


def test_token_is_not_sent_unencrypted_to_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPEC_ENVS_TOKEN", TOKEN)
    for url in ("ws://there:1", "ws://192.0.2.1", "ws://[2001:db8::1]:8765", "ws://localhost.example:1"):
        with pytest.raises(ValueError, match=r"would go to .* in clear; take wss://") as error:
            SocketChannel(url)
        assert TOKEN not in str(error.value)
        assert SocketChannel(url, in_clear=True).another().in_clear
        SocketChannel(url, token="")
    for url in ("ws://localhost:1", "ws://127.0.0.1", "ws://[::1]:8765", "wss://there:1"):
        assert SocketChannel(url).token == TOKEN
    with pytest.raises(ValueError, match="has characters that no bearer token may have"):
        SocketChannel("ws://127.0.0.1:1", token="a\r\nHost: there")


@pytest.mark.parametrize(
    "url",
    ["http://there", "ws://", "ws://:80", "ws://there:70000", "ws://there:x", "ws://there/#x", "ws://th\nere", "ws:there",
     "ws://there \033[31m", "ws://" + "x" * 70 + ".org", "there:8765", "ws://[::1", "ws://me:secret-word@there"],
)  # fmt: skip
def test_invalid_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="the cloud's address") as error:
        SocketChannel(url)
    assert str(error.value).isprintable() and "secret-word" not in str(error.value)
