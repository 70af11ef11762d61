"""Permuting the bits of a word (the paper's first task)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ntk_ensembles.errors import OptionError, check_range, check_seed
from ntk_ensembles.tasks.base import LISTED_INPUTS, AllNumbers, Number, Task, alternating_bits, structured_first
from ntk_ensembles.templates import StateLayout, Template


class Permutation(Task[Number, Number]):
    """Moves bit i of an L-bit word to position π(i), in one micro-step: L bits, L templates.

    Args:
        bits: Number of bits L of the word, 1 to 4096.
        ones: Number of 1-bits of every input (default: any).
        permutation_seed: Seed of the random permutation, 0 to 2^63 - 1 (none: the identity).
        permutation: Position π(i) that each bit goes to, in place of a random permutation; L integers.

    Attributes:
        targets: Position π(i) that each bit goes to.

    Raises:
        OptionError: An option is outside its range.
    """

    name = "permutation"
    takes_arrays = True

    def __init__(
        self,
        bits: int = 30,
        ones: int | None = None,
        permutation_seed: int | None = 0,
        permutation: Sequence[int] | None = None,
    ) -> None:
        check_range("bits", bits, 1, 4096)
        if ones is not None:
            check_range("ones", ones, 0, bits)
        if permutation is not None and sorted(permutation) != list(range(bits)):
            raise OptionError("permutation", list(permutation), f"each of 0 to {bits - 1} once")
        if permutation_seed is not None:
            check_seed("permutation_seed", permutation_seed)
        self.bits = bits
        self.ones = ones
        self.permutation_seed = permutation_seed
        self.permutation = None if permutation is None else list(permutation)
        targets = list(range(bits)) if permutation is None else list(permutation)
        if permutation is None and permutation_seed is not None:
            random.Random(permutation_seed).shuffle(targets)
        self.targets = tuple(targets)
        self.layout = StateLayout(x=bits)

    def make_templates(self) -> Iterator[Template]:
        """Yield one template a bit: x_i sets x_π(i)."""
        x = self.layout["x"]
        for source, target in enumerate(self.targets):
            yield Template.rule("move", ones=[x[source]], sets=[x[target]])

    def inputs(self, generator: random.Random) -> Iterator[int]:
        """Yield regular patterns, then all admissible words where they are few, else random ones for ever."""
        full = (1 << self.bits) - 1
        block = (1 << (self.bits // 2 if self.ones is None else self.ones)) - 1
        top_block = block << (self.bits - block.bit_length())
        patterns = [0, full, *alternating_bits(self.bits), 1, 1 << (self.bits - 1), block, top_block]
        return structured_first(
            [word for word in patterns if self.ones is None or word.bit_count() == self.ones],
            size=self._num_inputs(),
            every=self._every_input,
            draw=lambda: self._draw(generator),
            generator=generator,
        )

    def all_inputs(self) -> Iterable[int] | None:
        """Return all admissible words; None if they are more than `LISTED_INPUTS`."""
        return self._every_input() if self._num_inputs() <= LISTED_INPUTS and self.bits < 63 else None

    def _num_inputs(self) -> int:
        return 1 << self.bits if self.ones is None else math.comb(self.bits, self.ones)

    def _every_input(self) -> Iterable[int]:
        if self.ones is None:
            return AllNumbers(self.bits)
        return (sum(1 << i for i in chosen) for chosen in itertools.combinations(range(self.bits), self.ones))

    def _draw(self, generator: random.Random) -> int:
        if self.ones is None:
            return generator.getrandbits(self.bits)
        return sum(1 << i for i in generator.sample(range(self.bits), self.ones))

    def initial_fields(self, task_input: Number) -> dict[str, Any]:
        """Put the word into x."""
        return {"x": task_input}

    def read_output(self, fields: dict[str, Any]) -> Number:
        """Return the word in x."""
        output: Number = fields["x"]
        return output

    def reference(self, task_input: Number) -> Number:
        """Return the permuted word."""
        return sum((task_input >> source & 1) << target for source, target in enumerate(self.targets))

    def num_micro_steps(self, task_input: Number) -> int:
        """Return 1."""
        del task_input
        return 1
