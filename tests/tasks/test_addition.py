"""Addition: the OR-machine against Python's +, within 2L micro-steps."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ntk_ensembles.tasks import Addition
from ntk_ensembles.tasks.evaluation import template_trajectories


def check_sums(task: Addition, pairs: list[tuple[int, int]]) -> int:
    """Checks every sum and that it stays; returns the most micro-steps until the fixed point."""
    starts = torch.stack([task.initial_state(pair) for pair in pairs])
    visited, finals = template_trajectories(task.templates, starts, [task.num_micro_steps(pair) for pair in pairs])
    assert [task.result(state) for state in finals] == [first + second for first, second in pairs]
    assert torch.equal(task.templates.micro_step(finals), finals)
    return max(len(states) - 1 for states in visited)


@pytest.mark.parametrize("bits", range(1, 6))
def test_every_pair(bits: int) -> None:
    task = Addition(bits)
    # A carry from the lowest bit to the top: two micro-steps a bit, but the last stays.
    assert check_sums(task, list(itertools.product(range(1 << bits), range(1 << bits)))) == 2 * bits - 1


@pytest.mark.parametrize("bits", [10, 64, 200])
def test_structured_and_random_pairs(bits: int) -> None:
    task = Addition(bits)
    pairs = list(itertools.islice(task.inputs(random.Random(bits)), bits + 100))
    assert check_sums(task, pairs) == 2 * bits - 1


@pytest.mark.parametrize("bits", [1, 2, 10, 64])
def test_counts(bits: int) -> None:
    task = Addition(bits)
    assert len(task.templates) == 4 * bits
    assert task.layout.bits == 3 * bits


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_few_pairs_are_enumerated_once_each(bits: int) -> None:
    pairs = list(Addition(bits).inputs(random.Random(0)))
    assert sorted(pairs) == list(itertools.product(range(1 << bits), range(1 << bits)))
    assert pairs[0] == (0, 0)


def test_random_pairs_have_carries_of_many_lengths() -> None:
    task = Addition(32)
    pairs = list(itertools.islice(task.inputs(random.Random(0)), 50, 450))
    starts = torch.stack([task.initial_state(pair) for pair in pairs])
    visited, _ = template_trajectories(task.templates, starts, [task.num_micro_steps(pair) for pair in pairs])
    lengths = {len(states) for states in visited}
    assert min(lengths) < 5
    assert max(lengths) > 50
    assert len(lengths) > 20


@pytest.mark.parametrize("bits", [0, 513])
def test_bad_options(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}: expected an integer from 1 to 512"):
        Addition(bits)
