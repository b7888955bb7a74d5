"""Write the logs of the shipped links (`spec-envs links`): rates every 100 ms that behave like mmWave 5G,
LTE and Wi-Fi. The logs are synthetic, not recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.signal import lfilter
from scipy.stats import norm

from spec_envs.arguments import Parser, output_folder
from spec_envs.experiments.command import one_sentence
from spec_envs.files import write_bytes

ROWS, STEP = 600, 100  # number of rows, and milliseconds of each
Columns = dict[str, np.ndarray]


def fading(rng: np.random.Generator, rows: float) -> np.ndarray:
    """Return a stationary Gaussian process ``[ROWS]`` of variance 1 whose correlation falls to 1/e within ``rows``
    rows."""
    keep = np.exp(-1 / rows)
    noise = rng.standard_normal(ROWS) * np.sqrt(1 - keep**2)
    noise[0] /= np.sqrt(1 - keep**2)
    return np.asarray(lfilter([1.0], [1.0, -keep], noise))


def spells(rng: np.random.Generator, *mean_rows: float) -> np.ndarray:
    """Return the kind of spell of each row, ``[ROWS]``. The kinds take turns; a spell of kind i lasts at least one row,
    and ``mean_rows[i]`` on average."""
    kinds = np.tile(np.arange(len(mean_rows)), ROWS)
    lengths = rng.geometric(1 / np.array(mean_rows)[kinds[:ROWS]])
    return np.repeat(kinds[:ROWS], lengths)[:ROWS]


def mmwave(rng: np.random.Generator) -> Columns:
    """Return rates of hundreds of Mbps in line of sight, which an obstacle suddenly reduces, down to 5 Mbps."""
    blocked = spells(rng, 60, 12) == 1
    clear = 600 * np.exp(0.35 * fading(rng, 20))
    shadowed = np.maximum(5, 12 * np.exp(0.6 * fading(rng, 5)))
    down = np.minimum(np.where(blocked, shadowed, clear), 1500)
    return {"mbps": down, "up_mbps": np.maximum(1, down / 8)}


def lte(rng: np.random.Generator) -> Columns:
    """Return rates that fade slowly between 5 and 60 Mbps; the rate up is a third of the rate down."""
    down = 5 + 55 * norm.cdf(fading(rng, 40))
    return {"mbps": down, "up_mbps": down / 3}


def wifi(rng: np.random.Generator) -> Columns:
    """Return the rates of 802.11ac (two streams, 80 MHz), with bursts in which the channel is shared with other
    stations."""
    ladder = 0.6 * np.array(
        [58.5, 117, 175.5, 234, 351, 468, 526.5, 585, 702, 780]
    )  # net rates, 60 % of the gross ones
    step = np.clip(np.round(6 + 2 * fading(rng, 50)), 0, len(ladder) - 1).astype(int)
    contended = spells(rng, 40, 8) == 1
    others = np.where(contended, rng.integers(2, 7, ROWS), 0)
    down = ladder[step] / (1 + others)
    return {"mbps": down, "up_mbps": 0.8 * down, "rtt_ms": 4 + 5 * others}


PROFILES = {"5g-mmwave": mmwave, "lte": lte, "wifi": wifi}


def log_csv(name: str) -> str:
    """Return the log of a profile as a CSV text; it is the same every time."""
    columns = PROFILES[name](np.random.default_rng(0))
    lines = [",".join(["ms", *columns])]
    lines += [
        f"{i * STEP}," + ",".join(f"{v:.1f}" for v in row) for i, row in enumerate(zip(*columns.values(), strict=True))
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--out", type=output_folder, default=Path("runs/links"), help="folder of the CSV files (default runs/links)"
    )
    args = parser.parse_args()
    with one_sentence():
        args.out.mkdir(parents=True, exist_ok=True)
        for name in PROFILES:
            write_bytes(args.out / f"{name}.csv", log_csv(name).encode())
            print(args.out / f"{name}.csv")


if __name__ == "__main__":
    main()
