"""A language model writes, and random actions decide how far ahead to draft: the text is the model's own all the same.

    python random_agent.py                      # SpecDepth-v0 with the default model, which is fetched once
    python random_agent.py SpecK-v0 --tokens 100

The loop is Gymnasium's. Whatever the actions are, they change the speed alone: under greedy decoding the text is the one
that the model writes without drafts.
"""

import argparse

import gymnasium as gym

import spec_envs
from spec_envs.text import printable

PROMPT = "Explain in three sentences why the sky is blue."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", nargs="?", default="SpecDepth-v0", choices=list(spec_envs.ENVIRONMENTS))
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of the text (default 64)")
    args = parser.parse_args()

    env = gym.make(args.env, max_new_tokens=args.tokens)
    env.action_space.seed(0)
    env.reset(seed=0, options={"prompt": PROMPT})
    steps, cycles, accepted, done = 0, 0, 0, False
    while not done:
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        done = terminated or truncated
        steps += 1
        cycles += info["emitted"] > 0  # this step ended a cycle: the drafted tokens were verified
        accepted += info["accepted"]
    env.close()

    print(printable(info["text"]))
    print(f"\n{info['tokens']} tokens from {cycles} forwards of the model, after {steps} random decisions")
    print(f"{accepted} drafted tokens were accepted; {info['speedup']:.2f} times as fast as without drafts")


if __name__ == "__main__":
    main()
