"""The plan of a recording: the settings that a trace depends on, its texts, and its folder."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from spec_envs.controls import CONTROLS, make_control
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.drafters.names import BLOCKS, DrafterName
from spec_envs.decoding.loading import DEFAULT_TARGET, load_decoder
from spec_envs.decoding.traces.recording import MAX_NEW_TOKENS
from spec_envs.experiments.measure.arms import Encoded
from spec_envs.experiments.measure.live import encoded_prompts
from spec_envs.experiments.work_folder import NOTE, claim
from spec_envs.files import read_json
from spec_envs.prompts.rows import FINAL, Split
from spec_envs.prompts.sets import sets_named
from spec_envs.prompts.templates import DATE
from spec_envs.settings import Keywords

DEFAULTS: Keywords = {  # values of the keyword arguments that a recording depends on
    "target": DEFAULT_TARGET,
    "drafter": "auto",
    "device": "auto",
    "dtype": "auto",
    "temperature": 0.0,
    "prompts": "all",
    "data_dir": None,
    "template": None,
    "date": DATE,
    "max_new_tokens": MAX_NEW_TOKENS,
}
TEXTS = (60, 12, 30)  # numbers of training, validation and test texts


@dataclass(frozen=True)
class Plan:
    """The plan of a recording.

    Attributes:
        env: keyword arguments of the environment.
        texts: numbers of training, validation and held-out texts.
        held_out: split of the held-out texts, ``"test"``, or ``"final"`` for published results alone.

    Raises:
        ValueError: there is nothing to record.
    """

    env_id: str
    env: Keywords
    texts: tuple[int, int, int] = TEXTS
    held_out: Split = "test"

    def __post_init__(self) -> None:
        if min(self.texts) < 0 or not any(self.texts):
            raise ValueError(f"texts is {self.texts}; expected numbers of train, validation and test, such as {TEXTS}")
        if self.max_new_tokens < 2:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected 2 or more")

    @property
    def settings(self) -> Keywords:
        """Everything that the recording depends on."""
        control = make_control(self.env_id, self.env)
        given = {key: self.env.get(key, default) for key, default in DEFAULTS.items()}
        given["date"] = given["date"] or DATE
        given["prompts"] = ",".join(sets_named(str(given["prompts"]), given["data_dir"]))  # what "all" stands for now
        if given["drafter"] == "auto":
            given["drafter"] = control.default_drafter(self.target)
        control.check_drafter(str(given["drafter"]))
        given |= {"width": control.width, "max_depth": control.max_depth, "texts": list(self.texts)}
        return given if self.held_out == "test" else given | {"held_out": self.held_out}

    @property
    def target(self) -> str:
        return str(self.env.get("target", DEFAULT_TARGET))

    @property
    def max_new_tokens(self) -> int:
        return int(self.env.get("max_new_tokens", MAX_NEW_TOKENS))

    def chosen(self) -> list[tuple[Split, Encoded]]:
        """Return split and prompt of every text; no prompt occurs twice."""
        splits: tuple[Split, Split, Split] = ("train", "validation", self.held_out)
        found = [
            (split, prompt)
            for split, count in zip(splits, self.texts, strict=True)
            if count
            for prompt in encoded_prompts(self.env, split, count)
        ]
        return list({tuple(prompt.ids): (split, prompt) for split, prompt in found}.values())

    @property
    def parts(self) -> dict[str, Plan]:
        """The plans of the traces of several drafters, by the drafter's name; empty for one drafter.

        A drafter of trees is recorded for SpecTree-v0, and one of chains for SpecK-v0, which replay its trace as well.
        """
        control = make_control(self.env_id, self.env)
        found = {}
        for name in control.drafters:
            parsed = DrafterName.parse(name)
            chain = parsed.single
            longest = control.max_depth + 1
            at_once = parsed.copies or parsed.kind in BLOCKS  # all levels cost what the first one does
            depth = max(1, *control.depths) if control.width > 1 and not at_once else max(1, control.max_depth)
            sizes = {"k_max": max(2, longest)} if chain else {"max_depth": depth, "width": control.width}
            env = {key: value for key, value in self.env.items() if key in DEFAULTS}
            env |= {"drafter": name} | sizes
            found[name] = Plan("SpecK-v0" if chain else "SpecTree-v0", env, self.texts, self.held_out)
        return found

    def claim(self, folder: Path) -> None:
        """Note in a folder that it belongs to this plan, or refuse a folder that belongs to another."""
        claim(folder, self.settings, "--out")

    def decoder(self) -> Decoder:
        """Return the decoder that the texts are recorded with."""
        names = ("target", "drafter", "device", "dtype", "width", "max_depth")
        settings = {**self.env, **self.settings}
        return load_decoder(**{name: settings[name] for name in names if name in settings})


def default_folder(plan: Plan, root: Path = Path("runs")) -> Path:
    """Return the default folder of a plan's trace. If another plan has claimed it, the name gets a suffix."""
    kind, settings = CONTROLS[plan.env_id].trace_kind, plan.settings
    final = f"-{FINAL}" * (plan.held_out == FINAL)
    folder = root / "traces" / f"{Path(plan.target).name}-{kind}{final}"
    note = folder / NOTE
    if note.exists() and read_json(note, f"delete {folder} and record the trace again") != settings:
        return folder.with_name(f"{folder.name}-{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}")
    return folder
