"""What a finite width adds to the infinitely wide ensemble, to first order (docs/theory.md, section 10).

Gates at the training inputs lose what they push through zero, and training makes up for it: the ensemble behaves as
if its labels were shifted by b, of order √(k/n). Beside that, each network has a kernel of its own, which adds a
variance of order 1/n. Both hold for X = I_k and training by the whitened loss in steps of about size 1
(`ntk_ensembles.ensemble.descent`). They are an asymptotic estimate, not a bound: trust them while `movement` is
well below 1, in practice for n/k ≥ 10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from ntk_ensembles.errors import OptionError
from ntk_ensembles.theory.decoding import LimitPrediction, Prediction
from ntk_ensembles.theory.kernels import NNGP_DIAGONAL, NTK_DIAGONAL, ORTHOGONAL, kappa1
from ntk_ensembles.theory.predictor import TemplatePredictor

Labels = Literal["plain", "corrected"]
"""What members are trained on. ``plain``: the templates' labels Y. ``corrected``: Y − b, so that the ensemble's mean
approaches that of infinite width (docs/theory.md, equation (42))."""

LABELS: tuple[Labels, ...] = get_args(Labels)
"""All labels, the default first."""

_GAP = NTK_DIAGONAL - ORTHOGONAL

_ITERATIONS = 100
"""Enough for the corrected labels wherever the expansion means anything; each one gains a factor √(k/n) or better."""

_UNITS_AT_ONCE = 512


@dataclass(frozen=True)
class VarianceEstimate:
    """One member's variance at a finite width, which unlike that of infinite width differs from bit to bit."""

    variance: Float64[Tensor, "states bits"]
    """The variance of one member's outputs over initialisations."""

    error: Float64[Tensor, "states bits"]
    """The standard error of ``variance`` from the number of units drawn."""


