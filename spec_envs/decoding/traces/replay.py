"""Replay a trace: a drafter and a verifier that do exactly what the recorded models did."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding import catch_up
from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.base import ChainDrafter, Drafter
from spec_envs.decoding.drafters.lookup import Occurrence
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.traces.files import RecordedTexts
from spec_envs.decoding.traces.full_trees import level_slice
from spec_envs.decoding.tree import NEVER, ROOT, Beside, Children, Tree
from spec_envs.decoding.verifier import Traffic, Verdict
from spec_envs.text import SILENT, Detokenizer


def replayed(trace: RecordedTexts, clock: WallClock, max_depth: int, detokenize: Detokenizer = SILENT) -> Decoder:
    """Return a decoder that replays a trace. It decodes the trace's own prompts; others raise ValueError."""
    return Decoder(
        ReplayVerifier(trace), drafter_of(trace, max_depth), clock, trace.manifest.eos, max_depth, detokenize
    )


def drafter_of(trace: RecordedTexts, max_depth: int) -> Drafter:
    """Return a drafter that drafts what a trace has, up to ``max_depth`` expansions."""
    return (TreeReplay if trace.manifest.kind == "tree" else ChainReplay)(trace, max_depth)


class TracePosition:
    """A decoder's place in the texts of a trace."""

    def __init__(self, trace: RecordedTexts):
        self.trace = trace
        self.row, self.end = 0, 0

    def begin(self, prompt: Sequence[int]) -> None:
        """Go to the first token of the text of a prompt.

        Raises:
            ValueError: the trace has no text of this prompt.
        """
        text = self.trace.by_prompt.get(tuple(prompt))
        if text is None:
            raise ValueError(
                f"the trace {self.trace.folder} has no text of this prompt; choose one of its own, or record it"
            )
        self.row, self.end = (int(row) for row in self.trace.starts[text : text + 2])


class ReplayVerifier:
    """The target's side: accepts what the recorded text has, and adds the token after it."""

    temperature, top_p, traffic = 0.0, 1.0, Traffic()
    chains_only = False

    def __init__(self, trace: RecordedTexts):
        self.position = TracePosition(trace)
        self.vocab, self.context = trace.manifest.vocab, trace.manifest.context
        self.features = torch.empty(0)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> str:
        return self.position.trace.manifest.dtype

    def start(self, prompt: Sequence[int], rows: int, rng: np.random.Generator) -> int:
        """Return the first token of the text."""
        self.position.begin(prompt)
        self.text = self.position.trace.columns["tokens"]
        return int(self.text[self.position.row])

    def verify(
        self, tokens: np.ndarray, parents: np.ndarray, levels: np.ndarray, proposals: Sequence[Proposal] = ()
    ) -> Verdict:
        """Follow the text through the tree as far as it was drafted. The token after the end of the text is arbitrary,
        since it is cut off."""
        path, parent = [], ROOT
        ahead = self.text[self.position.row + 1 : self.position.end]
        for token in ahead[: len(tokens)]:
            children = np.flatnonzero((parents == parent) & (tokens == token))
            if not len(children):
                break
            parent = int(children[0])
            path.append(parent)
        added = int(ahead[len(path)]) if len(path) < len(ahead) else 0
        self.position.row += len(path) + 1
        return Verdict(path, added)

    def decode(self, count: int, eos: Collection[int]) -> list[int]:
        """Return the next tokens of the text."""
        tokens: list[int] = self.text[
            self.position.row + 1 : min(self.position.end, self.position.row + 1 + count)
        ].tolist()
        self.position.row += len(tokens)
        return tokens

    def append(self, tokens: Sequence[int]) -> None:
        """Refuse tokens that the target did not choose: the text that follows them was not recorded."""
        raise ValueError("a trace has the target's own texts only; tokens that were not verified cannot be replayed")

    def close(self) -> None:
        """Do nothing: there are no external resources to release."""

    def plain(self, eos: Collection[int] = ()) -> ReplayVerifier:
        """Return another verifier of the same texts."""
        return ReplayVerifier(self.position.trace)


class Replay:
    """The drafter's side: what trees and chains have in common."""

    capture: tuple[int, ...] = ()
    drafting = ""

    def __init__(self, trace: RecordedTexts, max_depth: int):
        self.position = TracePosition(trace)
        manifest = trace.manifest
        self.vocab, self.context, self.width = manifest.vocab, manifest.context, manifest.width
        # plain arrays of the same memory, because a memory map takes twice as long to index
        self.columns = {name: np.asarray(column) for name, column in trace.columns.items()}
        self.block_rows = manifest.rows_of_block(max_depth)
        self.reads = bool(DrafterName.parse(manifest.drafter).model)

    @property
    def lag(self) -> int:
        """Rows of the text that the next recorded forward read; 0 where a drafter without weights was recorded."""
        return self.unread if self.reads else 0

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Go to the text of this prompt and first token."""
        self.position.begin(text[:-1])
        self.unread = 1  # committed tokens that no forward has read

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Move forward by the tokens that joined the text."""
        self.position.row += len(tokens)
        self.unread += len(tokens)


