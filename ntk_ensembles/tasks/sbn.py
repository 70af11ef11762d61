"""The one-instruction computer as a task: one memory for program and data, any program."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.errors import OptionError, check_range
from ntk_ensembles.tasks.base import Task
from ntk_ensembles.tasks.machine import (
    CELLS_MAX,
    CELLS_MIN,
    WORD_BITS_MAX,
    WORD_BITS_MIN,
    Branch,
    Machine,
    MachineState,
    parse_image,
)
from ntk_ensembles.templates import StateLayout, Template

PHASES = ("fetch", "read", "subtract", "write")
"""Fields of the state that say what the next micro-step does; all are zero when the machine has halted."""

_SHIPPED_WORD_BITS = 8
"""Smallest word that the shipped images are written for."""
_SHIPPED_INSTRUCTIONS = 64
"""Largest number of instructions that a shipped image executes; all halt earlier."""
_RANDOM_AFTER_EACH_PROGRAM = 3


@dataclass(frozen=True)
class Program:
    """A memory with the address to start at, and a number of instructions.

    Attributes:
        state: State before the first instruction.
        instructions: Number of instructions to execute at most.
        label: Name for messages.
    """

    state: MachineState
    instructions: int
    label: str


class SBN(Task[Program, MachineState]):
    """Executes SBN or SUBLEQ programs that may modify themselves, w + 3 micro-steps an instruction.

    One phase bit is set at a time. FETCH copies the three words at pc into address registers and
    advances pc; READ copies mem[a] and mem[b] into x and y; w phases of SUBTRACT shift both down
    while mem[b] − mem[a] is shifted into x from the top, and the last one decodes b into the select
    lines; WRITE replaces the selected cell by x and decides where pc goes. A branch that halts sets
    no phase bit, and then memory and pc stay for ever.

    Args:
        cells: Number of memory cells C, a power of two, 4 to 256.
        word_bits: Number of bits w of a cell, 2 to 16; enough to hold an address.
        branch: Rule to branch by: if the result is negative (SBN), or negative or zero (SUBLEQ).
        instructions: Instructions to execute from each random memory in evaluation, 1 to 65536.

    Attributes:
        machine: Interpreter of the same computer.

    Raises:
        OptionError: An option is outside its range, or words are too short for an address.
    """

    name = "sbn"

    def __init__(self, cells: int = 16, word_bits: int = 8, branch: Branch = "negative", instructions: int = 4) -> None:
        check_range("cells", cells, CELLS_MIN, CELLS_MAX)
        check_range("word_bits", word_bits, WORD_BITS_MIN, WORD_BITS_MAX)
        check_range("instructions", instructions, 1, 1 << 16)
        if cells & (cells - 1):
            raise OptionError("cells", cells, f"a power of two from {CELLS_MIN} to {CELLS_MAX}")
        self.address_bits = cells.bit_length() - 1
        if word_bits < self.address_bits:
            raise OptionError(
                "word_bits", word_bits, f"at least {self.address_bits}: a word must hold an address of {cells} cells"
            )
        self.machine = Machine(cells, word_bits, branch)
        self.cells = cells
        self.word_bits = word_bits
        self.branch = branch
        self.instructions = instructions
        self.layout = StateLayout(
            **{f"memory{cell}": word_bits for cell in range(cells)},
            pc=self.address_bits,
            address_a=self.address_bits,
            address_b=self.address_bits,
            # The low bits of c, and above them its sign.
            target=self.address_bits + 1,
            x=word_bits,
            y=word_bits,
            borrow=1,
            select=cells,
            **({"nonzero": 1} if branch == "nonpositive" else {}),
            fetch=1,
            read=1,
            subtract=word_bits,
            write=1,
        )

    @property
    def micro_steps_per_instruction(self) -> int:
        """Number of micro-steps of one instruction, w + 3."""
        return self.word_bits + 3

    def make_templates(self) -> Iterator[Template]:
        """Yield a block for each phase, and what is kept between them."""
        yield from self._fetch()
        yield from self._read()
        yield from self._subtract()
        yield from self._write()
        yield from self._keep()

    def _bit(self, field: str) -> int:
        return self.layout[field][0]

    def _holds(self, field: str, value: int) -> tuple[list[int], list[int]]:
        """Return the bits that are 1, and those that are 0, where a field holds a value."""
        bits = self.layout[field]
        return [p for i, p in enumerate(bits) if value >> i & 1], [p for i, p in enumerate(bits) if not value >> i & 1]

    def _fetch(self) -> Iterator[Template]:
        fetch = self._bit("fetch")
        target = self.layout["target"]
        for pc in range(self.cells):
            ones, zeros = self._holds("pc", pc)
            a, b, c = (self.layout[f"memory{(pc + offset) % self.cells}"] for offset in range(3))
            copies = [
                *zip(a, self.layout["address_a"], strict=False),
                *zip(b, self.layout["address_b"], strict=False),
                *zip(c, target[:-1], strict=False),
                (c[-1], target[-1]),
            ]
            for source, register in copies:
                yield Template.rule("fetch", ones=[fetch, *ones, source], zeros=zeros, sets=[register])
            following, _ = self._holds("pc", (pc + 3) % self.cells)
            if following:
                yield Template.rule("advance", ones=[fetch, *ones], zeros=zeros, sets=following)
        yield Template.rule("phase", ones=[fetch], sets=[self._bit("read")])

    def _read(self) -> Iterator[Template]:
        read = self._bit("read")
        for cell in range(self.cells):
            for address, register in (("address_a", "x"), ("address_b", "y")):
                ones, zeros = self._holds(address, cell)
                for source, bit in zip(self.layout[f"memory{cell}"], self.layout[register], strict=True):
                    yield Template.rule("read", ones=[read, *ones, source], zeros=zeros, sets=[bit])
        yield Template.rule("phase", ones=[read], sets=[self.layout["subtract"][0]])

    def _subtract(self) -> Iterator[Template]:
        # No phase bit is needed here: x, y and borrow are zero before READ has loaded them, and
        # WRITE lets go of them.
        x, y, borrow, subtract = self.layout["x"], self.layout["y"], self._bit("borrow"), self.layout["subtract"]
        write = self._bit("write")
        for register in (x, y):
            for i in range(1, self.word_bits):
                yield Template.rule("shift", ones=[register[i]], zeros=[write], sets=[register[i - 1]])
        digits = (y[0], x[0], borrow)
        difference = [x[-1], self._bit("nonzero")] if self.branch == "nonpositive" else [x[-1]]
        for ones in ([y[0]], [x[0]], [borrow], digits):
            zeros = [digit for digit in digits if digit not in ones]
            yield Template.rule("difference", ones=ones, zeros=[*zeros, write], sets=difference)
        yield Template.rule("borrow", ones=[x[0]], zeros=[y[0], write], sets=[borrow])
        yield Template.rule("borrow", ones=[borrow], zeros=[y[0], write], sets=[borrow])
        yield Template.rule("borrow", ones=[x[0], borrow], zeros=[write], sets=[borrow])
        for i in range(self.word_bits - 1):
            yield Template.rule("phase", ones=[subtract[i]], sets=[subtract[i + 1]])
        for cell, line in enumerate(self.layout["select"]):
            ones, zeros = self._holds("address_b", cell)
            yield Template.rule("select", ones=[subtract[-1], *ones], zeros=zeros, sets=[line])
        yield Template.rule("phase", ones=[subtract[-1]], sets=[write])

    def _write(self) -> Iterator[Template]:
        write, fetch, sign = self._bit("write"), self._bit("fetch"), self.layout["x"][-1]
        pc, target = self.layout["pc"], self.layout["target"]
        for cell, line in enumerate(self.layout["select"]):
            for bit, result in zip(self.layout[f"memory{cell}"], self.layout["x"], strict=True):
                yield Template.rule("write", ones=[line, result], sets=[bit])
        # Each condition: bits that must be 1, bits that must be 0.
        going_on: tuple[list[int], list[int]] = ([write], [sign])
        branching: list[tuple[list[int], list[int]]] = [([write, sign], [])]
        if self.branch == "nonpositive":
            nonzero = self._bit("nonzero")
            going_on = ([write, nonzero], [sign])
            branching.append(([write], [nonzero]))
        ones, zeros = going_on
        for bit in pc:
            yield Template.rule("go on", ones=[*ones, bit], zeros=zeros, sets=[bit])
        yield Template.rule("phase", ones=ones, zeros=zeros, sets=[fetch])
        for ones, zeros in branching:
            for source, bit in zip(target[:-1], pc, strict=True):
                yield Template.rule("branch", ones=[*ones, source], zeros=zeros, sets=[bit])
            yield Template.rule("phase", ones=ones, zeros=[*zeros, target[-1]], sets=[fetch])

    def _keep(self) -> Iterator[Template]:
        write = self._bit("write")
        for cell, line in enumerate(self.layout["select"]):
            for bit in self.layout[f"memory{cell}"]:
                yield Template.rule("keep memory", ones=[bit], zeros=[line], sets=[bit])
        for bit in self.layout["pc"]:
            yield Template.rule("keep pc", ones=[bit], zeros=[self._bit("fetch"), write], sets=[bit])
        registers = [*self.layout["address_b"], *self.layout["target"]]
        if self.branch == "nonpositive":
            registers.append(self._bit("nonzero"))
        for bit in registers:
            yield Template.rule("keep register", ones=[bit], zeros=[write], sets=[bit])

    def inputs(self, generator: random.Random) -> Iterator[Program]:
        """Yield the shipped programs that fit, a few random memories after each, then random ones for ever."""
        for program in self._shipped_programs():
            yield program
            for _ in range(_RANDOM_AFTER_EACH_PROGRAM):
                yield self._random_program(generator)
        while True:
            yield self._random_program(generator)

    def _shipped_programs(self) -> Iterator[Program]:
        if self.word_bits < _SHIPPED_WORD_BITS:
            return
        folder = resources.files("ntk_ensembles.tasks") / "programs"
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            label, *rule, ending = file.name.split(".")
            if ending != "dec" or (rule and rule != [self.branch]):
                continue
            words = parse_image(file.read_text(encoding="utf-8"))
            if len(words) > self.cells:
                continue
            state = self.machine.load(words)
            _, executed = self.machine.run(state, _SHIPPED_INSTRUCTIONS)
            # One more than it needs: the halted state must be seen to stay.
            yield Program(state, executed + 1, label)

    def _random_program(self, generator: random.Random) -> Program:
        return Program(self.machine.random_state(generator), self.instructions, "random memory")

    def initial_fields(self, task_input: Program) -> dict[str, int]:
        """Return memory and pc, about to fetch unless halted."""
        state = task_input.state
        memory = {f"memory{cell}": word % (1 << self.word_bits) for cell, word in enumerate(state.memory)}
        return {**memory, "pc": state.pc, "fetch": int(not state.halted)}

    def read_output(self, fields: dict[str, int]) -> MachineState:
        """Return the computer's state; it has halted if no phase bit is set."""
        memory = tuple(self.machine.wrap(fields[f"memory{cell}"]) for cell in range(self.cells))
        halted = not any(fields[phase] for phase in PHASES)
        return MachineState(memory, fields["pc"], halted)

    def reference(self, task_input: Program) -> MachineState:
        """Return the interpreter's state after the same number of instructions."""
        return self.machine.run(task_input.state, task_input.instructions)[0]

    def num_micro_steps(self, task_input: Program) -> int:
        """Return w + 3 for each instruction."""
        return task_input.instructions * self.micro_steps_per_instruction

    def pack(self, states: Sequence[MachineState]) -> Bool[Tensor, "states bits"]:
        """Return the states of many computers at once as bits: about to fetch, or halted."""
        packed = np.zeros((len(states), self.layout.bits), np.bool_)
        memory = np.array([state.memory for state in states], np.int64).reshape(len(states), self.cells)
        bits = [bit for cell in range(self.cells) for bit in self.layout[f"memory{cell}"]]
        packed[:, bits] = _digits(memory, self.word_bits).reshape(len(states), len(bits))
        packed[:, list(self.layout["pc"])] = _digits(np.array([s.pc for s in states], np.int64), self.address_bits)
        packed[:, self._bit("fetch")] = [not state.halted for state in states]
        return torch.from_numpy(packed)

    def is_running(self, states: Bool[Tensor, "states bits"]) -> Bool[Tensor, " states"]:
        """Return which computers have not halted: some phase bit is set."""
        return states[:, [bit for phase in PHASES for bit in self.layout[phase]]].any(1)


def _digits(values: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Return the lowest binary digits of integers, in two's complement, along a new last axis."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, values.itemsize)
    return np.unpackbits(octets[..., : -(-count // 8)], axis=-1, count=count, bitorder="little").view(np.bool_)
