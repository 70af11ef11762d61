"""Kernels against integrals, against real networks' gradients, and Θ⁻¹ against numpy's inverse."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import Tensor

from ntk_ensembles.theory.kernels import (
    NNGP_DIAGONAL,
    NTK_DIAGONAL,
    ORTHOGONAL,
    InverseKernel,
    TrainingKernel,
    kappa0,
    kappa1,
    nngp,
    ntk,
    ntk_profile,
    parallel_rows,
)

COSINES = [-0.999, -0.7, -0.2, 0.0, 1e-3, 0.3, 1 / math.sqrt(2), 0.95, 0.9999]


def random_inputs(seed: int, rows: int, features: int) -> Tensor:
    """Gaussian rows of a seed, float64."""
    return torch.randn(rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def given_u(integrand: object, rho: float) -> float:
    """∫_{u>0} integrand(u, mean and deviation of v given u)·φ(u) du by adaptive quadrature."""
    deviation = math.sqrt((1 - rho) * (1 + rho))
    # 12 standard deviations hold all but 1e-32; break points help where Φ is steep.
    value, _ = integrate.quad(
        lambda u: integrand(u, rho * u, deviation) * stats.norm.pdf(u),  # type: ignore[operator]
        0,
        12,
        points=[0.1, 1.0],
        epsabs=1e-13,
        epsrel=1e-12,
        limit=200,
    )
    return float(value)


@pytest.mark.parametrize("rho", COSINES)
def test_kappas_are_the_gaussian_integrals(rho: float) -> None:
    """E over correlated Gaussians, conditioning v on u: Φ for the step, μΦ + σφ for relu."""
    cosine = torch.tensor(rho, dtype=torch.float64)
    both_positive = given_u(lambda u, mean, sd: stats.norm.cdf(mean / sd), rho)
    relu_product = given_u(
        lambda u, mean, sd: u * (mean * stats.norm.cdf(mean / sd) + sd * stats.norm.pdf(mean / sd)), rho
    )
    # The quadrature's own tolerance.
    assert float(kappa0(cosine)) == pytest.approx(both_positive, abs=1e-11)
    assert float(kappa1(cosine)) == pytest.approx(relu_product, abs=1e-11)
    assert float(ntk_profile(cosine)) == pytest.approx(relu_product + rho * both_positive, abs=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kappas_are_guarded_and_keep_their_dtype(dtype: torch.dtype) -> None:
    """Cosines past ±1 by rounding give the ends' values; the named constants are exact."""
    beyond = torch.tensor([-1 - 1e-6, -1.0, 0.0, 1.0, 1 + 1e-6], dtype=dtype)
    for kappa, ends in ((kappa0, (0.0, 0.25, 0.5)), (kappa1, (0.0, ORTHOGONAL, NNGP_DIAGONAL))):
        values = kappa(beyond)
        assert values.dtype == dtype
        assert values.shape == beyond.shape
        expected = torch.tensor([ends[0], ends[0], ends[1], ends[2], ends[2]], dtype=dtype)
        torch.testing.assert_close(values, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert float(ntk_profile(beyond)[3]) == NTK_DIAGONAL
    assert float(ntk_profile(beyond)[2]) == pytest.approx(ORTHOGONAL, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("distance", [1e-15, 1e-12, 1e-9, 1e-4])
def test_kappas_are_exact_next_to_the_ends(distance: float) -> None:
    """Where κ0 is steepest, of the very cosine that is given: mpmath has 50 digits."""
    with mpmath.workdps(50):
        for cosine in (1 - distance, -1 + distance):
            rho = mpmath.mpf(cosine)
            opening, sine = mpmath.pi - mpmath.acos(rho), mpmath.sqrt(1 - rho**2)
            zeroth, first = opening / (2 * mpmath.pi), (sine + opening * rho) / (2 * mpmath.pi)
            given = torch.tensor(cosine, dtype=torch.float64)
            assert abs(float(kappa0(given)) - zeroth) < 2e-16
            assert abs(float(kappa1(given)) - first) < 2e-16


def test_only_rows_of_one_direction_are_parallel() -> None:
    rows = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, -5.0]], dtype=torch.float64)
    assert parallel_rows(rows, 1e-8) is None
    assert parallel_rows(torch.cat([rows, rows[2:3] / 7]), 1e-8) == (2, 5)


