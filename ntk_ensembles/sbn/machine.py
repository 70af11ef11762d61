"""The one-instruction computer over plain Python integers (DESIGN §5): what everything else is checked against."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Branch = Literal["negative", "nonpositive"]
"""When an instruction goes to its third operand: SBN's rule, or SUBLEQ's."""


@dataclass(frozen=True)
class MachineState:
    """Everything the machine remembers between instructions.

    Attributes:
        memory: the cells, as signed words −2^(w−1) to 2^(w−1) − 1.
        pc: address of the next instruction; in a halted state where the halting branch pointed,
            modulo the number of cells.
        halted: whether a branch to a negative address has been taken.
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
        cells: C, a power of two.
        word: w, bits of a cell.
        branch: the branch rule.

    Raises:
        ValueError: cells not a power of two, no bits, or an unknown rule.
    """

    cells: int = 16
    word: int = 8
    branch: Branch = "negative"

    def __post_init__(self) -> None:
        if self.cells < 1 or self.cells & (self.cells - 1):
            raise ValueError(f"{self.cells} cells: expected a power of two")
        if self.word < 1:
            raise ValueError(f"words of {self.word} bits: expected at least 1")
        if self.branch not in get_args(Branch):
            raise ValueError(f"branch rule {self.branch!r}: expected one of {', '.join(get_args(Branch))}")

    def wrap(self, value: int) -> int:
        """The signed word congruent to an integer modulo 2^w."""
        half = 1 << (self.word - 1)
        return (value + half) % (1 << self.word) - half

    def load(self, words: Sequence[int]) -> MachineState:
        """The start of a program: its words from cell 0 on, zeros behind, pc 0.

        Words from 2^(w−1) to 2^w − 1 are taken as two's complement.

        Raises:
            ValueError: more words than cells, or a word that does not fit.
        """
        if len(words) > self.cells:
            raise ValueError(f"a program of {len(words)} words does not fit {self.cells} cells")
        low, high = -(1 << (self.word - 1)), (1 << self.word) - 1
        for cell, value in enumerate(words):
            if not low <= value <= high:
                raise ValueError(f"word {value} (cell {cell}) does not fit {self.word} bits: expected {low} to {high}")
        padding = [0] * (self.cells - len(words))
        return MachineState(tuple(self.wrap(value) for value in [*words, *padding]), pc=0, halted=False)

    def step(self, state: MachineState) -> MachineState:
        """The state after one instruction; a halted state stays as it is."""
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
        """The state at the halt or after so many instructions, and how many were executed."""
        executed = 0
        while executed < max_instructions and not state.halted:
            state = self.step(state)
            executed += 1
        return state, executed


def parse_image(text: str) -> list[int]:
    """The words of a raw image: decimal integers separated by white space or commas.

    Raises:
        ValueError: something that is no decimal integer, with its position.
    """
    words = []
    for number, match in enumerate(re.finditer(r"[^\s,]+", text), start=1):
        if not re.fullmatch(r"[+-]?[0-9]+", match[0]):
            line = text.count("\n", 0, match.start()) + 1
            raise ValueError(f"word {number} of the image (line {line}) is {match[0]!r}: expected a decimal integer")
        words.append(int(match[0]))
    return words
