"""Building the kernels: when they are compiled, which cached libraries are trusted, and warnings without a compiler."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spec_envs.decoding.model import integers, kernels
from spec_envs.decoding.model.kernels import building
from spec_envs.decoding.weights import checkpoints
from tests.support.models.builds import WITHOUT_KERNELS
from tests.support.models.tiny import CPU, REAL

if WITHOUT_KERNELS:
    pytest.skip("the kernels cannot be built here (the reason is printed above)", allow_module_level=True)

FRESH: Callable = building.library.__wrapped__
SMALL = """
    extern "C" int usable() { return 1; }
    extern "C" int accelerated() { return VALUE; }
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set an empty cache and sources that compile quickly; return the folder of the libraries."""
    sources = tmp_path / "sources"
    sources.mkdir()
    write_source(sources, 1)
    monkeypatch.setattr(building, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "spec-envs" / "kernels"


def write_source(folder: Path, value: int) -> None:
    (folder / "kernels.cpp").write_text(SMALL.replace("VALUE", str(value)))


def libraries(place: Path) -> list[Path]:
    return sorted(place.glob("*.so"))


def compilations(caplog: pytest.LogCaptureFixture) -> int:
    """Return the number of compilations that were logged since the last call."""
    count = caplog.text.count("compiling the kernels of int8 and q4")
    caplog.clear()
    return count


def test_kernels_are_compiled_once_for_the_same_sources(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert FRESH() is not None and FRESH() is not None
    assert compilations(caplog) == 1 and len(libraries(place)) == 1
    assert {path.name for path in place.iterdir()} == {libraries(place)[0].name, "lock"}
    write_source(building.SOURCES, 2)
    assert FRESH().accelerated() == 2
    assert compilations(caplog) == 1 and len(libraries(place)) == 2


@pytest.mark.parametrize("kept", [0, 1000, -1])
def test_damaged_library_is_rebuilt(place: Path, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    FRESH()
    found = libraries(place)[0]
    whole = found.read_bytes()
    found.unlink()  # it is loaded, so it must not be overwritten in place
    found.write_bytes(whole[:kept] if kept >= 0 else whole[:-9] + b"damaged!!")
    assert FRESH().accelerated() == 1
    assert compilations(caplog) == 2
    assert [path.read_bytes() for path in libraries(place)] == [whole]


def test_intact_library_that_does_not_load_is_rebuilt(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    FRESH()
    found = libraries(place)[0]
    contents = b"a library of another system"
    found.unlink()
    other = place / building.name(found.name.split("-")[0], contents)
    other.write_bytes(contents)
    other.chmod(0o700)
    assert FRESH().accelerated() == 1
    assert libraries(place) == [found]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_library_or_folder_writable_by_others_is_not_loaded(
    place: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    FRESH()
    libraries(place)[0].chmod(mode)
    assert FRESH() is not None
    assert compilations(caplog) == 2 and libraries(place)[0].stat().st_mode & 0o777 == 0o700
    place.chmod(mode)
    before = libraries(place)[0].stat().st_mtime_ns
    assert FRESH() is not None  # built in a temporary folder
    assert f"{place} belongs to another user or may be written to by others" in caplog.text
    assert libraries(place)[0].stat().st_mtime_ns == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_library_or_folder_of_other_user_is_not_loaded(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    FRESH()
    os.chown(libraries(place)[0], 12345, 12345)
    assert FRESH() is not None
    assert compilations(caplog) == 2 and libraries(place)[0].stat().st_uid == 0
    os.chown(place, 12345, 12345)
    assert FRESH() is not None
    assert "belongs to another user" in caplog.text


def test_files_are_private_under_open_umask(place: Path) -> None:
    before = os.umask(0)
    try:
        assert FRESH() is not None
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o022 for path in (place, *place.iterdir())] == [0, 0, 0]


def test_builds_without_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert FRESH().accelerated() == 1
    logged = caplog.messages
    assert len(logged) == 2 and logged[0].startswith("the kernels are compiled for this process only")


@pytest.mark.parametrize("home", ["gone", "unset"])
def test_builds_without_home_directory(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere(name: str) -> Path:
        if home == "unset":
            raise RuntimeError("could not determine the home directory")
        return Path("relative") / name

    monkeypatch.setattr(building, "user_cache_path", nowhere)
    monkeypatch.chdir(tmp_path)
    assert FRESH().accelerated() == 1
    assert not (tmp_path / "relative").exists()


def test_leftovers_of_a_killed_build_are_removed(place: Path) -> None:
    (place / "building").mkdir(parents=True)
    place.chmod(0o700)
    (place / "building" / "kernels.so").write_bytes(b"half")
    assert FRESH() is not None
    assert not (place / "building").exists()


SLOW = """\
    #!/bin/sh
    case "$*" in *kernels.cpp*) echo built >> {log}; sleep {seconds};; esac
    exec c++ "$@"
