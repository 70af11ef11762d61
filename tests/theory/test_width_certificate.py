"""Estimates at a finite width over all states: against every state of a small task, and against trained ensembles."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ntk_ensembles.ensemble import predict
from ntk_ensembles.ensemble.cohort import Recipe, train_members
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.templates import MatchBounds, StateLayout, Template, TemplateSet
from ntk_ensembles.theory import (
    DECODERS,
    Decoder,
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


def free_templates() -> TemplateSet:
    """Six templates that want a bit each, so that any of them match together; some bits have one setter, some five."""
    sets = [[0, 1], [0, 2], [0, 3, 5], [0, 4], [1, 2, 3, 4], [0, 4]]
    rules = [Template.rule("own", ones=[bit], sets=written) for bit, written in enumerate(sets)]
    return TemplateSet(StateLayout(x=6), rules)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("corrected", [False, True])
def test_the_score_is_the_smallest_of_all_states_where_any_templates_match_together(
    corrected: bool, decoder: Decoder, padding: int
) -> None:
    """Each bit and value in turn varies more than all others, and so decides."""
    templates = free_templates()
    finite = FiniteWidth(TemplatePredictor(templates, padding), 600, corrected=corrected)
    matches = torch.tensor(list(itertools.product([False, True], repeat=6))[1:])
    following = templates.set_counts(matches) > 0
    mean = finite.predictor.predict(matches).mean + finite.bias(matches)
    limits = thresholds(decoder, finite.predictor, matches.sum(1))
    distance = torch.where(following, mean - limits, limits - mean)
    bounds = MatchBounds(templates)
    found, expected = [], []
    for value, bit in itertools.product([0, 1], range(6)):
        spread = torch.full((2, 6), 1e-4, dtype=torch.float64)
        spread[value, bit] = 1.0
        scores = []
        for state, s in enumerate(matches.sum(1).tolist()):
            for j in range(6):
                margin = float(distance[state, j])
                variance = float(finite.predictor.variance(torch.tensor([s]))) + float(
                    spread[int(following[state, j]), j]
                )
                # A template alone is a training point: it fails, ties, or is right for certain.
                scores.append(0.0 if margin <= 1e-9 else margin / math.sqrt(variance) if s > 1 else math.inf)
        expected.append(min(scores))
        found.append(score_at_width(finite, bounds, decoder, spread))
    assert found == pytest.approx(expected, rel=1e-9)
    assert (max(expected) > 0) == (decoder == "midpoint")


def test_a_0_bit_is_raised_by_those_of_the_others_that_have_the_most_bias() -> None:
    """Of two templates that exclude each other the one that sets fewer bits lowers the output less."""
    rules = [
        Template.rule("setter", ones=[3], sets=[0]),
        Template.rule("long", ones=[0], sets=[1, 2, 3, 4, 5]),
        Template.rule("short", ones=[1], zeros=[0], sets=[1]),
        Template.rule("free", ones=[2], sets=[1, 2, 3]),
    ]
    templates = TemplateSet(StateLayout(x=6), rules)
    finite = FiniteWidth(TemplatePredictor(templates), 600)
    spread = torch.full((2, 6), 1e-4, dtype=torch.float64)
    spread[0, 0] = 1.0
    scores = []
    for at in ([1, 3], [2, 3]):
        matches = torch.tensor([[index in at for index in range(4)]])
        mean = finite.predictor.predict(matches).mean + finite.bias(matches)
        distance = float((thresholds("midpoint", finite.predictor, torch.tensor([2])) - mean)[0, 0])
        scores.append(distance / math.sqrt(float(finite.predictor.variance(torch.tensor([2]))) + 1))
    assert scores[1] < scores[0]
    assert score_at_width(finite, MatchBounds(templates), "midpoint", spread) == pytest.approx(scores[1], rel=1e-9)


def test_the_spread_is_the_largest_for_each_bit_and_value() -> None:
    finite = theory(20 * SIZE)
    matches = MATCHES[::3][MATCHES[::3].sum(1) > 1]
    following = TASK.templates.set_counts(matches) > 0
    # No state is left in which the first bit becomes 1.
    matches, following = matches[~following[:, 0]], following[~following[:, 0]]
    estimate = finite.variance(matches, generator=torch.Generator().manual_seed(0), units=64).variance
    added = estimate - finite.predictor.variance(matches.sum(1))[:, None]
    found = spread_at_width(finite, matches, units=64)
    for value, bit in itertools.product([False, True], range(BITS)):
        seen = [float(a) for a, one in zip(added[:, bit], following[:, bit], strict=True) if bool(one) == value]
        assert float(found[int(value), bit]) == (max(seen) if seen else float(found.max()))
    assert found[1, 0] == found.max()
    assert (found[0] != found[1]).sum() >= BITS - 1


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


def test_corrected_labels_are_those_that_are_certified() -> None:
    evaluation, width = EvaluationSet.sample(TASK, 50, 0), 12 * SIZE
    finite = theory(width, corrected=True)
    found = certify_width(TASK, width, labels="corrected", decoders=["midpoint"], evaluation=evaluation)
    assert (found["labels"], found["movement"]) == ("corrected", finite.movement)
    assert finite.movement < theory(width).movement
    spread = spread_at_width(finite, states_of_all_densities(TASK, evaluation))
    score = score_at_width(finite, MatchBounds(TASK.templates), "midpoint", spread)
    assert found["decoders"]["midpoint"]["score"]["all_states"] == score
    assert score != score_at_width(theory(width), MatchBounds(TASK.templates), "midpoint", spread)


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
