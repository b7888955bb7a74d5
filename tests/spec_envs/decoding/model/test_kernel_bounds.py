"""The kernels under address sanitizer: whatever the shapes, they access no memory outside the tensors."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from spec_envs.decoding.model.kernels import building
from tests.support import ROOT
from tests.support.models.builds import EMULATED_TILES, WITHOUT_KERNELS, WITHOUT_TILES, X86

if WITHOUT_KERNELS:
    pytest.skip("the kernels cannot be built here (the reason is printed above)", allow_module_level=True)

SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
VECTORS = WITHOUT_TILES  # the sanitizer does not see what tiles read, unless they are emulated
BUILDS = {"vectors": VECTORS}
RARE = {"short vectors": (*VECTORS, "-mno-avx512f"), "portable": (*VECTORS, "-mno-avx2")}  # on older processors
if X86:
    BUILDS |= {"tiles": (*VECTORS, *EMULATED_TILES)} | RARE


def runtimes(compiler: building.Command) -> list[Path]:
    """Return the sanitizers' libraries, which must be loaded first; skip the test if there are none."""
    paths = [Path(building.run(compiler, f"-print-file-name={name}.so").strip()) for name in ("libasan", "libubsan")]
    if not all(path.is_absolute() for path in paths):
        pytest.skip("the compiler has no address sanitizer as a shared library")
    return paths


@pytest.mark.fuzz
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in RARE else name for name in BUILDS]
)
def test_random_models_access_only_their_tensors(name: str, tmp_path: Path) -> None:
    compiler, library = next(building.compilers()), tmp_path / "kernels.so"
    preload = " ".join(map(str, runtimes(compiler)))
    flags = (*building.FLAGS, *SANITIZERS, *BUILDS[name])
    building.run(compiler, *flags, str(building.SOURCES / "kernels.cpp"), "-o", str(library))
    examples = settings.default
    count = examples.max_examples if name == "vectors" else max(8, examples.max_examples // 4)
    first = 0 if examples.derandomize else random.randrange(2**31)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.models.kernel_bounds", str(library), str(first), str(count)],
        env={**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    computed = int(done.stdout.split()[0])
    assert 0.3 * count < computed < count
