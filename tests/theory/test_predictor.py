"""The closed form against the published vectors, the formulas written out, numpy's solver and the Cholesky oracle."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntk_ensembles.errors import OptionError
from ntk_ensembles.tasks import Addition
from ntk_ensembles.templates import StateLayout, Template, TemplateSet
from ntk_ensembles.theory import LAYERS, Layers, TemplatePredictor, posterior
from ntk_ensembles.theory.predictor import PADDING_MAX

Array = npt.NDArray[np.float64]


def template_set(labels: Tensor) -> TemplateSet:
    """Templates with the given output bits; their conditions are immaterial here."""
    rules = [Template.rule("row", ones=[0], sets=row.nonzero().flatten().tolist()) for row in labels]
    return TemplateSet(StateLayout(bit=labels.shape[1]), rules)


def plain(templates: int) -> TemplatePredictor:
    """A predictor of k templates that each set one bit of their own."""
    return TemplatePredictor(template_set(torch.eye(templates, dtype=torch.bool)))


def random_case(seed: int, templates: int, bits: int, states: int) -> tuple[TemplateSet, Tensor]:
    """Random labels and random matches, the zero state and a training point among them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(templates, bits, generator=generator) < torch.rand(1, generator=generator)
    matches = torch.rand(states, templates, generator=generator) < torch.rand(states, 1, generator=generator)
    matches[0] = False
    matches[1] = torch.arange(templates) == seed % templates
    return template_set(labels), matches


# Built in the tests' bodies: run-time type checks draw random numbers, which strategies must not.
cases = st.tuples(st.integers(0, 2**31), st.integers(1, 25), st.integers(1, 8), st.integers(2, 12))


@pytest.mark.parametrize(
    ("templates", "matched", "variance"),
    [
        (12, 2, 0.005414206491760304),
        (12, 5, 0.010189505478009578),
        (40, 3, 0.0021754037657238405),
        (40, 10, 0.0035569671496032294),
        (212, 7, 0.0005516010901918346),
        (212, 60, 0.0008732896024196504),
    ],
)
def test_published_variances(templates: int, matched: int, variance: float) -> None:
    """Test vectors from neural-tangents in double precision."""
    got = plain(templates).variance(torch.tensor([matched]))
    # Sums of terms of order 1/k that cancel down to the variance: a few roundings of 1/k.
    assert float(got) == pytest.approx(variance, rel=0, abs=2e-15 / templates)


