"""What an edge knows of its link: the rates and the round trip that its own messages had."""

from __future__ import annotations

NOISE = 1e-3  # seconds by which two round trips differ for no reason that matters
PRIOR = 20e6 / 8  # bytes per second, of a link of which nothing is known
FASTEST = 10e9 / 8


class Estimate:
    """Rates and round trip of a link, from messages of known sizes.

    Round trips are those of messages next to nothing long (pings). What an exchange took beyond one is the transfer of its
    bytes; the rate that follows counts the more, the longer the transfer was, or would have been at the rate assumed so
    far, against the noise of a round trip: a short message over a fast link tells nothing, and leaves the rate as it was.

    Attributes:
        up, down: bytes per second.
        rtt: seconds.
    """

    def __init__(self) -> None:
        self.up = self.down = PRIOR
        self.rtt = 0.05

    def ping(self, seconds: float) -> None:
        """A message of next to nothing was answered at once."""
        self.rtt = seconds

    def exchange(self, bytes_up: int, bytes_down: int, seconds: float) -> None:
        """A request and its answer took ``seconds`` on the network: the heavier way tells about its rate."""
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
    """A rate in view of a transfer: the seconds that were expected of it and those that were seen, averaged. What was
    expected, or was seen beyond what noise explains, is the evidence."""
    expected = size / rate
    evidence = max(seconds - 2 * NOISE, expected)
    weight = evidence**2 / (evidence**2 + NOISE**2)
    return size / max((1 - weight) * expected + weight * seconds, size / FASTEST)
