"""The closed loop of the NTK mean: predict, decode, feed back (DESIGN §1 to §3).

A prediction depends on a state and a bit only through s, C_j and F_j. So the mean, the threshold, the decoded
bit and its margin are worked out once, as numbers, for every s, F_j and C_j that can occur; what a state decodes
to is then looked up by its s and its C_j. Nothing is assumed of the decoder.

Large batches are counted and looked up on bit planes (`TemplatePlanes`), a handful of states by lists of
positions (`TemplateLists`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, UInt64
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.tasks.lists import TemplateLists
from ntk_ensembles.tasks.planes import (
    LANES,
    BitGroup,
    PlaneCounts,
    TemplatePlanes,
    Words,
    above_zero,
    equal,
    pack,
    to_integers,
    to_mask,
    unpack,
)
from ntk_ensembles.tasks.templates import TemplateSet
from ntk_ensembles.theory.decoding import Decoder, decode, margins, thresholds
from ntk_ensembles.theory.predictor import Gaussian, TemplatePredictor

_FEW = 16
"""Up to so many states are stepped by lists; planes have a fixed cost, lists one for each state."""

_ROWS_AT_ONCE = 64
"""Thresholds come for all bits of a state; the table keeps a few of them, and is made for so many s at a time."""

_DECIMALS = 12
"""Margins that agree to so many decimals count as one where they are looked up, the smallest of them."""

_CLASSES_AT_ONCE = 8
"""A look-up table has an entry for every set of so many classes."""


@dataclass(frozen=True)
class StepResult:
    """One micro-step of a batch.

    Attributes:
        successors: the next states, decoded from the NTK mean.
        margins: each state's smallest distance from a threshold over its bits, negative on the wrong side;
            ∞ where nothing matches (s = 0): the network is exactly 0 there.
        agreed: whether all decoded bits are those of the OR-machine.
    """

    successors: Bool[Tensor, "states bits"]
    margins: Float64[Tensor, " states"]
    agreed: Bool[Tensor, " states"]


@dataclass(frozen=True)
class RunResult:
    """Several micro-steps of a batch, each decoded state fed back.

    Attributes:
        states: the final states.
        margins: each state's smallest margin over all micro-steps.
        agreed: whether each micro-step was that of the OR-machine.
    """

    states: Bool[Tensor, "states bits"]
    margins: Float64[Tensor, " states"]
    agreed: Bool[Tensor, " states"]


class NTKExecutor:
    """The OR-machine executed by the infinitely wide ensemble's mean and a decoder.

    Args:
        templates: the task's templates.
        decoder: one of `DECODERS`.
        padding: zero-label templates more, as in `TemplatePredictor`.

    Attributes:
        planes: the templates on bit planes.

    Raises:
        ValueError: an unknown decoder or a negative padding.
    """

    def __init__(self, templates: TemplateSet, decoder: Decoder = "midpoint", *, padding: int = 0) -> None:
        self._bits = templates.layout.bits
        self.planes = TemplatePlanes(templates)
        self._lists = TemplateLists(templates)
        self._outcomes = _Outcomes(TemplatePredictor(templates, padding), decoder, self.planes)
        self._lookups: dict[bool | None, _MarginLookup] = {}
        self._lanes = self.planes.words * LANES

    def predict(self, states: Bool[Tensor, "states bits"]) -> Gaussian:
        """Mean and variance of one member's outputs at every state, as `TemplatePredictor.predict`, looked up.

        Raises:
            ValueError: states of another number of bits.
        """
        self._check(states)
        if len(states) <= _FEW:
            matched, setting = self._lists.counts(states.numpy())
            mean = self._outcomes.means[matched[:, None], self._outcomes.of_bit + setting]
            return Gaussian(torch.from_numpy(mean), torch.from_numpy(self._outcomes.variances[matched]))
        mean, variance = np.empty((self._bits, len(states))), np.empty(len(states))
        for start in range(0, len(states), self._lanes):
            lanes = slice(start, min(start + self._lanes, len(states)))
            self._predict_planes(states[lanes], mean[:, lanes], variance[lanes])
        return Gaussian(torch.from_numpy(mean).T, torch.from_numpy(variance))

    def step(self, states: Bool[Tensor, "states bits"]) -> StepResult:
        """One micro-step of every state.

        Raises:
            ValueError: states of another number of bits.
        """
        result = self.run(states, 1)
        return StepResult(result.states, result.margins, result.agreed)

    def run(self, states: Bool[Tensor, "states bits"], micro_steps: int) -> RunResult:
        """A closed loop of so many micro-steps.

        Memory grows with the number of states and not with the number of micro-steps.

        Raises:
            ValueError: states of another number of bits, or a negative number of micro-steps.
        """
        self._check(states)
        if micro_steps < 0:
            raise ValueError(f"{micro_steps} micro-steps: expected at least 0")
        if len(states) <= _FEW:
            return self._run_few(states, micro_steps)
        results = [
            self._run_planes(states[start : start + self._lanes], micro_steps)
            for start in range(0, len(states), self._lanes)
        ]
        return RunResult(
            torch.cat([result.states for result in results]),
            torch.cat([result.margins for result in results]),
            torch.cat([result.agreed for result in results]),
        )

    def decode_planes(self, counts: PlaneCounts) -> tuple[UInt64[Words, "bits words"], UInt64[Words, " words"]]:
        """What the states of all lanes decode to.

        Args:
            counts: from `TemplatePlanes.counts`, best of `TemplatePlanes.words` words at a time.

        Returns:
            The decoded next states, and the lanes in which some bit is not the OR-machine's.
        """
        decoded = self.planes.union(counts)
        disagreed = np.zeros(decoded.shape[1], np.uint64)
        matched = functools.cache(lambda: to_integers(counts.matched))
        for group, first, digits in zip(self.planes.groups, self._outcomes.first, counts.setting, strict=True):
            columns = range(first, first + group.setting_max + 1)
            if self._outcomes.always_right(columns):
                continue
            ones = np.zeros_like(digits[0])
            for setting, column in enumerate(columns):
                outcomes = self._outcomes.decoded[:, column]
                if not outcomes.any():
                    continue
                present = equal(digits, setting)
                if not outcomes.all():
                    present = present & np.packbits(outcomes[matched()], bitorder="little").view(np.uint64)
                ones |= present
            disagreed |= np.bitwise_or.reduce(decoded[group.bits] ^ ones, axis=0)
            decoded[group.bits] = ones
        return decoded, disagreed

    def plane_margins(self, counts: PlaneCounts, ones: bool | None = None) -> Float64[NDArray[np.float64], " lanes"]:
        """Every lane's smallest margin; ∞ where nothing matches.

        Args:
            counts: from `TemplatePlanes.counts`.
            ones: only over bits that the OR-machine sets (True), or does not set (False).
        """
        if ones not in self._lookups:
            self._lookups[ones] = _MarginLookup(self._outcomes, self.planes.groups, ones)
        return self._lookups[ones](counts)

    def _check(self, states: Bool[Tensor, "states bits"]) -> None:
        if states.shape[1] != self._bits:
            raise ValueError(f"states of {states.shape[1]} bits: the templates have {self._bits}")

    def _predict_planes(
        self,
        states: Bool[Tensor, "states bits"],
        mean: Float64[NDArray[np.float64], "bits states"],
        variance: Float64[NDArray[np.float64], " states"],
    ) -> None:
        """Fill in mean and variance."""
        count = len(states)
        counts = self.planes.counts(pack(states))
        matched = to_integers(counts.matched)[:count].astype(np.intp)
        variance[:] = self._outcomes.variances[matched]
        for group, first, digits in zip(self.planes.groups, self._outcomes.first, counts.setting, strict=True):
            # C_j is small, so one look-up by s for each of its values serves all bits of the group.
            of_setting = [self._outcomes.means[:, first + setting][matched] for setting in range(group.setting_max + 1)]
            for row, bit in enumerate(group.bits):
                mean[bit] = of_setting[0]
                for setting in range(1, group.setting_max + 1):
                    present = equal([digit[row : row + 1] for digit in digits], setting)
                    np.copyto(mean[bit], of_setting[setting], where=to_mask(present[0])[:count])

    def _run_planes(self, states: Bool[Tensor, "states bits"], micro_steps: int) -> RunResult:
        planes = pack(states)
        smallest = np.full(planes.shape[1] * LANES, np.inf)
        disagreed = np.zeros(planes.shape[1], np.uint64)
        for _ in range(micro_steps):
            counts = self.planes.counts(planes)
            np.minimum(smallest, self.plane_margins(counts), out=smallest)
            following, wrong = self.decode_planes(counts)
            disagreed |= wrong
            if np.array_equal(following, planes):
                break
            planes = following
        agreed = ~to_mask(disagreed)[: len(states)]
        return RunResult(
            unpack(planes, len(states)), torch.from_numpy(smallest[: len(states)]), torch.from_numpy(agreed)
        )

    def _run_few(self, states: Bool[Tensor, "states bits"], micro_steps: int) -> RunResult:
        current = states.numpy()
        smallest = np.full(len(current), np.inf)
        agreed = np.ones(len(current), np.bool_)
        for _ in range(micro_steps):
            matched, setting = self._lists.counts(current)
            cells = matched[:, None], self._outcomes.of_bit + setting
            following = self._outcomes.decoded[cells]
            np.minimum(smallest, self._outcomes.margins[cells].min(1), out=smallest)
            agreed &= (following == (setting > 0)).all(1)
            if np.array_equal(following, current):
                break
            current = following
        return RunResult(torch.from_numpy(current.copy()), torch.from_numpy(smallest), torch.from_numpy(agreed))


class _Outcomes:
    """What a bit is predicted and decodes to, for every s (rows) and every pair of F_j and C_j (columns).

    Attributes:
        means: the prediction's mean.
        variances: its variance for every s.
        decoded: the decoded bit; in rows s < C_j, which cannot be, the OR-machine's.
        margins: its distance from the threshold, negative if decoded wrongly; ∞ for s = 0 and where s < C_j.
        first: for each group of bits the column of C_j = 0; those of C_j = 1, 2, … follow.
        of_bit: the same for each bit.
    """

    def __init__(self, predictor: TemplatePredictor, decoder: Decoder, planes: TemplatePlanes) -> None:
        setting_max: dict[int, int] = {}
        example: dict[int, int] = {}
        for group in planes.groups:
            setting_max[group.fan_in] = max(group.setting_max, setting_max.get(group.fan_in, 0))
            example[group.fan_in] = int(group.bits[0])
        kinds = [(fan_in, setting) for fan_in, most in setting_max.items() for setting in range(most + 1)]
        self.first = [kinds.index((group.fan_in, 0)) for group in planes.groups]
        self.of_bit = np.empty(len(predictor.fan_in), np.intp)
        for group, first in zip(planes.groups, self.first, strict=True):
            self.of_bit[group.bits] = first

        bits = torch.tensor([example[fan_in] for fan_in, _ in kinds])
        setting = torch.tensor([setting for _, setting in kinds])
        means, decoded, distances = [], [], []
        for start in range(0, planes.matched_max + 1, _ROWS_AT_ONCE):
            matched = torch.arange(start, min(start + _ROWS_AT_ONCE, planes.matched_max + 1))
            mean = predictor.mean(matched, setting.expand(len(matched), -1), predictor.fan_in[bits])
            levels = thresholds(decoder, predictor, matched)[:, bits]
            true = (setting > 0).expand_as(mean)
            impossible = matched[:, None] < setting
            means.append(mean)
            decoded.append(decode(mean, levels).where(~impossible, true))
            distances.append(margins(mean, levels, true).masked_fill(impossible | (matched == 0)[:, None], torch.inf))
        self.means: Float64[NDArray[np.float64], "matched columns"] = torch.cat(means).numpy()
        self.variances = predictor.variance(torch.arange(planes.matched_max + 1)).numpy()
        self.decoded: Bool[NDArray[np.bool_], "matched columns"] = torch.cat(decoded).numpy()
        self.margins: Float64[NDArray[np.float64], "matched columns"] = torch.cat(distances).numpy()
        self._right = (self.decoded == (setting > 0).numpy()).all(0)

    def always_right(self, columns: range) -> bool:
        """Whether these columns decode to the OR-machine's bit for every s."""
        return bool(self._right[columns.start : columns.stop].all())


