"""Check that commands continue after they were killed at any moment (`spec-envs check chaos`).

Each command is killed repeatedly (SIGKILL, with all its children) and started again until it ends. Then its files are
compared with those of an undisturbed run. The moments are drawn from the time that the undisturbed run takes after its
first file. If a command ends before it is killed, it starts again in another folder. Prints a table and exits with 1 if
a command did not end, or made other files. With ten kills each, all cases take about an hour.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from spec_envs.arguments import POSITIVE, SEED, Parser, output_folder
from spec_envs.experiments.checks.chaos_cases import CASES, Case
from spec_envs.experiments.command import one_sentence
from spec_envs.files import TEMPORARY, held

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 20  # multiple of the undisturbed time after which a command is taken to hang
LEAST = 300.0  # seconds that every command is given at least
POLL = 0.01  # seconds


class Result(NamedTuple):
    """The outcome of one case.

    Attributes:
        seconds: duration of the undisturbed run.
        kills, ends: number of times that the command was killed, and that it ended.
        failed: the reason why the case failed; empty if it passed.
    """

    name: str
    seconds: float
    kills: int
    ends: int
    failed: str


class Undisturbed(NamedTuple):
    """An undisturbed run: seconds until its first file and until its end, and the summary of its files."""

    begin: float
    seconds: float
    made: Mapping[str, object]


def started(case: Case, folder: Path) -> subprocess.Popen[bytes]:
    """Start the command of a case in its own process group; its output is written to a file beside its folder."""
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *case.command(folder)],
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and all processes that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a command, and return True if it ended within so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def undisturbed(case: Case, folder: Path) -> Undisturbed:
    """Run a command once without killing it.

    Raises:
        ValueError: the command fails.
    """
    at, process, begin = time.monotonic(), started(case, folder), None
    try:
        while process.poll() is None:
            if begin is None and folder.exists() and any(folder.rglob("*")):
                begin = time.monotonic() - at
            time.sleep(POLL)
    finally:
        if process.poll() is None:
            end(process)
    seconds = time.monotonic() - at
    if process.returncode:
        raise ValueError(f"undisturbed, it ends with {process.returncode}: {last_line(folder)}")
    return Undisturbed(begin or 0.0, seconds, case.made(folder))


def last_line(folder: Path) -> str:
    """Return the last line that a command printed, at most 300 characters of it."""
    lines = folder.with_suffix(".log").read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "it printed nothing"


def compared(folder: Path, case: Case, expected: Mapping[str, object]) -> str:
    """Return how the files of a command differ from the expected ones; an empty text if they do not."""
    if left := sorted(path.name for path in folder.rglob(f"*{TEMPORARY}")):
        return f"temporary files are left: {', '.join(left)}"
    made = case.made(folder)
    differing = [name for name in dict.fromkeys([*expected, *made]) if made.get(name) != expected.get(name)]
    return f"it differs from the undisturbed run in {', '.join(differing)}" if differing else ""


def disturbed(case: Case, root: Path, usual: Undisturbed, kills: int, rng: random.Random, bar: tqdm) -> Result:
    """Kill a command ``kills`` times, and let it end after that.

    A command that ends from its start on before it is killed takes less time than the undisturbed run did: the moments
    are drawn from that time then, or a slow undisturbed run would let no command be killed.
    """
    killed, ends, folder = 0, 0, root / "0"
    while True:
        at, fresh, process = time.monotonic(), not folder.exists(), started(case, folder)
        moment = rng.uniform(0.9 * usual.begin, usual.seconds)
        try:
            done = ended(process, moment if killed < kills else max(LEAST, PATIENCE * usual.seconds))
        finally:
            if process.poll() is None:
                end(process)
        if not done and killed == kills:
            return Result(case.name, usual.seconds, killed, ends, f"it did not end after {killed} kills")
        if not done:
            killed += 1
            bar.update()
            continue
        failed = f"it ended with {process.returncode}: {last_line(folder)}" if process.returncode else ""
        ends += not failed
        if fresh and killed < kills:
            seconds = time.monotonic() - at
            usual = usual._replace(begin=usual.begin * seconds / usual.seconds, seconds=seconds)
        if failed := failed or compared(folder, case, usual.made):
            return Result(case.name, usual.seconds, killed, ends, f"after {killed} kills {failed}")
        shutil.rmtree(folder)
        if killed == kills:
            return Result(case.name, usual.seconds, killed, ends, "")
        folder = root / str(ends)


def tried(case: Case, root: Path, kills: int, seed: int) -> Result:
    """Return the outcome of one case. Its folder is kept if it fails."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    with tqdm(total=kills, desc=case.name, unit="kill") as bar:
        try:
            usual = undisturbed(case, root / "undisturbed")
            result = disturbed(case, root, usual, kills, random.Random(f"{seed}-{case.name}"), bar)
        except ValueError as error:
            return Result(case.name, 0.0, 0, 0, str(error))
    if not result.failed:
        shutil.rmtree(root)
    return result


def table(results: list[Result]) -> str:
    """Return the table of all outcomes."""
    lines = ["| case | undisturbed | kills | ends | |", "|---|---|---|---|---|"]
    lines += [f"| {r.name} | {r.seconds:.0f} s | {r.kills} | {r.ends} | {r.failed or 'same files'} |" for r in results]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=list(CASES),
        metavar="CASE",
        default=list(CASES),
        help=f"cases, of {', '.join(CASES)} (default all)",
    )
    parser.add_argument("--kills", type=POSITIVE, default=10, help="number of kills of each case (default 10)")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the moments (default 0)")
    parser.add_argument(
        "--root", type=output_folder, default=Path("runs/chaos"), help="folder of the cases (default runs/chaos)"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    with one_sentence():
        root = args.root.resolve()
        with held(root):
            results = [tried(CASES[name], root / name, args.kills, args.seed) for name in args.cases]
        print(table(results))
    if any(result.failed for result in results):
        sys.exit(f"error: cases failed; their files and what they printed are in {args.root}")


if __name__ == "__main__":
    main()
