"""Adding two numbers by carries that ripple in place (DESIGN §1; the paper's addition)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from ntk_ensembles.tasks.base import Task, check_range
from ntk_ensembles.tasks.inputs import alternating_bits, random_operand, structured_first
from ntk_ensembles.tasks.layout import StateLayout
from ntk_ensembles.tasks.templates import Template


class Addition(Task[tuple[int, int], int]):
    """Adds two L-bit numbers: 3L bits, 4L templates, at most 2L micro-steps.

    The sum stands in ``p`` and the top carry once ``q`` and the inner carries are used up; that
    state is a fixed point.

    Args:
        bits: length L of each summand, 1 to 512.

    Raises:
        ValueError: ``bits`` outside its range.
    """

    name = "addition"

    def __init__(self, bits: int = 10) -> None:
        check_range("bits", bits, 1, 512)
        self.bits = bits
        self.layout = StateLayout(p=bits, q=bits, carry=bits)

    def rules(self) -> Iterator[Template]:
        """Half adders at every bit; a carry becomes the next bit of q, the top one stays."""
        p, q, carry = self.layout["p"], self.layout["q"], self.layout["carry"]
        for i in range(self.bits):
            yield Template.rule("sum", ones=[q[i]], zeros=[p[i]], sets=[p[i]])
            yield Template.rule("sum", ones=[p[i]], zeros=[q[i]], sets=[p[i]])
            yield Template.rule("carry", ones=[p[i], q[i]], sets=[carry[i]])
        for i in range(self.bits - 1):
            yield Template.rule("move carry", ones=[carry[i]], sets=[q[i + 1]])
        yield Template.rule("keep top carry", ones=[carry[-1]], sets=[carry[-1]])

    def inputs(self, generator: random.Random) -> Iterator[tuple[int, int]]:
        """Corner cases, then all pairs where they are few, else random pairs for ever."""
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

    def fields(self, value: tuple[int, int]) -> dict[str, int]:
        """The summands in p and q."""
        return {"p": value[0], "q": value[1]}

    def output(self, fields: dict[str, int]) -> int:
        """The sum: p, with the top carry above it."""
        return fields["p"] + (fields["carry"] >> (self.bits - 1) << self.bits)

    def reference(self, value: tuple[int, int]) -> int:
        """The sum."""
        return value[0] + value[1]

    def micro_steps(self, value: tuple[int, int]) -> int:
        """2L: a carry needs two micro-steps a bit."""
        del value
        return 2 * self.bits