class FiniteWidth:
    """The bias of the mean and the variance that members of a finite width have beside the limit.

    Args:
        predictor: The infinite-width theory of the templates: padding included, ``antisymmetric`` for members of
            antisymmetric initialisation.
        width: n, the number of hidden units, at least 1.
        corrected: Whether members are trained on the labels less their shift (docs/theory.md, equation
            (42)), so that the ensemble's mean approaches that of infinite width; False by default.

    Attributes:
        labels: What members are trained on: Y, or Y − b, shape (templates, bits), float64; padding in the last rows.
        shift: b (docs/theory.md, equation (39)): the ensemble's mean is that of infinite width for
            ``labels + shift``; shape (templates, bits), float64.
        predictor: As given.
        width: As given.
        trained: Training labels less Y: 0, or −b; shape (templates, bits), float64.
        moved: What the ensemble's mean is that of infinite width for, less Y: b, or 0; of the same shape.
        movement: √(k/n)·|r_i|, root mean square over templates: the share of its own scale by which a hidden weight
            moves in training. The expansion is in powers of it.

    Raises:
        OptionError: The width is less than 1, or so small that no labels can be corrected.
    """

    def __init__(self, predictor: TemplatePredictor, width: int, *, corrected: bool = False) -> None:
        if width < 1:
            raise OptionError("width", width, "an integer of at least 1")
        self.predictor = predictor
        self.width = width
        labels = predictor.templates.labels.to(torch.float64)
        padding = labels.new_zeros(predictor.size - len(labels), labels.shape[1])
        wanted = torch.cat([labels, padding])
        self.labels = wanted
        self.shift = self._shift(wanted)
        if corrected:
            for _ in range(_ITERATIONS):
                before, self.labels = self.labels, wanted - self.shift
                self.shift = self._shift(self.labels)
                if bool((self.labels - before).abs().max() < 1e-14):
                    break
            else:
                raise OptionError("width", width, f"more: the shift of {len(labels)} templates' labels does not settle")
        self.trained = self.labels - wanted
        self.moved = self.trained + self.shift
        if bool((self.moved.abs() <= 1e-13).all()):
            self.moved = torch.zeros_like(self.moved)
        lengths = self._lengths(_through_inverse(self.labels))
        self.movement = math.sqrt(predictor.size / width) * float(lengths.square().mean().sqrt())

    def _noise(self) -> tuple[float, float]:
        """Return own and shared of r's covariance over initialisations, own·I + shared·11ᵀ (docs/theory.md, (41))."""
        if self.predictor.antisymmetric:
            return 0.0, 0.0
        size = self.predictor.size
        # On the all-ones vector the inverse kernel is 1/(d − c + ck), elsewhere 1/(d − c).
        own = (NNGP_DIAGONAL - ORTHOGONAL) / (size * _GAP**2)
        total = (NNGP_DIAGONAL - ORTHOGONAL + ORTHOGONAL * size) / (size * (_GAP + ORTHOGONAL * size) ** 2)
        return own, (total - own) / size

    def _lengths(self, seen: Tensor) -> Tensor:
        """√E|r_i|² of every template, (templates, 1)."""
        return (seen.square().sum(1, keepdim=True) + seen.shape[1] * sum(self._noise())).sqrt()

    def _shift(self, labels: Tensor) -> Tensor:
        seen = _through_inverse(labels)
        return math.sqrt(self.predictor.size / self.width) / (2 * math.pi) * self._lengths(seen) * seen

    def _padded(self, matches: Tensor) -> Tensor:
        hot = matches.to(torch.float64)
        return torch.cat([hot, hot.new_zeros(len(hot), self.predictor.size - hot.shape[1])], 1)

    def bias(self, matches: Bool[Tensor, "states templates"]) -> Float64[Tensor, "states bits"]:
        """Compute by how much the ensemble's mean differs from that of infinite width.

        Args:
            matches: Which templates match each state, as from `TemplateSet.matches`, shape (states, templates).

        Returns:
            docs/theory.md, equation (40), shape (states, bits), in units of the labels: 0 for corrected labels. A
            template alone is a training point, where every member outputs what it was trained on: 0 for plain labels,
            −b for corrected ones. Nothing matches a state that is 0.
        """
        matched = matches.sum(1)
        matched_weight, unmatched_weight = self.predictor.weights(matched)
        moved = self.moved
        contrast = (matched_weight - unmatched_weight)[:, None]
        bias = contrast * (self._padded(matches) @ moved) + unmatched_weight[:, None] * moved.sum(0)
        alone = self._padded(matches) @ self.trained
        return bias.where(matched[:, None] > 1, alone.where(matched[:, None] == 1, 0.0))

    def variance(
        self, matches: Bool[Tensor, "states templates"], *, generator: torch.Generator, units: int = 1024
    ) -> VarianceEstimate:
        """Estimate the variance of one member's outputs at this width.

        That is the variance of infinite width, what the gates take from the initial function's part of it, and the
        expectation over one hidden unit (docs/theory.md, equations (44) to (46)). Of the unit only the hidden
        weights are drawn, with ``generator``; the average over its readout is exact.

        Args:
            matches: Which templates match each state, as from `TemplateSet.matches`, shape (states, templates).
            generator: A CPU generator; all randomness comes from it.
            units: How many units to draw, at least 2; 1,024 by default.

        Returns:
            Variance and its standard error, shape (states, bits), in squared units of the labels; both 0 where at
            most one template matches. Costs states · s · bits · units multiply-adds.

        Raises:
            OptionError: Fewer than 2 units.
        """
        if units < 2:
            raise OptionError("units", units, "an integer of at least 2")
        seen = _through_inverse(self.labels)
        shape = (len(matches), seen.shape[1])
        total, squares = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        done = 0
        while done < units:
            count = min(_UNITS_AT_ONCE, units - done)
            drawn = torch.randn(count, len(seen), generator=generator)
            block = _Units(drawn, seen.to(drawn.dtype), self._noise())
            for state, row in enumerate(matches):
                if int(row.sum()) > 1:
                    weights = [float(weight) for weight in self.predictor.weights(row.sum()[None])]
                    values = block.squares(row.nonzero().flatten(), *weights)
                    total[state] += values.sum(0, dtype=torch.float64)
                    squares[state] += values.square().sum(0, dtype=torch.float64)
            done += count
        mean = total / units
        error = ((squares / units - mean.square()).clamp_min(0) / (units - 1)).sqrt()
        independent = self.width / 2 if self.predictor.antisymmetric else self.width
        infinite = self.predictor.variance(matches.sum(1))[:, None] + self._gates(matches, seen)
        return VarianceEstimate(infinite + mean / independent, error / independent)

    def _gates(self, matches: Tensor, seen: Tensor) -> Tensor:
        """Return what the gates do to the initial function (docs/theory.md, equation (45))."""
        if self.predictor.antisymmetric:
            return seen.new_zeros(len(matches), seen.shape[1])
        size = self.predictor.size
        lengths = self._lengths(seen)
        scale = math.sqrt(size / self.width) / (2 * math.pi * _GAP)
        share = scale * (lengths + seen.square() / lengths)
        matched = matches.sum(1)
        on, off = (weight[:, None] for weight in self.predictor.weights(matched))
        excess = kappa1(matched.clamp_min(1).to(torch.float64).rsqrt())[:, None] - ORTHOGONAL
        total = matched[:, None] * (on - off) + size * off
        own = NNGP_DIAGONAL - ORTHOGONAL
        summed = own * total + ORTHOGONAL * size * (total - 1) - matched[:, None] * excess
        everywhere = ORTHOGONAL * (total - 1) - ORTHOGONAL / (_GAP + ORTHOGONAL * size) * summed
        inside = self._padded(matches) @ share
        outside = share.sum(0) - inside
        change = inside * on * (own * on + everywhere - excess) + outside * off * (own * off + everywhere)
        return (2 / size * change).where(matched[:, None] > 1, 0.0)


