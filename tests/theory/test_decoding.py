"""Decoders: margins over every (s, C, F), error probabilities against scipy and mpmath, bands against brute force."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy import stats
from torch import Tensor

from ntk_ensembles.templates import StateLayout, Template, TemplateSet
from ntk_ensembles.theory.decoding import (
    DECODERS,
    Decoder,
    bit_error_probability,
    decode,
    exact_match_band,
    exact_match_probability,
    log_exact_match_probability,
    margins,
    thresholds,
)
from ntk_ensembles.theory.predictor import TemplatePredictor


def predictor_of(labels: Tensor, padding: int = 0) -> TemplatePredictor:
    """A predictor for templates with the given output bits; their conditions are immaterial here."""
    rules = [Template.rule("row", ones=[0], sets=row.nonzero().flatten().tolist()) for row in labels]
    return TemplatePredictor(TemplateSet(StateLayout(bit=labels.shape[1]), rules), padding)


def random_case(seed: int, templates: int, bits: int, states: int) -> tuple[TemplatePredictor, Tensor, Tensor]:
    """A predictor with sparse random labels, random matches with s = 0 and s = 1 among them, and next_states."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(templates, bits, generator=generator) < 0.3
    matches = torch.rand(states, templates, generator=generator) < torch.rand(states, 1, generator=generator)
    matches[0] = False
    matches[1] = torch.arange(templates) == seed % templates
    predictor = predictor_of(labels)
    return predictor, matches, predictor.templates.set_counts(matches) > 0


def distances(decoder: Decoder, predictor: TemplatePredictor, matches: Tensor, next_states: Tensor) -> Tensor:
    """The margins of states."""
    return margins(predictor.predict(matches).mean, thresholds(decoder, predictor, matches.sum(1)), next_states)


# Built in the tests' bodies: run-time type checks draw random numbers, which strategies must not.
cases = st.tuples(st.integers(0, 2**31), st.integers(1, 25), st.integers(1, 8), st.integers(2, 12))


def test_midpoint_is_the_default() -> None:
    """The order that command lines show."""
    assert DECODERS == ("midpoint", "sign")


@pytest.mark.parametrize("templates", [1, 5, 17])
def test_margins_for_every_s_count_and_fan_in(templates: int) -> None:
    """Midpoint: (a − c)/(2(d − c)) at C = 0 and 1, more beyond. Sign: right iff w_m·C + w_u·(F − C) has its sign."""
    # Bit F is set by the first F templates, so one predictor holds every fan-in.
    labels = torch.arange(templates)[:, None] < torch.arange(templates + 1)
    predictor = predictor_of(labels)
    assert predictor.fan_in.tolist() == list(range(templates + 1))
    c = 1 / (2 * math.pi)
    s = torch.arange(1, templates + 1)
    rho = 1 / np.sqrt(s.numpy())
    a = (np.sqrt(1 - rho**2) + 2 * (math.pi - np.arccos(rho)) * rho) / (2 * math.pi)
    half = torch.from_numpy((a - c) / (2 * (1 - c)))[:, None]
    matched_weight, unmatched_weight = (weight[:, None] for weight in predictor.weights(s))
    for count in range(templates + 1):
        possible = (predictor.fan_in >= count) & (s[:, None] >= count)
        possible &= predictor.fan_in - count <= templates - s[:, None]
        counts = torch.full_like(predictor.fan_in, count).expand(templates, -1)
        mean = predictor.mean(s, counts, predictor.fan_in)
        next_states = counts > 0
        midpoint = margins(mean, thresholds("midpoint", predictor, s), next_states)
        expected = half * abs(2 * count - 1)
        torch.testing.assert_close(midpoint[possible], expected.expand_as(midpoint)[possible], rtol=1e-12, atol=1e-13)
        assert bool((midpoint[possible] > 0).all())
        sign = margins(mean, thresholds("sign", predictor, s), next_states)
        value = matched_weight * count + unmatched_weight * (predictor.fan_in - count)
        decided = possible & (value.abs() > 1e-9)
        assert torch.equal((sign > 0)[decided], (value > 0)[decided] == (count > 0))


@given(cases)
@settings(max_examples=50, deadline=None)
def test_midpoint_is_exact_for_every_template_set(case: tuple[int, int, int, int]) -> None:
    """Decoding the mean gives the union of outputs; margins are positive; outputs of any batch and dtype decode."""
    predictor, matches, next_states = random_case(*case)
    mean = predictor.predict(matches).mean
    limits = thresholds("midpoint", predictor, matches.sum(1))
    assert limits.shape == mean.shape
    assert limits.dtype == torch.float64
    assert torch.equal(decode(mean, limits), next_states)
    assert bool((margins(mean, limits, next_states) > 0).all())
    batch = decode(mean.to(torch.float32).expand(2, 3, -1, -1), limits)
    assert batch.dtype == torch.bool
    assert torch.equal(batch, next_states.expand(2, 3, -1, -1))


