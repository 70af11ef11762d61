"""What validations count: over several batches, and where a state fails and ties at once."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ntk_ensembles.tasks import Addition, Template
from ntk_ensembles.theory import DECODERS, NTKExecutor, TemplatePredictor, decode, thresholds
from ntk_ensembles.theory.validation import Tally, validate_task


class Crowded(Addition):
    """A hundred templates more set the lowest bit in a state that is never reached, and pull its mean down."""

    def make_templates(self) -> Iterator[Template]:
        yield from super().make_templates()
        for _ in range(100):
            yield Template.rule("never", ones=range(self.layout.bits), sets=[self.layout["p"][0]])


def fails(task: Addition, pair: tuple[int, int]) -> bool:
    """Whether the sign decoder is wrong in any micro-step of one input, by dense predictions of one state each."""
    predictor = TemplatePredictor(task.templates)
    state = task.initial_state(pair)[None]
    for _ in range(task.num_micro_steps(pair)):
        matches = task.templates.matches(state)
        levels = thresholds("sign", predictor, matches.sum(1))
        union = task.templates.micro_step(state)
        if not torch.equal(decode(predictor.predict(matches).mean, levels), union):
            return True
        state = union
    return False


PAIRS = random.Random(0).sample(list(itertools.product(range(16), range(16))), 64)


@functools.cache
def failing() -> list[int]:
    """Positions of the inputs that fail."""
    task = Crowded(4)
    return [position for position, pair in enumerate(PAIRS) if fails(task, pair)]


@pytest.mark.parametrize("together", [16, 20, 64])
def test_failures_of_all_batches_add_up(together: int) -> None:
    """64 inputs, some of which fail, in one batch and in several."""
    task = Crowded(4)
    executors = [NTKExecutor(task.templates, decoder) for decoder in reversed(DECODERS)]
    for executor in executors:
        executor.states_at_once = together
    told: list[int] = []
    report = validate_task(task, executors, inputs=PAIRS, on_progress=told.append)
    assert told == [min(together, 64 - start) for start in range(0, 64, together)]
    sign, midpoint = report.tallies
    assert sign.failures == len(failing())
    # No batch has them all, unless it is the only one.
    assert together == 64 or len({position // together for position in failing()}) > 2
    assert sign.first_failure is not None
    assert sign.first_failure.startswith(f"input {PAIRS[failing()[0]]}, ")
    assert (midpoint.failures, midpoint.first_failure) == (0, None)


def test_tallies_add_up() -> None:
    first = Tally(3, "first", 0.5, -0.25, 7)
    second = Tally(2, "second", 0.125, 0.5, 1)
    assert first + second == Tally(5, "first", 0.125, -0.25, 8)
    assert Tally() + second == second
    assert (second + Tally()).first_failure == "second"


def test_a_tie_is_a_state_on_the_edge_and_no_failure() -> None:
    """Four states: right, wrong by far, on the edge by a little, and one that nothing matches."""
    ones = np.array([0.5, -0.5, 1e-12, math.inf])
    zeros = np.array([0.25, 0.25, 0.25, math.inf])
    found = Tally().with_margins(ones, zeros)
    assert found.ties == 1
    assert (found.smallest_one, found.smallest_zero) == (-0.5, 0.25)
    assert found.with_margins(zeros, np.array([0.1, -1e-10, -0.2, 1e-10])).ties == 3
    assert Tally().with_margins(ones[:0], zeros[:0]) == Tally()
