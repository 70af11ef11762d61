"""Mean and variance of the trained infinitely wide ensemble (docs/theory.md, sections 5 and 6).

Trained to convergence on (X, Y), the network's outputs at inputs x are Gaussian over initialisations,
independent from bit to bit. With v(x) = Θ(X, X)⁻¹Θ(X, x), and K in place of Θ where the readout alone is trained,

    mean(x)    = v(x)ᵀY
    cov(x, x') = K(x, x') + v(x)ᵀK(X, X)v(x') − v(x)ᵀK(X, x') − K(x, X)v(x').

`TemplatePredictor` evaluates both in closed form for X = I_k; `posterior` solves them for any X.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional

from ntk_ensembles.errors import check_range
from ntk_ensembles.templates import TemplateSet
from ntk_ensembles.theory.kernels import (
    NNGP_DIAGONAL,
    ORTHOGONAL,
    Layers,
    TrainingKernel,
    check_finite,
    kappa1,
    nngp,
    parallel_rows,
)

PADDING_MAX = 1 << 24
"""Padding templates that a predictor has at most."""


@dataclass(frozen=True)
class Gaussian:
    """Mean and variance of one member's outputs over random initialisations.

    The average of N members has the same mean and 1/N of the variance.
    """

    mean: Float64[Tensor, "states bits"]
    """Output of an ensemble of infinitely many members."""

    variance: Float64[Tensor, " states"]
    """Variance of every bit of a state; bits are independent."""


class Posterior(NamedTuple):
    """Mean and covariance of one member's outputs at some inputs; bits are independent, with the same covariance."""

    mean: Float64[Tensor, "inputs bits"]
    covariance: Float64[Tensor, "inputs inputs"]


