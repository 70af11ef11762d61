"""The closed loop: predict, decode, compare with the template machine, feed back (docs/theory.md, sections 5 and 7).

`rollout` is the loop. Whatever predicts next states takes part in it as a `Stepper`, with batches in a form of its
own: `NTKExecutor`, the mean of the infinitely wide ensemble; a loaded ensemble of trained members.

A prediction of the limit depends on a state and a bit only through s, C_j and F_j. So the mean, the threshold, the
decoded bit and its margin are computed once for every s, C_j and F_j that can occur, whatever the decoder; for a state
they are looked up. Large batches are counted and looked up on bit planes (`BitPlaneMatcher`), a handful of states by
lists of positions (`SparseMatcher`).
"""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int, UInt64
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.templates import BitPlaneMatcher, SparseMatcher, TemplateSet
from ntk_ensembles.templates.matching import (
    LANES,
    BitGroup,
    PlaneCounts,
    Planes,
    above_zero,
    equal,
    pack,
    to_mask,
    unpack,
)
from ntk_ensembles.theory.decoding import Decoder, decode_mean, margin_table
from ntk_ensembles.theory.kernels import Layers
from ntk_ensembles.theory.predictor import Gaussian, TemplatePredictor

_FEW = 16
"""Largest batch stepped with `SparseMatcher`. Bit planes cost the same for 1 state as for 64, lists cost per state, so
lists win for a handful."""

_DECIMALS = 12
"""Margins that agree to 12 decimals count as one where they are looked up, the smallest of them."""

BatchT = TypeVar("BatchT")
Stop: TypeAlias = Callable[[Bool[Tensor, "states bits"], Bool[Tensor, "states bits"]], bool]
"""Whether a loop ends, from all states before and after a micro-step."""


@dataclass(frozen=True)
class Step(Generic[BatchT]):
    """One micro-step of a batch in its stepper's own form.

    Attributes:
        batch: Next states, decoded from the prediction.
        margins: Smallest margin of each state over its bits, negative on the wrong side; ∞ where no template matches
            (s = 0): the network is exactly 0 there.
        agreed: Whether all decoded bits of each state are those of the template machine.
        moved: Whether each next state differs from the state.
    """

    batch: BatchT
    margins: Float64[NDArray[np.float64], " states"]
    agreed: Bool[NDArray[np.bool_], " states"]
    moved: Bool[NDArray[np.bool_], " states"]


@runtime_checkable
class Stepper(Protocol[BatchT]):
    """Whatever predicts and decodes the next states of a batch, in a form of its own."""

    @property
    def states_at_once(self) -> int:
        """Largest number of states that are best put into one batch."""
        ...

    def to_batch(self, states: Bool[Tensor, "states bits"]) -> BatchT:
        """Return states as a batch.

        Raises:
            ValueError: States have another number of bits.
        """
        ...

    def step(self, batch: BatchT) -> Step[BatchT]:
        """Predict, decode and compare one micro-step of every state."""
        ...

    def to_states(self, batch: BatchT) -> Bool[Tensor, "states bits"]:
        """Return the states of a batch."""
        ...

    def select(self, batch: BatchT, moved: Bool[NDArray[np.bool_], " states"]) -> BatchT | None:
        """Return the batch of these states alone; None if the others may as well stay in it."""
        ...


class TensorStepper(ABC):
    """Base class of steppers that work on boolean tensors: only `step` is left to write."""

    states_at_once = 1 << 16

    def to_batch(self, states: Bool[Tensor, "states bits"]) -> Bool[Tensor, "states bits"]:
        """Return the states themselves."""
        return states

    @abstractmethod
    def step(self, batch: Bool[Tensor, "states bits"]) -> Step[Bool[Tensor, "states bits"]]:
        """Predict, decode and compare one micro-step of every state."""

    def to_states(self, batch: Bool[Tensor, "states bits"]) -> Bool[Tensor, "states bits"]:
        """Return the batch itself."""
        return batch

    def select(
        self, batch: Bool[Tensor, "states bits"], moved: Bool[NDArray[np.bool_], " states"]
    ) -> Bool[Tensor, "_ bits"]:
        """Return these states alone."""
        return batch[torch.from_numpy(moved)]


