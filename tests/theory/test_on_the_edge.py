"""Values on an edge: thresholds, ties, exact zeros, the least number of members, and searches that end too early."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ntk_ensembles.tasks import Addition, EvaluationSet, Multiplication, Permutation, StateLayout, Template, TemplateSet
from ntk_ensembles.templates import Bound, MatchBounds
from ntk_ensembles.theory import (
    TIE,
    Certificate,
    ExactMatchBand,
    LimitPrediction,
    TemplatePredictor,
    certify,
    certify_task,
    decode,
    members_for_states,
    thresholds,
)
from ntk_ensembles.theory.certificate import WorstCase
from ntk_ensembles.theory.decoding import exact_match_band


def templates_of(*rules: Template, bits: int) -> TemplateSet:
    return TemplateSet(StateLayout(x=bits), rules)


def one_bit_each(bits: int) -> TemplateSet:
    """Template i wants bit i and sets it."""
    return templates_of(*(Template.rule("own", ones=[i], sets=[i]) for i in range(bits)), bits=bits)


def test_an_output_on_its_threshold_is_read_as_0() -> None:
    level = torch.tensor([[0.25, 0.25, 0.25]], dtype=torch.float64)
    outputs = torch.tensor([[0.25, 0.25 + 2**-50, 0.25 - 2**-50]], dtype=torch.float64)
    assert decode(outputs, level).tolist() == [[False, True, False]]
    # Of a float32 output as it is: that nearest to a tenth is above a tenth.
    tenth = torch.tensor([[0.1]], dtype=torch.float64)
    assert decode(tenth.float(), tenth).tolist() == [[True]]


def test_the_variance_at_one_template_is_exactly_zero_for_every_size() -> None:
    """A training point is interpolated by every member; the formula alone leaves rounding for most sizes."""
    for size in (1, 2, 3, 5, 12, 40, 77, 212, 831, 1500):
        predictor = TemplatePredictor(one_bit_each(size))
        assert predictor.variance(torch.tensor([0, 1])).tolist() == [0.0, 0.0]
        assert bool((predictor.variance(torch.arange(2, size + 1)) > 0).all())


def test_training_points_do_not_vary_with_any_other_state() -> None:
    predictor = TemplatePredictor(one_bit_each(30))
    matches = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.4
    matches[:30] |= torch.eye(30, dtype=torch.bool)
    matches[:15] = torch.eye(30, dtype=torch.bool)[:15]
    covariance = predictor.covariance(matches)
    assert not covariance[:15].any()
    assert not covariance[:, :15].any()
    assert covariance[15:, 15:].all()


def test_the_band_of_a_subset_is_of_a_random_one() -> None:
    """The first half of the states is surely right and the second surely wrong: about half of any random subset is."""
    predictor = TemplatePredictor(one_bit_each(8))
    matches = torch.eye(8, dtype=torch.bool).repeat(50, 1)
    next_states = matches.clone()
    next_states[200:] = ~next_states[200:]

    def band_of_a_subset() -> ExactMatchBand:
        return exact_match_band(
            predictor,
            matches,
            next_states,
            "midpoint",
            [1],
            generator=torch.Generator().manual_seed(0),
            draws=2,
            states_max=100,
        )

    band = band_of_a_subset()
    assert float(band.mean[0]) == 0.5
    # Five standard deviations of the number of right ones among 100 of 400.
    assert (band.quantiles - 0.5).abs().max() < 5 * math.sqrt(0.25 / 100)
    # All chance is the generator's.
    with torch.random.fork_rng():
        torch.manual_seed(1)
        again = band_of_a_subset()
    assert torch.equal(again.quantiles, band.quantiles)


def test_the_band_throws_a_coin_for_every_tie_where_nothing_varies() -> None:
    """Where one template matches, the sign decoder reads each 0-bit at random: three of them are right in 1 of 8."""
    predictor = TemplatePredictor(one_bit_each(4))
    matches = torch.eye(4, dtype=torch.bool).repeat(100, 1)
    band = exact_match_band(
        predictor,
        matches,
        matches,
        "sign",
        [1, 64],
        generator=torch.Generator().manual_seed(0),
        draws=50,
        levels=(0.0, 0.5, 1.0),
    )
    assert band.mean.tolist() == pytest.approx([1 / 8, 1 / 8])
    deviation = math.sqrt(1 / 8 * 7 / 8 / 400)
    for low, median, high in band.quantiles.tolist():
        # The median of 50 rates of 400 coins each, and their extremes.
        assert median == pytest.approx(1 / 8, abs=deviation)
        assert 1 / 8 - 5 * deviation < low < median < high < 1 / 8 + 5 * deviation


def worst(margin: float) -> WorstCase:
    return WorstCase(margin, 0, 1, 1, 1, torch.ones(1, dtype=torch.bool))


def certificate(ones: float | None, zeros: float | None, *, proven: bool = True, score: float = 0.5) -> Certificate:
    bound = Bound(1, 1, torch.ones(1, dtype=torch.bool))
    first, second = (None if margin is None else worst(margin) for margin in (ones, zeros))
    return Certificate("sign", bound, first, second, proven, score, bits=1)


@pytest.mark.parametrize(
    ("ones", "zeros", "exact", "tie"),
    [
        (0.1, 0.1, True, False),
        (0.1, TIE, True, True),
        # A margin of exactly 0 is read as 0, which is wrong for a 1-bit.
        (0.0, 0.1, False, True),
        (-0.1, 0.1, False, False),
        # The tie of a 0-bit is told although a 1-bit is wrong anyway.
        (-0.1, TIE / 2, False, True),
        (None, None, True, False),
    ],
)
def test_what_is_exact_and_what_is_a_tie(ones: float | None, zeros: float | None, exact: bool, tie: bool) -> None:
    found = certificate(ones, zeros)
    assert (found.exact, found.tie) == (exact, tie)
    still_open = certificate(ones, zeros, proven=False).exact
    assert still_open is (None if exact else False)


def test_the_sign_rule_of_multiplication_fails_and_ties() -> None:
    templates = Multiplication(3).templates
    found = certify(TemplatePredictor(templates), MatchBounds(templates), "sign")
    assert found.ones is not None
    assert found.ones.margin < -0.01
    assert found.exact is False
    assert found.tie


def test_one_member_suffices_where_a_coin_would() -> None:
    """With one bit and δ above 1/2 the inverse of the Gaussian tail is negative, and its square another number."""
    for delta in (0.55, 0.69, 0.95):
        assert certificate(0.1, 0.1, score=0.01).members(delta) == 1


class OutOfTime(MatchBounds):
    """Every search for the most matches ends with a bound that is one above what it has found."""

    def max_matches(self, bit: int | None = None, set_count: int | None = None) -> Bound | None:
        found = super().max_matches(bit, set_count)
        return None if found is None else dataclasses.replace(found, bound=found.bound + 1)


def test_a_search_that_ran_out_of_time_proves_nothing() -> None:
    templates = Addition(3).templates
    predictor = TemplatePredictor(templates)
    found = certify(predictor, OutOfTime(templates), "midpoint")
    sure = certify(predictor, MatchBounds(templates), "midpoint")
    assert (sure.proven, sure.exact) == (True, True)
    assert (found.proven, found.exact) == (False, None)
    # What was found is attained all the same, and what is promised is on the safe side.
    assert found.ones is not None
    assert sure.ones is not None
    assert found.ones.margin == pytest.approx(sure.ones.margin, abs=1e-12)
    assert found.score <= sure.score
    assert found.max_matches.bound == sure.max_matches.bound + 1


def test_a_bit_that_all_matching_templates_set_counts_in_the_score() -> None:
    """s = C_j = 2 is all there is: the margin there over the deviation there, by the predictor."""
    rule = Template.rule("same", ones=[0], sets=[0])
    templates = templates_of(rule, rule, bits=1)
    predictor = TemplatePredictor(templates)
    matches = torch.tensor([[True, True]])
    prediction = predictor.predict(matches)
    level = thresholds("midpoint", predictor, torch.tensor([2]))
    score = float((prediction.mean - level) / prediction.variance.sqrt())
    assert certify(predictor, MatchBounds(templates), "midpoint").score == pytest.approx(score, rel=1e-12)


def failures_of(limit: LimitPrediction, decoder: str, members: int) -> float:
    """Sum over states of the chance of any wrong bit, by scipy."""
    margin: Tensor = limit.margins[decoder]  # type: ignore[index]
    deviation = (limit.variance / members).sqrt()[:, None].expand_as(margin)
    varying = limit.variance > 0
    scores = (margin / deviation)[varying].numpy()
    assert bool((margin[~varying] > 0).all())
    return float(-np.expm1(stats.norm.logcdf(scores).sum(1)).sum())


@pytest.mark.parametrize("delta", [0.3, 0.05, 0.01, 1e-3, 1e-4, 1e-6, 1e-9, 1e-14])
@pytest.mark.parametrize("bits", [2, 4])
def test_members_for_states_are_the_fewest(bits: int, delta: float) -> None:
    """Counted up from one, where the package searches by halves."""
    task = Addition(bits)
    limit = LimitPrediction(task, EvaluationSet.sample(task, 50, 0))
    found = members_for_states(limit, "midpoint", delta)
    assert found == next(n for n in itertools.count(1) if failures_of(limit, "midpoint", n) <= delta)


def test_every_bit_that_an_input_can_set_is_among_the_bits_of_the_start() -> None:
    """All four bits of a word can be 1 at once, and then all four templates match, whatever is reachable later."""
    found = certify_task(Permutation(4), decoders=["midpoint"])
    assert found["num_matches"]["reachable"]["max"] == 4
    assert found["num_matches"]["reachable_from"] == ["x"]


class EvenAddition(Addition):
    """Addition of even numbers alone."""

    name = "even addition"

    def inputs(self, generator: random.Random) -> Iterator[tuple[int, int]]:
        return ((p & ~1, q & ~1) for p, q in super().inputs(generator))


def test_a_bit_below_all_that_inputs_set_is_not_among_the_bits_of_the_start() -> None:
    found = certify_task(EvenAddition(3), decoders=["midpoint"])["num_matches"]
    assert found["reachable_from"] == ["p[1:3]", "q[1:3]"]
    assert (
        found["reachable"]["max"] < certify_task(Addition(3), decoders=["midpoint"])["num_matches"]["reachable"]["max"]
    )


@pytest.mark.parametrize("task", [Addition(2), Addition(3), Multiplication(2)], ids=repr)
def test_no_state_of_a_trajectory_matches_more_than_the_reachable_ones(task: Addition | Multiplication) -> None:
    found = certify_task(task, decoders=["midpoint"])
    most = int(EvaluationSet.sample(task, 10_000, 0).matches.sum(1).max())
    assert most <= found["num_matches"]["reachable"]["max"] <= found["num_matches"]["all_states"]["max"]
