"""GGUF files: the model in them gives the text of transformers, or is refused in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights import checkpoints
from spec_envs.decoding.weights.checkpoints import eos_ids, load_tokenizer, model_folder
from tests.support.models.gguf_files import END, PAD, SPECIAL, TOKENS, TURN, reference, split, tiny_model, write_gguf
from tests.support.texts import plain_text

IDS = np.random.default_rng(0).integers(0, 250, 20).tolist()
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "biases": {"family": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    # as in Mistral Nemo, where the head size is not hidden size / heads
    "wide heads": {"family": "llama", "head_dim": 24},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "qwen3 biases": {"family": "qwen3", "attention_bias": True, "tie_word_embeddings": False},
}
ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the model, and of its file
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        {".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0},
    ),
    "older linear": ({"rope_type": "linear", "factor": 2.0}, {".rope.scale_linear": 2.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            ".rope.scaling.type": "yarn",
            ".rope.scaling.factor": 4.0,
            ".rope.scaling.original_context_length": 64,
            ".rope.scaling.finetuned": True,
        },
    ),
    "none": ({"rope_type": "default"}, {".rope.scaling.type": "none", ".rope.scaling.factor": 4.0}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(checkpoints, "CACHE", folder)
    return folder


def ours(path: Path, ids: list[int] = IDS) -> list[int]:
    """Return the greedy text of this package, up to 24 tokens."""
    return plain_text(load_decoder(str(path), None, "cpu", "float32"), ids, 24)


@pytest.mark.parametrize("name", FAMILIES)
def test_model_families_equal_transformers(name: str, tmp_path: Path) -> None:
    model = tiny_model(**FAMILIES[name])
    assert ours(write_gguf(model, tmp_path / "model.gguf")) == reference(model, IDS)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling_by_keys(name: str, family: str, tmp_path: Path) -> None:
    here, there = ROPES[name]
    model = tiny_model(family, rope_parameters={"rope_theta": 10_000.0} | here)
    ids = np.random.default_rng(1).integers(0, 250, 150).tolist()
    assert ours(write_gguf(model, tmp_path / "model.gguf", there), ids) == reference(model, ids)


def test_rope_scaling_by_tensor(tmp_path: Path) -> None:
    """Llama 3.1 and later have a tensor of divisors of the frequencies, for which there is no key."""
    scaled = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny_model(rope_parameters=scaled)
    plain = 10_000.0 ** -(torch.arange(0, 8, 2).float() / 8)
    factors = (plain / ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")[0]).numpy()
    ids = np.random.default_rng(1).integers(0, 250, 150).tolist()
    assert ours(write_gguf(model, tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors}), ids) == (
        reference(model, ids)
    )
    both = {".rope.scaling.type": "linear", ".rope.scaling.factor": 2.0}
    path = write_gguf(model, tmp_path / "both.gguf", both, {"rope_freqs.weight": factors})
    with pytest.raises(ValueError, match=r"scales its positions twice, by rope_freqs.weight and"):
        model_folder(str(path))


@pytest.mark.parametrize("factors", [[1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, -2.0], [1.0, 1.0, 1.0, np.nan]])
def test_invalid_rope_tensors_are_refused(factors: list[float], tmp_path: Path) -> None:
    path = write_gguf(
        tiny_model(), tmp_path / "model.gguf", tensors={"rope_freqs.weight": np.array(factors, np.float32)}
    )
    with pytest.raises(
        ValueError, match=r"cannot convert the GGUF file .*rope_freqs.weight holds \d numbers; expected 4"
    ):
        model_folder(str(path))


@pytest.mark.parametrize("name", ["模" * 80 + ".gguf", "x" * 240 + ".gguf", "MODEL.GGUF"])
def test_unusual_file_names(name: str, tmp_path: Path) -> None:
    model = tiny_model()
    assert ours(write_gguf(model, tmp_path / name)) == reference(model, IDS)


def test_text_ends_at_every_end_token_of_the_file(tmp_path: Path) -> None:
    model = tiny_model()
    free = reference(model, IDS)
    turn = next(token for token in free[4:] if free.index(token) >= 4)
    path = write_gguf(model, tmp_path / "turn.gguf", {"tokenizer.ggml.eot_token_id": turn})
    assert ours(path) == free[: free.index(turn) + 1]
    assert eos_ids(str(path)) == {turn, END}
    renamed = [*TOKENS[:TURN], "<|im_end|>", TOKENS[PAD]]
    path = write_gguf(
        model, tmp_path / "named.gguf", {"tokenizer.ggml.tokens": renamed, "tokenizer.ggml.eom_token_id": 7}
    )
    assert eos_ids(str(path)) == {7, END, TURN}


def test_tokenizer_has_the_ids_of_the_file(tmp_path: Path) -> None:
    """Ids are the file's for single bytes and special tokens, and no token outside the vocabulary is added."""
    special = ["<｜end▁of▁sentence｜>", *SPECIAL[1:]]
    path = write_gguf(tiny_model(), tmp_path / "model.gguf", {"tokenizer.ggml.tokens": TOKENS[:END] + special})
    tokenizer = load_tokenizer(str(path))
    assert max(tokenizer.get_vocab().values()) == PAD and tokenizer.eos_token_id == END
    text = f"the{special[0]}ä<|turn|>"
    assert tokenizer.encode(text)[:3] == [256, TOKENS.index("e"), END] and tokenizer.encode(text)[-1] == TURN
    assert "<|endoftext|>" not in tokenizer.get_vocab()


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    words = ["▁", "t", "h", "e", "▁t", "he", "▁the", "th"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    fields = {"model": "llama", "tokens": tokens, "token_type": [2, 3, 3] + [6] * 256 + [1] * 8}
    fields |= {"scores": [0.0] * 259 + [-100.0, -101.0, -102.0, -103.0, -1.0, -2.0, -3.0, -4.0]}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    without = [f"tokenizer.ggml.{name}" for name in ("merges", "padding_token_id", "pre")]
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    model = tiny_model(vocab_size=len(tokens))
    path = write_gguf(model, tmp_path / "model.gguf", named, without=without)
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("the the ä") == [1, 265, 265, 259, 3 + 0xC3, 3 + 0xA4]
    assert eos_ids(str(path)) == {2} and ours(path) == reference(model, IDS, eos_token_id=2)


def test_other_files_in_the_folder_are_ignored(tmp_path: Path) -> None:
    model = tiny_model()
    path = write_gguf(model, tmp_path / "model.gguf")
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.Evil"}, "eos_token": "a"}')
    (tmp_path / "chat_template.jinja").write_text("other")
    (tmp_path / "config.json").write_text("{")
    assert ours(path) == reference(model, IDS)
    assert load_tokenizer(str(path)).chat_template != "other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"without": ["blk.1.ffn_up.weight"]}, "model.layers.1.mlp.up_proj.weight is missing"),
        ({"without": ["output_norm.weight"]}, "model.norm.weight is missing"),
        ({"without": ["token_embd.weight"]}, "token_embd.weight is missing"),
        ({"without": ["llama.block_count"]}, "llama.block_count is missing"),
        ({"without": ["tokenizer.ggml.tokens"]}, "has no tokenizer"),
        ({"without": ["tokenizer.ggml.model"]}, "tokenizer"),
        ({"tensors": {"blk.0.ffn_gate_exps.weight": np.ones((2, 48, 32), np.float32)}}, "blk.0.ffn_gate_exps.weight"),
        ({"tensors": {"blk.2.attn_norm.weight": np.ones(32, np.float32)}}, "model.layers.2.input_layernorm.weight"),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "bias is missing"),
        ({"tensors": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "blk.0.attn_q_norm.weight"),
        ({"tensors": {"blk.0.attn_q.weight": np.ones((32, 32), np.int32)}}, "I32, which cannot be read"),
        ({"tensors": {"blk.0.attn_q.weight": np.ones((16, 32), np.float32)}}, r"is \[16, 32\], not \[32, 32\]"),
        ({"fields": {".attention.key_length": 16}}, "value_length is 8; expected the width of its heads, 16"),
        ({"fields": {".rope.dimension_count": 4}}, "rope.dimension_count is 4"),
        ({"fields": {".rope.scaling.type": "longrope"}}, "rope.scaling.type is 'longrope'"),
        ({"fields": {".attention.sliding_window": 64}}, "llama.attention.sliding_window is 64"),
        ({"fields": {".logit_scale": 0.5}}, "llama.logit_scale is 0.5"),
        ({"fields": {".expert_count": 8}}, "llama.expert_count is 8"),
        ({"fields": {".something.new": "x"}}, "llama.something.new is 'x', which is not supported"),
        ({"fields": {".attention.head_count_kv": [2, 2]}}, r"head_count_kv is \[2, 2\]; expected a positive whole"),
        ({"fields": {".block_count": 1_000_000_000}}, "1000000000 layers"),
        ({"fields": {".embedding_length": 0}}, "embedding_length is 0"),
        ({"fields": {".rope.freq_base": float("nan")}}, "rope.freq_base is nan"),
        ({"fields": {"tokenizer.ggml.eos_token_id": 4096}}, "eos_token_id is 4096"),
        ({"fields": {"tokenizer.ggml.pre": "deepseek-coder"}}, "tokenizer.ggml.pre is 'deepseek-coder'"),
        ({"fields": {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False}}, "add_space_prefix"),
        ({"fields": {"tokenizer.ggml.model": "rwkv"}}, "rwkv"),
        ({"fields": {"general.type": "adapter"}}, "it holds 'adapter'; expected a model"),
    ],
)
def test_unsupported_files_are_refused(change: dict[str, Any], message: str, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tiny_model(), tmp_path / "model.gguf", **change)
    with pytest.raises(ValueError, match=rf"cannot convert the GGUF file .*{message}") as caught:
        model_folder(str(path))
    assert "\n" not in str(caught.value) and not list((cache / "models").iterdir())


