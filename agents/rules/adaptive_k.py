"""Dynamic speculation length for llama.cpp: the rolling acceptance rate moves K every 64 tokens."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from spec_envs.agents.rules.base import ChainRule
from spec_envs.agents.settings import AgentSettings, Count, Natural, Share
from spec_envs.controls.base import Control
from spec_envs.controls.observation.text_kind import KINDS, context_kind

UNKNOWN_RATE = 0.5  # while there is no history
JSON_K = 6


@dataclass
class SpecConfig:
    """Settings of the controller, with the published defaults.

    Attributes:
        k_min, k_max, k_current: bounds of the draft length, and the first one.
        target_acceptance: acceptance rate above which K grows.
        adjustment_interval: tokens between adjustments.
        acceptance_window: drafted tokens that the rolling acceptance rate looks back over.

    Raises:
        ValueError: bounds that no K fits, or numbers that are not positive.
    """

    k_min: int = 4
    k_max: int = 24
    k_current: int = 8
    target_acceptance: float = 0.55
    adjustment_interval: int = 64
    acceptance_window: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.k_min <= self.k_current <= self.k_max:
            raise ValueError(
                f"k_min, k_current and k_max are {self.k_min}, {self.k_current} and {self.k_max}; expected ascending "
                "numbers from 0"
            )
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance is {self.target_acceptance}; expected a number between 0 and 1")
        if self.adjustment_interval < 1 or self.acceptance_window < 1:
            raise ValueError(
                f"adjustment_interval and acceptance_window are {self.adjustment_interval} and "
                f"{self.acceptance_window}; expected 1 or more tokens"
            )


class AdaptiveSpecController:
    """Moves K by the rolling acceptance rate r: r > target + 0.10 adds 4, r > target adds 2, r < target − 0.20 takes 4,
    r < target − 0.10 takes 2, within [k_min, k_max]. With the default target of 0.55 these are 0.65, 0.55, 0.35, 0.45.

    Usable by itself: report every cycle with ``record_acceptance``, and where ``should_adjust()`` take
    ``compute_new_k()`` as the next draft length.

    Args:
        config: the settings; its ``k_current`` is the current K.
        audit_log: JSONL file to which every change of K is appended.
        session: name of this session in the log.
    """

    def __init__(self, config: SpecConfig | None = None, audit_log: str | Path | None = None, session: str = "default"):
        self.config = config or SpecConfig()
        self.audit_log, self.session = Path(audit_log) if audit_log else None, session
        self.history: deque[tuple[int, int]] = deque()
        self.tokens = 0  # emitted since the last adjustment

    def record_acceptance(self, accepted: int, drafted: int, tokens: int | None = None) -> None:
        """Note a cycle: drafted tokens, and how many of them the target accepted.

        Args:
            tokens: emitted; by default those accepted and the one that the target adds itself.

        Raises:
            ValueError: fewer than 0 or more than all drafted tokens accepted.
        """
        if not 0 <= accepted <= drafted:
            raise ValueError(f"accepted is {accepted} of {drafted} drafted; expected 0 to {drafted}")
        if drafted:
            self.history.append((accepted, drafted))
        while self.history and sum(d for _, d in self.history) - self.history[0][1] >= self.config.acceptance_window:
            self.history.popleft()
        self.tokens += accepted + 1 if tokens is None else tokens

    def get_rolling_acceptance(self) -> float:
        """Return accepted over drafted tokens of the window; 0.5 while nothing was drafted."""
        drafted = sum(d for _, d in self.history)
        return sum(a for a, _ in self.history) / drafted if drafted else UNKNOWN_RATE

    def should_adjust(self) -> bool:
        """Return whether ``adjustment_interval`` tokens were emitted since the last adjustment."""
        return self.tokens >= self.config.adjustment_interval

    def compute_new_k(self) -> int:
        """Adjust K by the rolling acceptance rate and return it; a change is logged."""
        rate, target = self.get_rolling_acceptance(), self.config.target_acceptance
        self.tokens = 0
        return self.change_k(self.config.k_current + step(rate, target), {"acceptance": round(rate, 4)})

    def get_k_for_context(self, snippet: str) -> int:
        """Return the draft length for a text that looks like this: K + 8 for code, K − 4 for mathematics, 6 for JSON
        (at least k_min), K otherwise; within [k_min, k_max]. K itself stays as it is."""
        return self.k_for_kind(context_kind(snippet), self.config.k_current)

    def k_for_kind(self, kind: str, base: int) -> int:
        """Return the draft length that ``get_k_for_context`` gives for a K of ``base``."""
        k = {"code": base + 8, "math": base - 4, "json": max(self.config.k_min, JSON_K)}.get(kind, base)
        return min(max(k, self.config.k_min), self.config.k_max)

    def change_k(self, k: int, details: dict[str, Any]) -> int:
        """Set K within its bounds and return it; a change is logged with ``details``."""
        before, self.config.k_current = self.config.k_current, min(max(k, self.config.k_min), self.config.k_max)
        if self.config.k_current != before and self.audit_log:
            line = {
                "ts": time.time(),
                "session": self.session,
                "level": "INFO",
                "cat": "SPEC_ADJUST",
                "msg": f"K: {before} -> {self.config.k_current}",
                "details": details,
            }
            self.audit_log.parent.mkdir(parents=True, exist_ok=True)
            with self.audit_log.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        return self.config.k_current


def step(rate: float, target: float) -> int:
    """Return how far K moves at an acceptance rate."""
    rate, target = round(rate, 9), round(target, 9)  # 0.55 + 0.1 is a little more than 0.65 in floats
    if rate > round(target + 0.10, 9):
        return 4
    if rate > target:
        return 2
    if rate < round(target - 0.20, 9):
        return -4
    if rate < round(target - 0.10, 9):
        return -2
    return 0


class AdaptiveKAgent(ChainRule):
    """Moves the chain length K every 64 tokens by the rolling acceptance rate, and at once where the kind of text changes:
    ``AdaptiveSpecController``, the dynamic speculation of a llama.cpp server, as an agent.

    Where more than the target rate was accepted K grows by 2, and by 4 where the rate is more than 0.10 above it; where
    the rate is more than 0.10 below the target K falls by 2, and by 4 below target − 0.20. In code K is 8 larger, in
    mathematics 4 smaller, in JSON 6. While a text is of one kind, K is adjusted from there; where the kind changes,
    that addition is removed first (as published, the rule changed the length in use but not the one being learned).
    ``k_max`` is at most the environment's, ``k_current`` within the bounds. A server that shows nothing but its counters
    is enough for it.
    """

    class Settings(AgentSettings):
        k_min: Natural = Field(4, description="least draft length")
        k_max: Natural = Field(24, description="largest draft length")
        k_current: Natural = Field(8, description="first draft length")
        target_acceptance: Share = Field(0.55, description="acceptance rate above which K grows")
        adjustment_interval: Count = Field(64, description="tokens between adjustments")
        acceptance_window: Count = Field(
            128, description="drafted tokens that the rolling acceptance rate looks back over"
        )
        use_context: bool = Field(True, description="follow the context rule, which knows code, mathematics and JSON")
        audit_log: str | Path | None = Field(None, description="JSONL file to which every change of K is appended")
        session: str = Field("default", description="name of this session in the log")

        @model_validator(mode="after")
        def _check(self) -> Self:
            if self.k_min > self.k_max:
                raise ValueError(f"k_min is {self.k_min}; expected at most k_max ({self.k_max})")
            return self

    settings: Settings
    decision = "cycle"
    remembers = ("controller", "kind", "added")
    looks_at: tuple[str, ...] = ("last_k", "last_acceptance")

    def __init__(self, control: Control, **hyperparameters: Any):
        super().__init__(control, **hyperparameters)
        own = self.settings
        longest = max(own.k_min, min(own.k_max, self.k_max))
        first = min(max(own.k_current, own.k_min), longest)
        config = SpecConfig(
            own.k_min, longest, first, own.target_acceptance, own.adjustment_interval, own.acceptance_window
        )
        self.controller = AdaptiveSpecController(config, own.audit_log, own.session)
        self.use_context = own.use_context and "kind" in control.slices
        if self.use_context:
            self.looks_at = (*self.looks_at, "kind")
        self.kind, self.added = "", 0  # of the text, and what the context rule added to K for it

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        if not start:
            self._record(observation)
        if self.use_context:
            kind = KINDS[int(np.argmax(observation[self.control.slices["kind"]]))]
            if kind != self.kind:
                base = self.controller.config.k_current - self.added
                k = self.controller.k_for_kind(kind, base)
                self.kind, self.added = kind, k - base
                self.controller.change_k(k, {"context": kind})
        if self.controller.should_adjust():
            self.controller.compute_new_k()
        return self.controller.config.k_current, state

    def _record(self, observation: np.ndarray) -> None:
        """Report the last decision: a cycle, or a segment, of which only the rate is seen."""
        k, rate = self.read(observation, "last_k"), self.read(observation, "last_acceptance")
        interval = self.control.adjustment_interval
        drafted = interval * (k > 0) if interval else round(k * self.k_max)
        self.controller.record_acceptance(round(rate * drafted), drafted, interval or None)

    @staticmethod
    def space(trial: Any) -> dict[str, Any]:
        return {
            "k_min": trial.suggest_int("k_min", 1, 4),
            "k_max": trial.suggest_int("k_max", 4, 24),
            "k_current": trial.suggest_int("k_current", 1, 24),
            "target_acceptance": trial.suggest_float("target_acceptance", 0.3, 0.9),
            "adjustment_interval": trial.suggest_categorical("adjustment_interval", [8, 16, 32, 64]),
            "acceptance_window": trial.suggest_categorical("acceptance_window", [16, 32, 64, 128]),
            "use_context": trial.suggest_categorical("use_context", [False, True]),
        }
