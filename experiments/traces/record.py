"""Record a trace (`make trace ENV=SpecDepth-v0`): the target's own texts, and at each of their positions the whole tree
or chain that the drafter drafts there. A trace of trees serves SpecDepth-v0, SpecBudget-v0 and SpecTree-v0, a trace of
chains SpecK-v0; `trace=FOLDER` replays it exactly (`spec_envs/decoding/traces/trace.py`).

Each text is written as soon as it is recorded, so that the same command continues after it was killed. `--shard 0/4`
records a quarter of the texts, for several machines that share a disk. Without it the remaining texts are recorded and
the trace is assembled.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spec_envs import ENVIRONMENTS
from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.arguments import TOKENS, Parser, add_model_arguments, input_folder, nonempty, output_folder, whole_number
from spec_envs.arrays import read_npz
from spec_envs.controls import CONTROLS, Control, Policy, make_control
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.k import KControl
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.loading import DEFAULT_TARGET, load_decoder
from spec_envs.decoding.traces.files import COLUMNS, MANIFEST, VERSION, Manifest, Recorded, joined, write_folder
from spec_envs.decoding.traces.recorder import Columns, Recorder, kind_of
from spec_envs.decoding.traces.recording import MAX_NEW_TOKENS
from spec_envs.decoding.traces.replay import replayed
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.measure.arms import Encoded, decoded, run_arms
from spec_envs.experiments.measure.costs import cost_curves
from spec_envs.experiments.measure.encoding import to_json
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.measure.machine import machine, weights_sha256
from spec_envs.experiments.work_folder import NOTE, claim
from spec_envs.files import held, read_json, whole
from spec_envs.prompts.rows import SPLITS, Split
from spec_envs.prompts.templates import DATE
from spec_envs.settings import Keywords

LOG = logging.getLogger(__name__)

DEFAULTS: Keywords = {  # values of the keyword arguments that a recording depends on
    "target": DEFAULT_TARGET,
    "drafter": "auto",
    "device": "auto",
    "dtype": "auto",
    "temperature": 0.0,
    "prompts": "all",
    "data_dir": None,
    "template": None,
    "date": DATE,
    "max_new_tokens": MAX_NEW_TOKENS,
}
TEXTS = (60, 12, 30)  # numbers of training, validation and test texts
CALIBRATION = 6  # training texts on which cost curves are compared with the wall clock
DOING, SHARDS = "recording a trace", "texts/shard-*"
LARGEST_TEXT = 2**30  # most bytes of a text's columns


@dataclass(frozen=True)
class Plan:
    """The plan of a recording.

    Attributes:
        env: keyword arguments of the environment.
        texts: numbers of training, validation and test texts.

    Raises:
        ValueError: there is nothing to record.
    """

    env_id: str
    env: Keywords
    texts: tuple[int, int, int] = TEXTS

    def __post_init__(self) -> None:
        if min(self.texts) < 0 or not any(self.texts):
            raise ValueError(f"texts is {self.texts}; expected numbers of train, validation and test, such as {TEXTS}")
        if self.max_new_tokens < 2:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected 2 or more")

    @property
    def settings(self) -> Keywords:
        """Everything that the recording depends on."""
        control = make_control(self.env_id, self.env)
        given = {key: self.env.get(key, default) for key, default in DEFAULTS.items()}
        given["date"] = given["date"] or DATE
        if given["drafter"] == "auto":
            given["drafter"] = control.default_drafter(self.target)
        return {**given, "width": control.width, "max_depth": control.max_depth, "texts": list(self.texts)}

    @property
    def target(self) -> str:
        return str(self.env.get("target", DEFAULT_TARGET))

    @property
    def max_new_tokens(self) -> int:
        return int(self.env.get("max_new_tokens", MAX_NEW_TOKENS))

    def chosen(self) -> list[tuple[Split, Encoded]]:
        """Return split and prompt of every text; no prompt occurs twice."""
        found = [
            (split, prompt)
            for split, count in zip(SPLITS, self.texts, strict=True)
            if count
            for prompt in encoded_prompts(self.env, split, count)
        ]
        return list({tuple(prompt.ids): (split, prompt) for split, prompt in found}.values())

    def claim(self, folder: Path) -> None:
        """Note in a folder that it belongs to this plan, or refuse a folder that belongs to another."""
        claim(folder, self.settings, "--out")

    def decoder(self) -> Decoder:
        """Return the decoder that the texts are recorded with."""
        names = ("target", "drafter", "device", "dtype", "width", "max_depth")
        settings = {**self.env, **self.settings}
        return load_decoder(**{name: settings[name] for name in names if name in settings})


def recorded(plan: Plan, folder: Path) -> Trace:
    """Return the trace of a plan in a folder; what is missing there is recorded first.

    Raises:
        ValueError: the folder belongs to another plan, or its trace is damaged.
    """
    with held(folder, DOING):
        plan.claim(folder)
        if not (folder / MANIFEST).exists():
            for part in folder.glob(SHARDS):  # wait for other processes that still record
                with held(part, "recording a shard"):
                    pass
            record_texts(plan, folder)
            assemble(plan, folder)
        shutil.rmtree(folder / "texts", ignore_errors=True)
    return Trace.load(folder)


def recorded_by_default(plan: Plan, root: Path = Path("runs")) -> Trace:
    """Return the trace of a plan in its default folder; several processes may ask for it at the same time."""
    while True:
        folder = default_folder(plan, root)
        with held(folder, DOING):
            if ours := folder == default_folder(plan, root):  # no process has claimed it for another plan in between
                plan.claim(folder)
        if ours:
            return recorded(plan, folder)


def record_shard(plan: Plan, folder: Path, shard: tuple[int, int]) -> None:
    """Record one of several shards, while other processes record the others."""
    with ExitStack() as stack:
        with held(folder, DOING):
            plan.claim(folder)
            if (folder / MANIFEST).exists():
                return
            stack.enter_context(held(folder / "texts" / f"shard-{shard[0]}-{shard[1]}", "recording this shard"))
        record_texts(plan, folder, shard)


def record_texts(plan: Plan, folder: Path, shard: tuple[int, int] = (0, 1)) -> None:
    """Record the texts ``shard[0]``, ``shard[0] + shard[1]``, … that are not recorded yet."""
    todo = [(i, prompt) for i, (_, prompt) in enumerate(plan.chosen()) if not text_file(folder, i).exists()]
    todo = [(i, prompt) for i, prompt in todo if i % shard[1] == shard[0]]
    if not todo:
        return
    (folder / "texts").mkdir(exist_ok=True)
    decoder = plan.decoder()
    recorder = Recorder(decoder)
    for i, prompt in tqdm(todo, desc=f"recording {kind_of(decoder)}s", unit="text"):
        columns = recorder.record(prompt.ids, plan.max_new_tokens)
        with whole(text_file(folder, i)) as path, path.open("wb") as file:
            np.savez(file, **columns)  # type: ignore[arg-type]


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
    settings = plan.settings
    manifest = Manifest(
        version=VERSION,
        kind=kind_of(decoder),
        target=plan.target,
        drafter=settings["drafter"],
        fingerprints=weights_sha256(plan.target, settings["drafter"]),
        dtype=decoder.dtype,
        template=plan.env.get("template"),
        prompts=plan.env.get("prompts", "all"),
        max_new_tokens=plan.max_new_tokens,
        width=decoder.tree.width,
        max_depth=decoder.max_depth,
        vocab=decoder.verifier.vocab,
        context=decoder.context,
        eos=sorted(decoder.eos),
        costs=as_text(cost_curves(decoder)),
        made_with=to_json(machine(decoder)),
        texts=kept,
        arrays={},
        date=settings["date"],
    )
    trace = Trace(folder, manifest, joined(parts, manifest.kind))
    manifest.costs = as_text(calibrated(trace, decoder, trace.costs()))
    write_folder(trace)


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


def calibrated(trace: Trace, decoder: Decoder, table: CostTable) -> dict[str, dict[int, float]]:
    """Return the curves of a table, scaled so that training texts with random settings cost the seconds that they take.

    A forward that is timed alone is a little faster than a forward while a text is decoded, with everything around it.
    The overhead is charged to verifications.
    """
    texts = [text for text in trace.texts if text.split == "train"][:CALIBRATION] or trace.texts[:CALIBRATION]
    prompts = [Encoded(text.task, text.prompt) for text in texts]
    control = random_settings(trace)
    arms = {
        "live": decoded(decoder, Policy(control, RandomAgent(control, seed=0))),
        "priced": decoded(
            replayed(trace, PricedClock(table), decoder.max_depth),
            Policy(random_settings(trace), RandomAgent(control, seed=0)),
        ),
    }
    samples = run_arms(arms, prompts, trace.manifest.max_new_tokens, "what forwards cost")
    parts = {name: {part: sum(s.parts[part] for s in arm) for part in arm[0].parts} for name, arm in samples.items()}
    whole_seconds = sum(s.seconds for s in samples["live"])
    around = whole_seconds - parts["live"]["draft"] - parts["live"]["policy"]
    factors = {"draft": 1.0, "verify": around / parts["priced"]["verify"]}
    if parts["priced"]["draft"]:
        factors["draft"] = parts["live"]["draft"] / parts["priced"]["draft"]
    return {part: {n: s * factors[part] for n, s in getattr(table, part).items()} for part in factors}


def random_settings(trace: Trace) -> Control:
    """Return a control whose random actions lead to cycles of all usual sizes."""
    manifest = trace.manifest
    if manifest.kind == "chain":
        return KControl(k_max=min(8, manifest.max_depth + 1), observation="counters")
    depth = min(4, manifest.max_depth)
    return BudgetControl((3, 7, 11, 15, 23, 31), "random", max_depth=depth, width=manifest.width)


def as_text(curves: dict[str, dict[int, float]]) -> dict[str, dict[str, float]]:
    """Return cost curves with keys of text, as JSON has them."""
    return {part: {str(n): s for n, s in curve.items()} for part, curve in curves.items()}


def default_folder(plan: Plan, root: Path = Path("runs")) -> Path:
    """Return the default folder of a plan's trace. If another plan has claimed it, the name gets a suffix."""
    kind, settings = CONTROLS[plan.env_id].trace_kind, plan.settings
    folder = root / "traces" / f"{Path(plan.target).name}-{kind}"
    note = folder / NOTE
    if note.exists() and read_json(note, f"delete {folder} and record the trace again") != settings:
        return folder.with_name(f"{folder.name}-{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}")
    return folder


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
    add_model_arguments(parser, drafter="EAGLE-3 head for trees, or drafter of chains")
    parser.add_argument("--prompts", type=nonempty, default="all", help="prompt sets, separated by commas")
    parser.add_argument(
        "--data-dir", type=input_folder, help="folder of NAME/question.jsonl files (default: the shipped prompts)"
    )
    parser.add_argument("--date", default=DATE, help=f"date for chat templates that write it (default {DATE})")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=96, help="most new tokens per text (default 96)")
    parser.add_argument(
        "--depth",
        type=whole_number(0),
        help="expansions of a tree (default 12), or tokens of a chain less one (default 15)",
    )
    parser.add_argument(
        "--texts",
        type=whole_number(0),
        nargs=3,
        default=TEXTS,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help=f"numbers of texts (default {TEXTS})",
    )
    parser.add_argument(
        "--shard", type=shard_of, help="i/n: record only every n-th text from i on, and do not assemble the trace"
    )
    parser.add_argument("--out", type=output_folder, help="folder (default runs/traces/TARGET-KIND)")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    env = {
        "target": args.target,
        "drafter": args.drafter,
        "device": args.device,
        "dtype": args.dtype,
        "prompts": args.prompts,
        "data_dir": str(args.data_dir) if args.data_dir else None,
        "date": args.date,
        "max_new_tokens": args.max_new_tokens,
    }
    if args.depth is not None:
        env |= {"k_max": args.depth + 1} if CONTROLS[args.env].trace_kind == "chain" else {"max_depth": args.depth}
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
        report(args.env, recorded(plan, folder))


def report(env_id: str, trace: Trace) -> None:
    """Print what was recorded, and how to replay it."""
    folder, ties = trace.folder, int(trace.ties().sum())
    size = sum(path.stat().st_size for path in folder.glob("*.npy"))
    print(f"{folder}: {len(trace.texts)} texts, {trace.rows} positions, {ties} near-ties, {size / 1e6:.0f} MB")
    print(f'replay it with gym.make("{env_id}", trace="{folder}")')


if __name__ == "__main__":
    main()