def test_parts_are_joined(tmp_path: Path) -> None:
    model = tiny_model()
    paths = split(model, tmp_path, 3)
    assert ours(paths[0]) == ours(paths[2]) == reference(model, IDS)
    paths[1].rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"one of 3 parts of a model, and model-00002-of-00003.gguf is not beside it"):
        model_folder(str(paths[0]))
    shutil.copy(paths[0], paths[1])
    with pytest.raises(ValueError, match=r"is split into parts \(split.count 3\) that its name"):
        model_folder(str(paths[0]))
    alone = shutil.copy(paths[0], tmp_path / "first.gguf")
    with pytest.raises(ValueError, match=r"is split into parts .* expected all of them in one folder"):
        model_folder(str(alone))


def test_damaged_conversion_is_repeated(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tiny_model(), tmp_path / "model.gguf")
    folder = model_folder(str(path))
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name, content in whole.items():
        (folder / name).write_bytes(content[: len(content) // 2])
        assert model_folder(str(path)) == folder
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
        (folder / name).unlink()
        model_folder(str(path))
        assert (folder / name).read_bytes() == content
    assert list((cache / "models").iterdir()) == [folder]


def test_scratch_folders_of_killed_processes_are_removed(tmp_path: Path, cache: Path) -> None:
    """The scratch folders of this and another model are removed; that of a running process stays."""
    path = write_gguf(tiny_model(), tmp_path / "model.gguf")
    folder = model_folder(str(path))
    shutil.rmtree(folder)
    scratches = [folder.with_name(f"{name}{checkpoints.SCRATCH}") for name in (folder.name, "other", "busy")]
    for scratch in scratches:
        scratch.mkdir()
        (scratch / "model.safetensors").write_bytes(b"half")
    with checkpoints.cache_lock(folder.with_name("busy")):
        model_folder(str(path))
    assert {file.name for file in (cache / "models").iterdir()} == {folder.name, scratches[2].name}


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tiny_model(), tmp_path_factory.mktemp("whole") / "model.gguf").read_bytes()


def outcome(data: bytes, folder: Path) -> list[int] | None:
    """Return the text of a file, or None if it is refused in one sentence with no scratch folder in the cache."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    try:
        return ours(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert not list((checkpoints.CACHE / "models").glob(f"*{checkpoints.SCRATCH}"))
        return None


@pytest.mark.fuzz
@settings(max_examples=settings.default.max_examples)
@given(share=st.floats(0, 1, exclude_max=True), even=st.booleans())
def test_truncated_files_are_refused(
    share: float, even: bool, whole_file: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    end = int(share * (len(whole_file) if even else 12_000))  # the metadata is at the start of the file
    assert outcome(whole_file[:end], tmp_path_factory.mktemp("cut")) is None


@pytest.mark.fuzz
@given(data=st.data())
def test_damaged_metadata_is_read_or_refused(
    data: st.DataObject, whole_file: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Counts and lengths of any size, and missing keys or tensors, give a text or one sentence."""
    damaged = bytearray(whole_file)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 11_000))
        word = data.draw(
            st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\x01\0\0\0", b"\xff", b"a", b"\x80\0\0\0\0\0\0\x7f"])
        )
        damaged[at : at + len(word)] = word
    outcome(bytes(damaged), tmp_path_factory.mktemp("flipped"))


