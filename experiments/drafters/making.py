"""The steps from text to a drafter: tokens, recordings, a drafter to start from, training, and its report."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import logging
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from spec_envs.decoding.drafters.eagle.config import Variant
from spec_envs.decoding.drafters.eagle.drafter import EagleModel, captured_layers
from spec_envs.decoding.drafters.eagle.head import EagleHead
from spec_envs.decoding.drafters.formats import kind_of_folder
from spec_envs.decoding.drafters.loaders import load_shared
from spec_envs.decoding.drafters.names import drafter_folder
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import (
    load_target,
    load_tokenizer,
    model_folder,
    resolve_device,
    resolve_dtype,
)
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.experiments.drafters.distillation import Distillation, Student, kept_layers
from spec_envs.experiments.drafters.distilled import Objective
from spec_envs.experiments.drafters.eagle_objective import EagleObjective
from spec_envs.experiments.drafters.evaluation import COUNTED, Acceptance, evaluated
from spec_envs.experiments.drafters.narrowing import multiplied, narrowed
from spec_envs.experiments.drafters.parallel_objective import ParallelObjective
from spec_envs.experiments.drafters.recording import Example, Text, load_shard, record, tokenized
from spec_envs.experiments.drafters.selftext import Conversation, read_conversations
from spec_envs.experiments.drafters.text.__main__ import write_text
from spec_envs.experiments.drafters.training import Course, Progress, Training
from spec_envs.experiments.work_folder import claim
from spec_envs.files import read_json, write_json

LOG = logging.getLogger(__name__)
Layers = tuple[PretrainedConfig, dict[str, torch.Tensor]]

HELD_OUT = 0.02  # share of the conversations that only the report reads
VALIDATED = 128  # conversations that a validation reads; the report reads all of them
REPORTED = 12  # tokens of a chain in the report
RUN = ("command", "tokens_seen", "minutes")  # of the report of a drafter from which another one starts
SHARED = ("target", "conversations", "tokens", "text", "longest", "seed")  # options that text and recordings depend on
OWN = (
    *("kind", "layers", "intermediate", "init", "draft_vocab", "steps", "batch_tokens", "learning_rate"),
    *("deep_share", "prompt_share"),
)  # options that a checkpoint depends on


@dataclass(frozen=True)
class Recordings:
    """The recordings that drafters learn from, shared by all drafters of a work folder.

    Attributes:
        seen: files for training.
        held_out: conversations of the same kinds.
        validation: conversations of other kinds; those of ``held_out`` if there are none.
        shortlist: the most frequent tokens of the answers, ascending.
        unwritten: the first token that occurs in no text.
        answered: number of answer tokens for training.
    """

    seen: list[Path]
    held_out: list[Example]
    validation: list[Example]
    shortlist: torch.Tensor
    unwritten: int
    answered: int


def prepared(args: argparse.Namespace) -> tuple[Recordings, EagleHead | Student, Objective]:
    """Write text and record it, unless that is done; return the recordings, the drafter from which training starts, and
    its objective."""
    given = [conversation for file in args.conversations for conversation in read_conversations(file)]
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device, [args.target])
    target, tokenizer = load_target(args.target, device, dtype), load_tokenizer(args.target)
    if args.kind == "draft-model" and not args.init:
        kept_layers(target.shape.layers, args.layers)
    captured_layers(target.shape.layers)
    begun: EagleHead | Layers | None = None
    if args.init and args.kind == "draft-model":
        begun = trained_layers(args.init, target)
    elif args.init:
        begun = trained_head(args.init, target, args.kind == "parallel")
    longest = min(args.longest, target.shape.context)
    claim(args.work, {name: str(vars(args)[name]) for name in SHARED} | {"dtype": dtype}, "--work")
    claim(args.out / "training", {name: str(vars(args)[name]) for name in OWN}, "--out")
    LOG.info(f"text and recordings: {args.work}; the drafter and its training: {args.out}")
    validation: list[Conversation] = []
    if args.tokens:
        write_text(args.text, args.target, target, tokenizer, args.tokens, longest, args.seed)
        given += read_conversations(args.text / "text.jsonl")
        validation = read_conversations(args.text / "validation.jsonl")
    recordings = recorded_texts(args, target, tokenizer, given, validation, longest)
    return recordings, *started(args, target, recordings, begun, longest)


def trained(
    args: argparse.Namespace, recordings: Recordings, drafter: EagleHead | Student, objective: Objective
) -> dict[str, Any]:
    """Train the drafter, save it, and return its report."""
    earlier = runs_before(args.init)
    names = ("epochs", "steps", "batch_tokens", "every", "patience", "seed")
    course = Course(
        peak=args.learning_rate, share=args.deep_share, prompts=args.prompt_share, **{n: vars(args)[n] for n in names}
    )
    sample = random.Random(0).sample(recordings.validation, min(VALIDATED, len(recordings.validation)))
    training = Training(objective, recordings.seen, sample, args.out / "training", course)
    progress = training.run()
    drafter.save(args.out)
    report = reported(args, objective, recordings, progress, training.per_epoch) | {"earlier": earlier}
    write_json(args.out / "report.json", report)
    return report


def recorded_texts(
    args: argparse.Namespace,
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    given: Sequence[Conversation],
    validation: Sequence[Conversation],
    longest: int,
) -> Recordings:
    """Return the recordings of conversations of at most ``longest`` tokens.

    Raises:
        ValueError: there are fewer than two of them, or one has tokens that the target does not have.
    """
    vocab = target.shape.vocab
    texts, others = (
        [text for text in (tokenized(tokenizer, c) for c in part) if text.answer < len(text.ids) <= longest]
        for part in (given, validation)
    )
    if len(texts) < 2:
        raise ValueError(
            f"there are {len(texts)} conversations with an answer and of at most {longest} tokens; expected 2 or more"
        )
    if any(not 0 <= min(text.ids) <= max(text.ids) < vocab for text in texts):
        raise ValueError(
            f"a conversation has answer_ids that are not below {vocab}; expected text that {args.target} wrote, or "
            "answers as text (assistant)"
        )
    random.Random(args.seed).shuffle(texts)
    held_out = max(1, round(len(texts) * HELD_OUT))
    seen, unseen = texts[held_out:], texts[:held_out]
    answered = sum(len(text.ids) - text.answer for text in seen)
    LOG.info(f"{len(seen)} conversations, {answered} answer tokens")
    capture = captured_layers(target.shape.layers)
    paths = {
        name: record(target, part, args.work / name, capture)
        for name, part in (("held-out", unseen), ("validation", others), ("recorded", seen))
    }
    read = {name: [e for path in paths[name] for e in load_shard(path)] for name in ("held-out", "validation")}
    return Recordings(
        paths["recorded"],
        read["held-out"],
        read["validation"] or read["held-out"],
        draft_vocabulary(seen, args.draft_vocab, tokenizer.eos_token_id, vocab),
        unwritten(texts, vocab),
        answered,
    )


def draft_vocabulary(texts: Sequence[Text], size: int, eos: int, vocab: int) -> torch.Tensor:
    """Return the ``size`` most frequent ids of the answers, EOS included, in ascending order."""
    counts = collections.Counter(token for text in texts for token in text.ids[text.answer :])
    counts[eos] = max(counts.values()) + 1
    frequent = [token for token, _ in counts.most_common(min(size, vocab))]
    return torch.tensor(sorted(frequent))


def unwritten(texts: Sequence[Text], vocab: int) -> int:
    """Return the first token that occurs in no text, or the last token if all of them do."""
    found = {token for text in texts for token in text.ids}
    return next((token for token in range(vocab) if token not in found), vocab - 1)


def trained_head(name: str, target: Transformer, parallel: bool) -> EagleHead:
    """Return a head to continue training from.

    Args:
        parallel: whether a parallel head is made, which may also begin as one that drafts a token at a time.

    Raises:
        ValueError: the head has parts that this training does not know, or its output rows, which this training holds
            fixed, are not the target's.
    """
    head = EagleHead.load(name)
    known = Variant(mask_token=head.variant.mask_token, block=head.variant.block, verifier=head.variant.verifier)
    plain = EagleHead(head.config, known).state_dict()
    fits = parallel or (head.variant.mask_token is None and head.config.num_hidden_layers == 1)
    if (
        dataclasses.replace(head.variant, boundaries=None) != known
        or plain.keys() != head.state_dict().keys()
        or not fits
    ):
        raise ValueError(
            f"the head {name!r} has parts that `spec-envs drafter` does not train; expected a head that it made, for "
            "--kind eagle3 one that drafts a token at a time"
        )
    model = EagleModel(head, target)
    if model.capture != captured_layers(target.shape.layers):
        raise ValueError(
            f"the head {name!r} reads the layers {model.capture}; expected a head that reads the default ones"
        )
    if model.output_rows is None:
        raise ValueError(f"the head {name!r} has output rows of its own; expected a head that `spec-envs drafter` made")
    return head


def trained_layers(name: str, target: Transformer) -> Layers:
    """Return a draft model to continue training from: its config and its weights.

    Raises:
        ValueError: it was not made by this training, or for another target.
    """
    folder = drafter_folder(name)
    if kind_of_folder(folder) != "model":
        raise ValueError(f"--init is {name!r}, a head; expected a draft model that `spec-envs drafter` made")
    load_shared(folder, target)
    return load_config(folder), load_weights(folder)


def started(
    args: argparse.Namespace,
    target: Transformer,
    recordings: Recordings,
    begun: EagleHead | Layers | None,
    longest: int,
) -> tuple[EagleHead | Student, Objective]:
    """Return the drafter from which training starts, and its objective."""
    dtype, positions = target.precision.cache, longest + max(args.steps, REPORTED)
    if args.kind == "draft-model":
        if isinstance(begun, tuple):
            student = Student.from_draft_model(*begun, target, recordings.shortlist)
        else:
            student = Student.from_target(*target_layers(args), target, args.layers, recordings.shortlist)
        return student, Distillation(student.to(target.device), target, dtype)
    if isinstance(begun, EagleHead):
        head = begun
        head.draft_from(recordings.shortlist, target)
    else:
        head = EagleHead.from_target(target, target_layers(args)[1], recordings.shortlist, layers=args.layers)
    if args.kind == "eagle3":
        return head, EagleObjective(head.to(target.device), target, positions, dtype)
    if head.variant.mask_token is None:
        head = in_blocks(head, args, recordings)
    return head, ParallelObjective(head.to(target.device), target, positions, dtype)


def target_layers(args: argparse.Namespace) -> Layers:
    """Return the target's config and weights, narrowed as ``--intermediate`` says."""
    folder = model_folder(args.target)
    config, weights = load_config(folder), load_weights(folder)
    if args.intermediate:
        config.intermediate_size, weights = args.intermediate, narrowed(weights, args.intermediate)
    return config, weights


