"""The zoo: every agent by name, and those that are shipped trained."""

from __future__ import annotations

from pathlib import Path

from spec_envs.agents.base import Agent
from spec_envs.agents.baselines.copy_k import CopyKAgent
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.agents.choosers.fixed_order import FixedOrderAgent
from spec_envs.agents.choosers.hedge import HedgeAgent
from spec_envs.agents.choosers.ucb_drafter import UcbDrafterAgent
from spec_envs.agents.exits.dvi import DVIAgent
from spec_envs.agents.exits.reinforce import ReinforceAgent
from spec_envs.agents.rules.adaedl import AdaedlAgent
from spec_envs.agents.rules.adaptive_k import AdaptiveKAgent
from spec_envs.agents.rules.confidence import ConfidenceAgent
from spec_envs.agents.rules.ddd import DddAgent
from spec_envs.agents.rules.expected_gain import ExpectedGainAgent
from spec_envs.agents.rules.gammatune import GammaTuneAgent
from spec_envs.agents.rules.hf_schedule import ScheduleAgent
from spec_envs.agents.rules.specdec_plus import SpecDecPlusAgent
from spec_envs.agents.rules.svip import SvipAgent
from spec_envs.agents.rules.svip_tree import SvipTreeAgent
from spec_envs.agents.rules.ucb import UcbAgent
from spec_envs.agents.rules.ucb_budget import UcbBudgetAgent
from spec_envs.agents.sb3.agent import ALGORITHMS, agent_of
from spec_envs.agents.selector.agent import RLAdapterAgent
from spec_envs.agents.traced.decision_tree import DecisionTreeAgent
from spec_envs.agents.traced.exact_pg import ExactPGAgent
from spec_envs.agents.traced.hindsight import HindsightAgent

SHIPPED = Path(__file__).parent / "shipped"  # trained agents by environment, of `spec-envs bench adaptive`
AGENTS: dict[str, type[Agent]] = {
    "random": RandomAgent,
    "fixed": FixedAgent,
    "adaptive-k": AdaptiveKAgent,
    "hf-schedule": ScheduleAgent,
    "confidence": ConfidenceAgent,
    "svip": SvipAgent,
    "adaedl": AdaedlAgent,
    "gammatune": GammaTuneAgent,
    "copy-k": CopyKAgent,
    "ucb": UcbAgent,
    "ucb-budget": UcbBudgetAgent,
    "specdec++": SpecDecPlusAgent,
    "ddd": DddAgent,
    "svip-tree": SvipTreeAgent,
    "expected-gain": ExpectedGainAgent,
    "fixed-order": FixedOrderAgent,
    "hedge": HedgeAgent,
    "ucb-drafter": UcbDrafterAgent,
    "hindsight": HindsightAgent,
    "exact-pg": ExactPGAgent,
    "decision-tree": DecisionTreeAgent,
    "rl-adapter": RLAdapterAgent,
    "reinforce": ReinforceAgent,
    "dvi": DVIAgent,
    **{name: agent_of(name) for name in ALGORITHMS},
}
