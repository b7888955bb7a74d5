"""Thousands of episodes of a trace at once, as a ``VecEnv`` of Stable-Baselines3."""

from __future__ import annotations

import time
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from spec_envs.vector.env import ReplayVectorEnv

SUMMARY = ("task", "tokens", "speedup")  # of a text, in its last info


class ReplayVecEnv(VecEnv):
    """A ``ReplayVectorEnv`` that Stable-Baselines3 trains on.

    Args:
        env: the environments; ``ReplayVecEnv.make`` takes their keyword arguments instead.

    Raises:
        ValueError: environments that do not reset within the step.

    The info of an environment in which an episode ended has ``terminal_observation``, and at the end of a text also
    ``task``, ``tokens``, ``speedup`` and what ``Monitor`` would report: ``episode``, with the return ``r``, the steps
    ``l`` and the seconds ``t`` since this object was made. With ``episode="cycle"`` those are of the whole text too.
    All other environments share one empty info, so that a step costs no Python per environment.

    Each environment has a generator of its own, seeded as Stable-Baselines3 does; ``set_options({"texts": indices})``
    names those that begin at the next reset.

    Attributes:
        env: the environments.
        arrays: their results of the last step, ``[num_envs]`` each; see ``ReplayVectorEnv.step``.
    """

    env: ReplayVectorEnv

    def __init__(self, env: ReplayVectorEnv):
        if env.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"autoreset_mode is {env.autoreset_mode.value}; Stable-Baselines3 resets within the step, make the "
                f"environments with {AutoresetMode.SAME_STEP.value}"
            )
        self.env = env
        self.arrays: dict[str, Any] = {}
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.returns, self.lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, np.int64)
        self.nothing: dict[str, Any] = {}  # Stable-Baselines3 writes to the infos of ended episodes only
        self.began = time.perf_counter()

    @classmethod
    def make(cls, env_id: str, num_envs: int, **keywords: Any) -> ReplayVecEnv:
        """Return as many environments of that id.

        Args:
            keywords: of ``ReplayVectorEnv``; ``trace`` is one of them.

        Raises:
            TypeError, ValueError: see ``ReplayVectorEnv``.
        """
        return cls(ReplayVectorEnv(env_id, num_envs, **keywords))

    def reset(self) -> np.ndarray:
        """Begin a text in every environment."""
        observations, _ = self.env.reset(seed=self._seeds, options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        self.returns[:], self.lengths[:] = 0.0, 0
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Carry out a decision in every environment."""
        observations, rewards, done, _, self.arrays = self.env.step(self.actions)
        self.returns += rewards
        self.lengths += 1
        infos = [self.nothing] * self.num_envs
        for i in np.flatnonzero(done):
            infos[i] = {"terminal_observation": self.arrays["final_obs"][i], "TimeLimit.truncated": False}
        final = self.arrays.get("final_info", {})
        if "tokens" in final:  # a text has ended, and not only a cycle
            ended = np.flatnonzero(final["_tokens"])
            seconds = time.perf_counter() - self.began
            for i in ended:
                infos[i] |= {name: final[name][i] for name in SUMMARY}
                infos[i]["episode"] = {"r": float(self.returns[i]), "l": int(self.lengths[i]), "t": seconds}
            self.returns[ended], self.lengths[ended] = 0.0, 0
        return observations, rewards.astype(np.float32), done, infos

    def close(self) -> None:
        self.env.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute of ``env``, the same for every environment asked about."""
        return [getattr(self.env, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of ``env``.

        Raises:
            ValueError: for some environments only.
        """
        self._for_all(indices)
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of ``env`` once; what it returns, for every environment.

        Raises:
            ValueError: for some environments only.
        """
        self._for_all(indices)
        return [getattr(self.env, method_name)(*method_args, **method_kwargs)] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Answer as if in a ``Monitor`` and in nothing else: the infos have its ``episode``."""
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]

    @staticmethod
    def _for_all(indices: VecEnvIndices) -> None:
        if indices is not None:
            raise ValueError(f"indices is {indices!r}; one object is all the environments: leave indices out")


class Floored(VecEnvWrapper):
    """Raises the rewards of environments to at least ``floor``."""

    def __init__(self, env: VecEnv, floor: float):
        super().__init__(env)
        self.floor = floor

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        observations, rewards, done, infos = self.venv.step_wait()
        return observations, np.maximum(rewards, self.floor), done, infos
