"""How ensembles of N members compare with theory, for every N, from the members' predictions alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ntk_ensembles.ensemble import Init
from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.theory import (
    DECODERS,
    Decoder,
    ExactMatchBand,
    TemplatePredictor,
    bit_error_probability,
    decode,
    exact_match_band,
    exact_match_probability,
    margins,
    thresholds,
)
from ntk_ensembles.training.metrics import BitAccuracy, ExactMatch, ExecutionMatch, RMSDeviation


class Theory:
    """What infinite width says of a task's evaluation states.

    Args:
        task: the task.
        evaluation: its evaluation states.
        init: how members start.
    """

    def __init__(self, task: Task[Any, Any], evaluation: EvaluationSet, init: Init = "gaussian") -> None:
        self.task = task
        self.evaluation = evaluation
        self.predictor = TemplatePredictor(task.templates, centred=init == "antisymmetric")
        gaussian = self.predictor.predict(evaluation.matches)
        self.mean, self.variance = gaussian.mean, gaussian.variance
        matched = evaluation.matches.sum(1)
        self.thresholds: dict[Decoder, Float64[Tensor, "states bits"]] = {
            decoder: thresholds(decoder, self.predictor, matched) for decoder in DECODERS
        }
        self.margins: dict[Decoder, Float64[Tensor, "states bits"]] = {
            decoder: margins(self.mean, levels, evaluation.successors) for decoder, levels in self.thresholds.items()
        }

    @cached_property
    def inputs(self) -> Float64[Tensor, "states templates"]:
        """The encoded evaluation states."""
        return self.predictor.templates.encode(self.evaluation.matches)

    def decode(self, deviation: Float[Tensor, "states bits"], decoder: Decoder) -> Bool[Tensor, "states bits"]:
        """The bits of an ensemble whose mean deviates so much from the NTK mean."""
        return decode(self.mean + deviation, self.thresholds[decoder])

    def exact_match(self, members: int, decoder: Decoder) -> float:
        """The expected exact match of an ensemble of infinitely wide members."""
        return float(exact_match_probability(self.margins[decoder], self.variance, members).mean())

    def bit_accuracy(self, members: int, decoder: Decoder) -> float:
        """The expected share of right bits."""
        return 1 - float(bit_error_probability(self.margins[decoder], self.variance, members).mean())

    def rms_deviation(self, members: int) -> float:
        """The expected root mean square of the ensemble's deviation from the NTK mean."""
        return float((self.variance.mean() / members).sqrt())

    def band(self, members: list[int], decoder: Decoder, draws: int = 100) -> ExactMatchBand:
        """Between what exact matches 90% of such ensembles lie (drawn with a fixed seed)."""
        generator = torch.Generator().manual_seed(0)
        evaluation = self.evaluation
        return exact_match_band(
            self.predictor,
            evaluation.matches,
            evaluation.successors,
            decoder,
            members,
            generator=generator,
            draws=draws,
            states_max=1024,
        )


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
    theory: Theory, deviations: Float[Tensor, "members states bits"], sizes: Sequence[int] | None = None
) -> list[ConvergenceRow]:
    """Means and spreads over all disjoint groups of N consecutive members, for every N.

    Members that do not fill a last group are left out of that N. Sums of groups are taken in float32.

    Args:
        theory: of the same evaluation states.
        deviations: of members in the order of their indices, any float dtype.
        sizes: the N, each from 1 to the number of members; by default those of `ensemble_sizes`.
    """
    return [_row(theory, deviations, n) for n in sizes or ensemble_sizes(len(deviations))]


def _row(theory: Theory, deviations: Tensor, members: int) -> ConvergenceRow:
    evaluation = theory.evaluation
    rms = RMSDeviation()
    accuracy = {decoder: BitAccuracy() for decoder in DECODERS}
    executions = {decoder: ExecutionMatch(evaluation.executions) for decoder in DECODERS}
    matches: dict[Decoder, list[float]] = {decoder: [] for decoder in DECODERS}
    for group in range(len(deviations) // members):
        mean = deviations[group * members : (group + 1) * members].mean(0, dtype=torch.float32)
        rms.update(mean)
        for decoder in DECODERS:
            decoded = theory.decode(mean, decoder)
            exact = ExactMatch()
            exact.update(decoded, evaluation.successors)
            matches[decoder].append(float(exact.compute()))
            accuracy[decoder].update(decoded, evaluation.successors)
            if evaluation.executions:
                executions[decoder].update(decoded, evaluation.successors)
    rates = {decoder: torch.tensor(values, dtype=torch.float64) for decoder, values in matches.items()}
    return ConvergenceRow(
        members,
        {decoder: float(values.mean()) for decoder, values in rates.items()},
        {decoder: float(values.std()) if len(values) > 1 else None for decoder, values in rates.items()},
        {decoder: theory.exact_match(members, decoder) for decoder in DECODERS},
        {decoder: float(metric.compute()) for decoder, metric in executions.items()} if evaluation.executions else None,
        {decoder: float(metric.compute()) for decoder, metric in accuracy.items()},
        {decoder: theory.bit_accuracy(members, decoder) for decoder in DECODERS},
        float(rms.compute()),
        theory.rms_deviation(members),
    )
