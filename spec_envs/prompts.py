"""Prompts: one user turn through the model's chat template.

The shipped set has five kinds of task named after the benchmarks whose kind they are (the texts were written for this
project): ``mt_bench`` (chat), ``gsm8k`` (math), ``cnndm`` (long summaries), ``xsum`` (short summaries) and
``humaneval`` (code), and one more that only its name brings in: ``json`` (structured output). Each is split into train,
validation and test. Other sets are read from
``{data_dir}/{name}/question.jsonl``, the format of published speculative-decoding evaluations. A name that ends in
``.json`` or ``.jsonl`` is a log of conversations (``conversations.py``); another name with a slash is a data set on the
hub, ``org/name``, optionally with a configuration and a column, ``org/name@config:column`` (needs the ``datasets`` extra).
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from spec_envs.conversations import is_log, read_log
from spec_envs.text import Detokenizer

SHIPPED = Path(__file__).parent / "data" / "prompts"
TASKS = ("mt_bench", "gsm8k", "cnndm", "xsum", "humaneval")
FURTHER = ("json",)  # shipped, but not part of "all"
SPLITS = ("train", "validation", "test")
COLUMNS = ("turns", "prompt", "question", "instruction", "article", "document", "text")  # of data sets on the hub


@dataclass(frozen=True)
class Prompt:
    """One user turn, the task it belongs to, what was said before it (pairs of role and text), and whether it is from a
    log of conversations."""

    task: str
    text: str
    history: tuple[tuple[str, str], ...] = ()
    logged: bool = False


def load_prompts(names: str = "all", split: str = "train", data_dir: str | None = None) -> list[Prompt]:
    """Prompts by name, in the order of their files.

    Args:
        names: set names separated by commas; ``"all"`` among them is every local set there is (of the shipped ones, those
            of ``TASKS``).
        split: ``"train"``, ``"validation"`` or ``"test"``. Rows of a foreign file that state no split are divided
            by a hash of their text: six tenths train, one tenth validation, three tenths test.
        data_dir: folder of ``{name}/question.jsonl`` files; None for the shipped set.

    Raises:
        ValueError: unknown name or split, or a malformed file; the sentence names it.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}, all")
    wanted = [name.strip() for name in names.split(",")]
    found = prompt_files(data_dir) if any("/" not in name and not is_log(name) for name in wanted) else {}
    every = [name for name in found if data_dir is not None or name in TASKS]
    chosen = list(dict.fromkeys(name for part in wanted for name in (every if part == "all" else [part])))
    if unknown := [name for name in chosen if name not in found and "/" not in name and not is_log(name)]:
        raise ValueError(f"no prompt set {', '.join(unknown)}; there are {', '.join(found)}")
    prompts: list[Prompt] = []
    stems = [Path(name).stem for name in chosen]
    for name in chosen:
        if is_log(name):
            path = Path(name).expanduser()
            task = path.stem if stems.count(path.stem) == 1 else name
            turns = [t for t in read_log(path) if split in (t.split or hashed_split(t.opening), "all")]
            prompts += [Prompt(task, turn.text, turn.history, logged=True) for turn in turns]
            continue
        rows = read_questions(found[name]) if name in found else read_hub(name)
        prompts += [Prompt(name, text) for text, own in rows if split in (own, "all")]
    if not prompts:
        raise ValueError(f"the prompt sets {', '.join(chosen)} have no prompt in the split {split!r}")
    return prompts


def prompt_files(data_dir: str | None) -> dict[str, Path]:
    """Prompt sets by name."""
    if data_dir is None:
        return {name: SHIPPED / f"{name}.jsonl" for name in (*TASKS, *FURTHER)}
    files = {path.parent.name: path for path in sorted(Path(data_dir).expanduser().glob("*/question.jsonl"))}
    if not files:
        raise ValueError(f"{data_dir} holds no prompts; expected NAME/question.jsonl below it")
    return files


def read_questions(path: Path) -> list[tuple[str, str]]:
    """First turns and splits of a question.jsonl file."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["turns"][0]
            split = row.get("split") or hashed_split(text)
        except (json.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(f'{path}:{number} is not a question; expected {{"turns": ["…"]}} on one line') from None
        rows.append((text, split))
    return rows


def read_hub(name: str) -> list[tuple[str, str]]:
    """Texts and splits of a data set on the hub (``org/name@config:column``, both optional), or of a local folder."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{name} is a data set on the hub: install the extra `datasets`, as in pip install -e '.[datasets]'"
        ) from None
    place, _, column = name.partition(":")
    identifier, _, configuration = place.partition("@")
    try:
        splits = load_dataset(identifier, configuration or None)
    except Exception as error:  # the library raises many kinds
        raise ValueError(
            f"cannot load the data set {identifier!r} from the hub: {str(error).splitlines()[0]}"
        ) from None
    columns = next(iter(splits.values())).column_names
    column = column or next((c for c in COLUMNS if c in columns), "")
    if column not in columns:
        raise ValueError(f"{identifier} has no column {column!r} of prompts; name one: {place}:{'|'.join(columns)}")
    texts = [row[column] for part in splits.values() for row in part]
    texts = [text[0] if isinstance(text, list) else text for text in texts]
    return [(text, hashed_split(text)) for text in texts]


def hashed_split(text: str) -> str:
    """A split that depends on the text only."""
    tenth = zlib.crc32(text.encode()) % 10
    return "train" if tenth < 6 else "validation" if tenth < 7 else "test"


def in_turn(prompts: Sequence[Prompt], size: int) -> list[Prompt]:
    """Prompts with their tasks in turn, ``size`` of each, as long as there are any."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.task, []).append(prompt)
    blocks = [[group[i : i + size] for i in range(0, len(group), size)] for group in groups.values()]
    return [p for turn in itertools.zip_longest(*blocks, fillvalue=()) for block in turn for p in block]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: str | None = None) -> list[int]:
    """Token ids of a prompt; see ``encode``."""
    return encode(tokenizer, prompt.text, template, prompt.history)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    template: str | None = None,
    history: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Token ids of a user turn, up to the place where the answer begins.

    Args:
        template: a Jinja chat template for models without one; ``"none"`` takes the text as it is.
        history: roles and texts of what was said before.

    Raises:
        ValueError: the model has no chat template and none is given.
    """
    if template == "none":
        return tokenizer("\n\n".join([*(said for _, said in history), text]))["input_ids"]
    if template is None and tokenizer.chat_template is None:
        raise ValueError("the model has no chat template; give template= (Jinja), or template='none' for bare text")
    turns = [{"role": role, "content": said} for role, said in (*history, ("user", text))]
    encoded: Any = tokenizer.apply_chat_template(turns, chat_template=template, add_generation_prompt=True)
    return encoded["input_ids"]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens."""
    return Detokenizer.of(tokenizer)(ids)
