"""Record an expected-acceptance trace for SpecTopK-v0 (`spec-envs trace SpecTopK-v0`): texts that the target
samples, and for each of their tokens and every k the probability that a drafted token is accepted there. Its replay is
approximate (`spec_envs/network/expected_trace.py`).

The file is written when the last text is recorded; if the process is killed before, the same command starts again.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from spec_envs.arguments import TOKENS, Parser, nonempty, number, output_file
from spec_envs.controls.observation.rl_adapter_state import KS
from spec_envs.decoding.clock import CostTable
from spec_envs.decoding.cycle import EMPTY_INTS
from spec_envs.decoding.drafters.base import ChainDrafter, Copier
from spec_envs.decoding.drafters.names import default_drafter
from spec_envs.decoding.loading import DEFAULT_TARGET, load_decoder
from spec_envs.decoding.sampling import Proposal
from spec_envs.decoding.verifier import LocalVerifier
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.measure.arms import Encoded
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.measure.machine import versions, weights_sha256
from spec_envs.files import parse_json, whole
from spec_envs.network.expected_trace import ExpectedText, ExpectedTrace
from spec_envs.prompts.sets import sets_named
from spec_envs.prompts.templates import DATE

LOG = logging.getLogger(__name__)

COUNTS = {"train": 90, "validation": 18, "test": 45}  # numbers of texts


class RecordingVerifier(LocalVerifier):
    """A verifier that keeps the distribution of the target from which it drew last.

    Attributes:
        probabilities: that distribution, ``[vocab]``.
    """

    def _probabilities(self, logits: torch.Tensor) -> np.ndarray:
        self.probabilities = super()._probabilities(logits)
        return self.probabilities


def record(
    verifier: RecordingVerifier,
    drafter: ChainDrafter,
    eos: Collection[int],
    split: str,
    prompt: Encoded,
    tokens: int,
    seed: int,
) -> ExpectedText:
    """Record one text; at each token the drafter drafts one token."""
    rng = np.random.default_rng(seed)
    text = [verifier.start(prompt.ids, tokens + 1, rng)]
    drafter.start([*prompt.ids, text[0]], tokens + 1, verifier.features, rng)
    rows = []
    while len(text) < tokens and text[-1] not in eos:
        matched = drafter.matched() if isinstance(drafter, Copier) else 0
        children, _ = drafter.draft([])
        if (q := children.proposal) is None:
            raise RuntimeError("the drafter drew from no distribution; expected one that samples")
        token = verifier.verify(EMPTY_INTS, EMPTY_INTS, EMPTY_INTS).token
        drafter.commit([token], verifier.features)
        accepted = [expected_acceptance(verifier.probabilities, q, k) for k in KS]
        weights = q.weights / q.weights.sum()
        rows.append((accepted, (weights**2).sum(), children.entropies[0], len(q.truncated(len(q.ids)).ids), matched))
        text.append(token)
    if not rows:
        rows = [([0.0] * len(KS), 1.0, 0.0, 1, 0)]
    acceptance, probability, entropy, entries, match = (np.array(column) for column in zip(*rows, strict=True))
    half = np.float16
    return ExpectedText(
        prompt.task,
        split,
        list(prompt.ids),
        text,
        last_repeated(acceptance.astype(half)),
        last_repeated(probability.astype(half)),
        last_repeated(entropy.astype(half)),
        last_repeated(entries.astype(np.int32)),
        last_repeated(match.astype(np.int16)),
    )


def made_with(args: argparse.Namespace, drafter: str, dtype: str) -> str:
    """Return a description of what a trace was made with, as JSON: hashes of both models' weights, dtype, the date for
    chat templates, versions, and the options of the command."""
    hashes = weights_sha256(args.target, drafter)
    found = {"sha256": hashes, "dtype": dtype, "date": DATE, "versions": versions()}
    return json.dumps(found | {"settings": settings(args)})


def settings(args: argparse.Namespace) -> dict[str, object]:
    """Return the options that a recording depends on: all but the name of its file. Prompt sets are named one by one."""
    found = {name: value for name, value in vars(args).items() if name != "out"}
    return found | {"prompts": ",".join(sets_named(args.prompts))}


def last_repeated(rows: np.ndarray) -> np.ndarray:
    """Return rows with the last one repeated, ``[n + 1]``, because nothing is recorded after the last token."""
    return np.concatenate([rows, rows[-1:]])


def expected_acceptance(p: np.ndarray, q: Proposal, k: int) -> float:
    """Return Σ min(p, q̂) of the target's distribution ``p`` ``[vocab]`` and the drafter's, cut to ``k`` entries (0:
    not cut)."""
    cut = q.truncated(k) if k else q
    weights = cut.weights.astype(float)
    return float(np.minimum(p[cut.ids], weights / weights.sum()).sum())


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--target", type=nonempty, default=DEFAULT_TARGET, help=f"model (default {DEFAULT_TARGET})")
    parser.add_argument(
        "--drafter", type=nonempty, default="auto", help="draft model, 'lookup', or 'lookup+' and a draft model"
    )
    parser.add_argument("--dtype", default="auto", help="auto, int8, q4, bfloat16, float16 or float32 (default auto)")
    parser.add_argument("--clock", default="smollm2-135m-int8-xeon-amx-2", help="cost table that prices its replay")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=97, help="most new tokens per text (default 97)")
    parser.add_argument(
        "--temperature", type=number(0, 100, above=True), default=1.0, help="of the target and the drafter (default 1)"
    )
    parser.add_argument(
        "--prompts", type=nonempty, default="all", help="prompt sets, separated by commas (default all)"
    )
    parser.add_argument(
        "--scale",
        type=number(0, 1000, above=True),
        default=1.0,
        help=f"factor of the numbers of texts: {', '.join(f'{split} {count}' for split, count in COUNTS.items())} (default 1)",
    )
    parser.add_argument("--out", type=output_file, help="name of the .npz file (default runs/traces/TARGET-topk.npz)")
    return parser.parse_args()


def chosen_file(args: argparse.Namespace) -> Path:
    """Return the file of the trace.

    Raises:
        ValueError: the file holds another trace, or its name does not end in .npz.
    """
    path = args.out or Path("runs/traces") / f"{Path(args.target).name}-topk.npz"
    if path.suffix != ".npz":
        raise ValueError(f"--out is {path}; expected a name that ends in .npz")
    if path.exists() and parse_json(ExpectedTrace.load(str(path)).source).get("settings") != settings(args):
        raise ValueError(f"{path} was recorded with other settings; choose another --out, or delete it")
    return path


def main() -> None:
    args = arguments()
    with one_sentence("interrupted; nothing was written"):
        path = chosen_file(args)
        if path.exists():
            LOG.info("recorded already; delete the file to record it again")
        else:
            record_all(args, path)
        trace = ExpectedTrace.load(str(path))
        tokens, size = sum(len(text.tokens) for text in trace.texts), path.stat().st_size
        print(f"{path}: {len(trace.texts)} texts, {tokens} tokens, {size / 1e3:.0f} kB")
        print(f'replay it with gym.make("SpecTopK-v0", trace="{path}")')


def record_all(args: argparse.Namespace, path: Path) -> None:
    """Record the texts of every split, then write the file."""
    CostTable.load(args.clock)
    name = default_drafter(args.target, chain=True) if args.drafter == "auto" else args.drafter
    decoder = load_decoder(args.target, name, dtype=args.dtype, temperature=args.temperature, width=1)
    local, drafter = decoder.local, decoder.drafter
    if not isinstance(drafter, ChainDrafter):
        raise ValueError(f"--drafter is {name}, which drafts no chains; expected a draft model, or 'lookup'")
    verifier = RecordingVerifier(local.target, (), local.temperature, local.top_p)
    env = {"target": args.target, "prompts": args.prompts}
    LOG.info(f"recording {path}")
    texts = []
    for split, count in COUNTS.items():
        prompts = encoded_prompts(env, split, max(1, round(args.scale * count)))
        for seed, prompt in enumerate(tqdm(prompts, desc=f"texts of {split}", unit="text")):
            text = record(verifier, drafter, decoder.eos, split, prompt, args.max_new_tokens, seed)
            texts += [text] if len(text.tokens) > 1 else []
    if not texts:
        raise ValueError("every text ends with its first token: there is nothing to record; give other prompts")
    eos, source = min(decoder.eos), made_with(args, name, local.dtype)
    trace = ExpectedTrace(
        "", args.target, name, args.clock, local.vocab, eos, args.temperature, KS, tuple(texts), source
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        trace.save(temporary)


if __name__ == "__main__":
    main()
