"""The YAML of this project's files: one mapping or value, every key once, and no more nodes than it appears to have."""

from __future__ import annotations

import re
from typing import Any

import yaml

MOST_NODES = 20_000  # with every alias written out
DEEPEST = 50


class Loader(yaml.SafeLoader):
    """Reads true, false, null and decimal or hexadecimal numbers; everything else (on, no, 1:30, 017, 2026-01-01) is
    text.

    It refuses a mapping that has a key twice.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the node of a mapping.

        Raises:
            yaml.MarkedYAMLError: a key stands twice in it.
        """
        node = super().compose_mapping_node(anchor)
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} stands twice, first in line {seen[name]}",
                    problem_mark=key.start_mark,
                )
            seen[name] = key.start_mark.line + 1
        return node


Loader.yaml_implicit_resolvers = {}  # instead of those of YAML 1.1
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.(inf|Inf|INF))|\.[0-9][0-9_]*([eE][-+][0-9]+)?|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: it is not YAML, has a key twice, is nested too deeply, or aliases make it too large; the sentence
            begins with the line where that is known.
    """
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        measure(node, {}, 1)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{place}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # the last two: a scalar does not fit its tag
        raise ValueError(str(error).splitlines()[0]) from None


def measure(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many nodes there are with every alias written out.

    Args:
        known: counts of the nodes seen so far, by id; extended here.

    Raises:
        yaml.MarkedYAMLError: there are too many nodes, or they are nested too deeply.
    """
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MOST_NODES + 1  # for now: an alias of a node within itself has no end
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    count = 1
    if not isinstance(node, yaml.ScalarNode):
        count += sum(measure(part, known, depth + 1) for part in inner)
    if count > MOST_NODES or depth > DEEPEST:
        problem = "it is nested too deeply" if depth > DEEPEST else "it holds too much, aliases written out"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    known[id(node)] = count
    return count