class TreeReplay(Replay):
    """Drafts the trees that were recorded."""

    def root(self, tree: Tree) -> int:
        """Draft the first level, if there is one, or copies before a head, which are drafted at once; return the rows of
        the recorded forward, 0 for copies."""
        tree.clear()
        children = self._children(0, 1)
        if (children.log_probs > NEVER).any():
            tree.start(children)
        if self._copied:
            while self.reads and tree.expansions < tree.max_depth and self._grow(tree):
                pass
            return 0
        rows, self.unread = self.unread, 0
        return rows + (self.block_rows or 0)

    def expand(self, tree: Tree) -> int:
        """Draft the next level, if there is one; return the rows of the recorded forward, 0 for copies and blocks."""
        if tree.size and not (self._copied and self.reads):
            self._grow(tree)
        return 0 if self._copied or self.block_rows is not None else self.width

    def matched(self) -> int:
        """Return how many of the text's last tokens occurred in it before."""
        return int(self.columns["matched"][self.position.row])

    @property
    def _copied(self) -> bool:
        return bool(self.columns["copied"][self.position.row])

    def _grow(self, tree: Tree) -> bool:
        """Draft the next level and return whether there is one."""
        children = self._children(len(tree.level_starts), len(tree.frontier))
        grows = bool((children.log_probs > NEVER).any())
        if grows:
            tree.grow(children)
        return grows

    def _children(self, level: int, parents: int) -> Children:
        here, row = level_slice(level, self.width), self.position.row
        first = 1 + self.width * (level - 1) if level else 0
        tokens = self.columns["drafted"][row, here].reshape(-1, self.width)[:parents].astype(np.int64)
        log_probs = self.columns["log_probs"][row, here].reshape(-1, self.width)[:parents]
        return Children(tokens, log_probs, self.columns["entropies"][row, first : first + parents])


class ChainReplay(Replay, ChainDrafter):
    """Drafts the chains that were recorded, by forwards of as many rows: a copied token takes no forward, and the next
    forward reads it."""

    temperature = 0.0

    def start(self, text: Sequence[int], positions: int, features: Tensor, rng: np.random.Generator) -> None:
        """Go to the text of this prompt and first token."""
        super().start(text, positions, features, rng)
        self.read = 0  # tokens of the chain that a forward has read

    def commit(self, tokens: Sequence[int], features: Tensor) -> None:
        """Move forward by the tokens that joined the text; those that were read as part of the chain are not read
        again."""
        right = int(self.columns["right"][self.position.row])
        unread = int(catch_up.left_unread(self.unread, self.read, len(tokens), right))
        super().commit(tokens, features)
        self.unread, self.read = unread, 0

    def root(self, tree: Tree) -> int:
        """Draft the first token, if one was recorded; return the rows of the recorded forward."""
        tree.clear()
        return super().root(tree) if self._length else 0

    def continues(self, tree: Tree) -> bool:
        """Return True if more was drafted after a chain."""
        return 0 < tree.size < self._length

    def draft(self, chain: list[int]) -> tuple[Children, int]:
        """Return the token that was drafted after a chain, and the rows of the recorded forward; 0 for a copy."""
        row, at = self.position.row, len(chain)
        drafted, log_probs = (self.columns[name][row, at : at + 1, None] for name in ("drafted", "log_probs"))
        beside = (self.columns[name][row, at][None] for name in ("alternatives", "alternative_log_probs"))
        entropies = self.columns["entropies"][row, at : at + 1]
        children = Children(drafted.astype(np.int64), log_probs, entropies, None, Beside(*beside))
        if self.columns["copied"][row, at]:
            return children, 0
        rows = catch_up.rows(self.unread, at, self.read)
        self.unread, self.read = 0, at
        return children, rows

    def matched(self) -> int:
        """Return how many tokens match at the place that was copied from."""
        return int(self.columns["matched"][self.position.row])

    def source(self, chain: list[int]) -> Occurrence | None:
        """Return a match where the next token of a chain was copied, else None; its place in the text is not
        recorded."""
        copied = len(chain) < self._length and self.columns["copied"][self.position.row, len(chain)]
        return Occurrence(0, self.matched()) if copied else None

    def ahead(self, longest: int) -> list[int]:
        """Return the first tokens of the recorded chain, up to ``longest``; see ``FreeDrafter``."""
        tokens: list[int] = self.columns["drafted"][self.position.row, : min(longest, self._length)].tolist()
        return tokens

    @property
    def _length(self) -> int:
        return int(self.columns["length"][self.position.row])
