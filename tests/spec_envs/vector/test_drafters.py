"""Many environments in NumPy choose between drafters as single ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from tests.support.recordings import costs_of

COUNT, STEPS = 6, 120


@pytest.mark.parametrize("more", [{}, {"max_new_tokens": 9}, {"cost_features": True}, {"episode": "cycle"}])
def test_environments_in_numpy_equal_single_ones(portfolio: PortfolioTrace, tmp_path: Path, more: dict) -> None:
    sizes = {"sizes": (1, 2, 5), "depths": (0, 1, 2), "width": 3, "drafter": ",".join(portfolio.traces)}
    keywords = {"trace": str(portfolio.folder), "split": "all", "clock": costs_of(portfolio, tmp_path), **sizes, **more}
    many: Any = gym.make_vec("SpecDrafter-v0", COUNT, "vector_entry_point", **keywords)
    single: list[Any] = [gym.make("SpecDrafter-v0", **keywords).unwrapped for _ in range(COUNT)]
    seen, _ = many.reset(seed=5)
    np.testing.assert_array_equal(seen, [env.reset(seed=5 + i)[0] for i, env in enumerate(single)])
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        actions = rng.integers(many.single_action_space.n, size=COUNT) * (rng.random(COUNT) < 0.6)
        seen, rewards, done, _, infos = many.step(actions)
        for i, env in enumerate(single):
            own, reward, ended, _, info = env.step(int(actions[i]))
            assert ended == done[i] and rewards[i] == pytest.approx(reward, abs=1e-12)
            theirs = infos["final_info"] if ended else infos
            for name in ("emitted", "accepted", "drafted", "verified", "saved"):
                assert theirs[name][i] == pytest.approx(info[name]), name
            assert theirs["drafter"][i] == info["drafter"]
            if ended:
                np.testing.assert_array_equal(infos["final_obs"][i], own)
                own, _ = env.reset()
            np.testing.assert_allclose(seen[i], own, atol=1e-7)


def test_price_of_a_plan_is_what_its_cycle_costs(portfolio: PortfolioTrace, tmp_path: Path) -> None:
    """For drafters that do not copy first, whatever they have not read."""
    clock = costs_of(portfolio, tmp_path)
    sizes = {"sizes": (1, 2, 5), "depths": (0, 1, 2), "width": 3, "drafter": ",".join(portfolio.traces)}
    env: Any = gym.make("SpecDrafter-v0", trace=str(portfolio.folder), split="all", clock=clock, **sizes).unwrapped
    plans, table, rng = env.control.plans(), CostTable.load(clock), np.random.default_rng(0)
    fixed, late, lags = plans.verification(table), plans.catching_up(table), set()
    for seed in range(12):
        seen, _ = env.reset(seed=seed)
        done = False
        while not done:
            unread = plans.unread(seen[None])[0]
            plan = int(rng.integers(4, 10)) if rng.random() < 0.3 else 0  # the head, the draft model, or nobody
            seen, _, done, _, info = env.step(int(plans.ends[plan]))
            seconds = info["seconds"]["draft"] + info["seconds"]["verify"]
            assert seconds == pytest.approx(fixed[plan] + late[plan, unread[plan]])
            lags.add(unread[plan])
    assert len(lags) > 5
