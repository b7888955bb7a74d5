"""Names of drafters are taken apart, and those that name nothing are refused."""

from __future__ import annotations

import pytest

from spec_envs.decoding.drafters.names import DrafterName, default_drafter, static_over_plain
from spec_envs.decoding.drafters.portfolio import members
from spec_envs.decoding.llama_cpp.engine import drafter_for

AFTER_PLUS = "expected the name of a head, a draft model or an exit after the plus sign"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a", ("", "a")),
        ("a@b", ("", "a@b")),
        ("a@all", ("", "a", "all")),
        ("a@b@all", ("", "a@b", "all")),
        ("exit:2", ("", "exit:2")),
        ("lookup", ("lookup", "")),
        ("lookup+a/b@300", ("lookup", "a/b", 300)),
        ("suffix", ("suffix", "")),
        ("suffix+a@12", ("suffix", "a", 12)),
        ("suffix@stream", ("suffix", "", "auto", True)),
        ("suffix@stream+a@all", ("suffix", "a", "all", True)),
    ],
)
def test_names_are_taken_apart(name: str, parts: tuple) -> None:
    found = DrafterName.parse(name)
    assert found == DrafterName(*parts) and str(found) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "drafter is ''; expected the name of a drafter, or None to decode plainly"),
        ("a@0", "drafter is 'a@0'; expected a shortlist of 1 or more tokens after the @"),
        ("lookup@9", "drafter is 'lookup@9'; 'lookup' has no shortlist, leave out the @"),
        ("suffix@9", "'suffix' has no shortlist"),
        ("lookup+", AFTER_PLUS),
        ("suffix@stream+", AFTER_PLUS),
        ("lookup+lookup", AFTER_PLUS),
        ("lookup+suffix@stream", AFTER_PLUS),
        ("lookup+lookup+exit:2", AFTER_PLUS),
    ],
)
def test_names_of_nothing_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrafterName.parse(name)


def test_drafters_without_weights_draft_chains_or_trees() -> None:
    lookup, suffix = members("lookup, suffix")
    assert lookup.chain and not suffix.chain
    assert lookup.single and suffix.single


def test_default_drafters_of_chains_and_trees() -> None:
    chain, tree = (default_drafter("smollm2-135m", chain) for chain in (True, False))
    assert (chain, tree) == ("lookup+smollm2-135m-draft", "lookup+smollm2-135m-eagle3")
    assert all(static_over_plain("smollm2-135m", drafter) > 1 for drafter in (chain, tree))
    assert drafter_for("smollm2-135m") == "smollm2-135m-draft"
