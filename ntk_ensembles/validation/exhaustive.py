"""Every input of a task through the NTK mean and its decoders, micro-step by micro-step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt64
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.tasks import Addition, Multiplication, Permutation, Task
from ntk_ensembles.tasks.planes import LANES, Words, from_integers, to_integers, to_mask, unpack, words_for
from ntk_ensembles.theory.execution import NTKExecutor
from ntk_ensembles.validation.distinct import CAPACITY, DistinctCount, StateCodes
from ntk_ensembles.validation.tally import Tally, wrong_bit

Numbers: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Inputs:
    """All inputs of a task, numbered; and the task's meaning once more, in arithmetic on arrays.

    Attributes:
        task: its `Task.micro_steps` is the same for all inputs.
        count: how many inputs there are.
        value: the input of a number.
        fields: `Task.fields` of the inputs of many numbers.
        output: `Task.output` of many final states.
        reference: `Task.reference` of the inputs of many numbers, by plain arithmetic.
    """

    task: Task[Any, Any]
    count: int
    value: Callable[[int], Any]
    fields: Callable[[Numbers], dict[str, Numbers]]
    output: Callable[[dict[str, Numbers]], Numbers]
    reference: Callable[[Numbers], Numbers]

    @property
    def micro_steps(self) -> int:
        """How many each input takes at most."""
        return self.task.micro_steps(self.value(0))

    @classmethod
    def of_permutation(cls, task: Permutation) -> Inputs:
        """All 2^L words."""
        return cls(
            task,
            1 << task.bits,
            value=lambda number: number,
            fields=lambda numbers: {"x": numbers},
            output=lambda fields: fields["x"],
            reference=lambda numbers: np.sum(
                [(numbers >> source & 1) << target for source, target in enumerate(task.permutation)], axis=0
            ),
        )

    @classmethod
    def of_addition(cls, task: Addition) -> Inputs:
        """All 2^2L pairs of summands."""
        bits, low = task.bits, (1 << task.bits) - 1
        return cls(
            task,
            1 << 2 * bits,
            value=lambda number: (number & low, number >> bits),
            fields=lambda numbers: {"p": numbers & low, "q": numbers >> bits},
            output=lambda fields: fields["p"] + (fields["carry"] >> bits - 1 << bits),
            reference=lambda numbers: (numbers & low) + (numbers >> bits),
        )

    @classmethod
    def of_multiplication(cls, task: Multiplication) -> Inputs:
        """All 2^2L pairs of factors; those with one multiplier, which take about equally long, together."""
        bits, low = task.bits, (1 << task.bits) - 1
        return cls(
            task,
            1 << 2 * bits,
            value=lambda number: (number & low, number >> bits),
            fields=lambda numbers: {"a": numbers & low, "b": numbers >> bits, "check": np.ones_like(numbers)},
            output=lambda fields: fields["p"],
            reference=lambda numbers: (numbers & low) * (numbers >> bits),
        )


@dataclass(frozen=True)
class ExhaustiveReport:
    """All inputs of a task.

    Attributes:
        inputs: how many.
        micro_steps: states predicted, repeated or not: those of each execution up to its fixed point, which
            is predicted once.
        distinct_states: how many different ones.
        distinct_exact: whether that is exact (but for confused codes, see `StateCodes`) or an estimate.
        predictions: distinct states times bits: so many means were compared with a threshold, each found as a
            number by its s, F_j and C_j.
        tallies: what came of it, by decoder.
        seconds: wall time.
    """

    inputs: int
    micro_steps: int
    distinct_states: int
    distinct_exact: bool
    predictions: int
    tallies: tuple[Tally, ...]
    seconds: float


def validate_inputs(
    inputs: Inputs, executors: Sequence[NTKExecutor], advance: Callable[[int], None] = lambda inputs: None
) -> ExhaustiveReport:
    """Execute all inputs by the NTK mean.

    Each decoded state is compared with the OR-machine's. As long as they are equal, feeding back the one is
    feeding back the other, so that all decoders share one closed loop; an execution in which a decoder was wrong
    once counts as its failure. At the end, at a fixed point or after the task's micro-steps, the output is
    compared with the reference.

    Args:
        inputs: what to run.
        executors: the decoders, of the task's templates.
        advance: told how many inputs have been finished since it was last called.

    Raises:
        RuntimeError: on arrays the task's initial state or reference is not what it is on integers.
    """
    started_at = time.monotonic()
    run = _ExhaustiveRun(inputs, executors)
    for start in range(0, inputs.count, run.lanes):
        stop = min(start + run.lanes, inputs.count)
        run.execute(start, stop)
        advance(stop - start)
    distinct, exact = run.distinct.result()
    return ExhaustiveReport(
        inputs.count,
        run.micro_steps,
        distinct,
        exact,
        distinct * inputs.task.layout.bits,
        tuple(run.tallies),
        time.monotonic() - started_at,
    )


class _ExhaustiveRun:
    """Executions from ranges of inputs, and what has been seen of them."""

    def __init__(self, inputs: Inputs, executors: Sequence[NTKExecutor]) -> None:
        self._inputs = inputs
        self._task = inputs.task
        self._executors = executors
        self._codes = StateCodes(inputs.task.layout.bits)
        self._planes = executors[0].planes
        self.lanes = self._planes.words * LANES
        self.micro_steps = 0
        self.distinct = DistinctCount(min(inputs.count * inputs.micro_steps + 1, CAPACITY))
        self.tallies = [Tally() for _ in executors]

    def execute(self, start: int, stop: int) -> None:
        """The inputs numbered from ``start`` to before ``stop``."""
        numbers = np.arange(start, start + words_for(stop - start) * LANES)
        valid = from_integers((numbers < stop).astype(np.uint8), 1)[0]
        planes = self._starts(numbers, valid)
        active = valid
        failed = np.zeros((len(self._executors), len(valid)), np.uint64)
        for _ in range(self._inputs.micro_steps):
            if not active.any():
                break
            lanes = to_mask(active)
            self.micro_steps += int(np.count_nonzero(lanes))
            self.distinct.add(self._codes(planes)[lanes])
            counts = self._planes.counts(planes)
            for row, executor in enumerate(self._executors):
                self.tallies[row] = self.tallies[row].with_margins(executor, counts, lanes)
                failed[row] |= executor.decode_planes(counts)[1] & active
            next_states = self._planes.union(counts)
            active = active & np.bitwise_or.reduce(next_states ^ planes, axis=0)
            planes = next_states
        wrong = self._wrong(planes, numbers) & to_mask(valid)
        for row, executor in enumerate(self._executors):
            failures = np.flatnonzero(to_mask(failed[row]) | wrong)
            if len(failures):
                tally = self.tallies[row]
                first = tally.first_failure or self._explain(executor, start + int(failures[0]))
                self.tallies[row] = tally + Tally(len(failures), first)

    def _starts(self, numbers: Int64[Numbers, " lanes"], valid: UInt64[Words, " words"]) -> UInt64[Words, "bits words"]:
        """Initial states, zero in lanes that are not valid; the first and the last are checked."""
        layout = self._task.layout
        planes = np.zeros((layout.bits, len(valid)), np.uint64)
        for name, values in self._inputs.fields(numbers).items():
            bits = layout[name]
            planes[bits.start : bits.stop] = from_integers(values, len(bits)) & valid
        for lane in (0, int(np.flatnonzero(to_mask(valid))[-1])):
            value = self._inputs.value(int(numbers[lane]))
            state = unpack(planes[:, lane // LANES].copy()[:, None], LANES)[lane % LANES]
            reference = self._inputs.reference(numbers[lane : lane + 1])
            if not torch.equal(state, self._start(value)) or reference != self._task.reference(value):
                raise RuntimeError(f"on arrays task {self._task.name!r} means something else for {value}")
        return planes

    def _wrong(
        self, planes: UInt64[Words, "bits words"], numbers: Int64[Numbers, " lanes"]
    ) -> Bool[NDArray[np.bool_], " lanes"]:
        """Which outputs are not the reference's."""
        layout = self._task.layout
        fields = {name: to_integers(planes[layout[name].start : layout[name].stop]).astype(np.int64) for name in layout}
        wrong: NDArray[np.bool_] = self._inputs.output(fields) != self._inputs.reference(numbers)
        return wrong

    def _start(self, value: Any) -> Bool[Tensor, " bits"]:
        return self._task.layout.pack(self._task.fields(value))

    def _explain(self, executor: NTKExecutor, number: int) -> str:
        """What goes wrong with an input that has failed."""
        value = self._inputs.value(number)
        start = self._start(value)
        where = wrong_bit(executor, self._task.templates, start, self._inputs.micro_steps)
        if where is None:
            final = executor.run(start[None], self._inputs.micro_steps).states[0]
            output = self._task.output(self._task.layout.unpack(final))
            where = f"the output is {output}, should be {self._task.reference(value)}"
        return f"input {value}, {where}"