def decoded_step(
    states: Bool[Tensor, "states bits"],
    mean: Float64[Tensor, "states bits"],
    decoder: Decoder,
    predictor: TemplatePredictor,
    num_matches: Int[Tensor, " states"],
    set_counts: Int[Tensor, "states bits"],
) -> Step[Bool[Tensor, "states bits"]]:
    """Decode an ensemble's mean, compare it with the template machine, and return the step; for `TensorStepper.step`.

    Args:
        states: States that were predicted from.
        mean: Mean output of the ensemble.
        decoder: One of `DECODERS`.
        predictor: Theory of the ensemble, for the thresholds.
        num_matches: Number of templates s that match each state.
        set_counts: Number C_j of these that set bit j.
    """
    true = set_counts > 0
    decoded, margins = decode_mean(mean, decoder, predictor, num_matches, true)
    smallest = margins.min(1).values.masked_fill(num_matches == 0, torch.inf)
    return Step(decoded, smallest.numpy(), (decoded == true).all(1).numpy(), (decoded != states).any(1).numpy())


@dataclass(frozen=True)
class Trace:
    """Every micro-step of a rollout.

    Attributes:
        states: States before the first micro-step and after each.
        margins: Smallest margin of each state in each micro-step; ∞ where no template matches.
        agreed: Whether each was the template machine's.
    """

    states: Bool[Tensor, "moments ... bits"]
    margins: Float64[Tensor, "micro_steps ..."]
    agreed: Bool[Tensor, "micro_steps ..."]


@dataclass(frozen=True)
class Rollout:
    """Several micro-steps of a batch, each decoded state fed back.

    Attributes:
        states: Final states.
        margins: Each state's smallest margin over all micro-steps.
        agreed: Whether each micro-step was that of the template machine.
        trace: Every micro-step, if it was asked for.
    """

    states: Bool[Tensor, "states bits"]
    margins: Float64[Tensor, " states"]
    agreed: Bool[Tensor, " states"]
    trace: Trace | None = None


def rollout(
    stepper: Stepper[Any],
    states: Bool[Tensor, "states bits"],
    micro_steps: int,
    *,
    trace: bool = False,
    stop: Stop | None = None,
) -> Rollout:
    """Run a closed loop: each decoded state is the next state, and nothing corrects it.

    A state that a micro-step does not change is at rest and need not be predicted again. Without a trace, memory does
    not grow with the number of micro-steps.

    Args:
        stepper: What predicts.
        states: States to start from.
        micro_steps: Number of micro-steps, at least 0.
        trace: Whether to keep every micro-step. All of them are made then, of states at rest too.
        stop: When to end, asked of all states together; single states at rest then stay in the loop.

    Raises:
        ValueError: States have another number of bits, or ``micro_steps`` is negative.
    """
    if micro_steps < 0:
        raise ValueError(f"{micro_steps} micro-steps: expected at least 0")
    together = max(len(states), 1) if stop else stepper.states_at_once
    chunks = [_roll_chunk(stepper, chunk, micro_steps, trace, stop) for chunk in torch.split(states, together)]
    if len(chunks) == 1:
        return chunks[0]
    traces = [chunk.trace for chunk in chunks if chunk.trace is not None]
    return Rollout(
        torch.cat([chunk.states for chunk in chunks]),
        torch.cat([chunk.margins for chunk in chunks]),
        torch.cat([chunk.agreed for chunk in chunks]),
        Trace(
            torch.cat([part.states for part in traces], 1),
            torch.cat([part.margins for part in traces], 1),
            torch.cat([part.agreed for part in traces], 1),
        )
        if traces
        else None,
    )


def _roll_chunk(
    stepper: Stepper[Any], states: Bool[Tensor, "states bits"], micro_steps: int, trace: bool, stop: Stop | None
) -> Rollout:
    margins, agreed = np.full(len(states), np.inf), np.ones(len(states), np.bool_)
    finals: NDArray[np.bool_] | None = None
    steps: list[Step[Any]] = []
    # States that are still in the batch: all, until those at rest are taken out.
    rows: NDArray[np.intp] | slice = slice(None)
    batch = stepper.to_batch(states)
    for _ in range(micro_steps):
        step = stepper.step(batch)
        margins[rows] = np.minimum(margins[rows], step.margins)
        agreed[rows] &= step.agreed
        before, batch = batch, step.batch
        if trace:
            steps.append(step)
        if stop is not None:
            if stop(stepper.to_states(before), stepper.to_states(batch)):
                break
        elif not trace and not step.moved.all():
            if not step.moved.any():
                break
            moving = stepper.select(batch, step.moved)
            if moving is not None:
                finals = np.empty(states.shape, np.bool_) if finals is None else finals
                finals[rows] = stepper.to_states(batch).numpy()
                rows = np.arange(len(states))[rows][step.moved]
                batch = moving
    last = stepper.to_states(batch)
    if finals is not None:
        finals[rows] = last.numpy()
        last = torch.from_numpy(finals)
    return Rollout(
        last,
        torch.from_numpy(margins),
        torch.from_numpy(agreed),
        _joined(stepper, states, steps) if trace else None,
    )


