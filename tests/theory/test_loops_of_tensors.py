"""The closed loop of a stepper on plain tensors, as loaded ensembles are: wrong states go on, resting ones leave."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from ntk_ensembles.templates import StateLayout, Template, TemplateSet
from ntk_ensembles.theory import Step, TemplatePredictor, TensorStepper, decode, margins, rollout, thresholds
from ntk_ensembles.theory.executor import decoded_step

BITS = 5


def random_templates(seed: int) -> TemplateSet:
    """Outputs repeat, which the sign decoder does not bear: it is wrong on many states."""
    draw = random.Random(seed)
    rules = []
    for _ in range(8):
        chosen = draw.sample(range(BITS), draw.randint(1, 3))
        ones = draw.randint(1, len(chosen))
        outputs = draw.sample(range(BITS), draw.randint(1, 3))
        rules += [Template.rule("r", ones=chosen[:ones], zeros=chosen[ones:], sets=outputs)] * draw.randint(1, 4)
    return TemplateSet(StateLayout(x=BITS), rules)


class Dense(TensorStepper):
    """The mean of the limit, decoded by sign; remembers how many states it was given at a time."""

    def __init__(self, templates: TemplateSet) -> None:
        self.templates = templates
        self.predictor = TemplatePredictor(templates)
        self.given: list[int] = []

    def step(self, batch: Tensor) -> Step[Tensor]:
        self.given.append(len(batch))
        matches = self.templates.matches(batch)
        mean = self.predictor.predict(matches).mean
        counts = self.templates.set_counts(matches)
        return decoded_step(batch, mean, "sign", self.predictor, matches.sum(1), counts)


def by_hand(templates: TemplateSet, start: tuple[bool, ...], micro_steps: int) -> tuple[list[bool], float, bool, int]:
    """One state at a time: where it ends, its least margin, whether all was right, and when it has come to rest."""
    predictor = TemplatePredictor(templates)
    state, least, right, rest = torch.tensor([start]), math.inf, True, micro_steps
    for step in range(micro_steps):
        matches = templates.matches(state)
        mean, levels = predictor.predict(matches).mean, thresholds("sign", predictor, matches.sum(1))
        truth = templates.micro_step(state)
        decoded = decode(mean, levels)
        if matches.any():
            least = min(least, float(margins(mean, levels, truth).min()))
        right = right and torch.equal(decoded, truth)
        if torch.equal(decoded, state):
            rest = min(rest, step + 1)
        state = decoded
    return state[0].tolist(), least, right, rest


@pytest.mark.parametrize("seed", range(4))
def test_each_state_goes_its_own_way_to_the_end(seed: int) -> None:
    templates = random_templates(seed)
    starts = list(itertools.product([False, True], repeat=BITS))
    for micro_steps in (1, 3, 7):
        expected = [by_hand(templates, start, micro_steps) for start in starts]
        stepper = Dense(templates)
        found = rollout(stepper, torch.tensor(starts), micro_steps)
        assert found.states.tolist() == [state for state, *_ in expected]
        assert found.agreed.tolist() == [right for _, _, right, _ in expected]
        torch.testing.assert_close(
            found.margins, torch.tensor([least for _, least, *_ in expected], dtype=torch.float64), rtol=0, atol=1e-12
        )
        # In every micro-step those are predicted that had not come to rest before, and no others.
        rests = [rest for *_, rest in expected]
        assert stepper.given == [sum(rest > step for rest in rests) for step in range(max(rests))]


def test_the_states_above_fail_and_rest_at_different_times() -> None:
    """Otherwise the test above would say little."""
    starts = itertools.product([False, True], repeat=BITS)
    ends = [
        by_hand(random_templates(seed), start, 7)
        for seed, start in zip(itertools.cycle(range(4)), starts, strict=False)
    ]
    assert {right for _, _, right, _ in ends} == {True, False}
    assert len({rest for *_, rest in ends}) > 2
