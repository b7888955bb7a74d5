"""Decide which tokens to draft at the target's own early exit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from spec_envs.checked import check_number
from spec_envs.controls.base import LONGEST_CHAIN, Control
from spec_envs.controls.exit_point import ExitPoint
from spec_envs.controls.observation.entries import WINDOWS, Entry, text_entries
from spec_envs.controls.observation.recorded import ENTROPY_UNIT
from spec_envs.controls.rewards import accepted, saved
from spec_envs.decoding.clock import WallClock
from spec_envs.decoding.cycle import Cycle
from spec_envs.decoding.drafters.names import EXIT
from spec_envs.decoding.engine import Engine
from spec_envs.decoding.exits.adapter import KINDS, ExitAdapter
from spec_envs.decoding.exits.decoder import ExitDecoder
from spec_envs.decoding.loading import DEFAULT_TARGET, Models, load_decoder
from spec_envs.decoding.model.shape import Shape
from spec_envs.decoding.sampling import WARM, warm
from spec_envs.decoding.weights.checkpoints import model_folder
from spec_envs.decoding.weights.config import load_config

LARGE = float(np.finfo(np.float32).max)  # hidden states have no bound


class DVIControl(Control):
    """
    ## Description

    The target drafts for itself: its first `exit_layer` layers read the text, and the agent sees their state of the
    last token and picks the next token. When a block is drafted, the remaining layers continue from the same states and
    verify it in one forward: tokens that the target agrees with are kept, and it adds a token of its own. An agent that
    learns while it decodes makes the exit a better drafter (draft, verify, improve: DVI, arXiv 2510.05421).

    ## Action Space

    `Discrete(vocabulary)`: the token to draft.

    ## Observation Space

    A `Box` of float32; with the default target, of hidden size 576:

    | Num | Observation | Min | Max |
    |-----|-------------|-----|-----|
    | 0–575 | `hidden`: the exit state of the last token, drafted ones included, after Kangaroo's attention if there is one; 0 after the end of a text | −3.4e38 | 3.4e38 |

    `observation="policy"` appends what the exit's own projection makes of it, which has to be computed:

    | Num | Observation | Min | Max |
    |-----|-------------|-----|-----|
    | 576 | `probability`: that it gives its most probable token | 0 | 1 |
    | 577 | `entropy`: of its distribution, nats / 10 | 0 | 1 |
    | 578 | `drafted`: tokens of the block so far / `block` | 0 | 1 |
    | 579–580 | `acceptance`: accepted / verified tokens over 4 and 16 cycles | 0 | 1 |
    | 581 | `position`: emitted tokens / `max_new_tokens` | 0 | 1 |
    | 582 | `context`: tokens of the text / 4096 | 0 | 1 |

    ## Rewards

    `"accepted"` is paid when a block is verified: at every step with `block=1`, else at a block's last. Greedily the target accepts its own most probable token; when it
    samples, token x with the probability p(x) that it gives it (the agent's choice is a fixed proposal, whatever
    distribution it came from, which is exact). Tokens after the first rejected one are never verified.

    ## Starting State

    The target's first token after the prompt; the exit has read it.

    ## Information

    - `positions`: for each verified token of a block `token`, `accepted`, and `confidence`, the probability that the
      target gave it.

    ## Arguments

    - `exit_layer=2`: layers before the exit.
    - `block=1`: drafted tokens that are verified together.
    - `adapter="head"`: what may be trained. `"head"` is low rank on the exit's projection alone and `"kangaroo"` that
      after an adapter of norm, attention and norm (arXiv 2404.18911); with both the target stays as it is, and the text
      is its own. `"layers"` is low rank on its layers, `lora_S` before the exit and `lora_D` after it; the text is
      then that of the adapted target. An agent reaches it as `env.unwrapped.decoder.drafter.adapter`.
    - `rank=None`: rank of the low-rank weights; by default 64 for projections, 8 for layers.
    - `stop=0`: a block is verified early after a token that the exit gives less than this probability (Kangaroo: 0.6).
    - `draft_temperature=0`: temperature at which `reinforce` and `dvi` draw what they draft while they learn; 0 takes
      the most probable token.

    and the shared ones; `drafter` is `"auto"` for an untrained exit, or the folder of a trained one.

    ## Version History

    - v0: initial version.
    """

    name = "dvi"
    observations = ("default", "policy")
    rewards = {"accepted": accepted, "saved": saved}  # noqa: RUF012 - declared by Control
    width = 1
    prunable = False
    exit: ExitPoint

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        device: str = "auto",
        dtype: str = "auto",
        exit_layer: int = 2,
        block: int = 1,
        adapter: str = "head",
        rank: int | None = None,
        stop: float = 0.0,
        draft_temperature: float = 0.0,
        observation: str = "default",
        cost_features: bool = False,
    ):
        super().__init__(observation, cost_features)
        shape = Shape.from_config(load_config(model_folder(target)))
        layers = shape.layers
        for name, value, fits, expected in (
            ("exit_layer", exit_layer, 1 <= exit_layer < layers, f"1 to {layers - 1}, of {layers} layers"),
            ("block", block, 1 <= block <= LONGEST_CHAIN, f"1 to {LONGEST_CHAIN} drafted tokens"),
            ("adapter", adapter, adapter in KINDS, f"one of {', '.join(KINDS)}"),
            ("rank", rank, rank is None or 1 <= rank <= shape.hidden, f"1 to {shape.hidden}"),
            ("stop", stop, 0 <= stop <= 1, "a probability from 0 to 1"),
        ):
            if not fits:
                raise ValueError(f"{name} is {value!r}; expected {expected}")
        check_number("draft_temperature", draft_temperature, warm, WARM)
        self.exit = ExitPoint(target, device, dtype, exit_layer, adapter, rank, draft_temperature)
        self.block, self.stop = block, stop
        self.max_depth = max(block - 1, 1)
        self.action_space = spaces.Discrete(shape.vocab)
        self.state: Tensor | None = None
        self.declare(self._entries(shape.hidden))

    def _entries(self, hidden: int) -> list[Entry]:
        entries = [Entry("hidden", hidden, -LARGE, LARGE, self._read_hidden)]
        if self.observation == "policy":
            entries += [
                Entry("probability", 1, 0.0, 1.0, lambda d: float(self._probabilities(d).max())),
                Entry("entropy", 1, 0.0, 1.0, lambda d: entropy(self._probabilities(d)) / ENTROPY_UNIT),
                Entry("drafted", 1, 0.0, 1.0, lambda d: d.tree.size / self.block),
                Entry("acceptance", len(WINDOWS), 0.0, 1.0, lambda d: [accepted_share(d.cycles[-n:]) for n in WINDOWS]),
                *text_entries(),
            ]
        return entries

    def default_drafter(self, target: str) -> str:
        return self.exit.drafter

    def open_models(self, models: Models, clock: WallClock | None) -> ExitDecoder:
        """Open a decoder that drafts from the target's own exit.

        Raises:
            ValueError: another drafter, or an exit whose settings are not the control's.
        """
        opened = load_decoder(
            **vars(models),
            clock=clock,
            width=self.width,
            max_depth=self.max_depth,
            adapter=self.exit.adapter,
            rank=self.exit.rank,
        )
        decoder = on_exit(opened)
        found = decoder.drafter.adapter.settings
        for name, wanted, has in (
            ("exit_layer", self.exit.exit_layer, found.exit_layer),
            ("adapter", self.exit.adapter, found.kind),
            ("rank", self.exit.rank or found.rank, found.rank),
        ):
            if wanted != has:
                raise ValueError(f"{name} is {wanted}, but the exit {models.drafter!r} has {has}; pass {name}={has!r}")
        return decoder

    def open_recording(self, trace: str, clock: WallClock) -> ExitDecoder:
        raise ValueError(f"trace is {trace!r}; no trace replays SpecDVI-v0, whose states are those of a model")

    def prepare(self, decoder: ExitDecoder) -> None:
        self.state = decoder.look()

    def act(self, decoder: ExitDecoder, action: int) -> Cycle | None:
        unsure = self.stop > 0 and self._probabilities(decoder)[action] < self.stop
        decoder.put(action)
        if decoder.tree.size < self.block and not unsure:
            return None
        return decoder.verify()

    def details(self, decoder: ExitDecoder, cycle: Cycle | None) -> dict[str, Any]:
        if cycle is None:
            return {"positions": []}
        tokens = torch.from_numpy(cycle.nodes.tokens[: cycle.scored])
        logits = decoder.verifier.logits[: cycle.scored].float() / (decoder.temperature or 1.0)
        confidences = logits.softmax(-1).cpu().gather(1, tokens[:, None])[:, 0].tolist()
        return {
            "positions": [
                {"token": int(token), "accepted": i < cycle.accepted, "confidence": confidence}
                for i, (token, confidence) in enumerate(zip(tokens, confidences, strict=True))
            ]
        }

    def _read_hidden(self, decoder: ExitDecoder) -> np.ndarray:
        if decoder.finished or self.state is None:
            return np.zeros(0)
        return self.state.float().cpu().numpy()

    def _probabilities(self, decoder: ExitDecoder) -> np.ndarray:
        """Return the exit's distribution ``[vocabulary]`` of the next token, or a single 0 without an exit state."""
        if decoder.finished or self.state is None:
            return np.zeros(1)
        with torch.no_grad():
            logits = decoder.drafter.adapter.logits(self.state[None])[0]
        return (logits / (self.exit.draft_temperature or 1.0)).softmax(-1).cpu().numpy()


def exit_of(engine: Engine) -> ExitAdapter:
    """Return the exit that an engine drafts from, with its trained weights.

    Raises:
        ValueError: the engine has another drafter.
    """
    return on_exit(engine).drafter.adapter


def on_exit(engine: Engine) -> ExitDecoder:
    """Return an engine that has to be a decoder on the target's own exit.

    Raises:
        ValueError: the engine has another drafter.
    """
    if not isinstance(engine, ExitDecoder):
        raise ValueError(
            "SpecDVI-v0 drafts from the target's own exit: "
            f"set drafter to 'auto', '{EXIT}N' or the folder of a trained one"
        )
    return engine


def entropy(p: np.ndarray) -> float:
    """Return the entropy of a distribution, in nats."""
    return float(-(p * np.log(np.maximum(p, 1e-30))).sum())


def accepted_share(cycles: list[Cycle]) -> float:
    """Return the share of verified tokens that were accepted; 0 if none was verified."""
    scored = sum(cycle.scored for cycle in cycles)
    return sum(cycle.accepted for cycle in cycles) / scored if scored else 0.0
