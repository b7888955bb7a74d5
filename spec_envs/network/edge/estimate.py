"""An edge's estimate of its link: rates and round trip, measured on its own messages."""

from __future__ import annotations

NOISE = 1e-3  # seconds by which round trips of the same link differ
PRIOR = 20e6 / 8  # bytes per second assumed of an unknown link
FASTEST = 10e9 / 8


class Estimate:
    """Estimates rates and round trip of a link from messages of known sizes.

    Round trips are measured with tiny messages (pings). The seconds of an exchange beyond one round trip are the
    transfer of its bytes. The longer that transfer took, or was expected to take, compared with the noise of a round
    trip, the more its rate counts; a short message over a fast link has no information and leaves the rate unchanged.

    Attributes:
        up, down: bytes per second.
        rtt: seconds.
    """

    def __init__(self) -> None:
        self.up = self.down = PRIOR
        self.rtt = 0.05

    def ping(self, seconds: float) -> None:
        """Update the estimate with the round trip of a tiny message."""
        self.rtt = seconds

    def exchange(self, bytes_up: int, bytes_down: int, seconds: float) -> None:
        """Update the estimate with a request and its answer, which spent ``seconds`` on the network.

        The direction that carried more bytes updates its rate.
        """
        transfer = seconds - self.rtt
        if bytes_up >= bytes_down:
            self.up = improved(self.up, bytes_up, transfer - bytes_down / self.down)
        else:
            self.down = improved(self.down, bytes_down, transfer - bytes_up / self.up)

    @property
    def up_mbps(self) -> float:
        return self.up * 8 / 1e6

    @property
    def down_mbps(self) -> float:
        return self.down * 8 / 1e6

    @property
    def rtt_ms(self) -> float:
        return self.rtt * 1e3


def improved(rate: float, size: int, seconds: float) -> float:
    """Return a rate updated by a transfer: a weighted average of its expected and its measured seconds.

    The weight grows with the expected seconds, or the measured ones beyond the noise if they are more.
    """
    expected = size / rate
    evidence = max(seconds - 2 * NOISE, expected)
    weight = evidence**2 / (evidence**2 + NOISE**2)
    return size / max((1 - weight) * expected + weight * seconds, size / FASTEST)
