"""Every Stable-Baselines3 and sb3-contrib algorithm for discrete actions, trained there and deployed bare."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Self

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
from spec_envs.agents.sb3.settings import SB3Settings, settings_of
from spec_envs.agents.sb3.vec_env import Floored, ReplayVecEnv
from spec_envs.agents.schedules import schedule
from spec_envs.agents.settings import choices
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
DESCRIPTIONS = {
    "ppo": """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347, equation 7): gathers `n_steps` decisions,
then makes `n_epochs` passes over them with the clipped policy gradient. The safe first choice among the algorithms that
learn from rewards.""",
    "a2c": """Advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783): one step of policy gradient after every few
decisions. An update costs little, and more decisions are needed than by `ppo`.""",
    "trpo": """Trust-region policy optimisation (Schulman et al. 2015, arXiv 1502.05477): each update moves the policy as far as
a bound on the Kullback-Leibler divergence allows. It has no learning rate of the policy to tune.""",
    "recurrent-ppo": """`ppo` with an LSTM, which remembers the decisions of the text so far. The LSTM is computed in PyTorch, so
that a decision takes longer than a plain network's, and that time is charged.""",
    "dqn": """Deep Q-learning (Mnih et al. 2013, arXiv 1312.5602): learns the value of each action from a buffer of past
decisions, each of which is used many times. It pays where decisions are dear, as over live models.""",
    "ddqn": """Double deep Q-learning (van Hasselt et al. 2016, arXiv 1509.06461, equation 4) on Stable-Baselines3's DQN, by
default with exploration, target copies and loss of the published top-k selector: ε falls by the factor `epsilon_decay`
at every update, the target network is copied every `target_update_updates` updates, and `loss` is `"mse"` or
`"huber"`. With null instead, the first two are DQN's own, by steps of the environment.""",
    "qrdqn": """Quantile-regression DQN (Dabney et al. 2018, arXiv 1710.10044): learns quantiles of each action's return; it
decides by their mean.""",
}
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "gelu": nn.GELU}
BUFFER = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
WEIGHTS = "policy.safetensors"


