"""A draft step in whole numbers as one call into the kernels, because it is made several times a cycle."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_void_p
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.integers import Layers, Linear, RMSNorm, c_cache, c_embedding, c_tables
from spec_envs.decoding.model.kernels import threads
from spec_envs.decoding.model.kernels.bindings import CDrafter, CFusion, CMatrix, address, library
from spec_envs.decoding.model.rope import Rope
from spec_envs.decoding.model.rows import Rows

ROOM = 64  # rows of a call for which memory is kept


class Fusion(NamedTuple):
    """How an EAGLE-3 head makes its rows of the target's states: ``fc`` of the states side by side.

    Attributes:
        fc: product of all states.
        norms: of each state, or none.
        joined: norm of all of them side by side, or None.
    """

    fc: Linear
    norms: Sequence[RMSNorm] = ()
    joined: RMSNorm | None = None


class IntegerStep:
    """One forward of a drafter, from tokens to the most probable next tokens.

    Args:
        layers, norm, head: parts of the drafter; the norm is the one before the head.
        embedding: bfloat16 ``[vocab, hidden]``, or a product whose outputs are the tokens.
        rope: rotary tables of the drafter.
        outputs: how many of the head's first outputs can be drafted.
        entering: for an EAGLE-3 head, the norms of the embedding and of the hidden state.
        fusion: for an EAGLE-3 head, how it reads the target's states.

    Raises:
        ValueError: the parts have different widths.
    """

    def __init__(
        self,
        layers: Layers,
        norm: RMSNorm,
        head: Linear,
        embedding: Tensor | Linear,
        rope: Rope,
        outputs: int,
        entering: tuple[RMSNorm, RMSNorm] | None = None,
        fusion: Fusion | None = None,
    ):
        self.kept = layers, norm, head, embedding, rope, entering, fusion  # alive while the structure points to them
        self.layers, self.rope, self.outputs, self.library = layers, rope, outputs, library()
        self.hidden = embedding.inputs if isinstance(embedding, Linear) else embedding.shape[1]
        self.reads = fusion.fc.inputs if fusion else 0  # width of the target's states
        reads, both = layers.structures[0].qkv.inputs, (norm, *(entering or ()))
        widths = [layers.shape.hidden, head.inputs, *(len(n.weight) for n in both)]
        widths += [fusion.fc.outputs] if fusion else []
        if {self.hidden, *widths} != {self.hidden} or reads != self.hidden * len(both[:2]) or outputs > head.outputs:
            raise ValueError(
                f"the parts of a drafter of hidden size {self.hidden} do not fit together: {widths}, {reads}"
            )
        norms = (*(n.weight for n in entering), norm.weight) if entering else (None, None, norm.weight)
        self.structure = CDrafter(
            layers.structures,
            len(layers.structures),
            c_embedding(embedding),
            *map(address, norms),
            c_fusion(fusion),
            c_tables(rope),
            head.matrix,
            outputs,
        )
        self.reference, self.eagle = byref(self.structure), entering is not None

    def __call__(
        self,
        read: Tensor | None,
        tokens: Sequence[int] | np.ndarray,
        positions: np.ndarray | int | None,
        cache: KVCache,
        extra: Tensor | None,
        width: int,
        last: int,
        seen: np.ndarray | None = None,
        rows: np.ndarray | int | None = None,
        fuses: bool = False,
    ) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray]:
        """Make one forward; its rows are written to the cache after the committed ones, which they do not join.

        Args:
            read: float32 ``[m, hidden]``, which an EAGLE-3 head reads; None for another drafter.
            tokens: int64 ``[n]``.
            positions: int64 ``[n]``, or one for all; by default those after the committed rows.
            extra: output rows ``[m, hidden]`` of further tokens, or None.
            width: children per row.
            last: how many rows, counted from the end, get children.
            seen: see ``KVCache.mask``.
            rows: int64 ``[n]``, the row of ``read`` that belongs to each token, or one for all; by default they are in
                the same order.
            fuses: True if ``read`` are the target's states ``[n, states * target hidden]``, to be fused first.

        Returns:
            The outputs ``[n, hidden]`` of the last layer, which another call with this cache may overwrite, except the
            next one; indices ``[last, width]`` of the children (further tokens are numbered after the head's outputs),
            their log-probabilities ``[last, width]``, and the entropies ``[last]`` in nats.

        Raises:
            IndexError: arrays of other sizes or dtypes, or rows that do not fit the cache.
        """
        n, size = len(tokens), 0 if seen is None else seen.size
        memory: Memory | None = cache.steps.get(self)
        if memory is None or memory.data is not cache.data or not memory.holds(n, last * width, size):
            memory = cache.steps[self] = Memory(self, cache, n, last * width, size)
        more, source = memory.extra, memory.last if read is memory.last.tensor else memory.read
        more.look_at(extra)
        source.look_at(read)
        self._check(source, more, n, width, last, seen, self.reads if fuses else self.hidden)
        memory.tokens[:n] = tokens
        if positions is not None:
            memory.positions[:n] = positions
        if rows is not None:
            memory.rows[:n] = rows
        if seen is not None:
            memory.seen[:size] = seen.ravel()
        memory.cache.length = cache.length
        output = memory.output(n)
        to_tokens, to_positions, to_rows, to_seen, to_index, to_log_probs, to_entropies = memory.addresses
        self.library.draft(
            self.reference,
            source.address,
            source.rows,
            None if rows is None else to_rows,
            fuses,
            memory.last.address,
            to_tokens,
            n,
            None if positions is None else to_positions,
            memory.reference,
            None if seen is None else to_seen,
            0 if seen is None else seen.shape[1],
            last,
            more.address,
            more.rows,
            width,
            to_index,
            to_log_probs,
            to_entropies,
            threads(),
        )
        children, both = last * width, (last, width)
        index, log_probs = memory.index[:children].copy(), memory.log_probs[:children].copy()
        return output, index.reshape(both), log_probs.reshape(both), memory.entropies[:last].copy()

    def _check(
        self,
        read: Looked,
        extra: Looked,
        n: int,
        width: int,
        last: int,
        seen: np.ndarray | None,
        reads: int,
    ) -> None:
        """Raise IndexError for arrays of other sizes or dtypes than the kernels assume."""
        choices = self.outputs + extra.rows
        fits = (
            read.width == (reads if self.eagle else None)
            and extra.width in (None, self.hidden)
            and (seen is None or (seen.dtype == bool and len(seen) == n))
            and 0 <= last <= n
            and 1 <= width <= choices
        )
        if not fits:
            raise IndexError(f"{n} rows do not fit a draft of the {width} best of {choices} after {last} of them")


class Looked:
    """Rows that a call is given: their address, number and width, looked up only when they are others than before.

    Attributes:
        tensor: the rows ``[rows, width]``, or None.
        width: 0 for rows that are not contiguous float32; None without any.
    """

    __slots__ = ("address", "rows", "tensor", "width")

    address: int | None
    tensor: Tensor | None
    width: int | None

    def __init__(self, tensor: Tensor | None = None):
        self.tensor = self.address = self.width = None
        self.rows = 0
        self.look_at(tensor)

    def look_at(self, tensor: Tensor | None) -> None:
        """Take these rows."""
        if tensor is self.tensor:
            return
        self.tensor, self.address, self.rows, self.width = tensor, address(tensor), 0, None
        if tensor is not None:
            self.rows, width = tensor.shape
            self.width = width if tensor.dtype == torch.float32 and tensor.is_contiguous() else 0


class Memory:
    """The memory that the calls of a step over one cache read and write, described to the kernels once.

    Args:
        step: the step.
        cache: of its drafter, for one sequence.
        rows, children, seen: numbers of them in a call that has to fit.

    Raises:
        IndexError: the cache belongs to another model.
    """

    def __init__(self, step: IntegerStep, cache: KVCache, rows: int, children: int, seen: int):
        nothing = torch.empty(1, 0, step.hidden), torch.empty(1, 0, dtype=torch.int64)
        step.layers.check_rows(Rows(nothing[0], cache, step.rope, nothing[1]), 1)
        if cache.data.shape[2] != 1:
            raise IndexError(f"a drafter's cache has {cache.data.shape[2]} sequences; expected 1")
        self.data, self.hidden = cache.data, step.hidden
        self.cache = c_cache(cache)
        self.reference = byref(self.cache)
        room, children = max(rows, ROOM), max(children, ROOM)
        self.tokens, self.positions, self.rows = np.empty((3, room), np.int64)
        self.seen = np.empty(max(seen, ROOM**2), bool)
        self.index, self.log_probs = np.empty(children, np.int64), np.empty(children, np.float32)
        self.entropies = np.empty(room, np.float32)
        arrays = self.tokens, self.positions, self.rows, self.seen, self.index, self.log_probs, self.entropies
        self.addresses = [array.ctypes.data for array in arrays]
        self.outputs: dict[int, list[tuple[Tensor, Looked]]] = {}  # by number of rows, in turn
        self.last = Looked()  # output of the last call
        self.read, self.extra = Looked(), Looked()  # what else calls are given

    def holds(self, rows: int, children: int, seen: int) -> bool:
        """Return whether a call of so many rows fits."""
        return rows <= len(self.tokens) and children <= len(self.index) and seen <= len(self.seen)

    def output(self, rows: int) -> Tensor:
        """Return memory for the outputs of a call, other than that of the call before, and look at it."""
        if rows > ROOM:
            one = torch.empty(rows, self.hidden)
            self.last = Looked(one)
            return one
        if rows not in self.outputs:
            made = torch.empty(2, rows, self.hidden).unbind()
            self.outputs[rows] = [(one, Looked(one)) for one in made]
        turns = self.outputs[rows]
        turns.reverse()
        output, self.last = turns[0]
        return output


def c_fusion(fusion: Fusion | None) -> CFusion:
    """Describe a fusion to the kernels.

    Raises:
        ValueError: its parts have different widths.
    """
    if fusion is None:
        return CFusion(CMatrix())
    inputs, norms = fusion.fc.inputs, [norm.weight for norm in fusion.norms]
    joined = None if fusion.joined is None else fusion.joined.weight
    if (
        sum(map(len, norms)) not in (0, inputs)
        or len({*map(len, norms)}) > 1
        or (joined is not None and len(joined) != inputs)
    ):
        raise ValueError(f"the norms of an EAGLE-3 head do not fit its {inputs} inputs")
    pointers = (c_void_p * len(norms))(*map(address, norms)) if norms else None
    return CFusion(fusion.fc.matrix, pointers, len(norms), address(joined))
