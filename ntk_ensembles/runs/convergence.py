"""How ensembles of N members compare with infinite width, for every N, from the members' deviations alone.

The groups of N members whose means are compared are the *aligned* ones (`groups`): N consecutive members, the first of
which has an index that is a multiple of N, all of them finished and converged. For N the number of all converged
members it is the one group of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ntk_ensembles.runs.groups import Block, Measure, Outcomes, exact, groups_by_size, mean_of
from ntk_ensembles.theory import DECODERS, Decoder, LimitPrediction, WidthPrediction

_NUMBERS_AT_ONCE = 1 << 22
"""Numbers of members that are added up together."""


class ConvergenceRow(TypedDict):
    """One row of ``convergence`` in ``results.json``: ensembles of N members (docs/checkpoints.md)."""

    members: int
    exact_match: dict[Decoder, float]
    exact_match_spread: dict[Decoder, float | None]
    predicted_exact_match: dict[Decoder, float]
    finite_width_exact_match: dict[Decoder, float] | None
    execution_match: dict[Decoder, float] | None
    bit_accuracy: dict[Decoder, float]
    predicted_bit_accuracy: dict[Decoder, float]
    finite_width_bit_accuracy: dict[Decoder, float] | None
    rms_deviation: float
    predicted_rms_deviation: float
    finite_width_rms_deviation: float | None


def ensemble_sizes(members: int) -> list[int]:
    """Return 1, 2, 4, … and ``members`` itself."""
    return sorted({1 << i for i in range(members.bit_length())} | {members}) if members else []


def rows_of_blocks(
    measure: Measure, blocks: Sequence[Block], at_width: WidthPrediction | None = None
) -> list[ConvergenceRow]:
    """Return means and spreads over all aligned groups of N = 1, 2, 4, … members, and of all converged members.

    Args:
        measure: What decodes the means of groups.
        blocks: The members, as from `joined`.
        at_width: What the members' own width predicts of the same states; by default nothing.
    """
    found = dict(groups_by_size(blocks))
    converged = sum(int(block.converged.sum()) for block in blocks)
    if converged and converged not in found:
        total = torch.stack([block.sums for block in blocks]).sum(0, keepdim=True)
        found[converged] = measure(total, converged)
    return [_row(measure.limit, members, found[members], at_width) for members in sorted(found)]


def convergence_rows(
    limit: LimitPrediction,
    deviations: Float[Tensor, "members states bits"],
    sizes: Sequence[int] | None = None,
    at_width: WidthPrediction | None = None,
    indices: Int64[Tensor, " members"] | None = None,
) -> list[ConvergenceRow]:
    """Return means and spreads over all aligned groups of N members, for any N; none for an N without a group.

    Sums of groups are exact sums of the deviations, rounded to float16.

    Args:
        limit: The evaluation states and what infinite width predicts of them.
        deviations: Outputs minus the NTK mean of members that have converged, any float dtype.
        sizes: The N, each from 1 to the number of members; by default those of `ensemble_sizes`.
        at_width: What the members' own width predicts of the same states; by default nothing.
        indices: Indices of the members, ascending; by default 0, 1, 2, ….
    """
    measure = Measure(limit)
    indices = torch.arange(len(deviations)) if indices is None else indices
    rows = []
    for members in ensemble_sizes(len(deviations)) if sizes is None else sizes:
        outcomes = Outcomes.concatenate(measure(sums, members) for sums in _group_sums(deviations, indices, members))
        if len(outcomes):
            rows.append(_row(limit, members, outcomes, at_width))
    return rows


def group_rows(indices: Int64[Tensor, " members"], members: int) -> list[int]:
    """Return where in a list of converged members each group of N begins.

    Args:
        indices: Indices of the members, ascending.
        members: Members N of a group, from 1 to their number.
    """
    if members == len(indices):
        return [0]
    last = indices[members - 1 :]
    starts = (indices[: len(last)] % members == 0) & (last - indices[: len(last)] == members - 1)
    rows: list[int] = starts.nonzero()[:, 0].tolist()
    return rows


def group_means(
    deviations: Float[Tensor, "members states bits"], indices: Int64[Tensor, " members"], members: int
) -> Iterator[Float64[Tensor, "_groups states bits"]]:
    """Yield the means over all groups of N members, some groups at a time.

    Args:
        deviations: Outputs minus the NTK mean of members that have converged, any float dtype.
        indices: Indices of the members, ascending.
        members: Members N of a group, from 1 to their number.
    """
    for sums in _group_sums(deviations, indices, members):
        yield mean_of(sums, members)


def _group_sums(deviations: Tensor, indices: Tensor, members: int) -> Iterator[Tensor]:
    groups = group_rows(indices, members)
    together = max(_NUMBERS_AT_ONCE // (members * deviations[0].numel()), 1)
    for start in range(0, len(groups), together):
        yield torch.stack([_sum(deviations[first : first + members]) for first in groups[start : start + together]])


def _sum(deviations: Tensor) -> Tensor:
    together = max(_NUMBERS_AT_ONCE // deviations[0].numel(), 1)
    total = torch.zeros(deviations.shape[1:], dtype=torch.int64)
    for part in torch.split(deviations, together):
        total += exact(part).sum(0)
    return total


def _row(limit: LimitPrediction, members: int, found: Outcomes, at_width: WidthPrediction | None) -> ConvergenceRow:
    """Return the row of N members from what each group of them decodes."""
    states, executions = len(limit.evaluation), len(limit.evaluation.trajectories)

    # Whole numbers and an exact sum, so that nothing depends on the order of the groups.
    def shares(right: Tensor, of: int) -> dict[Decoder, float]:
        return {d: int(total) / (len(found) * of) for d, total in zip(DECODERS, right.sum(0), strict=True)}

    def spread(right: Tensor) -> float | None:
        groups, total = len(right), int(right.sum())
        if groups == 1:
            return None
        return math.sqrt((groups * int(right.square().sum()) - total * total) / (groups * (groups - 1))) / states

    return {
        "members": members,
        "exact_match": shares(found.states_right, states),
        "exact_match_spread": {d: spread(right) for d, right in zip(DECODERS, found.states_right.T, strict=True)},
        "predicted_exact_match": {decoder: limit.exact_match(members, decoder) for decoder in DECODERS},
        "finite_width_exact_match": {d: at_width.exact_match(members, d) for d in DECODERS} if at_width else None,
        "execution_match": shares(found.executions_right, executions) if executions else None,
        "bit_accuracy": shares(found.bits_right, limit.mean.numel()),
        "predicted_bit_accuracy": {decoder: limit.bit_accuracy(members, decoder) for decoder in DECODERS},
        "finite_width_bit_accuracy": {d: at_width.bit_accuracy(members, d) for d in DECODERS} if at_width else None,
        "rms_deviation": math.sqrt(math.fsum(found.mean_square.tolist()) / len(found)),
        "predicted_rms_deviation": limit.rms_deviation(members),
        "finite_width_rms_deviation": at_width.rms_deviation(members) if at_width else None,
    }
