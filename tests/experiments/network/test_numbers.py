"""Every network command refuses numbers out of range in one sentence, before a model is loaded."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from spec_envs.experiments.network import edge_cloud
from spec_envs.network import proxy
from spec_envs.network.cloud import __main__ as cloud
from spec_envs.network.edge import __main__ as edge
from tests.support.commands import run_command

CLOUD = {
    "--port": ["-1", "65536"],
    "--sessions": ["0", "-3", "99999999999"],
    "--max-tokens": ["1", "-5"],
    "--max-message": ["10", "0", "99999999999"],
    "--idle": ["nan", "inf", "0", "-1", "1e-300"],
    "--grace": ["-5", "nan", "inf"],
    "--greeting": ["0", "nan", "-2", "inf"],
    "--per-address": ["0", "-1"],
    "--chunk": ["0", "63", "-64"],
    "--threads": ["0", "-1", "999999"],
}
EDGE = {
    "--port": ["0", "-1", "65536"],
    "--patience": ["nan", "inf", "0", "-1"],
    "--k": ["0", "65", "-1"],
    "--max-new-tokens": ["0", "-1"],
    "--seed": ["-1"],
}
EDGE_CLOUD = {"--link": ["constant:up=nan,down=1,rtt=1", "nowhere"]}  # test_commands.py tests its numbers
PROXY = {"--seed": ["-1"], "--to": ["0"], "--link": ["constant:up=-1,down=1,rtt=1", "constant:up=1,down=1,rtt=nan"]}
COMMANDS: list[tuple[Any, list[str], dict[str, list[str]]]] = [
    (cloud, [], CLOUD),
    (edge, ["ws://127.0.0.1:1"], EDGE),
    (edge_cloud, [], EDGE_CLOUD),
    (proxy, ["--listen", "0", "--to", "1", "--link", "lte"], PROXY),
]
CASES = [
    pytest.param(module, [*given, f"{option}={value}"], option, id=f"{module.__name__}{option}={value}")
    for module, given, options in COMMANDS
    for option, values in options.items()
    for value in values
]


@pytest.mark.parametrize(("module", "arguments", "option"), CASES)
def test_number_out_of_range_is_refused(
    module: Any,
    arguments: list[str],
    option: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    monkeypatch.setenv("SPEC_ENVS_TOKEN", "")
    with pytest.raises(SystemExit) as end:
        module.main()
    code = end.value.code
    sentence = code if isinstance(code, str) else capsys.readouterr().err.strip()
    assert sentence.startswith("error: ") and sentence.count("\n") == 0 and len(sentence) < 400
    assert option.removeprefix("--") in sentence and ("expected" in sentence or "is to be" in sentence)


@pytest.mark.parametrize("value", ["0", "nan", "inf", "-1", "1e-300", "x"])
def test_invalid_time_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--listen", "0", "--to", "1", "--link", "lte", f"--interval-ms={value}"]
    with pytest.raises(SystemExit):
        run_command(monkeypatch, proxy, *arguments)
    assert "is not a time; expected" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "65536", "x", "host:", "²", "9" * 5000])
def test_invalid_address_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_command(monkeypatch, proxy, f"--listen={value}", "--to", "1", "--link", "lte")
    assert "is not an address; expected" in capsys.readouterr().err
