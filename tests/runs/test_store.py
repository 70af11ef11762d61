"""Results of members: put together from parts, each with its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_ensembles.ensemble import MemberStatus
from ntk_ensembles.runs import MemberResults

STATES, BITS = 2, 3


def results(indices: list[int]) -> MemberResults:
    """Every value tells which member it belongs to; member i has i % 3 + 1 losses."""
    statuses = [MemberStatus(False, i % 2 == 0, 0, [1.0 + i + step / 8 for step in range(i % 3 + 1)]) for i in indices]
    deviations = torch.tensor([float(i) for i in indices])[:, None, None].expand(-1, STATES, BITS)
    return MemberResults.from_cohort(indices, statuses, deviations, [1.0, 2.0, 3.0])


def check(joined: MemberResults, indices: list[int]) -> None:
    assert joined.indices.tolist() == sorted(indices)
    losses = torch.split(joined.losses, joined.loss_counts.tolist())
    for row, i in enumerate(sorted(indices)):
        assert bool(joined.converged[row]) == (i % 2 == 0)
        expected = [1.0 + i + step / 8 for step in range(i % 3 + 1)]
        assert int(joined.steps[row]) == i % 3
        assert float(joined.relative_loss[row]) == expected[-1] / expected[0]
        assert losses[row].tolist() == expected
        assert (joined.deviations[row] == i).all()


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(9)), st.lists(st.integers(1, 8), max_size=3))
def test_joined_members_stand_in_order_each_with_its_own(order: list[int], cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), 9]
    parts = [order[low:high] for low, high in zip(bounds, bounds[1:], strict=False) if low < high]
    joined = MemberResults.concatenate([MemberResults.empty(STATES, BITS), *map(results, parts)])
    check(joined, order)
    assert joined.seconds.tolist() == [[1.0, 2.0, 3.0]] * len(parts)


def test_a_member_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="member 3 is there twice"):
        MemberResults.concatenate([results([1, 3]), results([2, 3])])
    with pytest.raises(ValueError, match="no results"):
        MemberResults.concatenate([])


def test_no_members() -> None:
    none = MemberResults.empty(STATES, BITS)
    assert len(none) == 0
    assert none.deviations.shape == (0, STATES, BITS)
    assert none.seconds.shape == (0, 3)
