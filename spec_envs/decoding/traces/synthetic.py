"""Synthetic decoding: drafted tokens are right or wrong at random, and no model is computed.

A profile states, per kind of text, how probable it is that the i-th token of a chain is accepted when those before it
were. The ordinary decoder drives a drafter and a verifier that draw from the profile in microseconds; together with a
cost table they make an environment for fast training and for tests. A profile is not a measured model: it is made up,
or fitted to published counts, and its file states which.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from spec_envs.checked import Checked, read_checked
from spec_envs.decoding.clock import CostTable, WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import ChainDrafter
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.traces.recording import EVERY, Problem, Recording, chosen
from spec_envs.decoding.tree import Children
from spec_envs.decoding.verifier import Traffic, Verdict
from spec_envs.files import DATA, find_json
from spec_envs.text import Detokenizer

PROFILES = DATA / "profiles"
CONTEXT = 32768
EOS, WRONG, FIRST = 0, 1, 2  # ids: the end, one that the target never emits, and the first of those it does, by kind


class KindData(Checked):
    """A kind of text in a file; see ``Kind``."""

    weight: Annotated[int, Field(ge=1, le=1000)]
    snippet: str
    acceptance: Annotated[list[Annotated[float, Field(ge=1e-6, le=1 - 1e-6)]], Field(min_length=1)]


class ProfileData(Checked):
    """A profile in a file; see ``Profile``."""

    synthetic: bool = True
    about: str = ""
    clock: str
    static_over_plain: Annotated[float, Field(ge=1e-3, le=1e3)]
    concentration: Annotated[float, Field(ge=1e-3, le=1e9)]
    prompt_tokens: Annotated[int, Field(ge=1, le=CONTEXT)]
    kinds: Annotated[dict[str, KindData], Field(min_length=1)]


@dataclass(frozen=True)
class Kind:
    """One kind of text.

    Attributes:
        weight: number of its prompts.
        snippet: text that looks like it.
        acceptance: probability that the token at each place of a chain is accepted; the last one holds for all further
            places.
    """

    name: str
    weight: int
    snippet: str
    acceptance: np.ndarray

    def survival(self, k: int) -> np.ndarray:
        """Return the probabilities ``[k]`` that the first 1, 2, …, k tokens of a chain are all accepted."""
        return np.cumprod(self.acceptance[np.minimum(np.arange(k), len(self.acceptance) - 1)])


class Snippet(NamedTuple):
    """A text of a profile: its kind and the ids of its prompt. It is in every split."""

    task: str
    prompt: list[int]
    split: str = EVERY


@dataclass(frozen=True)
class Profile(Recording):
    """A synthetic pair of models.

    Attributes:
        clock: name of the cost table that belongs to it.
        static_over_plain: speed of the best fixed length under that table, in units of plain decoding.
        concentration: how alike a kind's tokens are. The acceptance probability of a token is drawn from a beta
            distribution with the mean of its place and this sum of parameters; the drafter reports it.
        prompt_tokens: length of every prompt.
    """

    name: str
    clock: str
    static_over_plain: float
    concentration: float
    prompt_tokens: int
    kinds: tuple[Kind, ...]

    @classmethod
    def load(cls, source: str) -> Self:
        """Return a shipped profile by name, or one in a JSON file by path.

        Raises:
            ValueError: the profile is not found, or malformed.
        """
        path = find_json(source, PROFILES, "trace folder and no synthetic profile")
        data = read_checked(ProfileData, path, "a synthetic profile", f"see those in {PROFILES}")
        kinds = tuple(
            Kind(name, kind.weight, kind.snippet, np.array(kind.acceptance, float)) for name, kind in data.kinds.items()
        )
        return cls(path.stem, data.clock, data.static_over_plain, data.concentration, data.prompt_tokens, kinds)

    def costs(self) -> CostTable:
        return CostTable.load(self.clock)

    def settings(self) -> dict[str, Any]:
        return {}

    def prompts(self, split: str = EVERY, names: str = EVERY) -> list[tuple[str, list[int]]]:
        """Return kind and ids of the prompts, in proportion to the weights of the kinds; all are in every split."""
        texts = [
            Snippet(kind.name, [FIRST + i] * self.prompt_tokens)
            for i, kind in enumerate(self.kinds)
            for _ in range(kind.weight)
        ]
        return [texts[i][:2] for i in chosen(self.name, texts, split, names)]

    def check(self, problem: Problem, max_new_tokens: int | None = None) -> None:
        """Refuse a control of anything but chains.

        Raises:
            ValueError: such a control.
        """
        if problem.trace_kind != "chain":
            raise ValueError(
                f"the profile {self.name!r} has chains under greedy decoding only, which do not replay {problem.env_id}; "
                "expected SpecK-v0"
            )

    def decoder(self, problem: Problem, clock: WallClock) -> Decoder:
        self.check(problem)
        vocab, detokenize = FIRST + len(self.kinds), Detokenizer(self.detokenize)
        return Decoder(
            SyntheticVerifier(vocab), SyntheticDrafter(self, vocab), clock, {EOS}, problem.max_depth, detokenize
        )

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return text that looks like its kind."""
        return " ".join(self.kinds[i - FIRST].snippet if i >= FIRST else "?" for i in ids)


class SyntheticDrafter(ChainDrafter):
    """Drafts the token that the target emits with a probability drawn from the profile, and reports that
    probability."""

    context = CONTEXT

    def __init__(self, profile: Profile, vocab: int):
        self.profile, self.vocab = profile, vocab

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        self.right, self.rng = text[-1], rng
        self.kind = self.profile.kinds[self.right - FIRST]

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Do nothing: the next chain is drawn independently."""

    def draft(self, chain: list[int]) -> tuple[Children, int]:
        mean = self.kind.acceptance[min(len(chain), len(self.kind.acceptance) - 1)]
        sure = self.profile.concentration * mean
        chance = float(np.clip(self.rng.beta(sure, self.profile.concentration - sure), 1e-6, 1 - 1e-6))
        token = self.right if self.rng.random() < chance else WRONG
        entropy = -chance * np.log(chance) - (1 - chance) * np.log1p(-chance)
        return Children(np.array([[token]]), np.log([[chance]]), np.array([entropy])), 1


class SyntheticVerifier:
    """Accepts the tokens of a chain up to the first wrong one."""

    context, temperature, top_p, traffic = CONTEXT, 0.0, 1.0, Traffic()
    chains_only = True

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> str:
        return "synthetic"

    def __init__(self, vocab: int):
        self.vocab, self.features = vocab, torch.empty(0)

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        self.right = prompt[-1]
        return self.right

    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        wrong = np.flatnonzero(tokens != self.right)
        return Verdict(list(range(wrong[0] if len(wrong) else len(tokens))), self.right)

    def decode(self, count: int, eos: Collection[int]) -> list[int]:
        """Return the right token, ``count`` times."""
        return [self.right] * count

    def append(self, tokens: Sequence[int]) -> None:
        """Do nothing: the right token does not depend on the text."""

    def close(self) -> None:
        """Do nothing: there are no external resources to release."""

    def plain(self, eos: Collection[int] = ()) -> SyntheticVerifier:
        """Return a verifier of the same profile."""
        return SyntheticVerifier(self.vocab)