class TemplatePredictor:
    """The infinitely wide ensemble trained on a task's templates, as look-ups by s, C_j and F_j.

    A prediction depends on the input only through s (the number of templates that match) and, for each bit j, on C_j
    (the number of these that set it) and F_j (the number of all that set it). The tables over all possible s are made
    once, in float64, in time proportional to the number of templates. Methods take ``num_matches``, s of each state
    from 0 to ``len(templates)``, or ``matches``, as from `TemplateSet.matches`: which templates match each state, any
    subset of them.

    Args:
        templates: Templates of the task: X = I_k, Y = their labels.
        padding: Number of padding templates: they set no bit and match no state, but count towards k. The paper adds
            them to make the sign decoder exact; 0 to 16777216.
        layers: Which layers are trained: "both", or "readout" alone, whose kernel is K.
        antisymmetric: Members start at exactly 0 (antisymmetric initialisation). Their initial outputs are all that
            varies from member to member at infinite width, so every variance is 0; the mean is the same.

    Attributes:
        templates: Templates of the task, without the padding.
        padding: As given.
        size: Size k of the training set, with the padding.
        fan_in: F_j, the number of templates that set bit j.
        kernel: The kernel along which training moves outputs.
        antisymmetric: As given.

    Raises:
        OptionError: The padding is outside its range, or ``layers`` unknown.
    """

    def __init__(
        self, templates: TemplateSet, padding: int = 0, *, layers: Layers = "both", antisymmetric: bool = False
    ) -> None:
        check_range("padding", padding, 0, PADDING_MAX)
        self.templates = templates
        self.padding = padding
        self.kernel = TrainingKernel(layers)
        self.antisymmetric = antisymmetric
        self.size = len(templates) + padding
        self.fan_in = templates.fan_in
        num_matches = torch.arange(len(templates) + 1, dtype=torch.float64)
        cosine = num_matches.clamp_min(1).rsqrt()
        gap = self.kernel.gap
        excess = self.kernel.profile(cosine) - ORTHOGONAL
        # 1 − T/(d − c + ck) over one denominator: no cancellation for large k, and exactly 0 at s = 1.
        unmatched_weight = ORTHOGONAL * (gap - num_matches * excess) / (gap + ORTHOGONAL * self.size) / gap
        # Nothing matches the zero input, and a network without biases is 0 there.
        some = num_matches > 0
        self._unmatched_weight = unmatched_weight * some
        self._contrast = excess / gap * some
        self._kappa1_excess = (kappa1(cosine) - ORTHOGONAL) * some
        counts = torch.arange(len(templates) + 1)
        # A variance is not negative; the sum's last rounding can be.
        self._variance = self._covariance(counts, counts, num_matches).clamp_min(0)

    def _covariance(self, left: Tensor, right: Tensor, overlap: Tensor) -> Tensor:
        """Return cov(x, x') from s = ``left``, s' = ``right`` and |A ∩ A'| (docs/theory.md, equations (22) and (23)).

        Arguments broadcast. v(x) is w_m − w_u ("contrast") on the matched templates plus w_u ("base") everywhere, and
        kK(X, x') is κ1(ρ') − c on the matched ones plus c everywhere, so every product of the two is a count.
        """
        contrast, contrast_right = self._contrast[left], self._contrast[right]
        base, base_right = self._unmatched_weight[left], self._unmatched_weight[right]
        excess, excess_right = self._kappa1_excess[left], self._kappa1_excess[right]
        prior = kappa1(overlap / (left * right).clamp_min(1).to(overlap.dtype).sqrt())
        weights = contrast * contrast_right * overlap + self.size * base * base_right
        weights = weights + left * contrast * base_right + right * contrast_right * base
        total, total_right = left * contrast + self.size * base, right * contrast_right + self.size * base_right
        cross = contrast * excess_right * overlap + right * excess_right * base + ORTHOGONAL * total
        cross_back = contrast_right * excess * overlap + left * excess * base_right + ORTHOGONAL * total_right
        spread = (NNGP_DIAGONAL - ORTHOGONAL) * weights + ORTHOGONAL * total * total_right
        covariance = (prior + spread - (cross + cross_back)) / self.size
        if self.antisymmetric:
            return torch.zeros_like(covariance)
        # A single matched template is a training point, which every member interpolates; and a network
        # without biases is constantly 0 at the zero input.
        return covariance.where((left > 1) & (right > 1), 0.0)

    @cached_property
    def labels(self) -> Float64[Tensor, "templates bits"]:
        """Labels Y of the whole training set, those of padding (zeros) in the last rows; shape (size, bits)."""
        return functional.pad(self.templates.labels.to(torch.float64), (0, 0, 0, self.padding))

    def encode(self, matches: Bool[Tensor, "states templates"]) -> Float64[Tensor, "states size"]:
        """Return the networks' inputs, as `TemplateSet.encode`, with zeros for the padding in the last columns."""
        return functional.pad(self.templates.encode(matches), (0, self.padding))

    def weights(
        self, num_matches: Int[Tensor, " states"]
    ) -> tuple[Float64[Tensor, " states"], Float64[Tensor, " states"]]:
        """Return w_m and w_u: what each matching and each other template that sets a bit adds to its mean.

        Both are 0 where s = 0.
        """
        unmatched_weight = self._unmatched_weight[num_matches]
        return unmatched_weight + self._contrast[num_matches], unmatched_weight

    def variance(self, num_matches: Int[Tensor, " states"]) -> Float64[Tensor, " states"]:
        """Return the variance of one member's output, the same for every bit; exactly 0 where s is 0 or 1."""
        return self._variance[num_matches]

    def mean(
        self,
        num_matches: Int[Tensor, " states"],
        set_counts: Int[Tensor, "states bits"],
        fan_in: Int[Tensor, " bits"],
    ) -> Float64[Tensor, "states bits"]:
        """Return w_m·C_j + w_u·(F_j − C_j), the mean output of infinitely many, infinitely wide members.

        Args:
            num_matches: Number of matching templates s.
            set_counts: Number C_j of matching templates that set bit j.
            fan_in: Number F_j of all templates that set bit j.
        """
        matched_weight, unmatched_weight = self.weights(num_matches)
        return matched_weight[:, None] * set_counts + unmatched_weight[:, None] * (fan_in - set_counts)

    def predict(self, matches: Bool[Tensor, "states templates"]) -> Gaussian:
        """Return mean and variance of one member's outputs at every state."""
        num_matches = matches.sum(1)
        return Gaussian(
            self.mean(num_matches, self.templates.set_counts(matches), self.fan_in), self.variance(num_matches)
        )

    def covariance(self, matches: Bool[Tensor, "states templates"]) -> Float64[Tensor, "states states"]:
        """Return the covariance of one member's outputs between states, the same for every bit.

        It is symmetric to the bit, with `variance` on its diagonal and zero rows where s is 0 or 1. Costs one product
        states × templates × states and about ten states × states float64 matrices while it runs.
        """
        hot = matches.to(torch.float64)
        num_matches = matches.sum(1)
        covariance = self._covariance(num_matches[:, None], num_matches[None, :], hot @ hot.T)
        covariance.diagonal().copy_(self.variance(num_matches))
        # Exchanging the inputs changes the order of rounding.
        return (covariance + covariance.T) / 2


