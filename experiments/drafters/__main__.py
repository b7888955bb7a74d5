"""Train a drafter for a target on text that the target writes itself (`spec-envs drafter`): an EAGLE-3 head, or a small
draft model made of a few of the target's own layers (`spec-envs drafter --kind draft-model`).

There are four steps, and each continues where it was interrupted: write text, record hidden states, train, report on
held-out text. A head is saved in the published checkpoint layout; a draft model is saved in Hugging Face's layout
without the weights that it shares with the target. Both can be given as `drafter=`.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import random
from pathlib import Path

import torch

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
from spec_envs.decoding.drafters.eagle.drafter import EagleModel, captured_layers
from spec_envs.decoding.drafters.eagle.head import PLAIN, EagleHead
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import (
    load_target,
    load_tokenizer,
    model_folder,
    resolve_device,
    resolve_dtype,
)
from spec_envs.decoding.weights.files import load_weights
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.drafters.distillation import Distillation, Student, kept_layers
from spec_envs.experiments.drafters.eagle_objective import Objective, Unrolled
from spec_envs.experiments.drafters.recording import record, tokenized
from spec_envs.experiments.drafters.selftext import read_conversations, write_conversations
from spec_envs.experiments.drafters.text.composing import Composer
from spec_envs.experiments.drafters.text.passages import gathered
from spec_envs.experiments.drafters.training import report, train
from spec_envs.experiments.work_folder import claim
from spec_envs.files import held, write_json

LOG = logging.getLogger(__name__)

KINDS = ("eagle3", "draft-model")
LEARNING_RATES = {"eagle3": 1.6e-3, "draft-model": 2e-3}
BATCH_TOKENS = {"eagle3": 2048, "draft-model": 1024}
LAYERS, DEEP_SHARE, DRAFT_VOCAB = 3, 0.25, 3328
HELD_OUT = 0.02  # share of the conversations that only the report reads
REPORTED = 12  # levels in the report


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, "model to draft for")
    parser.add_argument("--kind", choices=KINDS, default="eagle3", help="what to train (default eagle3)")
    parser.add_argument(
        "--layers",
        type=POSITIVE,
        help=f"number of layers of a draft model: the target's first ones and its last (default {LAYERS})",
    )
    parser.add_argument("--init", help="head of this project to start from (default: the target's own last layer)")
    parser.add_argument(
        "--out", type=output_folder, help="folder of the finished drafter (default: head in the work folder)"
    )
    parser.add_argument(
        "--work",
        type=output_folder,
        help="folder of text, recordings and checkpoint (default: runs/drafter, or runs/draft-model)",
    )
    parser.add_argument(
        "--tokens",
        type=whole_number(0),
        default=1_000_000,
        help="answer tokens that the target writes (default 1,000,000)",
    )
    parser.add_argument(
        "--conversations",
        type=input_file,
        nargs="*",
        default=[],
        help="further JSONL files of conversations, with user and assistant",
    )
    parser.add_argument(
        "--draft-vocab",
        type=whole_number(16),
        help=f"number of frequent tokens that are drafted in any text (default {DRAFT_VOCAB}; with --init that head's)",
    )
    parser.add_argument("--epochs", type=number(0, 1e6, above=True), default=4, help="passes over the text (default 4)")
    parser.add_argument(
        "--steps",
        type=POSITIVE,
        default=7,
        help="levels over which a head is unrolled, or chain lengths that are shown (default 7)",
    )
    parser.add_argument("--batch-tokens", type=POSITIVE, help="tokens of a batch (default: 2048, or 1024)")
    parser.add_argument(
        "--learning-rate", type=number(0, 1, above=True), help="highest learning rate (default: 1.6e-3, or 2e-3)"
    )
    parser.add_argument(
        "--deep-share",
        type=number(0, 1, above=True),
        help=f"share of the rows on which a head's deep levels are trained (default {DEEP_SHARE})",
    )
    parser.add_argument(
        "--longest",
        type=POSITIVE,
        default=1024,
        help="most tokens of a conversation; longer ones are left out (default 1024)",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of text, batches and split (default 0)")
    return parser.parse_args()


def draft_vocabulary(conversations: list[tuple[list[int], int]], size: int, eos: int, vocab: int) -> torch.Tensor:
    """Return the ``size`` most frequent ids of the answers, EOS included, in ascending order."""
    counts = collections.Counter(token for ids, answer in conversations for token in ids[answer:])
    counts[eos] = max(counts.values()) + 1
    frequent = [token for token, _ in counts.most_common(min(size, vocab))]
    return torch.tensor(sorted(frequent))


def trained_head(name: str, target: Transformer) -> EagleHead:
    """Return a head to continue training from.

    Raises:
        ValueError: the head has parts that this training does not know, or its output rows, which this training holds
            fixed, are not the target's.
    """
    head = EagleHead.load(name)
    plain = EagleHead(head.config).state_dict()
    if head.variant != PLAIN or plain.keys() != head.state_dict().keys():
        raise ValueError(
            f"the head {name!r} has parts that `spec-envs drafter` does not train; expected a head that it made"
        )
    if EagleModel(head, target).output_rows is None:
        raise ValueError(f"the head {name!r} has output rows of its own; expected a head that `spec-envs drafter` made")
    head.get_submodule("lm_head").requires_grad_(False)
    return head


def settled(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with all defaults that depend on other arguments.

    Raises:
        ValueError: an argument would have no effect.
    """
    eagle = args.kind == "eagle3"
    for name, given, needs in (
        ("layers", args.layers is not None and eagle, "--kind draft-model"),
        ("deep-share", args.deep_share is not None and not eagle, "--kind eagle3"),
        ("init", args.init is not None and not eagle, "--kind eagle3"),
        ("draft-vocab", args.draft_vocab is not None and args.init is not None, "no --init, whose vocabulary is kept"),
    ):
        if given:
            raise ValueError(f"--{name} has an effect only with {needs}; leave one of the two out")
    defaults = {
        "work": Path("runs") / ("drafter" if eagle else args.kind),
        "batch_tokens": BATCH_TOKENS[args.kind],
        "learning_rate": LEARNING_RATES[args.kind],
        "layers": LAYERS,
        "deep_share": DEEP_SHARE,
        "draft_vocab": DRAFT_VOCAB,
    }
    for name, value in defaults.items():
        if vars(args)[name] is None:
            vars(args)[name] = value
    args.out = args.out or args.work / "head"
    return args


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command continues from the last checkpoint, if one was written yet"):
        args = settled(args)
        with held(args.work):
            make_drafter(args)


