"""Exact execution by the NTK mean, checked on every input of a task or on random programs (docs/theory.md, section 7).

`validate_task` runs any task, `validate_programs` random programs of the one-instruction computer; both tally how each
decoder does.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int, UInt64
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.tasks import SBN, MachineState, Task, TaskError
from ntk_ensembles.tasks.base import AllNumbers, user_code
from ntk_ensembles.tasks.evaluation import describe_fault, is_right, num_micro_steps
from ntk_ensembles.templates import TemplateSet
from ntk_ensembles.templates.matching import (
    LANES,
    Planes,
    columns_for,
    from_integers,
    pack,
    to_integers,
    to_mask,
    unpack,
)
from ntk_ensembles.theory.decoding import TIE
from ntk_ensembles.theory.executor import NTKExecutor, rollout

_INSTRUCTIONS_FROM_ONE_MEMORY = 64
"""Number of instructions after which a program that has not halted is in a loop, more often than not."""

CAPACITY = 1 << 28
"""Largest number of codes kept by default: 2 GiB of them."""

_BLOCK = 1 << 20
_CODE_BITS = 64
# Any odd number spreads the low digits of a product over its high ones; this is 2^64 over the golden ratio.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


class StateCodes:
    """A 64-bit code for every state of m bits.

    Up to 64 bits a code is the state itself. Each further bit flips a random half of the code's bits: two different
    states that agree in all further bits have different codes, any others have equal ones with a chance of 2^-64 over
    the draw. Among n states a pair is confused with a chance below n²/2^65: 3e-4 for 1e8 states.

    Args:
        bits: Number of bits m.
    """

    def __init__(self, bits: int) -> None:
        further = max(bits - _CODE_BITS, 0)
        flips = np.random.default_rng(0).random((_CODE_BITS, further)) < 0.5
        self._sources = [np.flatnonzero(row) + _CODE_BITS for row in flips]

    def __call__(self, planes: UInt64[Planes, "bits columns"]) -> UInt64[NDArray[np.uint64], " lanes"]:
        """Return the code of the state in every lane."""
        digits = planes[:_CODE_BITS]
        if len(planes) > _CODE_BITS:
            digits = digits.copy()
            for digit, sources in zip(digits, self._sources, strict=True):
                digit ^= np.bitwise_xor.reduce(planes[sources], axis=0)
        return to_integers(digits).astype(np.uint64, copy=False)


class DistinctCount:
    """Count of different codes, in bounded memory.

    Codes are kept in one array that is sorted in place. When different ones fill more than half of it, only half of all
    codes, chosen by value, are kept from then on, later a quarter, and so on. The count is then an estimate with a
    relative standard error of at most 2/√capacity.

    Args:
        capacity: Largest number of codes kept, of eight bytes each, at least 2; memory is taken as it fills.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._codes = np.empty(capacity, np.uint64)
        self._used = 0
        self._halvings = 0

    def add(self, codes: UInt64[NDArray[np.uint64], " codes"]) -> None:
        """Add codes, repeated or not."""
        half = len(self._codes) // 2
        for start in range(0, len(codes), half):
            kept = self._kept(codes[start : start + half])
            if self._used + len(kept) > len(self._codes):
                self._compact()
                while self._used > half:
                    self._halvings += 1
                    self._compact()
                kept = self._kept(kept)
            self._codes[self._used : self._used + len(kept)] = kept
            self._used += len(kept)

    def result(self) -> tuple[int, bool]:
        """Return the number of different codes, and whether it is exact."""
        self._compact()
        return self._used << self._halvings, self._halvings == 0

    def _kept(self, codes: UInt64[NDArray[np.uint64], " codes"]) -> UInt64[NDArray[np.uint64], " _kept"]:
        if not self._halvings:
            return codes
        kept: NDArray[np.uint64] = codes[codes * _SPREAD >> np.uint64(_CODE_BITS - self._halvings) == 0]
        return kept

    def _compact(self) -> None:
        """Sort, and drop repetitions and codes that are not kept, in blocks so that nothing is copied as a whole."""
        codes = self._codes[: self._used]
        codes.sort()
        self._used = 0
        last: np.uint64 | None = None
        for start in range(0, len(codes), _BLOCK):
            block = codes[start : start + _BLOCK]
            first = np.ones(len(block), np.bool_)
            first[1:] = block[1:] != block[:-1]
            first[0] = last is None or block[0] != last
            last = block[-1]
            fresh = self._kept(block[first])
            codes[self._used : self._used + len(fresh)] = fresh
            self._used += len(fresh)


