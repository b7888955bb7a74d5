"""YAML files of experiments: keyword arguments of the environment, and named stanzas; every key knows its line."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spec_envs import ENVIRONMENTS
from spec_envs.agents.yaml_text import Loader, parse_yaml
from spec_envs.checked import nearest
from spec_envs.settings import Keywords

FOLDER = Path(__file__).parent  # of the shipped files


@dataclass(frozen=True)
class ExperimentFile:
    """A YAML file of experiments.

    Attributes:
        name: file name, for messages.
        env: keyword arguments that all stanzas share.
        stanzas: settings of every stanza by its name, not checked yet.
    """

    name: str
    text: str
    env: Keywords
    stanzas: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, env_id: str, file: Path | None = None) -> ExperimentFile:
        """Return the shipped file of an environment, or ``file``.

        Raises:
            ValueError: there is no such environment, or the file is malformed; the sentence names file and line.
        """
        if env_id not in ENVIRONMENTS:
            raise ValueError(
                f"no environment {env_id!r}{nearest(env_id, ENVIRONMENTS)}; there are {', '.join(ENVIRONMENTS)}"
            )
        return cls.read(file or FOLDER / f"{env_id}.yml")

    @classmethod
    def read(cls, path: Path) -> ExperimentFile:
        """Read a file.

        Raises:
            ValueError: it has another form; the sentence names file and line.
        """
        try:
            text = path.read_text(encoding="utf-8")
            raw = parse_yaml(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path} ({error}); expected YAML in UTF-8") from None
        except ValueError as error:
            found = re.match(r"line (\d+): ", str(error))
            line, reason = (f":{found[1]}", str(error)[found.end() :]) if found else ("", str(error))
            raise ValueError(f"{path.name}{line} is not YAML as it is used here: {reason}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("agents"), dict) or not raw["agents"]:
            raise ValueError(f"{path} has no agents; expected env: and agents: at its top")
        check_form(raw, path.name, text)
        stanzas = {name: {**(stanza or {})} for name, stanza in raw["agents"].items()}
        for stanza in stanzas.values():
            stanza["env"] = stanza.get("env") or {}
        return cls(path.name, text, raw.get("env") or {}, stanzas)

    @property
    def first(self) -> str:
        """Name of the first stanza, which is trained if none is named."""
        return next(iter(self.stanzas))

    def place(self, *keys: tuple[str, ...]) -> str:
        """Return file and line of whichever of several nested keys is set."""
        return f"{self.name}:{line_of(self.text, *keys)}"


def check_form(raw: dict[str, Any], name: str, text: str) -> None:
    """Refuse unknown keys at the top, and anything but keys and values where they are expected.

    Raises:
        ValueError: the sentence names file and line.
    """
    if unknown := sorted(set(raw) - {"env", "agents"}, key=str):
        line = line_of(text, (str(unknown[0]),))
        raise ValueError(f"{name}:{line}: unknown key {unknown[0]!r}; expected env and agents")
    parts: dict[tuple[str, ...], Any] = {("env",): raw.get("env"), ("agents",): raw["agents"]}
    for stanza, settings in raw["agents"].items():
        parts["agents", str(stanza)] = settings
        if isinstance(settings, dict):
            parts["agents", str(stanza), "env"] = settings.get("env")
    for keys, part in parts.items():
        where = f"{name}:{line_of(text, keys)}: {'.'.join(keys)}"
        if part is not None and not isinstance(part, dict):
            raise ValueError(f"{where} is {part!r}; expected keys and values")
        if strange := [key for key in part or {} if not isinstance(key, str)]:
            raise ValueError(f"{where} has the key {strange[0]!r}, which is not text; put it in quotes")


@functools.lru_cache(8)
def composed(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text, which know their lines."""
    return yaml.compose(text, Loader)


def line_of(text: str, *keys: tuple[str, ...]) -> int:
    """Return the line of whichever of several nested keys a YAML text holds; otherwise the line of the deepest parent
    that it holds."""
    best = (False, 0, 1)
    for path in keys:
        node, line, depth = composed(text), 1, 0
        for key in path:
            if not isinstance(node, yaml.MappingNode):
                break
            pair = next(((k, v) for k, v in node.value if k.value == key), None)
            if pair is None:
                break
            line, node, depth = pair[0].start_mark.line + 1, pair[1], depth + 1
        best = max(best, (depth == len(path), depth, line))
    return best[2]
