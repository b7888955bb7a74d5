"""Arms of optional engines, where their packages are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer
from spec_envs.experiments.comparisons.engines import ENGINES, engine_arms
from spec_envs.experiments.measure.arms import Encoded
from spec_envs.experiments.measure.statistics import behind_argmax
from spec_envs.prompts.sets import encode
from tests.support.models.tiny import REAL

INSTALLED = {name for name, (package, _) in ENGINES.items() if importlib.util.find_spec(package)}


def test_engines_that_are_not_installed_have_no_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    assert engine_arms(REAL, 1) == {}


@pytest.mark.model
@pytest.mark.skipif(not INSTALLED, reason="needs the packages of the extra engines")
def test_engines_decode_the_file() -> None:
    prompt = Encoded("t", encode(load_tokenizer(REAL), "What is the capital of France?"))
    target = load_target(REAL, torch.device("cpu"), "float32")
    arms = engine_arms(REAL, 1)
    assert set(arms) == INSTALLED
    for arm in arms.values():
        sample = arm(prompt, 8, 0)
        assert len(sample.ids) == 8 and sample.tokens == 7 and sample.seconds > 0 and sample.prefill_seconds > 0
        assert float((behind_argmax(target, sample) == 0).float().mean()) >= 0.5


@pytest.mark.skipif(not INSTALLED, reason="needs the packages of the extra engines")
def test_other_formats_are_left_out(tiny_target: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert engine_arms(str(tiny_target), 1) == {}
    assert "is not a GGUF file" in caplog.text
