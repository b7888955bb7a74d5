"""Write what is generated of the documentation: whole pages, and what pages say about agents and drafters' text.

All but the commands' help, which depends on the version of Python, is committed, so that it can be read in the
repository; `make docs` writes it again, and a test compares.
"""

from __future__ import annotations

from _scripts import agents, drafters, pages, text
from spec_envs import ENVIRONMENTS

DOCS = pages.DOCS
DRAFTERS = "guides/training-drafters.md"


def generated() -> dict[str, str]:
    """Return the text of every page that is committed and wholly or partly generated, by its place in docs/."""
    return {
        "environments/index.md": pages.environments_index(),
        f"environments/{pages.SHARED}": pages.shared_arguments(),
        **{f"environments/{env_id}.md": pages.environment_page(env_id) for env_id in ENVIRONMENTS},
        "experiments/yaml.md": pages.yaml_reference(),
        DRAFTERS: text.filled(drafters.filled((DOCS / DRAFTERS).read_text(encoding="utf-8"))),
        **{
            str(path.relative_to(DOCS)): agents.filled(path.read_text(encoding="utf-8"))
            for path in sorted((DOCS / "agents").glob("*.md"))
        },
    }


def write_all() -> None:
    """Write all generated pages; those that are unchanged are left alone, so that Sphinx does not read them again."""
    for place, content in (generated() | {"experiments/commands.md": pages.commands()}).items():
        path = DOCS / place
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