def make_drafter(args: argparse.Namespace) -> None:
    """Write text, record it, train the drafter, and report on it."""
    given = [conversation for file in args.conversations for conversation in read_conversations(file)]
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device, [args.target])
    target, tokenizer = load_target(args.target, device, dtype), load_tokenizer(args.target)
    head = trained_head(args.init, target) if args.init else None
    if args.kind == "draft-model":
        kept_layers(target.shape.layers, args.layers)
    capture: tuple[int, ...] = ()
    if args.kind == "eagle3":
        capture = captured_layers(target.shape.layers)
    longest = min(args.longest, target.shape.context)
    kept = ["target", "init", "conversations", "tokens", "longest", "seed", "draft_vocab", "steps", "batch_tokens"]
    kept += ["kind", "layers"] if args.kind == "draft-model" else []
    claim(args.work, {name: str(getattr(args, name)) for name in kept} | {"dtype": dtype}, "--work")
    LOG.info(f"text, recordings and checkpoint: {args.work}; the drafter: {args.out}")
    text = args.work / "text.jsonl"
    if args.tokens:
        write_conversations(target, tokenizer, text, args.tokens, Composer(gathered()), longest, args.seed)
        given += read_conversations(text)
    conversations = [c for c in (tokenized(tokenizer, c) for c in given) if len(c[0]) <= longest]
    random.Random(args.seed).shuffle(conversations)
    held_out = max(1, round(len(conversations) * HELD_OUT))
    if len(conversations) < 2:
        raise ValueError(
            f"there are {len(conversations)} conversations of at most {longest} tokens; expected 2 or more"
        )
    answered = sum(len(ids) - answer for ids, answer in conversations[held_out:])
    LOG.info(f"{len(conversations) - held_out} conversations, {answered} answer tokens")

    unseen = record(target, conversations[:held_out], args.work / "held-out", capture)
    seen = record(target, conversations[held_out:], args.work / "recorded", capture)
    ids = draft_vocabulary(conversations[held_out:], args.draft_vocab, tokenizer.eos_token_id, target.shape.vocab)
    drafter: EagleHead | Student
    objective: Objective | Distillation
    if args.kind == "draft-model":
        drafter = Student.from_target(args.target, target, args.layers, ids).to(device)
        objective = Distillation(drafter, target.output_weight(), target.precision.cache)
    else:
        drafter = head or EagleHead.from_target(target, load_weights(model_folder(args.target)), ids)
        unrolled = Unrolled(drafter.to(device), target.embedding_weight().float(), longest + max(args.steps, REPORTED))
        objective = Objective(unrolled, target.output_weight(), target.precision.cache)
    train(
        objective,
        seen,
        args.work / "checkpoint.pt",
        args.epochs,
        args.steps,
        args.batch_tokens,
        args.learning_rate,
        args.deep_share,
        args.seed,
    )
    drafter.save(args.out)
    result = {
        "target": args.target,
        "answer_tokens": answered,
        "epochs": args.epochs,
        "draft_vocab": len(drafter.draft_ids),
    }
    result |= vars(report(objective, unseen, REPORTED))
    write_json(args.out / "report.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
