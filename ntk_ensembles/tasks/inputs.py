"""The order of evaluation inputs shared by the tasks: corner cases, then everything or random draws."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

ENUMERABLE_INPUTS = 1 << 16
"""Up to so many inputs a task enumerates all of them."""

T = TypeVar("T")


def structured_first(
    structured: Iterable[T],
    *,
    size: int,
    every: Callable[[], Iterable[T]],
    draw: Callable[[], T],
    generator: random.Random,
) -> Iterator[T]:
    """The structured inputs, once each, then the rest.

    The rest is every other input in a shuffled order where ``size``, the number of inputs there are,
    is at most `ENUMERABLE_INPUTS`; otherwise ``draw()`` for ever.
    """
    first = dict.fromkeys(structured)
    yield from first
    if size <= ENUMERABLE_INPUTS:
        rest = [value for value in every() if value not in first]
        generator.shuffle(rest)
        yield from rest
        return
    while True:
        yield draw()


def alternating_bits(bits: int) -> tuple[int, int]:
    """The numbers …0101 and …1010 of so many bits."""
    return sum(1 << i for i in range(0, bits, 2)), sum(1 << i for i in range(1, bits, 2))


def random_operand(generator: random.Random, bits: int) -> int:
    """A number below 2^bits: uniform, or of uniformly random bit length, with equal chances.

    Uniform draws alone have nearly always the full length, so that carries would nearly always
    start everywhere and run nowhere.
    """
    return generator.getrandbits(bits if generator.random() < 0.5 else generator.randint(0, bits))
