"""Stream an answer token by token under a trained policy, then compare with plain decoding (`spec-envs generate`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from spec_envs import Generation, agents, generate
from spec_envs.agents.baselines.fixed import FixedAgent
from spec_envs.agents.loading import folder_of
from spec_envs.arguments import SEED, TEMPERATURE, TOKENS, TOP_P, Parser, nonempty
from spec_envs.controls import Policy
from spec_envs.controls.base import Control
from spec_envs.controls.depth import DepthControl
from spec_envs.controls.k import KControl
from spec_envs.decoding.drafters.names import DrafterName
from spec_envs.decoding.exits.files import is_exit
from spec_envs.decoding.loading import DEFAULT_TARGET
from spec_envs.decoding.weights.checkpoints import load_tokenizer
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.measure.live import decoder_for
from spec_envs.prompts.sets import encode
from spec_envs.settings import Keywords
from spec_envs.text import printable


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("prompt", type=nonempty, help="user turn to answer")
    parser.add_argument(
        "--run",
        type=Path,
        help="run folder of the policy, or SpecK-v0 and the like for a shipped one (default: a fixed depth of 2)",
    )
    parser.add_argument("--target", type=nonempty, help="model (default: the run's)")
    parser.add_argument("--drafter", type=nonempty, help="what drafts (default: the run's)")
    parser.add_argument(
        "--dtype", type=nonempty, help="auto, int8, q4, bfloat16, float16 or float32 (default: the run's)"
    )
    parser.add_argument("--max-new-tokens", type=TOKENS, default=256, help="most tokens of the answer (default 256)")
    parser.add_argument(
        "--temperature", type=TEMPERATURE, help="sampling temperature, 0 is greedy (default: the run's)"
    )
    parser.add_argument("--top-p", type=TOP_P, help="probability mass kept when sampling (default: the run's)")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the sampling (default 0)")
    return parser.parse_args()


def policy_of(run: Path | None, drafter: str | None) -> tuple[Policy, Keywords]:
    """Return the policy of a run and keyword arguments of its environment; without a run, a policy of fixed depth.

    Args:
        run: its folder, or the id of an environment for which an agent is shipped.
        drafter: what drafts; None is the run's, or the default for trees.

    Raises:
        ValueError: the run decodes no text, because it replays a trace; or several drafters, between which a fixed depth
            does not choose.
    """
    if not run:
        control: Control = DepthControl()
        if drafter:
            control.check_drafter(drafter)
            control = KControl() if DrafterName.parse(drafter).chain else control
        return Policy(control, FixedAgent(control, value=2)), {}
    policy, config = Policy(*agents.load(run)), agents.read_config(folder_of(run))
    env = {**config["env"], **config.get("eval_env", {})}
    if env.get("trace"):
        raise ValueError(f"{run} was trained on a trace, which writes no text; give a run on live models")
    return policy, env | ({"drafter": str(run)} if is_exit(run) else {})


def main() -> None:
    args = arguments()
    with one_sentence():
        policy, env = policy_of(args.run, args.drafter)
        control, agent = policy.control, policy.agent
        given = {name: vars(args)[name] for name in ("target", "drafter", "dtype", "temperature", "top_p")}
        env = {**env, "clock": "wall", **{name: value for name, value in given.items() if value is not None}}
        decoder = decoder_for(env, control)
        tokenizer = load_tokenizer(env.get("target", DEFAULT_TARGET))
        prompt = encode(tokenizer, args.prompt, env.get("template"), date=env.get("date"))
        plain = decoder.plain()
        generate(decoder, control, agent, prompt, 8).run()  # warm-up
        generate(plain, None, None, prompt, 8).run()
        generation = generate(decoder, control, agent, prompt, args.max_new_tokens, args.seed)
        for piece in generation.pieces():
            print(printable(piece), end="", flush=True)
        reference = generate(plain, None, None, prompt, args.max_new_tokens, args.seed).run()
        print(f"\n\n{last_line(generation, reference)}")


def last_line(generation: Generation, plain: Generation) -> str:
    """Return a line about the answer: its tokens per second, also over those of plain decoding, and its cycles."""
    fast, slow = generation.tokens_per_second, plain.tokens_per_second
    cycles = len(generation.cycles)
    emitted = (len(generation.tokens) - 1) / max(1, cycles)
    return (
        f"{len(generation.tokens)} tokens, {fast:.1f} tokens/s; plain {slow:.1f} tokens/s; {fast / slow:.2f}×; "
        f"{emitted:.2f} tokens per cycle; prefill {1000 * generation.prefill_seconds:.0f} ms"
    )


if __name__ == "__main__":
    main()