def in_blocks(head: EagleHead, args: argparse.Namespace, recordings: Recordings) -> EagleHead:
    """Return a parallel head that starts as a head which drafts a token at a time. What it reads in place of unknown
    states begins as the average of the target's."""
    answers = (e.features.restored(torch.device("cpu"))[e.answer - 1 :] for e in recordings.held_out)
    means = torch.stack([features.mean(0) for features in answers])
    variant = Variant(mask_token=recordings.unwritten, block=args.steps, verifier=args.target)
    parallel = EagleHead(head.config, variant)
    parallel.load_state_dict(head.state_dict() | {"mask_hidden": means.mean(0)[None, None]})
    parallel.get_submodule("lm_head").requires_grad_(False)
    return parallel


def reported(
    args: argparse.Namespace, objective: Objective, recordings: Recordings, progress: Progress, per_epoch: int
) -> dict[str, Any]:
    """Return the report of a trained drafter."""
    with ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        total, held_out = evaluated(objective, recordings.held_out, REPORTED, pool)
        validation = evaluated(objective, recordings.validation, REPORTED, pool)[1]

    def by_kind(kinds: dict[str, Acceptance]) -> dict[str, dict[str, Any]]:
        return {kind: vars(acceptance) for kind, acceptance in kinds.items()}

    vocabulary = int(objective.vocabulary.listed.sum())
    return {
        "target": args.target,
        "kind": args.kind,
        "answer_tokens": recordings.answered,
        "epochs": round(progress.done / per_epoch, 2),
        "draft_vocab": vocabulary,
        **vars(total),
        "held_out": by_kind(held_out),
        "validation": by_kind(validation),
        "weights": multiplied(objective.trained),
        "tokens_seen": progress.tokens,
        "minutes": round(progress.seconds / 60, 1),
        "command": shlex.join(["spec-envs", "drafter", *sys.argv[1:]]),
        "curve": progress.curve,
    }