_FLOAT32_SINE = 5e-7
"""Two float32 rows at an angle with a smaller sine may have been parallel before they were rounded."""


def posterior(
    inputs: Float[Tensor, "templates features"],
    labels: Float[Tensor, "templates bits"],
    test_inputs: Float[Tensor, "inputs features"],
    layers: Layers = "both",
) -> Posterior:
    """Predict mean and covariance after training on any inputs, by Cholesky factorisation.

    ``"both"`` is the infinitely wide network of which all weights were trained to convergence
    (docs/theory.md, equations (16) and (20)). ``"readout"`` is that of which only the Gaussian readout was
    (docs/theory.md, equation (21)); this is also the NNGP posterior: Bayesian inference with the untrained network as
    the prior and noise-free labels. From antisymmetric initialisation the mean is the same for either, and at infinite
    width the covariance is 0.

    Everything is computed in float64. float32 arguments are converted; that does not bring back what
    rounding to float32 took from them.

    Args:
        inputs: X, one training input a row; no zero and no parallel rows.
        labels: Y, the target of each.
        test_inputs: Where to predict; zero rows are predicted 0 with variance 0.
        layers: Which layers are trained.

    Returns:
        Mean and covariance, float64. Costs O(k³) time for k training inputs.

    Raises:
        OptionError: ``layers`` is none of `LAYERS`.
        ValueError: Shapes do not fit together, a number is not finite, or the kernel's matrix is singular (a zero row,
            parallel rows; of float32 rows also those that are parallel up to rounding).
    """
    kernel = TrainingKernel(layers)
    _check_shapes(inputs, labels, test_inputs)
    if inputs.dtype != torch.float64 and (pair := parallel_rows(inputs.to(torch.float64), _FLOAT32_SINE)):
        raise ValueError(f"rows {pair[0]} and {pair[1]} of the inputs are parallel up to rounding; keep one of them")
    x, y, new = (value.to(torch.float64) for value in (inputs, labels, test_inputs))
    solution = torch.cholesky_solve(kernel(x, new), kernel.cholesky(x))
    cross = solution.T @ nngp(x, new)
    if layers == "readout":
        covariance = nngp(new, new) - cross
    else:
        covariance = nngp(new, new) + solution.T @ nngp(x, x) @ solution - cross - cross.T
    # Symmetric but for rounding; now to the bit.
    return Posterior(solution.T @ y, (covariance + covariance.T) / 2)


def _check_shapes(inputs: Tensor, labels: Tensor, test_inputs: Tensor) -> None:
    for name, value in (("inputs", inputs), ("labels", labels), ("test_inputs", test_inputs)):
        if value.ndim != 2:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: expected two axes, one example a row")
        check_finite(name, value)
    if not len(inputs):
        raise ValueError("inputs without rows: expected at least one training input")
    if len(labels) != len(inputs):
        raise ValueError(f"{len(labels)} rows of labels for {len(inputs)} rows of inputs: expected one for each")
    if test_inputs.shape[1] != inputs.shape[1]:
        raise ValueError(
            f"test_inputs of {test_inputs.shape[1]} features for inputs of {inputs.shape[1]}: expected as many"
        )
