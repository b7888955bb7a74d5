"""The target's side of a network: the texts of many sessions, and forwards over the requests of several at once.

Nothing here knows how messages come in. What a request is answered with depends on the text, the draft and the session's
seed alone: the uniforms of a decision are those of (seed, length of the text), so that a request that is made again,
after the connection was lost or by a cloud that was started anew, has the same answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding import accept
from spec_envs.decoding.sampling import check_sampling, inverse_cdf, probabilities
from spec_envs.decoding.transformer import Transformer
from spec_envs.network.wire import (
    MODES,
    VERSION,
    Hello,
    Plain,
    Refused,
    Verdict,
    Verify,
    pack_logits,
    unpack_floats,
    unpack_ids,
    unpack_proposal,
)

LONGEST_DRAFT = 64  # tokens
TOGETHER = 64  # rows of a request up to which it shares a forward with others; a prompt has one of its own


@dataclass
class Session:
    """One text: its tokens, and a slot of the cache that has the rows of the first ``length`` of them."""

    hello: Hello
    slot: int
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A request that was found to make sense: to judge ``draft`` behind ``text``, whose first ``at`` tokens the session had.
    ``drafted_from`` are the distributions ``[vocab]`` that the draft is from, ``chances`` its tokens' q(x)."""

    session: Session
    at: int
    text: np.ndarray
    draft: np.ndarray
    mode: str
    drafted_from: Sequence[np.ndarray] = ()
    chances: Sequence[float] = ()


@dataclass(frozen=True)
class Answer:
    """How many drafted tokens were kept, and the token behind them; None where the edge is to draw it, from ``logits``."""

    accepted: int
    token: int | None
    logits: Tensor | None = None

    def verdict(self, number: int, seconds: float, queued: float) -> Verdict:
        """As it is sent."""
        if self.logits is None:
            return Verdict(number, self.accepted, -1 if self.token is None else self.token, seconds, queued)
        data, dtype = pack_logits(self.logits)
        return Verdict(number, self.accepted, -1, seconds, queued, data, dtype)


