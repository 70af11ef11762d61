"""How ensembles of N members compare with theory, for every N, from the members' predictions alone."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ntk_ensembles.theory.decoding import (
    DECODERS,
    Decoder,
    ExactMatchBand,
    bit_error_probability,
    decode,
    exact_match_band,
    exact_match_probability,
    margins,
    thresholds,
)
from ntk_ensembles.theory.predictor import TemplatePredictor


class LimitPrediction:
    """What infinite width says of a task's evaluation states.

    Args:
        task: the task.
        evaluation: its evaluation states.
        init: how members start.
    """

    def __init__(self, templates: Any, evaluation: EvaluationSet, *, antisymmetric: bool = False) -> None:
        self.evaluation = evaluation
        self.predictor = TemplatePredictor(templates, centred=antisymmetric)
        gaussian = self.predictor.predict(evaluation.matches)
        self.mean, self.variance = gaussian.mean, gaussian.variance
        matched = evaluation.matches.sum(1)
        self.thresholds: dict[Decoder, Float64[Tensor, "states bits"]] = {
            decoder: thresholds(decoder, self.predictor, matched) for decoder in DECODERS
        }
        self.margins: dict[Decoder, Float64[Tensor, "states bits"]] = {
            decoder: margins(self.mean, levels, evaluation.next_states) for decoder, levels in self.thresholds.items()
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
            evaluation.next_states,
            decoder,
            members,
            generator=generator,
            draws=draws,
            states_max=1024,
        )
