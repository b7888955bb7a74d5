"""Simulated links between an edge device that drafts and a server that verifies.

A link has a state (rate up, rate down, round trip) that holds for one round and then moves: it stays (constant),
follows a Markov chain, or follows the log of a real link. What an exchange costs is computed from the state of its
round; the states are drawn from a generator of their own, so that two policies that send different bytes meet the same
link.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from spec_envs.checked import Checked, first_error
from spec_envs.files import DATA, find_json

LINKS = DATA / "links"
LITERAL = "constant:up=46,down=563,rtt=50"
LITERAL_KEYS = {"up": "up_mbps", "down": "down_mbps", "rtt": "rtt_ms", "jitter": "jitter_ms", "loss": "loss"}
PACKET = 1500  # most bytes of a packet
Rate = Annotated[float, Field(ge=1e-6, le=1e9)]  # Mbps; at least a bit per second, so that every message ends
Delay = Annotated[float, Field(ge=0, le=1e9)]  # ms
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class LinkState:
    """A link during one round, in Mbps and milliseconds as files state them, and in bytes and seconds."""

    up_mbps: float
    down_mbps: float
    rtt_ms: float

    @property
    def up(self) -> float:
        """Bytes per second from the edge to the server."""
        return self.up_mbps * 1e6 / 8

    @property
    def down(self) -> float:
        """Bytes per second from the server to the edge."""
        return self.down_mbps * 1e6 / 8

    @property
    def rtt(self) -> float:
        """Seconds of a round trip of an empty message."""
        return self.rtt_ms / 1e3


class Link:
    """A link of one state, and the base of those whose state moves.

    Args:
        name: a shipped name, the stem of a file, or a literal.
        states: every state that the link can be in.
        jitter_ms: mean of an exponential addition to every exchange.
        loss: probability that a packet is lost, each time it is sent.

    Attributes:
        state: state of this round; the first of ``states`` until the first ``reset``.
    """

    def __init__(self, name: str, states: tuple[LinkState, ...], jitter_ms: float = 0.0, loss: float = 0.0):
        self.name, self.states, self.jitter_ms, self.loss = name, states, jitter_ms, loss
        self.state = states[0]
        self.moves, self.noise = np.random.default_rng(0).spawn(2)

    def reset(self, rng: np.random.Generator) -> None:
        """Begin a text and draw the link's first state. Two generators are spawned from ``rng``, one for the states and
        one for jitter and loss; ``rng`` itself is not drawn from."""
        self.moves, self.noise = rng.spawn(2)
        self.state = self._first()

    def move(self) -> None:
        """Move to the state of the next round, whatever was sent in this one."""

    def seconds(self, bytes_up: int, bytes_down: int) -> float:
        """Return the seconds of one exchange: round trip, jitter, serialisation both ways, and retransmission. Each
        time that packets of one way are sent again costs a further round trip."""
        up, up_rounds = self._sent(bytes_up)
        down, down_rounds = self._sent(bytes_down)
        trips = 1 + up_rounds + down_rounds
        return trips * self.state.rtt + self.jitter() + up / self.state.up + down / self.state.down

    def push(self, bytes_down: int) -> float:
        """Return the seconds that a further frame of a stream adds: its serialisation, lost packets included. Its round
        trip and jitter overlap with those of the frames before it."""
        return self._sent(bytes_down)[0] / self.state.down

    def jitter(self) -> float:
        """Draw the seconds of jitter that are added to an exchange."""
        return float(self.noise.exponential(self.jitter_ms / 1e3)) if self.jitter_ms else 0.0

    def _sent(self, size: int) -> tuple[float, int]:
        """Return how many bytes are sent until ``size`` have arrived, in packets of equal size, and how many times lost
        packets were sent again."""
        if not self.loss or not size:
            return float(size), 0
        packets = math.ceil(size / PACKET)
        sent, rounds, missing = packets, 0, self.noise.binomial(packets, self.loss)
        while missing:
            sent, rounds, missing = sent + missing, rounds + 1, self.noise.binomial(missing, self.loss)
        return size / packets * sent, rounds

    def _first(self) -> LinkState:
        """Return the state in which a text starts."""
        return self.states[0]


class MarkovLink(Link):
    """A Markov chain of states that starts in its stationary distribution.

    Args:
        transitions: probabilities of the next state by row, ``[n, n]``; every state can be reached from every other.
    """

    def __init__(self, name: str, states: tuple[LinkState, ...], transitions: np.ndarray, **common: float):
        super().__init__(name, states, **common)
        self.transitions = transitions / transitions.sum(axis=1, keepdims=True)
        balance = self.transitions.T - np.eye(len(states))
        balance[-1] = 1.0  # one equation follows from the others; in its place, the sum
        self.stationary = np.linalg.solve(balance, np.eye(len(states))[-1])
        self.index = 0

    def move(self) -> None:
        self.index = int(self.moves.choice(len(self.states), p=self.transitions[self.index]))
        self.state = self.states[self.index]

    def _first(self) -> LinkState:
        self.index = int(self.moves.choice(len(self.states), p=self.stationary))
        return self.states[self.index]


class LogLink(Link):
    """A recorded log, followed in a circle from a time that is drawn for every text.

    Args:
        ms: time at which every row begins, ascending; the last one lasts as long as the one before it.
        rows: the state of every row.
        interval_ms: milliseconds of the log that a round lasts.
    """

    def __init__(self, name: str, ms: np.ndarray, rows: list[LinkState], interval_ms: float, **common: float):
        super().__init__(name, tuple(dict.fromkeys(rows)), **common)
        self.begins, self.rows, self.interval_ms = ms - ms[0], rows, interval_ms
        self.period = float(2 * self.begins[-1] - self.begins[-2])
        self.at = 0.0

    def move(self) -> None:
        self.at = (self.at + self.interval_ms) % self.period
        self.state = self._row()

    def _first(self) -> LinkState:
        self.at = float(self.moves.uniform(0, self.period))
        return self._row()

    def _row(self) -> LinkState:
        return self.rows[int(np.searchsorted(self.begins, self.at, side="right")) - 1]


class StateData(Checked):
    """A state of a Markov chain."""

    up_mbps: Rate
    down_mbps: Rate
    rtt_ms: Delay

    def state(self) -> LinkState:
        return LinkState(self.up_mbps, self.down_mbps, self.rtt_ms)


class Common(Checked):
    """Settings that every kind of link may have."""

    jitter_ms: Delay = 0.0
    loss: float = Field(default=0.0, ge=0, le=0.99)

    def common(self) -> dict[str, float]:
        return {"jitter_ms": self.jitter_ms, "loss": self.loss}


class ConstantData(StateData, Common):
    """A link whose state never changes."""

    kind: Literal["constant"]

    def link(self, name: str, folder: Path) -> Link:
        return Link(name, (self.state(),), **self.common())


class MarkovData(Common):
    """A Markov chain, given by all transitions or by the probability to stay; the other states are then equally
    probable."""

    kind: Literal["markov"]
    states: list[StateData] = Field(min_length=2)
    stay: float | None = Field(default=None, ge=0, lt=1)
    transitions: list[list[NotNegative]] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        n = len(self.states)
        if (self.stay is None) == (self.transitions is None):
            raise ValueError("expected either stay or transitions")
        if self.transitions is not None:
            if len(self.transitions) != n or any(len(row) != n for row in self.transitions):
                raise ValueError(f"transitions of {n} states need {n} rows of {n} probabilities")
            if any(abs(sum(row) - 1) > 1e-6 for row in self.transitions):
                raise ValueError("every row of transitions has to sum to 1")
            if not strongly_connected(np.array(self.transitions) > 0):
                raise ValueError("every state has to be within reach of every other")
        return self

    def link(self, name: str, folder: Path) -> Link:
        states = tuple(data.state() for data in self.states)
        return MarkovLink(name, states, self._matrix(), **self.common())

    def _matrix(self) -> np.ndarray:
        """Return the probabilities of the next state by row, ``[n, n]``."""
        if self.stay is None:
            return np.array(self.transitions, float)
        n = len(self.states)
        matrix = np.full((n, n), (1 - self.stay) / (n - 1))
        np.fill_diagonal(matrix, self.stay)
        return matrix


class LogData(Common):
    """A log: a CSV in the same folder as the JSON. ``rtt_ms`` is used if the CSV has no such column."""

    kind: Literal["trace"]
    csv: str
    interval_ms: float = Field(default=200.0, ge=1e-3, le=1e9)
    rtt_ms: Delay = 50.0

    def link(self, name: str, folder: Path) -> Link:
        rows = read_log(folder / self.csv)
        states = [
            LinkState(row.up_mbps or row.mbps, row.mbps, self.rtt_ms if row.rtt_ms is None else row.rtt_ms)
            for row in rows
        ]
        return LogLink(name, np.array([row.ms for row in rows]), states, self.interval_ms, **self.common())


class LogRow(BaseModel):
    """A row of a log: the time at which it begins, the rate down, the rate up (by default the same) and the round
    trip."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    ms: float = Field(ge=-1e12, le=1e12)
    mbps: Rate
    up_mbps: Rate | None = None
    rtt_ms: Delay | None = None


