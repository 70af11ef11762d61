"""What single bits of ensembles do, measured beside predicted: outputs about thresholds, deviations, and failures.

All of it follows from the members' deviations from the NTK mean, as the rows of `convergence` do, over the same groups
of members.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from ntk_ensembles.runs.convergence import ConvergenceRow, convergence_rows, group_means, group_rows
from ntk_ensembles.theory import Decoder, LimitPrediction, Prediction, WidthPrediction, bit_error_probability, decode
from ntk_ensembles.theory.finite_width import rows_at_equal_distances

_BINS = 80
_BITS_AT_ONCE = 1 << 16
_SPREADS = 4.5
"""Standard deviations beyond the outermost mean that a histogram covers."""
_SCORE_BINS, _SCORE_MAX = 60, 5.0
_VARIES = 1e-12
"""Variance below which a bit does not vary: rounding of its formula."""


@dataclass(frozen=True, eq=False)
class Deviations:
    """Deviations of converged members from the NTK mean, with what is predicted of the states they are at.

    Attributes:
        limit: The evaluation states and what infinite width predicts of them.
        at_width: What the members' own width predicts of the same states; None where nothing is.
        of_members: Outputs minus the NTK mean.
        indices: Indices of the members, ascending.
    """

    limit: LimitPrediction
    at_width: WidthPrediction | None
    of_members: Float[Tensor, "members states bits"]
    indices: Int64[Tensor, " members"]

    def means(
        self, members: int, rows: Int64[Tensor, " rows"] | None = None
    ) -> Iterator[Float64[Tensor, "_groups _rows bits"]]:
        """Yield the means over all groups of N members, some groups at a time.

        Args:
            members: Members N of a group, from 1 to their number.
            rows: Evaluation states to return; by default all.
        """
        return group_means(self.of_members if rows is None else self.of_members[:, rows], self.indices, members)


def bit_variance(prediction: Prediction) -> Float64[Tensor, "states bits"]:
    """Return one member's variance at every state and bit; at infinite width all bits of a state have the same."""
    return prediction.variance.view(len(prediction.mean), -1).expand_as(prediction.mean)


@dataclass(frozen=True, eq=False)
class OutputHistogram:
    """Distances of outputs from their thresholds, of 0-bits and of 1-bits, for ensembles of N members.

    Densities are over the bits of one true value, in states that a template matches; the others' output is exactly 0.

    Attributes:
        edges: Edges of the bins, in units of the labels.
        measured: Density of the trained ensembles' outputs, for 0-bits and for 1-bits.
        infinite: Density that infinite width predicts.
        at_width: Density that the members' own width predicts; None where nothing is predicted for it.
    """

    edges: Float64[Tensor, " edges"]
    measured: tuple[Float64[Tensor, " bins"], Float64[Tensor, " bins"]]
    infinite: tuple[Float64[Tensor, " bins"], Float64[Tensor, " bins"]]
    at_width: tuple[Float64[Tensor, " bins"], Float64[Tensor, " bins"]] | None


def output_histogram(deviations: Deviations, members: int, decoder: Decoder) -> OutputHistogram:
    """Return how outputs lie about their thresholds, on at most 1,024 of the evaluation states.

    Args:
        deviations: Deviations of the members.
        members: Members N of an ensemble, of which there is a group.
        decoder: Decoder whose thresholds are meant.
    """
    limit, at_width = deviations.limit, deviations.at_width
    rows = rows_at_equal_distances(len(limit.mean))
    matched = limit.evaluation.matches[rows].any(1)
    rows = rows[matched]
    true = limit.evaluation.next_states[rows]
    kinds = (~true, true)

    def predicted(prediction: Prediction, chosen: Tensor) -> tuple[Tensor, Tensor]:
        distance = prediction.mean - prediction.thresholds[decoder]
        return distance[chosen], (bit_variance(prediction)[chosen] / members).sqrt()

    predictions = [predicted(limit, rows)]
    if at_width is not None:
        predictions.append(predicted(at_width, matched))
    low = min((float((mean - _SPREADS * spread).min()) for mean, spread in predictions if mean.numel()), default=-1.0)
    high = max((float((mean + _SPREADS * spread).max()) for mean, spread in predictions if mean.numel()), default=1.0)
    edges = torch.linspace(low - 1e-3, high + 1e-3, _BINS + 1, dtype=torch.float64)
    first, last = float(edges[0]), float(edges[-1])
    counts = [torch.zeros(_BINS, dtype=torch.float64) for _ in kinds]
    for means in deviations.means(members, rows):
        outputs = (predictions[0][0] + means).clamp(first, last)
        for count, kind in zip(counts, kinds, strict=True):
            count += torch.histc(outputs[:, kind], _BINS, first, last)
    zeros, ones = (
        [
            _density(count, edges),
            *(_density(_expected(edges, mean[kind], spread[kind]), edges) for mean, spread in predictions),
        ]
        for count, kind in zip(counts, kinds, strict=True)
    )
    measured, infinite, *expected = zip(zeros, ones, strict=True)
    return OutputHistogram(edges, measured, infinite, expected[0] if expected else None)


