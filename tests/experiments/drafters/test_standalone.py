"""Other software refuses the shipped draft model, which has no embedding, and reads the complete copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.weights.checkpoints import load_target
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.experiments.drafters import standalone
from spec_envs.experiments.drafters.distillation import Student
from spec_envs.files import DATA
from tests.support.commands import run_command
from tests.support.models.tiny import CPU, REAL
from tests.support.texts import plain_text

IDS = [5, 6, 7, 8]


@pytest.fixture
def draft(tiny_target: Path, tmp_path: Path) -> Path:
    """Return a draft model of seven of the target's eight layers, over 14 of its 16 tokens."""
    target = load_target(str(tiny_target), CPU, "float32")
    config, weights = load_config(tiny_target), load_weights(tiny_target)
    Student.from_target(config, weights, target, 7, torch.arange(14)).save(tmp_path / "draft", torch.float32)
    return tmp_path / "draft"


def whole(draft: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that the command writes."""
    out = draft.with_name("whole")
    run_command(monkeypatch, standalone, draft, "--out", out, "--target", target)
    return out


def counted(model: Any) -> list[int]:
    """Return a list to which every later forward of a model appends its number of rows."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    return rows


@pytest.mark.parametrize("folder", ["shipped", "made"])
def test_transformers_refuses_model_without_embedding(folder: str, draft: Path) -> None:
    path = DATA / "drafters" / f"{REAL}-draft" if folder == "shipped" else draft
    with pytest.raises(ValueError, match="model type `spec-envs-draft-llama` but Transformers does not recognize"):
        AutoModelForCausalLM.from_pretrained(path)


def test_draft_model_works_in_own_decoder(draft: Path, tiny_target: Path) -> None:
    decoder = load_decoder(str(tiny_target), str(draft), "cpu", "float32", width=1, max_depth=6)
    decoder.start(IDS, 20, np.random.default_rng(0))
    while not decoder.finished:
        decoder.cycle(4)
    plain = load_decoder(str(tiny_target), None, "cpu", "float32")
    assert decoder.tokens == plain_text(plain, IDS, 20) and any(cycle.accepted for cycle in decoder.cycles)


def test_complete_copy_assists_in_transformers(
    draft: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = whole(draft, tiny_target, monkeypatch)
    target, assistant = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (tiny_target, out)
    )
    assert torch.equal(target.model.embed_tokens.weight, assistant.model.embed_tokens.weight)
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text = target.generate(torch.tensor([IDS]), **settings)
    rows = counted(target)
    assert torch.equal(target.generate(torch.tensor([IDS]), assistant_model=assistant, **settings), text)
    assert len(rows) < 18  # with a random embedding there would be 24
    with pytest.raises(SystemExit, match="exists already; choose another folder"):
        whole(draft, tiny_target, monkeypatch)
    shutil.rmtree(out)
    with pytest.raises(SystemExit, match="is a complete model already, or not a draft model"):
        whole(tiny_target, tiny_target, monkeypatch)
    other = Path(shutil.copytree(tiny_target, draft.with_name("other")))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    with pytest.raises(SystemExit, match=r"was made for a target of hidden size and vocabulary \(32, 16\)"):
        whole(draft, other, monkeypatch)
    assert not list(draft.parent.glob("*.making"))
