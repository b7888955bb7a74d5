"""One small run of each kind of agent."""

from __future__ import annotations

from typing import Any

import pytest

from spec_envs.decoding.traces.trace import Trace
from tests.support.runs import Run, runs


@pytest.fixture(scope="module")
def small_runs(tiny: dict[str, Any], traces: dict[str, Trace]) -> dict[str, Run]:
    return runs(tiny, traces)