@pytest.mark.parametrize("templates", [1, 2, 7, 60, 831])
def test_designs_formulas(templates: int) -> None:
    """w_u, w_m and the variance as docs/theory.md derives them, for every s."""
    predictor = plain(templates)
    s = np.arange(1, templates + 1, dtype=np.float64)
    rho, c, d = 1 / np.sqrt(s), 1 / (2 * math.pi), 1.0
    k0 = (math.pi - np.arccos(rho)) / (2 * math.pi)
    k1 = (np.sqrt(1 - rho**2) + (math.pi - np.arccos(rho)) * rho) / (2 * math.pi)
    a = k1 + rho * k0
    t = s * a + (templates - s) * c
    w_u = c * (1 - t / (d - c + c * templates)) / (d - c)
    w_m = w_u + (a - c) / (d - c)
    variance = (
        0.5
        + (0.5 - c) * (s * w_m**2 + (templates - s) * w_u**2)
        + c * (s * w_m + (templates - s) * w_u) ** 2
        - 2 * (s * w_m * k1 + (templates - s) * w_u * c)
    ) / templates
    matched = torch.arange(1, templates + 1)
    got_m, got_u = predictor.weights(matched)
    np.testing.assert_allclose(got_m.numpy(), w_m, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(got_u.numpy(), w_u, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(predictor.variance(matched).numpy(), variance, rtol=1e-11, atol=1e-14 / templates)


def test_weights_keep_their_digits_beside_millions_of_templates() -> None:
    """w_u is a small difference of numbers near 1; mpmath has digits to spare."""
    predictor = TemplatePredictor(plain(9).templates, PADDING_MAX)
    counts = torch.arange(1, 10)
    found = predictor.weights(counts)[1].tolist()
    with mpmath.workdps(50):
        c, k = 1 / (2 * mpmath.pi), predictor.size
        for s, value in zip(counts.tolist(), found, strict=True):
            rho = 1 / mpmath.sqrt(s)
            opening = mpmath.pi - mpmath.acos(rho)
            a = (mpmath.sqrt(1 - rho**2) + 2 * opening * rho) * c
            # (kΘ)⁻¹ on s entries a and k − s entries c, by the all-ones direction and the rest.
            mean = (s * a + (k - s) * c) / k
            exact = mean / (1 - c + c * k) + (c - mean) / (1 - c)
            assert abs(value - exact) <= 1e-15 * abs(exact) + 1e-24


def test_degenerate_states() -> None:
    """The zero state is predicted 0 and never varies; a training point is interpolated exactly."""
    predictor = plain(9)
    matched = torch.tensor([0, 1])
    matched_weight, unmatched_weight = predictor.weights(matched)
    assert matched_weight.tolist() == [0.0, 1.0]
    assert unmatched_weight.tolist() == [0.0, 0.0]
    assert predictor.variance(matched).tolist() == [0.0, 0.0]
    assert bool((predictor.variance(torch.arange(2, 10)) > 0).all())
    matches = torch.zeros(3, 9, dtype=torch.bool)
    matches[1, 4] = matches[2, 2] = matches[2, 4] = True
    prediction = predictor.predict(matches)
    assert prediction.mean[:2].tolist() == matches[:2].double().tolist()
    covariance = predictor.covariance(matches)
    assert not covariance[:2].any()
    assert not covariance[:, :2].any()


@given(cases)
@settings(max_examples=60, deadline=None)
def test_closed_form_is_the_cholesky_posterior(case: tuple[int, int, int, int]) -> None:
    """Mean, variance and the whole covariance, on the encodings themselves."""
    templates, matches = random_case(*case)
    predictor = TemplatePredictor(templates)
    size, bits = templates.labels.shape
    oracle = posterior(torch.eye(size, dtype=torch.float64), templates.labels.double(), templates.encode(matches))
    prediction, covariance = predictor.predict(matches), predictor.covariance(matches)
    assert prediction.mean.shape == (len(matches), bits)
    assert prediction.variance.shape == (len(matches),)
    assert covariance.shape == (len(matches), len(matches))
    assert {prediction.mean.dtype, prediction.variance.dtype, covariance.dtype} == {torch.float64}
    torch.testing.assert_close(prediction.mean, oracle.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance, oracle.covariance, rtol=1e-12, atol=1e-13)
    assert torch.equal(covariance.diagonal(), prediction.variance)
    assert torch.equal(covariance, covariance.T)
    # Positive semidefinite but for rounding.
    assert float(torch.linalg.eigvalsh(covariance)[0]) > -1e-14


def kernels_from_definition(x: Array, y: Array) -> tuple[Array, Array]:
    """K and Θ on unit or zero rows, by arccos, in numpy."""
    k = x.shape[1]
    lengths = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
    rho = np.clip(np.round(x @ y.T, 15), -1, 1)
    angle = np.arccos(rho)
    k0 = (math.pi - angle) / (2 * math.pi)
    k1 = (np.sin(angle) + (math.pi - angle) * np.cos(angle)) / (2 * math.pi)
    return lengths * k1 / k, lengths * (k1 + rho * k0) / k


@given(cases)
@settings(max_examples=30, deadline=None)
def test_closed_form_is_gradient_flow_from_definition(case: tuple[int, int, int, int]) -> None:
    """f∞(x) = f0(x) − Θ(x, X)Θ⁻¹(f0(X) − Y) for Gaussian f0 of kernel K: its moments, written out in numpy."""
    templates, matches = random_case(*case)
    x_train = np.eye(len(templates))
    hot = matches.numpy().astype(np.float64)
    x_test = hot / np.sqrt(np.maximum(hot.sum(1, keepdims=True), 1))
    _, theta_train = kernels_from_definition(x_train, x_train)
    _, theta_test = kernels_from_definition(x_test, x_train)
    transport = np.linalg.solve(theta_train, theta_test.T).T
    # f∞ on the test points is a linear map of f0 on test and training points together.
    linear = np.hstack([np.eye(len(x_test)), -transport])
    prior, _ = kernels_from_definition(np.vstack([x_test, x_train]), np.vstack([x_test, x_train]))
    predictor = TemplatePredictor(templates)
    prediction = predictor.predict(matches)
    labels = templates.labels.numpy().astype(np.float64)
    # arccos at cosine 1 rounded to 15 digits costs nothing here: exact 1 stays exact.
    np.testing.assert_allclose(prediction.mean.numpy(), transport @ labels, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(predictor.covariance(matches).numpy(), linear @ prior @ linear.T, rtol=0, atol=1e-13)


@given(cases, st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_padding_is_silent_templates(case: tuple[int, int, int, int], padding: int) -> None:
    """The same numbers as templates without outputs that never match."""
    templates, matches = random_case(*case)
    silent = torch.zeros(padding, templates.labels.shape[1], dtype=torch.bool)
    extended = TemplatePredictor(template_set(torch.cat([templates.labels, silent])))
    padded = TemplatePredictor(templates, padding=padding)
    wide = torch.cat([matches, torch.zeros(len(matches), padding, dtype=torch.bool)], dim=1)
    assert padded.size == extended.size
    assert torch.equal(padded.predict(matches).mean, extended.predict(wide).mean)
    assert torch.equal(padded.predict(matches).variance, extended.predict(wide).variance)
    assert torch.equal(padded.covariance(matches), extended.covariance(wide))


def test_negative_padding_is_refused() -> None:
    """Got and expected."""
    with pytest.raises(ValueError, match="padding=-1"):
        TemplatePredictor(template_set(torch.eye(3, dtype=torch.bool)), padding=-1)


def test_posterior_of_general_inputs() -> None:
    """Training points are interpolated without variance; norms scale the outputs (the network is homogeneous)."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    labels = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    tests = torch.cat([inputs, 2 * inputs, torch.zeros(1, 4, dtype=torch.float64)])
    mean, covariance = posterior(inputs, labels, tests)
    # Θ's condition number is about 1e2.
    torch.testing.assert_close(mean, torch.cat([labels, 2 * labels, torch.zeros_like(labels[:1])]), rtol=0, atol=1e-12)
    torch.testing.assert_close(covariance, torch.zeros_like(covariance), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="parallel"):
        posterior(tests[:-1], torch.cat([labels, labels]), inputs)


def test_posterior_covariance_is_that_of_drawn_functions() -> None:
    """Draws of f0 from K, moved by gradient flow: their sample covariance, within its standard error."""
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    tests = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    labels = torch.zeros(4, 1, dtype=torch.float64)
    _, covariance = posterior(inputs, labels, tests)
    every = torch.cat([tests, inputs]).numpy()
    # General norms here, so the kernels are sampled from hidden units rather than taken from the module.
    draws, width = 20_000, 16
    rng = np.random.default_rng(0)
    hidden = np.maximum(rng.standard_normal((draws, width, 3)) @ every.T / math.sqrt(3), 0)
    functions = (rng.standard_normal((draws, width, 1)) * hidden).sum(1) / math.sqrt(width)
    units = every / np.linalg.norm(every, axis=1, keepdims=True)
    lengths = np.linalg.norm(every, axis=1)
    theta = kernels_from_definition(units, units)[1] * np.outer(lengths, lengths)
    trained = functions[:, :3] - functions[:, 3:] @ np.linalg.solve(theta[3:, 3:], theta[3:, :3])
    products = trained[:, :, None] * trained[:, None, :]
    error = products.std(0) / math.sqrt(draws)
    assert np.all(np.abs(products.mean(0) - covariance.numpy()) < 4.5 * error)


def test_members_that_start_at_zero_do_not_vary() -> None:
    task = Addition(3)
    matches = task.templates.matches(torch.rand(50, 9, generator=torch.Generator().manual_seed(0)) < 0.5)
    plain, antisymmetric = TemplatePredictor(task.templates), TemplatePredictor(task.templates, antisymmetric=True)
    assert torch.equal(antisymmetric.predict(matches).mean, plain.predict(matches).mean)
    assert not antisymmetric.predict(matches).variance.any()
    assert not antisymmetric.covariance(matches).any()


def random_inputs(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def test_the_nngp_posterior_is_conditioning() -> None:
    """Against the conditional Gaussian's precision matrix: another route than Cholesky of the training block."""
    inputs, labels, tests = random_inputs(5, (7, 4), (7, 2), (5, 4))
    mean, covariance = posterior(inputs, labels, tests, layers="readout")
    every = torch.cat([tests, inputs]).numpy()
    lengths = np.linalg.norm(every, axis=1)
    kernel = kernels_from_definition(every / lengths[:, None], every / lengths[:, None])[0] * np.outer(lengths, lengths)
    # Of a joint precision P the block on the tests is the conditional precision, and mean = −P_tt⁻¹P_tX·Y.
    precision = np.linalg.inv(kernel)
    expected = np.linalg.inv(precision[:5, :5])
    # The joint kernel's condition number is about 1e4.
    np.testing.assert_allclose(covariance.numpy(), expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(mean.numpy(), -expected @ precision[:5, 5:] @ labels.numpy(), rtol=0, atol=1e-10)
    assert torch.equal(covariance, covariance.T)


def test_training_the_readout_alone_samples_the_nngp_posterior() -> None:
    """Gradient flow on the readout ends at its least-norm change: mean and covariance over drawn readouts.

    At finite width and given hidden weights the trained readout is Gaussian, exactly; the wider, the nearer its
    covariance is to the posterior's.
    """
    inputs, labels, tests = random_inputs(6, (6, 4), (6, 2), (3, 4))
    mean, covariance = posterior(inputs, labels, tests, layers="readout")
    width = 200_000
    (hidden,) = random_inputs(7, (width, 4))
    features, new = (torch.relu(x @ hidden.T / 2) / math.sqrt(width) for x in (inputs, tests))
    interpolate = torch.linalg.lstsq(features, torch.eye(6, dtype=torch.float64), driver="gelsd").solution
    # W2 ← W2 + (Y − f0(X))ᵀ·pinv(features)ᵀ: what is left of a readout is its part outside the features' rows.
    left = new - new @ interpolate @ features
    # K fluctuates by 1/√200,000 = 0.2%, amplified by the condition number, about 50.
    torch.testing.assert_close(left @ left.T, covariance, rtol=0.05, atol=2e-3)
    torch.testing.assert_close(new @ interpolate @ labels, mean, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("layers", LAYERS)
def test_float32_is_computed_in_float64(layers: Layers) -> None:
    """The same numbers as of the converted arguments, to the bit."""
    inputs, labels, tests = (value.float() for value in random_inputs(8, (6, 4), (6, 2), (3, 4)))
    single = posterior(inputs, labels, tests, layers)
    double = posterior(inputs.double(), labels.double(), tests.double(), layers)
    assert single.mean.dtype == single.covariance.dtype == torch.float64
    assert torch.equal(single.mean, double.mean)
    assert torch.equal(single.covariance, double.covariance)


@pytest.mark.parametrize("layers", LAYERS)
def test_singular_inputs_are_named(layers: Layers) -> None:
    inputs, labels, tests = random_inputs(9, (6, 4), (6, 2), (3, 4))
    inputs[4] = 3 * inputs[1]
    with pytest.raises(ValueError, match="rows 1 and 4 are parallel"):
        posterior(inputs, labels, tests, layers)
    # A third is no multiple of float32's spacing.
    single = inputs.float()
    single[4] = single[1] / 3
    with pytest.raises(ValueError, match="rows 1 and 4 of the inputs are parallel up to rounding"):
        posterior(single, labels.float(), tests.float(), layers)
    inputs[4] = 0
    with pytest.raises(ValueError, match="row 4 is zero"):
        posterior(inputs, labels, tests, layers)


@pytest.mark.parametrize(("place", "name"), [(0, "inputs"), (1, "labels"), (2, "test_inputs")])
def test_numbers_that_are_not_finite_are_named(place: int, name: str) -> None:
    data = random_inputs(9, (6, 4), (6, 2), (3, 4))
    data[place][2, 1] = math.nan
    with pytest.raises(ValueError, match=f"^{name}: row 2 has a number that is not finite"):
        posterior(*data)


def test_unknown_layers_and_wrong_shapes_are_refused(unchecked: None) -> None:
    inputs, labels, tests = random_inputs(10, (6, 4), (6, 2), (3, 4))
    with pytest.raises(OptionError, match="layers='rbf': expected one of both, readout"):
        posterior(inputs, labels, tests, "rbf")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 rows of labels for 6 rows of inputs"):
        posterior(inputs, labels[:5], tests)
    with pytest.raises(ValueError, match="test_inputs of 3 features for inputs of 4"):
        posterior(inputs, labels, tests[:, :3])
    with pytest.raises(ValueError, match=r"labels of shape \(6,\): expected two axes"):
        posterior(inputs, labels[:, 0], tests)
    with pytest.raises(ValueError, match="at least one training input"):
        posterior(inputs[:0], labels[:0], tests)
