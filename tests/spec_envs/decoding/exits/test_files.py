"""Files of an exit: peft reads them, they fit one target, they are replaced completely or not at all."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spec_envs.decoding.exits.adapter import KINDS, ExitAdapter
from spec_envs.decoding.exits.files import load_exit, save_exit
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import load_target
from tests.support.models.adapters import logits_of, random_adapter
from tests.support.models.tiny import CPU


def test_exit_loads_for_targets_with_equal_weights_only(tiny_target: Path, tmp_path: Path) -> None:
    """The fingerprint depends on every tensor and on no dtype; the target's name in the file is not used."""
    targets = [load_target(str(tiny_target), CPU, dtype) for dtype in ("float32", "float16")]
    assert targets[0].fingerprint == targets[1].fingerprint
    save_exit(ExitAdapter.fresh(targets[0], str(tiny_target), 3, "kangaroo"), tmp_path / "exit")
    shutil.copytree(tiny_target, tmp_path / "again")
    weights = load_file(tmp_path / "again" / "model.safetensors")
    same = load_target(str(tmp_path / "again"), CPU, "float32")
    stored = json.loads((tmp_path / "exit" / "exit.json").read_text()) | {"base_model": "nobody/nothing"}
    (tmp_path / "exit" / "exit.json").write_text(json.dumps(stored))
    assert load_exit(tmp_path / "exit", same, str(tmp_path / "again")).settings.base_model == str(tmp_path / "again")
    shutil.copytree(tiny_target, tmp_path / "tuned")
    weights["model.layers.5.self_attn.q_proj.weight"] += 0.01
    save_file(weights, tmp_path / "tuned" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="whose weights are others"):
        load_exit(tmp_path / "exit", load_target(str(tmp_path / "tuned"), CPU, "float32"), "tuned")


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_files(kind: str, target: Transformer, tiny_target: Path, tmp_path: Path) -> None:
    """Loaded by peft into transformers' own model, the adapters give the same logits."""
    adapter = random_adapter(target, str(tiny_target), kind)
    save_exit(adapter, tmp_path)
    again = load_exit(tmp_path, target, str(tiny_target))
    assert again.settings == adapter.settings and np.array_equal(again.shortlist, adapter.shortlist)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adapter.parameters(), strict=True))
    ids = list(range(2, 15))
    if kind == "layers":
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32), tmp_path / "lora_S", "lora_S"
        )
        model.load_adapter(tmp_path / "lora_D", "lora_D")
        model.base_model.set_adapter(["lora_S", "lora_D"])
        ours = logits_of(target, ids, added=adapter.deployed_additions())
    else:
        cut_off = AutoModelForCausalLM.from_pretrained(tiny_target, num_hidden_layers=3, dtype=torch.float32)
        model = PeftModel.from_pretrained(cut_off, tmp_path / "exit_proj")
        if kind == "kangaroo":
            return  # peft has no format for its attention
        x = target.embed(torch.tensor([ids]))
        states, _ = target.forward(x, target.cache(20), torch.arange(len(ids))[None], layers=range(3))
        ours = adapter.logits(states[0])
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert (theirs - logits_of(target, ids)).abs().max() > 0.01