def runs_before(init: str | None) -> list[dict[str, Any]]:
    """Return command, tokens seen and minutes of the runs that made the drafter from which training starts, the first one
    first, as far as reports tell.

    Raises:
        ValueError: a report is damaged.
    """
    if not init or not (place := drafter_folder(init) / "report.json").exists():
        return []
    report = read_json(place, "delete it, and the new report will not say what came before")
    if not isinstance(report, dict):  # of other software
        return []
    run = {key: report[key] for key in RUN if key in report}
    return [*report.get("earlier", ()), *([run] if run else ())]


def shown(report: Mapping[str, Any], out: Path) -> str:
    """Return a report as it is printed: the acceptance of short chains by kind of text, and how the drafter is used.

    Args:
        out: folder of the drafter.
    """
    rows = {"held-out text": report["chain_acceptance"]}
    rows |= {f"  {kind}": found["chain_acceptance"] for kind, found in report["validation"].items()}
    width = max(map(len, rows))
    lines = [f"{'accepted chains of':{width}}" + "".join(f"{n + 1:7d}" for n in range(COUNTED))]
    lines += [
        f"{name:{width}}" + "".join(f"{share:7.1%}" for share in shares[:COUNTED]) for name, shares in rows.items()
    ]
    use = f'spec-envs generate "…" --target {report["target"]} --drafter {out}'
    return "\n".join([*lines, f"details:   {out / 'report.json'}", f"use it:    {use}"])
