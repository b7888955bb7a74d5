"""Chat templates. A template is a program that comes with a model, written by whoever made the model.

It runs in Jinja's sandbox, as transformers compiles it: no attributes of Python, no files, no imports. Here its time,
its memory and the length of its output are bounded, too (on Linux, and the time only in the main thread; one operation
on a huge integer cannot be interrupted). It is given the date of the settings and always the same random numbers, so
that a prompt depends on the settings only.
"""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from spec_envs.text import encodable, reason

DATE = "2026-01-01"  # that templates are given by default
LONGEST = 8_000_000  # characters of a prompt, more than any context has room for
SECONDS = 10.0  # of processor time for one prompt
MEMORY = 1 << 30  # bytes beyond those the process already has


class Refused(ValueError):
    """Raised for a prompt that a model cannot be given, while it may take others."""


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[tuple[str, str]],
    template: str | None = None,
    date: str | None = None,
    answer: bool = True,
) -> str:
    """Return the text that a chat template makes of a conversation, up to the place where the answer begins.

    Args:
        turns: role and text of each turn.
        template: in Jinja; None for the model's own.
        date: the day that the template is given, ``YYYY-MM-DD``; None for ``DATE``.
        answer: True if the text ends with the beginning of the model's answer.

    Raises:
        Refused: the template does not take these turns, or writes more than ``LONGEST`` characters.
        ValueError: there is no template, it is malformed or takes too much time or memory, or the day does not exist.
    """
    if template is None and tokenizer.chat_template is None:
        raise ValueError("the model has no chat template; give template= (Jinja), or template='none' for bare text")
    whose = f"the chat template of {tokenizer.name_or_path}" if template is None else "the chat template in template="
    today = day(date)
    context: dict[str, Any] = {
        **tokenizer.special_tokens_map,
        "messages": [{"role": role, "content": text} for role, text in turns],
        "tools": None,
        "documents": None,
        "add_generation_prompt": answer,
        "strftime_now": today.strftime,
    }
    state = random.getstate()
    random.seed(0)
    try:
        with bounded():
            text = encodable(_compile_jinja_template(tokenizer.get_chat_template(template)).render(context))
    except (MemoryError, TimeoutError) as error:
        raise ValueError(f"{whose} takes too much ({reason(error)}); give another one with template=") from None
    except TemplateSyntaxError as error:
        line = f"line {error.lineno}: {reason(error)}"
        raise ValueError(f"{whose} is malformed ({line}); give another one with template=") from None
    except Exception as error:  # a foreign program may raise anything
        raise Refused(f"{whose} does not take the prompt ({reason(error)})") from None
    finally:
        random.setstate(state)
    if len(text) > LONGEST:
        raise Refused(f"{whose} makes {len(text):,} characters of the prompt; expected at most {LONGEST:,}")
    return text


def day(date: str | None) -> datetime:
    """Return midnight of a day, by default of ``DATE``.

    Raises:
        ValueError: there is no such day, or it is not written as ``YYYY-MM-DD``.
    """
    try:
        return datetime.strptime(date or DATE, "%Y-%m-%d")
    except ValueError:
        raise ValueError(f"date is {date!r}; expected a day, such as {DATE!r}") from None


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the block to ``SECONDS`` of processor time and ``MEMORY`` bytes.

    Raises:
        MemoryError, TimeoutError: the block exceeded a limit.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    given = [limit for limit in (size + MEMORY, soft, hard) if limit != resource.RLIM_INFINITY]
    timed = threading.current_thread() is threading.main_thread()
    resource.setrlimit(resource.RLIMIT_AS, (min(given), hard))
    if timed:
        before = signal.signal(signal.SIGVTALRM, _too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 1.0)  # repeated in case Jinja catches the first
    try:
        yield
    except MemoryError:
        raise MemoryError(f"more than {MEMORY >> 20} MB") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"more than {SECONDS:g} s")
