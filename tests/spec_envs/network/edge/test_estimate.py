"""An edge estimates its link from its own exchanges."""

from __future__ import annotations

import numpy as np
import pytest

from spec_envs.network.edge.estimate import PRIOR, Estimate
from spec_envs.network.link import Link, LinkState, load_link

STATES = load_link("markov-1-500").states
LONG, SHORT, ANSWER = 1_000_000, 200, 60  # bytes


def exchanged(estimate: Estimate, link: Link, up: int, down: int, noise: float = 0.0) -> None:
    """Report a ping and an exchange; the exchange takes ``noise`` seconds more than the link's time."""
    estimate.ping(link.state.rtt)
    estimate.exchange(up, down, link.seconds(up, down) + noise)


def learned(state: LinkState, jitter_ms: float = 0.0) -> tuple[Estimate, Link]:
    """Return an estimate after five long messages each way, and its link."""
    link, estimate = Link("one state", (state,), jitter_ms), Estimate()
    for _ in range(5):
        exchanged(estimate, link, LONG, ANSWER)
        exchanged(estimate, link, ANSWER, LONG)
    return estimate, link


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("jitter_ms", [0.0, 0.2])
def test_long_messages_give_rates_and_round_trip(state: LinkState, jitter_ms: float) -> None:
    estimate, _ = learned(state, jitter_ms)
    tolerance = 0.1 if jitter_ms else 0.01
    assert estimate.up_mbps == pytest.approx(state.up_mbps, rel=tolerance)
    assert estimate.down_mbps == pytest.approx(state.down_mbps, rel=tolerance)
    assert estimate.rtt_ms == pytest.approx(state.rtt_ms)


@pytest.mark.parametrize("state", STATES[-2:], ids=str)
def test_short_messages_over_a_fast_link_hardly_change_rates(state: LinkState, rng: np.random.Generator) -> None:
    """Round trips that vary by half a millisecond hardly change a rate estimated from long messages."""
    estimate, link = learned(state)
    for _ in range(300):
        exchanged(estimate, link, SHORT, ANSWER, rng.uniform(-5e-4, 5e-4))
        exchanged(estimate, link, ANSWER, SHORT, rng.uniform(-5e-4, 5e-4))
    assert estimate.up_mbps == pytest.approx(state.up_mbps, rel=0.2)
    assert estimate.down_mbps == pytest.approx(state.down_mbps, rel=0.2)


def test_short_messages_over_a_slow_link_give_its_rate() -> None:
    estimate, link = Estimate(), Link("slow", (STATES[0],))
    for _ in range(5):
        exchanged(estimate, link, 1500, ANSWER)
    assert estimate.up_mbps == pytest.approx(STATES[0].up_mbps, rel=0.05)
    assert estimate.down == PRIOR


@pytest.mark.parametrize(("before", "after"), [(STATES[-1], STATES[0]), (STATES[0], STATES[-1])], ids=str)
def test_estimate_follows_a_changed_link(before: LinkState, after: LinkState) -> None:
    estimate, link = learned(before)
    link.state = after
    for _ in range(3):
        exchanged(estimate, link, 100_000, ANSWER)
    assert estimate.up_mbps == pytest.approx(after.up_mbps, rel=0.1)


def test_answers_sooner_than_a_round_trip_keep_estimate_in_range() -> None:
    estimate, link = learned(STATES[0])
    for _ in range(50):
        exchanged(estimate, link, LONG, ANSWER, noise=-60.0)
        assert 0 < estimate.up_mbps <= 10_000
