"""Write a draft model that shares its target's embedding as a complete model that transformers loads, for example as
`assistant_model` of its target (`spec-envs standalone`). The complete model has no shortlist, but all of the target's
output rows.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import save_file

from spec_envs.arguments import Parser, nonempty, output_folder
from spec_envs.decoding.drafters.draft_model import SHORTLIST
from spec_envs.decoding.drafters.names import drafter_folder
from spec_envs.decoding.loading import DEFAULT_TARGET
from spec_envs.decoding.weights.checkpoints import load_tokenizer, model_folder, registry
from spec_envs.decoding.weights.config import load_config
from spec_envs.decoding.weights.files import load_weights
from spec_envs.decoding.weights.tensors import EMBEDDING, OUTPUT
from spec_envs.experiments.command import one_sentence


def write_standalone(drafter: str, target: str, out: Path) -> None:
    """Write the complete model into a new folder.

    Args:
        drafter: name or folder of a draft model that was made by `spec-envs drafter --kind draft-model`.
        target: name of the model that it was made for.

    Raises:
        ValueError: the drafter is of another kind or was made for another target, or the folder exists already.
    """
    source, base = drafter_folder(drafter), model_folder(target)
    config, weights = load_config(source), load_weights(source)
    if SHORTLIST not in weights:
        raise ValueError(
            f"{drafter!r} is a complete model already, or not a draft model; expected one without embedding"
        )
    theirs, whole = load_config(base), load_weights(base)
    mine = (config.hidden_size, config.vocab_size)
    if mine != (theirs.hidden_size, theirs.vocab_size):
        raise ValueError(
            f"{drafter!r} was made for a target of hidden size and vocabulary {mine}, which {target!r} does not have"
        )
    if out.exists():
        raise ValueError(f"{out} exists already; choose another folder")
    del weights[SHORTLIST]
    dtype = weights["model.norm.weight"].dtype
    weights |= {name: whole[name].to(dtype) for name in (EMBEDDING, OUTPUT) if name in whole}
    config.tie_word_embeddings = theirs.tie_word_embeddings
    config.architectures = theirs.architectures
    making = out.with_name(out.name + ".making")
    try:
        making.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(making)
        load_tokenizer(target).save_pretrained(making)
        if (base / "generation_config.json").is_file():
            shutil.copy(base / "generation_config.json", making)
        save_file(weights, making / "model.safetensors", {"format": "pt"})
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("drafter", type=nonempty, help="name or folder of the draft model")
    parser.add_argument("--out", type=output_folder, required=True, help="folder to write, which must not exist yet")
    parser.add_argument(
        "--target", type=nonempty, help=f"model that it was made for (default: as in models.yml, else {DEFAULT_TARGET})"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    known = registry()["drafters"].get(args.drafter, {}).get("target", DEFAULT_TARGET)
    with one_sentence():
        write_standalone(args.drafter, args.target or known, args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
