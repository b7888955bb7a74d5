"""Jobs run one after another, or on a Ray cluster (`RAY=1`, or the address of one); the results are the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm


def mapped(work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], desc: str) -> list[Any]:
    """Return ``work(*job)`` of every job, in their order.

    With the environment variable ``RAY`` set to 1 on a local cluster of Ray, with an address on that one, which has to
    see the same files. Each job computes on one thread there, and for itself alone, so that nothing depends on who runs
    it.

    Raises:
        ValueError: ``RAY`` is set and Ray is not installed.
    """
    address = os.environ.get("RAY", "")
    if address in ("", "0"):
        return [work(*job) for job in tqdm(jobs, desc=desc, unit="job")]
    try:
        import ray
    except ImportError:
        raise ValueError("RAY is set, but Ray is not installed: pip install -e '.[ray]'") from None
    if not ray.is_initialized():
        ray.init(address=None if address == "1" else address, log_to_driver=False, include_dashboard=False)
    remote = ray.remote(work)
    waiting = [remote.remote(*job) for job in jobs]
    left = list(waiting)
    with tqdm(total=len(jobs), desc=f"{desc} on Ray", unit="job") as bar:
        while left:
            done, left = ray.wait(left)
            bar.update(len(done))
    return list(ray.get(waiting))