@given(cases)
@settings(max_examples=50, deadline=None)
def test_margins_are_positive_exactly_where_decoding_is_right(case: tuple[int, int, int, int]) -> None:
    """For both decoders, at the means and at noisy outputs."""
    predictor, matches, next_states = random_case(*case)
    mean = predictor.predict(matches).mean
    noisy = mean + torch.randn(mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for decoder in DECODERS:
        limits = thresholds(decoder, predictor, matches.sum(1))
        for outputs in (mean, noisy):
            assert torch.equal(margins(outputs, limits, next_states) > 0, decode(outputs, limits) == next_states)


def test_padding_rescues_the_sign_rule() -> None:
    """With s·F ≫ k a 1-bit's mean is negative; silent templates turn it positive (the paper's padding)."""
    index = torch.arange(40)
    # One of nine matched templates sets the bit, as do all 31 others.
    labels, matches = ((index == 0) | (index >= 9))[:, None], (index < 9)[None, :]
    next_states = torch.ones(1, 1, dtype=torch.bool)
    right = [bool(distances("sign", predictor_of(labels, padding), matches, next_states) > 0) for padding in (0, 400)]
    assert right == [False, True]


@pytest.mark.parametrize("members", [1, 7, 400])
def test_bit_errors_are_gaussian_tails(members: int) -> None:
    """Against scipy, to full relative accuracy down to z = 30 and further."""
    gaps = torch.tensor([[-0.4, -0.01, 1e-4, 0.02, 0.1, 0.5], [0.3, -0.2, 0.7, 1e-3, -1e-3, 0.9]], dtype=torch.float64)
    variance = torch.tensor([0.01, 0.04], dtype=torch.float64)
    scores = gaps.numpy() * math.sqrt(members) / np.sqrt(variance.numpy())[:, None]
    errors = bit_error_probability(gaps, variance, members)
    assert errors.shape == gaps.shape
    assert errors.dtype == torch.float64
    # A tail's relative error is z² times that of z.
    np.testing.assert_allclose(errors.numpy(), stats.norm.sf(scores), rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(
        log_exact_match_probability(gaps, variance, members).numpy(), stats.norm.logcdf(scores).sum(1), rtol=1e-12
    )


def test_exact_match_keeps_tiny_and_certain_errors() -> None:
    """Against mpmath at 60 digits: the chance of any error at 1e-19, and of none at 1e-350."""
    gaps = torch.tensor([[9.0, 9.5, 8.7], [-30.0, -25.0, -3.0]], dtype=torch.float64)
    variance = torch.ones(2, dtype=torch.float64)
    logs = log_exact_match_probability(gaps, variance, 1)
    with mpmath.workdps(60):
        for row, log in zip(gaps.tolist(), logs.tolist(), strict=True):
            exact = mpmath.fsum(mpmath.log(mpmath.ncdf(mpmath.mpf(z))) for z in row)
            assert log == pytest.approx(float(exact), rel=1e-13)
    assert exact_match_probability(gaps, variance, 1).tolist() == [1.0, 0.0]
    assert 1e-19 < float(-torch.expm1(logs)[0]) < 1e-17


def test_degenerate_variances_and_ties() -> None:
    """σ = 0 decides by the margin's sign; a tie is a coin, with σ = 0 and without."""
    gaps = torch.tensor([[0.5, -0.5, 1e-10, -1e-10]], dtype=torch.float64)
    for members in (1, 1000):
        fixed = bit_error_probability(gaps, torch.zeros(1, dtype=torch.float64), members)
        assert fixed.tolist() == [[0.0, 1.0, 0.5, 0.5]]
        varying = bit_error_probability(gaps, torch.ones(1, dtype=torch.float64), members)
        assert varying[0, 2:].tolist() == [0.5, 0.5]
    certain = gaps[:, [0, 2, 2]]
    assert float(exact_match_probability(certain, torch.zeros(1, dtype=torch.float64), 3)) == pytest.approx(0.25)
    assert float(exact_match_probability(gaps, torch.zeros(1, dtype=torch.float64), 3)) == 0.0


def test_zero_state_and_training_points() -> None:
    """The zero state never fails; at s = 1 the sign rule flips a coin on each 0-bit, and midpoint is sure."""
    predictor = predictor_of(torch.eye(5, dtype=torch.bool))
    matches = torch.zeros(2, 5, dtype=torch.bool)
    matches[1, 3] = True
    variance = predictor.predict(matches).variance
    cases: list[tuple[Decoder, list[float]]] = [("midpoint", [1.0, 1.0]), ("sign", [1.0, 1 / 16])]
    for decoder, expected in cases:
        assert not decode(torch.zeros(1, 5), thresholds(decoder, predictor, torch.tensor([0]))).any()
        gaps = distances(decoder, predictor, matches, matches)
        for members in (1, 50):
            assert exact_match_probability(gaps, variance, members).tolist() == pytest.approx(expected, rel=1e-14)


def test_bits_that_nothing_writes_are_coins_for_the_sign_rule() -> None:
    """F_j = 0: the mean is exactly 0 at any s."""
    predictor = predictor_of(torch.tensor([[True, False]] * 6))
    matches = torch.arange(6)[None, :] < 3
    next_states = torch.tensor([[True, False]])
    variance = predictor.predict(matches).variance
    sign = bit_error_probability(distances("sign", predictor, matches, next_states), variance, 10)
    midpoint = bit_error_probability(distances("midpoint", predictor, matches, next_states), variance, 10)
    assert float(sign[0, 1]) == 0.5
    assert float(midpoint[0, 1]) < 0.1


def test_refusals() -> None:
    """Unknown decoders, no members, no draws."""
    predictor, matches, next_states = random_case(0, 4, 3, 5)
    # Run-time type checks, where they are on, refuse it before the function does.
    with pytest.raises((ValueError, TypeCheckError), match="median"):
        thresholds("median", predictor, matches.sum(1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 members"):
        bit_error_probability(torch.ones(1, 1).double(), torch.ones(1).double(), 0)
    with pytest.raises(ValueError, match="0 draws"):
        exact_match_band(
            predictor, matches, next_states, "sign", [1], generator=torch.Generator().manual_seed(0), draws=0
        )


def brute_rates(
    predictor: TemplatePredictor, matches: Tensor, next_states: Tensor, decoder: Decoder, members: int, draws: int
) -> npt.NDArray[np.float64]:
    """Rates of ensembles made of members drawn one by one from numpy's joint Gaussian, decoded and compared."""
    rng = np.random.default_rng(members)
    gaussian = predictor.predict(matches)
    limits = thresholds(decoder, predictor, matches.sum(1))
    shape = (draws, members, next_states.shape[1])
    deviations = rng.multivariate_normal(np.zeros(len(matches)), predictor.covariance(matches).numpy(), shape)
    means = gaussian.mean + torch.from_numpy(deviations.mean(1)).transpose(1, 2)
    # Finite width never interpolates exactly, which is what makes a tie at s = 1 a coin.
    jitter = torch.from_numpy(rng.standard_normal(means.shape)) * 1e-7
    means = torch.where(matches.sum(1)[:, None] == 1, means + jitter, means)
    result: npt.NDArray[np.float64] = (decode(means, limits) == next_states).all(2).double().mean(1).numpy()
    return result


@pytest.mark.parametrize("decoder", DECODERS)
def test_band_matches_brute_force(decoder: Decoder) -> None:
    """Mean and quantiles of the band, and the closed form's mean, against ensembles of drawn members."""
    predictor, matches, next_states = random_case(5, 12, 4, 30)
    # Equal states must fail together, and make the covariance singular.
    matches, next_states = torch.cat([matches, matches[5:20]]), torch.cat([next_states, next_states[5:20]])
    sizes, draws = (1, 3, 12), 3000
    generator = torch.Generator().manual_seed(3)
    levels = (0.05, 0.5, 0.95)
    band = exact_match_band(
        predictor, matches, next_states, decoder, sizes, generator=generator, draws=draws, levels=levels
    )
    assert band.members == sizes
    assert band.levels == levels
    assert band.mean.shape == (3,)
    assert band.quantiles.shape == (3, 3)
    assert band.mean.dtype == band.quantiles.dtype == torch.float64
    for row, members in enumerate(sizes):
        rates = brute_rates(predictor, matches, next_states, decoder, members, draws)
        standard_error = max(float(rates.std()) / math.sqrt(draws), 1e-12)
        assert abs(float(rates.mean() - band.mean[row])) < 4.5 * standard_error
        # Rates are multiples of 1/45, and 3000 draws place the 5% level within 0.4 points: a step or two.
        expected = np.quantile(rates, levels)
        np.testing.assert_allclose(band.quantiles[row].numpy(), expected, atol=2.01 / len(matches))


def test_band_is_reproducible_and_accounts_for_shared_members() -> None:
    """One generator seed, one band; copies of one state fail together, so the rate is all or nothing."""
    predictor, matches, next_states = random_case(5, 12, 4, 30)
    copies = torch.full((40,), 7)
    bands = [
        exact_match_band(
            predictor,
            matches[copies],
            next_states[copies],
            "midpoint",
            [1],
            generator=torch.Generator().manual_seed(1),
            draws=100,
            levels=(0.0, 1.0),
        )
        for _ in range(2)
    ]
    assert torch.equal(bands[0].quantiles, bands[1].quantiles)
    assert 0.05 < float(bands[0].mean[0]) < 0.95
    assert bands[0].quantiles.tolist() == [[0.0, 1.0]]


def test_band_of_many_states_draws_a_subset() -> None:
    """The mean stays that of all states; the band is near that of all."""
    predictor, matches, next_states = random_case(9, 20, 4, 400)
    bands = [
        exact_match_band(
            predictor,
            matches,
            next_states,
            "midpoint",
            [2],
            generator=torch.Generator().manual_seed(1),
            draws=200,
            states_max=states_max,
        )
        for states_max in (400, 200)
    ]
    assert torch.equal(bands[0].mean, bands[1].mean)
    # The subset's own sampling noise, 0.5/√200 at most, three times over.
    np.testing.assert_allclose(bands[1].quantiles.numpy(), bands[0].quantiles.numpy(), atol=0.106)