VALUES = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([0, -1, 2**31 - 1]),
    st.floats(width=32),
    st.booleans(),
    st.text(max_size=5),
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
KEYS = (".block_count", ".context_length", ".embedding_length", ".attention.head_count", ".attention.head_count_kv")
KEYS += (".attention.key_length", ".attention.layer_norm_rms_epsilon", ".rope.freq_base", ".rope.scaling.type")
KEYS += (".rope.scaling.factor", ".feed_forward_length", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.token_type")
KEYS += ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.model", "tokenizer.chat_template")
KEYS += ("general.alignment", "general.architecture", "split.count", "general.name", "tokenizer.ggml.eot_token_id")


@pytest.mark.fuzz
@given(fields=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_metadata_value_is_read_or_refused(
    fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("values")
    try:
        data = write_gguf(tiny_model(), folder / "written.gguf", fields).read_bytes()
    except (ValueError, TypeError, OverflowError):  # the writer has limits of its own
        return
    outcome(data, folder)


@pytest.mark.fuzz
@given(
    named=st.dictionaries(st.sampled_from(["eos", "eot", "eom"]), st.integers(0, len(TOKENS) - 1)),
    spelled=st.sets(st.sampled_from([0, 5, 77, TURN])),
)
def test_end_tokens_by_id_and_spelling(
    named: dict[str, int], spelled: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The text is that of transformers with all end tokens given."""
    ends = iter(["<|im_end|>", "<|eot_id|>", "<|endoftext|>", "</s>"])
    tokens = [next(ends) if i in spelled else token for i, token in enumerate(TOKENS)]
    kinds = [3 if i in spelled or i >= END else 1 for i in range(len(TOKENS))]
    fields = {f"tokenizer.ggml.{name}_token_id": i for name, i in named.items()}
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    model = tiny_model()
    path = write_gguf(model, tmp_path_factory.mktemp("ends") / "model.gguf", fields)
    every = {named.get("eos", END), *named.values(), *spelled}
    assert eos_ids(str(path)) == every
    assert ours(path) == reference(model, IDS, eos_token_id=sorted(every))
