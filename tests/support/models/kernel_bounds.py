"""Run a library of kernels built with address sanitizer on random models and calls, and compare it with torch.

This is a separate program because the sanitizer must be loaded before Python: ``kernel_bounds LIBRARY SEED COUNT``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from spec_envs.decoding.drafters.integer_step import Fusion, IntegerStep
from spec_envs.decoding.model import integers, kernels, layers
from spec_envs.decoding.model.cache import KVCache
from spec_envs.decoding.model.integer_text import IntegerText
from spec_envs.decoding.model.lora import Added, Additions
from spec_envs.decoding.model.rows import Rows
from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.target_text import TorchText
from tests.support.models.quantised import CPU, eagle_layer, random_weights, reference, reference_layers

FAMILIES: dict[type[PretrainedConfig], dict[str, list]] = {
    LlamaConfig: {"attention_bias": [False, True], "mlp_bias": [False, True]},
    MistralConfig: {"sliding_window": [None, 70, 4096]},
    Qwen2Config: {"use_sliding_window": [False, True], "sliding_window": [70], "max_window_layers": [0, 1, 9]},
    Qwen3Config: {"attention_bias": [False, True]},
}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
]  # fmt: skip


class Choice:
    """Draw random options, ids and numbers from one seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def ids(self, vocab: int, *size: int) -> Tensor:
        return torch.from_numpy(self.rng.integers(0, vocab, size))

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)


# The part of a model that the kernels do not compute; empty for a model they do.
ODD = ("", "hidden", "", "inner", "", "heads", "head", "rope")


def config(choice: Choice, odd: str) -> PretrainedConfig:
    """Return a random config; ``odd`` names a part for which a size is drawn that the kernels do not compute."""
    family = choice.of(list(FAMILIES))
    heads = choice.of([1, 2, 3, 4, 6, 8])
    kv_heads = choice.of([n for n in range(1, heads + 1) if heads % n == 0])
    rope = {**choice.of(ROPES), "rope_theta": choice.of([10_000.0, 500.0])}
    if odd == "rope":
        rope["partial_rotary_factor"] = choice.of([0.25, 0.5, 0.75])
    return family(
        hidden_size=heads * 16 * choice.of([1, 1, 2, 3]) + (8 * heads if odd == "hidden" else 0),
        intermediate_size=16 * choice.of([1, 2, 3, 5, 9]) + (choice.of([4, 8]) if odd == "inner" else 0),
        num_hidden_layers=choice.of([1, 2]),
        num_attention_heads=heads,
        num_key_value_heads=choice.of(range(1, 10)) if odd == "heads" else kv_heads,
        head_dim=choice.of([16, 24, 40, 48, 80]) if odd == "head" else choice.of([32, 64, 96, 128]),
        vocab_size=choice.of([1, 2, 16, 31, 33, 64, 100, 130]),
        max_position_embeddings=choice.of([63, 64, 65, 100, 128, 200]),
        tie_word_embeddings=choice.of([False, True]),
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters=rope,
        **{name: choice.of(options) for name, options in FAMILIES[family].items()},
    )


