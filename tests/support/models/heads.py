"""Random EAGLE-3 heads in every published layout, and a plain float64 reference of their computation."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.loading import load_decoder

FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
IDS = "eagle_aux_hidden_state_layer_ids"
LAYOUTS = ("eagle", "specforge", "modelopt", "automodel", "speculators")
PROMPT = [3, 7, 5, 9, 4, 11, 2]


@dataclass
class Recipe:
    """Sizes and options of a random head for a target; ``boundaries`` are the layer boundaries of the target that
    it reads."""

    target_hidden: int = 32
    vocab: int = 16
    target_layers: int = 8
    hidden: int = 32
    layers: int = 1
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    mlp: int = 40
    drafted: int = 13
    boundaries: tuple[int, ...] = (2, 4, 5)
    named: bool = True
    attention_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    fc_bias: bool = False
    head_norms: bool = False
    embedding: bool = False
    output_rows: bool = True
    theta: float = 10_000.0
    scale: float = 0.3
    seed: int = 0
    block: int = 0
    mask_token: int = 14
    flags: dict[str, bool] = field(default_factory=dict)


def tensors(r: Recipe) -> dict[str, Tensor]:
    """Return the tensors of a head, named as in the first published heads."""
    generator = torch.Generator().manual_seed(r.seed)

    def drawn(*shape: int) -> Tensor:  # biases are drawn at 0.3 even where weights have to be smaller
        return (r.scale if len(shape) > 1 else 0.3) * torch.randn(*shape, generator=generator)

    def gains(n: int) -> Tensor:
        return 1 + drawn(n)

    fused, made = len(r.boundaries) * r.target_hidden, {}
    made["fc.weight"] = drawn(r.hidden, fused)
    if r.fc_bias:
        made["fc.bias"] = drawn(r.hidden)
    if r.flags.get("norm_before_fc"):
        made["input_norm.weight"] = gains(fused)
    if r.flags.get("fc_norm"):
        made |= {f"fc_norm.{i}.weight": gains(r.target_hidden) for i in range(len(r.boundaries))}
    for i in range(r.layers):
        at, width = "midlayer." if i == 0 else f"layers.{i}.", (2 if i == 0 else 1) * r.hidden
        sizes = {"q_proj": (r.heads * r.head_dim, width), "k_proj": (r.kv_heads * r.head_dim, width)}
        sizes |= {"v_proj": sizes["k_proj"], "o_proj": (r.hidden, r.heads * r.head_dim)}
        for name, size in sizes.items():
            made[f"{at}self_attn.{name}.weight"] = drawn(*size)
            if r.out_bias if name == "o_proj" else r.attention_bias:
                made[f"{at}self_attn.{name}.bias"] = drawn(size[0])
        for name, size in (
            ("gate_proj", (r.mlp, r.hidden)),
            ("up_proj", (r.mlp, r.hidden)),
            ("down_proj", (r.hidden, r.mlp)),
        ):
            made[f"{at}mlp.{name}.weight"] = drawn(*size)
            if r.mlp_bias:
                made[f"{at}mlp.{name}.bias"] = drawn(size[0])
        norms = ["input_layernorm", "post_attention_layernorm", *(["hidden_norm"] if i == 0 else [])]
        made |= {f"{at}{name}.weight": gains(r.hidden) for name in norms}
        if r.head_norms:
            made |= {f"{at}self_attn.{name}.weight": gains(r.head_dim) for name in ("q_norm", "k_norm")}
    made["norm.weight"] = gains(r.hidden)
    if r.output_rows:
        made["lm_head.weight"] = 2 * drawn(r.drafted, r.hidden)
    if r.block:
        made["mask_hidden"] = drawn(1, 1, fused)
    if r.embedding:
        made["embed_tokens.weight"] = 3 * drawn(r.vocab, r.hidden)
    if r.drafted < r.vocab:
        ids = torch.randperm(r.vocab, generator=generator)[: r.drafted].sort().values
        made["d2t"] = ids - torch.arange(r.drafted)
        made["t2d"] = torch.zeros(r.vocab, dtype=torch.bool).index_fill_(0, ids, True)
    return made


def config(r: Recipe, layout: str) -> dict[str, Any]:
    """Return the contents of config.json in a layout."""
    numbers: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": r.hidden,
        "intermediate_size": r.mlp,
        "num_hidden_layers": r.layers,
        "num_attention_heads": r.heads,
        "num_key_value_heads": r.kv_heads,
        "head_dim": r.head_dim,
        "vocab_size": r.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": r.theta,
        "hidden_act": "silu",
        "attention_bias": r.attention_bias,
        "mlp_bias": r.mlp_bias,
        "tie_word_embeddings": False,
    }
    sizes = {"draft_vocab_size": r.drafted}
    if r.target_hidden != r.hidden:
        sizes["target_hidden_size"] = r.target_hidden
    ids = "eagle_aux_hidden_state_layer_ids"
    if layout == "speculators":
        inner = numbers | {"model_type": "qwen3" if r.head_norms else "llama"}
        about: dict[str, Any] = {"algorithm": "peagle" if r.block else "eagle3"}
        written = {"speculators_model_type": about["algorithm"], "transformer_layer_config": inner, **sizes}
        if r.block:
            about["proposal_methods"] = [{"proposal_type": "greedy", "speculative_tokens": r.block}]
            written["mask_token_id"] = r.mask_token
        written |= {"norm_before_residual": False, **r.flags, "speculators_config": about}
        return written | ({ids: list(r.boundaries)} if r.named else {})
    named = list(r.boundaries)
    # layers' outputs, as their trainers count
    named = [i - 1 for i in named] if named[0] == 2 and layout != "eagle" else named
    nested: dict[str, Any] = {ids: named, "use_aux_hidden_state": True} if r.named else {}
    written = numbers | sizes | {"architectures": ["LlamaForCausalLMEagle3"]}
    if layout == "modelopt":
        nested |= {"use_last_layernorm": True, "use_mtp_layernorm": False, "next_layer_regular": True, **r.flags}
    else:
        written |= r.flags
    if r.block:
        key = {"eagle": "ptd_token_id", "specforge": "pard_token"}.get(layout, "mask_token_id")
        written |= {key: r.mask_token, "parallel_drafting": True}
    return written | ({"eagle_config": nested} if nested else {}) | {"torch_dtype": "float32", "use_cache": True}


def save_head(folder: Path, r: Recipe, layout: str = "eagle", **changes: Any) -> dict[str, Tensor]:
    """Write a head in a layout; return its tensors, named as in the first published heads."""
    folder.mkdir(parents=True, exist_ok=True)
    made, renamed = tensors(r), {}
    for name, tensor in made.items():
        if layout in ("modelopt", "speculators", "automodel"):
            name = name.replace("midlayer.", "layers.0.")
        if layout == "automodel" and name not in ("lm_head.weight", "d2t", "t2d"):
            name = f"model.{name}"
        if name.endswith("mask_hidden") and layout == "modelopt":
            tensor = tensor.flatten()
        renamed[name] = tensor.contiguous()
    save_file(renamed, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(r, layout) | changes))
    return made


@functools.cache
def transformers_model(target: Path, dtype: torch.dtype) -> Any:
    """Return a target as transformers computes it."""
    return AutoModelForCausalLM.from_pretrained(target, dtype=dtype)


def states(target: Path, text: list[int], boundaries: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the target's hidden states at layer boundaries, ``[n, len(boundaries) * hidden]``, before the final
    norm."""
    model = transformers_model(target, dtype)
    found: dict[int, Tensor] = {}
    hooks = []
    for i, layer in enumerate(model.model.layers):  # the last state in transformers' own list is normalised
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs, i=i: found.__setitem__(i, inputs[0])))
        hooks.append(layer.register_forward_hook(lambda _, __, out, i=i: found.__setitem__(i + 1, out)))
    with torch.no_grad():
        model(torch.tensor([text]))
    for hook in hooks:
        hook.remove()
    return torch.cat([found[i] for i in boundaries], -1)[0]


