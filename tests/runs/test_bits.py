"""Single bits of ensembles, counted one by one: histograms, standardised deviations, failures, members needed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ntk_ensembles.runs import convergence_rows
from ntk_ensembles.runs.bits import Deviations, bit_failures, members_needed, output_histogram, standardised_deviations
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import DECODERS, Decoder, FiniteWidth, LimitPrediction, TemplatePredictor, WidthPrediction

TASK = Addition(3)
WIDTH = 10 * len(TASK.templates)


def drawn(members: int, states: int = 60, spread: float = 1.0, task: Addition = TASK) -> Deviations:
    """Deviations of the predicted size times ``spread``, as they are kept."""
    limit = LimitPrediction(task, EvaluationSet.sample(task, states, 0), TemplatePredictor(task.templates))
    noise = torch.randn(members, *limit.mean.shape, generator=torch.Generator().manual_seed(0))
    at_width = WidthPrediction(limit, FiniteWidth(limit.predictor, WIDTH), units=16)
    of_members = (spread * limit.variance.sqrt()[:, None] * noise).to(torch.float16)
    return Deviations(limit, at_width, of_members, torch.arange(members))


def means_of(deviations: Deviations, members: int) -> Tensor:
    """Means of N consecutive members, all groups."""
    whole = len(deviations.of_members) // members * members
    return deviations.of_members[:whole].double().view(-1, members, *deviations.limit.mean.shape).mean(1)


def wrong(deviations: Deviations, members: int, decoder: Decoder) -> Tensor:
    limit = deviations.limit
    return (limit.mean + means_of(deviations, members) > limit.thresholds[decoder]) != limit.evaluation.next_states


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_every_output_of_a_state_that_matches_is_in_the_histogram(spread: float) -> None:
    """What lies beyond the outermost bins, as it does where the spread is far larger than predicted, is in those."""
    deviations = drawn(6, spread=spread)
    limit = deviations.limit
    found = output_histogram(deviations, 2, "midpoint")
    edges = found.edges.numpy()
    matched = limit.evaluation.matches.any(1)
    assert not matched.all()
    outputs = (limit.mean - limit.thresholds["midpoint"] + means_of(deviations, 2))[:, matched]
    true = limit.evaluation.next_states[matched]
    for density, kind in zip(found.measured, (~true, true), strict=True):
        values = outputs[:, kind].numpy().ravel()
        counts = np.histogram(values.clip(edges[0], edges[-1]), edges)[0]
        # A value that rounding puts into the next bin is allowed for.
        measured = density.numpy() * np.diff(edges) * len(values)
        assert measured.sum() == pytest.approx(len(values), rel=1e-12)
        assert np.abs(measured - counts).sum() <= 4


def test_of_many_states_1024_at_equal_distances_are_standardised() -> None:
    deviations = drawn(4, states=1100, task=Addition(6))
    limit = deviations.limit
    assert len(limit.mean) == 1100
    rows = [1100 * row // 1024 for row in range(1024)]
    varies = limit.variance[rows] > 0
    scores = means_of(deviations, 2)[:, rows][:, varies] / (limit.variance[rows][varies] / 2).sqrt()[:, None]
    found = standardised_deviations(deviations, limit, 2)
    assert found is not None
    assert float(found.counts.sum()) == scores.numel()
    assert found.mean == pytest.approx(float(scores.mean()), abs=1e-6)
    assert found.deviation == pytest.approx(float(scores.std(correction=0)), rel=1e-5)
    at_width = deviations.at_width
    assert at_width is not None
    here = standardised_deviations(deviations, at_width, 2)
    assert here is not None
    own = (means_of(deviations, 2)[:, at_width.rows] - at_width.bias) / (at_width.variance / 2).sqrt()
    own = own[:, at_width.variance > 1e-12]
    assert here.mean == pytest.approx(float(own.mean()), abs=1e-5)


def test_failures_name_the_groups_that_had_a_part_in_them() -> None:
    deviations = drawn(6, spread=2.5)
    limit = deviations.limit
    evaluation, templates = limit.evaluation, TASK.templates
    found = bit_failures(deviations, 2, "midpoint")
    false = wrong(deviations, 2, "midpoint").sum(0)
    assert (false > 0).any(0).sum() > 3
    for bit, failures in enumerate(found):
        true = evaluation.next_states[:, bit]
        assert failures.readings == 3 * len(true)
        assert failures.missed == int(false[true, bit].sum())
        assert failures.invented == int(false[~true, bit].sum())
        setting: dict[str, int] = {}
        for row in templates.setters[bit]:
            group = templates.templates[row].group
            missed = int(false[true & evaluation.matches[:, row], bit].sum())
            setting[group] = setting.get(group, 0) + missed
        assert failures.setting == {name: count for name, count in setting.items() if count}
        s = evaluation.matches.sum(1)[false[:, bit] > 0].tolist()
        assert failures.num_matches == ((min(s), max(s)) if s else None)
    # Groups that can set a bit and had no part in a miss are not named.
    assert any(failures.setting.keys() < failures.silent.keys() for failures in found)


def test_failures_are_predicted_for_as_many_members_as_are_read_together() -> None:
    deviations = drawn(4)
    at_width = deviations.at_width
    assert at_width is not None
    for failures in bit_failures(deviations, 4, "midpoint"):
        margin, variance = at_width.margins["midpoint"][:, failures.bit], at_width.variance[:, failures.bit]
        tails = [
            0.5 * math.erfc(float(m) / math.sqrt(float(v) / 4) / math.sqrt(2)) if v > 0 else float(m < 0)
            for m, v in zip(margin, variance, strict=True)
        ]
        assert failures.at_width == pytest.approx(sum(tails) / len(tails), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("decoder", DECODERS)
def test_members_needed_are_the_fewest_that_are_counted(decoder: Decoder) -> None:
    """Also to a share that some N reaches exactly, and to one of the rows where no single members are there."""
    deviations = drawn(20, spread=2.0)
    rows = convergence_rows(deviations.limit, deviations.of_members)
    shares = {}
    for n in range(1, 21):
        right = ~wrong(deviations, n, decoder).any(2)
        shares[n] = int(right.sum()) / right.numel()
    sizes = [row["members"] for row in rows]
    assert sizes == [1, 2, 4, 8, 16, 20]
    inside = 0
    for exact in (0.2, 0.5, *sorted({*shares.values()} - {0.0}), 1.0):
        found = members_needed(rows, deviations, decoder, exact)
        reached = [n for at, n in enumerate(sizes) if all(shares[later] >= exact for later in sizes[at:])]
        assert members_needed(rows, None, decoder, exact) == (reached[0] if reached else None)
        if found is None:
            assert not reached
            continue
        assert shares[found] >= exact
        assert found == 1 or shares[found - 1] < exact
        inside += found not in sizes
    assert inside