@dataclass(frozen=True)
class Tally:
    """Counts over trajectories or instructions; a tally and a later one add up.

    Attributes:
        failures: Number of those with a decoded bit that is not the template machine's, or with a wrong result.
        first_failure: What went wrong where, in the first of them.
        smallest_one: Smallest margin of a bit that the template machine sets; ∞ if it never sets one.
        smallest_zero: Smallest margin of a bit that it does not set.
        ties: Number of states, repeated or not, with a margin of `TIE` or less: right in the limit only.
    """

    failures: int = 0
    first_failure: str | None = None
    smallest_one: float = math.inf
    smallest_zero: float = math.inf
    ties: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.failures + other.failures,
            self.first_failure or other.first_failure,
            min(self.smallest_one, other.smallest_one),
            min(self.smallest_zero, other.smallest_zero),
            self.ties + other.ties,
        )

    def with_margins(
        self, ones: Float64[NDArray[np.float64], " lanes"], zeros: Float64[NDArray[np.float64], " lanes"]
    ) -> Tally:
        """Return this tally with a micro-step's smallest margins of 1-bits and of 0-bits added."""
        return replace(
            self,
            smallest_one=min(self.smallest_one, float(ones.min(initial=math.inf))),
            smallest_zero=min(self.smallest_zero, float(zeros.min(initial=math.inf))),
            ties=self.ties + int(np.count_nonzero(np.abs(np.minimum(ones, zeros)) <= TIE)),
        )


@dataclass(frozen=True)
class TaskReport:
    """What came of a task's inputs.

    Attributes:
        inputs: Number of inputs.
        micro_steps: Number of states predicted, repeated or not: those of each trajectory up to its fixed point, which
            is predicted once.
        distinct_states: Number of different ones among them.
        distinct_exact: Whether that is exact (but for confused codes, see `StateCodes`) or an estimate.
        predictions: Number of means compared with a threshold, distinct states times bits; each was found as a number
            by its s, F_j and C_j.
        tallies: Counts for each decoder; a failure is an input.
        seconds: Wall time.
    """

    inputs: int
    micro_steps: int
    distinct_states: int
    distinct_exact: bool
    predictions: int
    tallies: tuple[Tally, ...]
    seconds: float


@dataclass(frozen=True)
class ProgramReport:
    """What came of random programs.

    Attributes:
        instructions: Number of instructions executed and compared with the interpreter; at least as many as asked for.
        memories: Number of random memories they started from.
        halted: Number of these that halted; each halted state was seen to stay for another w + 3 micro-steps.
        micro_steps: Number of states predicted, those of halted computers included.
        tallies: Counts for each decoder; a failure is an instruction.
        seconds: Wall time.
    """

    instructions: int
    memories: int
    halted: int
    micro_steps: int
    tallies: tuple[Tally, ...]
    seconds: float


@dataclass(frozen=True)
class _CheckedBatch:
    """States on bit planes with what is known of their trajectories.

    Attributes:
        planes: One row for each bit.
        active: Lanes that are checked.
        failed: For each decoder the lanes in which it was wrong once.
    """

    planes: UInt64[Planes, "bits columns"]
    active: UInt64[Planes, " columns"]
    failed: UInt64[Planes, "decoders columns"]


