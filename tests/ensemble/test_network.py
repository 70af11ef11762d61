"""The draw of members: reproducible, independent of the cohort, distributed as it says."""

import math

import pytest
import torch

from ntk_ensembles.ensemble import Cohort, Init, TwoLayerMLP
from ntk_ensembles.ensemble.network import member_seed


def drawn(indices: list[int], *, width: int = 2500, init: Init = "gaussian", seed: int = 7) -> Cohort:
    return Cohort.allocate(seed, indices, init, width=width, templates=5, bits=3).draw()


@pytest.mark.parametrize("init", ["gaussian", "antisymmetric"])
def test_a_member_is_the_same_to_the_bit_in_every_cohort(init: Init) -> None:
    together = drawn([0, 1, 2, 3], init=init).state()
    for indices in ([2], [3, 2], [9, 2, 1]):
        alone = drawn(indices, init=init).state()
        for name, weights in together.items():
            assert torch.equal(alone[name][indices.index(2)], weights[2])


def test_members_and_seeds_differ() -> None:
    weights = drawn([0, 1]).state()["hidden"]
    other = drawn([0], seed=8).state()["hidden"]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], other[0])


def test_no_two_members_of_a_run_share_a_generator_seed() -> None:
    # A CPU generator looks at the low 32 bits alone.
    low = {member_seed(3, index) & 0xFFFFFFFF for index in range(200_000)}
    assert len(low) == 200_000


def test_gaussian_weights_are_standard_normal() -> None:
    state = drawn([0], width=20_000).state()
    for weights in state.values():
        flat, count = weights.flatten().double(), weights.numel()
        # Five standard errors of the mean, the variance and the fourth moment of N(0, 1).
        assert abs(flat.mean()) < 5 / math.sqrt(count)
        assert abs(flat.var() - 1) < 5 * math.sqrt(2 / count)
        assert abs(flat.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)


@pytest.mark.parametrize("width", [1, 10, 1023, 1024, 1025, 2500])
def test_any_width_has_exactly_its_units(width: int) -> None:
    cohort = drawn([0], width=width)
    state = cohort.state()
    assert state["hidden"].shape == (1, width, 5)
    assert state["readout"].shape == (1, 3, width)
    assert int((cohort.hidden[0] != 0).sum()) == width * 5
    assert int((cohort.readout[0] != 0).sum()) == width * 3


@pytest.mark.parametrize("width", [2, 1024, 2500])
def test_an_antisymmetric_network_starts_at_exactly_zero(width: int) -> None:
    state = drawn([4], width=width, init="antisymmetric").state()
    half = width // 2
    assert torch.equal(state["hidden"][0, :half], state["hidden"][0, half:])
    assert torch.equal(state["readout"][0, :, :half], -state["readout"][0, :, half:])
    assert state["hidden"].unique().numel() > half  # drawn, not zero


def test_the_network_is_its_formula() -> None:
    network = TwoLayerMLP(5, 3, 8).double()
    inputs = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden, readout = network.hidden.detach().tolist(), network.readout.detach().tolist()
    for row, output in zip(inputs.tolist(), network(inputs).tolist(), strict=True):
        for bit in range(3):
            total = 0.0
            for unit in range(8):
                activation = sum(w * x for w, x in zip(hidden[unit], row, strict=True)) / math.sqrt(5)
                total += readout[bit][unit] * max(activation, 0.0)
            assert output[bit] == pytest.approx(total / math.sqrt(8), abs=1e-12)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="--width 7.*even"):
        drawn([0], width=7, init="antisymmetric")
    with pytest.raises(ValueError, match="--width 0.*at least 1"):
        drawn([0], width=0)
