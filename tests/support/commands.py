"""Commands that are run in this process."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest


def run_command(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *arguments: object) -> None:
    """Call a command's ``main`` with these command-line arguments."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()
