"""What a learner that goes on where it was killed writes down: JSONL, and the same in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from spec_envs.files import whole


class Journal:
    """Lines by step in ``log.jsonl`` and ``validation.jsonl`` of a folder, and TensorBoard events.

    Args:
        folder: of the run; None writes nothing.
        step, texts: where the run goes on: what was written of later texts is dropped, for it is done again.
        hyperparameters: shown in TensorBoard's HPARAMS tab.
    """

    def __init__(self, folder: Path | None, step: int, texts: int, hyperparameters: dict[str, Any]):
        self.folder, self.writer = folder, None
        if folder is None:
            return
        for name in ("log", "validation"):
            cut(folder / f"{name}.jsonl", texts)
        self.writer = SummaryWriter(str(folder / "events"), purge_step=step + 1)
        shown = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in hyperparameters.items()}
        if step == 0:
            self.writer.add_hparams(shown, {"dvi/accept_rate": 0.0}, run_name=".")

    def write(self, name: str, line: dict[str, Any]) -> None:
        """A line of ``log`` or ``validation``; it has a ``step``, and ``texts`` that were read."""
        if self.folder is None or self.writer is None:
            return
        path = self.folder / f"{name}.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"could not write {path}: {error.strerror or error}; free some space") from error
        prefix = "dvi" if name == "log" else name
        for key, value in line.items():
            if key != "step" and value is not None:
                self.writer.add_scalar(f"{prefix}/{key}", value, line["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def cut(path: Path, texts: int) -> None:
    """Drop lines of later texts, and one cut short; all where nothing was read, the first validation among them."""
    if not path.exists():
        return
    if texts == 0:
        path.unlink()
        return
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    with whole(path) as temporary:
        temporary.write_text("".join(line for line in lines if json.loads(line)["texts"] <= texts))
