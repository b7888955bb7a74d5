"""Record a trace (`spec-envs trace SpecDepth-v0`): the target's own texts, and at each of their positions the whole
tree or chain that the drafter drafts there. A trace of trees serves SpecDepth-v0, SpecBudget-v0 and SpecTree-v0, a trace of
chains SpecK-v0; `trace=FOLDER` replays it exactly (`spec_envs/decoding/traces/trace.py`). For SpecDrafter-v0 a trace of
every drafter is recorded over the same texts, in folders side by side. SpecTopK-v0 has traces of
another kind: `spec-envs trace SpecTopK-v0 --help`.

Each text is written as soon as it is recorded, so that the same command continues after it was killed. `--shard 0/4`
records a quarter of the texts, for several machines that share a disk. Without it the remaining texts are recorded and
the trace is assembled.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spec_envs import ENVIRONMENTS
from spec_envs.arguments import (
    TOKENS,
    Parser,
    Refused,
    add_model_arguments,
    input_folder,
    nonempty,
    output_folder,
    whole_number,
)
from spec_envs.controls import CONTROLS, make_control
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.traces.arrays import read_npz
from spec_envs.decoding.traces.files import COLUMNS, MANIFEST, VERSIONS, Manifest, Recorded, joined, write_folder
from spec_envs.decoding.traces.portfolio import CONTENTS, PortfolioTrace, write_contents
from spec_envs.decoding.traces.recorder import Columns, Recorder, block_of, kind_of
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.measure.encoding import to_json
from spec_envs.experiments.measure.machine import machine, weights_sha256
from spec_envs.experiments.measure.price_list import price_list
from spec_envs.experiments.traces.plan import TEXTS, Plan, default_folder
from spec_envs.files import held, whole
from spec_envs.prompts.templates import DATE

LOG = logging.getLogger(__name__)

KEYWORDS = (
    "target",
    "drafter",
    "device",
    "dtype",
    "prompts",
    "date",
    "max_new_tokens",
)  # of the environment, as options
DOING, SHARDS = "recording a trace", "texts/shard-*"
LARGEST_TEXT = 2**30  # most bytes of a text's columns


def recorded(plan: Plan, folder: Path, written: Path | None = None) -> Trace:
    """Return the trace of a plan for one drafter in a folder; what is missing there is recorded first.

    Args:
        plan: of the trace.
        folder: of the trace.
        written: folder of the same texts with another drafter, which the target does not write again.

    Raises:
        ValueError: the folder belongs to another plan, or its trace is damaged.
    """
    with held(folder, DOING):
        plan.claim(folder)
        if not (folder / MANIFEST).exists():
            for part in folder.glob(SHARDS):  # wait for other processes that still record
                with held(part, "recording a shard"):
                    pass
            record_texts(plan, folder, written=written)
            assemble(plan, folder)
        shutil.rmtree(folder / "texts", ignore_errors=True)
    return Trace.load(folder)


def all_recorded(plan: Plan, folder: Path) -> Trace | PortfolioTrace:
    """Return the trace of a plan in a folder, or the traces of each of its drafters; see ``recorded``."""
    if not plan.parts:
        return recorded(plan, folder)
    with held(folder, DOING):
        plan.claim(folder)
    written = None
    for place, part in zip(places_of(plan).values(), plan.parts.values(), strict=True):
        recorded(part, folder / place, written)
        written = written or folder / place
    with held(folder, DOING):
        write_contents(folder, places_of(plan))
    return PortfolioTrace.load(folder)


def places_of(plan: Plan) -> dict[str, str]:
    """Return the name of the folder of each drafter's trace, by the drafter's name."""
    return {name: f"{i}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', Path(name).name)}" for i, name in enumerate(plan.parts)}


def recorded_by_default(plan: Plan, root: Path = Path("runs")) -> Trace | PortfolioTrace:
    """Return the trace of a plan in its default folder; several processes may ask for it at the same time."""
    while True:
        folder = default_folder(plan, root)
        with held(folder, DOING):
            if ours := folder == default_folder(plan, root):  # no process has claimed it for another plan in between
                plan.claim(folder)
        if ours:
            return all_recorded(plan, folder)


def is_recorded(plan: Plan, root: Path) -> bool:
    """Return True if the trace of a plan is in its default folder."""
    return (default_folder(plan, root) / (CONTENTS if plan.parts else MANIFEST)).exists()


def record_shard(plan: Plan, folder: Path, shard: tuple[int, int], written: Path | None = None) -> None:
    """Record one of several shards, while other processes record the others."""
    if plan.parts:
        with held(folder, DOING):
            plan.claim(folder)
        for place, part in zip(places_of(plan).values(), plan.parts.values(), strict=True):
            record_shard(part, folder / place, shard, written)
            written = written or folder / place
        return
    with ExitStack() as stack:
        with held(folder, DOING):
            plan.claim(folder)
            if (folder / MANIFEST).exists():
                return
            stack.enter_context(held(folder / "texts" / f"shard-{shard[0]}-{shard[1]}", "recording this shard"))
        record_texts(plan, folder, shard, written)


def record_texts(plan: Plan, folder: Path, shard: tuple[int, int] = (0, 1), written: Path | None = None) -> None:
    """Record the texts ``shard[0]``, ``shard[0] + shard[1]``, … that are not recorded yet; see ``recorded``."""
    todo = [(i, prompt) for i, (_, prompt) in enumerate(plan.chosen()) if not text_file(folder, i).exists()]
    todo = [(i, prompt) for i, prompt in todo if i % shard[1] == shard[0]]
    if not todo:
        return
    (folder / "texts").mkdir(exist_ok=True)
    decoder = plan.decoder()
    recorder = Recorder(decoder)
    for i, prompt in tqdm(todo, desc=f"recording {kind_of(decoder)}s of {plan.settings['drafter']}", unit="text"):
        columns = recorder.record(prompt.ids, plan.max_new_tokens, text_in(written, i, prompt.ids))
        with whole(text_file(folder, i)) as path, path.open("wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]


def text_in(folder: Path | None, i: int, prompt: Sequence[int]) -> Columns | None:
    """Return the tokens of text ``i`` and their gaps, if a folder has them, from a trace or from a text's own file."""
    if folder is None:
        return None
    if (folder / MANIFEST).exists():
        trace = Trace.load(folder)
        text = trace.by_prompt.get(tuple(prompt))
        rows = None if text is None else slice(*trace.starts[text : text + 2].tolist())
        return None if rows is None else {name: trace.columns[name][rows] for name in ("tokens", "gaps")}
    return read_npz(text_file(folder, i), LARGEST_TEXT) if text_file(folder, i).exists() else None