class _Checker:
    """The template machine with several decoders beside it: counts where they differ.

    As long as a decoder is right, its state is the template machine's. So the template machine's states are fed back
    for all decoders, and a trajectory on which a decoder was wrong once is its failure.

    Args:
        executors: Decoders, of the same templates.
        distinct: Counter of the states met; None if they are not to be counted.
        until_rest: Whether to check a lane only up to its fixed point.
    """

    def __init__(self, executors: Sequence[NTKExecutor], distinct: DistinctCount | None, until_rest: bool) -> None:
        self._executors = executors
        self._matcher = executors[0].matcher
        self._distinct = distinct
        self._until_rest = until_rest
        self._codes = StateCodes(executors[0].bits)
        self.states_at_once = executors[0].states_at_once
        self.tallies = [Tally() for _ in executors]
        self.micro_steps = 0

    def batch(self, planes: UInt64[Planes, "bits columns"], count: int) -> _CheckedBatch:
        """Return the first ``count`` lanes of planes as a batch."""
        lanes = np.arange(planes.shape[1] * LANES) < count
        active = from_integers(lanes.astype(np.uint8), 1)[0]
        return _CheckedBatch(planes, active, np.zeros((len(self._executors), len(active)), np.uint64))

    def run(self, batch: _CheckedBatch, micro_steps: int) -> _CheckedBatch:
        """Make micro-steps as long as a lane is checked, and return where they end."""
        for _ in range(micro_steps):
            if not batch.active.any():
                break
            batch = self._step(batch)
        return batch

    def _step(self, batch: _CheckedBatch) -> _CheckedBatch:
        """Make one micro-step of the template machine and compare every decoder with it."""
        lanes = to_mask(batch.active)
        self.micro_steps += int(np.count_nonzero(lanes))
        if self._distinct is not None:
            self._distinct.add(self._codes(batch.planes)[lanes])
        counts = self._matcher.match_and_count(batch.planes)
        failed = batch.failed.copy()
        for row, executor in enumerate(self._executors):
            ones, zeros = (executor.plane_margins(counts, ones=kind) for kind in (True, False))
            self.tallies[row] = self.tallies[row].with_margins(ones[lanes], zeros[lanes])
            failed[row] |= executor.decode_planes(counts)[1] & batch.active
        planes = self._matcher.union(counts)
        moved = np.bitwise_or.reduce(planes ^ batch.planes, axis=0)
        return _CheckedBatch(planes, batch.active & moved if self._until_rest else batch.active, failed)

    def fail(self, failed: Sequence[Int[NDArray[np.intp], " _"]], explain: Callable[[NTKExecutor, int], str]) -> None:
        """Count failures, and explain the first of each decoder.

        Args:
            failed: For each decoder the positions of the inputs or computers that failed, in ascending order.
            explain: Function that describes how a decoder failed at a position.
        """
        for row, (executor, positions) in enumerate(zip(self._executors, failed, strict=True)):
            if len(positions):
                first = self.tallies[row].first_failure or explain(executor, int(positions[0]))
                self.tallies[row] += Tally(len(positions), first)


def validate_task(
    task: Task[Any, Any],
    executors: Sequence[NTKExecutor],
    *,
    inputs: Iterable[Any],
    on_progress: Callable[[int], None] = lambda inputs: None,
) -> TaskReport:
    """Execute inputs of a task by the NTK mean, and compare every decoded state and every output.

    Each decoded state is compared with the template machine's. The output, read at a fixed point or after the task's
    micro-steps, is compared with the reference.

    Args:
        task: Task to validate.
        executors: Decoders, of the task's templates.
        inputs: Inputs, such as `Task.all_inputs`; ``len`` of them, if they have one, sizes the count of states.
        on_progress: Callback that receives the number of inputs finished since its last call.

    Raises:
        TaskError: The task's code fails, or does not mean the same on arrays and on integers.
    """
    started_at = time.monotonic()
    expected = operator.length_hint(inputs)
    limit = max((num_micro_steps(task, first) for first in itertools.islice(inputs, 1)), default=0) if expected else 0
    distinct = DistinctCount(min(expected * limit + 2, CAPACITY) if expected else CAPACITY)
    checker = _Checker(executors, distinct, until_rest=True)
    seen = 0
    for chunk in _chunks(inputs, checker.states_at_once):
        (_check_arrays if task.takes_arrays else _check_integers)(task, checker, chunk)
        seen += len(chunk)
        on_progress(len(chunk))
    states, exact = distinct.result()
    bits = task.layout.bits
    elapsed = time.monotonic() - started_at
    return TaskReport(seen, checker.micro_steps, states, exact, states * bits, tuple(checker.tallies), elapsed)


def _chunks(inputs: Iterable[Any], size: int) -> Iterator[Sequence[Any]]:
    if isinstance(inputs, Sequence):
        yield from (inputs[start : start + size] for start in range(0, len(inputs), size))
        return
    iterator = iter(inputs)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


_Start: TypeAlias = Callable[[NDArray[np.intp]], NDArray[np.uint64]]
"""Function from rows of inputs to their initial states on bit planes."""
_Wrong: TypeAlias = Callable[[NDArray[np.uint64], NDArray[np.intp]], NDArray[np.bool_]]
"""Function from final states on bit planes, and their rows, to whether each output is wrong."""


