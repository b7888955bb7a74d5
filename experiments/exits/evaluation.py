"""The table of an early exit before and after training."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from spec_envs import agents
from spec_envs.agents.exits.losses import distillation
from spec_envs.controls import Control, Policy, make_control
from spec_envs.controls.dvi import DVIControl, exit_of
from spec_envs.controls.exit_point import ExitPoint
from spec_envs.controls.k import KControl
from spec_envs.decoding.decoder import Decoder, over_models
from spec_envs.decoding.drafters.early_exit import EarlyExitDrafter
from spec_envs.decoding.exits.adapter import ExitAdapter
from spec_envs.decoding.exits.files import is_exit
from spec_envs.experiments.command import STATIC, TABLE, Stages
from spec_envs.experiments.measure.arms import Arm, Sample, decoded, run_arms
from spec_envs.experiments.measure.live import decoder_for, encoded_prompts
from spec_envs.experiments.measure.references import transformers_arms
from spec_envs.experiments.measure.results import Drift, Exit, Results
from spec_envs.experiments.measure.static import best_static, static_chain
from spec_envs.experiments.measure.statistics import same_text, with_aa_check
from spec_envs.experiments.measure.tables import tables
from spec_envs.settings import Keywords

K_MAX = 8  # tokens of the longest chain that is tried
STOP_K, STOP = 6, 0.6  # longest chain and threshold published for Kangaroo (arXiv 2404.18911)
KANGAROO = f"trained exit, up to {STOP_K}, stop below {STOP}"


def exit_decoder(env: Keywords, k: int, drafter: str | None = None) -> Decoder:
    """Return a decoder that drafts chains of up to ``k`` tokens from an early exit.

    Args:
        env: keyword arguments of ``SpecDVI-v0``.
        drafter: name or run folder of the exit; by default the untrained exit of ``env``.
    """
    return over_models(decoder_for(chain_env(env, drafter), KControl(k_max=max(2, k), observation="counters")))


def exit_drafter(decoder: Decoder) -> EarlyExitDrafter:
    """Return the early exit that a decoder drafts with.

    Raises:
        ValueError: the decoder has another drafter.
    """
    if not isinstance(decoder.drafter, EarlyExitDrafter):
        raise ValueError("the drafter is not an early exit; expected exit:N, or the folder of a trained exit")
    return decoder.drafter


def chain_env(env: Keywords, drafter: str | None = None) -> Keywords:
    """Return keyword arguments of ``SpecK-v0`` whose drafter is the exit of ``SpecDVI-v0`` with the arguments
    ``env``."""
    own = set(inspect.signature(DVIControl).parameters) - {"target", "device", "dtype"}
    shared = {key: value for key, value in env.items() if key not in own and key != "reward"}
    return shared | {"drafter": drafter or exit_of_problem(make_control("dvi", env)).drafter}


def exit_of_problem(control: Control) -> ExitPoint:
    """Return the early exit that a problem drafts with.

    Raises:
        ValueError: the problem drafts with a model.
    """
    if control.exit is None:
        raise ValueError(f"{control.env_id} does not draft with an early exit of the target; expected SpecDVI-v0")
    return control.exit


@dataclass(frozen=True)
class Acceptance:
    """The accepted share of verified drafts, and the emitted tokens per cycle."""

    accept_rate: float
    emitted_per_cycle: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Acceptance:
        return cls(
            sum(s.accepted for s in samples) / max(1, sum(s.scored for s in samples)),
            sum(s.tokens for s in samples) / sum(s.cycles for s in samples),
        )


def evaluate_exit(policy: Policy, run: Path, env: Keywords, test_prompts: int, stages: Stages) -> Results:
    """Return the table of a run of SpecDVI-v0: plain decoding, the untrained exit, the trained exit (alone, after
    prompt lookup, and with Kangaroo's rule), and the agent in its own environment. ``exit`` has what training changed.

    Args:
        policy: policy of the run.
        run: folder of the run.
        env: keyword arguments of the environment.
        stages: of the command.

    Raises:
        ValueError: the run holds no exit, though its agent trains one.
    """
    config, control = agents.read_config(run), policy.control
    point = exit_of_problem(control)
    if not is_exit(run) and config["agent"] != "random":
        raise ValueError(f"{run} holds no exit; delete it to train again")
    trained = str(run) if is_exit(run) else point.drafter
    stages.begin(STATIC, "choosing the length of chains that is best for the trained exit, on training prompts")
    static = best_static(chain_env(env, trained), KControl(K_MAX))
    k = max(1, int(static.best[0]))
    chains = {
        "untrained exit": point.drafter,
        "trained exit": trained,
        "trained exit behind lookup": f"lookup+{trained}",
    }
    policies = {name: static_chain(k, K_MAX) for name in chains}
    decoders = {name: exit_decoder(env, K_MAX, drafter) for name, drafter in chains.items()}
    decoders[KANGAROO] = stopping = exit_decoder(env, K_MAX, trained)
    exit_drafter(stopping).stop = STOP
    policies |= {KANGAROO: static_chain(STOP_K, K_MAX), config["agent"]: policy}
    decoders[config["agent"]] = adapted = over_models(decoder_for({**env, "drafter": trained}, control))

    base = decoders["untrained exit"]
    plain = base.plain()
    arms: dict[str, Arm] = {"plain": decoded(plain, None), "plain again": decoded(plain, None)}
    if not base.clock.priced:
        arms |= transformers_arms(point.target, base)
    if not exit_of(adapted).lossless:
        arms["plain, adapted"] = decoded(adapted.plain(), None)
    arms |= {name: decoded(decoders[name], policy) for name, policy in policies.items()}

    def measure(count: int) -> Results:
        prompts = encoded_prompts(env, "test", count)
        announce = partial(stages.begin, TABLE)
        samples = run_arms(arms, prompts, env.get("max_new_tokens", 128), "held-out prompts", announce=announce)
        results = tables(samples, policies, env, decoders["trained exit"], ["plain", "untrained exit"], [])
        before, after = (Acceptance.of(samples[name]) for name in ("untrained exit", "trained exit"))
        moved = drift(exit_of(adapted), samples["plain"])
        found = Exit(
            exit_layer=point.exit_layer,
            adapter=point.adapter,
            k=k,
            accept_rate_before=before.accept_rate,
            accept_rate_after=after.accept_rate,
            emitted_per_cycle_before=before.emitted_per_cycle,
            emitted_per_cycle_after=after.emitted_per_cycle,
            tokens_per_s=results.arms["trained exit"].tokens_per_second,
            plain_tokens_per_s=results.arms["plain"].tokens_per_second,
            drift=moved,
            cost_of_a_cycle=cost_of_a_cycle(samples["trained exit"], samples["plain"]),
        )
        if not base.temperature:
            mine = "plain, adapted" if "plain, adapted" in samples else "plain"
            found.same_text = {
                name: same_text(samples[name], samples["plain" if name == "untrained exit" else mine])
                for name in policies
            }
        return replace(results, static=static, exit=found)

    return with_aa_check(measure, test_prompts)


def cost_of_a_cycle(samples: Sequence[Sample], plain: Sequence[Sample]) -> dict[str, float]:
    """Return the duration of a cycle in plain steps, by part and as a ``"whole"``. As many tokens as the whole must a
    cycle emit to be as fast as plain decoding."""
    step = sum(s.seconds for s in plain) / sum(s.tokens for s in plain)
    cycles = sum(s.cycles for s in samples)
    parts = {part: sum(s.parts[part] for s in samples) / cycles / step for part in ("draft", "verify")}
    return parts | {"whole": sum(s.seconds for s in samples) / cycles / step}


@torch.inference_mode()
def drift(adapter: ExitAdapter, samples: Sequence[Sample]) -> Drift:
    """Return the difference between a verifier with a trained adapter and the original target, on texts of the
    target."""
    target, added = adapter.target, adapter.deployed_additions()
    nats = divergence = other = 0.0
    total = 0
    for sample in samples:
        prompt = sample.prompt.ids
        ids = torch.tensor([prompt + sample.ids[:-1]], device=target.device)
        positions = torch.arange(ids.shape[1], device=target.device)[None]
        emitted = torch.tensor(sample.ids, device=target.device)
        base, mine = (
            target.head(
                target.forward(target.embed(ids), target.cache(ids.shape[1]), positions, added=a)[0][
                    0, len(prompt) - 1 :
                ]
            ).float()
            for a in (None, added)
        )
        nats += float(F.cross_entropy(mine, emitted, reduction="sum"))
        divergence += float(distillation(mine, base).sum())
        other += int((mine.argmax(-1) != base.argmax(-1)).sum())
        total += len(emitted)
    return Drift(float(torch.tensor(nats / total).exp()), divergence / total, 1000 * other / total)
