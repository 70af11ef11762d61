"""What theory predicts of ensembles of a finite width on a task's evaluation states (docs/theory.md, section 10)."""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from ntk_ensembles.theory.decoding import LimitPrediction, Prediction
from ntk_ensembles.theory.finite_width import FiniteWidth

MOVEMENT_MAX = 0.6
"""Largest `FiniteWidth.movement` at which predictions are shown, about that of n = 5k for the tasks here.

Measured on addition of 10 bits (k = 40, 512 members) the predicted RMS deviation of N = 4 over the measured one was
1.04, 1.07, 1.10, 1.13 and 1.17 at n/k = 40, 20, 10, 7 and 5 for Gaussian members, and 0.99, 0.99, 0.99, 1.01 and 1.04
for antisymmetric ones. Below that the bias is predicted more than twice too large: at n/k = 3 by 2.6, at 2 by 3.2.
"""

_STATES_MAX = 1024
_UNITS = 256
"""A few seconds for 16 cells of 8 bits and 1,000 states; their mean variance at n = 8,192 is then known to 3%."""


class WidthPrediction(Prediction):
    """Members of a finite width on a task's evaluation states: the limit's mean less the bias, and a larger variance.

    It decodes by the thresholds of infinite width, as any decoder does. An asymptotic estimate, not a bound.

    Args:
        limit: Infinite width on the same states.
        finite: Theory of the width, of the same templates and initialisation.
        units: Number of hidden units to draw for the variance; 256 by default. The seed is fixed.
        states_max: Number of states to predict at most; 1,024 by default.

    Attributes:
        finite: As given.
        rows: Which of the evaluation states are predicted: all, or as many as were asked for, at equal distances.
        variance_error: Standard error of the mean variance from the number of units drawn, as a share of it; an upper
            bound.
    """

    def __init__(
        self, limit: LimitPrediction, finite: FiniteWidth, *, units: int = _UNITS, states_max: int = _STATES_MAX
    ) -> None:
        self.finite = finite
        states = len(limit.mean)
        count = min(states, states_max)
        self.rows: Int64[Tensor, " rows"] = torch.arange(count) * states // count
        matches = limit.evaluation.matches[self.rows]
        bias = self.finite.bias(matches)
        estimate = self.finite.variance(matches, generator=torch.Generator().manual_seed(0), units=units)
        # To first order the gates' part can outweigh the rest; a variance is not negative.
        variance: Float64[Tensor, "states bits"] = estimate.variance.clamp_min(0)
        # States and bits share the units drawn: their errors add up as they are at most.
        self.variance_error = float(estimate.error.mean() / variance.mean().clamp_min(torch.finfo(torch.float64).tiny))
        thresholds = {decoder: values[self.rows] for decoder, values in limit.thresholds.items()}
        next_states = limit.evaluation.next_states[self.rows]
        super().__init__(limit.mean[self.rows] + bias, variance, thresholds, next_states, bias)
