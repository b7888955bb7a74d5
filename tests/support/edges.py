"""Edges that generate texts with a cloud, and a client that sends arbitrary frames."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.network.cloud.server import Cloud
from spec_envs.network.edge.linked import LinkedDecoder
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.websocket import SocketChannel
from spec_envs.network.wire import (
    decode,
    vocabulary_hash,
)
from tests.support.models.tiny import WORDS

VOCAB = len(WORDS)
PROMPT = [3, 4, 5]
KINDS = ["ids", "scalar", "topk", "full", "plain", "mixed"]
Edges = Callable[..., "Edge"]
UPGRADE = (  # headers of a request for a WebSocket, without the line break that ends them
    b"Host: cloud\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n"
)


class Edge:
    """Generate texts with a cloud.

    Args:
        kind: how the distributions of drafts are sent. ``ids`` is greedy decoding, ``plain`` the cloud's own text as it
            streams it, ``mixed`` alternates drafts and such streams.
        others: further arguments of the channel.
    """

    def __init__(self, url: str, target: str, draft: str, kind: str = "topk", **others: Any):
        local = load_decoder(target, draft, "cpu", "float32", width=1, max_depth=7, temperature=float(kind != "ids"))
        self.kind, channel = kind, SocketChannel(url, **others)
        own = local.verifier
        verifier = RemoteVerifier(
            channel, vocabulary_hash(load_tokenizer(target)), own.vocab, own.context, own.temperature, own.top_p
        )
        self.decoder = LinkedDecoder(verifier, local.drafter, local.clock, (), local.max_depth, local.detokenize)
        if kind == "plain":
            self.decoder = LinkedDecoder(verifier.plain(), None, local.clock, ())
        elif kind != "ids":
            verifier.mode = "topk" if kind == "mixed" else kind
            self.decoder.drafter.top_k = 5  # type: ignore[union-attr]

    @property
    def channel(self) -> SocketChannel:
        return self.decoder.verifier.channel  # type: ignore[attr-defined]

    def start(self, count: int, seed: int = 1) -> None:
        """Start a text of ``count`` tokens."""
        self.decoder.start(PROMPT, count, np.random.default_rng(seed))

    def advance(self, tokens: int = 2**31) -> list[int]:
        """Continue until the text has at least this many tokens, and return the text."""
        while not self.decoder.finished and len(self.decoder.tokens) < tokens:
            if self.kind == "mixed" and len(self.decoder.cycles) % 2:
                self.decoder.decode(5)
            else:
                self.decoder.cycle(0 if self.kind == "plain" else 4)
        return self.decoder.tokens

    def text(self, count: int, seed: int = 1) -> list[int]:
        """Generate a whole text, close the channel, and return the text."""
        self.start(count, seed)
        tokens = self.advance()
        self.channel.close()
        return tokens


def send_frames(url: str, *frames: Any, **others: Any) -> list[Any]:
    """Send frames; return the decoded answers, followed by the code with which the connection was closed."""
    answers: list[Any] = []
    with connect(url, compression=None, proxy=None, **others) as connection:
        with contextlib.suppress(ConnectionClosed):
            for frame in frames:
                connection.send(frame)
        try:
            while True:
                answers.append(decode(connection.recv(timeout=10)))
        except ConnectionClosed as closed:
            return [*answers, closed.rcvd.code if closed.rcvd else None]


def replaced(message: Any, **fields: Any) -> Any:
    """Return a copy of a message with some fields replaced."""
    return type(message)(**{name: getattr(message, name) for name in message.__struct_fields__} | fields)


def wait_for(true: Callable[[], bool]) -> None:
    """Wait until a condition holds, for up to 30 s."""
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < 30
        time.sleep(0.05)


@contextlib.contextmanager
def in_process(cloud: Cloud) -> Iterator[str]:
    """Run a cloud on a thread of this process, and yield its address."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    address = ""

    async def main() -> None:
        nonlocal address
        async with cloud.listening("127.0.0.1", 0) as server:
            address = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
