"""Batched work of the target: generating many texts at once, and reading hidden states off many texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from tqdm import trange

from spec_envs.decoding.model.transformer import Transformer


def left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``[batch, n]`` padded on the left with 0, and the number of padding columns ``[batch]``."""
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
) -> list[list[int]]:
    """Continue every prompt by up to ``max_new_tokens`` tokens, greedily or sampled.

    Sequences that reach an id of ``eos`` (kept in the result) leave the batch when an eighth of it has ended.

    Args:
        doing: what a progress bar says meanwhile; without it there is none.

    Returns:
        The new tokens of each prompt, in order.

    Raises:
        ValueError: an empty prompt, or texts beyond the context.
    """
    if not all(map(len, prompts)):
        raise ValueError("a prompt is empty; expected at least one token")
    longest, context = max(map(len, prompts)), target.shape.context
    if longest + max_new_tokens - 1 > context:  # the last token is not read
        raise ValueError(
            f"prompts of up to {longest} tokens and {max_new_tokens} more do not fit the context of {context}: shorten "
            "the prompts or lower max_new_tokens"
        )
    ids, padding = left_padded(prompts, target.device)
    width = ids.shape[1]
    cache = target.cache(width + max_new_tokens, len(prompts))
    positions = (torch.arange(width, device=target.device)[None] - padding[:, None]).clamp_(min=0)
    x, _ = target.forward(target.embed(ids), cache, positions, padding=padding)
    cache.length = width
    texts: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))  # the text that each row of the batch writes
    ended: set[int] = set()
    for step in trange(max_new_tokens, desc=doing, unit="step", leave=False, disable=not doing):
        tokens = choose(target.head(x[:, -1]), temperature, generator)
        for text, token in zip(alive, tokens.tolist(), strict=True):
            if text not in ended:
                texts[text].append(token)
                if token in eos:
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
        x, _ = target.forward(target.embed(tokens[:, None]), cache, positions, padding=padding)
        cache.length += 1
    return texts


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token of every row of ``logits`` ``[batch, vocab]``."""
    if temperature == 0:
        return logits.argmax(-1)
    below = (logits.float() / temperature).softmax(-1).cumsum(-1)  # inverse CDF; multinomial is slow on a CPU
    uniform = torch.rand(len(logits), 1, generator=generator, device=logits.device) * below[:, -1:]
    return torch.searchsorted(below, uniform)[:, 0].clamp_(max=logits.shape[-1] - 1)


@torch.inference_mode()
def read_batch(target: Transformer, texts: Sequence[Sequence[int]], capture: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Hidden states of whole texts, padded on the left, in one forward.

    Returns:
        The inputs of the ``capture`` layers, concatenated ``[batch, n, len(capture) * hidden]``, and the final
        normed hidden states ``[batch, n, hidden]``, from which the head gives the logits.
    """
    ids, padding = left_padded(texts, target.device)
    n = ids.shape[1]
    positions = (torch.arange(n, device=target.device)[None] - padding[:, None]).clamp_(min=0)
    x, captured = target.forward(
        target.embed(ids), target.cache(n, len(texts)), positions, None, padding, capture=capture
    )
    return torch.cat([x[..., :0], *captured], -1), target.norm(x)
