"""Sums over groups of members that are stored in 16 bits, and groups that do not fit into one part."""

from __future__ import annotations

import math

import pytest
import torch

from ntk_ensembles.runs import convergence as convergence_module
from ntk_ensembles.runs import convergence_rows
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import LimitPrediction

TASK = Addition(2)
LIMIT = LimitPrediction(TASK, EvaluationSet.sample(TASK, 20, 0))


def test_means_of_float16_are_not_rounded_to_float16() -> None:
    """The mean of 1 and 1 + 2⁻¹⁰ lies between two numbers of 16 bits, of which neither is it."""
    deviations = torch.ones(2, *LIMIT.mean.shape, dtype=torch.float16)
    deviations[1] += 2**-10
    (row,) = convergence_rows(LIMIT, deviations, [2])
    assert row["rms_deviation"] == pytest.approx(1 + 2**-11, rel=1e-7)


def test_many_members_add_up_beyond_the_range_of_float16() -> None:
    """Sums of 60,000s pass the largest number of 16 bits at the second member; their means do not."""
    deviations = torch.full((16, *LIMIT.mean.shape), 60000.0, dtype=torch.float16)
    for row in convergence_rows(LIMIT, deviations):
        assert row["rms_deviation"] == pytest.approx(float(torch.tensor(60000.0, dtype=torch.float16)), rel=1e-6)


@pytest.mark.parametrize("numbers", [1, 500, 1000, 10**6])
def test_rows_do_not_depend_on_how_many_groups_are_decoded_together(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part may hold one group alone, or some, or all, and the last may be shorter; each group's mean by hand."""
    generator = torch.Generator().manual_seed(0)
    sigma = LIMIT.variance.sqrt()[:, None]
    deviations = (3 * sigma * torch.randn(11, *LIMIT.mean.shape, generator=generator)).to(torch.float16)
    monkeypatch.setattr(convergence_module, "_NUMBERS_AT_ONCE", numbers)
    for row in convergence_rows(LIMIT, deviations, [1, 2, 3, 5, 11]):
        size = row["members"]
        starts = range(0, 11 - size + 1, size)
        means = [sum(deviations[start + i].double() for i in range(size)) / size for start in starts]
        squares = [float(mean.square().mean()) for mean in means]  # type: ignore[union-attr]
        assert row["rms_deviation"] == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-5)
        shares = []
        for mean in means:
            decoded = LIMIT.mean + mean > LIMIT.thresholds["midpoint"]
            shares.append(float((decoded == LIMIT.evaluation.next_states).all(1).double().mean()))
        average = sum(shares) / len(shares)
        assert row["exact_match"]["midpoint"] == pytest.approx(average, abs=1e-12)
        spread = row["exact_match_spread"]["midpoint"]
        if len(shares) == 1:
            assert spread is None
        else:
            deviation = math.sqrt(sum((share - average) ** 2 for share in shares) / (len(shares) - 1))
            assert spread == pytest.approx(deviation, abs=1e-12)
