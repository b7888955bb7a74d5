"""Make a video of an environment: the text, the draft as it grows, and what the target accepts of it (`spec-envs video`).

The policy is the shipped agent of the environment; where none is shipped, the fixed setting of experiments/ENV.yml, and
in SpecDVI-v0 the untrained exit. `--agent` plays another stanza that needs no training, `--run` a trained agent. An
agent that weighs seconds, such as hedge, needs `--set env.clock=TABLE`, the name of a cost table.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from PIL import Image

from spec_envs import ENVIRONMENTS, agents
from spec_envs.agents import AGENTS, SHIPPED
from spec_envs.agents.base import Agent
from spec_envs.agents.exits.online import OnlineAgent
from spec_envs.arguments import SEED, TOKENS, Parser, input_folder, nonempty, number, output_file
from spec_envs.decoding.clock import PricedClock
from spec_envs.decoding.exits.files import is_exit
from spec_envs.env import SpecEnv
from spec_envs.experiments.command import one_sentence
from spec_envs.experiments.config import apply_override, check_env, load_experiment
from spec_envs.experiments.stanzas import ExperimentFile
from spec_envs.experiments.train import spec_env_of
from spec_envs.files import write_bytes
from spec_envs.settings import Keywords

FORMATS = (".gif", ".mp4")
HELD, HELD_LAST = 2, 6  # frames for which the end of a cycle, and of the text, is shown
COLOURS, PLACES = 64, np.array([1 << 16, 1 << 8, 1])  # of a GIF, and of red, green and blue in a colour's number
NO_MOVIEPY = "an .mp4 needs moviepy, which is not installed: pip install 'spec-envs[video]', or write a .gif"


class Frame(NamedTuple):
    """A picture ``[480, 800, 3]`` and the number of frames for which it is shown."""

    picture: np.ndarray
    held: int


def video_file(text: str) -> Path:
    """Return the path of a video, whose name ends in one of ``FORMATS``."""
    path = output_file(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"is {text!r}; expected a name that ends in .gif or .mp4")
    return path


def arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("env", help=f"environment id: {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--agent", type=nonempty, help="stanza of experiments/ENV.yml that needs no training")
    parser.add_argument("--run", type=input_folder, help="run folder of a trained agent")
    parser.add_argument("--prompt", type=nonempty, help="user turn to answer (default: a test prompt)")
    parser.add_argument("--seed", type=SEED, default=0, help="seed of the prompt and of sampling (default 0)")
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override env.NAME, a keyword argument of the environment, or hyperparameters.NAME of a stanza",
    )
    parser.add_argument("--max-new-tokens", type=TOKENS, default=32, help="most tokens of the answer (default 32)")
    parser.add_argument("--fps", type=number(0.1, 50), default=2.0, help="frames per second (default 2)")
    parser.add_argument("--out", type=video_file, help="file to write, .gif or .mp4 (default ENV.gif)")
    return parser.parse_args()


def of_run(env_id: str, folder: Path, overrides: Sequence[str]) -> tuple[Keywords, Agent, Path | None]:
    """Return keyword arguments of the environment that a run's agent is evaluated in, the agent, and the run of its
    partner.

    Raises:
        ValueError: a run of another environment, or an override that does not fit.
    """
    config = agents.read_config(folder)
    if config["id"] != env_id:
        raise ValueError(f"{folder} is a run of {config['id']}, not of {env_id}; name the environment of the run")
    given: dict[str, Any] = {"env": {}}
    for override in overrides:
        if apply_override(override, given)[0] != "env":
            raise ValueError(f"override {override!r} would change the trained agent; expected env.NAME=VALUE")
    env = {**config["env"], **config.get("eval_env", {})}
    check_env(given["env"], env_id, lambda key: "SET", env)
    if is_exit(folder):
        env["drafter"] = str(folder)
    partner = config.get("partner")
    return env | given["env"], agents.load(folder)[1], Path(partner) if partner else None


def of_stanza(env_id: str, stanza: str, overrides: Sequence[str]) -> tuple[Keywords, str, dict[str, Any]]:
    """Return keyword arguments of the environment of a stanza, and its agent with its hyper-parameters."""
    experiment = load_experiment(env_id, stanza, overrides)
    return {**experiment.env, **experiment.eval_env}, experiment.agent, experiment.hyperparameters


def untrained(env: SpecEnv, name: str, hyperparameters: dict[str, Any]) -> Agent:
    """Return an agent that has learned nothing.

    Raises:
        ValueError: it would have to learn first.
    """
    agent = AGENTS[name](control=env.control, **hyperparameters)
    if isinstance(agent, OnlineAgent):
        agent.bind(env.decoder)  # drafts by the exit as it is
    elif agent.learns_from != "nothing":
        raise ValueError(f"{name} has to be trained first, by spec-envs train; give the folder of its run by --run")
    return agent


def opened(args: argparse.Namespace) -> tuple[SpecEnv, Agent]:
    """Return the environment and the agent that the arguments name.

    Raises:
        ValueError: they do not go together.
    """
    if args.agent and args.run:
        raise ValueError("give --agent or --run, not both: a run has its own agent")
    source = ExperimentFile.of(args.env)
    shipped = SHIPPED / args.env
    folder = args.run or (shipped if shipped.is_dir() and not args.agent else None)
    shown = {"render_mode": "rgb_array", "split": "test", "max_new_tokens": args.max_new_tokens}
    if folder:
        keywords, agent, partner = of_run(args.env, folder, args.set)
        env = spec_env_of(gym.make(args.env, **keywords | shown))
        if partner:
            env.control.compose(*agents.load(partner))
    else:
        stanza = args.agent or ("fixed" if "fixed" in source.stanzas else source.first)
        keywords, name, hyperparameters = of_stanza(args.env, stanza, args.set)
        env = spec_env_of(gym.make(args.env, **keywords | shown))
        if isinstance(env.decoder.clock, PricedClock):
            env.control.costs = env.decoder.clock.table
        agent = untrained(env, name, hyperparameters)
    env.control.check_layout(agent.control, type(agent).__name__)
    return env, agent


def play(env: SpecEnv, agent: Agent, seed: int, prompt: str | None) -> list[Frame]:
    """Decode a text under an agent, and return a frame of its beginning, one of each step, and one of
    each draft that follows the end of a cycle within the step."""
    env.policy_seconds = agent.priced_seconds if env.decoder.clock.priced else agent.decision_seconds
    observation, _ = env.reset(seed=seed, options={"prompt": prompt} if prompt else None)
    frames = [Frame(np.asarray(env.render()), 1)]
    state, start = None, True
    while not env.decoder.finished:
        action, state = agent.predict(observation, state, np.array([start]), deterministic=True)
        observation, _, terminated, _, info = env.step(action)
        frames.append(Frame(np.asarray(env.render()), HELD if info["emitted"] else 1))
        if info["emitted"] and env.decoder.tree.size:  # what the next decision sees
            frames.append(Frame(env.picture(None), 1))
        start = False
        if terminated and not env.decoder.finished:  # the end of a cycle, with episode="cycle"
            observation, _ = env.reset()
    frames[-1] = frames[-1]._replace(held=HELD_LAST)
    return frames


def gif(frames: Sequence[Frame], fps: float) -> bytes:
    """Return a GIF that is repeated for ever, in the colours that are most frequent in all frames."""
    colours = collections.Counter[int]()
    for frame in frames:
        values, counts = np.unique(numbered(frame.picture), return_counts=True)
        colours.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    palette = np.array([list(colour.to_bytes(3)) for colour, _ in colours.most_common(COLOURS)])
    first, *others = (in_colours(frame.picture, palette) for frame in frames)
    durations = [round(1000 * frame.held / fps) for frame in frames]
    file = io.BytesIO()
    first.save(file, "GIF", save_all=True, append_images=others, duration=durations, loop=0, optimize=True)
    return file.getvalue()


def in_colours(picture: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Return a picture whose colours are the nearest ones of a palette ``[n, 3]``."""
    values, places = np.unique(numbered(picture), return_inverse=True)
    parts = values[:, None] // PLACES % 256
    nearest = ((parts[:, None] - palette) ** 2).sum(-1).argmin(-1).astype(np.uint8)
    image = Image.fromarray(nearest[places].reshape(picture.shape[:2]))
    image.putpalette(palette.astype(np.uint8).tobytes())
    return image


def numbered(picture: np.ndarray) -> np.ndarray:
    """Return the number of each pixel's colour ``[height, width]``, 0 to 2**24 - 1."""
    numbers: np.ndarray = picture.astype(np.int32) @ PLACES
    return numbers


def mp4(frames: Sequence[Frame], fps: float) -> bytes:
    """Return a video in H.264."""
    from moviepy import ImageSequenceClip

    pictures = [frame.picture for frame in frames for _ in range(frame.held)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        ImageSequenceClip(pictures, fps=fps).write_videofile(str(path), logger=None)
        return path.read_bytes()


def main() -> None:
    args = arguments()
    with one_sentence():
        out = args.out or Path(f"{args.env}.gif")
        if out.suffix == ".mp4" and not importlib.util.find_spec("moviepy"):
            raise ValueError(NO_MOVIEPY)
        env, agent = opened(args)
        try:
            frames = play(env, agent, args.seed, args.prompt)
        finally:
            env.close()
        data = (gif if out.suffix == ".gif" else mp4)(frames, args.fps)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, data)
        print(
            f"{out}: {len(frames)} pictures, {sum(f.held for f in frames) / args.fps:.0f} s, {len(data) / 1000:.0f} kB"
        )


if __name__ == "__main__":
    main()
