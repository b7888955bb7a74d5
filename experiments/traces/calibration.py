"""Cost curves that are scaled to the seconds of texts that are decoded live."""

from __future__ import annotations

from spec_envs.agents.baselines.uniform import RandomAgent
from spec_envs.controls import Control, Policy
from spec_envs.controls.budget import BudgetControl
from spec_envs.controls.k import KControl
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.decoding.traces.replay import replayed
from spec_envs.decoding.traces.trace import Trace
from spec_envs.experiments.measure.arms import Encoded, decoded, run_arms

CALIBRATION = 6  # training texts on which cost curves are compared with the wall clock


def calibrated(trace: Trace, decoder: Decoder, table: CostTable) -> dict[str, dict[int, float]]:
    """Return the curves of a table, scaled so that training texts with random settings cost the seconds that they take.

    A forward that is timed alone is a little faster than a forward while a text is decoded, with everything around it.
    The overhead is charged to verifications.
    """
    texts = [text for text in trace.texts if text.split == "train"][:CALIBRATION] or trace.texts[:CALIBRATION]
    prompts = [Encoded(text.task, text.prompt) for text in texts]
    control = random_settings(trace)
    arms = {
        "live": decoded(decoder, Policy(control, RandomAgent(control, seed=0))),
        "priced": decoded(
            replayed(trace, PricedClock(table), decoder.max_depth),
            Policy(random_settings(trace), RandomAgent(control, seed=0)),
        ),
    }
    samples = run_arms(arms, prompts, trace.manifest.max_new_tokens, "what forwards cost")
    parts = {name: {part: sum(s.parts[part] for s in arm) for part in arm[0].parts} for name, arm in samples.items()}
    whole_seconds = sum(s.seconds for s in samples["live"])
    around = whole_seconds - parts["live"]["draft"] - parts["live"]["policy"]
    factors = {"draft": 1.0, "verify": around / parts["priced"]["verify"]}
    if parts["priced"]["draft"]:
        factors["draft"] = parts["live"]["draft"] / parts["priced"]["draft"]
    return {part: {n: s * factors[part] for n, s in getattr(table, part).items()} for part in factors}


def random_settings(trace: Trace) -> Control:
    """Return a control whose random actions lead to cycles of all usual sizes."""
    manifest = trace.manifest
    if manifest.kind == "chain":
        return KControl(k_max=min(8, manifest.max_depth + 1), observation="counters")
    depth = min(4, manifest.max_depth)
    return BudgetControl((3, 7, 11, 15, 23, 31), "random", max_depth=depth, width=manifest.width)
