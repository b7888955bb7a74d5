"""The check of all stanzas and shipped agents: its cases, and its report and resumption."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from spec_envs import ENVIRONMENTS
from spec_envs.experiments.checks import zoo as zoo_check
from spec_envs.experiments.checks.zoo import RECORDED, SHIPPED, Case, Options, Row, cases, check, sampled, shrunk

ALL = cases()


def test_cases_cover_every_environment_and_shipped_agents() -> None:
    assert {case.env_id for case in ALL} == set(ENVIRONMENTS)
    assert len(ALL) == len(set(ALL)) > 80
    assert [case.env_id for case in ALL if case.stanza == SHIPPED]


@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_shrunk_stanzas_are_valid(env_id: str) -> None:
    for case in ALL:
        if case.env_id == env_id and case.stanza != SHIPPED:
            small = shrunk(*case, Options(priced=True))
            assert small.total_timesteps <= 64 and small.test_prompts == 2 and small.record in ([], RECORDED)
            assert small.env.get("target", "smollm2-135m") == "smollm2-135m"


def test_sample_covers_environments_and_obeys_seed() -> None:
    found = sampled(ALL, len(ENVIRONMENTS), seed=1)
    assert {case.env_id for case in found if case.stanza != SHIPPED} == set(ENVIRONMENTS)
    assert [case for case in found if case.stanza == SHIPPED] == [case for case in ALL if case.stanza == SHIPPED]
    assert found == sampled(ALL, len(ENVIRONMENTS), seed=1) != sampled(ALL, len(ENVIRONMENTS), seed=2)
    assert set(sampled(ALL, 10_000, seed=0)) == set(ALL)


def test_continues_after_interrupt_and_reports_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[Case] = []
    broken = {"SpecK-v0/svip": "ValueError: it is broken"}

    def one(case: Case, root: Path, options: Options) -> Row:
        tried.append(case)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return Row(case, 1.0, broken.get("/".join(case), ""))

    monkeypatch.setattr(zoo_check, "check", one)
    monkeypatch.setattr(
        zoo_check, "cases", lambda: [Case("SpecK-v0", name) for name in ("ppo", "svip", "ucb", "fixed")]
    )
    monkeypatch.setattr(sys, "argv", ["zoo_check", "--root", str(tmp_path / "zoo")])
    with pytest.raises(SystemExit):
        zoo_check.main()
    with pytest.raises(SystemExit) as ended:
        zoo_check.main()
    assert ended.value.code == 1
    assert [case.stanza for case in tried] == [
        "ppo",
        "svip",
        "ucb",
        "svip",
        "ucb",
        "fixed",
    ]  # cases that passed are not repeated
    assert "| SpecK-v0 | svip | 1 | ValueError: it is broken |" in (shown := capsys.readouterr().out)
    assert "3 of 4 passed" in shown
    monkeypatch.setattr(zoo_check, "cases", lambda: [Case("SpecK-v0", "ppo")])
    zoo_check.main()  # after a completed check the next one starts from the beginning
    assert len(tried) == 7 and "1 of 1 passed" in capsys.readouterr().out


@pytest.mark.model
def test_check_of_stanza_and_shipped_agent(tmp_path: Path) -> None:
    for case in (Case("SpecK-v0", "svip"), Case("SpecK-v0", SHIPPED)):
        assert check(case, tmp_path, Options(priced=True)).failed == ""
    assert (tmp_path / "SpecK-v0" / "svip-0" / "results.md").exists()
    assert "error" not in (log := (tmp_path / "SpecK-v0" / "svip.log").read_text()) and "| svip " in log
    assert "NoSuch" in check(Case("SpecK-v0", "NoSuch"), tmp_path, Options()).failed
    assert "Traceback" in (tmp_path / "SpecK-v0-NoSuch-failed.txt").read_text()
