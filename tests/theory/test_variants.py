"""Training the readout alone, and padding: against direct solves, random features drawn, and trained ensembles."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ntk_ensembles.ensemble import DescentOptions, Init, Loss, OneHotEngine, predict
from ntk_ensembles.ensemble.cohort import Recipe, train_members
from ntk_ensembles.errors import OptionError
from ntk_ensembles.tasks import Addition, EvaluationSet, Permutation
from ntk_ensembles.templates import MatchBounds, Template, TemplateSet
from ntk_ensembles.theory import (
    DECODERS,
    LAYERS,
    FiniteWidth,
    InverseKernel,
    Layers,
    LimitPrediction,
    NTKExecutor,
    TemplatePredictor,
    WidthPrediction,
    certify_task,
    certify_width,
    decode,
    nngp,
    posterior,
    rollout,
    sign_padding,
    thresholds,
)

TASK = Addition(3)
TEMPLATES = TASK.templates
SIZE = len(TEMPLATES)
EYE = torch.eye(SIZE, dtype=torch.float64)
CPU = torch.device("cpu")


def some_matches(states: int = 10) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(states, SIZE, generator=generator) < 0.1 + 0.8 * torch.rand(states, 1, generator=generator)


def arc_cosine(x: NDArray[np.float64], y: NDArray[np.float64], features: int) -> NDArray[np.float64]:
    """The first-order arc-cosine kernel of Cho and Saul, |x||y|(sin φ + (π − φ) cos φ)/(2πk), to 30 digits."""

    def entry(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
        with mpmath.workdps(30):
            lengths = [mpmath.sqrt(mpmath.fsum(mpmath.mpf(v) ** 2 for v in vector)) for vector in (left, right)]
            if not all(lengths):
                return 0.0
            dot = mpmath.fsum(mpmath.mpf(a) * mpmath.mpf(b) for a, b in zip(left, right, strict=True))
            cosine = max(min(dot / (lengths[0] * lengths[1]), mpmath.mpf(1)), mpmath.mpf(-1))
            angle = mpmath.acos(cosine)
            value = lengths[0] * lengths[1] * (mpmath.sin(angle) + (mpmath.pi - angle) * cosine)
            return float(value / (2 * mpmath.pi * features))

    return np.array([[entry(left, right) for right in y] for left in x])


def padded(padding: int) -> TemplateSet:
    """The templates and others that set nothing and want a bit that no state has: an explicit, longer template set."""
    layout = type(TEMPLATES.layout)(**{name: len(TEMPLATES.layout[name]) for name in TEMPLATES.layout}, never=1)
    never = TEMPLATES.layout.bits
    silent = [Template.rule("padding", ones=[never], sets=[]) for _ in range(padding)]
    return TemplateSet(layout, [*TEMPLATES.templates, *silent])


@pytest.mark.parametrize("padding", [0, 6])
def test_the_readouts_prediction_is_kernel_regression_with_the_arc_cosine_kernel(padding: int) -> None:
    """Mean Kx(K)⁻¹Y and covariance K − Kx(K)⁻¹Kxᵀ: the exact posterior of a network with a Gaussian last layer."""
    size = SIZE + padding
    every = np.eye(size)
    labels = np.zeros((size, TEMPLATES.layout.bits))
    labels[:SIZE] = TEMPLATES.labels.numpy()
    matches = some_matches()
    x = np.zeros((len(matches), size))
    x[:, :SIZE] = matches.numpy() / np.sqrt(np.maximum(matches.sum(1, keepdim=True).numpy(), 1))
    kernel, cross = arc_cosine(every, every, size), arc_cosine(x, every, size)
    mean = cross @ np.linalg.solve(kernel, labels)
    covariance = arc_cosine(x, x, size) - cross @ np.linalg.solve(kernel, cross.T)

    predictor = TemplatePredictor(TEMPLATES, padding, layers="readout")
    found = predictor.predict(matches)
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=0, atol=1e-13)
    np.testing.assert_allclose(predictor.covariance(matches).numpy(), covariance, rtol=0, atol=1e-14)
    np.testing.assert_allclose(found.variance.numpy(), np.diag(covariance), rtol=0, atol=1e-14)
    np.testing.assert_allclose(predictor.encode(matches).numpy(), x, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(predictor.labels.numpy(), labels)
    solved = posterior(torch.eye(size).double(), predictor.labels, predictor.encode(matches), "readout")
    np.testing.assert_allclose(solved.mean.numpy(), mean, rtol=0, atol=1e-13)


def test_training_the_readout_alone_leaves_less_variance() -> None:
    """The NNGP posterior has the least variance of all linear rules in the labels (docs/theory.md, section 6)."""
    counts = torch.arange(2, SIZE + 1)
    both, readout = (TemplatePredictor(TEMPLATES, layers=layers).variance(counts) for layers in LAYERS)
    assert (readout < both).all()


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("antisymmetric", [False, True])
def test_padding_is_templates_that_never_match_and_set_nothing(layers: Layers, antisymmetric: bool) -> None:
    """Every route gives the numbers of a longer template set; its one further bit, which nothing sets, is left out."""
    padding, bits = 7, TEMPLATES.layout.bits
    short = TemplatePredictor(TEMPLATES, padding, layers=layers, antisymmetric=antisymmetric)
    explicit = TemplatePredictor(padded(padding), layers=layers, antisymmetric=antisymmetric)
    evaluation = EvaluationSet.sample(TASK, 60, 0)
    matches, s = evaluation.matches, evaluation.matches.sum(1)
    longer = torch.nn.functional.pad(matches, (0, padding))
    torch.testing.assert_close(short.predict(matches).mean, explicit.predict(longer).mean[:, :bits], rtol=0, atol=1e-14)
    torch.testing.assert_close(short.predict(matches).variance, explicit.predict(longer).variance, rtol=0, atol=1e-16)
    torch.testing.assert_close(short.encode(matches), explicit.encode(longer), rtol=0, atol=0)
    assert torch.equal(LimitPrediction(TASK, evaluation, short).inputs, explicit.encode(longer))
    for decoder in DECODERS:
        limits = thresholds(decoder, short, s)
        torch.testing.assert_close(limits, thresholds(decoder, explicit, s)[:, :bits], rtol=0, atol=1e-14)
        executor = NTKExecutor(TEMPLATES, decoder, padding=padding, layers=layers)
        expected = decode(explicit.predict(longer).mean[:, :bits], limits)
        assert torch.equal(rollout(executor, evaluation.states, 1).states, expected)
    here, there = FiniteWidth(short, 400), FiniteWidth(explicit, 400)
    # The further bit of the state is one more whose noise is in |r_i|² of Gaussian members: 10 in place of 9.
    tolerance = 1e-12 if antisymmetric or layers == "readout" else 0.06
    torch.testing.assert_close(here.shift, there.shift[:, :bits], rtol=tolerance, atol=1e-12)
    torch.testing.assert_close(here.bias(matches), there.bias(longer)[:, :bits], rtol=tolerance, atol=1e-5)
    some, more = matches[::10], longer[::10]
    variances = [
        finite.variance(rows, generator=torch.Generator().manual_seed(0), units=256).variance[:, :bits]
        for finite, rows in ((here, some), (there, more))
    ]
    torch.testing.assert_close(*variances, rtol=max(tolerance, 1e-5), atol=1e-7)


def test_padding_needed_depends_on_the_layers() -> None:
    """k > F·(s − (d − c)/(a − c)) − (d − c)/c with d and a of either kernel, for bits that one template sets."""
    c = 1 / (2 * math.pi)
    task, s = Permutation(30), 30
    for layers, d, kappa0_share in (("both", 1.0, 1.0), ("readout", 0.5, 0.0)):
        rho = s**-0.5
        opening = math.pi - math.acos(rho)
        a = (math.sqrt(1 - rho**2) + opening * rho) / (2 * math.pi) + kappa0_share * rho * opening / (2 * math.pi)
        needed = max(0, math.floor(s - (d - c) / (a - c) - (d - c) / c) + 1 - 30)
        predictor = TemplatePredictor(task.templates, layers=layers)  # type: ignore[arg-type]
        assert sign_padding(predictor, MatchBounds(task.templates)) == needed


@pytest.mark.parametrize(("bits", "published"), [(10, 129), (20, 254), (30, 318)])
def test_the_published_permutation_runs_trained_the_readout(bits: int, published: int) -> None:
    """Sign rule, inputs with two ones: the paper's code reached 99.9% exact with that many members.

    The 0-bits share the smaller margin, |w_u|. At Z standard deviations N = (Z·σ/|w_u|)² members are needed, and of the
    bits - 2 of them a share of 0.001 at most may be wrong together.
    """
    z = float(stats.norm.isf(0.001 / (bits - 2)))
    counts = {}
    for layers in LAYERS:
        predictor = TemplatePredictor(Permutation(bits).templates, layers=layers)
        two = torch.tensor([2])
        counts[layers] = float(z**2 * predictor.variance(two) / predictor.weights(two)[1] ** 2)
    assert 0.75 < published / counts["readout"] < 1.25
    assert counts["both"] > 4 * published


def test_corrected_labels_and_unknown_layers_are_refused(unchecked: None) -> None:
    readout = TemplatePredictor(TEMPLATES, layers="readout")
    with pytest.raises(OptionError, match="labels='corrected': expected plain where the readout alone is trained"):
        FiniteWidth(readout, 1000, corrected=True)
    for name, value, expected in (("layers", "hidden", "one of both, readout"), ("padding", -1, "an integer from 0")):
        with pytest.raises(OptionError, match=f"{name}={value!r}: expected {expected}"):
            TemplatePredictor(TEMPLATES, **{name: value})  # type: ignore[arg-type]


def members_of(
    predictor: TemplatePredictor, width: int, members: int, *, loss: Loss = "whitened", states: int = 150
) -> tuple[WidthPrediction, Tensor, list[int]]:
    """Train members and return what is predicted of them on evaluation states, and their outputs."""
    limit = LimitPrediction(TASK, EvaluationSet.sample(TASK, states, 1), predictor)
    init: Init = "antisymmetric" if predictor.antisymmetric else "gaussian"
    options = DescentOptions(loss, steps_max=200, layers=predictor.kernel.layers)
    recipe = Recipe(predictor.labels.float(), width, init, seed=5, descent=options)
    stack, statuses = train_members(recipe, range(members), CPU)
    assert all(status.converged for status in statuses)
    prediction = WidthPrediction(limit, FiniteWidth(predictor, width), units=4096)
    return prediction, predict(stack, limit.inputs.float()).double(), [status.steps for status in statuses]


@pytest.mark.parametrize(
    ("antisymmetric", "loss", "padding"),
    [(False, "whitened", 0), (True, "whitened", 0), (False, "mse", 0), (False, "whitened", 12)],
)
@pytest.mark.parametrize("ratio", [5, 20])
def test_trained_readouts_have_the_predicted_mean_and_variance(
    antisymmetric: bool, loss: Loss, padding: int, ratio: int
) -> None:
    """Whatever the loss: a model that is linear in what is trained ends at one interpolant."""
    predictor = TemplatePredictor(TEMPLATES, padding, layers="readout", antisymmetric=antisymmetric)
    width, members = ratio * predictor.size * (2 if antisymmetric else 1), 512
    prediction, outputs, _ = members_of(predictor, width, members, loss=loss)
    variance = outputs.var(0)
    # A variance over 512 members has a standard error of 6%, its mean over states and bits, which share members, of
    # 2 to 3%; the prediction has one of 2%.
    assert float(variance.mean() / prediction.variance.mean()) == pytest.approx(1, abs=0.08)
    assert float(variance.mean()) > 1.05 * float(predictor.variance(prediction_matches(prediction)).mean())
    # And the mean of all has no bias that the members' spread would not explain.
    deviation = (outputs.mean(0) - prediction.mean).square().mean()
    assert float(deviation) == pytest.approx(float(variance.mean()) / members, rel=0.5)


def prediction_matches(prediction: WidthPrediction) -> Tensor:
    return EvaluationSet.sample(TASK, 150, 1).matches.sum(1)[prediction.rows]


def test_the_variance_of_the_readout_is_that_of_random_features_solved_exactly() -> None:
    """Gaussian last layers on drawn features, by the mean and the covariance of their exact posterior, in float64."""
    matches = some_matches(6)
    matches = matches[matches.sum(1) > 1]
    predictor = TemplatePredictor(TEMPLATES, layers="readout")
    x, width, draws = predictor.encode(matches), 6 * SIZE, 4000
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(draws, width, SIZE, dtype=torch.float64, generator=generator)
    features = (hidden / math.sqrt(SIZE)).relu() / math.sqrt(width)
    at_states = (hidden @ x.T / math.sqrt(SIZE)).relu() / math.sqrt(width)
    gram, cross = features.mT @ features, features.mT @ at_states
    weights = torch.linalg.solve(gram, cross)
    mean = weights.mT @ TEMPLATES.labels.double()
    left = at_states.square().sum(1) - (weights * cross).sum(1)
    theory = FiniteWidth(predictor, width)
    expected = theory.variance(matches, generator=torch.Generator().manual_seed(9), units=20_000).variance
    # What a Gaussian last layer leaves given the features, and how the mean varies with the features.
    # A variance over 4,000 draws has a standard error of 2 to 3%, for heavy tails more, and 54 are compared.
    torch.testing.assert_close(mean.var(0) + left.mean(0)[:, None], expected, rtol=0.1, atol=0)
    assert float((mean.var(0) + left.mean(0)[:, None]).mean() / expected.mean()) == pytest.approx(1, abs=0.02)
    assert (theory.shift == 0).all()
    # What is neglected of the mean, −E[G·Q·H]/n, from as many units on their own.
    units = hidden.view(-1, SIZE)
    inverse = torch.linalg.inv(SIZE * nngp(EYE, EYE))
    eta = units.relu()
    gap = (units @ x.T).relu() - eta @ inverse @ (SIZE * nngp(EYE, x))
    square = ((eta @ inverse) * eta).sum(1, keepdim=True)
    neglected = -(gap * square).T @ (eta @ inverse @ TEMPLATES.labels.double()) / len(units) / width
    bias = mean.mean(0) - predictor.predict(matches).mean
    assert float(bias.square().mean().sqrt()) < 0.15 * float(expected.mean().sqrt())
    assert float((bias - neglected).square().mean() / bias.square().mean()) < 0.25  # the next order: n/k = 6


def test_padded_members_of_which_both_layers_are_trained_have_the_predicted_bias() -> None:
    predictor = TemplatePredictor(TEMPLATES, 20)
    prediction, outputs, _ = members_of(predictor, 30 * predictor.size, 512)
    bias = outputs.mean(0) - (prediction.mean - prediction.bias)
    assert float(outputs.var(0).mean() / prediction.variance.mean()) == pytest.approx(1, abs=0.1)
    explained = 1 - (bias - prediction.bias).square().mean() / bias.square().mean()
    assert explained > 0.75
    assert float(bias.square().mean() / prediction.bias.square().mean()) ** 0.5 == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("loss", ["whitened", "mse"])
def test_small_steps_have_the_bias_of_gradient_flow(loss: Loss) -> None:
    """What docs/theory.md, section 11, says of gradient descent in small steps, which no command takes."""
    predictor = TemplatePredictor(TEMPLATES, antisymmetric=True)
    limit = LimitPrediction(TASK, EvaluationSet.sample(TASK, 100, 1), predictor)
    matches, width, members = limit.evaluation.matches, 2048, 96
    finite = FiniteWidth(predictor, width)
    steps_of_size_one = finite.bias(matches)
    s = matches.sum(1, keepdim=True)
    stopped = (matches.double() @ finite.shift) / (2 * s.clamp_min(1).sqrt())
    flow = (steps_of_size_one - stopped).where(s > 1, 0.0)

    stack = Recipe(predictor.labels.float(), width, "antisymmetric", 3).make_stack(range(members), CPU)
    engine = OneHotEngine(stack.hidden.detach(), stack.readout.detach())
    targets, inverse = predictor.labels.float().T, InverseKernel.for_one_hot(SIZE)
    residuals = engine.outputs() - targets
    for _ in range(400):
        cotangents = inverse(residuals) * 0.1 if loss == "whitened" else residuals * 0.25 / inverse.eigenvalue_bounds[1]
        residuals = engine.step(cotangents) - targets
        if residuals.square().mean() < 1e-7 * targets.square().mean():
            break
    bias = predict(stack, limit.inputs.float()).double().mean(0) - limit.mean

    def share(of: Tensor) -> float:
        return float((bias * of).sum() / of.square().sum())

    # √(k/n) is 0.08; the next order was measured to be 2.5 to 3 times that, and 96 members leave an error of 0.1.
    assert share(flow) == pytest.approx(1.2, abs=0.3)
    assert share(steps_of_size_one) < 0.6


def test_the_hidden_layer_stays_as_it_was_drawn() -> None:
    """To the bit, whichever engine, precision and loss."""
    labels = TEMPLATES.labels.float()
    for engine, precision, loss, init in (
        ("auto", "32-true", "whitened", "gaussian"),
        ("auto", "bf16-mixed", "whitened", "antisymmetric"),
        ("functional", "64-true", "mse", "gaussian"),
    ):
        options = DescentOptions(loss, engine=engine, layers="readout", steps_max=200)  # type: ignore[arg-type]
        recipe = Recipe(labels, 300, init, 2, precision, options)  # type: ignore[arg-type]
        stack, statuses = train_members(recipe, range(2), CPU)
        drawn = recipe.make_stack(range(2), CPU)
        assert all(status.converged for status in statuses)
        assert torch.equal(stack.hidden, drawn.hidden)
        assert not torch.equal(stack.readout, drawn.readout)


def test_both_engines_train_the_same_readout() -> None:
    outputs = []
    for engine in ("auto", "functional"):
        options = DescentOptions(engine=engine, layers="readout", tolerance=1e-20)  # type: ignore[arg-type]
        recipe = Recipe(TEMPLATES.labels.double(), 200, precision="64-true", descent=options)
        stack, _ = train_members(recipe, range(2), CPU)
        outputs.append(stack.readout)
    torch.testing.assert_close(*outputs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_a_certificate_at_a_width_becomes_that_of_infinite_width(antisymmetric: bool) -> None:
    evaluation = EvaluationSet.sample(TASK, 100, 0)
    settings: dict[str, Any] = {"layers": "readout", "padding": 30, "evaluation": evaluation}
    found = certify_width(TASK, 10**10, antisymmetric=antisymmetric, **settings)
    infinite = certify_task(TASK, **settings)
    assert (infinite["layers"], infinite["padding"]) == ("readout", 30)
    for decoder in DECODERS:
        for name, members in infinite["decoders"][decoder]["members"].items():
            here = found["decoders"][decoder]["members"][name]
            assert here == (members if not antisymmetric else members and 1)
    narrow = certify_width(TASK, 3 * (SIZE + 30) - 1, **settings)
    assert (narrow["trusted"], narrow["trusted_from"]) == (False, 3 * (SIZE + 30))
    assert (
        narrow["decoders"]["midpoint"]["members"]["one_state"]
        > infinite["decoders"]["midpoint"]["members"]["one_state"]
    )
