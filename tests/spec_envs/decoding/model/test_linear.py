"""Matrix products in bfloat16 in oneDNN's layout equal torch's for every size, and fall back to torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spec_envs.decoding.model import linear


@pytest.fixture(autouse=True)
def clear_cache() -> None:
    linear.operators_work.cache_clear()


def missing(*arguments: object) -> Tensor:
    raise AttributeError("no such operator")


def wrong(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.zeros(*x.shape[:-1], len(weight.to_dense()), dtype=x.dtype)


def check(packed: bool | None = None) -> None:
    """Assert that products of many sizes equal torch's, and that the layout is packed or not."""
    generator = torch.Generator().manual_seed(0)
    for inputs, outputs in ((1, 1), (2, 3), (15, 17), (48, 33), (64, 1), (100, 1000)):
        weight, bias = (torch.randn(size, generator=generator).bfloat16() for size in ((outputs, inputs), (outputs,)))
        for made in (linear.Linear(weight), linear.Linear(weight, bias), linear.Linear(weight.T.contiguous().T, bias)):
            assert packed is None or made.packed == packed
            assert torch.equal(made.dense(), weight)
            for rows in ((0,), (1,), (3, 0), (2, 17)):
                x = torch.randn(*rows, 2 * inputs, generator=generator).bfloat16()
                for some in (x[..., ::2], x[..., inputs:]):
                    expected = torch.nn.functional.linear(some, weight, made.bias)
                    torch.testing.assert_close(made(some), expected, rtol=0.03, atol=0.1)


@torch.inference_mode()
def test_product_equals_torch() -> None:
    check()


@torch.inference_mode()
@pytest.mark.parametrize(("operator", "other"), [("reordered", missing), ("product", missing), ("product", wrong)])
def test_missing_or_wrong_operators_are_replaced_by_torch(
    operator: str, other: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, operator, other)
    check(packed=False)
    monkeypatch.undo()
    linear.operators_work.cache_clear()
