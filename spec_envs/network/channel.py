"""Channels carry an edge's requests to a cloud: over a WebSocket (`websocket.py`), or over a simulated link to a cloud
in this process."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from spec_envs.decoding.verifier import Traffic
from spec_envs.network.cloud.engine import Engine, Session
from spec_envs.network.link import Link
from spec_envs.network.wire import (
    Hello,
    Plain,
    Tokens,
    Verdict,
    Verify,
    Welcome,
    decode,
    encode,
    expect,
    unpack_ids,
)


class Channel(Protocol):
    """Carries the requests and answers of one session at a time.

    Attributes:
        rtt: seconds of the last round trip of a tiny message.
    """

    rtt: float

    def begin(self, hello: Hello, rng: np.random.Generator) -> tuple[Welcome, Traffic]:
        """Open a new session and return the cloud's greeting."""

    def exchange(self, shared: int, request: Callable[[int], Verify]) -> tuple[Verdict, Traffic]:
        """Send a request and return its answer.

        Args:
            shared: tokens of the text that the cloud is known to have.
            request: returns the request for a cloud that has a number of tokens: ``shared``, or fewer after a
                reconnection.
        """

    def stream(self, shared: int, request: Callable[[int], Plain]) -> Iterator[tuple[Tokens, Traffic]]:
        """Yield the tokens of plain decoding as they arrive; the arguments are those of ``exchange``."""

    def idle(self) -> None:
        """Let a round pass in which nothing is sent."""

    def another(self) -> Channel:
        """Return another channel to the same cloud over the same kind of link."""

    def close(self) -> None:
        """End the session; may be called twice."""


class SimulatedChannel:
    """A cloud in this process, reached over a simulated link.

    Messages are encoded and decoded as on a real link. Their time on the link is computed and not waited for.

    Args:
        engine: the cloud's engine, with a free session.
        link: its state moves after every forward of the target, whether it verifies a draft or decodes a token.

    Attributes:
        used: state of the link at the last request.
    """

    def __init__(self, engine: Engine, link: Link):
        self.engine, self.link = engine, link
        self.session: Session | None = None
        self.rtt = link.state.rtt

    def begin(self, hello: Hello, rng: np.random.Generator) -> tuple[Welcome, Traffic]:
        self.close()
        self.link.reset(rng)
        frame = encode(hello)
        self.session = self.engine.open(expect(decode(frame), Hello))
        reply = encode(Welcome(0, self.engine.context, self.engine.vocab))
        traffic = self._traffic(len(frame), len(reply))
        self.rtt = self.link.state.rtt
        return expect(decode(reply), Welcome), traffic

    def exchange(self, shared: int, request: Callable[[int], Verify]) -> tuple[Verdict, Traffic]:
        frame = encode(request(shared))
        reply = encode(self.verify(expect(decode(frame), Verify)))
        self.rtt = self.link.state.rtt
        traffic = self._traffic(len(frame), len(reply))
        self.link.move()
        return expect(decode(reply), Verdict), traffic

    def verify(self, request: Verify) -> Verdict:
        """Return the cloud's answer."""
        begin = time.perf_counter()
        [answer] = self.engine.run([self.engine.job(self._open_session(), request)])
        return answer.verdict(request.number, time.perf_counter() - begin, queued=0.0)

    def stream(self, shared: int, request: Callable[[int], Plain]) -> Iterator[tuple[Tokens, Traffic]]:
        plain = request(shared)
        frame, first = encode(plain), True
        for tokens in self.tokens(expect(decode(frame), Plain)):
            reply = encode(tokens)
            self.rtt = self.link.state.rtt
            if first:
                traffic = self._traffic(len(frame), len(reply))
            else:
                # A token travels while the next one is computed; only the last one adds its seconds.
                traffic = Traffic(0, len(reply), self.link.push(len(reply)) if tokens.last else 0.0, True)
            first = False
            self.link.move()
            yield expect(decode(reply), Tokens), traffic

    def tokens(self, request: Plain) -> Iterator[Tokens]:
        """Yield the cloud's answers, one for each token."""
        stop = set(unpack_ids(request.stop, self.engine.vocab).tolist())
        job = self.engine.job(self._open_session(), request)
        for index in range(request.count):
            begin = time.perf_counter()
            token = self.engine.next_token(job)
            last = index == request.count - 1 or token in stop
            yield Tokens(request.number, token, last, time.perf_counter() - begin, 0.0, index)
            if last:
                return
            job = self.engine.following(job, token)

    def idle(self) -> None:
        self.used = self.link.state
        self.link.move()

    def another(self) -> SimulatedChannel:
        return SimulatedChannel(self.engine.another(), copy.deepcopy(self.link))

    def close(self) -> None:
        if self.session is not None:
            self.engine.close(self.session)
            self.session = None

    def _open_session(self) -> Session:
        if self.session is None:
            raise RuntimeError("the channel is closed; call begin first")
        return self.session

    def _traffic(self, up: int, down: int) -> Traffic:
        self.used = self.link.state
        return Traffic(up, down, self.link.seconds(up, down), True)
