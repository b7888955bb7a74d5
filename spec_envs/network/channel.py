"""Where an edge's requests go: to a cloud (`websocket.py`), or over a simulated link to one in this process."""

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
    """Requests and answers of one session at a time.

    Attributes:
        rtt: seconds of a round trip of next to nothing, as last seen.
    """

    rtt: float

    def begin(self, hello: Hello, rng: np.random.Generator) -> tuple[Welcome, Traffic]:
        """A new session."""

    def exchange(self, shared: int, request: Callable[[int], Verify]) -> tuple[Verdict, Traffic]:
        """The answer to a request that is made out for what the cloud has of the text: ``shared`` tokens, or fewer."""

    def stream(self, shared: int, request: Callable[[int], Plain]) -> Iterator[tuple[Tokens, Traffic]]:
        """The tokens of plain decoding as they come."""

    def idle(self) -> None:
        """A round goes by in which nothing is sent."""

    def another(self) -> Channel:
        """A channel to the same cloud over the same kind of link."""

    def close(self) -> None:
        """End the session; may be called twice."""


class SimulatedChannel:
    """A cloud in this process behind a simulated link: messages are encoded and decoded as they would be, what they take
    on the link is computed, nobody waits for it.

    Args:
        engine: with a session to spare.
        link: moves on with every forward of the target, be it the judgement of a draft or a token of plain decoding.

    Attributes:
        used: the state of the link at the last request.
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
        reply = encode(self.judge(expect(decode(frame), Verify)))
        self.rtt = self.link.state.rtt
        traffic = self._traffic(len(frame), len(reply))
        self.link.move()
        return expect(decode(reply), Verdict), traffic

    def judge(self, request: Verify) -> Verdict:
        """The cloud's answer."""
        assert self.session is not None
        begin = time.perf_counter()
        [answer] = self.engine.run([self.engine.job(self.session, request)])
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
                # A token travels while the next one is computed; only the last one is waited for.
                traffic = Traffic(0, len(reply), self.link.push(len(reply)) if tokens.last else 0.0, True)
            first = False
            self.link.move()
            yield expect(decode(reply), Tokens), traffic

    def tokens(self, request: Plain) -> Iterator[Tokens]:
        """The cloud's answers."""
        assert self.session is not None
        stop, job = set(unpack_ids(request.stop, self.engine.vocab).tolist()), self.engine.job(self.session, request)
        for index in range(request.count):
            begin = time.perf_counter()
            [answer] = self.engine.run([job])
            assert answer.token is not None
            last = index == request.count - 1 or answer.token in stop
            yield Tokens(request.number, answer.token, last, time.perf_counter() - begin, 0.0, index)
            if last:
                return
            job = self.engine.going_on(job, answer.token)

    def idle(self) -> None:
        self.used = self.link.state
        self.link.move()

    def another(self) -> SimulatedChannel:
        return SimulatedChannel(self.engine.another(), copy.deepcopy(self.link))

    def close(self) -> None:
        if self.session is not None:
            self.engine.close(self.session)
            self.session = None

    def _traffic(self, up: int, down: int) -> Traffic:
        self.used = self.link.state
        return Traffic(up, down, self.link.seconds(up, down), True)