def _joined(stepper: Stepper[Any], states: Bool[Tensor, "states bits"], steps: Sequence[Step[Any]]) -> Trace:
    none = np.empty((0, len(states)))
    return Trace(
        torch.stack([states, *(stepper.to_states(step.batch) for step in steps)]),
        torch.from_numpy(np.concatenate([none, *(step.margins[None] for step in steps)])),
        torch.from_numpy(np.concatenate([none.astype(np.bool_), *(step.agreed[None] for step in steps)])),
    )


@dataclass(frozen=True)
class PlaneBatch:
    """States on bit planes.

    Attributes:
        planes: One row for each bit.
        count: Number of states; further lanes are ignored.
    """

    planes: UInt64[Planes, "bits columns"]
    count: int


NTKBatch: TypeAlias = PlaneBatch | NDArray[np.bool_]


class NTKExecutor:
    """The template machine executed by the infinitely wide ensemble's mean and a decoder: a `Stepper`.

    Args:
        templates: Templates of the task.
        decoder: One of `DECODERS`.
        padding: Number of padding templates, as in `TemplatePredictor`.
        layers: Which layers are trained, as in `TemplatePredictor`.

    Attributes:
        bits: Number of bits of a state.
        matcher: The templates on bit planes.
        states_at_once: Number of states that fill a best-sized batch of planes.

    Raises:
        ValueError: The decoder or ``layers`` is unknown, or the padding outside its range.
    """

    def __init__(
        self, templates: TemplateSet, decoder: Decoder = "midpoint", *, padding: int = 0, layers: Layers = "both"
    ) -> None:
        self.bits = templates.layout.bits
        self.matcher = BitPlaneMatcher(templates)
        self._sparse = SparseMatcher(templates)
        self._table = _DecodingTable(TemplatePredictor(templates, padding, layers=layers), decoder, self.matcher)
        self._lookups: dict[bool | None, _MarginLookup] = {}
        self.states_at_once = self.matcher.columns * LANES

    def predict(self, states: Bool[Tensor, "states bits"]) -> Gaussian:
        """Return mean and variance of one member's outputs at every state, as `TemplatePredictor.predict`, looked up.

        Raises:
            ValueError: States have another number of bits.
        """
        self._check(states)
        if len(states) <= _FEW:
            num_matches, set_counts = self._sparse.match_and_count(states.numpy())
            mean = self._table.means[num_matches[:, None], self._table.bit_column + set_counts]
            return Gaussian(torch.from_numpy(mean), torch.from_numpy(self._table.variances[num_matches]))
        mean, variance = np.empty((self.bits, len(states))), np.empty(len(states))
        for start in range(0, len(states), self.states_at_once):
            lanes = slice(start, min(start + self.states_at_once, len(states)))
            self._predict_planes(states[lanes], mean[:, lanes], variance[lanes])
        return Gaussian(torch.from_numpy(mean).T, torch.from_numpy(variance))

    def to_batch(self, states: Bool[Tensor, "states bits"]) -> NTKBatch:
        """Return states on bit planes, or as they are if they are few.

        Raises:
            ValueError: States have another number of bits.
        """
        self._check(states)
        return states.numpy() if len(states) <= _FEW else PlaneBatch(pack(states), len(states))

    def step(self, batch: NTKBatch) -> Step[NTKBatch]:
        """Look up one micro-step of every state."""
        return self._step_planes(batch) if isinstance(batch, PlaneBatch) else self._step_few(batch)

    def to_states(self, batch: NTKBatch) -> Bool[Tensor, "states bits"]:
        """Return the states of a batch."""
        return unpack(batch.planes, batch.count) if isinstance(batch, PlaneBatch) else torch.from_numpy(batch)

    def select(self, batch: NTKBatch, moved: Bool[NDArray[np.bool_], " states"]) -> None:
        """Leave resting states in the batch: on planes they cost nothing, and a few cost less than their removal."""

    def _step_few(self, states: Bool[NDArray[np.bool_], "states bits"]) -> Step[NTKBatch]:
        num_matches, set_counts = self._sparse.match_and_count(states)
        cells = num_matches[:, None], self._table.bit_column + set_counts
        next_states = self._table.decoded[cells]
        return Step(
            next_states,
            self._table.margins[cells].min(1),
            (next_states == (set_counts > 0)).all(1),
            (next_states != states).any(1),
        )

    def _step_planes(self, batch: PlaneBatch) -> Step[NTKBatch]:
        counts = self.matcher.match_and_count(batch.planes)
        planes, wrong = self.decode_planes(counts)
        moved = np.bitwise_or.reduce(planes ^ batch.planes, axis=0)
        return Step(
            PlaneBatch(planes, batch.count),
            self.plane_margins(counts)[: batch.count],
            to_mask(~wrong)[: batch.count],
            to_mask(moved)[: batch.count],
        )

    def decode_planes(self, counts: PlaneCounts) -> tuple[UInt64[Planes, "bits columns"], UInt64[Planes, " columns"]]:
        """Decode the states of all lanes.

        Args:
            counts: Counts from `BitPlaneMatcher.match_and_count`, best of `BitPlaneMatcher.columns` columns at a time.

        Returns:
            The decoded next states, and the lanes in which some bit is not the template machine's.
        """
        decoded = self.matcher.union(counts)
        disagreed = np.zeros(decoded.shape[1], np.uint64)
        for group, first, digits in zip(self.matcher.groups, self._table.group_column, counts.set_counts, strict=True):
            columns = range(first, first + group.set_count_max + 1)
            if self._table.always_right(columns):
                continue
            ones = np.zeros_like(digits[0])
            for set_count, column in enumerate(columns):
                bits = self._table.decoded[:, column]
                if not bits.any():
                    continue
                present = equal(digits, set_count)
                if not bits.all():
                    present = present & np.packbits(bits[counts.matches_in_lanes], bitorder="little").view(np.uint64)
                ones |= present
            disagreed |= np.bitwise_or.reduce(decoded[group.bits] ^ ones, axis=0)
            decoded[group.bits] = ones
        return decoded, disagreed

    def plane_margins(self, counts: PlaneCounts, ones: bool | None = None) -> Float64[NDArray[np.float64], " lanes"]:
        """Return every lane's smallest margin; ∞ where no template matches.

        Args:
            counts: Counts from `BitPlaneMatcher.match_and_count`.
            ones: Only over bits that the template machine sets (True), or does not set (False).
        """
        if ones not in self._lookups:
            self._lookups[ones] = _MarginLookup(self._table, self.matcher.groups, ones)
        return self._lookups[ones](counts)

    def _check(self, states: Bool[Tensor, "states bits"]) -> None:
        if states.shape[1] != self.bits:
            raise ValueError(f"states of {states.shape[1]} bits: the templates have {self.bits}")

    def _predict_planes(
        self,
        states: Bool[Tensor, "states bits"],
        mean: Float64[NDArray[np.float64], "bits states"],
        variance: Float64[NDArray[np.float64], " states"],
    ) -> None:
        """Fill in mean and variance."""
        count = len(states)
        counts = self.matcher.match_and_count(pack(states))
        num_matches = counts.matches_in_lanes[:count]
        variance[:] = self._table.variances[num_matches]
        for group, first, digits in zip(self.matcher.groups, self._table.group_column, counts.set_counts, strict=True):
            # C_j is small, so one look-up by s for each of its values serves all bits of the group.
            values = [self._table.means[:, first + c][num_matches] for c in range(group.set_count_max + 1)]
            for row, bit in enumerate(group.bits):
                mean[bit] = values[0]
                for set_count in range(1, group.set_count_max + 1):
                    present = equal([digit[row : row + 1] for digit in digits], set_count)
                    np.copyto(mean[bit], values[set_count], where=to_mask(present[0])[:count])


