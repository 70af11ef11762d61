"""Programs side by side on any backend, in closed loop and instruction by instruction.

A backend that predicts is a `Stepper`: the NTK mean, or the mean over trained members. It is given a state, its decoded
prediction is the next state, and nothing corrects it. The interpreter runs beside it, and the two are compared after
every instruction.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ntk_ensembles.tasks import SBN, MachineState, Program
from ntk_ensembles.theory import Stepper, Trace, rollout


@dataclass(frozen=True)
class ProgramResult:
    """State of a program on its backend, and how it got there.

    Attributes:
        state: Memory, pc, and whether it has halted.
        instructions: Number of instructions executed so far.
        micro_steps: Number of micro-steps, w + 3 for each instruction.
        agreed: Whether every micro-step was the template machine's and the whole state the interpreter's after every
            instruction; None on the interpreter itself.
        smallest_margin: Smallest decision margin so far, negative if a bit was decoded wrongly; None on the
            interpreter, and before the first micro-step.
        seconds: Wall time until the program left the batch, or until now.
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


class ProgramBatch:
    """Run several programs side by side as one batch of states.

    A program leaves the batch when it halts or reaches its instruction limit.

    Args:
        task: Computer that the programs are for.
        programs: Programs to execute, from their states on.
        stepper: Backend that predicts; None for the interpreter alone.
        trace: Keep every micro-step of every program, one byte for each bit of the state.

    Attributes:
        task: Computer that the programs are for.
        unfinished: Indices of the programs still running.

    Raises:
        ValueError: A program has a memory of another size, or a trace of the interpreter is wanted, which has no
            micro-steps.
    """

    def __init__(
        self, task: SBN, programs: Sequence[Program], stepper: Stepper[Any] | None = None, *, trace: bool = False
    ) -> None:
        for program in programs:
            if len(program.state.memory) != task.cells:
                found = f"{program.label}: a memory of {len(program.state.memory)} cells"
                raise ValueError(f"{found}; the machine has {task.cells}")
        if trace and stepper is None:
            raise ValueError("the interpreter has no micro-steps to trace; expected a stepper")
        self.task = task
        self._stepper = stepper
        self._limits = [program.instructions for program in programs]
        self._references = [program.state for program in programs]
        self._instructions = [0] * len(programs)
        self._seconds: list[float | None] = [None] * len(programs)
        self._states = task.pack(self._references)
        self._agreed = torch.ones(len(programs), dtype=torch.bool)
        self._margins = torch.full((len(programs),), torch.inf, dtype=torch.float64)
        none = torch.empty(0, dtype=torch.float64)
        self._traces = [[Trace(state[None].clone(), none, none.bool())] for state in self._states] if trace else None
        self._started_at = time.perf_counter()
        self.unfinished = list(range(len(programs)))
        self._retire()

    def __len__(self) -> int:
        """Return the number of programs."""
        return len(self._limits)

    def advance(self) -> None:
        """Execute one instruction of every unfinished program."""
        active = self.unfinished
        for index in active:
            self._references[index] = self.task.machine.step(self._references[index])
            self._instructions[index] += 1
        if self._stepper is not None and active:
            rows = torch.tensor(active)
            steps = self.task.micro_steps_per_instruction
            result = rollout(self._stepper, self._states[rows], steps, trace=self._traces is not None)
            expected = self.task.pack([self._references[index] for index in active])
            self._states[rows] = result.states
            self._agreed[rows] &= result.agreed & (result.states == expected).all(1)
            self._margins[rows] = torch.minimum(self._margins[rows], result.margins)
            if self._traces is not None and (trace := result.trace) is not None:
                for row, index in enumerate(active):
                    part = Trace(trace.states[1:, row], trace.margins[:, row], trace.agreed[:, row])
                    self._traces[index].append(part)
        self._retire()

    def _retire(self) -> None:
        if self._stepper is None:
            halted = [self._references[index].halted for index in self.unfinished]
        else:
            halted = (~self.task.is_running(self._states[self.unfinished])).tolist()
        now = time.perf_counter() - self._started_at
        still = []
        for index, stopped in zip(self.unfinished, halted, strict=True):
            if stopped or self._instructions[index] >= self._limits[index]:
                self._seconds[index] = now
            else:
                still.append(index)
        self.unfinished = still

    def result(self, index: int) -> ProgramResult:
        """Return the state of a program on its backend."""
        seconds = self._seconds[index]
        count = self._instructions[index]
        state, agreed, margin = self._references[index], None, None
        if self._stepper is not None:
            state = self.task.result(self._states[index])
            agreed = bool(self._agreed[index])
            margin = float(self._margins[index]) if self._margins[index].isfinite() else None
        elapsed = time.perf_counter() - self._started_at if seconds is None else seconds
        return ProgramResult(state, count, count * self.task.micro_steps_per_instruction, agreed, margin, elapsed)

    def trace(self, index: int) -> Trace:
        """Return every micro-step of a program so far.

        Raises:
            ValueError: The batch was made without ``trace=True``.
        """
        if self._traces is None:
            raise ValueError("no trace was kept; expected ProgramBatch(…, trace=True)")
        parts = self._traces[index]
        return Trace(
            torch.cat([part.states for part in parts]),
            torch.cat([part.margins for part in parts]),
            torch.cat([part.agreed for part in parts]),
        )


def execute_programs(
    task: SBN, programs: Sequence[Program], stepper: Stepper[Any] | None = None
) -> list[ProgramResult]:
    """Run programs until each has halted or reached its limit of instructions; the arguments are `ProgramBatch`'s."""
    batch = ProgramBatch(task, programs, stepper)
    while batch.unfinished:
        batch.advance()
    return [batch.result(index) for index in range(len(batch))]
