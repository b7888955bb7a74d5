"""DFlash drafter (arXiv 2602.06036): a block of mask tokens after the text, whose rows see each other, in one forward.

The target's states are keys and values of every layer, so that reading the text costs two products a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_envs.decoding.drafters.dflash.head import DFlashHead
from spec_envs.decoding.drafters.heads import BlockDrafter, HeadModel, cast, check_fit
from spec_envs.decoding.drafters.vocabulary import Vocabulary
from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.layers import Memory, joined
from spec_envs.decoding.model.rope import Rope, rotate
from spec_envs.decoding.model.shape import Shape, part
from spec_envs.decoding.model.transformer import Transformer, embedded
from spec_envs.decoding.tree import Children

Tables = tuple[Tensor, Tensor]


class DFlashLayer:
    """A decoder layer whose keys and values are those of the target's states and of the block.

    Args:
        weights: by name without the layer's prefix.
        shape: of the drafter.
        modules: ``layers`` or ``integers``, for the products and norms.
        causal: True if a row of the block sees no later ones.
    """

    def __init__(self, weights: dict[str, Tensor], shape: Shape, modules: ModuleType, causal: bool):
        def product(*names: str) -> Any:
            return modules.Linear(*joined(weights, list(names)))

        self.shape, self.causal = shape, causal
        self.q, self.kv = product("self_attn.q_proj"), product("self_attn.k_proj", "self_attn.v_proj")
        self.out, self.down = product("self_attn.o_proj"), product("mlp.down_proj")
        self.gate_up = product("mlp.gate_proj", "mlp.up_proj")
        names = ("input_layernorm", "post_attention_layernorm")
        self.input_norm, self.post_norm = (modules.RMSNorm(weights[f"{n}.weight"], shape.norm_eps) for n in names)
        self.q_gain, self.k_gain = (weights[f"self_attn.{n}_norm.weight"] for n in "qk")

    def remember(self, x: Tensor, memory: Memory, tables: Tables) -> tuple[Tensor, Tensor]:
        """Write keys and values of rows ``[1, n, hidden]`` to the memory, and return all that are read so far."""
        s = self.shape
        keys, values = self.kv(x).unflatten(-1, (2, s.kv_heads, s.head_dim)).unbind(2)
        keys = F.rms_norm(keys, (s.head_dim,), self.k_gain.to(keys.dtype), s.norm_eps)
        return memory.extend(rotate(keys, tables), values)

    def __call__(self, x: Tensor, memory: Memory, tables: Tables) -> Tensor:
        """Return the hidden states ``[1, n, hidden]`` of the rows of a block after this layer."""
        s, n = self.shape, x.shape[1]
        normed = self.input_norm(x)
        keys, values = self.remember(normed, memory, tables)
        queries = self.q(normed).unflatten(-1, (s.heads, s.head_dim))
        queries = F.rms_norm(queries, (s.head_dim,), self.q_gain.to(queries.dtype), s.norm_eps)
        mask = None
        if self.causal:
            mask = torch.ones(n, keys.shape[2], dtype=torch.bool, device=x.device).tril_(keys.shape[2] - n)
        attended = F.scaled_dot_product_attention(
            rotate(queries, tables).transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=s.heads != s.kv_heads
        )
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(self.post_norm(x)).chunk(2, dim=-1)
        fed: Tensor = self.down(F.silu(gate) * up)
        return x + fed


class DFlashModel(HeadModel):
    """A DFlash drafter in the form for inference, shared by every drafter that uses it.

    Args:
        head: the weights.
        target: the model for which it was trained; its embedding, dtype and device are shared.

    Raises:
        ValueError: the drafter expects another hidden size, vocabulary or number of layers.
    """

    def __init__(self, head: DFlashHead, target: Transformer):
        config, block = head.config, head.block
        check_fit(target, config.hidden_size, config.vocab_size, block.boundaries, block.verifier)
        state, modules = cast(head, target), target.precision.modules
        shape = Shape(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab=config.draft_vocab_size,
            context=min(target.shape.context, block.window or target.shape.context),
            norm_eps=config.rms_norm_eps,
        )
        super().__init__(state, shape, head.draft_ids, target, tied=False)
        order = sorted(block.boundaries)
        self.capture, self.block = tuple(order), block.predicted
        self.order = [order.index(boundary) for boundary in block.boundaries]
        self.mask_token, self.size, self.skipped = block.mask_token, block.size, block.size - block.predicted
        self.fc = modules.Linear(state["fc.weight"])
        self.hidden_norm = modules.RMSNorm(state["hidden_norm.weight"], shape.norm_eps)
        self.layers = [
            DFlashLayer(part(state, f"layers.{i}."), shape, modules, causal) for i, causal in enumerate(block.causal)
        ]
        self.rope = Rope(config, shape.head_dim, shape.context + block.size, target.precision.hidden, target.device)

    def cache(self, capacity: int) -> KVCache:
        """Return an empty cache for a text of at most ``capacity`` rows, in the dtype of the hidden states."""
        return KVCache(self.shape, capacity, self.target.precision.hidden, self.target.device)

    @torch.inference_mode()
    def read(self, features: Tensor, cache: KVCache) -> None:
        """Commit the target's features ``[n, states * hidden]`` of the next positions of the text to the cache."""
        n = len(features)
        states = features.unflatten(-1, (len(self.order), -1))[:, self.order].flatten(1)
        read = self.hidden_norm(self.fc(states[None]))
        tables = self._tables(cache, n)
        for layer, memory in zip(self.layers, self._memories(cache, n), strict=True):
            layer.remember(read, memory, tables)
        cache.length += n

    @torch.inference_mode()
    def step(self, token: int, cache: KVCache, vocabulary: Vocabulary, width: int, wanted: int) -> Children:
        """Predict a block by one forward, whose rows do not join the cache.

        Args:
            token: the last one of the text.
            cache: with the states of all tokens before it.
            vocabulary: the tokens that can be drafted.
            width: children of each position.
            wanted: how many positions get children, the first ones of the block.
        """
        ids = [token, *[self.mask_token] * (self.size - 1)]
        x = embedded(torch.tensor([ids], device=self.target.device), self.embedding).to(self.target.precision.hidden)
        tables = self._tables(cache, len(ids))
        for layer, memory in zip(self.layers, self._memories(cache, len(ids)), strict=True):
            x = layer(x, memory, tables)
        return self.children(x[0, self.skipped : self.skipped + wanted], width, vocabulary)

    def _tables(self, cache: KVCache, n: int) -> Tables:
        """Return the rotary tables of ``n`` new rows."""
        return self.rope.at(torch.arange(cache.length, cache.length + n, device=self.target.device)[None])

    def _memories(self, cache: KVCache, n: int) -> list[Memory]:
        """Return where each layer writes ``n`` new rows."""
        rows = slice(cache.length, cache.length + n)
        keys, values = cache.data
        return [Memory(keys[i], values[i], None, rows, rows.stop) for i in range(self.shape.layers)]


class DFlashDrafter(BlockDrafter[DFlashModel]):
    """Drafts a block of tokens with one forward of a DFlash drafter.

    Row t of its cache are the keys and values of the target's states at token t. The rows of a block, the text's last
    token and mask tokens, follow them. Since each of them sees the others, the whole block is computed however few of
    its positions can be drafted.
    """

    whole = True

    def __init__(self, model: DFlashModel, width: int = 10, max_depth: int = 12):
        super().__init__(model, width, max_depth)
        self.rows = self.beyond = model.size

    def draft(self, features: Tensor, tokens: list[int]) -> Children:
        """Read tokens of the text and predict the block after them; see ``BlockDrafter.draft``."""
        self.model.read(features, self.cache)
        return self.model.step(tokens[-1], self.cache, self.vocabulary, self.width, self.block)

    def read(self, features: Tensor, tokens: Sequence[int]) -> None:
        """Commit rows for positions of the text to the cache; see ``HeadDrafter.read``."""
        self.model.read(features, self.cache)
