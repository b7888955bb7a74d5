"""Policies that combine a fixed or learned depth of a tree with a fixed or learned budget."""

from __future__ import annotations

from spec_envs import agents
from spec_envs.controls import Policy
from spec_envs.controls.depth import DepthControl
from spec_envs.experiments.measure.static import static_policy
from spec_envs.settings import Keywords


def mixed(depth: str, budget: str, env: Keywords) -> Policy:
    """Return the policy of one depth and one budget, each a number or a run folder.

    Raises:
        ValueError: a run of another problem, or a number that the problem does not accept.
    """
    sizes = {key: env[key] for key in ("width", "max_depth") if key in env}
    if depth.isdecimal() and budget.isdecimal():
        return static_policy(DepthControl(**sizes), (int(depth), int(budget)))
    if depth.isdecimal():
        sized = learned_policy(budget, "budget")
        sized.control.fix_partner(int(depth))
        return sized
    policy = learned_policy(depth, "depth")
    if budget.isdecimal():
        policy.control.fix_partner(int(budget))
    else:
        partner = learned_policy(budget, "budget")
        policy.control.compose(partner.control, partner.agent)
    return policy


def learned_policy(run: str, problem: str) -> Policy:
    """Return the policy of a run of one problem, without its partner."""
    control, agent = agents.load(run)
    if control.name != problem:
        raise ValueError(
            f"{run} is a run of {control.env_id}; give runs of SpecDepth-v0 as DEPTH and runs of SpecBudget-v0 as BUDGET"
        )
    control.partner = None
    return Policy(control, agent)
