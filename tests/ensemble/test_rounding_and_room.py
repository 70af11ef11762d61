"""What bfloat16 may round, and how many members there is room for, to the last one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ntk_ensembles.ensemble import DescentOptions, MLPStack, Recipe, choose_cohort, make_engine, predict

CPU = torch.device("cpu")


@pytest.mark.parametrize("choice", ["auto", "functional"])
def test_bfloat16_rounds_the_change_of_either_layer_and_never_the_weights(choice: Any) -> None:
    stacks = [MLPStack(12, 4, 1500, 2, seed=5).requires_grad_(False) for _ in range(2)]
    before = MLPStack(12, 4, 1500, 2, seed=5)
    cotangents = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    for stack, bfloat16 in zip(stacks, (False, True), strict=True):
        make_engine(stack.hidden, stack.readout, torch.eye(12), choice, bfloat16=bfloat16).step(cotangents)
    exact, rounded = stacks
    for name in ("hidden", "readout"):
        start = before.get_parameter(name).detach().double()
        change = exact.get_parameter(name).double() - start
        difference = rounded.get_parameter(name).double() - start - change
        # bfloat16 has 8 bits: rounding of 0.2% to 0.4% a product. The change is a hundredth of the weights, so
        # weights rounded to 8 bits would be off by as much as the change.
        assert 1e-4 < float(difference.norm() / change.norm()) < 1e-2, name
        assert float(change.norm() / start.norm()) < 0.05
    still = MLPStack(12, 4, 1500, 2, seed=5).requires_grad_(False)
    make_engine(still.hidden, still.readout, torch.eye(12), choice, bfloat16=True).step(torch.zeros(2, 4, 12))
    assert torch.equal(still.hidden, before.hidden)
    assert torch.equal(still.readout, before.readout)


@pytest.mark.parametrize("choice", ["auto", "functional"])
def test_outputs_are_of_full_precision_whatever_the_caller_asks_of_its_own_thread(choice: Any) -> None:
    stack = MLPStack(12, 4, 1500, 2, seed=5).requires_grad_(False)
    engine = make_engine(stack.hidden, stack.readout, torch.eye(12), choice, bfloat16=True)
    expected = engine.outputs()
    cotangents = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine.outputs(), expected)
        after = engine.step(cotangents)
    assert after.dtype == torch.float32
    assert torch.equal(after, engine.outputs())


@pytest.mark.parametrize(("free", "room"), [(10.0, 10), (10.99, 10), (11.0, 11), (1.0, 1)])
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("engine", ["auto", "functional"])
def test_as_many_members_as_fit_may_be_asked_for_and_not_one_more(
    free: float, room: int, processes: int, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(torch.zeros(12, 9), 1000, descent=DescentOptions(engine=engine))
    # A member's outputs on 7 states of 9 bits, float32, and their float64 difference from the mean.
    each = recipe.training_bytes + 7 * 9 * (4 + 8)
    monkeypatch.setattr(
        "ntk_ensembles.ensemble.cohort.free_memory_bytes", lambda device: int(free * each * processes) + 1
    )
    assert choose_cohort(recipe, 7, 500, CPU, wanted=room, processes=processes) == room
    with pytest.raises(ValueError, match=rf"cohort={room + 1}: expected an integer from 1 to {room}"):
        choose_cohort(recipe, 7, 500, CPU, wanted=room + 1, processes=processes)
    assert choose_cohort(recipe, 7, 500, CPU, processes=processes) <= room


@pytest.mark.parametrize(
    ("fits", "workers", "members", "expected"),
    [
        # All that are wanted of members as small as these, in whole rounds of the cores; no more than 1,024.
        (10**6, 1, 5000, 1024),
        (10**6, 3, 5000, 1023),
        (10**6, 3, 10, 10),
        # A quarter of the memory, but every core gets a member if it fits at all.
        (40, 1, 500, 10),
        (40, 4, 500, 8),
        (12, 8, 500, 8),
        (3, 8, 500, 3),
        (1, 8, 500, 1),
    ],
)
def test_by_default_a_cohort_is_whole_rounds_of_what_fits(
    fits: int, workers: int, members: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(torch.zeros(12, 9), 64)
    each = recipe.training_bytes + 7 * 9 * (4 + 8)
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort.free_memory_bytes", lambda device: fits * each)
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort.cpu_workers", lambda: workers)
    assert choose_cohort(recipe, 7, members, CPU) == expected
    # Never more than there are members, or than was asked for.
    assert choose_cohort(recipe, 7, 2, CPU, wanted=min(fits, 5)) == min(fits, 2)


@pytest.mark.parametrize(("processes", "expected"), [(1, 8), (2, 4), (4, 2)])
def test_processes_share_memory_and_cores(processes: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the memory of 50 members a quarter of a process's share is taken, in whole rounds of its 8, 4 or 2 cores."""
    recipe = Recipe(torch.zeros(12, 9), 64)
    each = recipe.training_bytes + 7 * 9 * (4 + 8)
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort.free_memory_bytes", lambda device: 50 * each)
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort.cpu_workers", lambda: 8)
    assert choose_cohort(recipe, 7, 1000, CPU, processes=processes) == expected


