"""Certificates against every state of tiny machines, and members against drawn Gaussian ensembles."""

import math
import random

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_ensembles.tasks import Addition, EvaluationSet, StateLayout, Template, TemplateSet
from ntk_ensembles.templates.bounds import MatchBounds
from ntk_ensembles.theory import (
    DECODERS,
    LAYERS,
    TIE,
    Layers,
    LimitPrediction,
    TemplatePredictor,
    certify,
    decode,
    margins,
    members_for_states,
    sign_padding,
    thresholds,
)

BITS = 5


def random_templates(seed: int, count: int, repeats: int) -> TemplateSet:
    """Templates with one or two conditions; repeats make C_j and fan-ins large, which is what the sign rule fears."""
    generator = random.Random(seed)
    rules = []
    for _ in range(count):
        chosen = generator.sample(range(BITS), generator.randint(1, 2))
        zeros = chosen[1:] if generator.random() < 0.5 else []
        sets = generator.sample(range(BITS), generator.randint(0, 3))
        rule = Template.rule("random", ones=[p for p in chosen if p not in zeros], zeros=zeros, sets=sets)
        rules.extend([rule] * generator.randint(1, repeats))
    return TemplateSet(StateLayout(x=BITS), rules)


def brute_force(predictor: TemplatePredictor, decoder: str) -> tuple[float, float, bool, float]:
    """Over all states with s > 0: smallest margins of 1-bits and 0-bits, whether all are right, smallest score."""
    states = (torch.arange(1 << BITS)[:, None] >> torch.arange(BITS) & 1).bool()
    templates = predictor.templates
    matches = templates.matches(states)
    matches = matches[matches.any(1)]
    gaussian = predictor.predict(matches)
    levels = thresholds(decoder, predictor, matches.sum(1))  # type: ignore[arg-type]
    truth = torch.stack([templates.labels[row].any(0) for row in matches])
    distance = margins(gaussian.mean, levels, truth)
    right = bool((decode(gaussian.mean, levels) == truth).all())
    ones, zeros = distance[truth], distance[~truth]
    scores = (distance / gaussian.variance.sqrt()[:, None]).masked_fill(distance <= TIE, 0)
    return (
        float(ones.min()) if len(ones) else math.inf,
        float(zeros.min()) if len(zeros) else math.inf,
        right,
        float(scores.min()),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 30), st.integers(1, 6), st.integers(1, 6), st.sampled_from(LAYERS), st.sampled_from([0, 0, 17])
)
def test_worst_margins_equal_enumeration(seed: int, count: int, repeats: int, layers: Layers, padding: int) -> None:
    templates = random_templates(seed, count, repeats)
    predictor, extremes = TemplatePredictor(templates, padding, layers=layers), MatchBounds(templates)
    for decoder in DECODERS:
        certificate = certify(predictor, extremes, decoder)
        ones, zeros, right, score = brute_force(predictor, decoder)
        assert certificate.proven
        assert (certificate.ones.margin if certificate.ones else math.inf) == pytest.approx(ones, abs=1e-12)
        assert (certificate.zeros.margin if certificate.zeros else math.inf) == pytest.approx(zeros, abs=1e-12)
        assert certificate.exact == right
        # Not every s between the extremes need occur, so the score may only err to the safe side.
        assert certificate.score <= score + 1e-12
        if decoder == "midpoint":
            assert certificate.exact
            assert not certificate.tie
        if certificate.ones:
            assert templates.labels[templates.matches(certificate.ones.state[None])[0]].sum(0)[
                certificate.ones.bit
            ] == (certificate.ones.set_count)


def test_worst_margins_that_are_near_others_equal_enumeration() -> None:
    """With 20,000 padding templates all margins of 0-bits by the sign rule are below a thousandth.

    The states of the fewest and of the most matches, which are looked at first, have larger ones than the smallest.
    """
    rules = [Template.rule("first", ones=[0], sets=[0])] * 2
    rules += [Template.rule("others", ones=[bit], sets=[1, 2, 3, 4]) for bit in range(1, BITS) for _ in range(3)]
    templates = TemplateSet(StateLayout(x=BITS), rules)
    predictor = TemplatePredictor(templates, 20_000)
    certificate, zeros = certify(predictor, MatchBounds(templates), "sign"), brute_force(predictor, "sign")[1]
    assert certificate.zeros is not None
    assert certificate.zeros.margin == pytest.approx(zeros, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 6), st.integers(1, 8), st.sampled_from(LAYERS))
