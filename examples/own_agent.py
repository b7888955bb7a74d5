"""An agent of your own: it tries every draft length, and takes the best one for each kind of text (SpecK-v0).

    python own_agent.py                # the number of training steps may follow

An agent is a class with these methods; `Agent` adds Stable-Baselines3's `predict`. It learns on a synthetic profile.
"""

import sys

import gymnasium as gym
import numpy as np

from spec_envs.agents.base import Agent
from spec_envs.controls.observation.text_kind import KINDS
from spec_envs.files import read_json, write_json


class BestByKind(Agent):
    """Takes the length with the largest mean reward for the kind of text; while it learns, every other one is random."""

    looks_at = ("kind",)  # the one entry of the observation that it reads
    priced_seconds = 0.0  # seconds of a decision where time is priced

    def __init__(self, control, **hyperparameters):
        super().__init__(control, **hyperparameters)
        self.tries, self.means = np.zeros((2, len(KINDS), control.action_space.n))

    def measure(self):
        return 0.0  # seconds of a decision where time is measured

    def decide(self, observation, state, start, deterministic):
        kind = observation[self.control.slices["kind"]].argmax()
        return int(self.means[kind].argmax()), state

    def learn(self, total_timesteps, env, run=None):
        observation, _ = env.reset(seed=0)
        env.action_space.seed(0)
        for step in range(total_timesteps):
            kind = observation[self.control.slices["kind"]].argmax()
            action = env.action_space.sample() if step % 2 else self.predict(observation)[0]
            observation, reward, ended, _, _ = env.step(action)
            self.tries[kind, action] += 1
            self.means[kind, action] += (reward - self.means[kind, action]) / self.tries[kind, action]
            observation = env.reset()[0] if ended else observation
        return self

    def save(self, folder):
        write_json(folder / "means.json", self.means.tolist())

    def load(self, folder):
        self.means = np.array(read_json(folder / "means.json", "delete it to train again"))


if __name__ == "__main__":
    env = gym.make("SpecK-v0", trace="qwen2.5-coder-32b-cpu", max_new_tokens=96)
    agent = BestByKind(env.unwrapped.control).learn(int(sys.argv[1]) if len(sys.argv) > 1 else 8000, env)
    seen = np.flatnonzero(agent.tries.any(1))  # the profile has three of the kinds
    same = agent.means[seen].mean(0).argmax()  # the best length for all of them
    for kind, means in zip(seen, agent.means[seen], strict=True):
        print(f"{KINDS[kind]}: draft {means.argmax()} tokens; {means.max() - means[same]:.2f} a cycle more than {same}")