class SB3Agent(Agent):
    """An agent of one Stable-Baselines3 algorithm; ``agent_of`` makes the class of each.

    Args:
        control: the problem, for its spaces.
        hyperparameters: fields of ``Settings``, by name: ``SB3Settings``, and the arguments of the algorithm's own
            constructor.

    Attributes:
        algorithm: name of the algorithm in ``ALGORITHMS``.
        model: the Stable-Baselines3 object; built over a stand-in environment until ``learn`` receives the real one.
        decision_seconds: time of one bare decision; measured when the agent is made, then kept with its weights.

    Raises:
        ValueError: a hyper-parameter that the algorithm does not have, or a value that it does not take.
    """

    Settings: ClassVar[type[SB3Settings]] = SB3Settings
    settings: SB3Settings
    algorithm: ClassVar[str] = ""
    learns_from = "rewards"
    validated_by = "speedup"
    starts_from = ("init", "checkpoint")

    def __init__(self, control: Control, **hyperparameters: Any):
        if not self.algorithm:
            raise TypeError(
                'SB3Agent is the base class of its agents; make one of them, such as AGENTS["ppo"](control)'
            )
        super().__init__(control, **hyperparameters)
        own, name, kind = self.settings, self.algorithm, ALGORITHMS[self.algorithm]
        value_based = issubclass(kind, OffPolicyAlgorithm)
        arch: Any = list(own.pi_arch) if value_based else {"pi": list(own.pi_arch), "vf": list(own.vf_arch)}
        learning_rates = schedule(own.lr_schedule, own.learning_rate, own.total_timesteps, own.warmup_timesteps)
        device = torch.device("cpu")  # the networks are small; the accelerator belongs to the decoder
        policy: Any = "MlpLstmPolicy" if name == "recurrent-ppo" else "MlpPolicy"
        policy_kwargs = {"net_arch": arch, "activation_fn": ACTIVATIONS[own.activation]}
        if (exit := control.exit) is not None:
            if value_based or name == "recurrent-ppo":
                raise ValueError(f"{name} has no policy that starts as an exit's projection; take ppo, a2c or trpo")
            if exit.adapter != "head":
                raise ValueError(f'{name} trains the projection alone: adapter is {exit.adapter!r}, expected "head"')
            policy, policy_kwargs = ExitPolicy, policy_kwargs | ExitPolicy.keywords(exit)
            device = resolve_device(exit.device)  # where the exit's projection is
        try:
            self.model = kind(
                policy,
                DummyVecEnv([lambda: Spaces(control)] * own.num_envs),
                learning_rate=learning_rates,
                policy_kwargs=policy_kwargs,
                seed=own.seed,
                device=device,
                **own.of_algorithm(),
            )
        except (AssertionError, TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in own.of_algorithm().items())
            raise ValueError(f"{name} refuses its hyper-parameters ({given}): {first_line(error)}") from None
        self.shown = {"agent": name, "seed": own.seed, "learning_rate": own.learning_rate, **own.of_algorithm()}
        self.rng = np.random.default_rng(own.seed)
        if own.draft_chance is not None:
            self._start_drafting(own.draft_chance)
        self.redeploy()
        self.decision_seconds = self.measure()

    def _start_drafting(self, chance: float) -> None:
        """Let the fresh policy go on drafting with a chance, whatever the number of other actions.

        Raises:
            ValueError: it has no probabilities of actions, or no decision to go on drafting.
        """
        if (found := self._drafting()) is None:
            raise ValueError(
                f"draft_chance is {chance}, but {self.algorithm} does not decide with a probability whether "
                f"{self.control.env_id} goes on drafting; leave it out"
            )
        layer, drafts = found
        with torch.no_grad():
            layer.bias[drafts] += math.log(chance / (1 - chance) * (layer.out_features - 1))

    def _drafting(self) -> tuple[nn.Linear, int] | None:
        """Return the layer whose outputs are the chances of actions, and the action that goes on drafting; None if the
        policy has no such chances, or no such action."""
        layer, drafts = getattr(self.model.policy, "action_net", None), None
        if self.control.progress and not self.control.link:
            drafts = self.control.plans().drafts
        return None if drafts is None or not isinstance(layer, nn.Linear) else (layer, drafts)

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
        if self.settings.reward_floor is not None:
            vectorized = Floored(vectorized, self.settings.reward_floor)
        if vectorized.num_envs != self.model.n_envs:
            raise ValueError(
                f"there are {vectorized.num_envs} environments, the agent was made for {self.model.n_envs}; make it "
                f"with num_envs={vectorized.num_envs}"
            )
        callbacks = self._callbacks(run, vectorized)
        vectorized.seed(self.settings.seed + self.model.num_timesteps)  # a resumed run continues with other prompts
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

    def space(self, trial: Any) -> dict[str, Any]:
        own = dict(self.settings)
        floors = choices(own["reward_floor"], None, -1.0, -3.0, -10.0)
        found = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True),
            "reward_floor": trial.suggest_categorical("reward_floor", floors),
        }
        if "ent_coef" in own:
            found["ent_coef"] = trial.suggest_float("ent_coef", 0.0, 0.03)
        if "gae_lambda" in own:  # it learns from rollouts
            steps = own["n_steps"]
            lengths = choices(steps, max(2, steps // 4), max(2, steps // 2), 2 * steps)
            found["n_steps"] = trial.suggest_categorical("n_steps", lengths)
            found["gae_lambda"] = trial.suggest_float("gae_lambda", 0.8, 1.0)
        if self._drafting():
            chances = choices(own["draft_chance"], None, 0.7, 0.9)
            found["draft_chance"] = trial.suggest_categorical("draft_chance", chances)
        return found

    def _callbacks(self, run: Run, env: VecEnv) -> list[BaseCallback]:
        """Return the callbacks of a run, after continuing from its checkpoint if there is one."""
        if run.folder is None:
            return []
        history = self.load_checkpoint((run.folder / CHECKPOINT).parent)["history"] if run.begun else []
        callbacks: list[BaseCallback] = [Keeper(self, run.folder, run, history)]
        if env.has_attr("prompt"):  # one that decodes
            callbacks.append(Monitor(run.folder / "log.jsonl", self.shown))
        return callbacks

    def save(self, folder: str | Path) -> None:
        """Write the policy's weights, last, because their file marks the run as trained."""
        if isinstance(self.model.policy, ExitPolicy):
            save_exit(self.model.policy.adapter, Path(folder))  # which serves as drafter=
        write_weights(
            Path(folder) / WEIGHTS, self.model.policy.state_dict(), decision_seconds=repr(self.decision_seconds)
        )

    def load(self, folder: str | Path) -> None:
        """Read the policy's weights.

        Raises:
            ValueError: no weights, damaged ones, or those of another network.
        """
        path, remedy = Path(folder) / WEIGHTS, "delete it to train again"
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
        path, remedy = folder / CHECKPOINT.name, "delete it to start over"
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
    """Return the class of the agent of an algorithm."""
    kind = ALGORITHMS[algorithm]
    described = {
        "algorithm": algorithm,
        "Settings": settings_of(kind),
        "__doc__": DESCRIPTIONS[algorithm],
        "__module__": __name__,
    }
    return type(f"{kind.__name__}Agent", (SB3Agent,), described)


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
