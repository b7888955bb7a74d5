import numpy as np
import pytest

from spec_envs.decoding.tree import ROOT, Children, Tree, ancestors


def random_tree(width: int, depth: int, seed: int) -> Tree:
    """Return a tree of random tokens and scores after ``depth`` expansions."""
    rng = np.random.default_rng(seed)
    tree = Tree(width, depth)

    def children(rows: int) -> Children:
        log_probs = -np.sort(rng.exponential(size=(rows, width)), axis=1).astype(np.float32)
        tokens = rng.permuted(np.tile(np.arange(50), (rows, 1)), axis=1)[:, :width]
        return Children(tokens, log_probs, np.zeros(rows, np.float32))

    tree.start(children(1))
    for _ in range(depth):
        tree.grow(children(width))
    return tree


def certain(tokens: list[list[int]]) -> Children:
    """Return children of probability 1 with these tokens, a list per parent."""
    array = np.array(tokens)
    return Children(array, np.zeros(array.shape, np.float32), np.zeros(len(array), np.float32))


@pytest.mark.parametrize("depth", [0, 1, 3, 12])
def test_sizes_of_levels(depth: int) -> None:
    tree = random_tree(10, depth, seed=depth)
    assert tree.size == 10 + 100 * depth
    assert tree.expansions == depth
    assert len(tree.last_level) == (100 if depth else 10)


@pytest.mark.parametrize("seed", range(5))
def test_scores_accumulate_and_frontier_is_best_of_last_level(seed: int) -> None:
    tree = random_tree(4, 5, seed)
    for node in range(tree.size):
        parent = tree.parents[node]
        assert tree.levels[node] == (0 if parent == ROOT else tree.levels[parent] + 1)
        assert parent == ROOT or tree.scores[node] <= tree.scores[parent]
    last = np.flatnonzero(tree.levels == 5)
    assert sorted(tree.scores[tree.frontier]) == sorted(np.sort(tree.scores[last])[-4:])


@pytest.mark.parametrize("budget", [0, 1, 5, 20, 84, 1000])
def test_selection_is_best_and_connected(budget: int) -> None:
    tree = random_tree(4, 5, seed=3)
    chosen = tree.select(budget)
    assert len(chosen) == min(budget, tree.size)
    assert set(tree.parents[chosen]) - {ROOT} <= set(chosen)
    rest = np.setdiff1d(np.arange(tree.size), chosen)
    if len(chosen) and len(rest):
        assert tree.scores[chosen].min() >= tree.scores[rest].max()


def test_ties_select_parents_first() -> None:
    tree = Tree(2, 2)
    tree.start(certain([[1, 2]]))
    tree.grow(certain([[3, 4], [5, 6]]))
    assert tree.select(3).tolist() == [0, 1, 2]
    _, parents, levels = tree.subtree(tree.select(3))
    assert parents.tolist() == [ROOT, ROOT, 0]
    assert levels.tolist() == [0, 0, 1]


def test_rows_see_their_ancestors() -> None:
    visible = ancestors(np.array([ROOT, ROOT, 0, 2]))
    assert [set(np.flatnonzero(row)) for row in visible] == [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 3, 4}]


def test_full_tree_cannot_grow() -> None:
    tree = random_tree(2, 1, seed=0)
    with pytest.raises(ValueError, match="full at 1 expansions"):
        tree.grow(certain([[0, 0], [0, 0]]))


def test_first_level_after_a_chain_hangs_on_the_root() -> None:
    tree, one = Tree(3, 4), Children(np.array([[7]]), np.array([[-0.5]]), np.zeros(1))
    tree.start(one)
    tree.grow(one)
    tree.start(Children(np.array([[1, 2, 3]]), np.array([[-0.1, -0.2, -0.3]]), np.zeros(1)))
    assert tree.subtree(tree.select(3))[1].tolist() == [ROOT, ROOT, ROOT]


def test_levels_have_only_the_children_that_there_are() -> None:
    never = -np.inf
    tree = Tree(3, 3)
    tree.start(certain([[7, 8, 9]]))
    tree.grow(Children(np.array([[1], [2], [3]]), np.array([[-3.0], [never], [-1.0]], np.float32), np.zeros(3)))
    assert (tree.size, tree.is_chain, tree.tokens[tree.frontier].tolist()) == (5, False, [3, 1])
    parents = tree.grow(Children(np.array([[4, 5], [6, 0]]), np.array([[-1, -2], [-4, never]]), np.zeros(2)))
    assert (tree.tokens[tree.frontier].tolist(), parents.tolist()) == ([4, 5, 6], [0, 0, 1])
    assert tree.parents.tolist() == [ROOT, ROOT, ROOT, 0, 2, 4, 4, 3]
    assert tree.levels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    tree.start(Children(np.array([[5, 0, 0]]), np.array([[-1.0, never, never]]), np.zeros(1)))
    for token in (6, 7):
        tree.grow(certain([[token]]))
    assert tree.is_chain and tree.parents.tolist() == [ROOT, 0, 1]
    tree.start(certain([[7, 8, 9]]))
    assert tree.parents.tolist() == [ROOT] * 3