def _expected(edges: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
    """Return how many of some Gaussian outputs are expected in each bin; one that does not vary is in one bin."""
    total = torch.zeros(len(edges) - 1, dtype=torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    for mean, deviation in zip(torch.split(means, _BITS_AT_ONCE), torch.split(deviations, _BITS_AT_ONCE), strict=True):
        scores = (edges[:, None] - mean) / deviation.clamp_min(tiny**0.5)
        total += torch.special.ndtr(scores).sum(1).diff()
    return total


def _density(counts: Tensor, edges: Tensor) -> Tensor:
    return counts / counts.sum().clamp_min(1) / edges.diff()


class StandardisedDeviations:
    """Deviations of ensembles of N members from a predicted mean, in predicted standard deviations, as they are added.

    Args:
        prediction: What is predicted.
        members: N.
        rows: States of the prediction whose deviations are added; by default all.

    Attributes:
        members: N.
        varies: Which bits of these states vary; the others do not count.
        edges: Edges of the histogram's bins; what lies beyond is in the outermost ones.
        counts: Number of deviations in each bin.
    """

    def __init__(self, prediction: Prediction, members: int = 1, rows: Int64[Tensor, " rows"] | None = None) -> None:
        variance, bias = bit_variance(prediction), prediction.bias
        if rows is not None:
            variance, bias = variance[rows], bias[rows]
        self.members = members
        self.varies: Bool[Tensor, "states bits"] = variance > _VARIES
        # What is not a number is in no bin.
        scale = (variance / members).rsqrt().masked_fill(~self.varies, torch.nan)
        self._scale, self._shift = scale.float(), (bias * scale).float()
        self.edges = torch.linspace(-_SCORE_MAX, _SCORE_MAX, _SCORE_BINS + 1, dtype=torch.float64)
        self.counts = torch.zeros(_SCORE_BINS, dtype=torch.float64)
        self._total = self._squares = 0.0

    def add(self, deviations: Float[Tensor, "*groups states bits"]) -> None:
        """Add mean deviations of groups of N members."""
        scores = deviations.float() * self._scale - self._shift
        self.counts += torch.histc(scores.clamp(-_SCORE_MAX, _SCORE_MAX), _SCORE_BINS, -_SCORE_MAX, _SCORE_MAX)
        self._total += float(scores.nansum(dtype=torch.float64))
        self._squares += float(scores.square_().nansum(dtype=torch.float64))

    @property
    def mean(self) -> float:
        """Their mean; 0 if the prediction holds."""
        return self._total / float(self.counts.sum())

    @property
    def deviation(self) -> float:
        """Their standard deviation; 1 if the prediction holds."""
        return math.sqrt(max(self._squares / float(self.counts.sum()) - self.mean**2, 0.0))

    @property
    def density(self) -> Float64[Tensor, " bins"]:
        """Density in each bin."""
        return _density(self.counts, self.edges)


def standardised_deviations(
    deviations: Deviations, prediction: Prediction, members: int
) -> StandardisedDeviations | None:
    """Return deviations over what is predicted of them, on at most 1,024 of the evaluation states.

    Args:
        deviations: Deviations of the members.
        prediction: What is predicted of them: ``limit`` or ``at_width``.
        members: Members N of an ensemble, of which there is a group.

    Returns:
        None where no bit varies, as at infinite width for antisymmetric members.
    """
    rows = rows_at_equal_distances(len(deviations.limit.mean))
    found = StandardisedDeviations(prediction, members, rows if prediction is deviations.limit else None)
    if not bool(found.varies.any()):
        return None
    for means in deviations.means(members, rows):
        found.add(means)
    return found


@dataclass(frozen=True)
class BitFailures:
    """How often ensembles of N members read one bit wrongly, over all evaluation states and groups of members.

    Attributes:
        bit: Position of the bit.
        name: Its name in the state's layout.
        readings: How often it was read.
        missed: How often a 1 was read as 0.
        invented: How often a 0 was read as 1.
        predicted: Share of readings that infinite width predicts to be wrong.
        at_width: Share that the members' own width predicts; None where nothing is predicted for it.
        setting: Groups of the templates that set the bit in the states in which it was missed, with the number of
            misses in which one of each did.
        silent: Groups of the templates that can set the bit, with their number. Where the bit was invented, none of
            them matched.
        num_matches: Smallest and largest number of templates that match a state in which it was read wrongly; None
            where it never was.
    """

    bit: int
    name: str
    readings: int
    missed: int
    invented: int
    predicted: float
    at_width: float | None
    setting: dict[str, int]
    silent: dict[str, int]
    num_matches: tuple[int, int] | None

    @property
    def measured(self) -> float:
        """Share of readings that were wrong."""
        return (self.missed + self.invented) / self.readings


def bit_failures(deviations: Deviations, members: int, decoder: Decoder) -> list[BitFailures]:
    """Return the failures of every bit of the state.

    Args:
        deviations: Deviations of the members.
        members: Members N of an ensemble, of which there is a group.
        decoder: How their mean is decoded.
    """
    limit, at_width = deviations.limit, deviations.at_width
    evaluation, templates = limit.evaluation, limit.task.templates
    wrong = torch.zeros(limit.mean.shape, dtype=torch.int64)
    for means in deviations.means(members):
        wrong += (decode(limit.mean + means, limit.thresholds[decoder]) != evaluation.next_states).sum(0)
    readings = len(group_rows(deviations.indices, members)) * len(evaluation)
    missed = wrong.where(evaluation.next_states, 0)
    predicted = bit_error_probability(limit.margins[decoder], limit.variance, members).mean(0).tolist()
    expected = (
        bit_error_probability(at_width.margins[decoder], at_width.variance, members).mean(0).tolist()
        if at_width is not None
        else [None] * len(predicted)
    )
    num_matches = evaluation.matches.sum(1)
    found = []
    for bit, (total, lost) in enumerate(zip(wrong.sum(0).tolist(), missed.sum(0).tolist(), strict=True)):
        setting: Counter[str] = Counter()
        setters = templates.labels[:, bit].nonzero().flatten().tolist() if total else []
        for row in setters:
            setting[templates.templates[row].group] += int(missed[evaluation.matches[:, row], bit].sum())
        failing = num_matches[wrong[:, bit] > 0]
        found.append(
            BitFailures(
                bit,
                templates.layout.bit_name(bit),
                readings,
                lost,
                total - lost,
                predicted[bit],
                expected[bit],
                {name: count for name, count in setting.most_common() if count},
                dict(Counter(templates.templates[row].group for row in setters).most_common()),
                (int(failing.min()), int(failing.max())) if len(failing) else None,
            )
        )
    return found


def members_needed(
    rows: Sequence[ConvergenceRow], deviations: Deviations | None, decoder: Decoder, exact: float
) -> int | None:
    """Return the smallest N whose exact match, averaged over groups of members, reaches a target and stays there.

    It is sought between the last row that misses the target and the first from which on all reach it. An N without a
    group counts as one that misses it.

    Args:
        rows: Convergence rows of the members, N ascending, at least one.
        deviations: Deviations of the members; None to look no closer than the rows.
        decoder: How the mean is decoded.
        exact: Share of states to be decoded right, above 0 and at most 1.
    """
    reached = None
    below = 0
    for row in reversed(rows):
        if row["exact_match"][decoder] < exact:
            below = row["members"]
            break
        reached = row["members"]
    if reached is None or deviations is None:
        return reached
    while reached - below > 1:
        middle = (below + reached) // 2
        found = convergence_rows(deviations.limit, deviations.of_members, [middle], indices=deviations.indices)
        reaches = bool(found) and found[0]["exact_match"][decoder] >= exact
        below, reached = (below, middle) if reaches else (middle, reached)
    return reached
