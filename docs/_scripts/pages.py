"""Write the pages that are generated when the documentation is built: environments, arguments, stanzas and commands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path

import gymnasium as gym

from spec_envs import ENVIRONMENTS
from spec_envs.checked import in_words
from spec_envs.controls import CONTROLS, Control
from spec_envs.environments import COSTS, EPISODE_END, HEADINGS, INFORMATION, rewards_list, sections
from spec_envs.experiments.config import Experiment, Stage
from spec_envs.experiments.stanzas import ExperimentFile
from spec_envs.settings import Settings, signature

DOCS = Path(__file__).parents[1]
SHARED = "shared-arguments.md"
VARIANTS: dict[str, list[dict[str, str]]] = {  # keyword arguments that change actions or observations
    "SpecDepth-v0": [{"observation": "ltd"}],
    "SpecBudget-v0": [{"observation": "ltd"}, {"budgets": "ltd"}, {"budgets": "ltd-paper"}],
    "SpecTree-v0": [],
    "SpecK-v0": [{"decision": "token"}, {"observation": "counters"}],
    "SpecTopK-v0": [{"actions": "joint"}, {"observation": "rl_adapter"}],
    "SpecDVI-v0": [{"observation": "policy"}],
}


def write(page: str, *parts: str) -> None:
    """Write a page, unless it is there already: an unchanged page is not read again."""
    path, text = DOCS / page, "\n\n".join(part.strip() for part in parts if part) + "\n"
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(value: object) -> str:
    """Return a value as code, or a dash where there is none."""
    return "—" if value is inspect.Parameter.empty else f"`{value!r}`"


def decision(kind: type[Control]) -> str:
    """Return what an environment decides, as the first line of its module says it."""
    line = (inspect.getmodule(kind).__doc__ or "").splitlines()[0]
    return line.removeprefix("Decide ").removesuffix(".")


def size(space: gym.Space) -> str:
    """Return the size of a space, such as "12 actions" or "28 numbers"."""
    return f"{space.n:,} actions" if isinstance(space, gym.spaces.Discrete) else f"{space.shape[0]} numbers"


def own_arguments(kind: type[Control], described: str) -> str:
    """Return the table of an environment's own keyword arguments, and the sentences around their list."""
    types = inspect.get_annotations(kind.__init__, eval_str=True)
    parameters = signature(kind).parameters
    found = re.findall(r"^- `(\w+)[^`]*`[:,]? ?(.*?)(?=^- `|^\S|\Z)", described, re.MULTILINE | re.DOTALL)
    rows = [
        (f"`{name}`", in_words(types[name]), code(parameters[name].default), " ".join(meaning.split()))
        for name, meaning in found
    ]
    return table(("argument", "type", "default", "meaning"), rows)


def variants(env_id: str) -> str:
    """Return the table of an environment's variants: what its spaces become with other keyword arguments."""
    rows = []
    for keywords in [{}, *VARIANTS[env_id]]:
        control = CONTROLS[env_id](**keywords)
        given = ", ".join(f'`{name}="{value}"`' for name, value in keywords.items())
        spaces = control.action_space, control.observation_space
        rows.append((given or "the defaults", *(size(space) for space in spaces)))
    shared = "`cost_features=True` appends [costs](shared-arguments.md#costs-in-the-observation) to any observation."
    return f"{table(('arguments', 'actions', 'observation'), rows)}\n\n{shared}"


def picture(env_id: str) -> str:
    """Return the moving picture of an environment."""
    return f"![{env_id} under a trained or static policy](../assets/environments/{env_id}.gif)"


