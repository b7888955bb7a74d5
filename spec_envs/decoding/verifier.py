"""The target's side of speculative decoding: one forward over the drafted nodes, then the acceptance rule."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding import accept
from spec_envs.decoding.cycle import EMPTY_INTS
from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.sampling import Proposal, check_sampling, probabilities
from spec_envs.decoding.target_text import open_text


@dataclass(frozen=True)
class Verdict:
    """The accepted nodes from the root on (indices into the verified ones), and the token that the target adds."""

    path: list[int]
    token: int


@dataclass(frozen=True)
class Traffic:
    """The traffic of one call of a verifier over a network.

    Attributes:
        bytes_up, bytes_down: sent to the target and received from it.
        seconds: how long that took.
        simulated: True if these seconds were computed and did not pass in reality.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    simulated: bool = False


class Verifier(Protocol):
    """The target as a decoder sees it, in this process or elsewhere.

    Attributes:
        vocab, context: size of the target's vocabulary, and most tokens of a text.
        temperature, top_p: of its sampling; temperature 0 is greedy.
        device, dtype: where and in what dtype the target computes, as tables report it.
        features: what the drafter reads of the rows that the last call committed, ``[rows, …]``.
        traffic: of the last call.
        chains_only: True if it verifies no trees.
    """

    chains_only: bool
    vocab: int
    context: int
    temperature: float
    top_p: float
    features: Tensor
    traffic: Traffic

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> str: ...

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        """Read the prompt and return the target's first token; up to ``rows`` more rows will follow the prompt."""

    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        """Verify the drafted nodes ``[n]`` in one forward and commit the accepted ones.

        Args:
            tokens, parents, levels: the nodes; see ``Tree.subtree``.
            proposals: the distributions from which the tokens of a sampled chain were drawn, or none; the chain comes
                first, alternatives of its tokens follow it.
        """

    def decode(self, count: int, eos: Collection[int]) -> list[int]:
        """Return the target's own next tokens: ``count`` of them, or fewer where one of ``eos`` ends the text."""

    def append(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text that the target did not choose."""

    def close(self) -> None:
        """Release what this verifier holds outside this process; may be called twice."""

    def plain(self, eos: Collection[int] = ()) -> Verifier:
        """Return a verifier of the same target and sampling with a state of its own.

        It serves a decoder that never drafts and whose texts end at ``eos``.
        """


class LocalVerifier:
    """Verifies with the target in this process.

    Args:
        target: the model.
        capture: layers whose inputs the drafter reads as ``features`` (see ``Transformer.forward``).
        temperature: 0 is greedy.
        top_p: probability mass kept when sampling.

    Attributes:
        features: captured states of the rows that the last call committed, ``[rows, len(capture) * hidden]``.
        text: the text, as the target reads it.

    Raises:
        ValueError: ``temperature`` or ``top_p`` is out of range.
    """

    traffic = Traffic()
    chains_only = False

    def __init__(self, target: Transformer, capture: Sequence[int] = (), temperature: float = 0.0, top_p: float = 1.0):
        check_sampling(temperature, top_p)
        self.target, self.capture = target, tuple(capture)
        self.temperature, self.top_p = temperature, top_p
        self.vocab, self.context = target.shape.vocab, target.shape.context
        self.features = torch.empty(0)
        self.text = open_text(target, self.capture)

    @property
    def device(self) -> torch.device:
        return self.target.device

    @property
    def dtype(self) -> str:
        return self.target.dtype

    def close(self) -> None:
        """Do nothing: there are no external resources to release."""

    def plain(self, eos: Collection[int] = ()) -> LocalVerifier:
        return LocalVerifier(self.target, (), self.temperature, self.top_p)

    @property
    def cache(self) -> KVCache:
        """Keys and values of the text."""
        return self.text.cache

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        self.text.begin(len(prompt) + rows)
        self.rng = rng
        self.features = self.text.append(prompt, self.temperature == 0)
        self.last = self._decide(EMPTY_INTS, EMPTY_INTS).token
        return self.last

    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        self.text.read(self.last, tokens, parents, self.temperature == 0)
        verdict = self._decide(tokens, parents, proposals)
        self.features = self.text.keep([0, *(node + 1 for node in verdict.path)])
        self.last = verdict.token
        return verdict

    def decode(self, count: int, eos: Collection[int]) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < count and not (tokens and tokens[-1] in eos):
            tokens.append(self.verify(EMPTY_INTS, EMPTY_INTS, EMPTY_INTS).token)
        return tokens

    def append(self, tokens: Sequence[int]) -> None:
        self.features = self.text.append([self.last, *tokens[:-1]], False)
        self.last = tokens[-1]

    def _decide(self, tokens: np.ndarray, parents: np.ndarray, proposals: Sequence[Proposal] = ()) -> Verdict:
        """Apply the acceptance rule to nodes ``[n]``, of which the text has just read the root and those."""
        if self.temperature == 0:
            return Verdict(*accept.greedy(tokens, parents, self.text.choices()))
        return self._sample(tokens, parents, self.target.head(self.text.hidden()[-1 - len(tokens) :]), proposals)

    @torch.inference_mode()
    def _sample(
        self, tokens: np.ndarray, parents: np.ndarray, logits: Tensor, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        """Apply the sampling rule to logits ``[n + 1, vocab]``."""

        @functools.cache
        def distribution(row: int) -> np.ndarray:
            return self._probabilities(logits[row])

        if proposals:
            drawn_from = [proposal.dense(self.vocab) for proposal in proposals]
            return Verdict(*accept.chained(tokens, parents, drawn_from, distribution, self.rng.random))
        return Verdict(*accept.sampled(tokens, parents, distribution, self.rng.random))

    def _probabilities(self, logits: Tensor) -> np.ndarray:
        """Return the sampling distribution ``[vocab]`` (float64) of a row of logits."""
        return probabilities(logits, self.temperature, self.top_p)
