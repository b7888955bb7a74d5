"""Measure the decoding speed of this machine in one run (`spec-envs bench decoding`).

Plain decoding and the best static speculation are compared with transformers and llama.cpp on the same weights, and with
a newer llama.cpp and OpenVINO GenAI where the extra `engines` is installed. The page also has cost curves by dtype, the
share of a forward that reading its weights takes, speed and quality of each dtype, the fidelity of every text to
float32, and the share of a step that is spent outside drafter and target. Writes decoding.json, decoding.md and
decoding.png into --out, and a cost table of this machine for `clock=runs/clock.json`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from spec_envs.arguments import PROMPTS, TEMPERATURE, TOKENS, Parser, add_model_arguments, output_file
from spec_envs.controls import Policy
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.decoding.decoder import Decoder, over_models
from spec_envs.decoding.drafters.names import DrafterName, default_drafter
from spec_envs.decoding.model import kernels
from spec_envs.decoding.model.precision import DTYPES
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.comparisons.engines import engine_arms
from spec_envs.experiments.comparisons.floor import Floor
from spec_envs.experiments.comparisons.quality import REFERENCE, Judge, plain_texts, quality
from spec_envs.experiments.comparisons.speeds import RATIOS, Beside, Figures, Speeds, body, draw
from spec_envs.experiments.measure.arms import Arm, Encoded, Sample, decoded
from spec_envs.experiments.measure.costs import context_ratio, decoders_by_dtype, dtypes_at_speed, fastest_windows
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts, target_and_drafter
from spec_envs.experiments.measure.price_list import prices
from spec_envs.experiments.measure.references import assisted_arms, llamacpp_arms
from spec_envs.experiments.measure.static import best_static, static_policy
from spec_envs.experiments.measure.statistics import ratio, with_aa_check
from spec_envs.experiments.measure.tables import side_by_side, tables
from spec_envs.experiments.reports.pages import Page, add_page_arguments
from spec_envs.files import write_json
from spec_envs.settings import Keywords

KEYWORDS = ("target", "drafter", "device", "dtype", "temperature", "max_new_tokens")  # of the environment, as options
VERIFIED = (8, 16, 32, 64)  # rows of a verification whose cost is compared from machine to machine


def compare_decoding(env: Keywords, count: int, compared: Sequence[str] | None) -> Speeds:
    """Measure the decoding speed of this machine.

    Args:
        env: keyword arguments of all arms (target, drafter, dtype, …).
        count: number of held-out prompts.
        compared: dtypes whose cost curves are measured; by default those that this machine computes fast.
    """
    target_name, drafter = target_and_drafter(env)
    name = DrafterName.parse(drafter)
    if name.chain and name.model:  # without lookup, which other software does not combine with a draft model
        name = DrafterName("", name.model, name.shortlist)
    drafter = str(name)
    env = {**env, "drafter": drafter}
    control = KControl() if name.chain else DepthControl()
    decoder = over_models(decoder_for(env, control))
    target, device = decoder.local.target, decoder.verifier.device
    costs = prices(decoder, env, control)
    static = best_static(env, control, costs)
    policies = {"static": static_policy(control, static.best)}
    draft = (name.model or drafter, max(1, int(static.best[0]))) if name.chain else None
    others = assisted_arms(target_name, decoder, draft)
    on_cpu, greedy = device.type == "cpu", not decoder.verifier.temperature
    if greedy and on_cpu:
        others |= llamacpp_arms(target_name, torch.get_num_threads(), draft)
    references = ["plain", *others]
    if greedy and on_cpu:
        others |= engine_arms(target_name, torch.get_num_threads())
    chains = {} if name.chain else best_chain(env, decoder)
    others |= {arm: chain for arm, (chain, _) in chains.items()}
    shown = policies | {arm: policy for arm, (_, policy) in chains.items()}
    decoders = decoders_by_dtype(env, control, compared or dtypes_at_speed(device))
    judge = Judge(decoders[REFERENCE].local.target) if greedy and REFERENCE in decoders else None

    def measure(prompts: int) -> Beside:
        samples = side_by_side(policies, env, decoder, prompts, others)
        results = tables(samples, shown, env, decoder, references, list(shown), costs)
        return Beside(
            **vars(replace(results, static=static)),
            ratios={
                name: ratio(samples[a], samples[b]) for name, (a, b) in RATIOS.items() if a in samples and b in samples
            },
            own_argmax_share={name: judge.own_share(arm) for name, arm in samples.items()} if judge else {},
        )

    table = with_aa_check(measure, count)
    curves = table.seconds
    if curves is None:
        raise ValueError("a cost table prices the forwards; expected clock=wall, because speed is measured")
    verify, speculative = curves["verify"], table.arms["static"]
    inside = speculative.parts["draft"] + speculative.parts["verify"]
    prompts = encoded_prompts(env, "test", count)
    qualities = (
        quality(target_name, device, list(decoders), [prompt.ids for prompt in prompts])
        if REFERENCE in decoders
        else {}
    )
    floor = Floor.of(target.weight_bytes, verify[1]) if on_cpu and kernels.library() else None
    over = {name: interval.value for name, interval in table.ratios.items()}
    return Speeds(
        target=target_name,
        drafter=drafter,
        table=table,
        figures=Figures(
            processor=table.machine.processor,
            verify_ratio={n: verify[n] / verify[1] for n in VERIFIED},
            context_ratio=context_ratio(decoder),
            plain_over_llamacpp=over.get("plain_over_llamacpp"),
            static_over_plain=over["static_over_plain"],
            chain_over_plain=over.get("chain_over_plain"),
            share_of_floor=floor.share_of_floor if floor else None,
        ),
        floor=floor,
        emitted_per_cycle=speculative.emitted_per_cycle,
        overhead_share=1 - inside / speculative.seconds,
        verify_curve={n: s / verify[1] for n, s in verify.items()},
        expand_ratio=curves["draft"][decoder.tree.width] / verify[1],
        curves_by_dtype={dtype: fastest_windows(found, repeats=3)[0] for dtype, found in decoders.items()},
        quality=qualities,
        dtypes=plain_texts(decoders, prompts, env["max_new_tokens"], qualities) if REFERENCE in decoders else {},
        dtype=target.dtype,
    )


def best_chain(env: Keywords, decoder: Decoder) -> dict[str, tuple[Arm, Policy]]:
    """Return the arm ``chain`` and its policy: the best static chain of the target's default drafter for chains. No arm
    if models.yml has no such drafter."""
    target = target_and_drafter(env)[0]
    try:
        drafter = default_drafter(target, chain=True)
    except ValueError:
        return {}
    env, control = {**env, "drafter": drafter, "dtype": decoder.dtype}, KControl()
    policy = static_policy(control, best_static(env, control).best)
    run = decoded(over_models(decoder_for(env, control)), policy)

    def unpriced(prompt: Encoded, max_new_tokens: int, seed: int) -> Sample:
        return replace(run(prompt, max_new_tokens, seed), forwards={})  # the cost curves are those of another drafter

    return {"chain": (unpriced, policy)}


PAGE = Page(
    kind=Speeds,
    command="bench decoding",
    title="Decoding speed",
    purpose="Plain decoding and the best static speculation are measured beside transformers and llama.cpp on the same "
    "weights, because an agent is worth something only on top of a decoder that is fast without it.",
    caption="Throughput of every arm over plain decoding, and the cost of a forward by its rows",
    body=body,
    machines=lambda speeds: [speeds.table.machine],
    draw=draw,
)


def dtypes(names: str) -> list[str]:
    """Return the dtypes that a text lists, separated by commas."""
    found = [name.strip() for name in names.split(",")]
    if unknown := set(found) - set(DTYPES):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))} is unknown; expected some of {', '.join(DTYPES)}"
        )
    return found


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, drafter="EAGLE-3 head or draft model")
    parser.add_argument(
        "--dtypes",
        type=dtypes,
        help="dtypes whose cost curves are compared, separated by commas; with float32 among them their quality, too "
        "(default: float32, int8 and q4 where the processor has instructions for int8, and bfloat16 where it has some "
        "for that)",
    )
    parser.add_argument("--temperature", type=TEMPERATURE, default=0.0, help="0 is greedy (default 0)")
    parser.add_argument("--count", type=PROMPTS, default=15, help="number of held-out prompts (default 15)")
    parser.add_argument("--max-new-tokens", type=TOKENS, default=96, help="most new tokens per prompt (default 96)")
    parser.add_argument(
        "--clock", type=output_file, default=Path("runs/clock.json"), help="cost table (default runs/clock.json)"
    )
    add_page_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    env = {name: vars(args)[name] for name in KEYWORDS}
    with one_sentence():
        speeds = PAGE.publish(args, lambda: compare_decoding(env, args.count, args.dtypes), "decoding")
        if not args.from_json:
            args.clock.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.clock, speeds.table.seconds)
            print(f"written: {args.clock}")


if __name__ == "__main__":
    main()
