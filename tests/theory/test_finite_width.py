"""Finite width to first order: against quadrature, whole units drawn, dense kernels, and trained ensembles."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from scipy import integrate
from torch import Tensor

from ntk_ensembles.errors import OptionError
from ntk_ensembles.tasks import Addition
from ntk_ensembles.templates import StateLayout, Template, TemplateSet
from ntk_ensembles.theory import FiniteWidth, InverseKernel, TemplatePredictor, empirical_ntk, nngp, ntk

TEMPLATES = Addition(3).templates
SIZE = len(TEMPLATES)
LABELS = TEMPLATES.labels.double()
IDENTITY = torch.eye(SIZE, dtype=torch.float64)
INVERSE = torch.linalg.inv(SIZE * ntk(IDENTITY, IDENTITY))


def predictor(antisymmetric: bool, padding: int = 0) -> TemplatePredictor:
    return TemplatePredictor(TEMPLATES, padding, antisymmetric=antisymmetric)


def some_matches(states: int = 12) -> Tensor:
    """Random ones, after a state that nothing matches and a template alone."""
    generator = torch.Generator().manual_seed(0)
    matches = torch.rand(states, SIZE, generator=generator) < torch.rand(states, 1, generator=generator) + 0.2
    matches[0] = False
    matches[1] = torch.arange(SIZE) == 4
    return matches


def weights_of(matches: Tensor) -> Tensor:
    """v(x), by a linear solve."""
    x = TEMPLATES.encode(matches)
    return torch.linalg.solve(ntk(IDENTITY, IDENTITY), ntk(IDENTITY, x)).T


def lost(length: float) -> float:
    """E[g·relu(−(w + length·g)); w > 0] for standard Gaussians, by adaptive quadrature."""
    norm = 1 / (2 * math.pi)
    value, _ = integrate.dblquad(
        lambda w, g: norm * math.exp(-(w * w + g * g) / 2) * g * -(w + length * g), -12, 0, 0, lambda g: -length * g
    )
    return float(value)


def test_the_shift_is_what_gates_lose() -> None:
    """Along r the readout is a standard Gaussian; the whole loss, of which the shift is the leading order."""
    for width in (10_000, 1_000_000):
        theory = FiniteWidth(predictor(antisymmetric=True), width)
        for row, seen in zip(theory.shift, INVERSE @ LABELS, strict=True):
            length = math.sqrt(SIZE / width) * float(seen.norm())
            loss = -lost(length) * math.sqrt(width / SIZE) * seen / seen.norm()
            # The next order is a share of length²; 1e-6 is the quadrature's own.
            torch.testing.assert_close(row, loss, rtol=length**2 + 1e-6, atol=1e-12)


def test_the_noise_of_gaussian_members_makes_the_shift_larger() -> None:
    """√E|r|² with r = (Y − f₀(X)) through the inverse, f₀ drawn from its kernel."""
    root = torch.linalg.cholesky(nngp(IDENTITY, IDENTITY))
    drawn = torch.randn(4000, SIZE, LABELS.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    squares = (INVERSE @ (LABELS - root @ drawn)).square().sum(2).mean(0)
    expected = math.sqrt(SIZE / 5000) / (2 * math.pi) * squares.sqrt()[:, None] * (INVERSE @ LABELS)
    # Squared lengths of 9 bits: a relative standard error of 1% or less over 4,000 draws.
    torch.testing.assert_close(FiniteWidth(predictor(antisymmetric=False), 5000).shift, expected, rtol=0.02, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 5])
def test_the_bias_is_a_prediction_of_the_shift(padding: int) -> None:
    matches = some_matches()
    theory = FiniteWidth(predictor(False, padding), 3000)
    every = torch.eye(SIZE + padding, dtype=torch.float64)
    x = torch.cat([TEMPLATES.encode(matches), torch.zeros(len(matches), padding, dtype=torch.float64)], 1)
    weights = torch.linalg.solve(ntk(every, every), ntk(every, x)).T
    bias = theory.bias(matches)
    several = matches.sum(1) > 1
    torch.testing.assert_close(bias[several], (weights @ theory.shift)[several], rtol=1e-10, atol=1e-14)
    assert not bias[~several].any()
    assert several.sum() > 5
    assert theory.shift.shape == (SIZE + padding, LABELS.shape[1])


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_corrected_labels_take_the_bias_away(antisymmetric: bool) -> None:
    plain, theory = (FiniteWidth(predictor(antisymmetric), 2000, corrected=corrected) for corrected in (False, True))
    assert torch.equal(plain.labels, LABELS)
    torch.testing.assert_close(theory.labels + theory.shift, LABELS, rtol=0, atol=1e-13)
    matches = some_matches()
    bias = theory.bias(matches)
    # At a template alone, a training point, members output what they were trained on.
    torch.testing.assert_close(bias[1], -theory.shift[4], rtol=0, atol=1e-13)
    assert not bias[matches.sum(1) != 1].any()
    assert plain.bias(some_matches()).any()
    assert 0 < theory.movement < plain.movement < 0.3


def units(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bits = LABELS.shape[1]
    return (torch.randn(count, size, dtype=torch.float64, generator=generator) for size in (SIZE, bits))  # type: ignore[return-value]


def xi(hidden: Tensor, readout: Tensor, seen: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """(k·Θ̂(x, X) − vᵀ·k·Θ̂(X, X))·r for networks of one unit each, as sums over training inputs: (units, bits).

    Args:
        seen: r, for all units or for each, (..., templates, bits).
    """

    def moved(at: Tensor, inputs: Tensor) -> Tensor:
        """k·Θ̂(input, X)·r, (units, inputs, bits)."""
        pre, training = at @ inputs.T, at
        first = pre.relu()[:, :, None] * (training.relu()[:, None, :] @ seen)
        gates = (pre > 0).double()[:, :, None] * (training > 0).double()[:, None, :] * inputs[None]
        return first + (gates @ seen @ readout[:, :, None]) * readout[:, None, :]

    identity = torch.eye(len(v), dtype=v.dtype)
    return moved(hidden, x[None])[:, 0] - torch.einsum("i,uij->uj", v, moved(hidden, identity))


def test_one_units_kernel_is_that_of_a_network_of_width_one() -> None:
    """The brute force below starts from the empirical kernel itself."""

    class OneUnit(torch.nn.Module):
        def __init__(self, hidden: Tensor, readout: Tensor) -> None:
            super().__init__()
            self.hidden, self.readout = torch.nn.Parameter(hidden), torch.nn.Parameter(readout)

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.relu(inputs @ self.hidden)[:, None] * self.readout

    matches = some_matches()[5:6]
    x, v, seen = TEMPLATES.encode(matches), weights_of(matches), INVERSE @ LABELS
    hidden, readout = units(6, 2)
    for row, (w, a) in enumerate(zip(hidden, readout, strict=True)):
        kernel = empirical_ntk(OneUnit(w, a), torch.cat([x, IDENTITY]), IDENTITY, trace=False)
        moved = torch.einsum("iajb,jb->ia", kernel, seen)
        expected = moved[0] - v[0] @ moved[1:]
        torch.testing.assert_close(xi(hidden, readout, seen, x[0], v[0])[row], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_the_variance_is_that_of_whole_units(antisymmetric: bool) -> None:
    """Hidden weights, readout and (for Gaussian members) the noise of r, all drawn."""
    matches = some_matches()[[3, 5, 9]]
    assert (matches.sum(1) > 1).all()
    width, count = 7000, 40_000
    theory = FiniteWidth(predictor(antisymmetric), width)
    estimate = theory.variance(matches, generator=torch.Generator().manual_seed(3), units=60_000)
    infinite = predictor(antisymmetric).variance(matches.sum(1))[:, None] + theory._gates(matches, INVERSE @ LABELS)
    hidden, readout = units(count, 4)
    seen = (INVERSE @ LABELS).expand(count, -1, -1)
    if not antisymmetric:
        root = torch.linalg.cholesky(INVERSE @ nngp(IDENTITY, IDENTITY) @ INVERSE)
        seen = seen + root @ torch.randn(seen.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    independent = width / 2 if antisymmetric else width
    for state in range(len(matches)):
        x, v = TEMPLATES.encode(matches[[state]])[0], weights_of(matches[[state]])[0]
        values = torch.cat(
            [
                xi(hidden[at : at + 5000], readout[at : at + 5000], seen[at : at + 5000], x, v)
                for at in range(0, count, 5000)
            ]
        )
        # The mean is 0: the kernel of infinite width predicts what it predicts.
        assert (values.mean(0).abs() < 4.5 * values.std(0) / math.sqrt(count)).all()
        squares = values.square()
        error = (squares.var(0) / count + (estimate.error[state] * independent).square()).sqrt()
        drawn = (estimate.variance - infinite)[state] * independent
        assert ((squares.mean(0) - drawn).abs() < 4.5 * error).all()
        # Small beside what it measures, or the comparison says nothing.
        assert (error < 0.05 * drawn).all()


def three_templates() -> TemplateSet:
    rules = [Template.rule("r", ones=[0], sets=[0]), Template.rule("r", ones=[1], sets=[0, 1])]
    return TemplateSet(StateLayout(x=2), [*rules, Template.rule("r", ones=[0, 1], sets=[1])])


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_of_each_unit_readout_and_noise_are_averaged_exactly(antisymmetric: bool) -> None:
    """By quadrature: three points for each readout weight, two for each number of the noise, are exact here."""
    templates, count, width = three_templates(), 40, 900
    theory = FiniteWidth(TemplatePredictor(templates, antisymmetric=antisymmetric), width)
    matches = torch.tensor([[True, True, False], [True, True, True], [False, True, False], [False, False, False]])
    estimate = theory.variance(matches, generator=torch.Generator().manual_seed(6), units=count)
    hidden = torch.randn(count, 3, generator=torch.Generator().manual_seed(6)).double()
    eye, labels = torch.eye(3, dtype=torch.float64), templates.labels.double()
    inverse = torch.linalg.inv(3 * ntk(eye, eye))
    root = torch.linalg.cholesky(inverse @ nngp(eye, eye) @ inverse)
    points = list(itertools.product([(-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6)], repeat=2))
    corners = [[0.0] * 6] if antisymmetric else list(itertools.product([-1.0, 1.0], repeat=6))
    signs = torch.tensor(corners, dtype=torch.float64).view(-1, 3, 2).repeat(len(points), 1, 1)
    readouts = torch.tensor([[a, b] for (a, _), (b, _) in points], dtype=torch.float64)
    readouts = readouts.repeat_interleave(len(corners), 0)
    shares = torch.tensor([a * b / len(corners) for (_, a), (_, b) in points], dtype=torch.float64)
    shares = shares.repeat_interleave(len(corners))
    for state in range(2):
        x = templates.encode(matches[[state]])[0]
        v = torch.linalg.solve(ntk(eye, eye), ntk(eye, x[None]))[:, 0]
        # One row for each combination of points and each unit.
        seen = (inverse @ labels + root @ signs).repeat_interleave(count, 0)
        values = xi(hidden.repeat(len(readouts), 1), readouts.repeat_interleave(count, 0), seen, x, v)
        squares = (values.square().view(-1, count, 2) * shares[:, None, None]).sum(0)
        independent = width / 2 if antisymmetric else width
        gates = theory._gates(matches, inverse @ labels)[state]
        infinite = theory.predictor.variance(matches.sum(1))[state] + gates
        # Units are worked on in float32.
        torch.testing.assert_close(
            estimate.variance[state], infinite + squares.mean(0) / independent, rtol=1e-5, atol=0
        )
        error = squares.std(0) / math.sqrt(count) / independent
        torch.testing.assert_close(estimate.error[state], error, rtol=1e-3, atol=0)
    assert not estimate.variance[2:].any()
    assert not estimate.error[2:].any()


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_of_the_readout_alone_products_of_each_unit_are_averaged(antisymmetric: bool) -> None:
    """Equation (49), the expectation of each factor taken as known, for no more than twice as many units as inputs."""
    templates, count, width = three_templates(), 40, 14
    theory = FiniteWidth(TemplatePredictor(templates, layers="readout", antisymmetric=antisymmetric), width)
    matches = torch.tensor([[True, True, False], [True, True, True]])
    estimate = theory.variance(matches, generator=torch.Generator().manual_seed(6), units=count)
    hidden = torch.randn(count, 3, generator=torch.Generator().manual_seed(6)).double()
    eye, labels = torch.eye(3, dtype=torch.float64), templates.labels.double()
    inverse = torch.linalg.inv(3 * nngp(eye, eye))
    eta, seen = hidden.relu(), inverse @ labels
    lost = ((eta @ inverse) * eta).sum(1)[:, None]
    independent = width // 2 if antisymmetric else width
    for state in range(2):
        x = templates.encode(matches[[state]])[0]
        v = inverse @ (3 * nngp(eye, x[None]))[:, 0]
        square = ((hidden @ x).relu() - eta @ v).square()[:, None]
        # k·σ²(s): the NNGP posterior's variance.
        left = float(3 * (nngp(x[None], x[None]) - nngp(x[None], eye) @ v))
        varies = (square - left) * ((eta @ seen).square() - (seen * labels).sum(0)) + left * (seen * labels).sum(0)
        expected = varies.mean(0) / (independent - 3 - 1)
        if not antisymmetric:
            expected += left / 3 - ((square - left) * (lost - 3) + left * 3).mean(0) / (3 * width)
        torch.testing.assert_close(estimate.variance[state], expected, rtol=1e-5, atol=0)


def test_the_reported_error_is_the_spread_over_seeds() -> None:
    matches = some_matches()[3:8]
    theory = FiniteWidth(predictor(True), 1000)
    estimates = [theory.variance(matches, generator=torch.Generator().manual_seed(s), units=500) for s in range(60)]
    spread = torch.stack([estimate.variance for estimate in estimates]).std(0)
    reported = torch.stack([estimate.error for estimate in estimates]).square().mean(0).sqrt()
    # A standard deviation over 60 seeds is known to 9%; heavy tails make that somewhat more.
    assert 0.85 < float((reported / spread).mean()) < 1.15
    again = theory.variance(matches, generator=torch.Generator().manual_seed(0), units=500)
    assert torch.equal(again.variance, estimates[0].variance)


def test_what_gates_take_from_the_initial_function() -> None:
    """The derivative of a dense quadratic form: var(f₀(x) − Σ_i v_i·(1 + t·ε_ij·M)f₀(e_i)) in t."""
    matches = some_matches()[2:]
    width = 4000
    theory = FiniteWidth(predictor(False), width)
    seen = INVERSE @ LABELS
    noise = (INVERSE @ nngp(IDENTITY, IDENTITY) @ INVERSE).diagonal()[:, None]
    lengths = (seen.square().sum(1, keepdim=True) + LABELS.shape[1] * noise).sqrt()
    slope = math.sqrt(SIZE / width) / (2 * math.pi) * (lengths + seen.square() / lengths)
    x, v = TEMPLATES.encode(matches), weights_of(matches)
    every = torch.cat([x, IDENTITY])
    prior = nngp(every, every)
    got = theory._gates(matches, seen)
    for state in range(len(matches)):
        for bit in (0, 4):

            def variance(t: float, state: int = state, bit: int = bit) -> Tensor:
                functional = torch.zeros(len(every), dtype=torch.float64)
                functional[state] = 1
                functional[len(x) :] = -v[state] - t * INVERSE @ (slope[:, bit] * v[state])
                return functional @ prior @ functional

            # The form is quadratic in t, so that a symmetric difference is exact.
            torch.testing.assert_close(got[state, bit], (variance(1) - variance(-1)) / 2, rtol=1e-9, atol=1e-15)
    assert got.any()


def train(labels: Tensor, width: int, members: int, antisymmetric: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    """Members trained by plain steps of size 1 of the whitened loss, written out: outputs at x, after and before."""
    generator = torch.Generator().manual_seed(8)
    scale = 1 / math.sqrt(SIZE * width)
    whiten = InverseKernel.for_one_hot(SIZE)
    every = torch.cat([x, IDENTITY]).T.float()
    after, before = [], []
    for _ in range(0, members, 64):
        drawn = width // 2 if antisymmetric else width
        hidden = torch.randn(64, drawn, SIZE, generator=generator)
        readout = torch.randn(64, labels.shape[1], drawn, generator=generator)
        if antisymmetric:
            hidden, readout = torch.cat([hidden, hidden], 1), torch.cat([readout, -readout], 2)
        before.append((scale * readout @ (hidden @ every).relu()).mT.double())
        for _ in range(15):
            features = hidden.relu()
            residuals = scale * readout @ features - labels.T.float()
            cotangents = whiten(residuals)
            change = scale * (readout.mT @ cotangents) * (hidden > 0)
            readout = readout - scale * cotangents @ features.mT
            hidden = hidden - change
        assert float(residuals.square().mean()) < 1e-8
        after.append((scale * readout @ (hidden @ every).relu()).mT.double()[:, : len(x)])
    return torch.cat(after), torch.cat(before)


@pytest.mark.slow
@pytest.mark.parametrize("antisymmetric", [True, False])
def test_trained_ensembles(antisymmetric: bool) -> None:
    """At n/k = 341: the mean's bias, the variance, and what corrected labels leave of the bias."""
    matches = some_matches(40)
    matches = matches[matches.sum(1) > 1]
    x, v = TEMPLATES.encode(matches), weights_of(matches)
    width, members = 4096, 512
    limit = predictor(antisymmetric).predict(matches).mean
    theory, corrected = (FiniteWidth(predictor(antisymmetric), width, corrected=c) for c in (False, True))
    expected = theory.bias(matches)

    def share_of_bias(outputs: Tensor, before: Tensor) -> tuple[float, float]:
        """How much of the predicted bias is there, by least squares, and the standard error."""
        # Without the initial function's own part, known for each member and of mean 0, which hides the bias.
        cleaned = outputs - (before[:, : len(x)] - v @ before[:, len(x) :]) - limit
        share = (cleaned * expected).sum((1, 2)) / expected.square().sum()
        return float(share.mean()), float(share.std()) / math.sqrt(members)

    outputs, before = train(LABELS, width, members, antisymmetric, x)
    share, error = share_of_bias(outputs, before)
    assert error < 0.07
    # The next order was measured (widths 256 to 16,384, these states): a share of about −3·√(k/n) of the bias for
    # Gaussian members, and −1·√(k/n) for antisymmetric ones.
    neglected = (1 if antisymmetric else 3) * math.sqrt(SIZE / width)
    assert -neglected - 4 * error < share - 1 < 4 * error
    left, error = share_of_bias(*train(corrected.labels, width, members, antisymmetric, x))
    assert abs(left) < neglected + 4 * error
    estimate = theory.variance(matches, generator=torch.Generator().manual_seed(9), units=8192)
    ratio = float(outputs.var(0).mean() / estimate.variance.mean())
    # Squares of 512 members at 9 bits, and the next order.
    assert abs(ratio - 1) < 0.08


def test_unfit_arguments_are_refused() -> None:
    with pytest.raises(OptionError, match="width=0: expected an integer of at least 1"):
        FiniteWidth(predictor(True), 0)
    with pytest.raises(OptionError, match="width=1: expected more"):
        FiniteWidth(predictor(True), 1, corrected=True)
    unchecked = inspect.unwrap(FiniteWidth.variance)
    with pytest.raises(OptionError, match="units=1: expected an integer of at least 2"):
        unchecked(FiniteWidth(predictor(True), 100), some_matches(), generator=torch.Generator(), units=1)
