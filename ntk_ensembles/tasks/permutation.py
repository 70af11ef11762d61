"""Permuting the bits of a word (DESIGN §1; the paper's first task)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ntk_ensembles.tasks.base import Task, check_range
from ntk_ensembles.tasks.inputs import alternating_bits, structured_first
from ntk_ensembles.tasks.layout import StateLayout
from ntk_ensembles.tasks.templates import Template


class Permutation(Task[int, int]):
    """Moves bit i of an L-bit word to position π(i), in one micro-step: L bits, L templates.

    Args:
        bits: number of bits L of the word, 1 to 4096.
        ones: evaluate on inputs with exactly so many ones (default: any).
        permutation_seed: seed of the random permutation (none: the identity).

    Attributes:
        permutation: π, where each bit goes.

    Raises:
        ValueError: an option outside its range.
    """

    name = "permutation"

    def __init__(self, bits: int = 30, ones: int | None = None, permutation_seed: int | None = 0) -> None:
        check_range("bits", bits, 1, 4096)
        if ones is not None:
            check_range("ones", ones, 0, bits)
        self.bits = bits
        self.ones = ones
        self.permutation_seed = permutation_seed
        positions = list(range(bits))
        if permutation_seed is not None:
            random.Random(permutation_seed).shuffle(positions)
        self.permutation = tuple(positions)
        self._is_explicit = False
        self.layout = StateLayout(x=bits)

    @classmethod
    def of(cls, permutation: Sequence[int], ones: int | None = None) -> Permutation:
        """The task for a given permutation: bit i goes to ``permutation[i]``.

        Raises:
            ValueError: not a permutation of 0, 1, ….
        """
        if sorted(permutation) != list(range(len(permutation))):
            raise ValueError(f"{list(permutation)} is no permutation of 0 to {len(permutation) - 1}")
        task = cls(bits=len(permutation), ones=ones, permutation_seed=None)
        task.permutation = tuple(permutation)
        task._is_explicit = True
        return task

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Task[int, int]:
        """The task with these `options`, an explicit permutation among them."""
        if "permutation" in options:
            return cls.of(options["permutation"], options["ones"])
        return super().from_options(options)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments; for a task made by `of` the permutation too."""
        return super().options | ({"permutation": list(self.permutation)} if self._is_explicit else {})

    def rules(self) -> Iterator[Template]:
        """One template a bit: x_i sets x_π(i)."""
        x = self.layout["x"]
        for source, target in enumerate(self.permutation):
            yield Template.rule("move", ones=[x[source]], sets=[x[target]])

    def inputs(self, generator: random.Random) -> Iterator[int]:
        """Regular patterns, then all admissible words where they are few, else random ones for ever."""
        full = (1 << self.bits) - 1
        block = (1 << (self.bits // 2 if self.ones is None else self.ones)) - 1
        top_block = block << (self.bits - block.bit_length())
        patterns = [0, full, *alternating_bits(self.bits), 1, 1 << (self.bits - 1), block, top_block]
        return structured_first(
            [value for value in patterns if self.ones is None or value.bit_count() == self.ones],
            size=1 << self.bits if self.ones is None else math.comb(self.bits, self.ones),
            every=self._every_input,
            draw=lambda: self._draw(generator),
            generator=generator,
        )

    def _every_input(self) -> Iterator[int]:
        if self.ones is None:
            return iter(range(1 << self.bits))
        return (sum(1 << i for i in chosen) for chosen in itertools.combinations(range(self.bits), self.ones))

    def _draw(self, generator: random.Random) -> int:
        if self.ones is None:
            return generator.getrandbits(self.bits)
        return sum(1 << i for i in generator.sample(range(self.bits), self.ones))

    def fields(self, value: int) -> dict[str, int]:
        """The word in x."""
        return {"x": value}

    def output(self, fields: dict[str, int]) -> int:
        """The word in x."""
        return fields["x"]

    def reference(self, value: int) -> int:
        """The permuted word."""
        return sum(1 << target for source, target in enumerate(self.permutation) if value >> source & 1)

    def micro_steps(self, value: int) -> int:
        """One."""
        del value
        return 1
