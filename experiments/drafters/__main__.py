"""Train a drafter for a target on text that the target writes itself (`spec-envs drafter`): an EAGLE-3 head, a parallel
head (`--kind parallel`), or a small draft model made of a few of the target's own layers (`--kind draft-model`).

There are four steps, and each continues where it was interrupted: write text, record hidden states, train, report on
held-out text. Text and recordings lie in the work folder and serve every kind. Conversations of other kinds than those
of the training text decide which weights are kept and when to stop. A head is saved in the published checkpoint layout
(a parallel one as speculators has it); a draft model is saved in Hugging Face's layout without the weights that it
shares with the target. All of them can be given as `drafter=`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from spec_envs.arguments import (
    POSITIVE,
    SEED,
    Parser,
    add_model_arguments,
    input_file,
    number,
    output_folder,
    whole_number,
)
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.drafters.making import prepared, shown, trained
from spec_envs.files import held


@dataclass(frozen=True)
class Defaults:
    """The defaults of a kind of drafter."""

    layers: int
    steps: int
    batch_tokens: int
    learning_rate: float


KINDS = {
    "eagle3": Defaults(layers=1, steps=7, batch_tokens=4096, learning_rate=1.6e-3),
    "draft-model": Defaults(layers=3, steps=7, batch_tokens=2048, learning_rate=2e-3),
    "parallel": Defaults(layers=2, steps=12, batch_tokens=4096, learning_rate=1.6e-3),
}
DRAFT_VOCAB, DEEP_SHARE = 3328, 0.25


def by_kind(name: str) -> str:
    """Return the defaults of an option in words."""
    return ", ".join(f"{vars(defaults)[name]} for {kind}" for kind, defaults in KINDS.items())


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, "model to draft for")
    parser.add_argument("--kind", choices=KINDS, default="eagle3", help="what to train (default eagle3)")
    add_shape(parser)
    add_text(parser)
    add_training(parser)
    return parser.parse_args()


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what the drafter is."""
    parser.add_argument(
        "--layers",
        type=POSITIVE,
        help="layers of a draft model, the target's first ones and its last, or of a parallel head, which starts as the "
        f"target's last ones (default: {by_kind('layers')})",
    )
    parser.add_argument(
        "--intermediate",
        type=POSITIVE,
        help="units of the layers' feed-forward parts: those of the target's with the largest weights (default: all)",
    )
    parser.add_argument(
        "--init",
        help="drafter of this project and of the same kind to start from, for a parallel head also an EAGLE-3 head "
        "(default: layers of the target)",
    )
    parser.add_argument(
        "--draft-vocab",
        type=whole_number(16),
        help=f"number of frequent tokens of the text that are drafted in any text (default {DRAFT_VOCAB})",
    )
    parser.add_argument(
        "--out",
        type=output_folder,
        help="folder of the drafter, its report, and `training`, with checkpoint and TensorBoard's events (default: the "
        "kind in the work folder)",
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    """Add the options about the text that is learned from."""
    parser.add_argument(
        "--work",
        type=output_folder,
        default=Path("runs/drafter"),
        help="folder of text and recordings, for all kinds of drafters (default runs/drafter)",
    )
    parser.add_argument("--text", type=output_folder, help="folder of the text (default: text in the work folder)")
    parser.add_argument(
        "--tokens",
        type=whole_number(0),
        default=4_000_000,
        help="answer tokens that the target writes (default 4,000,000); 0: only those of --conversations, of which "
        "held-out ones then decide when to stop",
    )
    parser.add_argument(
        "--conversations",
        type=input_file,
        nargs="*",
        default=[],
        help="further JSONL files of conversations, with user and assistant",
    )
    parser.add_argument(
        "--longest",
        type=POSITIVE,
        default=1024,
        help="most tokens of a conversation; longer ones are left out (default 1024)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options about the training."""
    parser.add_argument(
        "--epochs", type=number(0, 1e6, above=True), default=4, help="most passes over the text (default 4)"
    )
    parser.add_argument(
        "--steps",
        type=POSITIVE,
        help="levels over which a head is unrolled, size of a parallel head's block, or chain lengths that are shown "
        f"(default: {by_kind('steps')})",
    )
    parser.add_argument("--batch-tokens", type=POSITIVE, help=f"tokens of a batch (default: {by_kind('batch_tokens')})")
    parser.add_argument(
        "--learning-rate",
        type=number(0, 1, above=True),
        help=f"highest learning rate (default: {by_kind('learning_rate')})",
    )
    parser.add_argument(
        "--deep-share",
        type=number(0, 1, above=True),
        help=f"share of the answers' rows on which a head's deep levels are trained (default {DEEP_SHARE})",
    )
    parser.add_argument(
        "--prompt-share",
        type=number(0, 1),
        default=0.1,
        help="share of the prompts' rows on which the first level is trained (default 0.1)",
    )
    parser.add_argument("--every", type=POSITIVE, default=200, help="batches between two validations (default 200)")
    parser.add_argument(
        "--patience",
        type=POSITIVE,
        default=20,
        help="validations without a better one after which training stops (default 20)",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of text, batches and split (default 0)")


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with all defaults that depend on other arguments.

    Raises:
        ValueError: an argument would have no effect, or does not go together with another.
    """
    heads = "--kind eagle3 or parallel"
    for name, given, needs in (
        ("layers", args.layers is not None and args.kind == "eagle3", "--kind draft-model or parallel"),
        ("deep-share", args.deep_share is not None and args.kind == "draft-model", heads),
        ("layers", args.layers is not None and args.init is not None, "no --init, whose layers are kept"),
        ("intermediate", args.intermediate is not None and args.init is not None, "no --init, whose layers are kept"),
    ):
        if given:
            raise ValueError(f"--{name} has an effect only with {needs}; leave one of the two out")
    if args.kind == "parallel" and args.steps == 1:
        raise ValueError("--steps is 1; expected 2 or more, the size of a parallel head's block")
    args.out, args.text = args.out or args.work / args.kind, args.text or args.work / "text"
    if args.text.resolve() == args.work.resolve():
        raise ValueError(f"--text and --work are both {args.work}; expected two folders")
    for name, value in (vars(KINDS[args.kind]) | {"draft_vocab": DRAFT_VOCAB, "deep_share": DEEP_SHARE}).items():
        if vars(args)[name] is None:
            vars(args)[name] = value
    return args


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command continues from the last checkpoint, if one was written yet"):
        args = settled(args)
        with held(args.work):
            start = prepared(args)
        with held(args.out / "training"):
            report = trained(args, *start)
    print(shown(report, args.out))


if __name__ == "__main__":
    main()
