"""Multiplication: the OR-machine against Python's *, its counter, its bounds."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from ntk_ensembles.tasks import Multiplication, StateLayout
from ntk_ensembles.tasks.evaluation import template_trajectories


def run_pairs(task: Multiplication, pairs: list[tuple[int, int]]) -> tuple[list[int], int]:
    """The products, each checked to stay, and the most micro-steps until the fixed point."""
    starts = torch.stack([task.initial_state(pair) for pair in pairs])
    visited, finals = template_trajectories(task.templates, starts, [task.num_micro_steps(pair) for pair in pairs])
    assert torch.equal(task.templates.micro_step(finals), finals)
    return [task.result(state) for state in finals], max(len(states) - 1 for states in visited)


@pytest.mark.parametrize("bits", range(1, 6))
def test_every_pair(bits: int) -> None:
    task = Multiplication(bits)
    pairs = list(itertools.product(range(1 << bits), range(1 << bits)))
    # One micro-step beyond the bound, so that only the bound itself can be seen to be reached.
    starts = torch.stack([task.initial_state(pair) for pair in pairs])
    visited, _ = template_trajectories(task.templates, starts, [task.num_micro_steps(pair) + 1 for pair in pairs])
    assert max(len(states) - 1 for states in visited) == task.num_micro_steps((0, 0))
    assert run_pairs(task, pairs)[0] == [first * second for first, second in pairs]


@pytest.mark.parametrize("bits", [7, 12, 13, 24])
def test_structured_and_random_pairs(bits: int) -> None:
    task = Multiplication(bits)
    pairs = list(itertools.islice(task.inputs(random.Random(bits)), bits + 60))
    assert run_pairs(task, pairs)[0] == [first * second for first, second in pairs]


def test_the_widest_factors() -> None:
    task = Multiplication(64)
    full = 2**64 - 1
    pairs = [(full, full), (0x0123456789ABCDEF, 0xFEDCBA9876543210)]
    assert run_pairs(task, pairs)[0] == [first * second for first, second in pairs]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_other_counters_are_wrong(count: int) -> None:
    # The docstring's argument asks for an odd counter of at least L = 4 bits; the machine has 5.
    task = Multiplication(4)
    assert len(task.layout["count"]) == 5
    task.layout = StateLayout(**{name: len(task.layout[name]) for name in task.layout} | {"count": count})
    pairs = list(itertools.product(range(16), range(16)))
    starts = torch.stack([task.initial_state(pair) for pair in pairs])
    _, finals = template_trajectories(task.templates, starts, [100] * len(pairs))
    products = [task.result(state) for state in finals]
    assert products != [first * second for first, second in pairs]


@pytest.mark.parametrize("bits", [*range(1, 20), 32, 64])
def test_counts(bits: int) -> None:
    task = Multiplication(bits)
    counter = bits if bits % 2 else bits + 1
    assert len(task.templates) == 17 * bits - 3 + counter <= 20 * bits + 2
    assert task.layout.bits == 9 * bits + 1 + counter <= 18 * bits
    assert task.num_micro_steps((0, 0)) <= min(bits**2 + 4 * bits, 4 * bits**2 + 3 * bits)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_few_pairs_are_enumerated_once_each(bits: int) -> None:
    assert sorted(Multiplication(bits).inputs(random.Random(0))) == list(
        itertools.product(range(1 << bits), range(1 << bits))
    )


@pytest.mark.parametrize("bits", [0, 65])
def test_bad_options(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits}: expected an integer from 1 to 64"):
        Multiplication(bits)
