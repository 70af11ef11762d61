"""Convergence rows by brute force, and against theory where deviations are drawn from it."""

import math

import pytest
import torch

from ntk_ensembles.runs import convergence_rows, ensemble_sizes
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import FiniteWidth, LimitPrediction, WidthPrediction


@pytest.mark.parametrize(("members", "sizes"), [(0, []), (1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_ensemble_sizes(members: int, sizes: list[int]) -> None:
    assert ensemble_sizes(members) == sizes


def test_convergence_rows_by_brute_force() -> None:
    task = Addition(2)
    limit = LimitPrediction(task, EvaluationSet.sample(task, 60, 0))
    evaluation = limit.evaluation
    generator = torch.Generator().manual_seed(0)
    sigma = limit.variance.sqrt()[None, :, None]
    # As they are kept: in 16 bits.
    deviations = (2 * sigma * torch.randn(7, *limit.mean.shape, generator=generator)).to(torch.float16).double()
    rows = convergence_rows(limit, deviations)
    assert [row["members"] for row in rows] == [1, 2, 4, 7]
    for row in rows:
        groups = [deviations[g * row["members"] : (g + 1) * row["members"]].mean(0) for g in range(7 // row["members"])]
        for decoder in ("midpoint", "sign"):
            shares = []
            whole = 0
            for group in groups:
                bits = limit.mean + group > limit.thresholds[decoder]
                right = [bool((bits[i] == evaluation.next_states[i]).all()) for i in range(len(evaluation))]
                shares.append(sum(right) / len(right))
                whole += sum(all(right[i] for i in steps.tolist()) for steps in evaluation.trajectories)
            mean = sum(shares) / len(shares)
            assert row["exact_match"][decoder] == pytest.approx(mean, abs=1e-12)
            assert row["execution_match"] is not None
            assert row["execution_match"][decoder] == pytest.approx(whole / len(groups) / len(evaluation.trajectories))
            if len(groups) > 1:
                spread = math.sqrt(sum((share - mean) ** 2 for share in shares) / (len(shares) - 1))
                assert row["exact_match_spread"][decoder] == pytest.approx(spread, abs=1e-12)
            else:
                assert row["exact_match_spread"][decoder] is None
        squares = torch.stack(groups).square().mean().sqrt()
        assert row["rms_deviation"] == pytest.approx(float(squares), rel=1e-6)
        expected = math.sqrt(float(limit.variance.mean()) / row["members"])
        assert row["predicted_rms_deviation"] == pytest.approx(expected, rel=1e-12)


def test_rows_hold_what_the_members_own_width_predicts() -> None:
    task = Addition(3)
    limit = LimitPrediction(task, EvaluationSet.sample(task, 40, 0))
    at_width = WidthPrediction(limit, FiniteWidth(limit.predictor, 10 * len(task.templates)), units=16)
    for row in convergence_rows(limit, torch.zeros(4, *limit.mean.shape), at_width=at_width):
        members = row["members"]
        expected = math.sqrt(float(at_width.bias.square().mean()) + float(at_width.variance.mean()) / members)
        assert row["finite_width_rms_deviation"] == pytest.approx(expected, rel=1e-12)
        assert row["finite_width_rms_deviation"] != pytest.approx(limit.rms_deviation(members), rel=1e-2)


def test_rows_match_limit_where_deviations_are_drawn_from_it() -> None:
    """Gaussian deviations with the limit's covariance: measured exact match agrees with the prediction."""
    task = Addition(3)
    limit = LimitPrediction(task, EvaluationSet.sample(task, 300, 0))
    covariance = limit.predictor.covariance(limit.evaluation.matches)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, *limit.mean.shape, generator=generator, dtype=torch.float64)
    for row in convergence_rows(limit, root @ noise)[:4]:
        spread = row["exact_match_spread"]["midpoint"]
        assert spread is not None
        error = spread / math.sqrt(400 // row["members"])
        # Four standard errors of the mean over groups, and of a rare failure that no group may have met.
        assert row["exact_match"]["midpoint"] == pytest.approx(
            row["predicted_exact_match"]["midpoint"], abs=4 * error + 1e-5
        )
