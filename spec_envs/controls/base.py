"""The base class of control problems: what an agent observes of a decoder, and what its actions do to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from spec_envs import ENVIRONMENTS, recordings
from spec_envs.controls.exit_point import ExitPoint
from spec_envs.controls.observation.entries import Entry
from spec_envs.controls.plans import Plans
from spec_envs.controls.policy import Policy, Predictor
from spec_envs.controls.rewards import Decision, Reward, ltd, saved
from spec_envs.decoding.clock import CostTable, PricedClock, WallClock
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.drafters.names import DrafterName, default_drafter, static_over_plain
from spec_envs.decoding.drafters.portfolio import is_portfolio
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.loading import (
    DEFAULT_TARGET,
    Models,
    load_decoder,
)

LONGEST_CHAIN = 4096  # drafted tokens that are allocated before anything is drafted
COST_ROWS = (1, 8, 16, 32, 64, 96)  # where the observation samples the verification curve


Setting = int | str
"""Name of a static setting: a depth, a number of nodes, a chain length, ``"2x7"``, ``"4x300"``."""


class Control(ABC):
    """One control problem, driven by the environment and by ``generate`` alike.

    Attributes:
        action_space, observation_space: as in Gymnasium.
        entries: the observation's ranges in order; ``self.slices[name]`` finds one.
        width, max_depth: size of the tree: children per node, and most expansions after the first level. A chain of k
            tokens has width 1 and k − 1 expansions.
        budgets: numbers of nodes that a cycle may verify, where a part of the tree is; empty for chains.
        partner: a trained policy that makes the decisions this problem holds fixed, or None.
        draft_columns: how many of the observation's first numbers show what the cycle under way has drafted; the
            others stay the same within a cycle.
        costs: cost table that ``cost_features`` shows while the decoder's clock measures, or None.
        task: kind of prompt of the text under way, ``""`` where it is not known.
        rewards: the rewards on offer, by name, the default first.
        temperature: default sampling temperature of the target.
        prunable: True if a cycle may verify only a part of what it drafted, which a chain that was sampled does not
            allow.
        engine: what decodes: ``"torch"`` or another name of ``controls.k.ENGINES``.
        alternatives, alternative_chance: most alternatives that are verified beside each token of a chain, and the least
            probability of one and of the tokens before it.
        trace_kind: kind of the traces that replay this problem, ``"tree"`` or ``"chain"``, or ``""`` if none does.
        progress: name of the observation's entry that shows how much of a cycle is drafted, where each level or token
            is a decision; ``""`` where a cycle is one decision.
        full_progress: levels or tokens that ``progress`` shows as 1.
        adjustment_interval: tokens for which a decision is kept; 0 if every cycle has its own.
        link: name or address of the link between drafter and target, ``""`` if there is none.
        drafters: names of the drafters that take turns; empty where there is one.
        depths: expansions of the trees of those among them that draft trees.
        exit: the target's own early exit that drafts, or None where another model does.
        name: name of this problem.
        partner_name: name of the problem whose policy it can be composed with, or None.
    """

    action_space: spaces.Discrete
    width: int
    max_depth: int
    budgets: tuple[int, ...] = ()
    observations: ClassVar[tuple[str, ...]] = ("default", "ltd")
    rewards: ClassVar[Mapping[str, Reward]] = {"saved": saved, "ltd": ltd}
    temperature: ClassVar[float] = 0.0
    name: ClassVar[str] = ""
    trace_kind: ClassVar[str] = ""
    alternatives: int = 0
    alternative_chance: float = 0.04
    prunable: ClassVar[bool] = True
    progress: str = ""
    full_progress: int = 0
    adjustment_interval: int = 0
    link: str = ""
    exit: ExitPoint | None = None
    engine: str = "torch"
    drafters: tuple[str, ...] = ()
    depths: tuple[int, ...] = ()
    partner_name: ClassVar[str | None] = None

    def __init__(self, observation: str, cost_features: bool):
        if observation not in self.observations:
            raise ValueError(f"observation is {observation!r}; expected one of {', '.join(self.observations)}")
        self.observation, self.cost_features = observation, cost_features
        self.partner: Policy | None = None
        self.costs: CostTable | None = None
        self.rng, self.task = np.random.default_rng(), ""

    def declare(self, entries: list[Entry]) -> None:
        """Fix the observation's entries, in order; every control calls it once, when it is made."""
        if self.cost_features:
            size = len(COST_ROWS) + 1
            entries = [*entries, Entry("costs", size, 0.0, 1.0, self._read_costs)]
        self.entries = entries
        ends = np.cumsum([entry.size for entry in entries])
        self.slices = {e.name: slice(end - e.size, end) for e, end in zip(entries, ends.tolist(), strict=True)}
        self._reads = [(e.name, e.read, self.slices[e.name].start) for e in entries]
        self.draft_columns = max((self.slices[e.name].stop for e in entries if e.recorded), default=0)
        low = np.concatenate([np.full(e.size, e.low, np.float32) for e in entries])
        high = np.concatenate([np.full(e.size, e.high, np.float32) for e in entries])
        self.observation_space = spaces.Box(low, high, dtype=np.float32)

    def check_complete(self) -> None:
        """Refuse a control whose class forgot a part of the problem.

        Raises:
            ValueError: the message names what is missing.
        """
        missing = sorted({"action_space", "max_depth", "observation_space", "width"} - set(dir(self)))
        if missing:
            raise ValueError(
                f"{type(self).__name__} has no {', '.join(missing)}; its __init__ sets action_space, max_depth and "
                "width, and calls self.declare(entries), which makes observation_space"
            )

    def compose(self, control: Control, agent: Predictor) -> None:
        """Let a trained policy of the other problem make its decisions here.

        Raises:
            ValueError: a policy of any other problem, or for trees of another size.
        """
        if control.name != self.partner_name:
            expected = f"a {self.partner_name} policy" if self.partner_name else "no partner"
            raise ValueError(
                f"the partner is a policy of {control.env_id}, but a policy of {self.env_id} takes {expected}"
            )
        mine, theirs = (self.width, self.max_depth), (control.width, control.max_depth)
        if mine != theirs:
            raise ValueError(f"the partner was trained with width and max_depth {theirs}, this environment has {mine}")
        self.partner = Policy(control, agent)

    def check_layout(self, other: Control, who: str) -> None:
        """Refuse an agent that was made for a control with another layout of observations or other actions.

        Args:
            other: the control that the agent was made for.
            who: name of the agent for the message.

        Raises:
            ValueError: the layouts or the actions differ.
        """
        for what, mine, theirs in (
            ("an observation of", layout(self), layout(other)),
            ("actions", str(self.action_space), str(other.action_space)),
        ):
            if mine != theirs:
                raise ValueError(
                    f"{who} was made for {other.env_id} with {what} {theirs}, but here {self.env_id} has {mine}; "
                    "make both with the same settings"
                )

    def reset(self, rng: np.random.Generator, task: str = "") -> None:
        """Begin a new text of a task."""
        self.rng, self.task = rng, task
        if self.partner:
            self.partner.reset(rng, task)

    def observe(self, decoder: Engine, looks_at: Collection[str] | None = None) -> np.ndarray:
        """Return what the agent sees, float32 in the shape of ``observation_space``. The first call of a cycle drafts
        what the first decision needs.

        After the end of a text there is nothing to decide; the tree's entries are then empty.

        Args:
            looks_at: names of the entries that are wanted (all by default); the others are 0.
        """
        if not decoder.finished:
            self.prepare(decoder)
        vector = np.zeros(self.observation_space.shape, dtype=np.float32)
        for name, read, start in self._reads:
            if looks_at is not None and name not in looks_at:
                continue
            value = read(decoder)
            if isinstance(value, (float, int, np.number)):
                vector[start] = value
            else:
                vector[start : start + len(value)] = value
        space = self.observation_space
        return np.minimum(np.maximum(vector, space.low, out=vector), space.high, out=vector)

    def _read_costs(self, decoder: Engine) -> list[float]:
        """Return the cost table in force as it is observed."""
        table = decoder.clock.table if isinstance(decoder.clock, PricedClock) else self.costs
        if table is None:
            raise ValueError("cost_features need a cost table: set the control's costs, or give the clock one")
        return costs_shown(table, decoder.tree.width)

    def default_drafter(self, target: str) -> str:
        """Return the default drafter of a target."""
        return default_drafter(target, self.width == 1)

    def check_drafter(self, drafter: str) -> None:
        """Refuse a drafter that this problem has no decisions about, by its name.

        Raises:
            ValueError: it is several drafters, between which most problems do not choose.
        """
        if is_portfolio(drafter):
            raise ValueError(f"drafter is {drafter!r}; {self.env_id} has one, SpecDrafter-v0 chooses between several")

    def static_over_plain(self, target: str, drafter: str) -> float:
        """Return the speed of a pair's best static setting in units of plain decoding; 1 where it was not measured."""
        return static_over_plain(target, drafter)

    def open(
        self,
        clock: WallClock | None = None,
        trace: str | None = None,
        *,
        target: str = DEFAULT_TARGET,
        drafter: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        temperature: float | None = None,
        top_p: float = 1.0,
    ) -> Engine:
        """Open what decodes under this control: models, or a recording that stands for them.

        Args:
            clock: charged for every forward. By default it measures, or prices by the recording's own cost table.
            trace: name of a recording; see ``spec_envs.recordings.load``.
            target, drafter, device, dtype, top_p: as in ``load_decoder``; the drafter ``"auto"`` is the one that
                ``default_drafter`` returns.
            temperature: sampling temperature of the target; by default the control's own.

        Raises:
            ValueError: a name that is not found, or settings that do not go together.
        """
        self.check_complete()
        if trace is not None:
            recording = recordings.load(trace)
            given = {"target": target, "drafter": drafter, "device": device, "dtype": dtype}
            engine = self.open_recording(trace, clock or PricedClock(recording.costs()))
            recording.check_settings(given | {"temperature": temperature, "top_p": top_p})
            return engine
        drafter = self.default_drafter(target) if drafter == "auto" else drafter
        self.check_drafter(drafter)
        temperature = self.temperature if temperature is None else temperature
        return self.open_models(Models(target, drafter, device, dtype, temperature, top_p), clock)

    def open_models(self, models: Models, clock: WallClock | None) -> Engine:
        """Open models in this process; a control whose models are elsewhere overrides it."""
        if models.temperature > 0 and self.prunable and self.width == 1 and DrafterName.parse(models.drafter).chain:
            raise ValueError(
                f"temperature is {models.temperature}, at which the draft model {models.drafter!r} draws its chain; a "
                "drawn chain is verified whole, but here a budget may cut it: decode greedily, or take an EAGLE-3 head"
            )
        return load_decoder(**vars(models), clock=clock, width=self.width, max_depth=self.max_depth)

    def open_recording(self, trace: str, clock: WallClock) -> Engine:
        """Open the recording of that name in place of models; a control that needs a certain one overrides it."""
        return recordings.load(trace).decoder(self, clock)

    def separate(self, decoder: Engine) -> Engine:
        """Return an engine on which an arm of a comparison decodes under this control; see ``Engine.separate``."""
        return decoder.separate()

    def plans(self) -> Plans:
        """Return every way in which a cycle can continue.

        Raises:
            ValueError: no trace replays this problem with these settings.
        """
        raise ValueError(f"plans are made of cycles that a trace replays, not of {self.env_id} with these settings")

    @property
    def env_id(self) -> str:
        """Id of the environment of this problem; the name of its class if none is registered."""
        return environment_id(type(self))

    def place(self, name: str) -> int | None:
        """Return where an entry of the observation begins; None if no entry has that name."""
        found = self.slices.get(name)
        return None if found is None else found.start

    def details(self, decoder: Any, cycle: Cycle | None) -> dict[str, Any]:
        """Return what this problem adds to the info of a step.

        Args:
            cycle: the cycle that the step ended, or None.
        """
        return {}

    def counted_tokens(self, cycle: Cycle) -> float:
        """Return the tokens that a cycle counts for."""
        return float(cycle.emitted)

    def reward(self, name: str, cycle: Cycle | None, seconds: float, pace: float) -> float:
        """Return the reward of a decision.

        Args:
            name: name of the reward, one of ``rewards``.
            cycle: the cycle that the decision ended, or None.
            seconds: seconds of the decision.
            pace: tokens per second that a second costs.
        """
        if cycle is None:
            decided = Decision(0.0, 0, 0, seconds, 1.0, pace)
        else:
            whole = sum(cycle.seconds.values())
            decided = Decision(self.counted_tokens(cycle), cycle.emitted, cycle.accepted, seconds, whole, pace)
        return float(self.rewards[name](decided))

    def settings(self) -> tuple[Setting, ...]:
        """Return every static setting of this problem by name; none if the problem has no static settings."""
        return ()

    def follow(self, setting: Setting, observation: np.ndarray) -> int:
        """Return the action that follows a setting at this observation; by default actions stand for settings in order.

        Raises:
            ValueError: a setting that is not offered.
        """
        return self.settings().index(setting)

    def drafted(self, observation: np.ndarray) -> int:
        """Return the levels or tokens drafted so far in a cycle, as the entry ``progress`` shows them."""
        return round(float(observation[self.slices[self.progress].start]) * self.full_progress)

    def followed(self, actions: Sequence[int], lengths: Sequence[int]) -> list[Setting]:
        """Return the settings that the decisions of a text followed, one per cycle.

        Args:
            actions: action of every decision.
            lengths: number of candidates that every cycle drafted.
        """
        offered = self.settings()
        return [offered[action] for action in actions]

    def candidates(self) -> dict[str, Sequence[Setting]]:
        """Return the values that a search of the best static setting tries, by the axis of the setting."""
        return {self.name: self.settings()}

    def static(self, *values: Setting) -> tuple[Control, Setting]:
        """Return a control, and its setting that follows one value of each axis of ``candidates``."""
        return self, values[0]

    def fix_partner(self, value: int) -> None:
        """Fix the decision that a partner would make.

        Raises:
            ValueError: a value out of range, or a problem that leaves no decision to a partner.
        """
        raise ValueError(f"{self.env_id} leaves no decision to a partner; expected SpecDepth-v0 or SpecBudget-v0")

    def fix_drawn(self, *values: Setting) -> None:
        """Fix what training draws at random for every cycle, such as the depth of ``depth="random"``.

        Args:
            values: static values to fix it at, one for each axis of ``candidates``.
        """
        return None

    @abstractmethod
    def prepare(self, decoder: Any) -> None:
        """Bring the cycle to the next decision.

        Args:
            decoder: what ``open`` returned: an ``Engine``, which offers ``cycle``; over models also the steps of a
                cycle, ``begin``, ``expand`` and ``verify`` (``Decoder``).
        """

    @abstractmethod
    def act(self, decoder: Any, action: int) -> Cycle | None:
        """Carry out a decision and return the cycle that it ended; None if the cycle continues.

        Args:
            decoder: as in ``prepare``.
        """


def environment_id(kind: type[Control]) -> str:
    """Return the id of the environment of a problem; the name of its class if none is registered."""
    place = f"{kind.__module__}:{kind.__qualname__}"
    return next((env_id for env_id, found in ENVIRONMENTS.items() if found == place), kind.__name__)


def costs_shown(table: CostTable, width: int) -> list[float]:
    """Return a cost table as it is observed: T_verify(1)/T_verify(n) over ``COST_ROWS``, and T_draft/T_verify(1), where
    a forward of the drafter has ``width`` rows."""
    plain = table.seconds("verify", 1)
    return [*(plain / table.seconds("verify", n) for n in COST_ROWS), table.seconds("draft", width) / plain]


def layout(control: Control) -> str:
    """Return the names and sizes of an observation's entries, in order."""
    return ", ".join(f"{entry.name}[{entry.size}]" for entry in control.entries)
