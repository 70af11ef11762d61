"""Kernels of the infinitely wide two-layer ReLU network (docs/theory.md, section 4).

The network is f(x) = W2·relu(W1·x/√k)/√n with W1 ∈ R^{n×k}, W2 ∈ R^{m×n}, entries i.i.d. N(0, 1), no
biases; k is the input's dimension. As n → ∞ its outputs at initialisation are Gaussian with the NNGP kernel K.
Training moves them along a kernel too: the neural tangent kernel Θ if both layers are trained, K if the readout is.

Functions of a ``cosine`` ρ take it from −1 to 1; values outside (by rounding) count as the nearest end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ntk_ensembles.errors import check_choice

Layers = Literal["both", "readout"]
"""Which layers are trained. ``both``: W1 and W2. ``readout``: W2 alone, while W1 stays as it was drawn."""

LAYERS: tuple[Layers, ...] = get_args(Layers)
"""All choices of layers, the default first."""

NTK_DIAGONAL = 1.0
"""Value d = κ1(1) + κ0(1) of kΘ for a unit vector with itself."""

ORTHOGONAL = 1 / (2 * math.pi)
"""Value c = κ1(0) of kΘ, and of kK, for two orthogonal unit vectors."""

NNGP_DIAGONAL = 0.5
"""Value κ1(1) of kK for a unit vector with itself."""


def _kappas(cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Return κ0 and κ1 at an angle given by both its cosine and its sine."""
    # π − arccos ρ. Unlike arccos, arctan2 keeps full accuracy wherever the sine is accurate, and a
    # cosine past ±1 by rounding gives no nan.
    opening = torch.atan2(sine, -cosine)
    return opening / (2 * math.pi), (sine + opening * cosine) / (2 * math.pi)


def _profile(cosine: Tensor, sine: Tensor) -> Tensor:
    """Return κ1 + ρκ0 at an angle given by both its cosine and its sine."""
    zeroth, first = _kappas(cosine, sine)
    return first + cosine * zeroth


def _with_sine(cosine: Tensor) -> tuple[Tensor, Tensor]:
    # A product of rounded unit vectors passes ±1 by a few units in the last place, where the root
    # would be nan; the factored radicand loses nothing near ±1, as 1 − ρ² would.
    cosine = cosine.clamp(-1, 1)
    return cosine, ((1 - cosine) * (1 + cosine)).sqrt()


