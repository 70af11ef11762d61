"""Estimates at a finite width over all states: against every state of a small task, and against trained ensembles."""

import math

import pytest
import torch
from torch import Tensor

from ntk_ensembles.ensemble import predict
from ntk_ensembles.ensemble.cohort import Recipe, train_members
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.templates import MatchBounds
from ntk_ensembles.theory import (
    DECODERS,
    FiniteWidth,
    Layers,
    TemplatePredictor,
    certify_task,
    margins,
    thresholds,
)
from ntk_ensembles.theory.width_certificate import (
    certify_width,
    score_at_width,
    spread_at_width,
    states_of_all_densities,
)

TASK = Addition(3)
SIZE, BITS = len(TASK.templates), TASK.layout.bits
EVERY = (torch.arange(1 << BITS)[:, None] >> torch.arange(BITS) & 1).bool()
MATCHES = TASK.templates.matches(EVERY)
NEXT = TASK.templates.set_counts(MATCHES) > 0


def theory(width: int, *, antisymmetric: bool = False, corrected: bool = False, layers: Layers = "both") -> FiniteWidth:
    predictor = TemplatePredictor(TASK.templates, layers=layers, antisymmetric=antisymmetric)
    return FiniteWidth(predictor, width, corrected=corrected)


@pytest.mark.parametrize("antisymmetric", [False, True])
@pytest.mark.parametrize(("corrected", "layers"), [(False, "both"), (True, "both"), (False, "readout")])
def test_the_score_is_below_that_of_every_state(antisymmetric: bool, corrected: bool, layers: Layers) -> None:
    finite = theory(20 * SIZE, antisymmetric=antisymmetric, corrected=corrected, layers=layers)
    matches, following = MATCHES[MATCHES.any(1)], NEXT[MATCHES.any(1)]
    generator = torch.Generator().manual_seed(0)
    variance = finite.variance(matches, generator=generator, units=256).variance
    mean = finite.predictor.predict(matches).mean + finite.bias(matches)
    spread = spread_at_width(finite, matches)
    several = matches.sum(1) > 1
    for decoder in DECODERS:
        distance = margins(mean, thresholds(decoder, finite.predictor, matches.sum(1)), following)
        if not several.all():
            # A template alone is no matter of chance: its bits are right, or tie.
            alone = distance[~several].min()
        scores = (distance / variance.sqrt())[several]
        expected = float(scores.min()) if alone > 1e-9 and scores.min() > 0 else 0.0
        found = score_at_width(finite, MatchBounds(TASK.templates), decoder, spread)
        assert found <= expected * (1 + 1e-6)
        # The worst bias and the worst variance need not meet in one state.
        assert found >= 0.6 * expected
    assert expected == 0  # the sign decoder ties
    some = spread_at_width(finite, states_of_all_densities(TASK, EvaluationSet.sample(TASK, 200, 0)))
    torch.testing.assert_close(some, spread, rtol=0.25, atol=1e-6)


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_it_becomes_the_certificate_of_infinite_width(antisymmetric: bool) -> None:
    evaluation = EvaluationSet.sample(TASK, 100, 0)
    found = certify_width(TASK, 10**10, antisymmetric=antisymmetric, evaluation=evaluation)
    infinite = certify_task(TASK, evaluation=evaluation)
    for decoder in DECODERS:
        for name, members in infinite["decoders"][decoder]["members"].items():
            here = found["decoders"][decoder]["members"][name]
            assert here == (members if not antisymmetric else members and 1)


def test_the_width_to_trust() -> None:
    finite = theory(7 * SIZE)
    width = finite.trusted_from
    assert theory(width).movement <= 0.6 < theory(width - 1).movement
    found = certify_width(TASK, width - 1, evaluation=EvaluationSet.sample(TASK, 20, 0))
    assert (found["trusted"], found["trusted_from"]) == (False, width)


def outputs_of(finite: FiniteWidth, init: str, members: int) -> Tensor:
    """Outputs of trained members on all 512 states, (members, states, bits)."""
    recipe = Recipe(finite.labels.float(), finite.width, init, seed=3)  # type: ignore[arg-type]
    inputs = TASK.templates.encode(MATCHES)
    found = []
    for first in range(0, members, 128):
        stack, statuses = train_members(recipe, range(first, min(first + 128, members)), torch.device("cpu"))
        assert all(status.converged for status in statuses)
        found.append(predict(stack, inputs))
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["plain", "corrected"])
@pytest.mark.parametrize("init", ["gaussian", "antisymmetric"])
@pytest.mark.parametrize("ratio", [8, 16, 32, 64])
def test_trained_ensembles_need_no_more_members(ratio: int, init: str, labels: str) -> None:
    """All 512 states at once, at four widths: 60 ensembles of as many members as a chance of 90% is said to need."""
    delta, groups = 0.1, 60
    antisymmetric = init == "antisymmetric"
    finite = theory(ratio * SIZE, antisymmetric=antisymmetric, corrected=labels == "corrected")
    found = certify_width(
        TASK,
        finite.width,
        antisymmetric=antisymmetric,
        labels=labels,  # type: ignore[arg-type]
        decoders=["midpoint"],
        delta=delta,
        evaluation=EvaluationSet.sample(TASK, 100, 0),
    )
    members = found["decoders"]["midpoint"]["members"]["all_states"]
    limits = thresholds("midpoint", finite.predictor, MATCHES.sum(1))
    outputs = outputs_of(finite, init, members * groups)

    def failures(size: int) -> float:
        means = outputs.view(-1, size, *outputs.shape[1:])[:groups].mean(1)
        return float(((means > limits) != NEXT).any(2).any(1).double().mean())

    assert failures(members) <= delta + 4 * math.sqrt(delta / groups)
    if members >= 8:
        # A quarter of them is too few, so that the number says something.
        quarter = members // 4
        means = outputs[: len(outputs) // quarter * quarter].view(-1, quarter, *outputs.shape[1:]).mean(1)
        assert float(((means > limits) != NEXT).any(2).any(1).double().mean()) > delta
