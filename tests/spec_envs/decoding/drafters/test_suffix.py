"""Suffix decoding drafts by the frequencies of earlier continuations, alone, in a stream, or before a model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spec_envs.decoding import accept
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.copying import CopyingTrees
from spec_envs.decoding.drafters.eagle.parallel import ParallelDrafter
from spec_envs.decoding.drafters.lookup import LONGEST, Copy, LookupDrafter, copy_probability
from spec_envs.decoding.drafters.suffix import Node, SuffixDrafter, Suffixes
from spec_envs.decoding.loading import load_decoder
from spec_envs.decoding.tree import Tree
from tests.support.enumeration import Branch, Oracle, total_variation
from tests.support.models.heads import Recipe, save_head
from tests.support.texts import plain

TABLE = CostTable("made up", {1: 1.0, 9: 2.0}, {1: 0.1, 8: 0.2})
TREES = ["suffix", "suffix@stream", "lookup+HEAD", "suffix+HEAD", "suffix@stream+HEAD"]


def opened(tiny: dict[str, Any], name: str, width: int, **settings: Any) -> Decoder:
    """Return a decoder of the tiny target; HEAD in the name stands for its head."""
    name = name.replace("HEAD", str(tiny["drafter"]))
    decoder = load_decoder(tiny["target"], name, "cpu", "float32", width=width, max_depth=5, **settings)
    decoder.eos = frozenset()
    return decoder


def runs(node: Node, before: tuple[int, ...] = ()) -> dict[tuple[int, ...], int]:
    """Return how often each run below a node was counted."""
    found = {}
    for token, child in node.next.items():
        found |= {(*before, token): child.count} | runs(child, (*before, token))
    return found


def counted(texts: list[list[int]]) -> Counter[tuple[int, ...]]:
    """Return how often each run of up to ``LONGEST`` + 1 tokens occurs in the texts."""
    return Counter(
        tuple(text[i:j])
        for text in texts
        for i in range(len(text))
        for j in range(i + 1, min(len(text), i + LONGEST + 1) + 1)
    )


@pytest.mark.parametrize("remembered", [0, 30])
def test_runs_of_the_text_and_of_kept_answers_are_counted(remembered: int, rng: np.random.Generator) -> None:
    seen, answers = Suffixes(remembered), []
    for _ in range(6):
        prompt, answer = rng.integers(0, 3, 9).tolist(), rng.integers(0, 3, int(rng.integers(4, 40))).tolist()
        seen.start([*prompt, answer[0]])
        for i in range(1, len(answer), 4):
            seen.append(answer[i : i + 4])
        assert runs(seen.top) == counted([*answers, [*prompt, *answer]])
        answers.append(answer[-remembered:] if remembered else [])
        while sum(map(len, answers)) > remembered:
            answers.pop(0)


def test_frequent_continuations_of_the_longest_match_come_first() -> None:
    seen = Suffixes()
    seen.start([1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3, 8, 2, 5, 7, 1, 2])
    two, one = copy_probability(2), copy_probability(1)
    assert seen.matched() == 2
    expected = [Copy(3, 2, two * 2 / 3), Copy(4, 2, two / 3), Copy(5, 1, (1 - two) * one)]
    for found, copy in zip(seen.continuations(seen.ends, 9), expected, strict=True):
        assert found[:2] == copy[:2] and found.probability == pytest.approx(copy.probability)
    assert seen.continuations(seen.ends, 1)[0].token == 3
    assert seen.find([3]) == Copy(8, 3, pytest.approx(copy_probability(3) / 2))  # the later of two that are as frequent
    assert seen.find([3, 9]) == Copy(1, 4, pytest.approx(copy_probability(4)))
    assert seen.find([4]) == Copy(9, 3, pytest.approx(copy_probability(3)))
    assert seen.find([6]) is None
    assert Suffixes(least=0.5).anew().least == 0.5


def test_tree_has_the_most_probable_paths() -> None:
    drafter = SuffixDrafter(20, 100, 3)
    drafter.seen.start([1, 2, 3, 9, 1, 2, 4, 9, 1, 2, 3, 8, 2, 5, 7, 1, 2])
    tree = Tree(3, 3)
    assert drafter.root(tree) == drafter.expand(tree) == 0
    assert tree.tokens.tolist()[:3] == [3, 4, 5] and not tree.is_chain
    for node in range(3, tree.size):
        path = [int(tree.tokens[tree.parents[node]])]
        chance = np.exp(tree.scores[node] - tree.scores[tree.parents[node]])
        assert (tree.tokens[node], pytest.approx(chance)) in [
            (copy.token, copy.probability) for copy in seen_after(drafter.seen, path)
        ]
    drafter.seen.start([5, 6, 7])
    drafter.root(tree)
    drafter.expand(tree)
    assert tree.size == 0


def seen_after(seen: Suffixes, chain: list[int]) -> list[Copy]:
    ends = seen.ends
    for token in chain:
        ends = seen.after(ends, token)
    return seen.continuations(ends, 3)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("name", TREES)
def test_greedy_texts_are_plain_texts_under_random_trees(tiny: dict[str, Any], name: str, width: int) -> None:
    """Copies cost nothing; the head's next forward reads the tokens that it missed."""
    rng, chains, trees = np.random.default_rng(0), 0, 0
    decoder = opened(tiny, name, width, clock=PricedClock(TABLE))
    for _ in range(3):
        prompt, unread, accepted = rng.integers(2, 16, int(rng.integers(1, 30))).tolist(), 1, 0
        decoder.start(prompt, 60, rng)
        while not decoder.finished:
            depth, budget = int(rng.integers(0, 6)), int(rng.integers(0, 9))
            decoder.begin()
            for _ in range(depth):
                decoder.expand()
            drafter = decoder.drafter
            asked = isinstance(drafter, CopyingTrees) and not drafter.copied
            copied = not asked and "HEAD" in name
            assert not copied or (decoder.tree.size == decoder.tree.expansions + 1 and not decoder.expand())
            spent = TABLE.seconds("draft", unread) + depth * TABLE.seconds("draft", width) if asked else 0.0
            chains += not asked and decoder.tree.size > 1 and decoder.tree.is_chain
            trees += asked
            cycle = decoder.verify(budget)
            assert cycle.seconds["draft"] == pytest.approx(spent)
            unread, accepted = cycle.emitted + (0 if asked else unread), accepted + cycle.accepted
        assert decoder.tokens == plain(tiny, prompt, 60, frozenset())
        assert accepted > 0
    assert (chains > 5 or name.startswith("suffix")) and (trees > 5) == ("HEAD" in name)


