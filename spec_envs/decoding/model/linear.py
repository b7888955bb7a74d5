"""A matrix product with constant weights, in the layout that the processor reads fastest."""

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

# Number of rows for which the packed layout is tuned. Measured over 1 to 96 rows, a layout packed for 16 is within a
# few per cent of the best one at every number of rows, so one copy of the weights serves them all.
PACK_ROWS = 16


class Linear:
    """``y = x Wᵀ + b`` for inference.

    On a CPU with bfloat16 instructions the weight is stored once in oneDNN's blocked layout instead of being rearranged
    in every call; elsewhere this is ``torch.nn.functional.linear``.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.bias = bias
        self.packed = packs(weight)
        if self.packed:
            self.weight = reordered(weight)
        else:
            self.weight = weight.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``[..., out]`` for x ``[..., in]``."""
        if self.packed:
            return product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        """Return the weight ``[out, in]``; a copy where it is packed."""
        return self.weight.to_dense() if self.packed else self.weight

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the weights ``[n, in]`` of outputs ``[n]``."""
        return self._kept[outputs]

    @functools.cached_property
    def _kept(self) -> Tensor:
        return self.dense()  # a layout that is packed cannot be read in part


def packs(weight: Tensor) -> bool:
    """Return whether the weight gains from oneDNN's layout: bfloat16 on a CPU that computes in it."""
    wanted = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and fast_bfloat16("cpu")
    return wanted and operators_work()


def reordered(weight: Tensor) -> Tensor:
    """Return the weight ``[out, in]`` in oneDNN's layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
    return packed


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x Wᵀ + b`` with the weight in oneDNN's layout."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@functools.cache
def operators_work() -> bool:
    """Return whether this version of torch has these two operators, and they compute what is expected.

    They are not part of torch's public interface, which has no way to keep a packed weight.
    """
    x, weight = torch.arange(96.0).bfloat16().view(2, 48) / 64, torch.arange(768.0).bfloat16().view(16, 48) / 512
    try:
        packed = reordered(weight)
        found: tuple[Tensor, Tensor] = product(x, packed, weight[:, 0]), packed.to_dense()
    except (AttributeError, RuntimeError, TypeError):
        return False
    wanted = F.linear(x, weight, weight[:, 0]), weight
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0.02) for a, b in zip(found, wanted, strict=True))


def fast_bfloat16(device: str | torch.device) -> bool:
    """Return whether ``device`` multiplies bfloat16 matrices in hardware."""
    device = torch.device(device)
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):  # oneDNN emulates it on other processors
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