class Engine:
    """A target with sessions.

    Args:
        target: the model.
        vocabulary: hash of its tokenizer.
        sessions: most sessions at once.
        context: most tokens of a text; by default, and at most, the target's.

    Attributes:
        sessions: by the key that the edge gave them.
    """

    def __init__(self, target: Transformer, vocabulary: bytes, sessions: int = 1, context: int | None = None):
        self.target, self.vocabulary = target, vocabulary
        self.context = min(context or target.shape.context, target.shape.context)
        self.vocab = target.shape.vocab
        self.slots = target.slots(sessions, self.context + TOGETHER)  # a short row may be followed by junk
        self.free = list(range(sessions))
        self.sessions: dict[bytes, Session] = {}

    def open(self, hello: Hello) -> Session:
        """The session of an edge: as it was left, or a new one.

        Raises:
            Refused: the edge speaks another version, has another vocabulary or asks for sampling that makes no sense, or no
                slot is free.
        """
        if hello.version != VERSION:
            raise Refused(
                "version", f"the edge speaks version {hello.version}, this cloud {VERSION}; update the older one"
            )
        if hello.vocabulary != self.vocabulary:
            raise Refused("vocabulary", "the edge's tokenizer is not the target's; give both the same target")
        try:
            check_sampling(hello.temperature, hello.top_p)
        except ValueError as error:
            raise Refused("request", str(error)) from None
        found = self.sessions.get(hello.session)
        if found is None:
            if not self.free:
                raise Refused("busy", f"all {len(self.slots.lengths)} sessions are taken; try again later")
            found = self.sessions[hello.session] = Session(hello, self.free.pop())
        elif found.hello != hello:  # sampled otherwise: another text
            found = self.sessions[hello.session] = Session(hello, found.slot)
        return found

    def another(self) -> Engine:
        """One of the same target, for one session."""
        return Engine(self.target, self.vocabulary, 1, self.context)

    def close(self, session: Session) -> None:
        """Forget a session; its slot is free for another."""
        del self.sessions[session.hello.session]
        self.slots.lengths[session.slot] = 0
        self.free.append(session.slot)

    def job(self, session: Session, request: Verify | Plain) -> Job:
        """What a request asks for first: the judgement of its draft, or the next token.

        Raises:
            Refused: it makes no sense.
        """
        new = unpack_ids(request.text, self.vocab)
        if request.at > len(session.tokens):
            raise Refused(
                "request", f"the session has {len(session.tokens)} tokens; expected at most that, not {request.at}"
            )
        if not request.at + len(new):
            raise Refused("request", "the text is empty; expected at least one token")
        text = np.concatenate([np.array(session.tokens[: request.at], np.int64), new])
        if isinstance(request, Plain):
            unpack_ids(request.stop, self.vocab)
            self._check_room(len(text) + request.count)
            return Job(session, request.at, text, np.zeros(0, np.int64), "ids")
        draft = unpack_ids(request.draft, self.vocab)
        self._check_room(len(text) + len(draft) + 1)
        if len(draft) > LONGEST_DRAFT:
            raise Refused("limit", f"a draft of {len(draft)} tokens came in; expected at most {LONGEST_DRAFT}")
        if request.mode not in MODES or (len(draft) and (request.mode == "ids") != (session.hello.temperature == 0)):
            raise Refused("request", f"mode {request.mode!r} came in at temperature {session.hello.temperature}")
        drafted_from: list[np.ndarray] = []
        chances: list[float] = []
        if request.mode == "scalar":
            chances = unpack_floats(request.chances).tolist()
        elif request.mode != "ids":
            drafted_from = [unpack_proposal(sent, self.vocab) for sent in request.proposals[: len(draft) + 1]]
            chances = [float(q[token]) for q, token in zip(drafted_from, draft, strict=False)]
        told = len(drafted_from or chances)
        if request.mode != "ids" and (told != len(draft) or not all(chance > 0 for chance in chances)):
            raise Refused("request", "a drafted token has no distribution, or no chance in it")
        return Job(session, request.at, text, draft, request.mode, drafted_from, chances)

    def going_on(self, job: Job, token: int) -> Job:
        """What asks for the token behind ``token``, which was the answer to ``job``."""
        return Job(job.session, len(job.text), np.append(job.text, token), np.zeros(0, np.int64), "ids")

    def _check_room(self, tokens: int) -> None:
        if tokens > self.context:
            raise Refused("limit", f"the text may come to {tokens} tokens; expected at most {self.context}")

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answer jobs of different sessions: the short ones in one forward, and the long ones each in its own."""
        rows = [self._rows(job) for job in jobs]
        short = [i for i, r in enumerate(rows) if len(r) <= TOGETHER]
        batches = [short, *([i] for i in range(len(jobs)) if i not in short)]
        answers: dict[int, Answer] = {}
        for batch in filter(None, batches):
            hidden = self._forward([jobs[i].session.slot for i in batch], [rows[i] for i in batch])
            judged = [
                h[len(rows[i]) - len(jobs[i].draft) - 1 : len(rows[i])] for i, h in zip(batch, hidden, strict=True)
            ]
            answers |= dict(zip(batch, self._judge([jobs[i] for i in batch], judged), strict=True))
        return [answers[i] for i in range(len(jobs))]

    def _rows(self, job: Job) -> list[int]:
        """The tokens that a forward has to read, the draft's included; the cache is rolled back to what is before them."""
        slot, lengths = job.session.slot, self.slots.lengths
        lengths[slot] = min(lengths[slot], job.at, len(job.text) - 1)
        return [*job.text[lengths[slot] :].tolist(), *job.draft.tolist()]

    def _forward(self, slots: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
        """Last hidden states ``[sessions, n, hidden]`` of the rows, those of short ones followed by junk."""
        device, n = self.target.device, max(map(len, rows))
        ids = torch.tensor([[*r, *[0] * (n - len(r))] for r in rows], device=device)
        begin = torch.from_numpy(self.slots.lengths[list(slots)]).to(device)
        positions = (begin[:, None] + torch.arange(n, device=device)).clamp_(max=self.target.shape.context - 1)
        hidden, _ = self.target.forward(self.target.embed(ids), self.slots.batch(slots), positions)
        return hidden

    def _judge(self, jobs: Sequence[Job], hidden: Sequence[Tensor]) -> list[Answer]:
        """Apply each job's rule to the hidden states of its last token and draft, ``[draft + 1, hidden]``."""
        greedy = [job.session.hello.temperature == 0 for job in jobs]
        together, ends = torch.cat(list(hidden)), np.cumsum([len(h) for h in hidden])
        choices = self.target.head.argmax(together).cpu().numpy() if any(greedy) else np.zeros(0)
        logits = self.target.head(together) if not all(greedy) else together
        answers = []
        for job, end, h in zip(jobs, ends, hidden, strict=True):
            own = slice(end - len(h), end)
            hello = job.session.hello
            if hello.temperature == 0:
                answer = keep(job, choices[own])
            else:
                answer = judge(job, logits[own], np.random.default_rng([hello.seed, len(job.text)]).random)
            tokens = [*job.text.tolist(), *job.draft[: answer.accepted].tolist()]
            self.slots.lengths[job.session.slot] = len(tokens)
            job.session.tokens = tokens if answer.token is None else [*tokens, answer.token]
            answers.append(answer)
        return answers


def keep(job: Job, choices: np.ndarray) -> Answer:
    """The greedy rule, on the target's choices ``[draft + 1]``."""
    path, token = accept.greedy(job.draft, np.arange(len(job.draft)) - 1, choices)
    return Answer(len(path), token)


def judge(job: Job, logits: Tensor, uniform: Callable[[], float]) -> Answer:
    """The sampling rule, on logits ``[draft + 1, vocab]``."""
    hello = job.session.hello

    @functools.cache
    def p(row: int) -> np.ndarray:
        return probabilities(logits[row], hello.temperature, hello.top_p)

    if job.mode == "scalar":
        kept = accept.prefix(job.draft, job.chances, p, uniform)
        if kept < len(job.draft):
            return Answer(kept, None, logits[kept])
        return Answer(kept, inverse_cdf(p(kept), uniform()))
    path, token = accept.chained(job.draft, job.drafted_from, p, uniform)
    return Answer(len(path), token)
