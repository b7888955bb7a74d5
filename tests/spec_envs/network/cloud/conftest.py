"""A cloud in a separate process, edges that generate texts with it, and its engine in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer
from spec_envs.network.cloud.engine import Engine
from spec_envs.network.wire import (
    VERSION,
    Hello,
    vocabulary_hash,
)
from tests.support.cloud_process import CloudProcess
from tests.support.edges import KINDS, Edge, Edges
from tests.support.models.tiny import CPU


@pytest.fixture(scope="module")
def options(tiny_target: Path) -> list[str]:
    """Return the options of a cloud with the tiny target."""
    return ["--target", str(tiny_target), "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def cloud(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudProcess]:
    """Yield a cloud for all tests that do not end it; it closes idle sessions after two seconds."""
    with CloudProcess(tmp_path_factory.mktemp("cloud"), *options, "--idle", "2", "--max-message", "4096") as process:
        yield process


@pytest.fixture(scope="module")
def edges(tiny_target: Path, tiny_draft: Path) -> Edges:
    """Return a function that makes an edge from an address and the arguments of ``Edge``."""

    def make(url: str, kind: str = "topk", **others: Any) -> Edge:
        """Return an edge some of whose drafts are rejected: the target drafts for itself, but sends few entries."""
        return Edge(url, str(tiny_target), str(tiny_draft if kind == "ids" else tiny_target), kind, **others)

    return make


@pytest.fixture(scope="module")
def hello(tiny_target: Path) -> Hello:
    return Hello(VERSION, vocabulary_hash(load_tokenizer(str(tiny_target))), bytes(16), 1.0, 1.0, 5)


@pytest.fixture(scope="module")
def texts(cloud: CloudProcess, edges: Edges) -> dict[str, list[int]]:
    """Return texts of 40 tokens without any fault, by kind."""
    return {kind: edges(cloud.url, kind).text(40) for kind in KINDS}


@pytest.fixture
def engine(tiny_target: Path, hello: Hello) -> Engine:
    """Return an engine in this process with few sessions and a short context."""
    return Engine(load_target(str(tiny_target), CPU, "float32"), hello.vocabulary, 4, 64)