ADAPTER: TypeAdapter[ConstantData | MarkovData | LogData] = TypeAdapter(
    Annotated[ConstantData | MarkovData | LogData, Field(discriminator="kind")]
)
ROWS = TypeAdapter(Annotated[list[LogRow], Field(min_length=2)])


def load_link(source: str) -> Link:
    """Return a shipped link by name, a JSON file or a log (``.csv``) by path, or a literal
    ``"constant:up=46,down=563,rtt=50"`` (Mbps, Mbps, ms; ``jitter`` in ms and ``loss`` may follow).

    Raises:
        ValueError: the link is not found, or malformed.
    """
    if source.startswith("constant:"):
        return _check(_literal(source), repr(source), f"expected {LITERAL!r}").link(source, LINKS)
    path = find_json(source, LINKS, "link", "a log of yours (.csv)", LITERAL)
    if path.suffix == ".csv":
        return LogData(kind="trace", csv=path.name).link(path.stem, path.parent)
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a link ({error}); expected JSON as in {LINKS}") from None
    return _check(raw, str(path), f"see those in {LINKS}").link(path.stem, path.parent)


def read_log(path: Path) -> list[LogRow]:
    """Return the rows of a log: a CSV with the columns ``ms`` and ``mbps``, and maybe ``up_mbps`` and ``rtt_ms``.

    Raises:
        ValueError: there is no such file, or it is malformed.
    """
    expected = "expected a header ms,mbps (up_mbps and rtt_ms may follow) and at least two rows of numbers"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the CSV of a link's log")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = ROWS.validate_python(list(csv.DictReader(file, restval="")))
    except ValidationError as error:
        raise ValueError(f"{path} is not a link's log ({first_error(error)}); {expected}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a link's log ({error}); {expected}") from None
    for number, (row, following) in enumerate(itertools.pairwise(rows), 1):
        if following.ms <= row.ms:
            raise ValueError(f"{path} is not a link's log (row {number}: ms does not ascend); sort the rows by time")
    return rows


