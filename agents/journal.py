"""The records of a learner that resumes after it was killed: JSONL, and the same in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from spec_envs.files import parse_json, whole


class Journal:
    """Lines by step in ``log.jsonl`` and ``validation.jsonl`` of a folder, and TensorBoard events.

    Args:
        folder: the run's folder; None writes nothing.
        step, texts: where the run continues; lines of later texts are dropped, because those texts are read again.
        hyperparameters: shown in TensorBoard's HPARAMS tab.
        prefix: TensorBoard shows a figure of the log as ``prefix/figure``.
        figure: name of the log's figure that TensorBoard shows beside the hyper-parameters.
    """

    def __init__(
        self,
        folder: Path | None,
        step: int,
        texts: int,
        hyperparameters: dict[str, Any],
        prefix: str,
        figure: str,
    ):
        self.folder, self.writer, self.prefix = folder, None, prefix
        if folder is None:
            return
        for name in ("log", "validation"):
            drop_later_lines(folder / f"{name}.jsonl", texts)
        self.writer = SummaryWriter(str(folder / "events"), purge_step=step + 1)
        shown = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in hyperparameters.items()}
        if step == 0:
            self.writer.add_hparams(shown, {f"{prefix}/{figure}": 0.0}, run_name=".")

    def write(self, name: str, line: dict[str, Any]) -> None:
        """Write a line of ``log`` or ``validation``; it has a ``step``, and ``texts`` that were read."""
        if self.folder is None or self.writer is None:
            return
        append_line(self.folder / f"{name}.jsonl", line)
        prefix = self.prefix if name == "log" else name
        for key, value in line.items():
            if key != "step" and value is not None:
                self.writer.add_scalar(f"{prefix}/{key}", value, line["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of figures to a JSONL file, whole or not at all; a figure that is not finite is written as null.

    Raises:
        OSError: the file could not be written.
    """
    figures = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    data = (json.dumps(figures, allow_nan=False) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(data) < len(data):  # a disk that is nearly full takes a part
                    file.write(data[file.tell() - size :])
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}; free some space") from error


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the wanted lines of a JSONL file; the others and a truncated last line are removed.

    Raises:
        ValueError: a line is damaged; the sentence names file and line.
    """
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            if wanted(parse_json(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged in line {number} ({error}); delete it; the run then continues, without the earlier "
                "lines"
            ) from None
    with whole(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def drop_later_lines(path: Path, texts: int) -> None:
    """Remove the lines of texts after the first ``texts``, and a truncated last line; if ``texts`` is 0, delete the file,
    because the first validation is repeated, too."""
    if texts == 0:
        path.unlink(missing_ok=True)
    else:
        keep_lines(path, lambda line: line["texts"] <= texts)
