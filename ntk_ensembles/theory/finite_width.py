"""What a finite width adds to the infinitely wide ensemble, to first order (docs/theory.md, section 10).

Gates at the training inputs lose what they push through zero, and training makes up for it: the ensemble behaves as
if its labels were shifted by b, of order √(k/n). Beside that, each network has a kernel of its own, which adds a
variance of order 1/n. Both hold for X = I_k and training by the whitened loss in steps of about size 1
(`ntk_ensembles.ensemble.descent`). Where the readout alone is trained no gate moves: there is no such shift, whatever
the loss, and only the kernel's fluctuation is left (docs/theory.md, section 11). All this is an asymptotic estimate,
not a bound, for widths from `FiniteWidth.trusted_from` on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor
from torch.nn import functional

from ntk_ensembles.errors import OptionError, check_choice
from ntk_ensembles.theory.decoding import LimitPrediction, Prediction
from ntk_ensembles.theory.kernels import NNGP_DIAGONAL, ORTHOGONAL, Layers, kappa1
from ntk_ensembles.theory.predictor import TemplatePredictor

Labels = Literal["plain", "corrected"]
"""What members are trained on. ``plain``: the templates' labels Y. ``corrected``: Y − b, so that the ensemble's mean
approaches that of infinite width (docs/theory.md, equation (42))."""

LABELS: tuple[Labels, ...] = get_args(Labels)
"""All labels, the default first."""

_ITERATIONS = 100
"""Rounds that settle the corrected labels wherever the expansion holds; each reduces the error by about √(k/n)."""

_UNITS_AT_ONCE = 512
_OUTPUTS_AT_ONCE = 1 << 19
"""States times units times bits of one step of `FiniteWidth.variance`: enough for the threads, few for the cache."""

MOVEMENT_MAX = 0.6
"""Largest `FiniteWidth.movement` at which predictions are shown, about that of n = 5k for the tasks here.

Measured on addition of 10 bits (k = 40, 512 members) the predicted RMS deviation of N = 4 over the measured one was
1.04, 1.07, 1.10, 1.13 and 1.17 at n/k = 40, 20, 10, 7 and 5 for Gaussian members, and 0.99, 0.99, 0.99, 1.01 and 1.04
for antisymmetric ones. Below that the bias is predicted more than twice too large: at n/k = 3 by 2.6, at 2 by 3.2.
"""

_UNITS_PER_TEMPLATE = 3
"""Independent hidden units per template from which predictions are shown where the readout alone is trained."""


def check_labels(labels: Labels, layers: Layers) -> None:
    """Check that labels can be corrected, if they are to be.

    Args:
        labels: What members are trained on.
        layers: Which layers are trained.

    Raises:
        OptionError: ``labels`` is none of `LABELS`, or they are corrected where there is no bias to correct.
    """
    check_choice("labels", labels, LABELS)
    if labels == "corrected" and layers == "readout":
        raise OptionError("labels", labels, "plain where the readout alone is trained, whose mean has no such bias")


@dataclass(frozen=True)
class VarianceEstimate:
    """One member's variance at a finite width, which unlike that of infinite width differs from bit to bit."""

    variance: Float64[Tensor, "states bits"]
    """The variance of one member's outputs over initialisations."""

    error: Float64[Tensor, "states bits"]
    """The standard error of ``variance`` from the number of units drawn."""


