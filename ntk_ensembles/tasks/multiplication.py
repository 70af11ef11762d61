"""Multiplying two numbers by shifting and adding under control bits (the paper's multiplication)."""

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


class Multiplication(Task[tuple[Number, Number], Number]):
    """Multiplies two L-bit numbers: about 10L bits and 18L templates, at most L² + 4L micro-steps.

    The multiplicand stands in ``a`` and moves left, the multiplier in ``b`` and moves right. A
    ``check`` looks at b's lowest bit: if it is 1, a is copied into q, the adder of p and q (which
    never stops) takes it up, and ``count`` lets the carries run ahead; then ``shift`` moves a and b,
    and ``check`` comes again. A check that finds b = 0 sets nothing: when the last carries have come
    to rest nothing moves any more, and the product stands in p.

    The counter has T bits, the least odd number from L on. That is enough, though carries may still
    be running when the next addend is copied:

    - As long as nothing is copied onto a bit of q that a carry sets at the same time,
      p + q + 2·carry is the sum of the addends so far, and nothing is lost.
    - Addends come T + 2 micro-steps apart, an odd number, and 2 more for each zero of b between
      them. A carry returns to q every second micro-step. So an addend meets only carries of the
      addends before the last.
    - A carry rises by one bit each time. Between the s-th and the r-th addend, r ≥ s + 2, with
      shifts i_s and i_r, lie (r − s)(T + 2) + 2(i_r − i_s − (r − s)) micro-steps, so that when r is
      copied the carries of s stand at bit i_r + (r − s)T/2 or above, hence at i_r + L or above.
    - But the sum of the addends before r is below 2^(i_r + L): no such carry is left.

    Args:
        bits: Length L of each factor, 1 to 64.

    Raises:
        OptionError: ``bits`` is outside its range.
    """

    name = "multiplication"
    takes_arrays = True

    def __init__(self, bits: int = 4) -> None:
        check_range("bits", bits, 1, 64)
        self.bits = bits
        self.layout = StateLayout(
            p=2 * bits,
            q=2 * bits,
            # The product stays below 2^2L, so the top bit never carries.
            carry=2 * bits - 1,
            a=2 * bits,
            b=bits,
            count=bits | 1,
            check=1,
            shift=1,
        )

    def make_templates(self) -> Iterator[Template]:
        """Yield the adder, the two shifted factors, and the control bits."""
        yield from self._adder()
        yield from self._factors()
        yield from self._control()

    def _adder(self) -> Iterator[Template]:
        p, q, carry = self.layout["p"], self.layout["q"], self.layout["carry"]
        for i in range(len(p)):
            yield Template.rule("sum", ones=[p[i]], zeros=[q[i]], sets=[p[i]])
            yield Template.rule("sum", ones=[q[i]], zeros=[p[i]], sets=[p[i]])
        for i in range(len(carry)):
            yield Template.rule("carry", ones=[p[i], q[i]], sets=[carry[i]])
            yield Template.rule("move carry", ones=[carry[i]], sets=[q[i + 1]])

    def _factors(self) -> Iterator[Template]:
        a, b, q = self.layout["a"], self.layout["b"], self.layout["q"]
        check, shift = self.layout["check"][0], self.layout["shift"][0]
        for i in range(len(a)):
            yield Template.rule("keep multiplicand", ones=[a[i]], zeros=[shift], sets=[a[i]])
            yield Template.rule("load addend", ones=[check, b[0], a[i]], sets=[q[i]])
        for i in range(len(a) - 1):
            yield Template.rule("shift multiplicand", ones=[a[i], shift], sets=[a[i + 1]])
        for i in range(len(b)):
            yield Template.rule("keep multiplier", ones=[b[i]], zeros=[shift], sets=[b[i]])
        for i in range(1, len(b)):
            yield Template.rule("shift multiplier", ones=[b[i], shift], sets=[b[i - 1]])

    def _control(self) -> Iterator[Template]:
        b, count = self.layout["b"], self.layout["count"]
        check, shift = self.layout["check"][0], self.layout["shift"][0]
        yield Template.rule("start counting", ones=[check, b[0]], sets=[count[0]])
        for i in range(1, len(b)):
            yield Template.rule("skip addition", ones=[check, b[i]], zeros=[b[0]], sets=[shift])
        for i in range(len(count) - 1):
            yield Template.rule("count", ones=[count[i]], sets=[count[i + 1]])
        yield Template.rule("stop counting", ones=[count[-1]], sets=[shift])
        yield Template.rule("check again", ones=[shift], sets=[check])

    def inputs(self, generator: random.Random) -> Iterator[tuple[int, int]]:
        """Yield corner cases, then all pairs where they are few, else random pairs for ever."""
        full = (1 << self.bits) - 1
        top = 1 << (self.bits - 1)
        even, odd = alternating_bits(self.bits)
        corners = [(0, 0), (full, full), (full, 1), (1, full), (full, 0), (0, full), (top, top)]
        patterns = [(even, odd), (odd, even), (even, even), (odd, odd)]
        # The last addend's carry crosses all L positions.
        longest_carry = [(full, top | 1)]
        powers = [(1 << i, 1 << i) for i in range(self.bits)]
        return structured_first(
            [*corners, *patterns, *longest_carry, *powers],
            size=1 << 2 * self.bits,
            every=lambda: itertools.product(range(full + 1), range(full + 1)),
            draw=lambda: (random_operand(generator, self.bits), random_operand(generator, self.bits)),
            generator=generator,
        )

    def all_inputs(self) -> Iterable[tuple[int, int]] | None:
        """Return all pairs; None if they are more than `LISTED_INPUTS`.

        Those with one multiplier, which take about equally long, come together.
        """
        return AllNumbers(self.bits, 2) if 1 << 2 * self.bits <= LISTED_INPUTS else None

    def initial_fields(self, task_input: tuple[Number, Number]) -> dict[str, Any]:
        """Put the factors into a and b, and begin with a check."""
        return {"a": task_input[0], "b": task_input[1], "check": 1}

    def read_output(self, fields: dict[str, Any]) -> Number:
        """Return the product, in p."""
        output: Number = fields["p"]
        return output

    def reference(self, task_input: tuple[Number, Number]) -> Number:
        """Return the product."""
        return task_input[0] * task_input[1]

    def num_micro_steps(self, task_input: tuple[Number, Number]) -> int:
        """Return (L − 1)(T + 2) + 2L + 2, reached by a multiplier of ones.

        Its addends are in q after 1, T + 3, 2T + 5, … micro-steps. The carries of the last, from bit
        L − 1 on, have used up bit 2L − 1 of q after another 2L + 1.
        """
        del task_input
        return (self.bits - 1) * (len(self.layout["count"]) + 2) + 2 * self.bits + 2
