"""Work on members in parallel: each CPU core takes members of its own, on one thread each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def allowed_cores() -> int:
    """Return the number of cores that the system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_workers() -> int:
    """Return how many members are worked on at the same time on a CPU: the cores that this process may use."""
    return max(1, min(allowed_cores(), torch.get_num_threads()))


def map_members(work: Callable[[T], R], over: Iterable[T], device: torch.device) -> list[R]:
    """Apply a function to members, or to parts of a stack, without recording gradients.

    On a CPU every item is computed by one thread, so that a member's numbers depend neither on the number of
    cores nor on the other members. On any other device the items follow one another.

    Args:
        work: Function of one item.
        over: The items.
        device: Where the members lie.

    Returns:
        The results, in order.
    """
    items = list(over)
    # Threads inherit neither `no_grad` nor inference mode, nor the number of threads of an operation.
    inference = torch.is_inference_mode_enabled()
    work = torch.inference_mode(inference)(torch.no_grad()(work))
    if device.type != "cpu":
        return [work(item) for item in items]
    with ThreadPoolExecutor(
        min(cpu_workers(), len(items)) or 1, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        return list(pool.map(work, items))