@pytest.mark.parametrize("width", [1, 4])
def test_greedy_text_is_plain_text_with_copies_before_a_parallel_head(
    tiny: dict[str, Any], tmp_path: Path, width: int
) -> None:
    """The block is drafted by one forward over the unread tokens and the masks after them."""
    save_head(tmp_path, Recipe(block=3))
    rng = np.random.default_rng(0)
    decoder = opened(tiny | {"drafter": tmp_path}, "lookup+HEAD", width, clock=PricedClock(TABLE))
    drafter, prompt, unread, seen = decoder.drafter, rng.integers(2, 16, 20).tolist(), 1, set()
    assert isinstance(drafter, CopyingTrees) and isinstance(drafter.head, ParallelDrafter)
    decoder.start(prompt, 60, rng)
    while not decoder.finished:
        k = 1 + int(rng.integers(0, 4))
        cycle = decoder.cycle(k)
        assert cycle.verified <= k or width > 1
        rows = 0 if drafter.copied else unread + drafter.head.block - 1
        assert cycle.seconds["draft"] == pytest.approx(TABLE.seconds("draft", rows) if rows else 0.0)
        unread = cycle.emitted + (unread if drafter.copied else 0)
        seen.add((drafter.copied, cycle.accepted > 0))
    assert decoder.tokens == plain(tiny, prompt, 60, frozenset())
    assert {(True, True), (False, False)} <= seen


def test_greedy_text_is_plain_text_with_copies_before_a_draft_model(tiny: dict[str, Any], tiny_draft: Path) -> None:
    rng = np.random.default_rng(1)
    for name in (f"suffix+{tiny_draft}", f"suffix@stream+{tiny_draft}"):
        decoder, copied = opened(tiny, name, 1), 0
        for _ in range(3):
            prompt = rng.integers(2, 16, 20).tolist()
            decoder.start(prompt, 60, rng)
            while not decoder.finished:
                copied += sum(cycle.accepted for cycle in [decoder.cycle(int(rng.integers(0, 6)))])
            assert decoder.tokens == plain(tiny, prompt, 60, frozenset())
        assert copied > 0


