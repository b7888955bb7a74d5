"""Describe the agents in Markdown, from what the code knows about them."""

from __future__ import annotations

import inspect
import re
from typing import Any

from _scripts.pages import sentence, table
from spec_envs.agents import AGENTS
from spec_envs.agents.base import Agent
from spec_envs.agents.exits.base import ExitAgent
from spec_envs.agents.rules.base import ChainRule, Rule
from spec_envs.agents.sb3.agent import ALGORITHMS, SB3Agent
from spec_envs.agents.sb3.settings import SB3Settings
from spec_envs.agents.settings import AgentSettings
from spec_envs.controls import CONTROLS
from spec_envs.controls.base import environment_id

END = "<!-- end -->"
MARKED = re.compile(rf"^(<!-- ([a-z-]+)(?:: (\S+))? -->)\n(?:(?:(?!<!-- ).*\n)*?{END}\n)?", re.MULTILINE)
PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")
ANY_PROBLEM = "any"
LIBRARY = "https://stable-baselines3.readthedocs.io/en/master/modules"
CONTRIB = "https://sb3-contrib.readthedocs.io/en/master/modules"
LIBRARY_PAGES = {
    "ppo": f"{LIBRARY}/ppo.html",
    "a2c": f"{LIBRARY}/a2c.html",
    "trpo": f"{CONTRIB}/trpo.html",
    "recurrent-ppo": f"{CONTRIB}/ppo_recurrent.html",
    "dqn": f"{LIBRARY}/dqn.html",
    "ddqn": f"{LIBRARY}/dqn.html",
    "qrdqn": f"{CONTRIB}/qrdqn.html",
}


def filled(text: str) -> str:
    """Return the text of a page with everything generated between its marks.

    `<!-- agents -->` is followed by the table of all agents, `<!-- agent: NAME -->` by what that agent is, with a table
    of its hyper-parameters, and `<!-- hyper-parameters: stable-baselines3 -->` by the table of those that all algorithms
    of Stable-Baselines3 share; each ends with `<!-- end -->`.
    """

    def fill(found: re.Match[str]) -> str:
        mark, kind, name = found.groups()
        if kind not in ("agents", "agent", "hyper-parameters"):
            return found[0]
        content = {"agents": overview, "agent": lambda: described(name), "hyper-parameters": shared_by_algorithms}[
            kind
        ]()
        return f"{mark}\n\n{content.strip()}\n\n{END}\n"

    return MARKED.sub(fill, text)


def described(name: str) -> str:
    """Return heading, facts, description and hyper-parameters of an agent, in Markdown."""
    kind = AGENTS[name]
    facts = f"*Problems*: {problems(kind)}. *Learns from*: {kind.learns_from}."
    parts = [f"## {name}", "", description(kind), "", facts, ""]
    if issubclass(kind, SB3Agent):
        parts.append(library_arguments(kind))
    elif kind.Settings.model_fields:
        parts.append(hyperparameters(kind.Settings))
    return "\n".join([*parts, ""])


def description(kind: type[Agent]) -> str:
    """Return what an agent is, without its lists of arguments."""
    text = re.split(r"\n(?:Args|Attributes|Raises|Hyper-parameters):\n", inspect.getdoc(kind) or "")[0]
    return text.replace("``", "`").strip()


def hyperparameters(settings: type[AgentSettings]) -> str:
    """Return a table of hyper-parameters."""
    rows = [
        (f"`{name}`", settings.expected(name), default(field), sentence(field.description))
        for name, field in settings.model_fields.items()
    ]
    return table(("hyper-parameter", "takes", "default", "meaning"), rows)


def library_arguments(kind: type[SB3Agent]) -> str:
    """Return a folded table of the arguments of an algorithm's own constructor."""
    fields = {name: field for name, field in kind.Settings.model_fields.items() if name not in SB3Settings.model_fields}
    rows = [(f"`{name}`", kind.Settings.expected(name), default(field)) for name, field in fields.items()]
    return "\n".join(
        [
            f":::{{dropdown}} {len(rows)} more hyper-parameters: the arguments of {ALGORITHMS[kind.algorithm].__name__}",
            "",
            f"The [library's page]({LIBRARY_PAGES[kind.algorithm]}) explains them.",
            "",
            table(("hyper-parameter", "takes", "default"), rows),
            ":::",
        ]
    )


def shared_by_algorithms() -> str:
    """Return the table of the hyper-parameters that all algorithms of Stable-Baselines3 share."""
    return hyperparameters(SB3Settings)


def overview() -> str:
    """Return the table of all agents: what each is for, what it learns from, its paper, and what it does."""
    rows = [
        (
            f"[`{name}`]({page_of(name, kind)}.md#{slug(name)})",
            first_sentence(kind),
            problems(kind),
            kind.learns_from,
            papers(kind),
        )
        for name, kind in AGENTS.items()
    ]
    return table(("agent", "what it does", "problems", "learns from", "paper"), rows)


def page_of(name: str, kind: type[Agent]) -> str:
    """Return the page that describes an agent."""
    if name in ("rl-adapter", "ddqn"):
        return "network"
    if kind.learns_from == "trace":
        return "full-information"
    for family, page in ((SB3Agent, "stable-baselines3"), (ExitAgent, "exits")):
        if issubclass(kind, family):
            return page
    assert issubclass(kind, Rule), f"{name} is of no family; name its page here"
    return "rules"


def problems(kind: type[Agent]) -> str:
    """Return the environments that an agent is made for."""
    names = [environment_id(CONTROLS[name]) for name in kind.problems] or [ANY_PROBLEM]
    by_token = issubclass(kind, ChainRule) and kind.decision == "token"
    return ", ".join(names) + (' with `decision="token"`' if by_token else "")


def first_sentence(kind: type[Agent]) -> str:
    """Return the first sentence of what an agent is, without a list of its papers."""
    text = " ".join(description(kind).split("\n\n")[0].split())
    text = re.sub(r" \((?:after )?[^()]*arXiv [^()]*\)", "", text)
    return re.split(r"(?<=[.:])\s+(?=[A-Zα-ω`∇])", text)[0].rstrip(".:") + "."


def papers(kind: type[Agent]) -> str:
    """Return links to the papers that an agent's description names."""
    return ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in dict.fromkeys(PAPER.findall(description(kind))))


def slug(name: str) -> str:
    """Return the address of an agent's heading within its page."""
    return name.replace("+", "")


def default(field: Any) -> str:
    """Return the default of a hyper-parameter."""
    return "required" if field.is_required() else f"`{field.default!r}`"
