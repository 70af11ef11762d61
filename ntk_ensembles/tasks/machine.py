"""The one-instruction computer over plain Python integers: what everything else is checked against."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ntk_ensembles.errors import OptionError, check_choice

Branch = Literal["negative", "nonpositive"]
"""When an instruction goes to its third operand: SBN's rule, or SUBLEQ's."""

CELLS_MIN, CELLS_MAX = 4, 256
"""Range of the number of cells of a computer that is a task."""

WORD_BITS_MIN, WORD_BITS_MAX = 2, 16
"""Range of the size of its words."""


@dataclass(frozen=True)
class MachineState:
    """Everything the machine remembers between instructions.

    Attributes:
        memory: Cells, as signed words −2^(w−1) to 2^(w−1) − 1.
        pc: Address of the next instruction; in a halted state the target of the halting branch, modulo the number of
            cells.
        halted: Whether a branch to a negative address has been taken.
    """

    memory: tuple[int, ...]
    pc: int
    halted: bool


@dataclass(frozen=True)
class Machine:
    """C cells of w bits, program and data alike, under one branch rule.

    The instruction ``a b c`` does mem[b] ← mem[b] − mem[a], wrapping in two's complement, and goes to
    c if the result is negative (or, under ``nonpositive``, zero), else to the instruction after it.
    A branch to a negative c halts. Addresses are taken modulo C.

    Attributes:
        cells: Number of cells C, a power of two.
        word_bits: Number of bits w of a cell.
        branch: Branch rule.

    Raises:
        OptionError: ``cells`` is no power of two, ``word_bits`` is below 1, or the rule is unknown.
    """

    cells: int = 16
    word_bits: int = 8
    branch: Branch = "negative"

    def __post_init__(self) -> None:
        if self.cells < 1 or self.cells & (self.cells - 1):
            raise OptionError("cells", self.cells, "a power of two")
        if self.word_bits < 1:
            raise OptionError("word_bits", self.word_bits, "at least 1")
        check_choice("branch", self.branch, get_args(Branch))

    @property
    def word_range(self) -> tuple[int, int]:
        """Least and greatest signed word, −2^(w−1) and 2^(w−1) − 1."""
        half = 1 << (self.word_bits - 1)
        return -half, half - 1

    def check_word(self, value: int, cell: int | None = None) -> None:
        """Check that an integer fits a word, as a signed number or as two's complement.

        Args:
            value: Integer to check.
            cell: Address of the word, for the message.

        Raises:
            ValueError: It is below −2^(w−1) or above 2^w − 1.
        """
        low, high = self.word_range[0], (1 << self.word_bits) - 1
        if not low <= value <= high:
            where = "" if cell is None else f" (cell {cell})"
            raise ValueError(f"word {value}{where} does not fit {self.word_bits} bits: expected {low} to {high}")

    def wrap(self, value: int) -> int:
        """Return the signed word congruent to an integer modulo 2^w."""
        half = 1 << (self.word_bits - 1)
        return (value + half) % (1 << self.word_bits) - half

    def load(self, words: Sequence[int]) -> MachineState:
        """Return the start of a program: its words from cell 0 on, zeros behind them, pc 0.

        Words from 2^(w−1) to 2^w − 1 are taken as two's complement.

        Raises:
            ValueError: There are more words than cells, or a word does not fit.
        """
        if len(words) > self.cells:
            raise ValueError(f"a program of {len(words)} words does not fit {self.cells} cells")
        for cell, value in enumerate(words):
            self.check_word(value, cell)
        padding = [0] * (self.cells - len(words))
        return MachineState(tuple(self.wrap(value) for value in [*words, *padding]), pc=0, halted=False)

    def step(self, state: MachineState) -> MachineState:
        """Return the state after one instruction; a halted state stays as it is."""
        if state.halted:
            return state
        # All three words are read before the write: an instruction may overwrite itself.
        a, b, c = (state.memory[(state.pc + offset) % self.cells] for offset in range(3))
        target = b % self.cells
        result = self.wrap(state.memory[target] - state.memory[a % self.cells])
        memory = (*state.memory[:target], result, *state.memory[target + 1 :])
        if result < 0 or (result == 0 and self.branch == "nonpositive"):
            return MachineState(memory, c % self.cells, halted=c < 0)
        return MachineState(memory, (state.pc + 3) % self.cells, halted=False)

    def run(self, state: MachineState, max_instructions: int) -> tuple[MachineState, int]:
        """Return the state at the halt or after ``max_instructions``, and the number of instructions executed."""
        executed = 0
        while executed < max_instructions and not state.halted:
            state = self.step(state)
            executed += 1
        return state, executed

    def random_state(self, generator: random.Random) -> MachineState:
        """Draw a random memory and pc."""
        memory = tuple(self.wrap(generator.getrandbits(self.word_bits)) for _ in range(self.cells))
        return MachineState(memory, generator.randrange(self.cells), halted=False)


def parse_image(text: str) -> list[int]:
    """Return the words of a raw image: decimal integers separated by white space or commas.

    Raises:
        ValueError: A word is no decimal integer; the message has its position.
    """
    words = []
    for number, match in enumerate(re.finditer(r"[^\s,]+", text), start=1):
        if not re.fullmatch(r"[+-]?[0-9]+", match[0]):
            line = text.count("\n", 0, match.start()) + 1
            raise ValueError(f"word {number} of the image (line {line}) is {match[0]!r}: expected a decimal integer")
        words.append(int(match[0]))
    return words