def test_invalid_exits_are_refused(target: Transformer, tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    name = str(tiny_target)
    for keywords, message in (
        ({"exit_layer": 8}, "exit_layer is 8; expected 1 to 7"),
        ({"exit_layer": 0}, "exit_layer is 0; expected 1 to 7"),
        ({"exit_layer": 2, "kind": "tail"}, "adapter is 'tail'; expected one of head, kangaroo, layers"),
        ({"exit_layer": 2, "rank": 0}, "rank is 0; expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            ExitAdapter.fresh(target, name, **keywords)
    with pytest.raises(ValueError, match="drafter is 'exit:two'; expected exit: and a number of layers"):
        load_decoder(name, "exit:two", "cpu", "float32", width=1)
    with pytest.raises(ValueError, match="drafts a chain, not a tree of width 10"):
        load_decoder(name, "exit:2", "cpu", "float32")

    save_exit(random_adapter(target, name, "kangaroo"), tmp_path / "exit")
    with pytest.raises(ValueError, match="whose weights are others than those of this target"):
        load_exit(tmp_path / "exit", load_target(str(tiny_draft), CPU, "float32"), name)
    for file, damage, message in (
        ("exit.json", "", "exit.json is damaged or missing"),
        ("exit.json", "{}", "exit.json is damaged or missing"),
        ("exit.json", '{"exit_layer": "2"}', "exit.json is damaged or missing"),
        ("attention.safetensors", "not a tensor", "cannot read the exit in"),
        ("exit_proj/adapter_model.safetensors", None, "cannot read the exit in"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "exit", copy, dirs_exist_ok=True)
        (copy / file).unlink() if damage is None else (copy / file).write_text(damage)
        with pytest.raises(ValueError, match=message):
            load_exit(copy, target, name)
    wrong = tmp_path / "exit" / "exit_proj" / "adapter_model.safetensors"
    tensors = load_file(wrong)
    save_file({name: tensor[:-1].clone() for name, tensor in tensors.items()}, wrong)
    with pytest.raises(ValueError, match=r"is \(.*\), expected \(.*\); train it again"):
        load_exit(tmp_path / "exit", target, name)


@pytest.mark.parametrize(
    ("kind", "part", "changes", "message"),
    [
        ("head", "exit_proj", {"use_dora": True}, "use_dora = True, which is not computed"),
        ("head", "exit_proj", {"use_rslora": True}, "use_rslora = True"),
        ("head", "exit_proj", {"lora_alpha": 3}, "lora_alpha = 3, which is not computed; expected 8"),
        ("head", "exit_proj", {"r": 5}, "r = 5"),
        ("head", "exit_proj", {"r": None}, "r = None"),
        ("kangaroo", "exit_proj", {"bias": "all"}, "bias = 'all'"),
        ("layers", "lora_S", {"rank_pattern": {"q_proj": 2}}, "rank_pattern = {'q_proj': 2}"),
        ("layers", "lora_D", {"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ("layers", "lora_D", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("layers", "lora_D", {"layers_to_transform": [0, 1]}, "layers_to_transform"),
        ("layers", "lora_S", {"layers_pattern": "blocks"}, "layers_pattern"),
        ("layers", "lora_S", {"target_modules": ["k_proj", "v_proj"]}, "target_modules"),
        ("layers", "lora_S", {"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ("layers", "lora_S", {"lora_bias": True}, "lora_bias = True"),
        ("layers", "lora_S", {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ("layers", "lora_S", {"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ("layers", "lora_S", {"some_future_switch": True}, "some_future_switch = True"),
        ("layers", "lora_S", {"peft_type": "VERA"}, "peft_type = 'VERA'"),
    ],
)
def test_unsupported_peft_settings_are_refused(
    kind: str, part: str, changes: dict, message: str, target: Transformer, tiny_target: Path, tmp_path: Path
) -> None:
    save_exit(random_adapter(target, str(tiny_target), kind), tmp_path)
    path = tmp_path / part / "adapter_config.json"
    config = json.loads(path.read_text())
    again = {"lora_dropout": 0.1, "peft_version": "9", "target_modules": [*reversed(config["target_modules"])]}
    path.write_text(json.dumps(config | again | {"init_lora_weights": "gaussian"}))
    load_exit(tmp_path, target, str(tiny_target))
    path.write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=f"cannot read the exit in .*adapter_config.json says {re.escape(message)}"):
        load_exit(tmp_path, target, str(tiny_target))


def test_unknown_keys_and_damaged_configs_are_refused(target: Transformer, tiny_target: Path, tmp_path: Path) -> None:
    save_exit(random_adapter(target, str(tiny_target), "head"), tmp_path)
    config = json.loads((tmp_path / "exit.json").read_text())
    stored = {key: config[key] for key in ("base_model", "fingerprint", "exit_layer", "kind", "rank", "shortlist")}
    (tmp_path / "exit.json").write_text(json.dumps(stored | {"scale": 3}))
    with pytest.raises(ValueError, match="nothing reads its scale"):
        load_exit(tmp_path, target, str(tiny_target))
    (tmp_path / "exit.json").write_text(json.dumps(stored))
    for data in (b"", b"[1]", b"{", b'{"r": "\xee"}'):
        (tmp_path / "exit_proj" / "adapter_config.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"cannot read the exit in .*adapter_config.json is damaged"):
            load_exit(tmp_path, target, str(tiny_target))
    (tmp_path / "exit_proj" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"cannot read the exit in .*adapter_config.json"):
        load_exit(tmp_path, target, str(tiny_target))


def test_full_disk_leaves_previous_files(
    target: Transformer, tiny_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = random_adapter(target, str(tiny_target), "layers")
    save_exit(adapter, tmp_path)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with torch.no_grad():
        adapter.lora_S.low_ranks["0-q_proj"].lora_A.add_(1.0)
    write = Path.write_bytes
    for written in range(5):  # number of files written before the disk is full
        remaining = iter([True] * written)
        monkeypatch.setattr(
            Path, "write_bytes", lambda p, data, remaining=remaining: (write if next(remaining, 0) else full)(p, data)
        )
        with pytest.raises(OSError, match=r"^could not write [^:]*: No space left on device; free some [^:]*$"):
            save_exit(adapter, tmp_path)
        assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    assert json.loads((tmp_path / "exit.json").read_text())["kind"] == "layers"
