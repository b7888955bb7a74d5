"""Expected-acceptance traces: an approximate replay of speculation over a link, without models.

For texts that the target sampled, a trace holds for every position and each k the probability Σ min(p, q̂_k) that a
token drafted there is accepted. In a replay every drafted token is right with its probability, and the text continues
as it was recorded. This is an approximation, because the text does not depend on what was drafted, although after a
rejection another text would follow. Messages are encoded with as many entries as they would have, so that their bytes
are real.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from spec_envs.decoding.clock import CostTable, WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.drafters.lookup import SHORTEST
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.traces.arrays import read_npz
from spec_envs.decoding.traces.recording import EVERY, Problem, Recording, chosen
from spec_envs.decoding.tree import Children
from spec_envs.decoding.verifier import Traffic
from spec_envs.files import DATA, is_file
from spec_envs.network.channel import SimulatedChannel
from spec_envs.network.edge.linked import LinkedDecoder
from spec_envs.network.edge.remote import RemoteVerifier
from spec_envs.network.link import Link
from spec_envs.network.wire import Hello, Plain, Tokens, Verdict, Verify, Welcome, encode, ids_dtype, unpack_ids

TRACES = DATA / "traces"
CONTEXT = 2**20
VERSION = 3
LARGEST = 2**30  # bytes of a file's arrays


@dataclass(frozen=True)
class ExpectedText:
    """A recorded text and the drafter's distribution at each of its n tokens after the first.

    Attributes:
        task, split, prompt, tokens: kind of prompt, split, ids of the prompt and of the text.
        acceptance: ``[n, ks]``, probability that a drafted token is accepted, for each k.
        probability: ``[n]``, expected probability of a token that is drawn.
        entropy: ``[n]``, in nats.
        entries: ``[n]``, number of tokens that the distribution has.
        match: ``[n]``, how many of the last tokens match the place that would be copied from.
    """

    task: str
    split: str
    prompt: list[int]
    tokens: list[int]
    acceptance: np.ndarray
    probability: np.ndarray
    entropy: np.ndarray
    entries: np.ndarray
    match: np.ndarray


@dataclass(frozen=True)
class ExpectedTrace(Recording):
    """Texts that were recorded (`spec-envs trace SpecTopK-v0`), to be replayed over a link.

    Attributes:
        name: name of its file.
        target, drafter: the models that it was recorded with.
        clock: name of the cost table that prices it by default.
        vocab, eos: size of the target's vocabulary, and the id that ends a text.
        temperature: temperature at which the texts were sampled.
        ks: numbers of entries for which acceptance was recorded; 0 stands for the whole distribution.
        texts: the recorded texts.
        source: JSON of the conditions it is valid for: hashes of both weights, dtype, prompts.
    """

    static_over_plain = 1.0  # not measured
    name: str
    target: str
    drafter: str
    clock: str
    vocab: int
    eos: int
    temperature: float
    ks: tuple[int, ...]
    texts: tuple[ExpectedText, ...]
    source: str = "{}"

    @classmethod
    @functools.cache
    def load(cls, source: str) -> ExpectedTrace:
        """Return a shipped trace by name, or any by its path, read once per process.

        Raises:
            ValueError: the trace is not found, or damaged.
        """
        path = next((p for p in (TRACES / f"{source}.npz", Path(source)) if is_file(p)), None)
        if path is None:
            shipped = ", ".join(sorted(p.stem for p in TRACES.glob("*.npz")))
            raise ValueError(
                f"no expected-acceptance trace {source!r}: expected an .npz of `spec-envs trace SpecTopK-v0`, or "
                f"one of {shipped}"
            )
        try:
            return cls._of(path.stem, read_npz(path, LARGEST))
        except (OSError, KeyError, IndexError, ValueError, TypeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is not an expected-acceptance trace ({reason}); record it again") from None

    @classmethod
    def _of(cls, name: str, data: dict[str, np.ndarray]) -> ExpectedTrace:
        """Return the trace of the arrays of a file."""
        if int(data["version"]) != VERSION:
            raise ValueError(f"version {data['version']}; this is version {VERSION}")
        vocab, eos, temperature = int(data["vocab"]), int(data["eos"]), float(data["temperature"])
        ks, rows = tuple(data["ks"].tolist()), len(data["tokens"])
        if data["acceptance"].shape != (rows, len(ks)):
            raise ValueError(f"its acceptance is of shape {data['acceptance'].shape}; expected {(rows, len(ks))}")
        bounds: tuple[tuple[str, float, float], ...] = (
            ("acceptance", 0, 1.01),  # rounded
            ("probability", 0, 1.01),
            ("entropy", 0, np.inf),
            ("entries", 1, vocab),
            ("match", 0, np.inf),
            ("tokens", 0, vocab - 1),
            ("prompts", 0, vocab - 1),
            ("lengths", 1, rows),
            ("prompt_lengths", 1, len(data["prompts"])),
            ("temperature", 0, 100),
        )
        for column, lowest, highest in bounds:
            values = data[column]
            if not (np.isfinite(values).all() and (values >= lowest).all() and (values <= highest).all()):
                raise ValueError(f"its {column} are not all from {lowest} to {highest}")
        if data["lengths"].sum() != rows or data["prompt_lengths"].sum() != len(data["prompts"]):
            raise ValueError("its lengths are not those of its texts")
        ends = np.cumsum(data["lengths"])
        prompts = np.split(data["prompts"], np.cumsum(data["prompt_lengths"])[:-1])
        names = ("tokens", "acceptance", "probability", "entropy", "entries", "match")
        columns = [np.split(data[column], ends[:-1]) for column in names]
        if {len(prompts), len(data["tasks"]), len(data["splits"])} != {len(ends)}:
            raise ValueError("its arrays are of different lengths")
        texts = tuple(
            ExpectedText(str(task), str(split), prompt.tolist(), tokens.tolist(), *rest)
            for task, split, prompt, tokens, *rest in zip(data["tasks"], data["splits"], prompts, *columns, strict=True)
        )
        target, drafter, clock, source = (str(data[column]) for column in ("target", "drafter", "clock", "source"))
        return cls(name, target, drafter, clock, vocab, eos, temperature, ks, texts, source)

    @staticmethod
    def named(source: str) -> bool:
        """Return True if a name is that of an expected-acceptance trace."""
        return source.endswith(".npz") or is_file(TRACES / f"{source}.npz")

    def save(self, path: Path) -> None:
        """Write an npz file."""
        columns: dict[str, Any] = {
            name: np.concatenate([np.asarray(getattr(text, name)) for text in self.texts])
            for name in ("tokens", "acceptance", "probability", "entropy", "entries", "match")
        }
        columns |= {
            "version": VERSION,
            "lengths": [len(text.tokens) for text in self.texts],
            "prompts": np.concatenate([text.prompt for text in self.texts]).astype(np.int32),
            "prompt_lengths": [len(text.prompt) for text in self.texts],
            "tasks": [text.task for text in self.texts],
            "splits": [text.split for text in self.texts],
        }
        own = ("target", "drafter", "clock", "vocab", "eos", "temperature", "ks", "source")
        columns |= {name: getattr(self, name) for name in own}
        with path.open("wb") as file:
            np.savez_compressed(file, **columns)

    def costs(self) -> CostTable:
        return CostTable.load(self.clock)

    def settings(self) -> dict[str, Any]:
        return {"target": self.target, "drafter": self.drafter, "temperature": self.temperature}

    def prompts(self, split: str, names: str = EVERY) -> list[tuple[str, list[int]]]:
        return [(self.texts[i].task, self.texts[i].prompt) for i in chosen(self.name, self.texts, split, names)]

    def check(self, problem: Problem, max_new_tokens: int | None = None) -> None:
        """Do nothing: a shorter text ends where its record ends, and ``decoder`` refuses every control."""

    def decoder(self, problem: Problem, clock: WallClock) -> Decoder:
        """Refuse a control without a link; a control with a link opens the trace by ``over``.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"the trace {self.name!r} has drafts over a link, which do not replay {problem.env_id}; expected SpecTopK-v0"
        )

    def over(self, link: Link, clock: WallClock, max_depth: int) -> LinkedDecoder:
        """Return a decoder of chains that replays the trace over a link."""
        channel = ExpectedChannel(self, link)
        verifier = RemoteVerifier(channel, bytes(16), self.vocab, CONTEXT, self.temperature)
        return LinkedDecoder(verifier, ExpectedDrafter(self), clock, {self.eos}, max_depth)

    def find(self, prompt: Sequence[int]) -> ExpectedText:
        """Return the text that answers a prompt."""
        return self._by_prompt[tuple(prompt)]

    @functools.cached_property
    def _by_prompt(self) -> dict[tuple[int, ...], ExpectedText]:
        return {tuple(text.prompt): text for text in self.texts}