class _DecodingTable:
    """What a bit is predicted and decodes to, for every s (rows) and every pair of F_j and C_j (columns).

    Attributes:
        means: Mean of the prediction.
        variances: Variance of the prediction for every s.
        decoded: Decoded bit; in rows s < C_j, which cannot be, the template machine's.
        margins: Signed distance of the mean from the threshold; ∞ for s = 0 and where s < C_j.
        group_column: Column of C_j = 0 for each group of bits; those of C_j = 1, 2, … follow.
        bit_column: The same for each bit.
    """

    def __init__(self, predictor: TemplatePredictor, decoder: Decoder, matcher: BitPlaneMatcher) -> None:
        set_count_max: dict[int, int] = {}
        for group in matcher.groups:
            set_count_max[group.fan_in] = max(group.set_count_max, set_count_max.get(group.fan_in, 0))
        columns = [(fan_in, c) for fan_in, largest in set_count_max.items() for c in range(largest + 1)]
        self.group_column = [columns.index((group.fan_in, 0)) for group in matcher.groups]
        self.bit_column = np.empty(len(predictor.fan_in), np.intp)
        for group, first in zip(matcher.groups, self.group_column, strict=True):
            self.bit_column[group.bits] = first
        fan_in, set_counts = torch.tensor(columns).T
        table = margin_table(predictor, decoder, matcher.num_matches_max, set_counts, fan_in)
        self.means: Float64[NDArray[np.float64], "s columns"] = table.means.numpy()
        self.variances = predictor.variance(torch.arange(matcher.num_matches_max + 1)).numpy()
        self.decoded: Bool[NDArray[np.bool_], "s columns"] = table.decoded.numpy()
        self.margins: Float64[NDArray[np.float64], "s columns"] = table.margins.numpy()
        self._right = (self.decoded == (set_counts > 0).numpy()).all(0)

    def always_right(self, columns: range) -> bool:
        """Return whether these columns decode to the template machine's bit for every s."""
        return bool(self._right[columns.start : columns.stop].all())


