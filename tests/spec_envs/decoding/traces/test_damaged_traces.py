"""Damaged, incomplete and foreign trace folders are refusal_of in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spec_envs.decoding.traces.files import digest
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.traces.record import LARGEST_TEXT, read_text


@pytest.fixture(params=["tree", "copies"])
def copied(request: pytest.FixtureRequest, traces: dict[str, Trace], tmp_path: Path) -> Path:
    return Path(shutil.copytree(traces[request.param].folder, tmp_path / "trace"))


def refusal_of(folder: Path) -> str:
    """Assert that a trace is refused in one sentence, and return the sentence."""
    with pytest.raises(
        ValueError, match=r"the trace in .*trace is damaged \(.*\); delete it and record it again"
    ) as error:
        Trace.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply a change to the manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(width=0),
        lambda m: m.update(width=m["width"] + 1),
        lambda m: m.update(max_depth=-1),
        lambda m: m.update(max_depth=m["max_depth"] + 1),
        lambda m: m.update(vocab=3),
        lambda m: m.update(block_rows=-2),
        lambda m: m.update(max_new_tokens=1),
        lambda m: m.update(eos=[-1]),
        lambda m: m.update(texts=[]),
        lambda m: m["texts"][0].update(tokens=-5),
        lambda m: m["texts"][0].update(prompt=[]),
        lambda m: m["texts"][0].update(prompt=[10**9]),
        lambda m: m["texts"][0].update(split="exam"),
        lambda m: m.update(costs={}),
        lambda m: m["costs"].update(verify={"one": 1.0}),
        lambda m: m["costs"].update(verify={"1": -1.0}),
        lambda m: m["costs"].update(verify={"1": float("nan")}),
        lambda m: m["costs"].update(draft={"1": float("inf")}),
        lambda m: m.update(version=99),
        lambda m: m.update(kind="forest"),
        lambda m: m.update(arrays={}),
        lambda m: m.pop("eos"),
        lambda m: m.update(extra=1),
    ],
)
def test_invalid_manifest_values_are_refused(change: Callable[[dict[str, Any]], Any], copied: Path) -> None:
    rewrite(copied, change)
    refusal_of(copied)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"made_with": ' * 50_000, "\x00", "nul", "1e999"])
def test_unreadable_manifests_are_refused(text: str, copied: Path) -> None:
    (copied / "manifest.json").write_text(text)
    refusal_of(copied)


@pytest.mark.parametrize("name", ["tokens", "drafted", "log_probs"])
def test_damaged_or_missing_columns_are_refused(name: str, copied: Path) -> None:
    path = copied / f"{name}.npy"
    whole = path.read_bytes()
    for left in (whole[:-1], whole[:20], b"", whole + b"\0"):
        path.write_bytes(left)
        assert f"{name}.npy is not the file that was recorded" in refusal_of(copied)
    path.unlink()
    refusal_of(copied)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda a: a + 10**6),
        ("drafted", lambda a: a - 10**6),
        ("drafted", lambda a: a[:, :2]),
        ("log_probs", lambda a: a * np.float32(np.nan)),
        ("entropies", lambda a: a[:, :1]),
        ("gaps", lambda a: a.astype(float)),
        ("gaps", lambda a: a[:-1]),
    ],
)
def test_invalid_columns_with_fitting_hash_are_refused(
    name: str, change: Callable[[np.ndarray], np.ndarray], copied: Path
) -> None:
    path = copied / f"{name}.npy"
    np.save(path, change(np.load(path)))
    rewrite(copied, lambda manifest: manifest["arrays"].update({name: digest(path)}))
    assert f"{name}.npy" in refusal_of(copied)


def test_damaged_texts_and_texts_of_other_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "00000.npz"
    rows: dict[str, Any] = {name: np.zeros(3) for name in ("tokens", "gaps", "drafted", "log_probs")}
    np.savez(path, **rows)
    for kind in ("tree", "chain"):
        with pytest.raises(ValueError, match=rf"cannot read .* \(it does not hold the columns of a {kind}"):
            read_text(path, kind)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cannot read .*00000.npz \(.*\); delete it and run the command again"):
        read_text(path, "tree")
    assert LARGEST_TEXT < 2**31


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


@pytest.mark.fuzz
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_manifest_value_is_replayed_or_refused(
    traces: dict[str, Trace], tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """A trace with any value of its manifest changed is refusal_of, or read and replayed."""
    source = traces["tree"].folder
    folder = tmp_path_factory.mktemp("fuzz") / "trace"
    folder.mkdir()
    for path in source.glob("*.npy"):
        (folder / path.name).hardlink_to(path)
    manifest = json.loads((source / "manifest.json").read_text())
    manifest[data.draw(st.sampled_from(sorted(manifest)))] = data.draw(values)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        trace = Trace.load(folder)
    except ValueError as error:
        assert "is damaged (" in str(error)
    else:
        assert trace.rows and trace.ties().shape == (trace.rows,) and trace.costs().seconds("verify", 1) >= 0
