"""Write the text that drafters for a target learn from (`spec-envs drafter text`).

The work folder gets `text.jsonl`, from which drafters are trained, and `validation.jsonl` of other kinds, which decides
when to stop. The same command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from spec_envs.arguments import POSITIVE, SEED, Parser, add_model_arguments, output_folder, whole_number
from spec_envs.decoding.model.transformer import Transformer
from spec_envs.decoding.weights.checkpoints import load_target, load_tokenizer, resolve_device, resolve_dtype
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.drafters.selftext import Writer, write_conversations, write_validation
from spec_envs.experiments.drafters.text.composing import Composer
from spec_envs.experiments.drafters.text.passages import gathered
from spec_envs.experiments.work_folder import claim
from spec_envs.files import held


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, "model that writes")
    parser.add_argument(
        "--work", type=output_folder, default=Path("runs/text"), help="folder of the text (default runs/text)"
    )
    parser.add_argument(
        "--tokens", type=POSITIVE, default=4_000_000, help="answer tokens for training (default 4,000,000)"
    )
    parser.add_argument(
        "--longest",
        type=whole_number(Writer.max_answer + 1),
        default=1024,
        help=f"most tokens of a conversation, of which its last answer may take {Writer.max_answer} (default 1024)",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the text (default 0)")
    return parser.parse_args()


def write_text(
    folder: Path,
    name: str,
    target: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    longest: int,
    seed: int,
) -> None:
    """Write training text and validation text into a folder until there are ``tokens`` answer tokens for training.

    Args:
        name: of the target.
        longest: most tokens of a conversation.

    Raises:
        ValueError: the folder was begun with other settings.
    """
    with held(folder, "writing text"):
        settings = {"text of": name, "longest": str(longest), "seed": str(seed), "dtype": target.dtype}
        claim(folder, settings, "folder")
        composer = Composer(gathered())
        write_validation(target, tokenizer, folder / "validation.jsonl", composer, longest=longest, seed=seed)
        write_conversations(target, tokenizer, folder / "text.jsonl", tokens, composer, longest, seed)


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; the same command continues"):
        device = resolve_device(args.device)
        dtype = resolve_dtype(args.dtype, device, [args.target])
        target, tokenizer = load_target(args.target, device, dtype), load_tokenizer(args.target)
        longest = min(args.longest, target.shape.context)
        write_text(args.work, args.target, target, tokenizer, args.tokens, longest, args.seed)


if __name__ == "__main__":
    main()
