"""Prompts: one user turn through the model's chat template.

The shipped sets are the files of ``data/prompts``, whose texts were written for this project. Five are named after the
benchmarks that they resemble: ``mt_bench`` (chat), ``gsm8k`` (math), ``cnndm`` (long summaries), ``xsum`` (short
summaries) and ``humaneval`` (code); the others are ``json`` (structured output), ``translation``, ``questions``,
``retrieval`` (with passages), ``rewriting``, ``extraction``, ``dialogue`` (several turns) and ``long_context``. Each is
split into train, validation, test and final.

Other sets are read from ``{data_dir}/{name}/question.jsonl``, the format of published speculative-decoding evaluations,
of which the first turns are used. A name that ends in ``.json`` or ``.jsonl`` is a log of conversations
(``conversations.py``). Another name with a slash is a local folder or a data set on the hub, ``org/name``, optionally
with a configuration and a column, ``org/name@config:column`` (needs the ``datasets`` extra); the column holds texts,
lists of texts or chat messages.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spec_envs.files import DATA, at_home
from spec_envs.prompts.conversations import is_log, read_log
from spec_envs.prompts.questions import read_data_set, read_questions
from spec_envs.prompts.rows import FINAL, SPLITS
from spec_envs.prompts.templates import LONGEST, Refused, rendered
from spec_envs.text import Detokenizer, encodable

LOG = logging.getLogger(__name__)
SHIPPED = DATA / "prompts"


@dataclass(frozen=True)
class Prompt:
    """One user turn.

    Attributes:
        task: name of the task it belongs to.
        text: the turn itself.
        history: role and text of every turn before it.
        logged: True if it comes from a log or a data set. There some prompts cannot be given to a model, so they are
            left out instead of raising an error.
    """

    task: str
    text: str
    history: tuple[tuple[str, str], ...] = ()
    logged: bool = False


def load_prompts(names: str = "all", split: str = "train", data_dir: str | None = None) -> list[Prompt]:
    """Return prompts by name, in the order of their files.

    Args:
        names: names of sets, separated by commas; see ``sets_named``.
        split: ``"train"``, ``"validation"``, ``"test"``, ``"final"``, which is for published results only, or ``"all"``
            of them but the final one. Rows of a foreign file that state no split are divided by a hash of their text:
            six tenths train, one tenth validation, three tenths test.
        data_dir: folder of ``{name}/question.jsonl`` files; None for the shipped set.

    Raises:
        ValueError: unknown name or split, or a malformed file; the sentence names it.
    """
    if split not in (*SPLITS, FINAL, "all"):
        raise ValueError(f"split is {split!r}; expected one of {', '.join((*SPLITS, FINAL))}, all")
    prompts: list[Prompt] = []
    chosen = sets_named(names, data_dir)
    stems = [Path(name).stem for name in chosen]
    for name, file in chosen.items():
        task, path = name, at_home(name)
        if is_log(name):
            task = path.stem if stems.count(path.stem) == 1 else name
            turns = read_log(path)
        else:
            turns = read_questions(file) if file else read_data_set(name)
        prompts += [
            Prompt(task, t.text, t.history, logged=file is None)
            for t in turns
            if split == t.split or (split == "all" and t.split != FINAL)
        ]
    if not prompts:
        raise ValueError(f"the prompt sets {', '.join(chosen)} have no prompt in the split {split!r}")
    return prompts


def sets_named(names: str, data_dir: str | None = None) -> dict[str, Path | None]:
    """Return the prompt sets that ``names``, separated by commas, stand for: the file of each, or None for a log and a
    data set. ``"all"`` stands for every shipped set, or for every one below ``data_dir``.

    Raises:
        ValueError: unknown name, or the folder cannot be read or holds no prompts.
    """
    wanted = [name.strip() for name in names.split(",")]
    found = prompt_files(data_dir) if any("/" not in name and not is_log(name) for name in wanted) else {}
    chosen = list(dict.fromkeys(name for part in wanted for name in (found if part == "all" else [part])))
    if unknown := [name for name in chosen if name not in found and "/" not in name and not is_log(name)]:
        raise ValueError(f"no prompt set {', '.join(unknown)}; there are {', '.join(found)}")
    return {name: None if is_log(name) else found.get(name) for name in chosen}


def prompt_files(data_dir: str | None) -> dict[str, Path]:
    """Return the files of the prompt sets by name: those below ``data_dir``, or the shipped ones.

    Raises:
        ValueError: the folder cannot be read or holds no prompts.
    """
    if data_dir is None:
        return {path.stem: path for path in sorted(SHIPPED.glob("*.jsonl"))}
    try:
        files = {path.parent.name: path for path in sorted(at_home(data_dir).glob("*/question.jsonl"))}
    except OSError as error:
        raise ValueError(f"cannot read the folder {data_dir:.200}: {error.strerror or error}") from None
    if not files:
        raise ValueError(f"{data_dir} holds no prompts; expected NAME/question.jsonl below it")
    return files


def in_turn(prompts: Sequence[Prompt], size: int) -> list[Prompt]:
    """Return the prompts reordered so that tasks alternate, ``size`` prompts of each at a time."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.task, []).append(prompt)
    blocks = [[group[i : i + size] for i in range(0, len(group), size)] for group in groups.values()]
    return [p for turn in itertools.zip_longest(*blocks, fillvalue=()) for block in turn for p in block]


