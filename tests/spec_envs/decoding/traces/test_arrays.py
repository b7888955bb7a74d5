"""Archives of arrays from other sources, and damaged ones, are read or refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_envs.decoding.traces.arrays import read_npz
from spec_envs.network.expected_trace import TRACES, ExpectedTrace


def archive(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


WHOLE = archive(a=np.arange(50), b=np.array("text"), c=np.zeros((2, 3), np.float16))


def test_archive_is_read_as_written(tmp_path: Path) -> None:
    (path := tmp_path / "a.npz").write_bytes(WHOLE)
    found = read_npz(path, 10_000)
    assert found["a"].tolist() == list(range(50)) and str(found["b"]) == "text" and found["c"].shape == (2, 3)


def test_size_is_bounded(tmp_path: Path) -> None:
    (path := tmp_path / "a.npz").write_bytes(archive(a=np.zeros(10**7)))  # 10 kB on the disk
    with pytest.raises(ValueError, match="its arrays take 80000128 bytes; expected at most 1000"):
        read_npz(path, 1000)


@pytest.mark.parametrize("shape", [(10**15,), (2**40, 2**40), (-1,), (3, -5)])
def test_header_that_claims_too_much_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path := tmp_path / "a.npz", "w") as file:
        file.writestr("a.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(ValueError, match=r"a\.npy claims the shape"):
        read_npz(path, 10**9)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    (path := tmp_path / "a.npz").write_bytes(archive(a=np.array([{}], dtype=object)))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        read_npz(path, 10_000)
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="no archive of arrays"):
        read_npz(path, 10_000)


@pytest.mark.fuzz
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), st.booleans())
def test_damaged_archives_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: bool
) -> None:
    """A file that was cut or changed at any place is read or refused."""
    path = tmp_path_factory.mktemp("damaged") / "a.npz"
    path.write_bytes(WHOLE[:at] if cut else WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    try:
        found = read_npz(path, 10_000)
    except ValueError as error:
        assert str(error)
    else:
        assert not cut and sum(array.nbytes for array in found.values()) <= 10_000


SHIPPED = dict(np.load(TRACES / "smollm2-135m-topk.npz"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("acceptance", lambda a: a[:, :3]),
        ("acceptance", lambda a: np.where(a > 0.5, np.nan, a)),
        ("tokens", lambda a: a + 49152),
        ("tokens", lambda a: a[:-1]),
        ("lengths", lambda a: a[:-1]),
        ("lengths", lambda a: -a),
        ("prompts", lambda a: a - 100_000),
        ("tasks", lambda a: a[:5]),
        ("temperature", lambda a: np.array(np.nan)),
        ("ks", lambda a: a[:0]),
        ("version", lambda a: np.array(2)),
        ("vocab", lambda a: np.array([1, 2])),
    ],
)
def test_invalid_expected_traces_are_refused(name: str, change, tmp_path: Path) -> None:
    np.savez_compressed(path := tmp_path / "trace.npz", **(SHIPPED | {name: change(SHIPPED[name])}))
    with pytest.raises(ValueError, match=r"trace.npz is not an expected-acceptance trace \(.*\); record it again"):
        ExpectedTrace.load(str(path))


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_incomplete_expected_traces_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    np.savez_compressed(path, **{key: value for key, value in SHIPPED.items() if key != name})
    with pytest.raises(ValueError, match=rf"is not an expected-acceptance trace \(it has no '{name}"):
        ExpectedTrace.load(str(path))