def near(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Assert that results differ only by bfloat16 keys and values and by the rounding of sums."""
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp(min=1e-6))
    assert ours.shape == theirs.shape and error < 0.08, f"{what}: {list(ours.shape)} is off by {error:.2f}"


class Pair:
    """A model in the kernels and in torch that are given the same calls."""

    def __init__(self, made: PretrainedConfig, choice: Choice):
        weights = random_weights(made, choice.generator)
        self.choice, self.model = choice, Transformer(made, weights, torch.int8, CPU)
        self.reference, self.shape = reference(made, weights), self.model.shape

    def both(self, hidden: Tensor, caches: tuple[Any, Any], at: Tensor, what: str, **given: Any) -> Tensor:
        """Return the kernels' hidden states, after comparing them, the captured states and the logits with torch's."""
        (ours, kept), (theirs, wanted) = (
            model.forward(hidden, cache, at, **given)
            for model, cache in zip((self.model, self.reference), caches, strict=True)
        )
        for mine, other in zip(kept, wanted, strict=True):
            near(mine, other, f"{what}, captured")
        near(self.model.norm(ours), self.reference.norm(theirs), what)
        logits = self.model.head(ours)
        near(logits, self.reference.head(ours), f"{what}, logits")
        assert torch.equal(self.model.head.argmax(ours), logits.argmax(-1))
        return ours

    def embed(self, *size: int) -> Tensor:
        return self.reference.embed(self.choice.ids(self.shape.vocab, *size))

    def prompt_and_tree(self) -> None:
        """Run a prompt and then rows of which each attends to some, up to the end of the context and of the cache."""
        context, of = self.shape.context, self.choice.of
        n = of([1, 2, 16, 17, 40, context - 1, context])
        room = of([0, 1, 7, 30, 70])
        caches = tuple(model.cache(n + room) for model in (self.model, self.reference))
        capture = of([(), (0,), tuple(range(self.shape.layers))])
        whole = self.both(self.embed(1, n), caches, torch.arange(n)[None], f"prompt of {n}", capture=capture)
        assert torch.equal(self.model.head(whole[:, -1:]), self.model.head(whole)[:, -1:]), (
            "a row depends on the rows beside it"
        )
        if not room:
            return
        for cache in caches:
            cache.length = n
        at = torch.full((1, room), min(n, context - 1))
        named = of([room, min(n, 3) + room])
        seen = torch.from_numpy(self.choice.rng.random((room, named)) < 0.4)
        seen[range(room), range(named - room, named)] = True
        self.both(self.embed(1, room), caches, at, f"tree of {room} after {n}", seen=seen)

    def batch(self) -> None:
        """Run a batch of sequences padded on the left."""
        batch, n = self.choice.of([1, 2, 5]), min(self.choice.of([1, 15, 33]), self.shape.context)
        padding = torch.from_numpy(self.choice.rng.integers(0, n, batch))
        at = (torch.arange(n)[None] - padding[:, None]).clamp(min=0)
        caches = tuple(model.cache(n, batch) for model in (self.model, self.reference))
        hidden = self.embed(batch, n)
        (ours, _), (theirs, _) = (
            model.forward(hidden, cache, at, padding=padding)
            for model, cache in zip((self.model, self.reference), caches, strict=True)
        )
        shown = torch.arange(n)[None] >= padding[:, None]  # padded rows attend to nothing
        near(ours[shown], theirs[shown], f"batch of {batch} times {n}")

    def slots(self) -> None:
        """Run slots whose sequences have different lengths."""
        capacity = self.choice.of([33, 64])
        both = tuple(model.slots(4, capacity) for model in (self.model, self.reference))
        for n in (self.choice.of([1, 9, 20]), self.choice.of([1, 5, capacity - 20])):
            chosen = self.choice.rng.permutation(4)[: self.choice.of([1, 3])].tolist()
            at = torch.from_numpy(both[0].lengths[chosen][:, None] + np.arange(n)).clamp(max=self.shape.context - 1)
            batches = tuple(slots.batch(chosen) for slots in both)
            self.both(self.embed(len(chosen), n), batches, at, f"slots {chosen} of {n} rows")
            for slots in both:
                slots.lengths[chosen] += n if max(slots.lengths) + n < capacity - 20 else 0

    def adapters(self) -> None:
        """Run low-rank additions to some layers."""
        matrices, made = self.model.layers.structures, []
        for layer in matrices:
            sides = [
                None
                if self.choice.rng.random() < 0.3
                else (self.choice.normal(rank, m.inputs) / m.inputs**0.5, self.choice.normal(rank, m.outputs) * 0.2)
                for m, rank in ((layer.qkv, self.choice.of([1, 8, 130])), (layer.out, self.choice.of([1, 3, 16])))
            ]
            made.append(None if self.choice.rng.random() < 0.2 else Added(*sides))
        n = self.choice.of([1, 17, 40])
        caches = tuple(model.cache(n) for model in (self.model, self.reference))
        self.both(self.embed(1, n), caches, torch.arange(n)[None], "adapters", added=Additions(made))

    def text(self) -> None:
        """Read a text from its tokens on: a prompt, and then trees of which some rows are kept."""
        capture = self.choice.of([(), (0,), tuple(range(self.shape.layers + 1))])
        texts, rng = (IntegerText(self.model, capture), TorchText(self.model, capture)), self.choice.rng
        prompt = self.choice.ids(self.shape.vocab, self.choice.of([1, 2, 17, self.shape.context])).tolist()
        for text in texts:
            text.begin(self.shape.context)
        assert torch.equal(*(text.append(prompt, True) for text in texts))
        for nodes in (0, 1, 6, 20, 33):
            if texts[0].cache.length + nodes >= self.shape.context:
                break
            parents = np.array([rng.integers(-1, i) if i else -1 for i in range(nodes)], np.int64)
            tokens, rows = (
                rng.integers(0, self.shape.vocab, nodes),
                sorted({0, *rng.integers(0, nodes + 1, 3).tolist()}),
            )
            for text in texts:
                text.read(prompt[-1], tokens, parents, True)
            assert torch.equal(*(text.hidden() for text in texts)), f"{nodes} nodes"
            assert np.array_equal(*(text.choices() for text in texts)), f"{nodes} nodes"
            assert torch.equal(*(text.keep(rows) for text in texts)), f"{nodes} nodes"

    def best(self) -> None:
        """Compare the most probable outputs over two sets of logits."""
        rows, extras = self.choice.of([1, 7, 20]), self.choice.of([0, 1, 15, 17])
        logits = self.choice.normal(rows, self.shape.vocab + 3)[:, : self.shape.vocab]
        extra = self.choice.normal(rows, extras) if extras else None
        width = self.choice.of([1, self.shape.vocab + extras])
        index, *ours = integers.most_probable(logits, extra, width)
        theirs = layers.most_probable(logits, extra, width)[1:]
        torch.testing.assert_close(ours, list(theirs), rtol=1e-4, atol=1e-5)
        chosen = torch.cat([logits] if extra is None else [logits, extra], -1).log_softmax(-1).gather(1, index)
        torch.testing.assert_close(chosen, theirs[0], rtol=1e-4, atol=1e-5)  # the order of equal ones is free
        assert all(len(set(row)) == width for row in index.tolist())

    def draft(self) -> None:
        """Compare a step of a draft model in one call with the model's forward."""
        model, vocab = self.model, self.shape.vocab
        step = IntegerStep(model.layers, model.norm, model.head.linear, model.embedding, model.rope, vocab)
        n, extras = self.choice.of([1, 2, 33]), self.choice.of([0, 1, 9])
        tokens, last = self.choice.ids(vocab, n), self.choice.of([0, 1, n])
        extra = self.choice.normal(extras, self.shape.hidden) if extras else None
        width = self.choice.of([1, vocab + extras])
        hidden, index, *_ = step(None, tokens.numpy(), np.arange(n), model.cache(n), extra, width, last)
        expected, _ = model.forward(model.embed(tokens[None]), model.cache(n), torch.arange(n)[None])
        assert torch.equal(hidden, expected[0]) and index.shape == (last, width)
        assert not index.size or (index.min() >= 0 and index.max() < vocab + extras)

    def eagle(self) -> None:
        """Compare an EAGLE-3 head's layer, which reads twice the hidden size, layer by layer and as a step in one
        call; then the attention of an exit, which has no feed-forward part."""
        shape, n = dataclasses.replace(self.shape, layers=1), self.choice.of([1, 2, 19])
        weights, hidden = eagle_layer(shape, self.choice.generator), self.choice.normal(n, shape.hidden)
        ours, theirs = integers.Layers([weights], shape), reference_layers([weights], shape)
        norms = [
            integers.RMSNorm(weights[f"{name}.weight"], shape.norm_eps) for name in ("input_layernorm", "hidden_norm")
        ]
        tokens, at = self.choice.ids(shape.vocab, n), torch.arange(n)[None]
        entering = torch.cat([norms[0](self.model.embed(tokens)), norms[1](hidden)], -1)[None]
        caches = [KVCache(shape, n, dtype, CPU) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32)]
        mine, _ = ours(Rows(hidden[None], caches[0], self.model.rope, at, entering=entering))
        expected, _ = theirs(Rows(hidden[None], caches[2], self.reference.rope, at, entering=entering))
        near(mine, expected, "eagle layer")
        head = self.model.head.linear
        step = IntegerStep(
            ours, norms[0], head, self.model.embedding, self.model.rope, shape.vocab, (norms[0], norms[1])
        )
        output, *_ = step(hidden, tokens.numpy(), None, caches[1], None, shape.vocab, self.choice.of([0, n]))
        assert torch.equal(output, mine[0])
        self.fused(ours, shape, norms, tokens.numpy())
        kept = {name: t for name, t in weights.items() if not name.startswith(("mlp", "post"))}
        for name in ("q", "k", "v"):
            kept[f"self_attn.{name}_proj.weight"] = kept[f"self_attn.{name}_proj.weight"][:, : shape.hidden] * 1.4
        ours, theirs = integers.Layers([kept], shape), reference_layers([kept], shape)
        caches = [KVCache(shape, n, dtype, CPU) for dtype in (torch.bfloat16, torch.float32)]
        mine, _ = ours(Rows(hidden[None], caches[0], self.model.rope, at))
        near(mine, theirs(Rows(hidden[None], caches[1], self.reference.rope, at))[0], "attention of an exit")

    def fused(self, layer: integers.Layers, shape: Shape, norms: list[integers.RMSNorm], tokens: np.ndarray) -> None:
        """Compare rows that an EAGLE-3 head makes of the target's states, and rows in another order, with those that
        are made before."""
        states, width = self.choice.of([1, 3]), 16 * self.choice.of([1, 2, 5])
        sizes, eps = [width] * states + [width * states], shape.norm_eps
        gains = [integers.RMSNorm(1 + self.choice.normal(size) / 4, eps) for size in sizes]
        each, joined = self.choice.of([gains[:-1], []]), self.choice.of([gains[-1], None])
        product = integers.Linear(self.choice.normal(shape.hidden, width * states) / (width * states) ** 0.5)
        step = IntegerStep(
            layer, norms[0], self.model.head.linear, self.model.embedding, self.model.rope, shape.vocab,
            (norms[0], norms[1]), Fusion(product, each, joined),
        )  # fmt: skip
        read = features = self.choice.normal(len(tokens), states * width)
        if each:
            read = torch.cat([norm(part) for norm, part in zip(each, read.chunk(states, -1), strict=True)], -1)
        hidden, cache = product(joined(read) if joined else read), KVCache(shape, 40, torch.bfloat16, CPU)
        given = (cache, None, 1, len(tokens))
        mine, *best = step(features, tokens, None, *given, fuses=True)
        theirs, *expected = step(hidden.contiguous(), tokens, None, *given)
        assert torch.equal(mine, theirs) and all(map(np.array_equal, best, expected))
        order = self.choice.rng.integers(0, len(tokens), len(tokens))
        mine, *best = step(hidden.contiguous(), tokens, None, *given, rows=order)
        theirs, *expected = step(hidden[order].contiguous(), tokens, None, *given)
        assert torch.equal(mine, theirs) and all(map(np.array_equal, best, expected))


@torch.inference_mode()
def drive(seed: int) -> bool:
    """Run one random model through all calls; return False if the kernels do not compute it."""
    choice = Choice(seed)
    torch.set_num_threads(choice.of([1, 1, 2, 3]))
    try:
        made = config(choice, ODD[seed % len(ODD)])
        pair = Pair(made, choice)
    except ValueError as error:
        assert str(error) and "\n" not in str(error).strip(), error
        return False
    assert integers.computes(made)
    for call in (
        pair.prompt_and_tree,
        pair.batch,
        pair.slots,
        pair.adapters,
        pair.text,
        pair.best,
        pair.draft,
        pair.eagle,
    ):
        call()
    return True


def main() -> None:
    """Run the seeds given on the command line, and print how many models the kernels computed."""
    path, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    library = ctypes.CDLL(path)
    kernels.library = lambda: library  # type: ignore[assignment]
    computed = 0
    for seed in range(first, first + count):
        print(f"seed {seed}", file=sys.stderr, flush=True)
        computed += drive(seed)
    print(f"{computed} of {count} computed")


if __name__ == "__main__":
    main()
