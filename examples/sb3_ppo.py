"""PPO of Stable-Baselines3 learns when to stop drafting (SpecK-v0, a decision per token), in seconds, without a model.

    python sb3_ppo.py                # the number of steps may follow

The environment runs on a synthetic profile: acceptance probabilities and costs of a 32B model. A return of 0 is the
speed of the best fixed length; a return of 5 is five tokens more in the same time, -5 five fewer.
"""

import sys

from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import spec_envs  # noqa: F401 - registers the environments

PROFILE = {"trace": "qwen2.5-coder-32b-cpu", "max_new_tokens": 96, "decision": "token"}


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 16_384
    # A cycle hardly influences the next one, so each is an episode; the texts of the evaluation are whole ones.
    env = make_vec_env("SpecK-v0", n_envs=8, seed=0, env_kwargs=PROFILE | {"episode": "cycle"})
    texts = make_vec_env("SpecK-v0", n_envs=1, seed=100, env_kwargs=PROFILE)
    model = PPO("MlpPolicy", env, n_steps=256, batch_size=512, learning_rate=3e-3, gamma=1.0, device="cpu", seed=1)
    before, _ = evaluate_policy(model, texts, n_eval_episodes=40)
    model.learn(steps)
    after, _ = evaluate_policy(model, texts, n_eval_episodes=40)
    print(f"mean return of 40 texts: {before:.1f} before training, {after:.1f} after {steps:,} steps")


if __name__ == "__main__":
    main()
