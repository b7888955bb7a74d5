"""The kernels in several builds."""

from __future__ import annotations

import pytest

from spec_envs.decoding.model import kernels
from spec_envs.decoding.model.kernels import building
from tests.support.models.builds import BUILDS, COMPILER


@pytest.fixture(params=["as built", *BUILDS])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels as built for this machine, or a build for other processors."""
    if request.param in BUILDS:
        flags, expected = BUILDS[request.param]
        library = building.built(COMPILER, flags)
        assert library.accelerated() in expected
        monkeypatch.setattr(kernels, "library", lambda: library)
