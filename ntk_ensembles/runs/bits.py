"""What single bits of ensembles do, measured beside predicted: outputs about thresholds, deviations, and failures.

All of it follows from the members' deviations from the NTK mean, as the rows of `convergence` do, over the same groups
of members.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ntk_ensembles.runs.convergence import ConvergenceRow, convergence_rows, group_means, group_rows
from ntk_ensembles.theory import Decoder, LimitPrediction, Prediction, WidthPrediction, bit_error_probability, decode
from ntk_ensembles.theory.finite_width import rows_at_equal_distances

_BINS = 80
_BITS_AT_ONCE = 1 << 16
_SPREADS = 4.5
"""Standard deviations beyond the outermost mean that a histogram covers."""
_VARIES = 1e-12
"""Variance below which a bit does not vary: rounding of its formula."""


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


def output_histogram(
    limit: LimitPrediction,
    at_width: WidthPrediction | None,
    deviations: Float[Tensor, "members states bits"],
    indices: Int64[Tensor, " members"],
    members: int,
    decoder: Decoder,
) -> OutputHistogram:
    """Return how outputs lie about their thresholds, on at most 1,024 of the evaluation states.

    Args:
        limit: The evaluation states and what infinite width predicts of them.
        at_width: What the members' own width predicts of the same states, if anything.
        deviations: Outputs minus the NTK mean of members that have converged.
        indices: Indices of the members, ascending.
        members: Members N of an ensemble, of which there is a group.
        decoder: Decoder whose thresholds are meant.
    """
    rows = rows_at_equal_distances(len(limit.mean))
    matched = limit.evaluation.matches[rows].any(1)
    rows = rows[matched]
    true = limit.evaluation.next_states[rows]
    kinds = (~true, true)
    distance = (limit.mean - limit.thresholds[decoder])[rows]
    predictions = [(distance, _deviation(limit, members)[rows])]
    if at_width is not None:
        moved = (at_width.mean - at_width.thresholds[decoder])[matched]
        predictions.append((moved, _deviation(at_width, members)[matched]))
    low = min((float((mean - _SPREADS * spread).min()) for mean, spread in predictions if mean.numel()), default=-1.0)
    high = max((float((mean + _SPREADS * spread).max()) for mean, spread in predictions if mean.numel()), default=1.0)
    edges = torch.linspace(low - 1e-3, high + 1e-3, _BINS + 1, dtype=torch.float64)
    counts = [torch.zeros(_BINS, dtype=torch.float64) for _ in kinds]
    for means in group_means(deviations[:, rows], indices, members):
        outputs = (distance + means).clamp(float(edges[0]), float(edges[-1]))
        for count, kind in zip(counts, kinds, strict=True):
            count += torch.histc(outputs[:, kind], _BINS, float(edges[0]), float(edges[-1]))
    expected = [
        tuple(_density(_expected(edges, mean[kind], spread[kind]), edges) for kind in kinds)
        for mean, spread in predictions
    ]
    return OutputHistogram(
        edges,
        (_density(counts[0], edges), _density(counts[1], edges)),
        (expected[0][0], expected[0][1]),
        (expected[1][0], expected[1][1]) if at_width is not None else None,
    )


def _deviation(prediction: Prediction, members: int) -> Tensor:
    """Return the standard deviation of the mean of ``members`` at every state and bit."""
    variance = prediction.variance if prediction.variance.ndim == 2 else prediction.variance[:, None]
    return (variance / members).sqrt().expand_as(prediction.mean)


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


@dataclass(frozen=True, eq=False)
class StandardisedDeviations:
    """Deviations of ensembles of N members from a predicted mean, in predicted standard deviations.

    Attributes:
        members: N.
        mean: Their mean; 0 if the prediction holds.
        deviation: Their standard deviation; 1 if it holds.
        edges: Edges of the histogram's bins; what lies beyond is in the last ones.
        density: Density in each bin.
    """

    members: int
    mean: float
    deviation: float
    edges: Float64[Tensor, " edges"]
    density: Float64[Tensor, " bins"]


def standardised_deviations(
    limit: LimitPrediction,
    prediction: Prediction,
    deviations: Float[Tensor, "members states bits"],
    indices: Int64[Tensor, " members"],
    members: int,
) -> StandardisedDeviations | None:
    """Return deviations over what is predicted of them, on at most 1,024 of the evaluation states.

    Args:
        limit: The evaluation states.
        prediction: Either ``limit`` or what the members' own width predicts.
        deviations: Outputs minus the NTK mean of members that have converged.
        indices: Indices of the members, ascending.
        members: Members N of an ensemble, of which there is a group.

    Returns:
        None where no bit varies, as at infinite width for antisymmetric members.
    """
    rows = rows_at_equal_distances(len(limit.mean))
    mean = prediction.bias[rows] if prediction is limit else prediction.bias
    spread = _deviation(prediction, members)
    spread = spread[rows] if prediction is limit else spread
    varies = spread.square() * members > _VARIES
    if not bool(varies.any()):
        return None
    edges = torch.linspace(-5, 5, 61, dtype=torch.float64)
    counts = torch.zeros(len(edges) - 1, dtype=torch.float64)
    number, total, squares = 0, 0.0, 0.0
    for means in group_means(deviations[:, rows], indices, members):
        scores = ((means - mean) / spread)[:, varies]
        number += scores.numel()
        total += float(scores.sum())
        squares += float(scores.square().sum())
        counts += torch.histc(scores.clamp(-5, 5), len(counts), -5, 5)
    average = total / number
    deviation = max(squares / number - average**2, 0.0) ** 0.5
    return StandardisedDeviations(members, average, deviation, edges, _density(counts, edges))


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


def bit_failures(
    limit: LimitPrediction,
    at_width: WidthPrediction | None,
    deviations: Float[Tensor, "members states bits"],
    indices: Int64[Tensor, " members"],
    members: int,
    decoder: Decoder,
) -> list[BitFailures]:
    """Return the failures of every bit of the state.

    Args:
        limit: The evaluation states and what infinite width predicts of them.
        at_width: What the members' own width predicts of the same states, if anything.
        deviations: Outputs minus the NTK mean of members that have converged.
        indices: Indices of the members, ascending.
        members: Members N of an ensemble, of which there is a group.
        decoder: How their mean is decoded.
    """
    evaluation, templates = limit.evaluation, limit.task.templates
    wrong = torch.zeros(limit.mean.shape, dtype=torch.int64)
    for means in group_means(deviations, indices, members):
        wrong += (decode(limit.mean + means, limit.thresholds[decoder]) != evaluation.next_states).sum(0)
    readings = len(group_rows(indices, members)) * len(evaluation)
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
    rows: Sequence[ConvergenceRow],
    limit: LimitPrediction,
    deviations: Float[Tensor, "members states bits"] | None,
    indices: Int64[Tensor, " members"],
    decoder: Decoder,
    exact: float,
) -> int | None:
    """Return the smallest N whose exact match, averaged over groups of members, reaches a target and stays there.

    It is sought between the last row that misses the target and the first from which on all reach it. An N without a
    group counts as one that misses it.

    Args:
        rows: Convergence rows of the members, N ascending, at least one.
        limit: The evaluation states and what infinite width predicts of them.
        deviations: Deviations of the members that have converged; None to look no closer than the rows.
        indices: Indices of these members, ascending.
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
        found = convergence_rows(limit, deviations, [middle], indices=indices)
        reaches = bool(found) and found[0]["exact_match"][decoder] >= exact
        below, reached = (below, middle) if reaches else (middle, reached)
    return reached
