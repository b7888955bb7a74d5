"""Files for visitors and services of the repository: they can be read, and name the package's version."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from spec_envs import __version__
from tests.support import ROOT

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_citation_and_changelog_have_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = f"\n## [{__version__}] - {citation['date-released']}\n"
    assert changes.index("\n## [Unreleased]\n") < changes.index(released)
    assert f"\n[{__version__}]: https://" in changes


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_and_no_more(path: Path) -> None:
    """Jobs that deploy or publish ask for what they need; every job has a limit of time."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] and (name in ("deploy", "publish")) == ("permissions" in job)
        assert all("@" in step["uses"] for step in job["steps"] if "uses" in step)


def test_workflow_runs_the_script_of_the_repository() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["checks"]["steps"][-1] == {"run": ".ci/run"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_have_what_the_service_asks_for(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert [set(link) for link in form["contact_links"]] == [{"name", "url", "about"}]
        return
    assert {"name", "description", "body"} <= set(form)
    fields = [field["id"] for field in form["body"]]
    assert len(fields) == len(set(fields)) and all(field["attributes"]["label"] for field in form["body"])


def test_every_link_of_contributing_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert len(links) > 5 and [link for link in links if not (ROOT / link).exists()] == []
