"""How ensembles of N members compare with infinite width, for every N, from the members' deviations alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_ensembles.theory import DECODERS, Decoder, LimitPrediction, WidthPrediction, decode

_NUMBERS_AT_ONCE = 1 << 22
"""Outputs of ensembles that are decoded together."""


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


def convergence_rows(
    limit: LimitPrediction,
    deviations: Float[Tensor, "members states bits"],
    sizes: Sequence[int] | None = None,
    at_width: WidthPrediction | None = None,
) -> list[ConvergenceRow]:
    """Return means and spreads over all disjoint groups of N consecutive members, for every N.

    Members that do not fill a last group are left out of that N. Sums of groups are taken in float32.

    Args:
        limit: The evaluation states and what infinite width predicts of them.
        deviations: Outputs minus the NTK mean, of members in the order of their indices, any float dtype.
        sizes: The N, each from 1 to the number of members; by default those of `ensemble_sizes`.
        at_width: What the members' own width predicts of the same states; by default nothing.
    """
    sizes = ensemble_sizes(len(deviations)) if sizes is None else sizes
    return [_row(limit, deviations, members, at_width) for members in sizes]


def group_means(
    deviations: Float[Tensor, "members states bits"], members: int
) -> Iterator[Float[Tensor, "_groups states bits"]]:
    """Yield the means over all disjoint groups of consecutive members, some groups at a time, in float32.

    Args:
        deviations: Deviations of members in the order of their indices, any float dtype.
        members: Members N of a group, from 1 to their number. Those that do not fill a last group are left out.
    """
    groups = len(deviations) // members
    together = max(_NUMBERS_AT_ONCE // (members * deviations[0].numel()), 1)
    for start in range(0, groups, together):
        chunk = deviations[start * members : min(start + together, groups) * members]
        yield chunk.view(-1, members, *chunk.shape[1:]).mean(1, dtype=torch.float32)


def _row(limit: LimitPrediction, deviations: Tensor, members: int, at_width: WidthPrediction | None) -> ConvergenceRow:
    evaluation = limit.evaluation
    groups = len(deviations) // members
    # Which trajectory each of their states belongs to; one is right if no state of it is wrong.
    trajectories = evaluation.trajectories
    steps = torch.cat(trajectories) if trajectories else torch.empty(0, dtype=torch.int64)
    owner = torch.repeat_interleave(torch.tensor([len(states) for states in trajectories], dtype=torch.int64))
    squares = 0.0
    exact: dict[Decoder, list[Tensor]] = {decoder: [] for decoder in DECODERS}
    right_bits = dict.fromkeys(DECODERS, 0)
    right_trajectories = dict.fromkeys(DECODERS, 0)
    for means in group_means(deviations, members):
        squares += float(means.square().sum(dtype=torch.float64))
        for decoder in DECODERS:
            right = decode(limit.mean + means, limit.thresholds[decoder]) == evaluation.next_states
            right_states = right.all(2)
            exact[decoder].append(right_states.to(torch.float64).mean(1))
            right_bits[decoder] += int(right.sum())
            if trajectories:
                wrong = torch.zeros(len(means), len(trajectories), dtype=torch.int32)
                wrong.index_add_(1, owner, (~right_states[:, steps]).to(torch.int32))
                right_trajectories[decoder] += int((wrong == 0).sum())
    rates = {decoder: torch.cat(values) for decoder, values in exact.items()}
    count = groups * limit.mean.numel()
    return {
        "members": members,
        "exact_match": {decoder: float(values.mean()) for decoder, values in rates.items()},
        "exact_match_spread": {d: float(values.std()) if len(values) > 1 else None for d, values in rates.items()},
        "predicted_exact_match": {decoder: limit.exact_match(members, decoder) for decoder in DECODERS},
        "finite_width_exact_match": {d: at_width.exact_match(members, d) for d in DECODERS} if at_width else None,
        "execution_match": (
            {decoder: right_trajectories[decoder] / (groups * len(trajectories)) for decoder in DECODERS}
            if trajectories
            else None
        ),
        "bit_accuracy": {decoder: right_bits[decoder] / count for decoder in DECODERS},
        "predicted_bit_accuracy": {decoder: limit.bit_accuracy(members, decoder) for decoder in DECODERS},
        "finite_width_bit_accuracy": {d: at_width.bit_accuracy(members, d) for d in DECODERS} if at_width else None,
        "rms_deviation": (squares / count) ** 0.5,
        "predicted_rms_deviation": limit.rms_deviation(members),
        "finite_width_rms_deviation": at_width.rms_deviation(members) if at_width else None,
    }
