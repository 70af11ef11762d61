"""Adding two numbers by carries that ripple in place (the paper's addition)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

from ntk_ensembles.errors import check_range
from ntk_ensembles.tasks.base import (
    LISTED_INPUTS,
    AllNumbers,
    Number,
    Task,
    alternating_bits,
    random_operand,
    structured_first,
)
from ntk_ensembles.templates import StateLayout, Template


class Addition(Task[tuple[Number, Number], Number]):
    """Adds two L-bit numbers: 3L bits, 4L templates, at most 2L micro-steps.

    The sum stands in ``p`` and the top carry once ``q`` and the inner carries are used up; that
    state is a fixed point.

    Args:
        bits: Length L of each summand, 1 to 512.

    Raises:
        OptionError: ``bits`` is outside its range.
    """

    name = "addition"
    takes_arrays = True

    def __init__(self, bits: int = 10) -> None:
        check_range("bits", bits, 1, 512)
        self.bits = bits
        self.layout = StateLayout(p=bits, q=bits, carry=bits)

    def make_templates(self) -> Iterator[Template]:
        """Yield half adders at every bit; a carry becomes the next bit of q, the top one stays."""
        p, q, carry = self.layout["p"], self.layout["q"], self.layout["carry"]
        for i in range(self.bits):
            yield Template.rule("sum", ones=[q[i]], zeros=[p[i]], sets=[p[i]])
            yield Template.rule("sum", ones=[p[i]], zeros=[q[i]], sets=[p[i]])
            yield Template.rule("carry", ones=[p[i], q[i]], sets=[carry[i]])
        for i in range(self.bits - 1):
            yield Template.rule("move carry", ones=[carry[i]], sets=[q[i + 1]])
        yield Template.rule("keep top carry", ones=[carry[-1]], sets=[carry[-1]])

    def inputs(self, generator: random.Random) -> Iterator[tuple[int, int]]:
        """Yield corner cases, then all pairs where they are few, else random pairs for ever."""
        full = (1 << self.bits) - 1
        even, odd = alternating_bits(self.bits)
        corners = [(0, 0), (full, full), (full, 1), (1, full), (0, full), (full, 0)]
        patterns = [(even, odd), (odd, even), (even, even), (odd, odd)]
        powers = [(1 << i, 1 << i) for i in range(self.bits)]
        return structured_first(
            [*corners, *patterns, *powers],
            size=1 << 2 * self.bits,
            every=lambda: itertools.product(range(full + 1), range(full + 1)),
            draw=lambda: self._draw(generator),
            generator=generator,
        )

    def _draw(self, generator: random.Random) -> tuple[int, int]:
        first = random_operand(generator, self.bits)
        if generator.random() < 0.25:
            # Nearly complementary summands: a carry that starts low runs through every bit above.
            return first, first ^ ((1 << self.bits) - 1) ^ (1 << generator.randrange(self.bits))
        return first, random_operand(generator, self.bits)

    def all_inputs(self) -> Iterable[tuple[int, int]] | None:
        """Return all pairs, those with one second summand together; None if they are more than `LISTED_INPUTS`."""
        return AllNumbers(self.bits, 2) if 1 << 2 * self.bits <= LISTED_INPUTS else None

    def initial_fields(self, task_input: tuple[Number, Number]) -> dict[str, Any]:
        """Put the summands into p and q."""
        return {"p": task_input[0], "q": task_input[1]}

    def read_output(self, fields: dict[str, Any]) -> Number:
        """Return the sum: p, with the top carry above it."""
        output: Number = fields["p"] + (fields["carry"] >> (self.bits - 1) << self.bits)
        return output

    def reference(self, task_input: tuple[Number, Number]) -> Number:
        """Return the sum."""
        return task_input[0] + task_input[1]

    def num_micro_steps(self, task_input: tuple[Number, Number]) -> int:
        """Return 2L: a carry needs two micro-steps a bit."""
        del task_input
        return 2 * self.bits