def encode_all(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], template: str | None = None, date: str | None = None
) -> Iterator[tuple[Prompt, list[int]]]:
    """Yield the prompts, each with its token ids as ``encode`` makes them.

    Prompts of a log or a data set that the template or the model does not take are left out; a warning is logged with
    their number.

    Raises:
        ValueError: another prompt cannot be encoded, or none is left.
    """
    refused: list[str] = []
    try:
        for prompt in prompts:
            try:
                ids = encode_prompt(tokenizer, prompt, template, date)
            except Refused as error:
                refused.append(str(error))
                if not prompt.logged or len(refused) == len(prompts):
                    refused.clear()
                    raise
                continue
            yield prompt, ids
    finally:
        if refused:
            LOG.warning("left out %d of %d prompts: %s", len(refused), len(prompts), refused[0])


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template: str | None = None, date: str | None = None
) -> list[int]:
    """Return the token ids of a prompt as ``encode`` makes them."""
    return encode(tokenizer, prompt.text, template, prompt.history, date)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    template: str | None = None,
    history: Sequence[tuple[str, str]] = (),
    date: str | None = None,
) -> list[int]:
    """Return the token ids of a user turn, up to the place where the answer begins.

    Halves of surrogate pairs, which no tokenizer takes, become ``U+FFFD``.

    Args:
        template: a Jinja chat template for models without one; ``"none"`` takes the text as it is.
        history: role and text of every turn before it.
        date: the day that the template is given, ``YYYY-MM-DD``; by default always the same one.

    Raises:
        ValueError: the text is empty or far too long, the model has no chat template and none is given, or its template
            does not take the prompt.
    """
    if not isinstance(text, str):
        raise ValueError(f"the prompt is {text!r}; expected a text")
    turns = [(role, encodable(said)) for role, said in (*history, ("user", text))]
    if not text.strip():
        raise Refused("the prompt is empty; expected a text")
    if (length := sum(len(said) for _, said in turns)) > LONGEST:
        raise Refused(f"the prompt has {length:,} characters; expected at most {LONGEST:,}")
    if template == "none":
        ids: list[int] = tokenizer("\n\n".join(said for _, said in turns))["input_ids"]
    else:
        ids = tokenizer(rendered(tokenizer, turns, template, date), add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id
    while begin is not None and ids[:2] == [begin, begin]:  # the text begins with it and the tokenizer adds it again
        ids = ids[1:]
    if not ids:
        raise Refused("the prompt has no tokens; expected a text that the tokenizer knows")
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens."""
    return Detokenizer.of(tokenizer)(ids)
