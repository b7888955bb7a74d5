"""The outcomes of choices between drafters on the texts of a trace: the seconds of fixed choices, and the fewest seconds
there can be.

A drafter that was not asked has the text to read that came up in the meantime, so the state of a text under way is how
many of its tokens each drafter with weights has not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spec_envs.controls.drafter import DrafterControl
from spec_envs.decoding import catch_up
from spec_envs.decoding.clock import DRAFTER, CostTable
from spec_envs.decoding.traces.portfolio import PortfolioTrace
from spec_envs.vector.arms import ArmTable
from spec_envs.vector.prices import prices

UNREAD = 48  # most tokens that a drafter catches up with; more tokens are priced as this many
STATES = 130_000  # most combinations of unread tokens that are told apart


@dataclass(frozen=True)
class Clairvoyant:
    """The fastest choices of a text: their seconds, the actions, and the tokens that are accepted and verified."""

    seconds: float
    actions: list[int]
    accepted: int
    verified: int


class Outcomes:
    """The seconds of texts under choices between drafters.

    Args:
        trace: of the control's drafters.
        table: prices of forwards.
        texts: indices of the texts.
        max_new_tokens: most tokens of a text, the first one included.

    Attributes:
        tokens: of every text, without its first one ``[texts]``.
        accepted, nodes: of ``ArmTable``, ``[rows, actions]``.
        readers: number of drafters with weights.
        who: ``[actions]``, which of them an action asks; their number where it asks none.
    """

    def __init__(
        self,
        trace: PortfolioTrace,
        control: DrafterControl,
        table: CostTable,
        texts: Sequence[int],
        max_new_tokens: int,
    ):
        self.first = trace.starts[list(texts)]
        self.last = np.minimum(trace.starts[np.array(texts) + 1], self.first + max_new_tokens) - 1
        self.tokens = self.last - self.first
        arms, sizes = ArmTable(trace, control), len(control.sizes)
        self.accepted, self.nodes = arms.accepted.astype(np.int64), arms.nodes.astype(np.int64)
        self.fixed = prices([table], "verify", control.sizes[-1] + 1)[0][self.nodes + 1]  # all but the first forward
        self.asked, shape = np.zeros(self.fixed.shape, bool), self.fixed.shape
        self.copied, self.read, self.right = (np.zeros(shape, np.int64) for _ in range(3))
        reading = [drafter for drafter in arms.drafters if not drafter.free]
        self.readers, self.who = len(reading), np.full(shape[1], len(reading))
        self.most = min(UNREAD, int(STATES ** (1 / max(1, self.readers))) - 1)  # unread tokens that are told apart
        blocks = [int(drafter.cycles.first.max()) for drafter in arms.drafters]
        most = UNREAD + max(control.sizes[-1], control.width, *blocks)
        self.draft = np.zeros((self.readers + 1, most + 1))
        for i, drafter in enumerate(arms.drafters):
            if drafter.free:
                continue
            own, cycles = slice(1 + i * sizes, 1 + (i + 1) * sizes), drafter.cycles
            self.who[own] = reader = reading.index(drafter)
            self.draft[reader] = prices([table], f"{DRAFTER}{drafter.name}", most)[0]
            self.fixed[:, own] += cycles.later(self.draft[None, reader])[0][:, drafter.plans]
            self.asked[:, own], self.read[:, own] = cycles.asked[:, drafter.plans], cycles.read[:, drafter.plans]
            self.copied[:, own], self.right[:, own] = cycles.first[:, None], cycles.right[:, None]

    def seconds(self, chosen: np.ndarray) -> np.ndarray:
        """Return the seconds of every text ``[texts, policies]`` under policies that know the position alone.

        Args:
            chosen: action of each policy by row of the trace ``[rows, policies]``.
        """
        texts, count = len(self.first), chosen.shape[1]
        readers, each = np.arange(len(self.draft)), np.broadcast_to(np.arange(count), (texts, count))
        row, last = (np.repeat(ends[:, None], count, 1) for ends in (self.first, self.last))
        seconds, unread = np.zeros((texts, count)), np.ones((len(self.draft), texts, count), np.int64)
        while (alive := row < last).any():
            action = chosen[row, each]
            who = self.who[action]
            spent, emitted, after = self._cycles(row, action, np.choose(who, unread), np.maximum(1, last - row))
            seconds += alive * spent
            unread = np.where(who == readers[:, None, None], after, unread + emitted)
            row = row + alive * emitted
        return seconds

    def static(self) -> np.ndarray:
        """Return the seconds of every text under every static setting ``[texts, actions]``."""
        rows, actions = self.fixed.shape
        return self.seconds(np.broadcast_to(np.arange(actions), (rows, actions)))

    def clairvoyant(self) -> list[Clairvoyant]:
        """Return the fastest choices of every text: dynamic programming backwards over the positions and over what each
        drafter has not read.

        It is exact for drafters that are left out for up to ``UNREAD`` tokens, or fewer if more than three drafters have
        weights. Those left out for longer are priced as if it were that many, so that no policy takes less.
        """
        return [self._fastest(*ends) for ends in zip(self.first.tolist(), self.last.tolist(), strict=True)]

    def _fastest(self, first: int, last: int) -> Clairvoyant:
        """Return the fastest choices from one row of the trace to another."""
        states = np.arange(self.most + 1)
        least = np.zeros((last - first + 1, *[len(states)] * self.readers))  # seconds to the end of the text
        for row in range(last - 1, first - 1, -1):
            best = np.full(least.shape[1:], np.inf)
            for action in range(len(self.who)):
                np.minimum(best, self._to_the_end(row, action, [states] * self.readers, least[row - first :]), out=best)
            least[row - first] = best
        row, unread, actions, accepted, verified = first, [np.ones(1, np.int64)] * self.readers, [], 0, 0
        while row < last:
            ways = [
                float(self._to_the_end(row, action, unread, least[row - first :]).item())
                for action in range(len(self.who))
            ]
            action = int(np.argmin(ways))
            _, emitted, unread = self._moved(row, action, unread, last - row)
            actions.append(action)
            accepted += min(emitted, int(self.accepted[row, action]))
            verified += int(self.nodes[row, action])
            row += emitted
        return Clairvoyant(float(least[(0, *[1] * self.readers)]), actions, accepted, verified)

    def _to_the_end(self, row: int, action: int, unread: Sequence[np.ndarray], least: np.ndarray) -> np.ndarray:
        """Return the seconds from a row to the end of the text, if an action is followed by the fastest choices.

        Args:
            unread: for each reader the numbers of unread tokens to compute them for; every combination is.
            least: seconds of the fastest choices from this row on and the rows after it, for all numbers.
        """
        spent, emitted, moved = self._moved(row, action, unread, len(least) - 1)
        seconds: np.ndarray = spent + least[emitted][np.ix_(*moved)]
        return seconds

    def _moved(
        self, row: int, action: int, unread: Sequence[np.ndarray], left: int
    ) -> tuple[np.ndarray, int, list[np.ndarray]]:
        """Return the seconds of a cycle, the tokens that it emits, and for each reader the numbers of unread tokens
        after it; see ``_to_the_end``."""
        who, place = int(self.who[action]), (np.array(row), np.array(action))
        own = unread[who] if who < self.readers else np.ones(1, np.int64)
        spent, emitted, after = self._cycles(*place, own, np.array(left))
        moved = [after if i == who else states + emitted for i, states in enumerate(unread)]
        shape = [-1 if i == who else 1 for i in range(self.readers)]
        return spent.reshape(shape), int(emitted), [np.minimum(states, self.most) for states in moved]

    def _cycles(
        self, row: np.ndarray, action: np.ndarray, unread: np.ndarray, left: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the seconds of cycles at rows of the trace, the tokens that they emit, and the tokens that the drafter
        which is asked has not read after them.

        Args:
            unread: tokens that it has not read before them.
            left: tokens to the end of the text.
        """
        at = (row, action)
        asked, waiting = self.asked[at], np.minimum(unread, UNREAD)
        rows = np.where(asked, catch_up.rows(waiting, self.copied[at]), 0)
        seconds = self.draft[self.who[action], rows] + self.fixed[at]
        emitted = np.minimum(self.accepted[at] + 1, left)
        after = catch_up.left_unread(np.where(asked, 0, waiting), self.read[at], emitted, self.right[at])
        return seconds, emitted, after