class FiniteWidth:
    """The bias of the mean and the variance of members of a finite width.

    Args:
        predictor: Infinite-width theory of the same templates, padding, layers and initialisation.
        width: Number n of hidden units, at least 1.
        corrected: Whether members are trained on the labels less their shift (docs/theory.md, equation (42)), so that
            the ensemble's mean approaches that of infinite width.

    Attributes:
        predictor: As given.
        width: As given.
        labels: What members are trained on: Y, or Y − b. This and the next three have shape (templates, bits), float64,
            with the padding in the last rows.
        shift: The shift b of these labels (docs/theory.md, equation (39)), 0 where the readout alone is trained: the
            ensemble's mean is that of infinite width for ``labels + shift``.
        trained: ``labels`` less Y: 0, or −b.
        moved: ``labels + shift`` less Y: b, or 0.
        movement: √(k/n)·|r_i|, root mean square over templates: the share of its own scale by which a hidden weight
            moves in training; the expansion is in powers of it. 0 where the readout alone is trained.
        trusted_from: Width below which the expansion should not be used.

    Raises:
        OptionError: The width is less than 1, or so small that no labels can be corrected; or labels are to be
            corrected that have no shift.
    """

    def __init__(self, predictor: TemplatePredictor, width: int, *, corrected: bool = False) -> None:
        if width < 1:
            raise OptionError("width", width, "an integer of at least 1")
        check_labels("corrected" if corrected else "plain", predictor.kernel.layers)
        self.predictor = predictor
        self.width = width
        self._gap = predictor.kernel.gap
        wanted = predictor.labels
        self.labels = wanted
        self.shift = self._shift(wanted)
        if corrected:
            for _ in range(_ITERATIONS):
                before, self.labels = self.labels, wanted - self.shift
                self.shift = self._shift(self.labels)
                if bool((self.labels - before).abs().max() < 1e-14):
                    break
            else:
                raise OptionError("width", width, f"more: the shift of {len(wanted)} templates' labels does not settle")
        self.trained = self.labels - wanted
        self.moved = self.trained + self.shift
        if bool((self.moved.abs() <= 1e-13).all()):
            self.moved = torch.zeros_like(self.moved)
        if predictor.kernel.layers == "readout":
            self.movement = 0.0
            self.trusted_from = math.ceil(_UNITS_PER_TEMPLATE * predictor.size * width / self._independent)
        else:
            lengths = self._lengths(self._through_inverse(self.labels))
            self.movement = math.sqrt(predictor.size / width) * float(lengths.square().mean().sqrt())
            # Movement is of order √(k/n), and of plain labels exactly that.
            self.trusted_from = math.ceil(width * (self.movement / MOVEMENT_MAX) ** 2)

    @property
    def trusted(self) -> bool:
        """Whether the width is at least `trusted_from`."""
        return self.width >= self.trusted_from

    @property
    def _independent(self) -> float:
        """Number of hidden units that are drawn independently."""
        return self.width / (2 if self.predictor.antisymmetric else 1)

    def _through_inverse(self, labels: Tensor) -> Tensor:
        """Return r for these labels, (kΘ(X, X))⁻¹Y for X = I_k (docs/theory.md, equation (36))."""
        return (labels - ORTHOGONAL / (self._gap + ORTHOGONAL * len(labels)) * labels.sum(0)) / self._gap

    def _noise(self) -> tuple[float, float]:
        """Return own and shared: r has covariance own·I + shared·11ᵀ over initialisations (docs/theory.md, (41))."""
        if self.predictor.antisymmetric:
            return 0.0, 0.0
        size = self.predictor.size
        # On the all-ones vector the inverse kernel is 1/(d − c + ck), elsewhere 1/(d − c).
        own = (NNGP_DIAGONAL - ORTHOGONAL) / (size * self._gap**2)
        total = (NNGP_DIAGONAL - ORTHOGONAL + ORTHOGONAL * size) / (size * (self._gap + ORTHOGONAL * size) ** 2)
        return own, (total - own) / size

    def _lengths(self, seen: Tensor) -> Tensor:
        """Return √E|r_i|² of every template (docs/theory.md, equation (41)), shape (templates, 1)."""
        return (seen.square().sum(1, keepdim=True) + seen.shape[1] * sum(self._noise())).sqrt()

    def _shift(self, labels: Tensor) -> Tensor:
        """Return b for these labels (docs/theory.md, equation (39))."""
        if self.predictor.kernel.layers == "readout":
            return torch.zeros_like(labels)
        seen = self._through_inverse(labels)
        return math.sqrt(self.predictor.size / self.width) / (2 * math.pi) * self._lengths(seen) * seen

    def _padded(self, matches: Tensor) -> Tensor:
        return functional.pad(matches.to(torch.float64), (0, self.predictor.padding))

    def bias(self, matches: Bool[Tensor, "states templates"]) -> Float64[Tensor, "states bits"]:
        """Compute by how much the ensemble's mean differs from that of infinite width.

        Args:
            matches: Templates that match each state, as from `TemplateSet.matches`.

        Returns:
            The bias (docs/theory.md, equation (40)) in units of the labels: 0 for corrected labels. Where one template
            matches alone, a training point, every member outputs what it was trained on: there the bias is 0 for plain
            labels and −b for corrected ones. It is 0 where no template matches.
        """
        num_matches = matches.sum(1)
        w_m, w_u = (weight[:, None] for weight in self.predictor.weights(num_matches))
        padded = self._padded(matches)
        bias = (w_m - w_u) * (padded @ self.moved) + w_u * self.moved.sum(0)
        alone = padded @ self.trained
        return bias.where(num_matches[:, None] > 1, alone.where(num_matches[:, None] == 1, 0.0))

    def variance(
        self, matches: Bool[Tensor, "states templates"], *, generator: torch.Generator, units: int = 1024
    ) -> VarianceEstimate:
        """Estimate the variance of one member's outputs at this width.

        That is the variance of infinite width, what the gates change about the initial function's part of it, and the
        expectation over one hidden unit (docs/theory.md, equations (44) to (46); (49) where the readout alone is
        trained). Of the unit only the hidden weights are drawn; the average over its readout is exact.

        Args:
            matches: Templates that match each state, as from `TemplateSet.matches`.
            generator: Source of all randomness, on the CPU.
            units: Number of units to draw, at least 2.

        Returns:
            Variance and its standard error, in squared units of the labels; both 0 where at most one template matches.
            Costs states · s · bits · units multiply-adds.

        Raises:
            OptionError: Fewer than 2 units.
        """
        if units < 2:
            raise OptionError("units", units, "an integer of at least 2")
        seen = self._through_inverse(self.labels)
        independent = self._independent
        shape = (len(matches), seen.shape[1])
        total, squares = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        groups = _alike(matches, _OUTPUTS_AT_ONCE // (min(_UNITS_AT_ONCE, units) * shape[1]))
        done = 0
        while done < units:
            count = min(_UNITS_AT_ONCE, units - done)
            drawn = torch.randn(count, len(seen), generator=generator)
            block = self._units(drawn, seen.to(drawn.dtype))
            for rows, at in groups:
                weights = [float(weight) for weight in self.predictor.weights(torch.tensor([at.shape[1]]))]
                values = block.squares(at, *weights)
                total[rows] += values.sum(1, dtype=torch.float64)
                squares[rows] += values.square().sum(1, dtype=torch.float64)
            done += count
        mean = total / units
        error = ((squares / units - mean.square()).clamp_min(0) / (units - 1)).sqrt()
        infinite = self.predictor.variance(matches.sum(1))[:, None] + self._gates(matches, seen)
        return VarianceEstimate(infinite + mean / independent, error / independent)

    def _units(self, hidden: Tensor, seen: Tensor) -> _Units | _ReadoutUnits:
        if self.predictor.kernel.layers == "both":
            return _Units(hidden, seen, self._noise())
        inflation = self._independent / max(self._independent - self.predictor.size - 1, 1)
        return _ReadoutUnits(hidden, seen, self.labels.to(hidden.dtype), self._noise(), inflation)

    def _gates(self, matches: Tensor, seen: Tensor) -> Tensor:
        """Return what the gates add to the variance of the initial function (docs/theory.md, equation (45))."""
        if self.predictor.antisymmetric or self.predictor.kernel.layers == "readout":
            return seen.new_zeros(len(matches), seen.shape[1])
        size = self.predictor.size
        lengths = self._lengths(seen)
        scale = math.sqrt(size / self.width) / (2 * math.pi * self._gap)
        share = scale * (lengths + seen.square() / lengths)
        num_matches = matches.sum(1)
        w_m, w_u = (weight[:, None] for weight in self.predictor.weights(num_matches))
        excess = kappa1(num_matches.clamp_min(1).to(torch.float64).rsqrt())[:, None] - ORTHOGONAL
        total = num_matches[:, None] * (w_m - w_u) + size * w_u
        own = NNGP_DIAGONAL - ORTHOGONAL
        summed = own * total + ORTHOGONAL * size * (total - 1) - num_matches[:, None] * excess
        everywhere = ORTHOGONAL * (total - 1) - ORTHOGONAL / (self._gap + ORTHOGONAL * size) * summed
        inside = self._padded(matches) @ share
        outside = share.sum(0) - inside
        change = inside * w_m * (own * w_m + everywhere - excess) + outside * w_u * (own * w_u + everywhere)
        return (2 / size * change).where(num_matches[:, None] > 1, 0.0)


class _Units:
    """Hidden weights of some units, and what of docs/theory.md, equation (43) is the same for every state.

    Args:
        hidden: The weights, shape (units, templates).
        seen: r, from `FiniteWidth._through_inverse`.
        noise: Its covariance, from `FiniteWidth._noise`.
    """

    def __init__(self, hidden: Tensor, seen: Tensor, noise: tuple[float, float]) -> None:
        self._by_template, self._seen, self._noise = hidden.T.contiguous(), seen, noise
        active, values = (hidden > 0).to(hidden.dtype), hidden.relu()
        self._features, self._gated = values @ seen, active @ seen
        self._sum, self._square = values.sum(1), values.square().sum(1)
        self._count = active.sum(1)

    def squares(self, at: Tensor, w_m: float, w_u: float) -> Tensor:
        """Return E[ξ_j²] over the readout and the initial function, for each state and unit: (states, units, bits).

        Args:
            at: Templates that match each state, the same number for each and at least two: (states, matches).
            w_m: Their weight in the prediction.
            w_u: That of the other templates.
        """
        contrast, scale = w_m - w_u, 1 / math.sqrt(at.shape[1])
        hidden = self._by_template[at]
        values, active = hidden.relu(), (hidden > 0).to(hidden.dtype)
        argument, misfit = _misfit(hidden, values, self._sum, w_m, w_u)
        # On matching templates x_i·1[w·x > 0] − v_i is this much above −w_u.
        inside = scale * (argument > 0).to(values.dtype) - contrast
        psi = inside[..., None] * (active.mT @ self._seen[at]) - w_u * self._gated
        result = (misfit[..., None] * self._features + psi).square() + psi.square()
        result += psi.square().sum(2, keepdim=True)
        own, shared = self._noise
        if own:
            # r varies too, with this covariance between templates, independently from bit to bit. The two quadratic
            # forms need the squares and the sums of γ_i = (x_i·1[w·x > 0] − v_i)·1[w_i > 0] and of G·relu(w_i) + γ_i.
            count = active.sum(1)
            gate = inside.square() * count - 2 * inside * w_u * count + w_u**2 * self._count
            cross = inside * values.sum(1) - w_u * self._sum
            both = misfit.square() * self._square + 2 * misfit * cross + gate
            gate_sum = inside * count - w_u * self._count
            both_sum = misfit * self._sum + gate_sum
            form = own * gate + shared * gate_sum.square()
            result += (own * both + shared * both_sum.square() + (self._seen.shape[1] + 1) * form)[..., None]
        return result


class _ReadoutUnits:
    """Hidden weights of some units, and what of docs/theory.md, equation (49) is the same for every state.

    Args:
        hidden: As for `_Units`; ``seen`` and ``noise`` too.
        labels: Y, shape (templates, bits).
        inflation: n/(n − k − 1).
    """

    def __init__(
        self, hidden: Tensor, seen: Tensor, labels: Tensor, noise: tuple[float, float], inflation: float
    ) -> None:
        self._by_template = hidden.T.contiguous()
        values = hidden.relu()
        self._sum = values.sum(1)
        own, shared = noise
        taken = own * values.square().sum(1) + shared * self._sum.square()
        # The expectation of each factor is known, and only how they vary together is left to the draw.
        expected, taken_expected = (seen * labels).sum(0), 1.0 if own else 0.0
        self._expected = inflation * expected - taken_expected
        self._centred = inflation * ((values @ seen).square() - expected) - (taken - taken_expected)[:, None]

    def squares(self, at: Tensor, w_m: float, w_u: float) -> Tensor:
        """Return what equation (49) averages over units, for each: (states, units, bits); arguments as of `_Units`."""
        hidden = self._by_template[at]
        _, misfit = _misfit(hidden, hidden.relu(), self._sum, w_m, w_u)
        num_matches, others = at.shape[1], len(self._by_template) - at.shape[1]
        covered = num_matches * w_m * float(kappa1(torch.tensor(num_matches**-0.5, dtype=torch.float64)))
        expected = NNGP_DIAGONAL - covered - others * w_u * ORTHOGONAL
        return (misfit.square() - expected)[..., None] * self._centred + expected * self._expected


def _alike(matches: Tensor, most: int) -> list[tuple[Tensor, Tensor]]:
    """Group states by the number of templates that match them, if that is at least two, to work on few large tensors.

    Args:
        matches: Templates that match each state, (states, templates).
        most: Largest number of states in a group; less than 1 is taken for 1.

    Returns:
        Rows of states, (states,), and the templates that match them, (states, matches).
    """
    counts = matches.sum(1)
    return [
        (rows, matches[rows].nonzero()[:, 1].view(len(rows), -1))
        for count in sorted(set(counts.tolist()))
        if count > 1
        for rows in (counts == count).nonzero().flatten().split(max(most, 1))
    ]


def _misfit(hidden: Tensor, values: Tensor, total: Tensor, w_m: float, w_u: float) -> tuple[Tensor, Tensor]:
    """Return w·x and G of docs/theory.md, equation (43), (states, units) each.

    Args:
        hidden: w at the matching templates, (states, matches, units).
        values: relu(w) there.
        total: Σ_i relu(w_i) over all templates, (units,).
        w_m: As for `_Units.squares`.
        w_u: As for `_Units.squares`.
    """
    argument = hidden.sum(1) / math.sqrt(hidden.shape[1])
    return argument, argument.relu() - (w_m - w_u) * values.sum(1) - w_u * total


_STATES_MAX = 1024
_UNITS = 256
"""A few seconds for 16 cells of 8 bits and 1,000 states; their mean variance at n = 8,192 is then known to 3%."""


class WidthPrediction(Prediction):
    """Members of a finite width on a task's evaluation states: the limit's mean less the bias, and a larger variance.

    It decodes by the thresholds of infinite width, as any decoder does. An asymptotic estimate, not a bound.

    Args:
        limit: Infinite width on the same states.
        finite: Theory of the width, of the same templates and initialisation.
        units: Number of hidden units to draw for the variance, with a fixed seed.
        states_max: Largest number of states to predict.

    Attributes:
        finite: As given.
        rows: Indices of the evaluation states that are predicted, from `rows_at_equal_distances`.
        variance_error: Upper bound on the standard error of the mean variance, as a share of it.
    """

    def __init__(
        self, limit: LimitPrediction, finite: FiniteWidth, *, units: int = _UNITS, states_max: int = _STATES_MAX
    ) -> None:
        self.finite = finite
        self.rows = rows_at_equal_distances(len(limit.mean), states_max)
        matches = limit.evaluation.matches[self.rows]
        bias = self.finite.bias(matches)
        estimate = self.finite.variance(matches, generator=torch.Generator().manual_seed(0), units=units)
        # At a width below those to trust, what it takes away can outweigh the rest; a variance is not negative.
        variance: Float64[Tensor, "states bits"] = estimate.variance.clamp_min(0)
        # States and bits share the units drawn: their errors add up as they are at most.
        self.variance_error = float(estimate.error.mean() / variance.mean().clamp_min(torch.finfo(torch.float64).tiny))
        thresholds = {decoder: values[self.rows] for decoder, values in limit.thresholds.items()}
        next_states = limit.evaluation.next_states[self.rows]
        super().__init__(limit.mean[self.rows] + bias, variance, thresholds, next_states, bias)


def rows_at_equal_distances(states: int, states_max: int = _STATES_MAX) -> Int64[Tensor, " rows"]:
    """Return indices, at equal distances, of the evaluation states that stand for all.

    Args:
        states: Number of evaluation states, at least 1.
        states_max: Largest number of indices.
    """
    count = min(states, states_max)
    return torch.arange(count) * states // count