@pytest.mark.parametrize("name", ["suffix", "suffix+HEAD"])
def test_only_a_stream_drafts_from_earlier_answers(tiny: dict[str, Any], name: str) -> None:
    def accepted(name: str) -> list[int]:
        decoder, found = opened(tiny, name, 4), []
        for _ in range(2):
            decoder.start([5, 9, 3], 60, np.random.default_rng(0))
            while not decoder.finished:
                decoder.cycle(3)
            found.append(sum(cycle.accepted for cycle in decoder.cycles) / len(decoder.cycles))
        return found

    first, again = accepted(name)
    assert first == again
    first, again = accepted(name.replace("suffix", "suffix@stream"))
    assert again > first
    for arm in (name.replace("suffix", "suffix@stream"), "lookup,suffix@stream"):
        with pytest.raises(ValueError, match="answers of all arms"):
            opened(tiny, arm, 4).separate()


@pytest.mark.parametrize("name", ["suffix", "suffix+HEAD", "lookup+HEAD"])
def test_sampled_tokens_have_the_targets_distribution(
    tiny: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every outcome of a cycle that drafts copies is enumerated with its probability."""
    decoder, oracle = opened(tiny, name, 3, temperature=0.9, top_p=1.0), Oracle()
    prompt = [3, *range(2, 16), 4, 6, 3]

    def drafted(seed: int) -> bool:
        """Begin a text whose first token is drawn with a seed, and return whether two tokens are copied after it."""
        decoder.start(prompt, 9, np.random.default_rng(seed))
        decoder.begin()
        decoder.expand()
        copied = not isinstance(decoder.drafter, CopyingTrees) or decoder.drafter.copied
        return copied and decoder.tree.size > 1

    seed = next(seed for seed in range(200) if drafted(seed))
    text, first = [*prompt, *decoder.tokens], decoder.tokens[0]
    drawn = accept.inverse_cdf

    def forked(p: np.ndarray, u: Any) -> int:
        return oracle.fork((p / p.sum()).tolist()) if isinstance(u, Branch) else drawn(p, u)

    monkeypatch.setattr(accept, "inverse_cdf", forked)

    class Uniform:
        def random(self) -> Branch:
            return Branch(oracle)

    def outcome() -> tuple[int, ...]:
        decoder.start(prompt, 9, np.random.default_rng(seed))
        assert decoder.tokens == [first]
        decoder.verifier.rng = Uniform()  # type: ignore[attr-defined]
        decoder.begin()
        decoder.expand()
        assert decoder.tree.size > 1 and not decoder.tree.proposals
        return tuple(decoder.verify().tokens[:2])

    emitted: dict[tuple[int, ...], float] = {}
    for tokens, chance in oracle.walks(outcome):
        emitted[tokens] = emitted.get(tokens, 0.0) + chance

    def distribution(tokens: list[int]) -> np.ndarray:
        verifier = decoder.local
        verifier.text.begin(len(tokens))
        verifier.text.append(tokens, False)
        return verifier._probabilities(verifier.target.head(verifier.text.hidden()[-1:])[0])

    p, whole, exact = distribution(text), {}, {}
    for token in range(len(p)):
        after = distribution([*text, token])
        for second in range(len(p)):
            exact[token, second] = float(p[token] * after[second])
            whole[token, second] = emitted.get((token, second), 0.0) + emitted.get((token,), 0.0) * float(after[second])
    assert total_variation(whole, exact) < 1e-5
    assert any(len(tokens) > 1 for tokens in emitted)


def test_fewer_continuations_are_the_most_frequent_of_the_longest_match() -> None:
    rng, cut = np.random.default_rng(5), 0
    seen = Suffixes()
    seen.start(rng.choice(30, 600, p=np.arange(1, 31) / 465).tolist())
    for token in range(30):
        ends = seen.after(seen.ends, token)
        every = seen.continuations(ends, 100)
        longest = [copy for copy in every if copy.matched == max(copy.matched for copy in every)]
        for most in range(1, len(longest) + 1):
            assert seen.continuations(ends, most) == longest[:most]
            cut += most < len(longest)
    assert cut > 30


@pytest.mark.parametrize("drafter", [LookupDrafter(8, 100), SuffixDrafter(8, 100, 1)])
def test_chain_ahead_is_the_chain_that_is_drafted(drafter: LookupDrafter | SuffixDrafter) -> None:
    rng, tree, lengths = np.random.default_rng(0), Tree(1, 5), set()
    for _ in range(40):
        drafter.start(rng.integers(0, 8, int(rng.integers(1, 40))).tolist(), 100, torch.empty(0), rng)
        ahead = drafter.ahead(6)
        drafter.root(tree)
        for _ in range(5):
            drafter.expand(tree)
        assert ahead == tree.tokens.tolist() == drafter.ahead(6)
        assert drafter.ahead(2) == ahead[:2]
        lengths.add(len(ahead))
    assert {0, 6} <= lengths
