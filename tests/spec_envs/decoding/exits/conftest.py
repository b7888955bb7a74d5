"""The tiny target, loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import load_target
from tests.support.models.tiny import CPU


@pytest.fixture
def target(tiny_target: Path) -> Transformer:
    return load_target(str(tiny_target), CPU, "float32")
