"""Jobs that run one after another, or on a Ray cluster (`RAY=1`, or its address); the results are the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


def mapped(work: Callable[..., T], jobs: Sequence[tuple[Any, ...]], desc: str) -> list[T]:
    """Return ``work(*job)`` of every job, in order.

    The environment variable ``RAY`` chooses where: 1 is a local Ray cluster, and an address is that cluster, which has
    to see the same files. There each job computes on one thread and depends on no other job, so that results do not
    depend on where it runs.

    Raises:
        ValueError: ``RAY`` is set and Ray is not installed.
    """
    address = os.environ.get("RAY", "")
    if address in ("", "0"):
        return [work(*job) for job in tqdm(jobs, desc=desc, unit="job")]
    try:
        import ray
    except ImportError:
        raise ValueError("RAY is set, but Ray is not installed: pip install 'spec-envs[ray]'") from None
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