def environment_page(env_id: str) -> None:
    """Write the page of an environment."""
    kind = CONTROLS[env_id]
    control = kind()
    parts = sections(kind)
    facts = [
        ("Import", f'`gymnasium.make("{env_id}")`'),
        ("Decision", decision(kind)),
        ("Action space", f"`{control.action_space}`"),
        ("Observation space", f"`{control.observation_space}`"),
        ("Recorded traces replay it", "yes, in `gymnasium.make_vec` as well" if kind.trace_kind else "no exact ones"),
    ]
    own = {
        "Rewards": [rewards_list(kind), "[Clocks and rewards](../concepts/clocks-and-rewards.md) explains them."],
        "Episode End": [f"At the end of the text or cycle, as in [every environment]({SHARED}#episode-end)."],
        "Information": [f"Counts and seconds of the cycle, as in [every environment]({SHARED}#information)."],
        "Variants": [variants(env_id)],
        "Arguments": [f"Its own; those of every environment are [shared arguments]({SHARED})."],
    }
    pieces = []
    headings = sorted({*parts, *own}, key=[*HEADINGS[:-1], "Variants", HEADINGS[-1]].index)
    for heading in headings:
        text = parts.get(heading, "")
        if heading == "Arguments":
            text = own_arguments(kind, text)
        pieces += [f"## {heading}", *own.get(heading, []), text]
    write(f"environments/{env_id}.md", f"# {env_id}", picture(env_id), table(("", ""), facts), *pieces)


def environments_index() -> None:
    """Write the table of all environments."""
    rows = []
    for env_id in ENVIRONMENTS:
        control = CONTROLS[env_id]()
        rows.append(
            (
                f"[{env_id}]({env_id}.md)",
                decision(CONTROLS[env_id]),
                size(control.action_space).removesuffix(" actions"),
                size(control.observation_space),
            )
        )
    gallery = [f"[{picture(env_id)}]({env_id}.md)\n[{env_id}]({env_id}.md)" for env_id in ENVIRONMENTS]
    pages = [*ENVIRONMENTS, SHARED.removesuffix(".md")]
    write(
        "environments/index.md",
        (DOCS / "_scripts" / "environments.md").read_text(encoding="utf-8"),
        table(("environment", "what the agent decides", "actions", "observation"), rows),
        ":::{container} gallery",
        "\n\n".join(gallery),
        ":::",
        "\n".join(["```{toctree}", ":hidden:", "", *pages, "```"]),
    )


def shared_arguments() -> None:
    """Write the page of what all environments have in common."""
    rows = [
        (f"`{name}`", in_words(field.rebuild_annotation()), f"`{field.default!r}`", f"{field.description}.")
        for name, field in Settings.model_fields.items()
    ]
    write(
        f"environments/{SHARED}",
        "# Shared arguments",
        "Keyword arguments of `gymnasium.make`, episodes and infos that every environment has.",
        "## Arguments",
        table(("argument", "type", "default", "meaning"), rows),
        "## Costs in the observation",
        COSTS,
        "## Episode end",
        EPISODE_END,
        "## Information",
        INFORMATION,
    )


def yaml_reference() -> None:
    """Write the keys of an experiment, and the stanzas of the shipped files."""

    def keys(kind: type[Experiment] | type[Stage]) -> str:
        return table(
            ("key", "type", "default", "meaning"),
            (
                (
                    f"`{name}`",
                    in_words(field.rebuild_annotation()),
                    "required" if field.is_required() else f"`{field.default!r}`",
                    f"{field.description}." if field.description else "",
                )
                for name, field in kind.model_fields.items()
            ),
        )

    stanzas = []
    for env_id in ENVIRONMENTS:
        source = ExperimentFile.of(env_id)
        rows = (
            (
                f"`{name}`",
                f"`{stanza.get('agent', name)}`",
                f"{steps:,}" if (steps := stanza.get("total_timesteps")) else "",
            )
            for name, stanza in source.stanzas.items()
        )
        stanzas += [f"### {env_id}", table(("stanza", "agent", "steps"), rows)]
    write(
        "experiments/yaml.md",
        (DOCS / "_scripts" / "yaml.md").read_text(encoding="utf-8"),
        "## Keys of a stanza",
        keys(Experiment),
        "## Keys of a stage",
        keys(Stage),
        "## Shipped stanzas",
        *stanzas,
    )


def write_all() -> None:
    """Write all generated pages."""
    environments_index()
    shared_arguments()
    for env_id in ENVIRONMENTS:
        environment_page(env_id)
    yaml_reference()