def _check_integers(task: Task[Any, Any], checker: _Checker, inputs: Sequence[Any]) -> None:
    """Check inputs one by one in plain integers."""
    limits = np.array([num_micro_steps(task, task_input) for task_input in inputs])

    def start(rows: NDArray[np.intp]) -> UInt64[Planes, "bits columns"]:
        return pack(torch.stack([task.initial_state(inputs[row]) for row in rows]))

    def wrong(planes: UInt64[Planes, "bits columns"], rows: NDArray[np.intp]) -> Bool[NDArray[np.bool_], " rows"]:
        finals = unpack(planes, len(rows))
        return np.array([not is_right(task, inputs[row], final) for row, final in zip(rows, finals, strict=True)])

    _check_groups(task, checker, inputs, limits, start, wrong)


def _check_arrays(task: Task[Any, Any], checker: _Checker, inputs: Sequence[Any]) -> None:
    """Check inputs together, by the task's methods on arrays."""
    with user_code(task.name, "one of its methods on arrays"):
        whole = inputs.arrays() if isinstance(inputs, AllNumbers) else _columns(inputs)
        limits = np.broadcast_to(task.num_micro_steps(whole), len(inputs))
        _check_groups(task, checker, inputs, limits, *_array_forms(task, inputs, whole))


def _columns(inputs: Sequence[Any]) -> Any:
    """Return inputs with an array in place of every integer."""
    if isinstance(inputs[0], tuple):
        return tuple(np.array(column, np.int64) for column in zip(*inputs, strict=True))
    return np.array(inputs, np.int64)