class _MarginLookup:
    """The smallest margin of every lane, over all bits or those with C_j > 0 or with C_j = 0.

    Columns of `_Outcomes` with the same margins form a class. What a lane's smallest margin is depends on its s and on
    which classes its bits belong to. A class that some bit of every state belongs to needs no look-up, nor does
    one whose margins are nowhere smaller.
    """

    def __init__(self, outcomes: _Outcomes, groups: Sequence[BitGroup], ones: bool | None) -> None:
        members: dict[bytes, list[tuple[int, int]]] = {}
        columns: dict[bytes, list[int]] = {}
        certain = set()
        for position, (group, first) in enumerate(zip(groups, outcomes.first, strict=True)):
            settings = [c for c in range(group.setting_max + 1) if ones is None or ones == (c > 0)]
            keys = [np.round(outcomes.margins[:, first + setting], _DECIMALS).tobytes() for setting in settings]
            for key, setting in zip(keys, settings, strict=True):
                members.setdefault(key, []).append((position, setting))
                columns.setdefault(key, []).append(first + setting)
            if len(settings) == group.setting_max + 1 and len(set(keys)) == 1:
                certain.add(keys[0])
        smallest = {key: outcomes.margins[:, column].min(1) for key, column in columns.items()}
        base = np.min([np.full(len(outcomes.margins), np.inf), *(smallest[key] for key in certain)], axis=0)
        # Classes to look for, eight at a time: each group of eight with its table over s and their presence.
        classes = [key for key in members if (smallest[key] < base).any()]
        self._tables = []
        for start in range(0, max(len(classes), 1), _CLASSES_AT_ONCE):
            chosen = classes[start : start + _CLASSES_AT_ONCE]
            table = np.repeat(base[:, None], 1 << len(chosen), axis=1)
            for digit, key in enumerate(chosen):
                present = np.arange(1 << len(chosen)) >> digit & 1 == 1
                table[:, present] = np.minimum(table[:, present], smallest[key][:, None])
            self._tables.append(([members[key] for key in chosen], np.ascontiguousarray(table).reshape(-1)))

    def __call__(self, counts: PlaneCounts) -> Float64[NDArray[np.float64], " lanes"]:
        smallest: NDArray[np.float64] | None = None
        for classes, table in self._tables:
            presence = [functools.reduce(operator.or_, (_any_equal(counts, *at) for at in one)) for one in classes]
            found = table.take(to_integers(np.stack([*presence, *counts.matched])), mode="clip")
            smallest = found if smallest is None else np.minimum(smallest, found, out=smallest)
        assert smallest is not None
        return smallest


def _any_equal(counts: PlaneCounts, group: int, setting: int) -> UInt64[Words, " words"]:
    """The lanes in which some bit of a group has this C_j."""
    digits = counts.setting[group]
    found: Words
    if setting == 0:
        found = ~np.bitwise_and.reduce(above_zero(digits), axis=0)
    else:
        found = np.bitwise_or.reduce(equal(digits, setting), axis=0)
    return found