def text_file(folder: Path, i: int) -> Path:
    """Return the file that keeps a text until the trace is assembled."""
    return folder / "texts" / f"{i:05d}.npz"


def assemble(plan: Plan, folder: Path) -> None:
    """Assemble the trace of all recorded texts, with the costs of forwards on this machine. Texts that end with their
    first token are left out."""
    decoder, kept, parts = plan.decoder(), [], []
    for i, (split, prompt) in enumerate(plan.chosen()):
        columns = read_text(text_file(folder, i), kind_of(decoder))
        if len(columns["tokens"]) > 1:
            kept.append(Recorded(prompt.task, split, list(prompt.ids), len(columns["tokens"])))
            parts.append(columns)
    if not parts:
        raise ValueError("every text ends with its first token: there is nothing to record; give other prompts")
    settings, block = plan.settings, block_of(decoder)
    manifest = Manifest(
        version=VERSIONS[kind_of(decoder)],
        kind=kind_of(decoder),
        target=plan.target,
        drafter=settings["drafter"],
        fingerprints=weights_sha256(plan.target, settings["drafter"]),
        dtype=decoder.dtype,
        template=plan.env.get("template"),
        prompts=settings["prompts"],
        max_new_tokens=plan.max_new_tokens,
        width=decoder.tree.width,
        max_depth=decoder.max_depth,
        vocab=decoder.verifier.vocab,
        context=decoder.context,
        eos=sorted(decoder.eos),
        costs=costs_of(plan, decoder),
        made_with=to_json(machine(decoder)),
        texts=kept,
        arrays={},
        date=settings["date"],
        block_rows=None if block is None else block.rows,
        whole_block=block is not None and block.whole,
    )
    write_folder(Trace(folder, manifest, joined(parts, manifest.kind)))