def _literal(source: str) -> dict[str, Any]:
    """Return ``constant:key=number,…`` as the data of a file."""
    data: dict[str, Any] = {"kind": "constant"}
    for part in source.removeprefix("constant:").split(","):
        key, _, number = part.partition("=")
        try:
            data[LITERAL_KEYS[key.strip()]] = float(number)
        except (KeyError, ValueError):
            raise ValueError(
                f"link {source!r}: {part!r} is not one of {', '.join(LITERAL_KEYS)} with a number; expected {LITERAL!r}"
            ) from None
    return data


def _check(raw: Any, what: str, hint: str) -> ConstantData | MarkovData | LogData:
    """Return the data of a link.

    Raises:
        ValueError: the data are malformed; the message names the first mistake.
    """
    try:
        return ADAPTER.validate_python(raw)
    except ValidationError as error:
        raise ValueError(f"{what} is not a link ({first_error(error)}); {hint}") from None


def strongly_connected(leads: np.ndarray) -> bool:
    """Return whether every state is within reach of every other, for ``leads`` ``[n, n]``: which state leads to
    which."""
    reach = leads | np.eye(len(leads), dtype=bool)
    for _ in range(len(leads).bit_length()):  # each round doubles the steps
        reach = reach @ reach
    return bool(reach.all())