def _array_forms(task: Task[Any, Any], inputs: Sequence[Any], whole: Any) -> tuple[_Start, _Wrong]:
    """Return initial states and wrong outputs as functions of rows, by the task's methods on arrays."""
    layout = task.layout

    def arrays(rows: NDArray[np.intp]) -> Any:
        if len(rows) == len(inputs):
            return whole
        return tuple(column[rows] for column in whole) if isinstance(whole, tuple) else whole[rows]

    def start(rows: NDArray[np.intp]) -> UInt64[Planes, "bits columns"]:
        lanes = columns_for(len(rows)) * LANES
        planes = np.zeros((layout.bits, lanes // LANES), np.uint64)
        padded = np.zeros(lanes, np.int64)
        for name, values in task.initial_fields(arrays(rows)).items():
            padded[: len(rows)] = values
            planes[layout[name].start : layout[name].stop] = from_integers(padded, len(layout[name]))
        for lane in (0, len(rows) - 1):
            state = unpack(planes[:, lane // LANES, None].copy(), LANES)[lane % LANES]
            if not torch.equal(state, task.initial_state(inputs[rows[lane]])):
                raise _disagreement(task, "initial_fields", inputs[rows[lane]])
        return planes

    def wrong(planes: UInt64[Planes, "bits columns"], rows: NDArray[np.intp]) -> Bool[NDArray[np.bool_], " rows"]:
        fields = {
            name: to_integers(planes[layout[name].start : layout[name].stop])[: len(rows)].astype(np.int64)
            for name in layout
        }
        outputs, expected = task.read_output(fields), np.broadcast_to(task.reference(arrays(rows)), len(rows))
        for position in (0, -1):
            if expected[position] != task.reference(inputs[rows[position]]):
                raise _disagreement(task, "reference", inputs[rows[position]])
        differs: NDArray[np.bool_] = np.broadcast_to(outputs != expected, len(rows))
        return differs

    return start, wrong


def _disagreement(task: Task[Any, Any], method: str, task_input: Any) -> TaskError:
    return TaskError(
        f"task {task.name!r}: {method} on arrays disagrees with {method} on integers for input {task_input!r}"
    )


def _check_groups(
    task: Task[Any, Any],
    checker: _Checker,
    inputs: Sequence[Any],
    limits: NDArray[Any],
    start: _Start,
    wrong: _Wrong,
) -> None:
    """Run the inputs that take equally many micro-steps together, and count failures."""
    failed: list[list[NDArray[np.intp]]] = [[] for _ in checker.tallies]
    for limit in [int(limits[0])] if (limits == limits[0]).all() else np.unique(limits).tolist():
        rows = np.flatnonzero(limits == limit)
        batch = checker.run(checker.batch(start(rows), len(rows)), limit)
        output_wrong = wrong(batch.planes, rows)
        for row, lanes in enumerate(batch.failed):
            failed[row].append(rows[to_mask(lanes)[: len(rows)] | output_wrong])

    def explain(executor: NTKExecutor, position: int) -> str:
        task_input = inputs[position]
        at = _wrong_bit(executor, task.templates, task.initial_state(task_input), int(limits[position]))
        return f"input {task_input}, {at or describe_fault(task, task_input)}"

    checker.fail([np.sort(np.concatenate(positions)) for positions in failed], explain)


def validate_programs(
    task: SBN,
    executors: Sequence[NTKExecutor],
    instructions: int,
    seed: int,
    *,
    on_progress: Callable[[int], None] = lambda instructions: None,
) -> ProgramReport:
    """Execute random memories from random pcs by the NTK mean, and compare every bit after every instruction.

    Many computers run side by side. After each instruction every bit of their states is compared with the interpreter's
    state; a computer that has halted, gone wrong or executed `_INSTRUCTIONS_FROM_ONE_MEMORY` instructions gets a new
    memory.

    Args:
        task: Computer; its own ``instructions`` are not used.
        executors: Decoders, of the task's templates.
        instructions: Least number of instructions to execute, halted computers not counted.
        seed: Seed of memories and pcs.
        on_progress: Callback that receives the number of instructions executed since its last call.
    """
    started_at = time.monotonic()
    checker = _Checker(executors, None, until_rest=False)
    machine, generator = task.machine, random.Random(seed)
    computers = min(checker.states_at_once, -(-instructions // _INSTRUCTIONS_FROM_ONE_MEMORY))
    states = [machine.random_state(generator) for _ in range(computers)]
    ages = [0] * computers
    executed, memories, halted = 0, computers, 0
    while executed < instructions:
        batch = checker.run(checker.batch(pack(task.pack(states)), computers), task.micro_steps_per_instruction)
        next_states = [machine.step(state) for state in states]
        wrong = np.bitwise_or.reduce(batch.planes ^ pack(task.pack(next_states)), axis=0)
        checker.fail(
            [np.flatnonzero(to_mask(lanes | wrong)) for lanes in batch.failed],
            lambda executor, computer: _explain_instruction(task, executor, states[computer]),  # noqa: B023
        )
        failed = to_mask(np.bitwise_or.reduce(batch.failed, axis=0) | wrong)
        before = executed
        for computer, (state, after) in enumerate(zip(states, next_states, strict=True)):
            executed += not state.halted
            halted += after.halted and not state.halted
            ages[computer] += 1
            # One that halts now is watched for the time of another instruction.
            if state.halted or failed[computer] or ages[computer] == _INSTRUCTIONS_FROM_ONE_MEMORY:
                next_states[computer] = machine.random_state(generator)
                memories += 1
                ages[computer] = 0
        states = next_states
        on_progress(executed - before)
    return ProgramReport(
        executed, memories, halted, checker.micro_steps, tuple(checker.tallies), time.monotonic() - started_at
    )


def _explain_instruction(task: SBN, executor: NTKExecutor, state: MachineState) -> str:
    """Return how an instruction has failed."""
    start, expected = task.pack([state, task.machine.step(state)])
    at = _wrong_bit(executor, task.templates, start, task.micro_steps_per_instruction)
    if at is None:
        final = rollout(executor, start[None], task.micro_steps_per_instruction).states[0]
        bit = int((final != expected).nonzero()[0])
        at = f"after it bit {task.layout.bit_name(bit)} is {int(final[bit])}, should be {int(expected[bit])}"
    words = " ".join(map(str, state.memory))
    return f"instruction at pc {state.pc}{' (halted)' if state.halted else ''} of memory {words}, {at}"


def _wrong_bit(
    executor: NTKExecutor, templates: TemplateSet, start: Bool[Tensor, " bits"], micro_steps: int
) -> str | None:
    """Return where the closed loop from a state first leaves the template machine; None if it does not."""
    trace = rollout(executor, start[None], micro_steps, trace=True).trace
    assert trace is not None
    wrong = (~trace.agreed[:, 0]).nonzero()
    if not len(wrong):
        return None
    moment = int(wrong[0])
    decoded, expected = trace.states[moment + 1, 0], templates.micro_step(trace.states[moment])[0]
    bit = int((decoded != expected).nonzero()[0])
    return (
        f"micro-step {moment + 1}: bit {templates.layout.bit_name(bit)} is decoded {int(decoded[bit])}, "
        f"should be {int(expected[bit])}"
    )