class _MarginLookup:
    """The smallest margin of every lane, over all bits or those with C_j > 0 or with C_j = 0.

    Columns of `_DecodingTable` with the same margins form a class. A lane's smallest margin depends on its s and
    on which classes its bits belong to. Some classes have a bit in every state: their smallest margins make the base.
    Of the others, only those with a smaller margin than the base somewhere are looked for.
    """

    def __init__(self, table: _DecodingTable, groups: Sequence[BitGroup], ones: bool | None) -> None:
        members: dict[bytes, list[tuple[int, int]]] = {}
        columns: dict[bytes, list[int]] = {}
        certain = set()
        for position, (group, first) in enumerate(zip(groups, table.group_column, strict=True)):
            set_counts = [c for c in range(group.set_count_max + 1) if ones is None or ones == (c > 0)]
            keys = [np.round(table.margins[:, first + c], _DECIMALS).tobytes() for c in set_counts]
            for key, set_count in zip(keys, set_counts, strict=True):
                members.setdefault(key, []).append((position, set_count))
                columns.setdefault(key, []).append(first + set_count)
            if len(set_counts) == group.set_count_max + 1 and len(set(keys)) == 1:
                certain.add(keys[0])
        margins = {key: table.margins[:, column].min(1) for key, column in columns.items()}
        self._base = np.min([np.full(len(table.margins), np.inf), *(margins[key] for key in certain)], axis=0)
        self._classes = [(members[key], margins[key]) for key in members if (margins[key] < self._base).any()]

    def __call__(self, counts: PlaneCounts) -> Float64[NDArray[np.float64], " lanes"]:
        num_matches = counts.matches_in_lanes
        smallest: NDArray[np.float64] = self._base.take(num_matches, mode="clip")
        for members, margins in self._classes:
            present = functools.reduce(operator.or_, (_any_equal(counts, *member) for member in members))
            np.minimum(smallest, margins.take(num_matches, mode="clip"), out=smallest, where=to_mask(present))
        return smallest


def _any_equal(counts: PlaneCounts, group: int, set_count: int) -> UInt64[Planes, " columns"]:
    """Return the lanes in which some bit of a group has this C_j."""
    digits = counts.set_counts[group]
    found: Planes
    if set_count == 0:
        found = ~np.bitwise_and.reduce(above_zero(digits), axis=0)
    else:
        found = np.bitwise_or.reduce(equal(digits, set_count), axis=0)
    return found
