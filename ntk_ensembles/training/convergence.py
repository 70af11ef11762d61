"""How ensembles of N members compare with theory, for every N, from the members' predictions alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_ensembles.theory import DECODERS, Decoder, LimitPrediction
from ntk_ensembles.training.metrics import BitAccuracy, ExactMatch, ExecutionMatch, RMSDeviation


@dataclass(frozen=True)
class ConvergenceRow:
    """One row of ``convergence`` in ``results.json`` (DESIGN §6), for ensembles of so many members."""

    members: int
    exact_match: dict[Decoder, float]
    exact_match_spread: dict[Decoder, float | None]
    predicted_exact_match: dict[Decoder, float]
    execution_match: dict[Decoder, float] | None
    bit_accuracy: dict[Decoder, float]
    predicted_bit_accuracy: dict[Decoder, float]
    rms_deviation: float
    predicted_rms_deviation: float


def ensemble_sizes(members: int) -> list[int]:
    """1, 2, 4, … and ``members`` itself."""
    return sorted({1 << i for i in range(members.bit_length())} | {members}) if members else []


def convergence(
    theory: LimitPrediction, deviations: Float[Tensor, "members states bits"], sizes: Sequence[int] | None = None
) -> list[ConvergenceRow]:
    """Means and spreads over all disjoint groups of N consecutive members, for every N.

    Members that do not fill a last group are left out of that N. Sums of groups are taken in float32.

    Args:
        theory: of the same evaluation states.
        deviations: of members in the order of their indices, any float dtype.
        sizes: the N, each from 1 to the number of members; by default those of `ensemble_sizes`.
    """
    return [_row(theory, deviations, n) for n in sizes or ensemble_sizes(len(deviations))]


def _row(theory: LimitPrediction, deviations: Tensor, members: int) -> ConvergenceRow:
    evaluation = theory.evaluation
    rms = RMSDeviation()
    accuracy = {decoder: BitAccuracy() for decoder in DECODERS}
    executions = {decoder: ExecutionMatch(evaluation.trajectories) for decoder in DECODERS}
    matches: dict[Decoder, list[float]] = {decoder: [] for decoder in DECODERS}
    for group in range(len(deviations) // members):
        mean = deviations[group * members : (group + 1) * members].mean(0, dtype=torch.float32)
        rms.update(mean)
        for decoder in DECODERS:
            decoded = theory.decode(mean, decoder)
            exact = ExactMatch()
            exact.update(decoded, evaluation.next_states)
            matches[decoder].append(float(exact.compute()))
            accuracy[decoder].update(decoded, evaluation.next_states)
            if evaluation.trajectories:
                executions[decoder].update(decoded, evaluation.next_states)
    rates = {decoder: torch.tensor(values, dtype=torch.float64) for decoder, values in matches.items()}
    return ConvergenceRow(
        members,
        {decoder: float(values.mean()) for decoder, values in rates.items()},
        {decoder: float(values.std()) if len(values) > 1 else None for decoder, values in rates.items()},
        {decoder: theory.exact_match(members, decoder) for decoder in DECODERS},
        {decoder: float(metric.compute()) for decoder, metric in executions.items()}
        if evaluation.trajectories
        else None,
        {decoder: float(metric.compute()) for decoder, metric in accuracy.items()},
        {decoder: theory.bit_accuracy(members, decoder) for decoder in DECODERS},
        float(rms.compute()),
        theory.rms_deviation(members),
    )
