"""The network is its formula; members are reproducible, independent of their stack, distributed as documented."""

import copy
import math
import pickle

import pytest
import torch
from torch.func import stack_module_state

from ntk_ensembles.ensemble import Init, MLPStack, TwoLayerMLP, network
from ntk_ensembles.ensemble.network import cpu_workers, map_members, member_seed


def drawn(indices: list[int], *, width: int = 2500, init: Init = "gaussian", seed: int = 7) -> MLPStack:
    return MLPStack(5, 3, width, indices, seed=seed, init=init)


@pytest.mark.parametrize("init", ["gaussian", "antisymmetric"])
def test_a_member_is_the_same_to_the_bit_in_every_stack(init: Init) -> None:
    together = drawn([0, 1, 2, 3], init=init)
    for indices in ([2], [3, 2], [9, 2, 1]):
        alone = drawn(indices, init=init)
        for name, weights in together.named_parameters():
            assert torch.equal(alone.get_parameter(name)[indices.index(2)], weights[2])


def test_members_and_seeds_differ() -> None:
    weights = drawn([0, 1]).hidden
    other = drawn([0], seed=8).hidden
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], other[0])


def test_no_two_members_of_a_run_share_a_generator_seed() -> None:
    # A CPU generator looks at the low 32 bits alone.
    low = {member_seed(3, index) & 0xFFFFFFFF for index in range(200_000)}
    assert len(low) == 200_000


def test_gaussian_weights_are_standard_normal() -> None:
    for weights in drawn([0], width=40_000).parameters():
        flat, count = weights.detach().flatten().double(), weights.numel()
        # Five standard errors of the mean, the variance and the fourth moment of N(0, 1).
        assert abs(flat.mean()) < 5 / math.sqrt(count)
        assert abs(flat.var() - 1) < 5 * math.sqrt(2 / count)
        assert abs(flat.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)


def test_large_members_are_drawn_in_pieces_that_every_gpu_fills_alike() -> None:
    """No call of the generator fills more than 65,536 numbers, and no two pieces are alike."""
    generator = torch.Generator().manual_seed(member_seed(7, 0))
    weights = drawn([0], width=40_000).hidden[0].flatten()
    pieces = [torch.empty(min(65_536, 200_000 - start)).normal_(generator=generator) for start in (0, 65_536, 131_072)]
    assert torch.equal(weights[: 3 * 65_536], torch.cat(pieces)[: 3 * 65_536])
    assert not torch.equal(pieces[0], pieces[1])


def test_weights_of_double_precision_are_the_same_members() -> None:
    single, double = (MLPStack(5, 3, 700, [4], seed=2, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert double.hidden.dtype == torch.float64
    assert torch.equal(single.hidden.double(), double.hidden)
    assert torch.equal(single.readout.double(), double.readout)


@pytest.mark.parametrize("width", [2, 1024, 2500])
def test_an_antisymmetric_network_starts_at_exactly_zero(width: int) -> None:
    stack = drawn([4], width=width, init="antisymmetric")
    half = width // 2
    assert torch.equal(stack.hidden[0, :half], stack.hidden[0, half:])
    assert torch.equal(stack.readout[0, :, :half], -stack.readout[0, :, half:])
    assert stack.hidden.unique().numel() > half  # drawn, not zero
    # Sums of equal terms with opposite signs; the order of summation leaves rounding.
    assert float(stack(torch.randn(4, 5)).detach().abs().max()) < 1e-5


def test_the_network_is_its_formula() -> None:
    network = TwoLayerMLP(5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden, readout = network.hidden.detach().tolist(), network.readout.detach().tolist()
    for row, output in zip(inputs.tolist(), network(inputs).tolist(), strict=True):
        for bit in range(3):
            total = 0.0
            for unit in range(8):
                activation = sum(w * x for w, x in zip(hidden[unit], row, strict=True)) / math.sqrt(5)
                total += readout[bit][unit] * max(activation, 0.0)
            assert output[bit] == pytest.approx(total / math.sqrt(8), abs=1e-12)


def test_a_generator_makes_a_network_reproducible() -> None:
    first, second = (TwoLayerMLP(5, 3, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.readout, second.readout)


def test_a_stack_has_pytorchs_layout_and_gives_out_its_members() -> None:
    stack = drawn([3, 8, 5], width=64).double()
    members = [stack.member(i) for i in range(3)]
    state, _ = stack_module_state(members)
    for name, value in stack.named_parameters():
        assert torch.equal(state[name], value)
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stack(x), torch.stack([member(x) for member in members]), rtol=0, atol=1e-13)
    # A copy: training it changes nothing in the stack.
    with torch.no_grad():
        members[0].hidden.zero_()
    assert stack.hidden[0].any()


def test_initial_members_are_those_before_training() -> None:
    stack = drawn([3, 8], width=64)
    before = [stack.member(i) for i in range(2)]
    with torch.no_grad():
        stack.hidden.add_(1)
        stack.readout.mul_(2)
    for position, member in enumerate(before):
        again = stack.initial(position)
        assert torch.equal(again.hidden, member.hidden)
        assert torch.equal(again.readout, member.readout)
    stack.redraw(1)
    assert torch.equal(stack.hidden[1], before[1].hidden)
    assert not torch.equal(stack.hidden[0], before[0].hidden)


def test_a_stack_is_a_module_like_any_other(tmp_path) -> None:  # type: ignore[no-untyped-def]
    stack = drawn([1, 2], width=32)
    x = torch.randn(4, 5)
    for same in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert torch.equal(same(x), stack(x))
    torch.save(stack.state_dict(), tmp_path / "weights.pt")
    other = MLPStack(5, 3, 32, 2, draw=False)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(x), stack(x))
    stack(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in stack.parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 7, "init": "antisymmetric"}, "width=7: expected an even number"),
        ({"width": 1, "init": "antisymmetric"}, "width=1: expected an even number"),
        ({"width": 0}, "width=0: expected an integer from 1"),
        ({"init": "xavier"}, "init='xavier': expected one of gaussian, antisymmetric"),
        ({"seed": -1}, "seed=-1"),
        ({"members": []}, "at least one member"),
        ({"members": [-1]}, "members=-1"),
        ({"in_features": 0}, "in_features=0"),
    ],
)
def test_bad_arguments_are_refused(unchecked: None, changes: dict[str, object], says: str) -> None:
    arguments = {"in_features": 5, "out_features": 3, "width": 8, "members": 2, **changes}
    with pytest.raises(ValueError, match=says):
        MLPStack(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("inference", [False, True])
def test_members_are_worked_on_by_one_thread_each_without_gradients(
    workers: int, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are shared out or not, and in the caller's inference mode, which threads do not inherit."""
    monkeypatch.setattr(network, "cpu_workers", lambda: workers)

    def modes(item: int) -> tuple[int, int, bool, bool]:
        return item, torch.get_num_threads(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with torch.inference_mode(inference):
            for items in (range(1), range(5)):
                found = map_members(modes, items, torch.device("cpu"))
                assert found == [(item, 1, False, inference) for item in items]
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_no_more_members_are_worked_on_than_there_are_cores_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads, expected in ((1, 3, 1), (8, 3, 3), (3, 3, 3)):
        monkeypatch.setattr(network, "allowed_cores", lambda cores=cores: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert cpu_workers() == expected
