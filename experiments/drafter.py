"""Train an EAGLE-3 head for a target on text the target writes itself (`make drafter`).

Four parts, each of which goes on where it was interrupted: write text, record hidden states, train, report on
held-out text. The head is saved in the published checkpoint layout and is ready for `drafter=`.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from experiments.eagle_training import Objective, Unrolled, report, train
from experiments.recording import SHARD, record, tokenized
from experiments.selftext import read_conversations, write_conversations
from spec_envs.decoding.checkpoints import (
    load_target,
    load_tokenizer,
    load_weights,
    model_folder,
    resolve_device,
    resolve_dtype,
)
from spec_envs.decoding.drafters.eagle import captured_layers
from spec_envs.decoding.drafters.eagle_head import EagleHead
from spec_envs.files import write_json

HELD_OUT = 0.02  # share of the conversations that only the report sees
REPORTED = 12  # levels


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m", help="model to draft for")
    parser.add_argument("--out", type=Path, default=Path("runs/drafter/head"), help="folder of the finished head")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/drafter"), help="folder of text, recordings, checkpoint"
    )
    parser.add_argument("--tokens", type=int, default=1_000_000, help="answer tokens the target writes")
    parser.add_argument(
        "--conversations", type=Path, nargs="*", default=[], help="further JSONL files with user and assistant"
    )
    parser.add_argument("--draft-vocab", type=int, default=3328, help="most frequent tokens, drafted in any text")
    parser.add_argument("--epochs", type=float, default=4, help="passes over the text")
    parser.add_argument("--steps", type=int, default=7, help="levels the head is unrolled over")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a batch")
    parser.add_argument("--learning-rate", type=float, default=1.6e-3, help="peak of AdamW's schedule")
    parser.add_argument("--deep-share", type=float, default=0.25, help="share of the rows that deep levels train on")
    parser.add_argument("--longest", type=int, default=1024, help="longer conversations are left out (tokens)")
    parser.add_argument("--seed", type=int, default=0, help="of text, batches and split")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--dtype", default="auto", help="of the target and of autocast: auto, bfloat16, float32")
    return parser.parse_args()


def draft_vocabulary(conversations: list[tuple[list[int], int]], size: int, eos: int, vocab: int) -> torch.Tensor:
    """The ``size`` most frequent ids of the answers, ascending; EOS is among them."""
    counts = collections.Counter(token for ids, answer in conversations for token in ids[answer:])
    counts[eos] = max(counts.values()) + 1
    frequent = [token for token, _ in counts.most_common(min(size, vocab))]
    return torch.tensor(sorted(frequent))


def claim(work: Path, settings: dict[str, Any]) -> None:
    """Note what a work folder is for; refuse one that was begun with other settings, whose parts would not fit."""
    note = work / "settings.json"
    if not note.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_json(note, settings)
    elif differing := [key for key, value in json.loads(note.read_text()).items() if settings.get(key) != value]:
        raise ValueError(f"{work} was begun with another {', '.join(differing)}; choose another --work, or delete it")


def main() -> None:
    args = arguments()
    try:
        make_drafter(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def make_drafter(args: argparse.Namespace) -> None:
    """Text, recordings, training, report."""
    fixed = ("target", "conversations", "tokens", "longest", "seed", "draft_vocab", "steps", "batch_tokens", "dtype")
    claim(args.work, {name: str(getattr(args, name)) for name in fixed})
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype, device)
    target, tokenizer = load_target(args.target, device, dtype), load_tokenizer(args.target)
    text = args.work / "text.jsonl"
    if args.tokens:
        longest = min(args.longest, target.shape.context)
        write_conversations(target, tokenizer, text, args.tokens, longest=longest, seed=args.seed)
    files = [*args.conversations, *([text] if args.tokens else [])]
    conversations = [tokenized(tokenizer, c) for file in files for c in read_conversations(file)]
    random.Random(args.seed).shuffle(conversations)
    answered = sum(len(ids) - answer for ids, answer in conversations)
    print(f"{len(conversations)} conversations, {answered} answer tokens", file=sys.stderr)

    paths = record(target, conversations, args.work / "recorded", captured_layers(target.shape.layers), args.longest)
    if len(paths) < 2:
        raise ValueError(f"{len(conversations)} conversations are too few; give --tokens for more than {2 * SHARD}")
    held_out = max(1, round(len(paths) * HELD_OUT))
    weights = load_weights(model_folder(args.target))
    draft_ids = draft_vocabulary(conversations, args.draft_vocab, tokenizer.eos_token_id, target.shape.vocab)
    head = EagleHead.from_target(target, weights, draft_ids).to(device)
    output_head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).to(device)
    objective = Objective(Unrolled(head, target.embedding.float()), output_head, dtype)
    train(
        objective,
        paths[held_out:],
        args.work / "checkpoint.pt",
        args.epochs,
        args.steps,
        args.batch_tokens,
        args.learning_rate,
        args.deep_share,
        args.seed,
    )
    head.cpu().save(args.out)
    head.to(device)
    result = {"target": args.target, "answer_tokens": answered, "epochs": args.epochs, "draft_vocab": len(draft_ids)}
    result |= report(objective, paths[:held_out], args.batch_tokens, REPORTED)
    (args.out / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