def read_text(path: Path, kind: str) -> Columns:
    """Return the columns of a recorded text.

    Args:
        kind: kind of the trace, ``"tree"`` or ``"chain"``.

    Raises:
        ValueError: the file is damaged, or another shard has not written it yet.
    """
    try:
        columns = read_npz(path, LARGEST_TEXT)
        if set(columns) != set(COLUMNS[kind]) or len({len(column) for column in columns.values()}) != 1:
            raise ValueError(f"it does not hold the columns of a {kind}, each of one length")
        return columns
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}); delete it and run the command again") from None


def costs_of(plan: Plan, decoder: Decoder) -> dict[str, dict[str, float]]:
    """Return what forwards cost on this machine, as a manifest has it."""
    texts = plan.chosen()
    prompts = [prompt for split, prompt in texts if split == "train"] or [prompt for _, prompt in texts]
    curves = price_list(decoder, make_control(plan.env_id, plan.env), prompts, plan.max_new_tokens).table.curves
    return {part: {str(n): seconds for n, seconds in curve.items()} for part, curve in curves.items()}


def shard_of(text: str) -> tuple[int, int]:
    """Return the numbers of a shard ``"i/n"``."""
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and int(part) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shard; expected i/n with i from 0 to n-1, such as 0/4")
    return int(part), int(count)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    traced = [env_id for env_id in ENVIRONMENTS if CONTROLS[env_id].trace_kind]
    parser.add_argument("env", choices=traced, help=f"environment id: {', '.join(traced)}", metavar="env")
    add_model_arguments(parser, drafter="EAGLE-3 head for trees, drafter of chains, or several by commas")
    parser.add_argument(
        "--prompts", type=nonempty, default="all", help="prompt sets, separated by commas (default all)"
    )
    parser.add_argument(
        "--data-dir", type=input_folder, help="folder of NAME/question.jsonl files (default: the shipped prompts)"
    )
    parser.add_argument("--date", default=DATE, help=f"date for chat templates that write it (default {DATE})")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=96, help="most new tokens per text (default 96)")
    parser.add_argument(
        "--depth",
        type=whole_number(0),
        help="expansions of a tree (default 12), or tokens of a chain less one (default 15); not for SpecDrafter-v0",
    )
    parser.add_argument(
        "--texts",
        type=whole_number(0),
        nargs=3,
        default=TEXTS,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help=f"numbers of texts (default {' '.join(map(str, TEXTS))})",
    )
    parser.add_argument(
        "--shard", type=shard_of, help="i/n: record only every n-th text from i on, and do not assemble the trace"
    )
    parser.add_argument(
        "--out", type=output_folder, help="folder (default runs/traces/TARGET-KIND; KIND is tree, chain or portfolio)"
    )
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    env = {name: vars(args)[name] for name in KEYWORDS}
    env["data_dir"] = str(args.data_dir) if args.data_dir else None
    kind = CONTROLS[args.env].trace_kind
    if args.depth is not None and kind == "portfolio":
        raise Refused(f"--depth is not for {args.env}, whose drafts are as long as its sizes and depths")
    if args.depth is not None:
        env |= {"k_max": args.depth + 1} if kind == "chain" else {"max_depth": args.depth}
    with one_sentence("interrupted; the same command continues with the next text"):
        plan = Plan(args.env, env, tuple(args.texts))
        if not args.shard and not args.out:
            report(args.env, recorded_by_default(plan))
            return
        folder = args.out or default_folder(plan)
        if args.shard:
            record_shard(plan, folder, args.shard)
            LOG.info(f"{folder}: shard {args.shard[0]} of {args.shard[1]} is recorded")
            return
        report(args.env, all_recorded(plan, folder))


def report(env_id: str, trace: Trace | PortfolioTrace) -> None:
    """Print what was recorded, and how to replay it."""
    folder, ties = trace.folder, int(trace.ties().sum())
    size = sum(path.stat().st_size for path in folder.rglob("*.npy"))
    print(f"{folder}: {len(trace.texts)} texts, {trace.rows} positions, {ties} near-ties, {size / 1e6:.0f} MB")
    print(f'replay it with gym.make("{env_id}", trace="{folder}")')


if __name__ == "__main__":
    main()