@pytest.mark.parametrize(("width", "expected"), [(1 << 20, 64), (1 << 14, 102), (1 << 13, 204), (1, 1024)])
def test_members_are_many_together_only_if_they_are_small(
    width: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64, or as many as take 256 MiB, here 268435456/(4·width·40) and a little less for what a step needs."""
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort.free_memory_bytes", lambda device: 1 << 40)
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort._MEMORY_CAP_CPU", 1 << 40)
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort.cpu_workers", lambda: 1)
    found = choose_cohort(Recipe(torch.zeros(20, 20), width), 1, 5000, CPU)
    assert 0.8 * expected <= found <= expected


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_memory_is_that_of_the_weights_and_more_where_gradients_are_kept(precision: Any) -> None:
    recipe = Recipe(torch.zeros(12, 9), 3000, precision=precision)
    stack = recipe.make_stack([0], CPU)
    assert recipe.weight_bytes == sum(weights.numel() * weights.element_size() for weights in stack.parameters())
    general = Recipe(torch.zeros(12, 9), 3000, precision=precision, descent=DescentOptions(engine="functional"))
    # Gradients of both layers and the activations of the hidden units.
    assert general.training_bytes > 2.9 * recipe.weight_bytes
    assert recipe.weight_bytes < recipe.training_bytes < general.training_bytes + 12 * 9 * 8 * 20 + 3 * 12 * 1024 * 8


def by_column(stack: MLPStack) -> MLPStack:
    stack.hidden.data = stack.hidden.data.mT.contiguous().mT
    return stack


@pytest.mark.parametrize("count", [3, 64, 65, 200])
def test_predictions_are_the_same_to_the_bit_however_weights_are_stored(count: int) -> None:
    """As loaded ensembles have them, and as those just trained: a run is evaluated by either."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.rand(count, 12, generator=generator) * (torch.rand(count, 12, generator=generator) < 0.15)
    stacks = [MLPStack(12, 4, 1500, 2, seed=5).requires_grad_(False) for _ in range(2)]
    assert torch.equal(predict(stacks[0], inputs), predict(by_column(stacks[1]), inputs))


def test_members_stored_by_column_are_drawn_again_as_they_were() -> None:
    stack, other = (MLPStack(12, 4, 300, [3, 8], seed=5).requires_grad_(False) for _ in range(2))
    by_column(other)
    assert torch.equal(other.initial(1).hidden, stack.hidden[1])
    other.hidden.zero_()
    other.redraw(0)
    assert torch.equal(other.hidden[0], stack.hidden[0])
    assert torch.equal(other.initial(0).readout, stack.readout[0])


def test_the_last_index_is_a_member_and_the_one_after_it_none() -> None:
    """2³² would be member 0 again: a generator sees 32 bits of its seed."""
    assert MLPStack(2, 2, 2, [2**32 - 1]).indices == (2**32 - 1,)
    with pytest.raises(ValueError, match="members=4294967296: expected an integer from 0 to 4294967295"):
        MLPStack(2, 2, 2, [2**32])


def test_weights_beyond_all_memory_are_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="1000 members of width 16777216 do not fit into memory"):
        MLPStack(4096, 1, 1 << 24, 1000)
