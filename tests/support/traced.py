"""Control problems on traces of the tiny models, and a cost table for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spec_envs.controls import make_control
from spec_envs.controls.base import Control
from spec_envs.decoding.clock import CostTable

TREE = {"max_depth": 4, "width": 4}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "depth": ("SpecDepth-v0", "tree", {**TREE, "budget": 5}),
    "budget": ("SpecBudget-v0", "tree", {**TREE, "budgets": (0, 3, 30), "depth": 2}),
    "tree": ("SpecTree-v0", "tree", {**TREE, "budgets": (0, 2, 30)}),
    "one budget": ("SpecTree-v0", "tree", {**TREE, "budgets": (9,)}),
    "k": ("SpecK-v0", "copies", {"k_max": 6, "alternatives": 0}),
    "token": ("SpecK-v0", "copies", {"k_max": 6, "alternatives": 0, "decision": "token"}),
    "drafted": ("SpecK-v0", "chain", {"k_max": 6, "decision": "token"}),
}
# All drafter forwards cost the same, so their number gives their seconds.
TABLE = CostTable("made up", {1: 1.0, 8: 1.2, 50: 2.0}, {1: 0.05})


def control_of(case: str) -> Control:
    """Return the control of a case."""
    env_id, _, keywords = CASES[case]
    return make_control(env_id, keywords)


def costs_in(folder: Path, table: CostTable = TABLE) -> str:
    """Write a cost table to a folder, and return its path."""
    path = folder / f"{table.name.replace(' ', '-')}.json"
    path.write_text(json.dumps({"verify": table.verify, "draft": table.draft}))
    return str(path)
