"""Results of members: put together from parts, each with its own, and the files that hold them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_ensembles.ensemble import MemberStatus
from ntk_ensembles.runs import MemberResults, StoreError
from ntk_ensembles.runs.groups import Measure
from ntk_ensembles.runs.store import RunStore, first_difference
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import LimitPrediction

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


def test_a_difference_is_one_of_json_and_of_either_side() -> None:
    """Neither true nor 1.0 is 1, and what one of two fingerprints lacks is a difference."""
    assert first_difference({"padding": 1, "seed": 2}, {"seed": 2, "padding": 1}) is None
    for here, there in ((1, True), (1, 1.0), (0, False)):
        assert first_difference({"padding": here}, {"padding": there}) == f"padding is {here} here and {there} there"
    assert first_difference({}, {"layers": "both"}) == "layers is None here and both there"
    assert first_difference({"layers": "both"}, {}) == "layers is both here and None there"


def test_files_of_parts_of_a_joined_one_do_not_count(tmp_path: Path) -> None:
    """By their names alone: those of one first member too, whatever their sizes."""
    (tmp_path / "checkpoints").mkdir()
    ranges = ((0, 0), (0, 1), (0, 3), (0, 7), (2, 3), (8, 8))
    names = [f"members-{first:06d}-{last:06d}.safetensors" for first, last in ranges]
    for name in names:
        (tmp_path / "checkpoints" / name).touch()
    assert [path.name for path in RunStore(tmp_path, {}).result_files()] == [names[3], names[5]]


MEASURE = Measure(LimitPrediction(Addition(1), EvaluationSet.sample(Addition(1), 4, 0)))


def measured(indices: list[int]) -> MemberResults:
    """Members whose deviations are 0, on the evaluation states of `MEASURE`."""
    statuses = [MemberStatus(False, True, 0, [1.0, 0.0]) for _ in indices]
    deviations = torch.zeros(len(indices), *MEASURE.limit.mean.shape)
    return MemberResults.from_cohort(indices, statuses, deviations, [1.0, 2.0, 3.0])


def test_a_group_beside_one_whose_deviations_are_kept_is_not_joined(tmp_path: Path) -> None:
    store = RunStore(tmp_path, {})
    store.save(measured([0]))
    store.save(measured([1]).summed(MEASURE))
    store.join(1, 1, MEASURE)
    assert [path.name for path in store.result_files()] == [f"members-00000{i}-00000{i}.safetensors" for i in (0, 1)]
    assert not store.has_deviations
    store.save(measured([0]).summed(MEASURE))
    store.join(1, 1, MEASURE)
    assert [path.name for path in store.result_files()] == ["members-000000-000001.safetensors"]


def test_numbers_that_no_run_has_written_are_refused_whatever_their_checksum(tmp_path: Path) -> None:
    """Counts whose sum passes the largest integer, and sums of a group that is not aligned."""
    store, shape = RunStore(tmp_path, {}), MEASURE.limit.mean.shape
    largest = torch.iinfo(torch.int64).max
    store.save(dataclasses.replace(measured([0, 1, 2]), loss_counts=torch.tensor([largest, largest, 2 + 6])))
    with pytest.raises(StoreError, match="its loss_counts do not add up to its losses"):
        store.load_file(store.result_files()[0], *shape)
    (block,) = measured([2, 3]).summed(MEASURE).blocks
    moved = dataclasses.replace(measured([5, 6]), deviations=None, blocks=(dataclasses.replace(block, first=5),))
    store.save(moved)
    with pytest.raises(StoreError, match="its members are no aligned group"):
        store.load_file(store.result_files()[1], *shape)
