"""The class of every registered environment (``SpecDepthEnv``, …): a ``SpecEnv`` with the documentation of its problem.

A class is made at its first use, from its row in ``spec_envs.ENVIRONMENTS``. Its page of documentation has the sections
of the control's docstring, each with what is the same for every problem.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from spec_envs import ENVIRONMENTS, class_name
from spec_envs.controls import CONTROLS, Control
from spec_envs.controls.rewards import Reward
from spec_envs.env import SpecEnv
from spec_envs.settings import documentation, signature

HEADINGS = (
    "Description",
    "Action Space",
    "Observation Space",
    "Rewards",
    "Starting State",
    "Episode End",
    "Information",
    "Arguments",
    "Shared Arguments",
    "Version History",
)
COSTS = """`cost_features=True` appends `costs`, numbers of the clock's cost table: T_verify(1) / T_verify(n) for
n = 1, 8, 16, 32, 64, 96 rows, and T_draft / T_verify(1)."""
EPISODE_END = """Terminated where the text ends, at EOS or after `max_new_tokens`; with `episode="cycle"` after every
cycle, and `reset` continues the text. A cycle is one round of drafting and verifying."""
INFORMATION = """The info of a step describes the cycle that it ended; counts are 0 if it ended none.

- `emitted`: tokens added to the text: the accepted ones, and one of the target's own.
- `accepted`: drafted tokens that the target accepted.
- `drafted`: tokens or tree nodes that the drafter proposed.
- `verified`: those of them that the target's forward read.
- `bytes_up`, `bytes_down`: bytes of the messages to the target and from it; 0 without a link.
- `seconds`: seconds of the step by part: `draft` (the drafter's forwards), `verify` (the target's), `network`
  (a link's transfers and delays) and `policy` (the agent's decisions).
- `saved`: emitted tokens − tokens that plain decoding emits in these seconds.

The last step of a text also has `text`, `task` (the kind of prompt), `tokens` (their number) and `speedup` (over plain
decoding)."""


def environment(env_id: str) -> type[SpecEnv]:
    """Make the class of an environment."""
    place = ENVIRONMENTS[env_id]
    kind = CONTROLS[place]

    def __init__(self: SpecEnv, control: str = place, **keywords: Any) -> None:
        SpecEnv.__init__(self, control, **keywords)

    described = {
        "__init__": __init__,
        "__signature__": signature(kind),
        "__doc__": page(kind),
        "__module__": __name__,
    }
    return type(class_name(env_id), (SpecEnv,), described)


def page(kind: type[Control]) -> str:
    """Return the documentation of an environment in Markdown: the sections of its control's docstring, with what is the
    same for every problem."""
    own = sections(kind)
    parts = {heading: [own[heading]] if heading in own else [] for heading in (*HEADINGS, *own)}
    parts["Observation Space"].append(COSTS)
    parts["Rewards"].insert(0, rewards_list(kind))
    parts["Episode End"].insert(0, EPISODE_END)
    parts["Information"].insert(0, INFORMATION)
    parts["Shared Arguments"].append(documentation())
    pieces = [piece for heading, texts in parts.items() if texts for piece in (f"## {heading}", *texts)]
    return "\n\n".join(pieces) + "\n"


def sections(kind: type[Control]) -> dict[str, str]:
    """Return the sections of a control's docstring, in Markdown by heading."""
    text = inspect.getdoc(kind) or ""
    return dict(re.findall(r"^## ([^\n]+)\n\n(.*?)\s*(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def rewards_list(kind: type[Control]) -> str:
    """Return the rewards of an environment as a list in Markdown."""
    rewards = [f'- `"{name}"`: {in_words(reward)}' for name, reward in kind.rewards.items()]
    return "\n".join(["The first one is the default.", "", *rewards])


def in_words(reward: Reward) -> str:
    """Return what a reward is, as its docstring says it."""
    return " ".join((inspect.getdoc(reward) or "").removeprefix("Return ").split())


def __getattr__(name: str) -> type[SpecEnv]:
    for env_id in ENVIRONMENTS:
        if class_name(env_id) == name:
            globals()[name] = made = environment(env_id)  # made once, because pickled objects refer to it
            return made
    raise AttributeError(f"module {__name__!r} has no class {name!r}; register its environment first")


def __dir__() -> list[str]:
    return sorted({*globals(), *map(class_name, ENVIRONMENTS)})