class ExpectedDrafter(ChainDrafter):
    """Drafts the recorded token with its recorded probability of acceptance, and another token otherwise.

    Attributes:
        top_k: see ``ChainDrafter``; one of the trace's ``ks``, or more entries than the distribution has.
    """

    context = CONTEXT

    def __init__(self, trace: ExpectedTrace):
        self.trace, self.vocab = trace, trace.vocab
        self.columns = {k: column for column, k in enumerate(trace.ks)}
        self.ones = np.ones(self.vocab)
        self.ids = np.arange(1, self.vocab)

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        self.text, self.rng, self.at = self.trace.find(text[:-1]), rng, 0

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Move forward by the tokens that joined the text."""
        self.at += len(tokens)

    def matched(self) -> int:
        """Return how many of the last tokens match the place that would be copied from, as it was recorded."""
        return int(self.text.match[min(self.at, len(self.text.match) - 1)])

    def source(self, chain: list[int]) -> None:
        """Return None: the place was not recorded."""

    def draft(self, chain: list[int]) -> tuple[Children, int]:
        """Return the token after the chain, and the rows of its forward: none for a copy."""
        text = self.text
        at = min(self.at + len(chain), len(text.acceptance) - 1)
        entries = int(text.entries[at])
        right = text.tokens[min(at + 1, len(text.tokens) - 1)]
        token = right if self.rng.random() < text.acceptance[at, self._column(entries)] else (right + 1) % self.vocab
        kept = entries if self.top_k is None else min(entries, self.top_k)
        proposal = Proposal(self.ids[:kept], self.ones[:kept])
        log_prob = np.log([[max(float(text.probability[at]), 1e-6)]])
        children = Children(np.array([[token]]), log_prob, text.entropy[at : at + 1].astype(float), proposal)
        return children, 0 if text.match[at] >= SHORTEST else 1

    def _column(self, entries: int) -> int:
        """Return the column of acceptances for the present ``top_k``."""
        if self.top_k is None or self.top_k >= entries:
            return self.columns[0]
        if self.top_k not in self.columns:
            raise ValueError(
                f"k is {self.top_k}; the trace {self.trace.name!r} has {', '.join(map(str, self.columns))}"
            )
        return self.columns[self.top_k]


class ExpectedChannel(SimulatedChannel):
    """A link to a cloud that answers with the recorded text."""

    text: ExpectedText | None = None

    def __init__(self, trace: ExpectedTrace, link: Link):
        self.trace, self.link, self.rtt = trace, link, link.state.rtt
        self.wide = ids_dtype(trace.vocab)

    def begin(self, hello: Hello, rng: np.random.Generator) -> tuple[Welcome, Traffic]:
        self.link.reset(rng)
        self.rtt, self.text = self.link.state.rtt, None
        welcome = Welcome(0, CONTEXT, self.trace.vocab)
        return welcome, self._traffic(len(encode(hello)), len(encode(welcome)))

    def verify(self, request: Verify) -> Verdict:
        """Accept the drafted tokens up to the first one that differs from the recorded text."""
        tokens, at = self._next(request)
        draft = unpack_ids(request.draft, self.trace.vocab)
        kept = 0
        while kept < len(draft) and at + kept < len(tokens) and draft[kept] == tokens[at + kept]:
            kept += 1
        token = tokens[at + kept] if at + kept < len(tokens) else self.trace.eos
        if request.mode != "scalar" or kept == len(draft):
            return Verdict(request.number, kept, token, 0.0, 0.0)
        logits = np.full(self.trace.vocab, -np.inf, np.float32)
        logits[token] = 0.0
        return Verdict(request.number, kept, -1, 0.0, 0.0, logits.tobytes(), "float32")

    def tokens(self, request: Plain) -> Iterator[Tokens]:
        tokens, at = self._next(request)
        for index in range(request.count):
            token = tokens[at + index] if at + index < len(tokens) else self.trace.eos
            last = index == request.count - 1 or token == self.trace.eos
            yield Tokens(request.number, token, last, 0.0, 0.0, index)
            if last:
                return

    def another(self) -> ExpectedChannel:
        return ExpectedChannel(self.trace, copy.deepcopy(self.link))

    def close(self) -> None:
        """Do nothing: there is no session."""

    def _next(self, request: Verify | Plain) -> tuple[list[int], int]:
        """Return the recorded tokens, and the index of the one that comes next."""
        text = self.text
        if text is None:  # the first request of a text has its whole prompt
            text = self.text = self.trace.find(unpack_ids(request.text, self.trace.vocab).tolist())
        at = request.at + len(request.text) // self.wide.itemsize - len(text.prompt)
        return text.tokens, at