def test_kernels_are_those_of_a_wide_network() -> None:
    """Autograd of one wide network with the scales 1/√k, 1/√n: Σ of gradient products over hidden units."""
    features, width = 3, 200_000
    inputs = torch.tensor([[1.0, 2.0, -1.0], [0.5, -0.3, 0.2], [-1.0, 0.1, 3.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(width, features, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(1, width, generator=generator, dtype=torch.float64, requires_grad=True)
    outputs = second @ torch.relu(first @ inputs.T / features**0.5) / width**0.5
    gradients = [torch.autograd.grad(outputs[0, i], (first, second), retain_graph=True) for i in range(3)]
    tangent, covariance = ntk(inputs, inputs), nngp(inputs, inputs)
    for i in range(3):
        for j in range(3):
            # Hidden units are independent, so their contributions give the standard error as well. The
            # gradient in W2 alone is the covariance of outputs given W1.
            by_second = width * gradients[i][1][0] * gradients[j][1][0]
            by_both = by_second + width * (gradients[i][0] * gradients[j][0]).sum(1)
            for samples, kernel in ((by_both, tangent), (by_second, covariance)):
                standard_error = float(samples.std()) / width**0.5
                assert abs(float(samples.mean() - kernel[i, j])) < 4.5 * standard_error


def test_kernels_of_general_inputs() -> None:
    """Norms factor out, zero rows give 0, equal and opposite rows give the ends' exact values."""
    x, y = random_inputs(0, 5, 4), random_inputs(1, 3, 4)
    x[2] = 0
    norms = x.norm(dim=1)[:, None] * y.norm(dim=1) / 4
    cosine = torch.where(norms > 0, x @ y.T / (4 * norms).clamp_min(1e-300), 0.0)
    # Away from the ends the plain dot product is accurate too.
    torch.testing.assert_close(nngp(x, y), norms * kappa1(cosine), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(ntk(x, y), norms * (kappa1(cosine) + cosine * kappa0(cosine)), rtol=1e-13, atol=1e-15)
    assert not ntk(x, y)[2].any()
    assert not nngp(x, y)[2].any()
    square = x.square().sum(1) / 4
    torch.testing.assert_close(ntk(x, x).diagonal(), square * NTK_DIAGONAL, rtol=1e-14, atol=0)
    torch.testing.assert_close(nngp(x, x).diagonal(), square * NNGP_DIAGONAL, rtol=1e-14, atol=0)
    torch.testing.assert_close(ntk(x, -3 * x).diagonal(), torch.zeros_like(square), rtol=0, atol=1e-14)
    torch.testing.assert_close(ntk(x, 3 * x).diagonal(), 3 * square, rtol=1e-14, atol=0)


def test_kernels_on_the_identity() -> None:
    """kΘ(I, I) = (d − c)I + c11ᵀ and kK(I, I) = (1/2 − c)I + c11ᵀ."""
    eye, ones = torch.eye(6, dtype=torch.float64), torch.ones(6, 6, dtype=torch.float64)
    c = 1 / (2 * math.pi)
    torch.testing.assert_close(6 * ntk(eye, eye), (1 - c) * eye + c * ones, rtol=1e-15, atol=0)
    torch.testing.assert_close(6 * nngp(eye, eye), (0.5 - c) * eye + c * ones, rtol=1e-15, atol=0)


@given(st.integers(1, 40), st.sampled_from([(), (3,), (2, 3), (2, 1, 4)]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_inverse_kernel_of_the_identity(templates: int, leading: tuple[int, ...], seed: int) -> None:
    """Sherman–Morrison, the Cholesky route and numpy's inverse agree; bounds are numpy's eigenvalues."""
    eye = torch.eye(templates, dtype=torch.float64)
    residual = torch.randn(*leading, templates, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    c = 1 / (2 * math.pi)
    kernel = ((1 - c) * np.eye(templates) + c) / templates
    expected = torch.from_numpy(residual.numpy() @ np.linalg.inv(kernel))
    closed, general = InverseKernel.for_one_hot(templates), InverseKernel.from_inputs(eye)
    # Entries are sums of k terms up to k/(1 − c) times the residual's.
    scale = 1e-14 * templates**1.5
    torch.testing.assert_close(closed(residual), expected, rtol=1e-12, atol=scale)
    torch.testing.assert_close(general(residual), expected, rtol=1e-12, atol=scale)
    eigenvalues = np.linalg.eigvalsh(kernel)
    for inverse in (closed, general):
        assert inverse.eigenvalue_bounds == pytest.approx((eigenvalues[0], eigenvalues[-1]), rel=1e-12)


def test_inverse_kernel_of_general_inputs() -> None:
    """R·Θ⁻¹·Θ gives R back for arbitrary inputs, in every leading shape."""
    inputs = random_inputs(3, 7, 5)
    inverse = InverseKernel.from_inputs(inputs)
    residual = random_inputs(4, 6, 7).reshape(2, 3, 7)
    expected = residual.numpy() @ np.linalg.inv(ntk(inputs, inputs).numpy())
    # Θ's condition number is about 1e2 here.
    np.testing.assert_allclose(inverse(residual).numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inverse_kernel_computes_in_the_residuals_dtype(dtype: torch.dtype) -> None:
    """Rounding of the low precision only: a few units in the last place of the largest entry."""
    residual = random_inputs(5, 3, 9)
    for inverse in (InverseKernel.for_one_hot(9), InverseKernel.from_inputs(torch.eye(9, dtype=torch.float64))):
        low, full = inverse(residual.to(dtype)), inverse(residual)
        assert low.dtype == dtype
        assert low.shape == residual.shape
        atol = 8 * torch.finfo(dtype).eps * float(full.abs().max())
        torch.testing.assert_close(low.double(), full, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1.0, 2.0], [3.0, 1.0], [1.0, 2.0]], "rows 0 and 2 are parallel"),
        ([[0.0, 1.0], [0.1, 0.7], [0.3, 2.1]], "rows 1 and 2 are parallel"),
        ([[1.0, 0.0], [0.0, 0.0]], "row 1 is zero"),
    ],
)
def test_singular_kernels_are_named(rows: list[list[float]], message: str) -> None:
    """The error says which rows to look at."""
    with pytest.raises(ValueError, match=message):
        InverseKernel.from_inputs(torch.tensor(rows, dtype=torch.float64))


def test_opposite_rows_are_not_singular() -> None:
    """Θ(x, −x) = 0, so opposite rows are orthogonal features; more rows than dimensions are fine too."""
    inputs = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    factor = TrainingKernel().cholesky(inputs)
    torch.testing.assert_close(factor @ factor.T, ntk(inputs, inputs), rtol=1e-14, atol=1e-15)


def test_inverse_kernel_refuses_wrong_sizes() -> None:
    """Got, expected."""
    with pytest.raises(ValueError, match="residuals on 4 training inputs; .* has 5"):
        InverseKernel.for_one_hot(5)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least 1"):
        InverseKernel.for_one_hot(0)
