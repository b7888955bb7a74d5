"""A problem of your own, outside of the package: three lengths of a draft, chosen by whether the text is code.

    python own_control.py                # the number of training steps may follow

A problem is a `Control`: what is observed, and what an action does to the decoder. Registered, it is an environment.
Here it runs on a synthetic profile, in seconds; leave `trace` out to run it on a model.
"""

import sys

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import PPO

import spec_envs
from spec_envs.controls.base import Control
from spec_envs.controls.observation.entries import Entry, text_entries

LENGTHS = (0, 4, 12)


class ThreeLengths(Control):
    """A chain of 0, 4 or 12 tokens is drafted and verified."""

    name, width = "three-lengths", 1  # a chain is a tree whose nodes have one child
    observations, prunable, trace_kind = ("default",), False, "chain"

    def __init__(self, observation: str = "default", cost_features: bool = False):
        super().__init__(observation, cost_features)
        self.max_depth, self.action_space = max(LENGTHS) - 1, spaces.Discrete(len(LENGTHS))
        code = Entry("code", 1, 0.0, 1.0, lambda decoder: float(self.task == "code"))  # name, size, low, high, value
        self.declare([code, *text_entries()])  # and how long the text is

    def prepare(self, decoder):
        """Draft nothing: the decision comes before the draft."""

    def act(self, decoder, action):
        return decoder.cycle(LENGTHS[action])  # draft that many tokens, and verify them


def speedups(env, policy, texts=400):
    """Return in words how many times as fast as plain decoding a policy is, a mean over texts of each kind and over all."""
    found, (observation, _) = {"code": [], "prose": [], "math": [], "all texts": []}, env.reset(seed=1)
    while len(found["all texts"]) < texts:
        observation, _, ended, _, info = env.step(policy(observation))
        for kind in (info["task"], "all texts") if "speedup" in info else ():
            found[kind].append(info["speedup"])
        observation = env.reset()[0] if ended else observation
    return ", ".join(f"{kind} {np.mean(values):.2f}" for kind, values in found.items())


if __name__ == "__main__":
    spec_envs.register("example/ThreeLengths-v0", "__main__:ThreeLengths")
    env = gym.make("example/ThreeLengths-v0", trace="qwen2.5-coder-32b-cpu", max_new_tokens=96, episode="cycle")
    for action, length in enumerate(LENGTHS):
        print(f"always {length}: {speedups(env, lambda _, action=action: action)} times plain decoding")
    model = PPO("MlpPolicy", env, n_steps=1024, batch_size=64, learning_rate=1e-3, gamma=1.0, device="cpu", seed=0)
    model.learn(int(sys.argv[1]) if len(sys.argv) > 1 else 8192)
    print(f"trained: {speedups(env, lambda seen: model.predict(seen, deterministic=True)[0])} times plain decoding")
