"""Programs on any backend, many at once, in closed loop and instruction by instruction (DESIGN §5 and §7).

A backend that predicts is an `Executor`: the NTK mean, or the mean over trained members. It is given a state, its
decoded prediction is the next state, and nothing corrects it. The interpreter runs beside it, and the two are
compared after every instruction.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float64
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.sbn.machine import MachineState
from ntk_ensembles.tasks.sbn import SBN, Program
from ntk_ensembles.theory.execution import RunResult, StepResult

PHASES = ("fetch", "read", "subtract", "write")
"""The fields of the state that tell what the next micro-step does; all are zero when the machine has halted."""


@runtime_checkable
class Executor(Protocol):
    """Whatever predicts the next state of a batch of states, and decodes it: `NTKExecutor`, `Ensemble`."""

    def step(self, states: Bool[Tensor, "states bits"]) -> StepResult:
        """One micro-step of every state."""
        ...

    def run(self, states: Bool[Tensor, "states bits"], micro_steps: int) -> RunResult:
        """So many micro-steps, each decoded state fed back."""
        ...


@dataclass(frozen=True)
class History:
    """Every micro-step of one execution.

    Attributes:
        states: the state before the first micro-step and after each.
        margins: the smallest decision margin of each micro-step; ∞ where no template matched.
        agreed: whether each was the OR-machine's.
    """

    states: Bool[Tensor, "moments bits"]
    margins: Float64[Tensor, " micro_steps"]
    agreed: Bool[Tensor, " micro_steps"]


@dataclass(frozen=True)
class Execution:
    """How far a program has come.

    Attributes:
        state: memory, pc, and whether it has halted.
        instructions: executed so far.
        micro_steps: w + 3 for each instruction.
        agreed: whether every micro-step was the OR-machine's and the whole state the interpreter's after every
            instruction; None on the interpreter itself.
        smallest_margin: the smallest decision margin met, negative if a bit was decoded wrongly; None on the
            interpreter, and before the first micro-step.
        seconds: wall time until the program left the batch, or until now.
    """

    state: MachineState
    instructions: int
    micro_steps: int
    agreed: bool | None
    smallest_margin: float | None
    seconds: float

    @property
    def succeeded(self) -> bool:
        """Whether the program has halted, without a wrong bit on the way."""
        return self.state.halted and self.agreed is not False


class Batch:
    """Programs that run side by side as one tensor; those that have halted, or reached their limit, leave it.

    Args:
        task: the machine.
        programs: to execute, from their states on.
        executor: the backend; None for the interpreter alone.
        record: keep the history of every program; costs as many bytes a micro-step as the state has bits.

    Attributes:
        task: the machine.
        unfinished: the indices of the programs still running.

    Raises:
        ValueError: a program for a memory of another size, or a history of the interpreter, which has none.
    """

    def __init__(
        self, task: SBN, programs: Sequence[Program], executor: Executor | None = None, *, record: bool = False
    ) -> None:
        for program in programs:
            if len(program.state.memory) != task.cells:
                found = f"{program.label}: a memory of {len(program.state.memory)} cells"
                raise ValueError(f"{found}; the machine has {task.cells}")
        if record and executor is None:
            raise ValueError("the interpreter has no micro-steps to record; expected an executor")
        self.task = task
        self._executor = executor
        self._record = record
        self._limits = [program.instructions for program in programs]
        self._references = [program.state for program in programs]
        self._instructions = [0] * len(programs)
        self._seconds: list[float | None] = [None] * len(programs)
        self._states = pack_states(task, self._references)
        self._agreed = torch.ones(len(programs), dtype=torch.bool)
        self._margins = torch.full((len(programs),), torch.inf, dtype=torch.float64)
        self._recorded: list[list[StepResult]] = [[] for _ in programs]
        self._starts = self._states.clone()
        self._phases = [bit for phase in PHASES for bit in task.layout[phase]]
        self._started_at = time.perf_counter()
        self.unfinished = list(range(len(programs)))
        self._retire()

    def __len__(self) -> int:
        """The number of programs."""
        return len(self._limits)

    def advance(self) -> None:
        """Execute one instruction of every unfinished program."""
        active = self.unfinished
        for index in active:
            self._references[index] = self.task.machine.step(self._references[index])
            self._instructions[index] += 1
        if self._executor is not None and active:
            rows = torch.tensor(active)
            result = self._micro_steps(self._executor, rows)
            expected = pack_states(self.task, [self._references[index] for index in active])
            self._states[rows] = result.states
            same = torch.from_numpy((result.states.numpy() == expected.numpy()).all(1))
            self._agreed[rows] &= result.agreed & same
            self._margins[rows] = torch.minimum(self._margins[rows], result.margins)
        self._retire()

    def _micro_steps(self, executor: Executor, rows: Tensor) -> RunResult:
        """One instruction of the chosen programs, each decoded state fed back."""
        states = self._states[rows]
        count = self.task.step_micro_steps
        if not self._record:
            return executor.run(states, count)
        agreed = torch.ones(len(states), dtype=torch.bool)
        smallest = torch.full((len(states),), torch.inf, dtype=torch.float64)
        for _ in range(count):
            step = executor.step(states)
            states = step.successors
            agreed &= step.agreed
            smallest = torch.minimum(smallest, step.margins)
            for position, index in enumerate(rows.tolist()):
                one = slice(position, position + 1)
                self._recorded[index].append(StepResult(states[one], step.margins[one], step.agreed[one]))
        return RunResult(states, smallest, agreed)

    def _retire(self) -> None:
        if self._executor is None:
            halted = [self._references[index].halted for index in self.unfinished]
        else:
            running = np.logical_or.reduce(self._states.numpy()[:, self._phases], axis=1)
            halted = [not running[index] for index in self.unfinished]
        now = time.perf_counter() - self._started_at
        still = []
        for index, stopped in zip(self.unfinished, halted, strict=True):
            if stopped or self._instructions[index] >= self._limits[index]:
                self._seconds[index] = now
            else:
                still.append(index)
        self.unfinished = still

    def execution(self, index: int) -> Execution:
        """How far a program has come on the backend."""
        seconds = self._seconds[index]
        count = self._instructions[index]
        state, agreed, margin = self._references[index], None, None
        if self._executor is not None:
            state = self.task.output(self.task.layout.unpack(self._states[index]))
            agreed = bool(self._agreed[index])
            margin = float(self._margins[index]) if self._margins[index].isfinite() else None
        elapsed = time.perf_counter() - self._started_at if seconds is None else seconds
        return Execution(state, count, count * self.task.step_micro_steps, agreed, margin, elapsed)

    def history(self, index: int) -> History:
        """Every micro-step of a program so far.

        Raises:
            ValueError: the batch was not made to record.
        """
        if not self._record:
            raise ValueError("no history was recorded; expected Batch(…, record=True)")
        steps = self._recorded[index]
        states = torch.cat([self._starts[index : index + 1], *(step.successors for step in steps)])
        empty = torch.empty(0, dtype=torch.float64)
        margins = torch.cat([empty, *(step.margins for step in steps)])
        return History(states, margins, torch.cat([empty.bool(), *(step.agreed for step in steps)]))


def execute(task: SBN, programs: Sequence[Program], executor: Executor | None = None) -> list[Execution]:
    """Run programs until each has halted or reached its limit of instructions.

    Args:
        task: the machine.
        programs: to execute, from their states on.
        executor: the backend; None for the interpreter alone.

    Raises:
        ValueError: a program for a memory of another size.
    """
    batch = Batch(task, programs, executor)
    while batch.unfinished:
        batch.advance()
    return [batch.execution(index) for index in range(len(batch))]


def pack_states(task: SBN, states: Sequence[MachineState]) -> Bool[Tensor, "states bits"]:
    """`SBN.fields` of many computers at once: about to fetch, or halted."""
    packed = np.zeros((len(states), task.layout.bits), np.bool_)
    memory = np.array([state.memory for state in states], np.int64).reshape(len(states), task.cells)
    bits = [bit for cell in range(task.cells) for bit in task.layout[f"memory{cell}"]]
    packed[:, bits] = _digits(memory, task.word).reshape(len(states), len(bits))
    packed[:, list(task.layout["pc"])] = _digits(np.array([state.pc for state in states], np.int64), task.address_bits)
    packed[:, task.layout["fetch"][0]] = [not state.halted for state in states]
    return torch.from_numpy(packed)


def _digits(values: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """The lowest binary digits of integers, in two's complement, along a new last axis."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(*values.shape, values.itemsize)
    return np.unpackbits(octets[..., : -(-count // 8)], axis=-1, count=count, bitorder="little").view(np.bool_)