class _Units:
    """Hidden weights of some units, and what of equation (43) is the same for every state."""

    def __init__(self, hidden: Tensor, seen: Tensor, noise: tuple[float, float]) -> None:
        self._hidden, self._seen, self._noise = hidden, seen, noise
        active, values = (hidden > 0).to(hidden.dtype), hidden.relu()
        self._features, self._gated = values @ seen, active @ seen
        self._sum, self._square = values.sum(1), values.square().sum(1)
        self._count = active.sum(1)

    def squares(self, at: Tensor, on: float, off: float) -> Tensor:
        """E[ξ_j²] over the readout and the initial function, for each unit: (units, bits).

        Args:
            at: The templates that match the state, at least two.
            on: w_m.
            off: w_u.
        """
        contrast = on - off
        hidden = self._hidden.index_select(1, at)
        values, active = hidden.relu(), (hidden > 0).to(hidden.dtype)
        argument = hidden.sum(1) / math.sqrt(len(at))
        gap = argument.relu() - contrast * values.sum(1) - off * self._sum
        # x_i·1[w·x > 0] − v_i is this much above −w_u on the matching templates.
        inside = (argument > 0).to(values.dtype) / math.sqrt(len(at)) - contrast
        moved = inside[:, None] * (active @ self._seen.index_select(0, at)) - off * self._gated
        result = (gap[:, None] * self._features + moved).square() + moved.square()
        result += moved.square().sum(1, keepdim=True)
        own, shared = self._noise
        if own:
            # r varies too, with this covariance between templates, independently from bit to bit. The two quadratic
            # forms need the squares and the sums of g_i = (x_i·1[w·x > 0] − v_i)·1[w_i > 0] and of G·relu(w_i) + g_i.
            count = active.sum(1)
            gate = inside.square() * count - 2 * inside * off * count + off**2 * self._count
            cross = inside * values.sum(1) - off * self._sum
            both = gap.square() * self._square + 2 * gap * cross + gate
            gate_sum = inside * count - off * self._count
            both_sum = gap * self._sum + gate_sum
            form = own * gate + shared * gate_sum.square()
            result += (own * both + shared * both_sum.square() + (self._seen.shape[1] + 1) * form)[:, None]
        return result


def _through_inverse(labels: Tensor) -> Tensor:
    """(kΘ(X, X))⁻¹Y for X = I_k (docs/theory.md, equation (36))."""
    return (labels - ORTHOGONAL / (_GAP + ORTHOGONAL * len(labels)) * labels.sum(0)) / _GAP


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
        self.rows = rows_at_equal_distances(len(limit.mean), states_max)
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


def rows_at_equal_distances(states: int, states_max: int = _STATES_MAX) -> Int64[Tensor, " rows"]:
    """Return the indices of the evaluation states that stand for all: all, or as many as are wanted.

    Args:
        states: Number of evaluation states, at least 1.
        states_max: Number of states wanted at most; 1,024 by default.
    """
    count = min(states, states_max)
    return torch.arange(count) * states // count
