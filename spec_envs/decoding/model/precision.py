"""The dtypes in which a model is computed, by name, and what each stands for."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from spec_envs.decoding.model import integers, layers
from spec_envs.decoding.model.kernels.block_packing import FORMATS
from spec_envs.decoding.weights.blocks import Blocks, dense

FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPES = ("int8", "q4", *FLOATS)


class Precision:
    """The modules and dtypes with which a model of a given dtype is computed.

    Args:
        dtype: a name of ``DTYPES``, or torch's dtype of that name.

    Attributes:
        name: of the dtype.
        modules: ``layers`` or ``integers``, which define ``RMSNorm``, ``Linear``, ``Layers`` and ``Head``.
        weights: dtype of the weights that are passed to them; None means the checkpoint's own.
        hidden: dtype of hidden states and logits.
        cache: dtype of keys, values and the embedding.
        drafter: name of the dtype of drafters that are no GGUF files.
        blocks: True if weights in blocks stay as they are.

    Raises:
        ValueError: the dtype is unknown.
    """

    def __init__(self, dtype: str | torch.dtype):
        self.name = self.drafter = str(dtype).removeprefix("torch.")
        if self.name not in DTYPES:
            raise ValueError(f"dtype {self.name!r} is unknown; expected {', '.join(DTYPES)}")
        self.modules: ModuleType
        self.weights: torch.dtype | None
        self.blocks = self.name == "q4"
        if self.name in FLOATS:
            kind = FLOATS[self.name]
            self.modules, self.weights, self.hidden, self.cache = layers, kind, kind, kind
        else:
            self.modules, self.weights, self.hidden = integers, None, torch.float32
            # Rounding keys and values to bfloat16 changes more than the rows in 16 bits do.
            self.cache = torch.float32 if self.blocks else torch.bfloat16
            self.drafter = "int8"

    def taken(self, weight: Tensor | Blocks, device: torch.device) -> Tensor | Blocks:
        """Return a weight as the modules take it, on ``device``: blocks as they are or dense, tensors cast.

        Raises:
            ValueError: it holds numbers that are too large for float16.
        """
        return weight if self.blocks and isinstance(weight, Blocks) else self.cast(dense(weight), device)

    def cast(self, weight: Tensor, device: torch.device) -> Tensor:
        """Return a weight in the dtype that the modules take, on ``device``.

        Raises:
            ValueError: it holds numbers that are too large for float16.
        """
        cast = weight.to(device, self.weights or weight.dtype)
        if cast.dtype == torch.float16 and not torch.isfinite(cast).all():
            raise ValueError(
                f"the weights reach {weight.abs().max():.3g}, which float16 does not hold; pass dtype bfloat16 or "
                "float32"
            )
        return cast

    def weight_bytes(self, weight: Tensor | Blocks) -> int:
        """Return the bytes of a matrix as it is multiplied."""
        if self.blocks and isinstance(weight, Blocks):
            return weight.data.nbytes
        return weight.shape.numel() * (1 if self.weights is None else self.weights.itemsize)


def not_in_blocks(weights: dict[str, Tensor | Blocks]) -> str | None:
    """Return why a model of these weights cannot be computed in ``"q4"``, or None if it can."""
    for name, weight in weights.items():
        if len(weight.shape) == 2 and not (isinstance(weight, Blocks) and weight.kind in FORMATS):
            kind = weight.kind.name if isinstance(weight, Blocks) else str(weight.dtype).removeprefix("torch.")
            return (
                f"dtype 'q4' multiplies the blocks of a GGUF file ({', '.join(kind.name for kind in FORMATS)}), and "
                f"{name} is stored as {kind}; pass dtype int8"
            )
        up = weights.get(name.replace("mlp.gate_proj", "mlp.up_proj"))
        if isinstance(weight, Blocks) and isinstance(up, Blocks) and up.kind != weight.kind:
            return (
                f"dtype 'q4' multiplies by gate and up together, and {name} is stored as {weight.kind.name}, the other "
                f"one as {up.kind.name}; pass dtype int8"
            )
    return None
