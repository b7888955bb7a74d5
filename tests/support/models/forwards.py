"""Logits of texts and trees, in one forward or one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.tree import ROOT, ancestors


def text_logits(model: Transformer, ids: Tensor, **keywords: Any) -> Tensor:
    """Return logits ``[1, n, vocab]`` of ids ``[1, n]``; keywords are those of ``Transformer.forward``."""
    n = ids.shape[1]
    hidden, _ = model.forward(model.embed(ids), model.cache(n), torch.arange(n)[None], **keywords)
    return model.head(hidden)


def rows_alone(model: Transformer, prefix: Tensor, tokens: np.ndarray, parents: np.ndarray) -> list[Tensor]:
    """Return logits of the root and of every node of a tree, whose path is decoded one token at a time."""
    rows = []
    for node in range(-1, len(parents)):
        path: list[int] = []
        walk = node
        while walk != ROOT:
            path.insert(0, int(tokens[walk]))
            walk = int(parents[walk])
        cache = model.cache(512)
        text = [*prefix[0].tolist(), *path]
        for i, token in enumerate(text):
            x, _ = model.forward(model.embed(torch.tensor([[token]])), cache, torch.tensor([[i]]))
            cache.length += 1
        rows.append(model.head(x)[0, 0])
    return rows


def tree_logits(model: Transformer, prefix: Tensor, tokens: np.ndarray, parents: np.ndarray) -> Tensor:
    """Return logits of the root (the prefix's last token) and of every node, in one forward after the prefix."""
    start = prefix.shape[1] - 1
    levels = np.zeros(len(parents), dtype=np.int64)
    for node, parent in enumerate(parents):
        levels[node] = 0 if parent == ROOT else levels[parent] + 1
    cache = model.cache(512)
    model.forward(model.embed(prefix[:, :-1]), cache, torch.arange(start)[None])
    cache.length = start
    ids = torch.cat([prefix[:, -1:], torch.from_numpy(tokens)[None]], 1)
    at = torch.from_numpy(start + np.concatenate([[0], levels + 1]))[None]
    return model.head(model.forward(model.embed(ids), cache, at, torch.from_numpy(ancestors(parents)))[0])[0]


def check_tree_rows(model: Transformer) -> None:
    """Assert that logits of nodes have the same bits in trees of many sizes as when each path is decoded alone."""
    rng = np.random.default_rng(0)
    prefix = torch.from_numpy(rng.integers(0, 150, (1, 45)))
    for nodes in (1, 2, 7, 15, 16, 33, 95):
        parents = np.array([rng.integers(-1, i) if i else ROOT for i in range(nodes)])
        tokens = rng.integers(0, 150, nodes)
        together = tree_logits(model, prefix, tokens, parents)
        shown = np.arange(-1, nodes) if nodes < 20 else rng.choice(nodes, 4, replace=False)
        alone = rows_alone(model, prefix, tokens, parents) if nodes < 20 else None
        for node in shown:
            if alone is None:
                chain = path_to(parents, int(node))
                expected = rows_alone(model, prefix, tokens[chain], np.arange(len(chain)) - 1)[-1]
            else:
                expected = alone[node + 1]
            assert torch.equal(together[node + 1], expected), (nodes, node)


def path_to(parents: np.ndarray, node: int) -> list[int]:
    """Return the nodes from the first level to ``node``."""
    path = [node]
    while parents[path[0]] != ROOT:
        path.insert(0, int(parents[path[0]]))
    return path
