"""What the benchmarks time by."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS_MIN = 0.5


def rate(work: Callable[[], object], items: int) -> float:
    """Return the items done a second by repeated calls: one to warm up, then until `SECONDS_MIN` have passed."""
    work()
    started_at = time.perf_counter()
    calls = 0
    while time.perf_counter() - started_at < SECONDS_MIN:
        work()
        calls += 1
    return calls * items / (time.perf_counter() - started_at)
