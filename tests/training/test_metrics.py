"""Metrics by hand values, two updates and a reset; convergence rows by brute force."""

import math

import pytest
import torch

from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import LimitPrediction
from ntk_ensembles.training import (
    BitAccuracy,
    ExactMatch,
    ExecutionMatch,
    RMSDeviation,
    convergence,
    ensemble_sizes,
)

TRUTH = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]]).bool()
ONE_WRONG = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]]).bool()


def test_exact_match() -> None:
    metric = ExactMatch()
    metric.update(ONE_WRONG, TRUTH)
    assert float(metric.compute()) == pytest.approx(2 / 3)
    metric.update(TRUTH, TRUTH)
    assert float(metric.compute()) == pytest.approx(5 / 6)
    metric.reset()
    metric.update(~TRUTH, TRUTH)
    assert float(metric.compute()) == 0


def test_bit_accuracy() -> None:
    metric = BitAccuracy()
    metric.update(ONE_WRONG, TRUTH)
    metric.update(~TRUTH, TRUTH)
    assert float(metric.compute()) == pytest.approx(8 / 18)
    metric.reset()
    metric.update(TRUTH, TRUTH)
    assert float(metric.compute()) == 1


def test_an_execution_is_right_if_all_its_states_are() -> None:
    metric = ExecutionMatch([torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([2])])
    metric.update(ONE_WRONG, TRUTH)
    assert float(metric.compute()) == pytest.approx(2 / 3)
    metric.update(TRUTH, TRUTH)
    assert float(metric.compute()) == pytest.approx(5 / 6)
    metric.reset()
    metric.update(~TRUTH, TRUTH)
    assert float(metric.compute()) == 0


def test_rms_deviation() -> None:
    metric = RMSDeviation()
    metric.update(torch.tensor([[3.0, 0.0]]))
    assert float(metric.compute()) == pytest.approx(math.sqrt(4.5))
    metric.update(torch.tensor([[4.0, 0.0]]))
    assert float(metric.compute()) == pytest.approx(2.5)
    metric.reset()
    metric.update(torch.zeros(1, 2))
    assert float(metric.compute()) == 0


@pytest.mark.parametrize(("members", "sizes"), [(0, []), (1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_ensemble_sizes(members: int, sizes: list[int]) -> None:
    assert ensemble_sizes(members) == sizes


def test_convergence_rows_by_brute_force() -> None:
    task = Addition(2)
    theory = LimitPrediction(task, EvaluationSet.sample(task, 60, 0))
    evaluation = theory.evaluation
    generator = torch.Generator().manual_seed(0)
    sigma = theory.variance.sqrt()[None, :, None]
    deviations = 2 * sigma * torch.randn(7, *theory.mean.shape, generator=generator, dtype=torch.float64)
    rows = convergence(theory, deviations)
    assert [row.members for row in rows] == [1, 2, 4, 7]
    for row in rows:
        groups = [deviations[g * row.members : (g + 1) * row.members].mean(0) for g in range(7 // row.members)]
        for decoder in ("midpoint", "sign"):
            shares = []
            whole = 0
            for group in groups:
                bits = theory.mean + group > theory.thresholds[decoder]
                right = [bool((bits[i] == evaluation.next_states[i]).all()) for i in range(len(evaluation))]
                shares.append(sum(right) / len(right))
                whole += sum(all(right[i] for i in steps.tolist()) for steps in evaluation.trajectories)
            mean = sum(shares) / len(shares)
            assert row.exact_match[decoder] == pytest.approx(mean, abs=1e-12)
            assert row.execution_match is not None
            assert row.execution_match[decoder] == pytest.approx(whole / len(groups) / len(evaluation.trajectories))
            if len(groups) > 1:
                spread = math.sqrt(sum((share - mean) ** 2 for share in shares) / (len(shares) - 1))
                assert row.exact_match_spread[decoder] == pytest.approx(spread, abs=1e-12)
            else:
                assert row.exact_match_spread[decoder] is None
        squares = torch.stack(groups).square().mean().sqrt()
        assert row.rms_deviation == pytest.approx(float(squares), rel=1e-6)
        expected = math.sqrt(float(theory.variance.mean()) / row.members)
        assert row.predicted_rms_deviation == pytest.approx(expected, rel=1e-12)


def test_rows_match_theory_where_deviations_are_drawn_from_it() -> None:
    """Gaussian deviations with the theory's covariance: measured exact match agrees with the prediction."""
    task = Addition(3)
    theory = LimitPrediction(task, EvaluationSet.sample(task, 300, 0))
    covariance = theory.predictor.covariance(theory.evaluation.matches)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp_min(0).sqrt()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(400, *theory.mean.shape, generator=generator, dtype=torch.float64)
    for row in convergence(theory, root @ noise)[:4]:
        spread = row.exact_match_spread["midpoint"]
        assert spread is not None
        error = spread / math.sqrt(400 // row.members)
        # Four standard errors of the mean over groups, and of a rare failure that no group may have met.
        assert row.exact_match["midpoint"] == pytest.approx(row.predicted_exact_match["midpoint"], abs=4 * error + 1e-5)