class Reference:
    """Compute a head row by row, with lists of keys and values."""

    def __init__(self, r: Recipe, made: dict[str, Tensor], target: Path):
        model = transformers_model(target, torch.float64)
        self.r, self.w = r, {name: t.double() if t.is_floating_point() else t for name, t in made.items()}
        self.embedding = self.w.get("embed_tokens.weight", model.get_input_embeddings().weight.detach())
        self.ids = self.w["d2t"] + torch.arange(r.drafted) if "d2t" in self.w else torch.arange(r.vocab)
        self.rows = self.w.get("lm_head.weight", model.get_output_embeddings().weight.detach()[self.ids])
        self.cache: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in range(r.layers)]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[f"{name}.weight"]

    def product(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def fuse(self, features: Tensor) -> Tensor:
        if self.r.flags.get("fc_norm"):
            parts = features.split(self.r.target_hidden)
            features = torch.cat([self.norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)])
        if self.r.flags.get("norm_before_fc"):
            features = self.norm(features, "input_norm")
        return self.product(features, "fc")

    def attend(self, x: Tensor, at: str, layer: int, position: int) -> Tensor:
        r = self.r
        q, k, v = (self.product(x, f"{at}self_attn.{p}_proj").view(-1, r.head_dim) for p in "qkv")
        if r.head_norms:
            q, k = self.norm(q, f"{at}self_attn.q_norm"), self.norm(k, f"{at}self_attn.k_norm")
        angle = position * r.theta ** (-torch.arange(0, r.head_dim, 2, dtype=torch.float64) / r.head_dim)
        cos, sin = angle.cos().repeat(2), torch.cat([-angle.sin(), angle.sin()])
        q, k = (y * cos + y.roll(r.head_dim // 2, -1) * sin for y in (q, k))
        keys, values = self.cache[layer]
        keys.append(k)
        values.append(v)
        mixed = []
        for head in range(r.heads):
            own = head // (r.heads // r.kv_heads)
            scores = torch.stack([q[head] @ key[own] for key in keys]) / r.head_dim**0.5
            mixed.append(scores.softmax(0) @ torch.stack([value[own] for value in values]))
        return self.product(torch.cat(mixed), f"{at}self_attn.o_proj")

    def row(self, hidden: Tensor, token: int, position: int) -> tuple[Tensor, Tensor]:
        """Return the hidden state that the next step reads, and log-probabilities of the draft vocabulary."""
        x = hidden
        for layer in range(self.r.layers):
            at = f"layers.{layer}." if layer else "midlayer."
            read = (
                self.norm(x, f"{at}input_layernorm")
                if layer
                else self.norm(self.embedding[token], f"{at}input_layernorm")
            )
            if not layer:
                normed = self.norm(x, f"{at}hidden_norm")
                read, x = torch.cat([read, normed]), normed if self.r.flags.get("norm_before_residual") else x
            x = x + self.attend(read, at, layer, position)
            y = self.norm(x, f"{at}post_attention_layernorm")
            gate, up = self.product(y, f"{at}mlp.gate_proj"), self.product(y, f"{at}mlp.up_proj")
            x = x + self.product(F.silu(gate) * up, f"{at}mlp.down_proj")
        normed = self.norm(x, "norm")
        return normed if self.r.flags.get("norm_output") else x, (self.rows @ normed).log_softmax(-1)

    def chain(self, features: Tensor, text: list[int], chain: list[int]) -> list[Tensor]:
        """Return log-probabilities after a text and after each token of a chain, one tensor per position."""
        for i in range(len(text) - 1):
            hidden, log_probs = self.row(self.fuse(features[i]), text[i + 1], i)
        found = [log_probs]
        for i, token in enumerate(chain):
            if self.r.block:
                hidden, token = self.fuse(self.w["mask_hidden"][0, 0]), self.r.mask_token
            hidden, log_probs = self.row(hidden, token, len(text) - 1 + i)
            found.append(log_probs)
        return found


def random_target(folder: Path, like: Path, **changes: Any) -> Path:
    """Save a random Llama with the tokenizer of another folder and some sizes changed; return its folder."""
    shutil.copytree(like, folder)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(like, **changes))
    model.save_pretrained(folder)
    return folder


def drafted(target: Path, head: Path, dtype: str = "float32", width: int = 1, levels: int = 3) -> Decoder:
    """Return a decoder that has started the prompt and drafted this many levels."""
    decoder = load_decoder(str(target), str(head), "cpu", dtype, width=width, max_depth=levels)
    decoder.start(PROMPT, 40, np.random.default_rng(0))
    decoder.begin()
    for _ in range(levels - 1):
        decoder.expand()
    return decoder


def assert_drafts_as_computed(target: Path, head: Path, r: Recipe, made: dict[str, Tensor], atol: float = 2e-4) -> None:
    """Assert that the drafted chain and the whole first distribution are those of the reference."""
    decoder = drafted(target, head)
    chain, text = decoder.tree.tokens.tolist(), [*PROMPT, *decoder.tokens]
    reference = Reference(r, made, target)
    expected = reference.chain(states(target, text[:-1], r.boundaries), text, chain[:-1])
    index = {int(token): i for i, token in enumerate(reference.ids)}
    steps = np.diff(decoder.tree.scores, prepend=0.0)
    if not r.output_rows:  # the head uses the target's output rows, so it can also draft tokens that are in the text
        wide = drafted(target, head, width=r.drafted, levels=1)
        found = zip(wide.tree.tokens.tolist(), wide.tree.scores.tolist(), strict=True)
        gaps = [score - float(expected[0][index[token]]) for token, score in found if token in index]
        assert not gaps or np.ptp(gaps) < 2 * atol  # no gaps where tokens of the text crowd out a small vocabulary
        return
    for step, token, log_probs in zip(steps, chain, expected, strict=True):
        assert abs(step - float(log_probs[index[token]])) < atol
        assert float(log_probs.max()) - float(log_probs[index[token]]) < atol
    entropies = [-float((p.exp() * p).sum()) for p in expected]
    np.testing.assert_allclose(np.concatenate(decoder.tree.entropies), entropies, atol=10 * atol)
    wide = drafted(target, head, width=r.drafted, levels=1)
    found = dict(zip(wide.tree.tokens.tolist(), wide.tree.scores.tolist(), strict=True))
    np.testing.assert_allclose([found[int(i)] for i in reference.ids], expected[0], atol=atol * 5)
