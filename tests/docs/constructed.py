"""Constructed results, such as the benchmarks measure."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from spec_envs.experiments.benchmark.arms import GRIDS
from spec_envs.experiments.benchmark.findings import (
    Checks,
    Equality,
    FewTexts,
    Findings,
    Learned,
    OtherCosts,
    OverStatic,
    RecordingCost,
    References,
    Speeds,
    Tuned,
)
from spec_envs.experiments.benchmark.problems import FAST, LEARNED
from spec_envs.experiments.comparisons import chains, drafters, exits
from spec_envs.experiments.comparisons import speeds as machine_speeds
from spec_envs.experiments.comparisons.floor import Floor
from spec_envs.experiments.comparisons.quality import PlainText, Quality
from spec_envs.experiments.config import load_experiment
from spec_envs.experiments.exits.evaluation import Acceptance
from spec_envs.experiments.measure.machine import Machine
from spec_envs.experiments.measure.results import (
    ALONE,
    COPIES,
    LOOKUP,
    Best,
    Divergence,
    Drift,
    Interval,
    Priced,
    Results,
    Row,
)
from spec_envs.experiments.network import cloud_load, edge_cloud

VERSIONS = {"torch": "2.8.0", "numpy": "2.0.0"}
MACHINE = Machine("A Processor", 2, "int8", VERSIONS, "0123abc", "wall")
CURVES = {"verify": {1: 0.01, 8: 0.012, 16: 0.02}, "draft": {1: 0.001, 8: 0.0011, 10: 0.0012}}
TASKS = ("gsm8k", "humaneval")


def interval(value: float) -> Interval:
    """Return a ratio with an interval of five per cent on either side."""
    return Interval(value, 0.95 * value, 1.05 * value)


def row(speed: float, references: Sequence[str]) -> Row:
    """Return a row whose throughput is ``speed`` times that of every reference."""
    return Row(
        tokens_per_second=100 * speed,
        over={name: interval(speed) for name in references},
        emitted_per_cycle=2.0,
        accepted_per_verified=0.5,
        verified_per_cycle=3.0,
        prefill_seconds=0.1,
        seconds=1 / speed,
        parts={"draft": 0.2, "verify": 0.6, "network": 0.0, "policy": 0.01},
        prompts=4,
    )


def results(arms: Sequence[str], references: Sequence[str], learned: Sequence[str] = ()) -> Results:
    """Return a table of plain decoding (twice) and the arms, each faster than the one before it."""
    speeds = {"plain": 1.0, "plain again": 1.0} | {name: 1.2 + 0.1 * i for i, name in enumerate(arms)}
    return Results(
        arms={name: row(speed, references) for name, speed in speeds.items()},
        references=list(references),
        prompts=4,
        tasks=list(TASKS),
        max_new_tokens=32,
        temperature=0.0,
        machine=MACHINE,
        seconds=CURVES,
        curves="T_verify(1) 10.0 ms",
        actions={name: {task: {"1": 3, "2": 1} for task in TASKS} for name in learned},
        decisions=dict.fromkeys(learned, "k"),
        by_task={name: dict.fromkeys(TASKS, 100 * speed) for name, speed in speeds.items()},
        divergences={name: Divergence(0.0, 0.0, 1.0) for name in ("plain", *learned)},
        static=Best(best=[4], tokens_per_second={"k 2": 1.0, "k 4": 2.0}),
    )


def speeds() -> machine_speeds.Speeds:
    """Return results of `bench decoding`."""
    others = ("transformers generate", "transformers assisted", "llama.cpp", "llama.cpp drafting")
    arms = results(["static", "chain", *others, "xllamacpp", "openvino"], ["plain", *others], ["static", "chain"])
    return machine_speeds.Speeds(
        target="smollm2-135m",
        drafter="smollm2-135m-eagle3",
        table=machine_speeds.Beside(
            **vars(arms),
            ratios={name: interval(1.5) for name in machine_speeds.RATIOS},
            own_argmax_share=dict.fromkeys(arms.arms, 0.98),
        ),
        figures=machine_speeds.Figures(
            processor="A Processor",
            verify_ratio={8: 1.1, 16: 1.3},
            static_over_plain=1.5,
            context_ratio=1.6,
            plain_over_llamacpp=1.5,
            chain_over_plain=1.5,
            share_of_floor=0.5,
        ),
        floor=Floor(10**8, 2e10, 0.005, 0.5),
        emitted_per_cycle=2.0,
        overhead_share=0.03,
        verify_curve={1: 1.0, 8: 1.2},
        expand_ratio=0.12,
        curves_by_dtype={"int8": CURVES, "float32": CURVES},
        quality={"int8": Quality(2.0, 0.99, 0.001), "float32": Quality(1.9, 1.0, 0.0)},
        dtypes={"int8": PlainText(100.0, 0.98, 0.001, 0.5), "float32": PlainText(20.0, 1.0, 0.0, 1.0)},
        dtype="int8",
    )


def lengths() -> chains.Chains:
    """Return results of `bench chains`."""
    fixed = [*(f"K = {k}" for k in chains.FIXED), chains.BEST]
    table = results([*fixed, *chains.CONTROLLERS], ["plain", chains.BEST], chains.CONTROLLERS)
    return chains.Chains(
        **vars(table),
        models="target `smollm2-135m` and the drafter `smollm2-135m-draft`",
        by_context={name: {"math": 90.0, "code": 110.0} for name in table.arms},
        variation=dict.fromkeys(table.arms, 0.1),
        acceptance={name: [0.4, 0.5, 0.6] for name in table.arms if not name.startswith("plain")},
        agents={name: load_experiment(chains.ID, name, []).agent for name in chains.CONTROLLERS},
        best_fixed_over_plain=interval(1.5),
        best_agent="svip-tuned",
        best_agent_over_best_fixed=interval(1.1),
    )


def compared_drafters() -> drafters.Drafters:
    """Return results of `bench drafters`."""
    first, others = "head (trees)", ("head (chains)", "lookup")
    table = results([first, f"{first} again", *others], ["plain", first])
    arms = table.arms
    return drafters.Drafters(
        arms=arms,
        target="smollm2-135m",
        first=first,
        static={name: Best(best=[4], tokens_per_second={"4": 100.0}) for name in (first, *others)},
        chosen={first: "depth 1, budget 7", **dict.fromkeys(others, "k 4")},
        prompts=4,
        max_new_tokens=96,
        temperature=0.0,
        by_task={name: {"gsm8k": 90.0, "json": 110.0} for name in arms},
        same_text=dict.fromkeys((first, *others), 1.0),
        machine=MACHINE,
    )


def trained_exits() -> exits.Exits:
    """Return results of `bench exits`."""
    curve = [{"tokens": n, "accept_rate": n / 1000, "emitted_per_cycle": 1 + n / 1000} for n in (0, 100, 200)]
    return exits.Exits(
        machine=MACHINE,
        prompts=4,
        k=4,
        untrained=Acceptance(0.03, 1.03),
        stanzas={
            name: [exits.Learned(acceptance=Acceptance(0.2, 1.3), drift=Drift(2.0, 0.0, 0.0), seed=0, curve=curve)]
            for name in exits.STANZAS
        },
    )


def edge_and_cloud() -> edge_cloud.EdgeCloud:
    """Return results of `bench edge-cloud`."""

    def row(speed: float) -> edge_cloud.Row:
        return edge_cloud.Row(
            tokens_per_second=100 * speed,
            over={"plain": interval(speed), "plain_without_prefill": interval(speed)},
            latency_s=1 / speed,
            seconds=dict.fromkeys(edge_cloud.PARTS, 0.2 / speed),
            breakdown=dict.fromkeys(edge_cloud.PARTS, 20.0),
            acceptance=None if speed == 1 else 0.2,
            rounds=20.0,
            tokens=60.0,
            bytes_up=10.0,
            bytes_down=10.0,
        )

    rows = {"edge-cloud": row(0.8), "plain": row(1.0), "plain again": row(1.0)}
    return edge_cloud.EdgeCloud(
        arms=rows,
        prompts=5,
        iterations=2,
        max_new_tokens=64,
        settings=edge_cloud.Settings(
            target="smollm2-135m",
            drafter="auto",
            temperature=1.0,
            k=4,
            mode="topk",
            top_k=50,
            link="over loopback",
            own_cloud=True,
            machine=MACHINE,
        ),
        headline=edge_cloud.Headline.of(rows["edge-cloud"]),
    )


def load() -> cloud_load.CloudLoad:
    """Return results of `bench cloud-load`."""
    point = cloud_load.Point(100.0, 10.0, 20.0, 300, 0.7)
    return cloud_load.CloudLoad(
        points={edges: dict.fromkeys(cloud_load.SERVERS, point) for edges in (1, 4)},
        batched_over_unbatched={1: interval(1.0), 4: interval(1.9)},
        target="smollm2-135m",
        k=4,
        wrong=0.15,
        seconds=6.0,
        rounds=3,
        machine=MACHINE,
    )


def findings(env_id: str) -> Findings:
    """Return results of `bench adaptive` on one problem."""
    rules = list(GRIDS[env_id])
    copied = [COPIES] if env_id == "SpecK-v0" else []
    alone = [ALONE] if copied else []
    fixed = ["static", *alone, *copied, LOOKUP]
    live = results([*fixed, *LEARNED, *rules], ["plain", *fixed], [*LEARNED, *rules])
    live.at_prices = Priced(arms=deepcopy(live.arms), costs=CURVES, source="measured when the run began")
    over = {name: OverStatic(*vars(row.over["static"]).values()) for name, row in live.arms.items()}
    ratios = {"ratio": interval(1.05), "over_pair": interval(1.04), "over_fastest": interval(1.0)}
    if copied:
        ratios["over_copied"] = interval(0.98)
    learned = Learned(**ratios, seeds=[1.05], train_seconds=2.0, forwards=1000, chosen="hindsight-0")
    setting = [2, 7] if env_id != "SpecK-v0" else [4]
    return Findings(
        settings=FAST,
        checks=Checks(CURVES, MACHINE, Equality(40, 0, 0, 1.0), Speeds(100.0, 1e6, 1e4), RecordingCost(0.01, 0.02)),
        references=References(
            setting,
            1.4,
            1.01,
            1.3,
            setting,
            1.0,
            *(([1, 6], 1.077, [4], 0.94) if copied else ()),
            lookup=[3],
            lookup_over_static=0.83,
        ),
        replay=dict.fromkeys(LEARNED, learned) | {name: Tuned(**ratios, settings={}, by_domain=1.0) for name in rules},
        hindsight_train_s=2.0,
        other_costs={"qwen3-14b-a6000": OtherCosts(setting, 1.02, 1.1)},
        few_texts=[FewTexts(1, 100, 1.0), FewTexts(3, 200, 1.06)],
        tasks={"gsm8k": 1.05},
        gap_share=0.3,
        live=live,
        arms=over,
        sampled=over,
    )
