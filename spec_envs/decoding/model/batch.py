"""Batches: generate many texts at once, or read the hidden states of many texts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from tqdm import trange

from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.transformer import Transformer

READ_AT_ONCE = 16  # prompts in a forward: more of them are slower on a CPU, and their hidden states need memory


def left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids ``[batch, n]``, padded on the left with 0, and the number of padding columns ``[batch]``."""
    width = max(map(len, sequences))
    padding = torch.tensor([width - len(s) for s in sequences], device=device)
    ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences], device=device)
    return ids, padding


@torch.inference_mode()
def generate_batch(
    target: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos: Collection[int],
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    doing: str = "",
    ends: Callable[[list[int]], bool] = lambda text: False,
) -> list[list[int]]:
    """Continue every prompt by up to ``max_new_tokens`` tokens, greedily or by sampling.

    A sequence ends with an id of ``eos``, which is kept in the result; ended sequences leave the batch when they are an
    eighth of it.

    Args:
        target: the model.
        prompts: their token ids.
        max_new_tokens: most new tokens of each.
        eos: ids that end a text.
        temperature: 0 is greedy.
        generator: for sampling.
        doing: label of a progress bar; without one none is shown.
        ends: whether the new tokens of a text are all that is wanted of it.

    Returns:
        The new tokens of each prompt, in order.

    Raises:
        ValueError: a prompt is empty, or the texts do not fit the context.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt is empty; expected at least one token")
    longest, context = max(map(len, prompts)), target.shape.context
    if longest + max_new_tokens - 1 > context:  # the last token is not read
        raise ValueError(
            f"prompts of up to {longest} tokens and {max_new_tokens} more do not fit the context of {context}: shorten "
            "the prompts or lower max_new_tokens"
        )
    cache, padding, x = read_prompts(target, prompts, max_new_tokens)
    texts: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # the text that each row of the batch writes
    ended: set[int] = set()
    for step in trange(max_new_tokens, desc=doing, unit="step", leave=False, disable=not doing):
        tokens = choose(target.head(x), temperature, generator)
        for text, token in zip(alive, tokens.tolist(), strict=True):
            if text not in ended:
                texts[text].append(token)
                if token in eos or ends(texts[text]):
                    ended.add(text)
        if len(ended) == len(prompts) or step + 1 == max_new_tokens:
            break
        open_rows = [row for row, text in enumerate(alive) if text not in ended]
        if len(open_rows) <= len(alive) * 7 // 8:
            kept = torch.tensor(open_rows, device=target.device)
            cache.select(kept)
            tokens, padding = tokens[kept], padding[kept]
            alive = [alive[row] for row in open_rows]
        positions = (cache.length - padding)[:, None]
        x = target.forward(target.embed(tokens[:, None]), cache, positions, padding=padding)[0][:, -1]
        cache.length += 1
    return texts


def read_prompts(target: Transformer, prompts: Sequence[Sequence[int]], room: int) -> tuple[KVCache, Tensor, Tensor]:
    """Read prompts, ``READ_AT_ONCE`` of similar length in a forward.

    Returns:
        A cache with the prompts, padded on the left, and space for ``room`` more rows; the number of padding columns
        ``[batch]``; and the hidden states of each prompt's last token ``[batch, hidden]``.
    """
    longest = max(map(len, prompts))
    cache = target.cache(longest + room, len(prompts))
    last: dict[int, Tensor] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(prompts), READ_AT_ONCE):
        rows = by_length[first : first + READ_AT_ONCE]
        ids, padding = left_padded([prompts[row] for row in rows], target.device)
        width = ids.shape[1]
        group = target.cache(width, len(rows))
        positions = (torch.arange(width, device=target.device)[None] - padding[:, None]).clamp_(min=0)
        x, _ = target.forward(target.embed(ids), group, positions, padding=padding)
        cache.data[:, :, rows, :, longest - width : longest] = group.data[..., :width, :]
        last |= dict(zip(rows, x[:, -1], strict=True))
    cache.length = longest
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=target.device)
    return cache, padding, torch.stack([last[row] for row in range(len(prompts))])


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Choose the next token ``[batch]`` for every row of ``logits`` ``[batch, vocab]``."""
    if temperature == 0:
        return logits.argmax(-1)
    below = (logits.float() / temperature).softmax(-1).cumsum(-1)  # inverse CDF; multinomial is slow on a CPU
    uniform = torch.rand(len(logits), 1, generator=generator, device=logits.device) * below[:, -1:]
    return torch.searchsorted(below, uniform)[:, 0].clamp_(max=logits.shape[-1] - 1)


@torch.inference_mode()
def read_batch(target: Transformer, texts: Sequence[Sequence[int]], capture: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Read whole texts, padded on the left, in one forward.

    Args:
        target: the model.
        texts: their token ids.
        capture: layers whose inputs are returned.

    Returns:
        The inputs of the ``capture`` layers side by side, ``[batch, n, len(capture) * hidden]``, and the normed hidden
        states after the last layer, ``[batch, n, hidden]``, whose product with the output rows is the logits.
    """
    ids, padding = left_padded(texts, target.device)
    n = ids.shape[1]
    positions = (torch.arange(n, device=target.device)[None] - padding[:, None]).clamp_(min=0)
    x, captured = target.forward(
        target.embed(ids), target.cache(n, len(texts)), positions, None, padding, capture=capture
    )
    return torch.cat([x[..., :0], *captured], -1), target.norm(x)
