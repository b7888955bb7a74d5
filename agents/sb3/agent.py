"""Every Stable-Baselines3 and sb3-contrib algorithm for discrete actions, trained there and deployed bare."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import QRDQN, TRPO, RecurrentPPO
from scipy.special import softmax
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common import monitor
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from spec_envs.agents.base import Agent
from spec_envs.agents.exits.policy import ExitPolicy
from spec_envs.agents.run import CHECKPOINT, Run
from spec_envs.agents.sb3.callbacks import BEST, Keeper, Monitor
from spec_envs.agents.sb3.ddqn import DoubleDQN
from spec_envs.agents.sb3.deployed import bare
from spec_envs.agents.sb3.vec_env import ReplayVecEnv
from spec_envs.agents.schedules import schedule
from spec_envs.agents.timing import cold_seconds
from spec_envs.controls.base import Control
from spec_envs.decoding.exits.files import save_exit
from spec_envs.decoding.weights.checkpoints import resolve_device
from spec_envs.sealed import first_line, number_of, read_torch, read_weights, write_torch, write_weights
from spec_envs.vector.env import ReplayVectorEnv

ALGORITHMS: dict[str, type[BaseAlgorithm]] = {
    "ppo": PPO,
    "a2c": A2C,
    "trpo": TRPO,
    "recurrent-ppo": RecurrentPPO,
    "dqn": DQN,
    "ddqn": DoubleDQN,
    "qrdqn": QRDQN,
}
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "gelu": nn.GELU}
RESERVED = frozenset(
    {  # arguments of the algorithms that this class sets itself, or that are objects, not settings
        *("self", "policy", "env", "seed", "device", "tensorboard_log", "verbose", "policy_kwargs", "learning_rate"),
        *("_init_setup_model", "base", "rollout_buffer_class", "rollout_buffer_kwargs"),
        *("replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage"),
    }
)
BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
WEIGHTS = "policy.safetensors"


class SB3Agent(Agent):
    """A Stable-Baselines3 algorithm.

    Args:
        control: the problem, for its spaces.
        algorithm: a name of ``ALGORITHMS``.
        total_timesteps: what the learning-rate schedule spans.
        seed: of the policy's initial weights and of training.
        learning_rate, lr_schedule, warmup_timesteps: see :func:`spec_envs.agents.schedules.schedule`.
        pi_arch, vf_arch: hidden layers of policy and value network (value-based algorithms use ``pi_arch``).
        activation: ``relu``, ``tanh``, ``elu`` or ``gelu``.
        num_envs: environments that ``learn`` gets at once (``spec_envs.agents.sb3.vec_env.ReplayVecEnv``).
        hyperparameters: the algorithm's own constructor arguments.

    Attributes:
        model: the Stable-Baselines3 object; built over a stand-in environment until ``learn`` brings the real one.
        decision_seconds: time of one bare decision; measured when the agent is made, then kept with its weights.

    Raises:
        ValueError: a hyper-parameter that the algorithm does not have, or a value that it does not take.
    """

    learns_from = "rewards"
    validated_by = "speedup"
    reserved = RESERVED
    starts_from = ("init", "checkpoint")

    def __init__(
        self,
        control: Control,
        algorithm: str,
        total_timesteps: int = 1,
        seed: int = 0,
        learning_rate: float = 3e-4,
        lr_schedule: str = "constant",
        warmup_timesteps: int | None = None,
        pi_arch: tuple[int, ...] = (64, 64),
        vf_arch: tuple[int, ...] = (64, 64),
        activation: str = "tanh",
        num_envs: int = 1,
        **hyperparameters: Any,
    ):
        kind = ALGORITHMS[algorithm]
        known = set(inspect.signature(kind).parameters) - RESERVED
        if unknown := set(hyperparameters) - known:
            raise ValueError(f"{algorithm} has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        if not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs is {num_envs!r}; expected 1 or more")
        value_based = issubclass(kind, OffPolicyAlgorithm)
        for name, layers in (("pi_arch", pi_arch), ("vf_arch", vf_arch)):
            if not isinstance(layers, Sequence) or not all(isinstance(n, int) and n > 0 for n in layers):
                raise ValueError(f"{name} is {layers!r}; expected the sizes of hidden layers, such as [64, 64]")
        arch: Any = list(pi_arch) if value_based else {"pi": list(pi_arch), "vf": list(vf_arch)}
        learning_rates = schedule(lr_schedule, learning_rate, total_timesteps, warmup_timesteps)
        device = torch.device("cpu")  # the networks are small; the accelerator belongs to the decoder
        policy: Any = "MlpLstmPolicy" if algorithm == "recurrent-ppo" else "MlpPolicy"
        policy_kwargs = {"net_arch": arch, "activation_fn": ACTIVATIONS[activation]}
        if (exit := control.exit) is not None:
            if value_based or algorithm == "recurrent-ppo":
                raise ValueError(
                    f"{algorithm} has no policy that starts as an exit's projection; take ppo, a2c or trpo"
                )
            if exit.adapter != "head":
                raise ValueError(
                    f'{algorithm} trains the projection alone: adapter is {exit.adapter!r}, expected "head"'
                )
            policy, policy_kwargs = ExitPolicy, policy_kwargs | ExitPolicy.keywords(exit)
            device = resolve_device(exit.device)  # where the exit's projection is
        try:
            self.model = kind(
                policy,
                DummyVecEnv([lambda: Spaces(control)] * num_envs),
                learning_rate=learning_rates,
                policy_kwargs=policy_kwargs,
                seed=seed,
                device=device,
                **hyperparameters,
            )
        except (AssertionError, TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
            given = ", ".join(f"{name}={value!r}" for name, value in hyperparameters.items())
            raise ValueError(f"{algorithm} refuses its hyper-parameters ({given}): {first_line(error)}") from None
        self.control, self.seed = control, seed
        self.shown = {"agent": algorithm, "seed": seed, "learning_rate": learning_rate, **hyperparameters}
        self.rng = np.random.default_rng(seed)
        self.redeploy()
        self.decision_seconds = self.measure()

    def redeploy(self) -> None:
        """Take the network out of the policy again, after the policy changed."""
        self.network = bare(self.model.policy)

    @property
    def priced_seconds(self) -> float:
        """Seconds of a bare decision under a cost table."""
        return self.network.priced_seconds

    def measure(self) -> float:
        """Return the median seconds of a bare decision."""
        blank = np.zeros_like(self.model.observation_space.sample())
        return cold_seconds(lambda: self.predict(blank, deterministic=True))

    def decide(self, observation: np.ndarray, state: Any, start: bool, deterministic: bool) -> tuple[Any, Any]:
        """Return the action for one observation, by the bare network; ``state`` is the recurrent state or None."""
        state = None if start else state
        preferences, state = self.network(np.asarray(observation, np.float32), state)
        if deterministic:
            return int(preferences.argmax()), state
        weights = softmax(preferences.astype(float)) if self.network.logits else np.ones(len(preferences))
        return int(self.rng.choice(len(weights), p=weights / weights.sum())), state

    def learn(self, total_timesteps: int, env: gym.Env | VecEnv | ReplayVectorEnv, run: Run | None = None) -> Self:
        """Train until ``total_timesteps`` in all, continuing from what was loaded or from the run's checkpoint; with
        validations the agent is then the best of those that were validated.

        Raises:
            ValueError: another number of environments than the agent was made for, or a checkpoint that cannot be read.
        """
        run = run or Run()
        vectorized = vectorized_of(env)
        if vectorized.num_envs != self.model.n_envs:
            raise ValueError(
                f"there are {vectorized.num_envs} environments, the agent was made for {self.model.n_envs}; make it with "
                f"num_envs={vectorized.num_envs}"
            )
        callbacks = self._callbacks(run, vectorized)
        vectorized.seed(self.seed + self.model.num_timesteps)  # a resumed run continues with other prompts
        self.model.set_env(vectorized, force_reset=True)
        self.model.tensorboard_log = str(run.folder) if run.folder else None
        remaining = total_timesteps - self.model.num_timesteps
        if remaining > 0:
            self.model.learn(
                remaining,
                callbacks,
                log_interval=1,
                tb_log_name="events",
                reset_num_timesteps=False,
                progress_bar=run.progress_bar,
            )
        self.redeploy()
        if run.folder and (run.folder / BEST / WEIGHTS).exists():
            self.load(run.folder / BEST)
        return self

    def _callbacks(self, run: Run, env: VecEnv) -> list[BaseCallback]:
        """Return the callbacks of a run, after continuing from its checkpoint if there is one."""
        if run.folder is None:
            return []
        history = self.load_checkpoint((run.folder / CHECKPOINT).parent)["history"] if run.begun else []
        callbacks: list[BaseCallback] = [Keeper(self, run.folder, run, history)]
        if env.has_attr("prompt"):  # one that decodes
            callbacks.append(Monitor(run.folder / "log.jsonl", self.shown))
        return callbacks

    def save(self, folder: Path) -> None:
        """Write the policy's weights, last, because their file marks the run as trained."""
        if isinstance(self.model.policy, ExitPolicy):
            save_exit(self.model.policy.adapter, folder)  # which serves as drafter=
        write_weights(folder / WEIGHTS, self.model.policy.state_dict(), decision_seconds=repr(self.decision_seconds))

    def load(self, folder: Path) -> None:
        """Read the policy's weights.

        Raises:
            ValueError: no weights, damaged ones, or those of another network.
        """
        path, remedy = folder / WEIGHTS, "delete it to train again"
        tensors, metadata = read_weights(path, "the policy", remedy)
        seconds = number_of(metadata, "decision_seconds", path, remedy)
        try:
            self.model.policy.load_state_dict(tensors)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"cannot read the policy {path}: {first_line(error)}; {remedy}") from None
        self.decision_seconds = seconds
        self.redeploy()

    def save_checkpoint(self, folder: Path, **beside: Any) -> None:
        """Write everything that training needs to continue into one file, so that all of it is of one moment.

        Args:
            beside: what the caller needs to continue; ``load_checkpoint`` returns it.
        """
        state: dict[str, Any] = {
            "parameters": self.model.get_parameters(),
            "num_timesteps": self.model.num_timesteps,
            "updates": self.model._n_updates,
            "torch_rng": torch.get_rng_state(),
            "beside": beside,
        }
        if isinstance(self.model, OffPolicyAlgorithm) and self.model.replay_buffer is not None:
            buffer = self.model.replay_buffer
            rows = buffer.buffer_size if buffer.full else buffer.pos
            state["replay"] = {name: torch.from_numpy(getattr(buffer, name)[:rows]) for name in BUFFER}
            state |= {"pos": buffer.pos, "full": buffer.full}
        write_torch(folder / CHECKPOINT.name, state)

    def load_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Continue from a checkpoint, and return what was saved ``beside`` it.

        Raises:
            ValueError: no checkpoint, a damaged one, or one of another network or replay buffer.
        """
        path, remedy = folder / CHECKPOINT.name, "delete it to begin anew"
        state = read_torch(path, "the checkpoint", remedy)
        try:
            self.model.set_parameters(state["parameters"], exact_match=True, device="cpu")
            self.model.num_timesteps, self.model._n_updates = int(state["num_timesteps"]), int(state["updates"])
            torch.set_rng_state(state["torch_rng"])
            if isinstance(self.model, OffPolicyAlgorithm) and "replay" in state:
                buffer = self.model.replay_buffer
                assert buffer is not None
                for name in BUFFER:
                    rows = state["replay"][name].numpy()
                    getattr(buffer, name)[: len(rows)] = rows
                buffer.pos, buffer.full = int(state["pos"]), bool(state["full"])
            beside: dict[str, Any] = state["beside"]
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"cannot read the checkpoint {path}: {first_line(error)}; {remedy}") from None
        self.redeploy()
        return beside


def agent_of(algorithm: str) -> type[SB3Agent]:
    """Return the agent of one algorithm, which is made without naming it."""

    class Named(SB3Agent):
        def __init__(self, control: Control, **hyperparameters: Any):
            super().__init__(control, algorithm, **hyperparameters)

        @classmethod
        def constructors(cls) -> list[Callable[..., Any]]:
            return [SB3Agent.__init__, ALGORITHMS[algorithm].__init__]

    Named.__name__ = Named.__qualname__ = f"{ALGORITHMS[algorithm].__name__}Agent"
    return Named


def vectorized_of(env: gym.Env | VecEnv | ReplayVectorEnv) -> VecEnv:
    """Return environments as Stable-Baselines3 takes them, a single one in its ``Monitor``."""
    if isinstance(env, VecEnv):
        return env
    if isinstance(env, ReplayVectorEnv):
        return ReplayVecEnv(env)
    monitored = env if is_wrapped(env, monitor.Monitor) else monitor.Monitor(env)
    return DummyVecEnv([lambda: monitored])


class Spaces(gym.Env):
    """A stand-in environment that only has a control's spaces."""

    def __init__(self, control: Control):
        self.observation_space, self.action_space = control.observation_space, control.action_space
