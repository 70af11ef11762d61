"""Random programs on the one-instruction computer, through the NTK mean and its decoders, against the interpreter."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from ntk_ensembles.sbn.execution import pack_states
from ntk_ensembles.sbn.machine import MachineState
from ntk_ensembles.tasks import SBN
from ntk_ensembles.tasks.planes import LANES, pack, to_mask, words_for
from ntk_ensembles.theory.execution import NTKExecutor
from ntk_ensembles.validation.tally import Tally, wrong_bit

_INSTRUCTIONS_FROM_ONE_MEMORY = 64
"""A program that has not halted by then is in a loop, more often than not."""


@dataclass(frozen=True)
class ComputerReport:
    """Random executions.

    Attributes:
        instructions: executed and compared with the interpreter; at least as many as asked for.
        memories: random memories they started from.
        halted: how many of these halted; each halted state was seen to stay for another w + 3 micro-steps.
        micro_steps: states predicted, those of halted computers included.
        tallies: what came of it, by decoder; a failure is an instruction.
        seconds: wall time.
    """

    instructions: int
    memories: int
    halted: int
    micro_steps: int
    tallies: tuple[Tally, ...]
    seconds: float


def validate_computer(
    task: SBN,
    executors: Sequence[NTKExecutor],
    instructions: int,
    seed: int,
    advance: Callable[[int], None] = lambda instructions: None,
) -> ComputerReport:
    """Execute random memories from random pcs until so many instructions are done.

    Many computers run side by side. After each instruction every bit of their states is compared with the
    interpreter's state; a computer that has halted, gone wrong or executed
    `_INSTRUCTIONS_FROM_ONE_MEMORY` instructions gets a new memory. As in `validate_inputs` all decoders share one
    closed loop, which each leaves where it is wrong.

    Args:
        task: the computer; its own ``instructions`` are not used.
        executors: the decoders, of the task's templates.
        instructions: how many at least, halted computers not counted.
        seed: of memories and pcs.
        advance: told how many instructions have been executed since it was last called.
    """
    started_at = time.monotonic()
    computers = min(executors[0].planes.words * LANES, -(-instructions // _INSTRUCTIONS_FROM_ONE_MEMORY))
    run = _ComputerRun(task, executors, computers, seed)
    while run.instructions < instructions:
        before = run.instructions
        run.execute()
        advance(run.instructions - before)
    return ComputerReport(
        run.instructions, run.memories, run.halted, run.micro_steps, tuple(run.tallies), time.monotonic() - started_at
    )


class _ComputerRun:
    """Computers side by side, one a lane, and what has been seen of them."""

    def __init__(self, task: SBN, executors: Sequence[NTKExecutor], computers: int, seed: int) -> None:
        self._task = task
        self._executors = executors
        self._planes = executors[0].planes
        self._generator = random.Random(seed)
        self._lanes = np.arange(words_for(computers) * LANES) < computers
        self.instructions = self.memories = self.halted = self.micro_steps = 0
        self.tallies = [Tally() for _ in executors]
        self._states = [self._random_state() for _ in range(computers)]
        self._ages = [0] * computers

    def execute(self) -> None:
        """One instruction of every computer."""
        planes = pack(pack_states(self._task, self._states))
        failed = np.zeros((len(self._executors), planes.shape[1]), np.uint64)
        for _ in range(self._task.step_micro_steps):
            counts = self._planes.counts(planes)
            for row, executor in enumerate(self._executors):
                self.tallies[row] = self.tallies[row].with_margins(executor, counts, self._lanes)
                failed[row] |= executor.decode_planes(counts)[1]
            planes = self._planes.union(counts)
        self.micro_steps += self._task.step_micro_steps * len(self._states)
        following = [self._task.machine.step(state) for state in self._states]
        wrong = np.bitwise_or.reduce(planes ^ pack(pack_states(self._task, following)), axis=0)
        for row, executor in enumerate(self._executors):
            failures = np.flatnonzero(to_mask(failed[row] | wrong))
            if len(failures):
                tally = self.tallies[row]
                first = tally.first_failure or self._explain(executor, self._states[failures[0]])
                self.tallies[row] = tally + Tally(len(failures), first)
        self._go_on(following, to_mask(np.bitwise_or.reduce(failed, axis=0) | wrong))

    def _go_on(self, following: list[MachineState], failed: Bool[NDArray[np.bool_], " lanes"]) -> None:
        """Count the instructions, and give new memories to computers that are done."""
        for computer, (before, after) in enumerate(zip(self._states, following, strict=True)):
            self.instructions += not before.halted
            self.halted += after.halted and not before.halted
            self._ages[computer] += 1
            # One that halts now is watched for the time of another instruction.
            if before.halted or failed[computer] or self._ages[computer] == _INSTRUCTIONS_FROM_ONE_MEMORY:
                following[computer] = self._random_state()
                self._ages[computer] = 0
        self._states = following

    def _random_state(self) -> MachineState:
        self.memories += 1
        machine = self._task.machine
        memory = tuple(machine.wrap(self._generator.getrandbits(machine.word)) for _ in range(machine.cells))
        return MachineState(memory, self._generator.randrange(machine.cells), halted=False)

    def _explain(self, executor: NTKExecutor, state: MachineState) -> str:
        """What goes wrong with an instruction that has failed."""
        task = self._task
        start, expected = pack_states(task, [state, task.machine.step(state)])
        where = wrong_bit(executor, task.templates, start, task.step_micro_steps)
        if where is None:
            final = executor.run(start[None], task.step_micro_steps).states[0]
            bit = int((final != expected).nonzero()[0])
            where = f"after it bit {task.layout.bit_name(bit)} is {int(final[bit])}, should be {int(expected[bit])}"
        words = " ".join(map(str, state.memory))
        return f"instruction at pc {state.pc}{' (halted)' if state.halted else ''} of memory {words}, {where}"