"""


def slow_compiler(folder: Path, seconds: float) -> tuple[Path, Path]:
    """Return a compiler that takes this long, and the file to which it appends a line per build."""
    script, log = folder / "slow c++", folder / "builds"
    script.write_text(textwrap.dedent(SLOW).format(log=log, seconds=seconds))
    script.chmod(0o700)
    return script, log


def build_in_child() -> None:
    sys.exit(0 if FRESH() is not None else 1)


def test_one_process_builds_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, log = slow_compiler(tmp_path, 1)
    monkeypatch.setenv("CXX", f"'{script}'")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_in_child) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text().split() == ["built"]


def test_killed_build_does_not_block_others(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, log = slow_compiler(tmp_path, 2)
    monkeypatch.setenv("CXX", f"'{script}'")
    first = multiprocessing.get_context("fork").Process(target=build_in_child)
    first.start()
    while not log.is_file():
        time.sleep(0.01)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert FRESH() is not None
    assert log.read_text().split() == ["built"] * 2
    assert {path.suffix for path in place.iterdir()} == {".so", ""} and not (place / "building").exists()


def test_cxx_may_contain_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrapper = tmp_path / "a wrapper"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{wrapper}' c++ -DUNUSED='a b'")
    assert FRESH().accelerated() == 1
    assert len(caplog.messages) == 1 and compilations(caplog) == 1


@pytest.mark.parametrize("named", ["nowhere -O2", "false", "'unbalanced", "/"])
def test_failing_compiler_is_reported_and_replaced(
    named: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", named)
    assert FRESH().accelerated() == 1
    logged = caplog.messages
    assert len(logged) == 2 and named.split()[0].strip("'") in logged[-1] and logged[-1].endswith("was used")


@pytest.mark.parametrize("named", ["", "   "])
def test_empty_cxx_is_ignored(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", named)
    assert FRESH().accelerated() == 1


def test_compiler_error_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    (building.SOURCES / "kernels.cpp").write_text('#include "other.h"\n')
    (building.SOURCES / "other.h").write_text("int number = nonsense;\n")
    assert FRESH() is None
    logged = caplog.messages
    assert len(logged) == 2 and "int8 and q4 are not available here" in logged[1] and "error: 'nonsense'" in logged[1]


@pytest.mark.parametrize(
    ("compiler", "reason"), [(None, "no C++ compiler"), ("false", "false could not build"), ("nowhere", "nowhere")]
)
def test_default_dtype_without_compiler(
    compiler: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "library", FRESH)
    monkeypatch.setattr(building, "COMPILERS", ())
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    assert checkpoints.resolve_dtype("auto", CPU, [REAL]) in ("bfloat16", "float32")
    with pytest.raises(ValueError, match="dtypes int8 and q4 need the compiled kernels; install a C\\+\\+ compiler"):
        integers.Linear(torch.randn(4, 64))
    assert caplog.messages[0].startswith("int8 and q4 are not available here") and reason in caplog.messages[0]


def test_relative_cache_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.chdir(tmp_path)
    assert FRESH().accelerated() == 1
    assert not (tmp_path / "relative").exists()
