"""What bfloat16 may round, and how many members there is room for, to the last one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ntk_ensembles.ensemble import DescentOptions, MLPStack, Recipe, choose_cohort, make_engine

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