def test_padding_is_the_least_with_which_the_sign_rule_is_exact(
    seed: int, count: int, repeats: int, layers: Layers
) -> None:
    templates = random_templates(seed, count, repeats)
    bounds = MatchBounds(templates)
    padding = sign_padding(TemplatePredictor(templates, layers=layers), bounds)
    assert brute_force(TemplatePredictor(templates, padding, layers=layers), "sign")[2]
    assert padding == 0 or not brute_force(TemplatePredictor(templates, padding - 1, layers=layers), "sign")[2]
    # What is there already is not counted.
    assert sign_padding(TemplatePredictor(templates, 5, layers=layers), bounds) == padding


def test_the_sign_rule_does_fail_on_some_template_sets() -> None:
    """Otherwise the two tests above would say little."""
    for layers in LAYERS:
        sets = (random_templates(seed, 4, 6) for seed in range(40))
        outcomes = {brute_force(TemplatePredictor(one, layers=layers), "sign")[2] for one in sets}
        assert outcomes == {True, False}


@pytest.mark.parametrize("log_states", [0.0, 30 * math.log(2), 337 * math.log(2)])
@pytest.mark.parametrize("delta", [0.1, 1e-6, 1e-200])
def test_members_are_the_least_that_the_union_bound_allows(log_states: float, delta: float) -> None:
    templates = Addition(4).templates
    certificate = certify(TemplatePredictor(templates), MatchBounds(templates), "midpoint")
    members = certificate.members(delta, log_states)
    assert members is not None

    def log_bound(n: int) -> mpmath.mpf:
        with mpmath.workdps(30):
            tail = mpmath.erfc(certificate.score * mpmath.sqrt(n) / mpmath.sqrt(2)) / 2
            return log_states + mpmath.log(certificate.bits * tail)

    assert log_bound(members) <= mpmath.log(delta)
    assert members == 1 or log_bound(members - 1) > mpmath.log(delta)


def test_delta_outside_its_range_is_refused() -> None:
    templates = Addition(1).templates
    certificate = certify(TemplatePredictor(templates), MatchBounds(templates), "midpoint")
    with pytest.raises(ValueError, match="delta=1"):
        certificate.members(1.0)


def test_members_needed_hold_in_drawn_ensembles() -> None:
    """Joint Gaussian draws of whole ensembles: failures stay below δ with N members, and not with N/2."""
    task = Addition(4)
    evaluation = EvaluationSet.sample(task, 60, 0)
    predictor = TemplatePredictor(task.templates)
    delta, draws = 0.05, 20_000
    members = members_for_states(LimitPrediction(task, evaluation, predictor), "midpoint", delta)
    assert members is not None
    covariance = predictor.covariance(evaluation.matches)
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(len(covariance), dtype=covariance.dtype))
    gaussian = predictor.predict(evaluation.matches)
    levels = thresholds("midpoint", predictor, evaluation.matches.sum(1))
    generator = torch.Generator().manual_seed(0)

    def failures(n: int) -> float:
        wrong = 0
        for _ in range(20):
            noise = torch.randn(draws // 20, len(root), task.layout.bits, generator=generator, dtype=torch.float64)
            decoded = decode(gaussian.mean + torch.einsum("ij,djb->dib", root, noise) / math.sqrt(n), levels)
            wrong += int((decoded != evaluation.next_states).flatten(1).any(1).sum())
        return wrong / draws

    # Three standard deviations of the estimate.
    assert failures(members) <= delta + 3 * math.sqrt(delta / draws)
    assert failures(members // 2) > delta


def test_no_number_of_members_helps_where_the_sign_rule_ties() -> None:
    task = Addition(4)
    evaluation = EvaluationSet.sample(task, 60, 0)
    predictor, extremes = TemplatePredictor(task.templates), MatchBounds(task.templates)
    certificate = certify(predictor, extremes, "sign")
    assert certificate.exact
    assert certificate.tie
    assert certificate.members(0.5) is None
    assert members_for_states(LimitPrediction(task, evaluation, predictor), "sign", 0.5) is None


def test_a_set_that_a_solver_stumbled_over() -> None:
    """HiGHS 1.12, an integer programming solver, ends one of its questions with a "solve error"."""
    templates = random_templates(2899, 5, 5)
    predictor, bounds = TemplatePredictor(templates), MatchBounds(templates)
    for decoder in DECODERS:
        certificate = certify(predictor, bounds, decoder)
        ones, zeros, right, _ = brute_force(predictor, decoder)
        assert certificate.exact == right
        assert certificate.ones is not None
        assert certificate.ones.margin == pytest.approx(ones, abs=1e-12)
        assert certificate.zeros is not None
        assert certificate.zeros.margin == pytest.approx(zeros, abs=1e-12)
    assert brute_force(TemplatePredictor(templates, sign_padding(predictor, bounds)), "sign")[2]
