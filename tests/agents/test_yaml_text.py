"""The subset of YAML that is read, and refusal of everything else."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from spec_envs.agents.yaml_text import DEEPEST, parse_yaml

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "\n".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("{a: on, b: off, c: yes, d: n}", {"a": "on", "b": "off", "c": "yes", "d": "n"}),
        ("[true, False, null, ~]", [True, False, None, None]),
        ("[1, -2, 0x7, 1_000, 0]", [1, -2, 7, 1000, 0]),
        ("[1.5, -0.5, .5, 5., 1.0e-3, 1e-3]", [1.5, -0.5, 0.5, 5.0, 0.001, "1e-3"]),
        ("[017, 1:30, 2026-01-01]", ["017", "1:30", "2026-01-01"]),
        ("{a: &x {b: 1}, c: {<<: *x, d: 2}}", {"a": {"b": 1}, "c": {"b": 1, "d": 2}}),
    ],
)
def test_values_are_parsed(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice, first in line 1"),
        ("x:\n  b: {c: 1, c: 2}", "line 2: the key 'c' stands twice"),
        ("<<: {a: 1}\n<<: {b: 1}", "line 2: the key '<<' stands twice"),
        (BOMB, "it holds too much, aliases written out"),
        ("a: &x [*x]", "line 1: it holds too much"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "it is nested too deeply"),
        ("[" * 100_000, "it is nested too deeply"),
        ("a:\n\t- 1", r"line 2: found character '\\t'"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("!!int x", "invalid literal"),
        ("a: 1\n---\nb: 2", "line 2: but found another document"),
        ("a\x00", "unacceptable character"),
        ("{[1]: 2}", "unhashable key"),
    ],
)
def test_unsupported_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
trees = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=6), inner), max_leaves=12)


@pytest.mark.fuzz
@given(trees)
def test_dumped_values_are_read_back(value: object) -> None:
    """Text, numbers, lists and dictionaries that PyYAML writes are read back unchanged."""
    assert parse_yaml(yaml.safe_dump(value)) == value


@pytest.mark.fuzz
@settings(max_examples=4 * settings.default.max_examples)
@given(st.text(alphabet="ab01:-. ,[]{}&*<!#|>'\"\n\t?%@", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        value = parse_yaml(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert not isinstance(value, float) or not math.isnan(value) or ".nan" in text.lower()
