"""Sums over aligned groups against members one by one: exact, whatever the order, the parts and the threads."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from ntk_ensembles.runs import convergence_rows, rows_of_blocks
from ntk_ensembles.runs.groups import (
    OUTCOMES,
    Block,
    Measure,
    aligned_blocks,
    blocks_of,
    exact,
    joined,
    rounded_deviations,
)
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import DECODERS, LimitPrediction

TASK = Addition(2)
LIMIT = LimitPrediction(TASK, EvaluationSet.sample(TASK, 30, 0))
MEASURE = Measure(LIMIT)


def drawn(members: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sigma = LIMIT.variance.sqrt()[:, None]
    return (3 * sigma * torch.randn(members, *LIMIT.mean.shape, generator=generator)).to(torch.float16)


def in_parts(deviations: Tensor, converged: Tensor, first: int, cuts: list[int], order: random.Random) -> list[Block]:
    """Blocks of consecutive parts that end at ``cuts``, brought in a random order and joined as they come."""
    ends = [0, *cuts, len(deviations)]
    parts = [slice(start, end) for start, end in zip(ends, ends[1:], strict=False) if start < end]
    order.shuffle(parts)
    found: list[Block] = []
    for part in parts:
        indices = torch.arange(first, first + len(deviations))[part]
        found = joined(MEASURE, [*found, *blocks_of(MEASURE, indices, converged[part], deviations[part])])
    return found


def test_sums_are_exact_from_the_smallest_number_to_the_largest() -> None:
    """65,504 and 2⁻²⁴ differ by more digits than float64 adds without loss over many members."""
    members = torch.tensor([65504.0, 2.0**-24, -65504.0, 5 * 2.0**-24] * 256).to(torch.float16)
    total = exact(members[:, None, None]).sum()
    assert Fraction(int(total), 1 << 24) == sum(Fraction(float(value)) for value in members)
    assert int(total) == 6 * 256


def test_aligned_groups_are_the_largest() -> None:
    assert aligned_blocks(range(5, 23), 1 << 20) == [[5], [6, 7], [*range(8, 16)], [16, 17, 18, 19], [20, 21], [22]]
    assert aligned_blocks(range(8), 3) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert aligned_blocks([1, 2, 3, 7, 8], 8) == [[1], [2, 3], [7], [8]]
    assert aligned_blocks([0, 2, 4, 5, 6, 9, 12, 13, 15, 16], 8) == [[0], [2], [4, 5], [6], [9], [12, 13], [15], [16]]
    assert aligned_blocks([], 8) == []


def test_deviations_are_rounded_once() -> None:
    """From the difference in double precision: float32 would lose a millionth beside a hundred."""
    mean = torch.tensor([[100.000001, -7.0000003]], dtype=torch.float64)
    outputs = torch.tensor([[[100.0, -7.0]], [[100.5, -7.25]]])
    expected = torch.tensor([[[-1e-6, 3e-7]], [[0.499999, -0.2499997]]], dtype=torch.float64).to(torch.float16)
    assert torch.equal(rounded_deviations(outputs, mean), expected)


def test_outcomes_of_groups_with_a_member_that_failed_are_zeros() -> None:
    """Of members 0 to 3 the third failed: its own row, that of 2 and 3, and that of all are no outcomes."""
    converged = torch.tensor([True, True, False, True])
    (block,) = blocks_of(MEASURE, torch.arange(4), converged, drawn(4))
    whole = [True, True, False, True, True, False, False]
    for name in OUTCOMES:
        rows = getattr(block.outcomes, name).view(7, -1)
        assert not rows[[not each for each in whole]].any()
    assert block.outcomes.bits_right[whole].all()


@pytest.mark.parametrize("first", [0, 5, 32])
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_those_of_the_members_whatever_the_parts_and_their_order(first: int, seed: int) -> None:
    order = random.Random(seed)
    deviations, converged = drawn(37, seed), torch.ones(37, dtype=torch.bool)
    cuts = sorted(order.sample(range(1, 37), order.choice([0, 3, 36])))
    blocks = in_parts(deviations, converged, first, cuts, order)
    rows = rows_of_blocks(MEASURE, blocks)
    assert rows == convergence_rows(LIMIT, deviations, indices=torch.arange(first, first + 37))
    # A block for each of the largest groups that the members fill.
    assert [len(block) for block in blocks] == [len(group) for group in aligned_blocks(range(first, first + 37), 64)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_numbers_do_not_depend_on_threads(threads: int) -> None:
    deviations, converged = drawn(64), torch.ones(64, dtype=torch.bool)
    expected = rows_of_blocks(MEASURE, blocks_of(MEASURE, torch.arange(64), converged, deviations))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert rows_of_blocks(MEASURE, blocks_of(MEASURE, torch.arange(64), converged, deviations)) == expected
        assert convergence_rows(LIMIT, deviations) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(4))
def test_a_group_with_a_member_that_failed_does_not_count(seed: int) -> None:
    """Means, squares and decoded states of every group by hand, in fractions; failed members are not even numbers."""
    order = random.Random(seed)
    deviations, first = drawn(24, seed), 4
    converged = torch.tensor([order.random() < 0.8 for _ in range(24)])
    deviations[~converged] = math.nan
    blocks = in_parts(deviations, converged, first, sorted(order.sample(range(1, 24), 4)), order)
    rows = {row["members"]: row for row in rows_of_blocks(MEASURE, blocks)}
    kept = {first + row: deviations[row].double() for row in range(24) if converged[row]}
    groups = {
        size: [
            list(range(start, start + size))
            for start in range(0, 32, size)
            if kept.keys() >= set(range(start, start + size))
        ]
        for size in (1, 2, 4, 8, 16)
    }
    groups[len(kept)] = [sorted(kept)]
    assert set(rows) == {size for size, whole in groups.items() if whole}
    for size, row in rows.items():
        means = [torch.stack([kept[index] for index in group]).sum(0) / size for group in groups[size]]
        squares = [float(mean.square().mean()) for mean in means]
        assert row["rms_deviation"] == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-12)
        for decoder in DECODERS:
            right = [LIMIT.decode(mean, decoder) == LIMIT.evaluation.next_states for mean in means]
            states = [Fraction(int(bits.all(1).sum()), len(bits)) for bits in right]
            assert row["exact_match"][decoder] == pytest.approx(float(sum(states) / len(states)), abs=1e-15)
            share = sum(int(bits.sum()) for bits in right) / (len(right) * LIMIT.mean.numel())
            assert row["bit_accuracy"][decoder] == pytest.approx(share, abs=1e-15)


def test_any_number_of_members_needs_deviations_and_whole_groups() -> None:
    """Of members 4 to 10, groups of three from a multiple of three on are 6 to 8 alone."""
    deviations = drawn(7)
    rows = convergence_rows(LIMIT, deviations, [3, 5], indices=torch.arange(4, 11))
    assert [row["members"] for row in rows] == [3, 5]
    mean = deviations[2:5].double().mean(0)
    assert rows[0]["rms_deviation"] == pytest.approx(float(mean.square().mean().sqrt()), rel=1e-12)
    assert rows[0]["exact_match_spread"]["midpoint"] is None
    assert not convergence_rows(LIMIT, deviations[:4], [3], indices=torch.tensor([1, 2, 4, 5]))
    assert not convergence_rows(LIMIT, deviations[:4], [3], indices=torch.tensor([0, 1, 3, 7]))


def test_no_members_have_no_rows() -> None:
    none = torch.empty(0, *LIMIT.mean.shape, dtype=torch.float16)
    assert rows_of_blocks(MEASURE, []) == convergence_rows(LIMIT, none) == []
    failed = blocks_of(MEASURE, torch.arange(4), torch.zeros(4, dtype=torch.bool), drawn(4))
    assert rows_of_blocks(MEASURE, failed) == []
