"""The target's side of a network: it keeps the texts of many sessions, and serves several requests in one forward.

Nothing here depends on how messages arrive. The answer to a request depends only on the text, the draft and the
session's seed: the uniform numbers of a decision are drawn from (seed, length of the text). A request that is
repeated, after the connection was lost or to a cloud that was restarted, therefore has the same answer.
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
SHORT = 64  # most rows of a request that shares a forward with others
CHUNK = 128  # rows of a longer request, mostly a prompt, that one forward reads


@dataclass
class Session:
    """One text: its tokens ``[n]``, and the slot of the cache that holds the rows of the first of them."""

    hello: Hello
    slot: int
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Job:
    """A checked request to verify ``draft`` after ``text``.

    Attributes:
        session: the session of the text.
        text, draft: token ids ``[n]``.
        mode: how the distributions of the draft were sent, one of ``MODES``.
        proposals: the distributions from which the draft was drawn, as they were sent; unpacked they are much larger.
        probabilities: q(x) of the drafted tokens.
    """

    session: Session
    text: np.ndarray
    draft: np.ndarray
    mode: str
    proposals: Sequence[Sent] = ()
    probabilities: Sequence[float] = ()


@dataclass(frozen=True)
class Answer:
    """The number of accepted drafted tokens, and the token after them.

    The token is None if the edge has to draw it from the residual of ``logits``.
    """

    accepted: int
    token: int | None
    logits: Tensor | None = None

    def next_token(self) -> int:
        """Return the token.

        Raises:
            ValueError: the edge has to draw the token.
        """
        if self.token is None:
            raise ValueError("the edge draws the token after this draft; expected an answer to a request without one")
        return self.token

    def verdict(self, number: int, seconds: float, queued: float) -> Verdict:
        """Return the message that sends this answer to request ``number``."""
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
        context: most tokens of a text; by default, and at most, those of the target's context.
        chunk: most rows of a long request that one forward reads. In int8 and q4 the result has the same bits for any value.

    Attributes:
        sessions: open sessions by the key that the edge gave them.
        free: slots without a session.
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
        self.slots = target.slots(sessions, self.context + SHORT)  # short rows are padded on the right
        self.free = list(range(sessions))
        self.sessions: dict[bytes, Session] = {}

    @property
    def longest_request(self) -> int:
        """Bytes of the longest valid message, which has a whole text and the longest draft with full distributions."""
        return self.context * ids_dtype(self.vocab).itemsize + LONGEST_DRAFT * (2 * self.vocab + 32) + 1024

    def check(self, hello: Hello) -> None:
        """Refuse an edge that this target cannot serve; nothing is changed.

        Raises:
            Refused: the edge has another version or vocabulary, or its sampling parameters are out of range.
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
        """Return the session of an edge, as it was left or a new one.

        Raises:
            Refused: the edge cannot be served (``check``), or no slot is free.
        """
        self.check(hello)
        found = self.sessions.get(hello.session)
        if found is None:
            if not self.free:
                raise Refused("busy", f"all {len(self.slots.lengths)} sessions are taken; try again later")
            found = self.sessions[hello.session] = Session(hello, self.free.pop())
        elif found.hello != hello:  # other sampling parameters, so another text
            found = self.sessions[hello.session] = Session(hello, found.slot)
        return found

    def another(self) -> Engine:
        """Return an engine of the same target, for one session."""
        return Engine(self.target, self.vocabulary, 1, self.context, self.chunk)

    def close(self, session: Session) -> None:
        """Forget a session and free its slot."""
        del self.sessions[session.hello.session]
        self.slots.lengths[session.slot] = 0
        self.free.append(session.slot)

    def job(self, session: Session, request: Verify | Plain) -> Job:
        """Return the first job of a request: to verify its draft, or to decode the next token.

        Raises:
            Refused: the request is not valid.
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
            raise Refused("limit", f"received a draft of {len(draft)} tokens; expected at most {LONGEST_DRAFT}")
        if request.mode not in MODES or (len(draft) and (request.mode == "ids") != (session.hello.temperature == 0)):
            raise Refused("request", f"received mode {request.mode!r} at temperature {session.hello.temperature}")
        proposals: list[Sent] = []
        q: list[float] = []
        if request.mode == "scalar":
            q = unpack_floats(request.probabilities).tolist()
        elif request.mode != "ids":
            proposals = request.proposals
            pairs = zip(proposals, draft.tolist(), strict=False)
            q = [float(unpack_proposal(distribution, self.vocab)[token]) for distribution, token in pairs]
        sent = len(proposals or q)
        if request.mode != "ids" and (sent != len(draft) or not all(probability > 0 for probability in q)):
            raise Refused("request", "a drafted token has no distribution, or probability 0 in it")
        return Job(session, text, draft, request.mode, proposals, q)

    def following(self, job: Job, token: int) -> Job:
        """Return the job that decodes the token after ``token``, which was the answer to ``job``."""
        return Job(job.session, np.append(job.text, token), np.zeros(0, np.int64), "ids")

    def _check_room(self, tokens: int) -> None:
        if tokens > self.context:
            raise Refused("limit", f"the text may have {tokens} tokens in the end; expected at most {self.context}")

    def rows(self, job: Job) -> int:
        """Return how many rows a job has to read: the tokens of its text that are not in the cache, and its draft."""
        return len(job.text) - self._known(job) + len(job.draft)

    @torch.inference_mode()
    def run(self, jobs: Sequence[Job]) -> list[Answer]:
        """Answer jobs of different sessions: the short ones in one forward, each long one by itself, in chunks."""
        for job in jobs:
            while self.rows(job) > max(SHORT, self.chunk):
                self.read(job)
        rows = [self._rows(job) for job in jobs]
        short = [i for i, r in enumerate(rows) if len(r) <= SHORT]
        batches = [short, *([i] for i in range(len(jobs)) if i not in short)]
        answers: dict[int, Answer] = {}
        for batch in filter(None, batches):
            hidden = self._forward([jobs[i].session.slot for i in batch], [rows[i] for i in batch])
            verified = [
                h[len(rows[i]) - len(jobs[i].draft) - 1 : len(rows[i])] for i, h in zip(batch, hidden, strict=True)
            ]
            answers |= dict(zip(batch, self._verify([jobs[i] for i in batch], verified), strict=True))
        return [answers[i] for i in range(len(jobs))]

    def next_token(self, job: Job) -> int:
        """Answer one job without a draft and return the next token of its text."""
        [answer] = self.run([job])
        return answer.next_token()

    @torch.inference_mode()
    def read(self, job: Job) -> None:
        """Read one chunk of a job that has more rows than that; the rest and the answer are left for later."""
        rows = self._rows(job)[: self.chunk]
        slot, session = job.session.slot, job.session
        self._forward([slot], [rows])
        end = self.slots.lengths[slot] + len(rows)
        session.tokens, self.slots.lengths[slot] = job.text[:end], end

    def _known(self, job: Job) -> int:
        """Return how many rows of the cache belong to the job's text; its last token is always read again."""
        tokens = job.session.tokens
        n = min(self.slots.lengths[job.session.slot], len(job.text) - 1, len(tokens))
        other = tokens[:n] != job.text[:n]
        return int(other.argmax()) if other.any() else int(n)

    def _rows(self, job: Job) -> list[int]:
        """Roll the cache back to the rows of the job's text, and return the tokens to read after them, draft
        included."""
        known = self.slots.lengths[job.session.slot] = self._known(job)
        return [*job.text[known:].tolist(), *job.draft.tolist()]

    def _forward(self, slots: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
        """Return last hidden states ``[sessions, n, hidden]``. Shorter requests are padded on the right; ignore the
        states of the padding."""
        device, n = self.target.device, max(map(len, rows))
        ids = torch.tensor([[*r, *[0] * (n - len(r))] for r in rows], device=device)
        begin = torch.from_numpy(self.slots.lengths[list(slots)]).to(device)
        positions = (begin[:, None] + torch.arange(n, device=device)).clamp_(max=self.target.shape.context - 1)
        hidden, _ = self.target.forward(self.target.embed(ids), self.slots.batch(slots), positions)
        return hidden

    def _verify(self, jobs: Sequence[Job], hidden: Sequence[Tensor]) -> list[Answer]:
        """Apply each job's acceptance rule to the hidden states of its last token and draft ``[draft + 1, hidden]``."""
        greedy = [job.session.hello.temperature == 0 for job in jobs]
        together, ends = torch.cat(list(hidden)), np.cumsum([len(h) for h in hidden])
        choices = self.target.head.argmax(together).cpu().numpy() if any(greedy) else np.zeros(0)
        logits = self.target.head(together) if not all(greedy) else together
        answers = []
        for job, end, h in zip(jobs, ends, hidden, strict=True):
            own = slice(end - len(h), end)
            hello = job.session.hello
            if hello.temperature == 0:
                answer = verify_greedy(job, choices[own])
            else:
                answer = verify_sampled(job, logits[own], np.random.default_rng([hello.seed, len(job.text)]).random)
            tokens = np.concatenate([job.text, job.draft[: answer.accepted]])
            self.slots.lengths[job.session.slot] = len(tokens)
            job.session.tokens = tokens if answer.token is None else np.append(tokens, answer.token)
            answers.append(answer)
        return answers


def verify_greedy(job: Job, choices: np.ndarray) -> Answer:
    """Apply the greedy rule to the target's choices ``[draft + 1]``."""
    path, token = accept.greedy(job.draft, np.arange(len(job.draft)) - 1, choices)
    return Answer(len(path), token)


def verify_sampled(job: Job, logits: Tensor, uniform: Callable[[], float]) -> Answer:
    """Apply the sampling rule to logits ``[draft + 1, vocab]``."""
    hello = job.session.hello

    @functools.cache
    def p(row: int) -> np.ndarray:
        return probabilities(logits[row], hello.temperature, hello.top_p)

    accepted = accept.prefix(job.draft, job.probabilities, p, uniform)
    if accepted == len(job.draft):
        return Answer(accepted, inverse_cdf(p(accepted), uniform()))
    if job.mode == "scalar":
        return Answer(accepted, None, logits[accepted])
    q = unpack_proposal(job.proposals[accepted], len(p(accepted)))
    return Answer(accepted, inverse_cdf(accept.residual(p(accepted), q), uniform()))