def kappa0(cosine: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return κ0(ρ) = (π − arccos ρ)/(2π): the chance that two unit Gaussians of correlation ρ are both positive."""
    return _kappas(*_with_sine(cosine))[0]


def kappa1(cosine: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return κ1(ρ) = (√(1−ρ²) + (π − arccos ρ)ρ)/(2π): E[relu(u)·relu(v)] of unit Gaussians of correlation ρ."""
    return _kappas(*_with_sine(cosine))[1]


def ntk_profile(cosine: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return κ1(ρ) + ρ·κ0(ρ), kΘ of two unit vectors at cosine ρ: `NTK_DIAGONAL` at 1, `ORTHOGONAL` at 0."""
    return _profile(*_with_sine(cosine))


def _geometry(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return |x||y|/k, cosine and sine for every pair of rows."""
    tiny = torch.finfo(x.dtype).tiny
    norms_x, norms_y = (torch.linalg.vector_norm(z, dim=1) for z in (x, y))
    # The floor lets a zero row stay zero; its kernels vanish by the scale below.
    unit_x, unit_y = x / norms_x.clamp_min(tiny)[:, None], y / norms_y.clamp_min(tiny)[:, None]
    # κ0 has an infinite slope at ±1, so a dot product off by 1e-16 there would cost 1e-8. The sum's and
    # the difference's norms give a sine accurate at both ends; cdist's shortcut through a matrix
    # product would lose that again.
    exact = "donot_use_mm_for_euclid_dist"
    difference = torch.cdist(unit_x, unit_y, compute_mode=exact)
    total = torch.cdist(unit_x, -unit_y, compute_mode=exact)
    scale = norms_x[:, None] * norms_y / x.shape[1]
    return scale, (total - difference) * (total + difference) / 4, total * difference / 2


def nngp(x: Float[Tensor, "left features"], y: Float[Tensor, "right features"]) -> Float[Tensor, "left right"]:
    """Return the NNGP kernel K(x, y) = |x||y|κ1(ρ)/k between all pairs of rows.

    Args:
        x: Inputs of any norm; a zero row has kernel 0 with everything.
        y: Inputs of the same dimension k, dtype and device.

    Returns:
        The covariance of the untrained network's outputs, in the inputs' dtype. Costs O(left·right·features) time,
        O(left·right) memory.
    """
    scale, cosine, sine = _geometry(x, y)
    return scale * _kappas(cosine, sine)[1]


def ntk(x: Float[Tensor, "left features"], y: Float[Tensor, "right features"]) -> Float[Tensor, "left right"]:
    """Return the neural tangent kernel Θ(x, y) = |x||y|(κ1(ρ) + ρκ0(ρ))/k between all pairs of rows.

    Args:
        x: Inputs of any norm; a zero row has kernel 0 with everything.
        y: Inputs of the same dimension k, dtype and device.

    Returns:
        The inner products of the network's gradients in all weights, in the inputs' dtype, at the cost of `nngp`.
    """
    scale, cosine, sine = _geometry(x, y)
    return scale * _profile(cosine, sine)


@dataclass(frozen=True)
class TrainingKernel:
    """The kernel along which training moves outputs, Θ or K, with its constants (docs/theory.md, equation (47)).

    Attributes:
        layers: Which layers are trained.

    Raises:
        OptionError: ``layers`` is none of `LAYERS`.
    """

    layers: Layers = "both"

    def __post_init__(self) -> None:
        check_choice("layers", self.layers, LAYERS)

    @property
    def diagonal(self) -> float:
        """Value d of k times the kernel for a unit vector with itself."""
        return NTK_DIAGONAL if self.layers == "both" else NNGP_DIAGONAL

    @property
    def gap(self) -> float:
        """Difference d − c: k times the eigenvalue of the kernel on X = I_k, off the all-ones vector."""
        return self.diagonal - ORTHOGONAL

    def profile(self, cosine: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return k times the kernel of two unit vectors: a(ρ) = κ1(ρ) + ρκ0(ρ), or κ1(ρ) for the readout."""
        return ntk_profile(cosine) if self.layers == "both" else kappa1(cosine)

    def __call__(
        self, x: Float[Tensor, "left features"], y: Float[Tensor, "right features"]
    ) -> Float[Tensor, "left right"]:
        """Return `ntk`, or `nngp` for the readout, between all pairs of rows."""
        return ntk(x, y) if self.layers == "both" else nngp(x, y)

    def cholesky(self, inputs: Float64[Tensor, "templates features"]) -> Float64[Tensor, "templates templates"]:
        """Factor the kernel's matrix on training inputs: the lower triangular L with LLᵀ = Θ(X, X), or K(X, X).

        Args:
            inputs: X, one training input a row.

        Raises:
            ValueError: The matrix is singular in double precision: a zero row, or a row parallel to an earlier one
                (either kernel is homogeneous in the norm, so scaling does not tell inputs apart).
        """
        kernel = self(inputs, inputs)
        factor: Tensor
        factor, failed_at = torch.linalg.cholesky_ex(kernel)
        # A squared pivot is what the earlier rows leave unexplained of this one; below this share of the
        # diagonal it is rounding.
        unexplained = factor.diagonal() ** 2 <= len(inputs) * torch.finfo(kernel.dtype).eps * kernel.diagonal()
        row = int(failed_at) - 1 if int(failed_at) else int(unexplained.nonzero()[0]) if unexplained.any() else -1
        if row >= 0:
            symbol = "Θ" if self.layers == "both" else "K"
            raise ValueError(f"{symbol}(X, X) of {len(inputs)} inputs is singular: {_why_singular(inputs, row)}")
        return factor


def check_finite(name: str, rows: Float[Tensor, "rows numbers"]) -> None:
    """Check that data have no number that is infinite or NaN.

    Args:
        name: What the data are, for the message.
        rows: The data, one example a row.

    Raises:
        ValueError: There is one.
    """
    if not rows.isfinite().all():
        row = int((~rows.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name}: row {row} has a number that is not finite")


def parallel_rows(inputs: Float[Tensor, "rows features"], sine_max: float) -> tuple[int, int] | None:
    """Find two rows that point in the same direction.

    Args:
        inputs: Rows of any norm, shape (rows, features); zero rows are parallel to none.
        sine_max: The sine of the largest angle that still counts as none.

    Returns:
        The positions of the first such pair, the smaller one first; None if there is none.
    """
    _, cosine, sine = _geometry(inputs, inputs)
    parallel = ((cosine > 0) & (sine < sine_max)).tril(-1).nonzero()
    if not len(parallel):
        return None
    later, earlier = parallel[0].tolist()
    return earlier, later


def _why_singular(inputs: Tensor, row: int) -> str:
    if not inputs[row].any():
        return f"row {row} is zero"
    pair = parallel_rows(inputs[: row + 1], math.sqrt(torch.finfo(inputs.dtype).eps))
    if pair is not None:
        return f"rows {pair[0]} and {pair[1]} are parallel; keep one of them"
    return f"row {row} is determined by earlier rows to double precision"


class InverseKernel:
    """Θ(X, X)⁻¹, applied on the right of residuals: R ↦ R·Θ(X, X)⁻¹ (docs/theory.md, section 8).

    Where the readout alone is trained, K(X, X)⁻¹ in its place. Build it with `for_one_hot` or `from_inputs`.

    Attributes:
        eigenvalue_bounds: Smallest and largest eigenvalue of the kernel's matrix.
    """

    def __init__(
        self, templates: int, kernel: TrainingKernel, inverse: Tensor | None, eigenvalue_bounds: tuple[float, float]
    ) -> None:
        self._templates = templates
        self._kernel = kernel
        self._inverse = inverse
        self.eigenvalue_bounds = eigenvalue_bounds

    @classmethod
    def for_one_hot(cls, templates: int, layers: Layers = "both") -> InverseKernel:
        """Make the inverse for X = I_k, in closed form (docs/theory.md, equation (17)): nothing is stored.

        Args:
            templates: Number of training inputs k, at least 1.
            layers: Which layers are trained.

        Raises:
            ValueError: There is no template.
        """
        if templates < 1:
            raise ValueError(f"got {templates} templates; the kernel needs at least 1")
        kernel = TrainingKernel(layers)
        smallest = kernel.gap / templates
        # One template leaves only the all-ones direction.
        largest = smallest + ORTHOGONAL
        return cls(templates, kernel, None, (largest if templates == 1 else smallest, largest))

    @classmethod
    def from_inputs(cls, inputs: Float64[Tensor, "templates features"], layers: Layers = "both") -> InverseKernel:
        """Make the inverse for any X by a float64 Cholesky factorisation: O(k³) time, once, and k² numbers kept.

        Args:
            inputs: Training inputs X, one a row.
            layers: Which layers are trained.

        Raises:
            ValueError: The kernel's matrix is singular (a zero row, parallel rows).
        """
        kernel = TrainingKernel(layers)
        factor = kernel.cholesky(inputs)
        eigenvalues = torch.linalg.eigvalsh(factor @ factor.T)
        bounds = float(eigenvalues[0]), float(eigenvalues[-1])
        return cls(len(inputs), kernel, torch.cholesky_inverse(factor), bounds)

    def __call__(self, residual: Float[Tensor, "*batch templates"]) -> Float[Tensor, "*batch templates"]:
        """Return R·Θ(X, X)⁻¹, in the dtype and on the device of ``residual``.

        For one-hot inputs, by Sherman–Morrison: k/(d−c)·(R − c/(d − c + c·k)·(R·1)1ᵀ).

        Args:
            residual: Residuals R, the last axis over training inputs; any leading axes (members, bits).

        Raises:
            ValueError: The last axis does not have length k.
        """
        if residual.shape[-1] != self._templates:
            raise ValueError(f"got residuals on {residual.shape[-1]} training inputs; the kernel has {self._templates}")
        if self._inverse is not None:
            return residual @ self._inverse.to(residual)
        gap = self._kernel.gap
        shared = ORTHOGONAL / (gap + ORTHOGONAL * self._templates)
        return self._templates / gap * (residual - shared * residual.sum(-1, keepdim=True))
