"""Matrix products and norms in whole numbers on a CPU; see ``integers.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import addressof, byref

import torch
from torch import Tensor

from spec_envs.decoding.model.kernels import threads
from spec_envs.decoding.model.kernels.bindings import CMatrix, address, floats, library
from spec_envs.decoding.model.kernels.block_packing import packed_blocks
from spec_envs.decoding.model.kernels.packing import COLUMNS, NOT_FINITE, TILE, packed, padded
from spec_envs.decoding.model.kernels.pages import in_huge_pages
from spec_envs.decoding.weights.blocks import Blocks, dense

MOST = (2**31 - 1) // 127**2  # most inputs of a product whose sums fit 32 bits
MULTIPLES = {"head size": COLUMNS, "hidden size": TILE, "intermediate size": TILE, "width": TILE}


def uncomputed(**widths: int) -> str | None:
    """Return a sentence on why the kernels cannot compute a model or a product of these widths, or None if they can.

    This is the only place where widths are refused.

    Args:
        widths: named as in ``MULTIPLES``, with underscores for spaces.
    """
    for name, multiple in MULTIPLES.items():
        width = widths.get(name.replace(" ", "_"), multiple)
        if width % multiple or width < 1:
            return f"dtypes int8 and q4 need a {name} of a multiple of {multiple}, not {width}; pass another dtype"
        if width > MOST:
            return f"dtypes int8 and q4 need a {name} of at most {MOST}, not {width}; pass another dtype"
    return None


def check(**widths: int) -> None:
    """Raise ValueError for widths that the kernels cannot compute; see ``uncomputed``."""
    if reason := uncomputed(**widths):
        raise ValueError(reason)


class RMSNorm:
    """Root-mean-square norm with a gain, in float32.

    Raises:
        ValueError: the kernels cannot compute this width, or a gain is not finite.
    """

    def __init__(self, weight: Tensor, eps: float):
        check(width=len(weight))
        self.weight, self.eps, self.library = finite(weight), eps, library()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the normed rows of x ``[..., width]``."""
        x, width = rows_of(x, len(self.weight)), len(self.weight)
        out = torch.empty_like(x)
        self.library.rms_norm(x.data_ptr(), self.weight.data_ptr(), x.numel() // width, width, self.eps, out.data_ptr())
        return out


class Linear:
    """``y = x Wᵀ + b`` with weights and rows in whole numbers.

    Args:
        weight: ``[out, in]``, a tensor, or blocks, or several blocks of different kinds one below the other. ``in`` is
            a multiple of 16.
        bias: ``[out]`` or None.
        norm: applied to x first.

    Raises:
        ValueError: the kernels cannot compute this width, bias or norm have another one, or a number is not finite.
    """

    def __init__(
        self, weight: Tensor | Blocks | Sequence[Blocks], bias: Tensor | None = None, norm: RMSNorm | None = None
    ):
        parts = [weight] if isinstance(weight, Tensor | Blocks) else list(weight)
        self.inputs, self.outputs = parts[0].shape[1], sum(part.shape[0] for part in parts)
        check(width=self.inputs)
        if (norm is not None and len(norm.weight) != self.inputs) or (bias is not None and len(bias) != self.outputs):
            raise ValueError(f"a product of {self.inputs} inputs and {self.outputs} outputs has another norm or bias")
        if any(part.shape[0] % TILE or part.shape[1] != self.inputs for part in parts[:-1]):
            raise ValueError(f"weights of {[tuple(part.shape) for part in parts]} cannot be one below the other")
        self.norm, self.library = norm, library()
        biases = [None] * len(parts) if bias is None else finite(bias).split([part.shape[0] for part in parts])
        self.kept: list[Tensor | CMatrix] = []  # alive while the structures point to them
        self.matrix = self._matrix(parts[-1], biases[-1])
        for part, own in zip(parts[-2::-1], biases[-2::-1], strict=True):
            self.matrix = self._matrix(part, own, self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` for x ``[..., in]``."""
        x, stride = rows_of(x, self.inputs), -(-self.outputs // COLUMNS) * COLUMNS
        out = torch.empty(*x.shape[:-1], stride)
        self.library.linear(
            byref(self.matrix), x.data_ptr(), x.numel() // self.inputs, *self._norm(), out.data_ptr(), stride, threads()
        )
        return out[..., : self.outputs]

    def argmax(self, x: Tensor) -> Tensor:
        """Return the index ``[...]`` of each row's largest output, for x ``[..., in]``."""
        x = rows_of(x, self.inputs)
        out = torch.empty(x.shape[:-1], dtype=torch.int64)
        self.library.linear_argmax(
            byref(self.matrix), x.data_ptr(), x.numel() // self.inputs, *self._norm(), out.data_ptr(), threads()
        )
        return out

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the weights ``[..., in]`` (float32) of outputs ``[...]``, as they are multiplied.

        Raises:
            IndexError: there is no such output.
        """
        outputs = outputs.to(torch.int64).contiguous()
        found = torch.empty(*outputs.shape, self.inputs)
        self.library.weight_rows(byref(self.matrix), outputs.data_ptr(), outputs.numel(), found.data_ptr())
        return found

    def dense(self) -> Tensor:
        """Return the weight ``[out, in]`` as float32, as it is multiplied."""
        return self.rows(torch.arange(self.outputs))

    def _matrix(self, weight: Tensor | Blocks, bias: Tensor | None, following: CMatrix | None = None) -> CMatrix:
        """Pack a part of the weights and describe it to the kernels."""
        scale = None
        if isinstance(weight, Blocks):
            kind, numbers = packed_blocks(weight)
        else:
            kind, (numbers, scale) = 0, packed(weight)
        numbers = in_huge_pages(numbers)
        if bias is not None:
            bias = padded(bias[None], 1, COLUMNS)[0]
        self.kept += [kept for kept in (numbers, scale, bias, following) if kept is not None]
        after = None if following is None else addressof(following)
        return CMatrix(address(numbers), address(scale), address(bias), self.inputs, weight.shape[0], kind, after)

    def _norm(self) -> tuple[int | None, float]:
        return (None, 0.0) if self.norm is None else (self.norm.weight.data_ptr(), self.norm.eps)


class Head:
    """The final norm and the output rows, from hidden states to logits or to the most probable token.

    Args:
        weight: output rows ``[vocab, hidden]``.
        norm: applied to the hidden states first.
    """

    def __init__(self, weight: Tensor | Blocks, norm: RMSNorm):
        self.linear = Linear(weight, norm=norm)
        self.argmax = self.linear.argmax

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits ``[..., vocab]`` of hidden states ``[..., hidden]``."""
        return self.linear(x)


def stacked(weights: Mapping[str, Tensor | Blocks], names: list[str]) -> tuple[Tensor | list[Blocks], Tensor | None]:
    """Return weight and bias of several projections of the same input, one below the other.

    Raises:
        ValueError: some are blocks and some are not.
    """
    found = [weights[f"{name}.weight"] for name in names]
    biases = [dense(weights[f"{name}.bias"]) for name in names if f"{name}.bias" in weights]
    bias = torch.cat(biases) if biases else None
    blocks = [weight for weight in found if isinstance(weight, Blocks)]
    if not blocks:
        return torch.cat([dense(weight) for weight in found]), bias
    if len(blocks) < len(found):
        raise ValueError(f"of {', '.join(names)} some are stored in blocks and some are not; pass dtype int8")
    return Blocks.joined(blocks), bias


def reordered(weight: Tensor | list[Blocks], order: Tensor) -> Tensor | Blocks:
    """Return a weight with its outputs in another order.

    Raises:
        ValueError: it has blocks of several kinds.
    """
    if isinstance(weight, Tensor):
        return weight[order]
    if len(weight) > 1:
        kinds = ", ".join(part.kind.name for part in weight)
        raise ValueError(f"gate and up are stored as {kinds}; expected one kind of blocks; pass dtype int8")
    return weight[0].take(order)


def finite(x: Tensor) -> Tensor:
    """Return the gains of a norm or a bias in contiguous float32.

    Raises:
        ValueError: a number is not finite.
    """
    x = floats(x)
    if not torch.isfinite(x).all():
        raise ValueError(NOT_FINITE)
    return x


def rows_of(x: Tensor, width: int) -> Tensor:
    """Return x ``[..., width]`` in contiguous float32.

    Raises:
        IndexError: x has another width.
    """
    if x.shape[-1] != width:
        raise IndexError(f"rows {list(x.shape)} do not fit a width of {width}")
    return floats(x)
