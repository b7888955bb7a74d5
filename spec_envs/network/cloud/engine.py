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
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.sampling import check_sampling, inverse_cdf, probabilities
from spec_envs.network.wire import (
    MODES,
    VERSION,
    Hello,
    Plain,
    Refused,
    Sent,
    Verdict,
    Verify,
    ids_dtype,
    pack_logits,
    unpack_floats,
    unpack_ids,
    unpack_proposal,
)

LONGEST_DRAFT = 64  # tokens
TOGETHER = 64  # rows of a request up to which it shares a forward with others
CHUNK = 128  # rows of a longer one, mostly a prompt, that one forward reads


@dataclass
class Session:
    """One text: its tokens ``[n]``, and a slot of the cache that has the rows of the first ones of them."""

    hello: Hello
    slot: int
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Job:
    """A request that was found to make sense: to verify ``draft`` after ``text``. ``chances`` are the q(x) of its tokens,
    ``drafted_from`` the distributions that they were drawn from, as they were sent: unpacked they are many times as large.
    """

    session: Session
    text: np.ndarray
    draft: np.ndarray
    mode: str
    drafted_from: Sequence[Sent] = ()
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
        chunk: most rows that one forward reads of a long request. In int8 a row has the same bits whatever this is.

    Attributes:
        sessions: by the key that the edge gave them.
    """

    def __init__(
        self,
        target: Transformer,
        vocabulary: bytes,
        sessions: int = 1,
        context: int | None = None,
        chunk: int = CHUNK,
    ):
        self.target, self.vocabulary, self.chunk = target, vocabulary, chunk
        self.context = min(context or target.shape.context, target.shape.context)
        self.vocab = target.shape.vocab
        self.slots = target.slots(sessions, self.context + TOGETHER)  # a short row may be followed by junk
        self.free = list(range(sessions))
        self.sessions: dict[bytes, Session] = {}

    @property
    def longest_request(self) -> int:
        """Bytes of the longest message that makes sense: a whole text, and a draft with its whole distributions."""
        return self.context * ids_dtype(self.vocab).itemsize + LONGEST_DRAFT * (2 * self.vocab + 32) + 1024

    def check(self, hello: Hello) -> None:
        """Refuse an edge that this target cannot serve, before anything is changed.

        Raises:
            Refused: the edge speaks another version, has another vocabulary or asks for sampling that makes no sense.
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

    def open(self, hello: Hello) -> Session:
        """The session of an edge: as it was left, or a new one.

        Raises:
            Refused: as in ``check``, or no slot is free.
        """
        self.check(hello)
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
        return Engine(self.target, self.vocabulary, 1, self.context, self.chunk)

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
        text = np.concatenate([session.tokens[: request.at], new])
        if isinstance(request, Plain):
            unpack_ids(request.stop, self.vocab)
            self._check_room(len(text) + request.count)
            return Job(session, text, np.zeros(0, np.int64), "ids")
        draft = unpack_ids(request.draft, self.vocab)
        self._check_room(len(text) + len(draft) + 1)
        if len(draft) > LONGEST_DRAFT:
            raise Refused("limit", f"a draft of {len(draft)} tokens came in; expected at most {LONGEST_DRAFT}")
        if request.mode not in MODES or (len(draft) and (request.mode == "ids") != (session.hello.temperature == 0)):
            raise Refused("request", f"mode {request.mode!r} came in at temperature {session.hello.temperature}")
        drafted_from: list[Sent] = []
        chances: list[float] = []
        if request.mode == "scalar":
            chances = unpack_floats(request.chances).tolist()
        elif request.mode != "ids":
            drafted_from = request.proposals
            pairs = zip(drafted_from, draft.tolist(), strict=False)
            chances = [float(unpack_proposal(sent, self.vocab)[token]) for sent, token in pairs]
        told = len(drafted_from or chances)
        if request.mode != "ids" and (told != len(draft) or not all(chance > 0 for chance in chances)):
            raise Refused("request", "a drafted token has no distribution, or no chance in it")
        return Job(session, text, draft, request.mode, drafted_from, chances)

    def going_on(self, job: Job, token: int) -> Job:
        """What asks for the token behind ``token``, which was the answer to ``job``."""
        return Job(job.session, np.append(job.text, token), np.zeros(0, np.int64), "ids")

    def _check_room(self, tokens: int) -> None:
        if tokens > self.context:
            raise Refused("limit", f"the text may come to {tokens} tokens; expected at most {self.context}")

    def rows(self, job: Job) -> int:
        """How many rows have to be read for the answer to a job: tokens of its text that the cache lacks, and its draft."""
        return len(job.text) - self._known(job) + len(job.draft)

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answer jobs of different sessions: the short ones in one forward, each of the long ones by itself, in chunks."""
        for job in jobs:
            while self.rows(job) > max(TOGETHER, self.chunk):
                self.read(job)
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

    @torch.inference_mode()
    def read(self, job: Job) -> None:
        """Read one chunk of a job that has more rows than that, and leave the rest, and the answer, for later."""
        rows = self._rows(job)[: self.chunk]
        slot, session = job.session.slot, job.session
        self._forward([slot], [rows])
        end = self.slots.lengths[slot] + len(rows)
        session.tokens, self.slots.lengths[slot] = job.text[:end], end

    def _known(self, job: Job) -> int:
        """Rows of the cache that are of the job's text; its last token is read in any case."""
        tokens = job.session.tokens
        n = min(self.slots.lengths[job.session.slot], len(job.text) - 1, len(tokens))
        other = tokens[:n] != job.text[:n]
        return int(other.argmax()) if other.any() else int(n)

    def _rows(self, job: Job) -> list[int]:
        """The tokens that a forward has to read, the draft's included; the cache is rolled back to what is before them."""
        known = self.slots.lengths[job.session.slot] = self._known(job)
        return [*job.text[known:].tolist(), *job.draft.tolist()]

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
            tokens = np.concatenate([job.text, job.draft[: answer.accepted]])
            self.slots.lengths[job.session.slot] = len(tokens)
            job.session.tokens = tokens if answer.token is None else np.append(tokens, answer.token)
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

    kept = accept.prefix(job.draft, job.chances, p, uniform)
    if kept == len(job.draft):
        return Answer(kept, inverse_cdf(p(kept), uniform()))
    if job.mode == "scalar":
        return Answer(kept, None, logits[kept])
    q = unpack_proposal(job.drafted_from[kept], len(p(kept)))
    return Answer(kept, inverse_cdf(accept.residual(p(kept), q), uniform()))
