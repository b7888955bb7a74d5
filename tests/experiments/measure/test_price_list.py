"""The price list of a comparison: curves of forwards that are timed alone, brought to what decoded texts cost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from spec_envs.controls import Control, make_control
from spec_envs.decoding.clock import CostTable, PricedClock
from spec_envs.decoding.decoder import Decoder
from spec_envs.experiments.measure import costs
from spec_envs.experiments.measure import price_list as lists
from spec_envs.experiments.measure.arms import Encoded, Sample
from spec_envs.experiments.measure.live import encoded_prompts, local_decoder
from spec_envs.experiments.measure.statistics import at_prices

ALONE = {"verify": {1: 2.0, 4: 3.0, 8: 4.0}, "draft": {1: 0.5, 10: 1.0}}
PROMPT = Encoded("chat", [2, 3, 4, 5])


def sample(verify: float, draft: float, forwards: dict[tuple[str, int], int]) -> Sample:
    parts = {"draft": draft, "verify": verify, "network": 0.0, "policy": 9.0}
    return Sample(PROMPT, 10, verify + draft + 9.0, 0.1, [0], parts=parts, forwards={**forwards, ("prefill", 64): 1})


def test_scaled_curves_price_the_texts_that_they_come_from() -> None:
    """Plain steps take 1.5 of what they do alone, verifications 2 and drafting 3 times as long."""
    plain = sample(30.0, 0.0, {("verify", 1): 10})
    random = sample(3.0 + 4 * 6.0 + 8.0, 6 * 1.5 + 4 * 3.0, {
        ("verify", 1): 1, ("verify", 4): 4, ("verify", 8): 1, ("draft", 1): 6, ("draft", 10): 4,
    })  # fmt: skip
    scales = lists.scales_of(ALONE, {"plain": [plain], "random": [random]})
    assert scales == lists.Scales(plain=1.5, verify=2.0, draft=3.0)
    table = CostTable.of("scaled", lists.scaled(ALONE, scales))
    for timed in (plain, random):
        priced = at_prices(timed, table)
        assert priced.seconds == pytest.approx(timed.seconds)


def test_a_slow_plain_step_costs_no_more_than_a_verification() -> None:
    curves = lists.scaled(ALONE, lists.Scales(plain=2.0, verify=1.0, draft=1.0))
    assert curves["verify"] == {1: 3.5, 4: 3.5, 8: 4.0}


def test_texts_without_drafts_leave_curves_in_proportion() -> None:
    plain = sample(30.0, 0.0, {("verify", 1): 10})
    assert lists.scales_of(ALONE, {"plain": [plain], "random": [plain]}) == lists.Scales(1.5, 1.5, 1.0)


def test_few_verifications_among_plain_steps_have_their_scale() -> None:
    """As those of prompt lookup may be: what remains of the seconds of such texts is noise, and may be below 0."""
    plain = sample(30.0, 0.0, {("verify", 1): 10})
    random = sample(100.0, 0.0, {("verify", 1): 60, ("verify", 4): 1})
    assert lists.scales_of(ALONE, {"plain": [plain], "random": [random]}) == lists.Scales(1.5, 1.5, 1.0)


def test_the_shape_is_that_of_forwards_in_texts() -> None:
    """Between numbers of rows that occur in texts the factor is interpolated, beyond them it stays the same."""
    found = lists.shaped(ALONE, {"verify": {2: 4.0, 6: 3.5}})
    assert found["verify"] == pytest.approx({1: 2.0 * 12 / 7, 4: 3.0 * (12 / 7 + 1) / 2, 8: 4.0})
    assert found["draft"] == ALONE["draft"]


def test_a_price_list_is_what_decoding_costs(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that rests 20 ms in every verification while a text is decoded, and not while forwards are timed alone."""
    control = make_control("depth", tiny)
    decoder = local_decoder(tiny, control)
    alone = lists.fastest_windows(decoder)
    monkeypatch.setattr(lists, "fastest_windows", lambda _: alone)
    monkeypatch.setattr(lists, "TOKENS", 8)
    verify = type(decoder.verifier).verify

    def slowly(*given: Any) -> Any:
        time.sleep(0.02)
        return verify(*given)

    monkeypatch.setattr(type(decoder.verifier), "verify", slowly)
    found = lists.price_list(decoder, control, encoded_prompts(tiny, "train", 4))
    assert min(found.table.verify.values()) > 0.01
    assert found.spread == alone[1] and found.windows == alone[2]


@pytest.mark.parametrize("env_id", ["depth", "tree", "k", "topk", "dvi", "drafter"])
def test_every_decoder_has_a_price_list(
    env_id: str, tiny: dict[str, Any], tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left as it was: with its clock, and with the ids that end a text."""
    env = {key: value for key, value in tiny.items() if key != "clock"}
    if env_id in ("k", "topk"):
        env["drafter"] = f"lookup+{tiny_draft}"
    if env_id == "topk":
        env |= {"link": "constant:up=0.1,down=1,rtt=20"}
    if env_id == "dvi":
        del env["drafter"]
        env["exit_layer"] = 3
    if env_id == "drafter":
        env["drafter"] = f"lookup,{tiny['drafter']},{tiny_draft}"
    control: Control = make_control(env_id, env)
    decoder: Decoder = local_decoder(env, control)
    monkeypatch.setattr(lists, "TOKENS", 8)
    monkeypatch.setattr(costs, "MOST", 1)
    monkeypatch.setattr(costs, "WINDOWS", 1)
    clock, eos = decoder.clock, decoder.eos
    table = lists.prices(decoder, env, control)
    assert decoder.clock is clock and decoder.eos == eos and not isinstance(clock, PricedClock)
    for curve in table.curves.values():
        seconds = [curve[n] for n in sorted(curve)]
        assert seconds == sorted(seconds) and seconds[0] > 0
    assert set(table.drafters) == ({str(tiny["drafter"]), str(tiny_draft)} if env_id == "drafter" else set())
