"""The files and progress that training keeps and shows besides the agent itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINT = Path("last") / "checkpoint.pt"


@dataclass(frozen=True)
class Run:
    """A training run, as ``learn`` sees it. Without a folder nothing is written.

    Attributes:
        folder: gets checkpoints (``last/``), the best agent (``best/``), ``log.jsonl`` and TensorBoard events; training
            continues from the checkpoint that lies there.
        checkpoint_freq: environment steps between checkpoints.
        eval_freq: environment steps between validations; 0 makes none.
        validate: returns figures of the agent as it is, by name. Of several agents the one with the highest
            ``"speedup"`` is kept, where there is that figure.
        progress_bar: shows a progress bar.
    """

    folder: Path | None = None
    checkpoint_freq: int = 2048
    eval_freq: int = 0
    validate: Callable[[Any], dict[str, float]] | None = None
    progress_bar: bool = False

    @property
    def begun(self) -> bool:
        """True where the folder holds a checkpoint to continue from."""
        return self.folder is not None and (self.folder / CHECKPOINT).exists()
