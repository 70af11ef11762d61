"""The empirical kernel and the linearised network against autograd by hand, and against their infinite-width limits."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from ntk_ensembles.ensemble.network import TwoLayerMLP
from ntk_ensembles.theory import empirical, empirical_ntk, linearise, nngp, ntk


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two_layers(seed: int, features: int, outputs: int, width: int) -> TwoLayerMLP:
    network = TwoLayerMLP(features, outputs, width).double()
    with torch.no_grad():
        network.hidden.copy_(random(seed, width, features))
        network.readout.copy_(random(seed + 1, outputs, width))
    return network


class Convolution(nn.Module):
    """Another architecture: several layers, biases, a buffer, a frozen parameter, an odd parameter shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(1, 3, 2)
        self.last = nn.Linear(9, 2)
        self.scale = nn.Parameter(torch.tensor(0.7), requires_grad=False)
        self.register_buffer("shift", torch.tensor(0.1))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs[:, None]) * self.scale + self.shift)
        result: Tensor = self.last(hidden.flatten(1))
        return result


def jacobian(network: nn.Module, x: Tensor) -> Tensor:
    """Row by row with `torch.autograd.grad`: (inputs, outputs, weights)."""
    weights = [value for value in network.parameters() if value.requires_grad]
    rows = [
        [torch.cat([g.flatten() for g in torch.autograd.grad(value, weights, retain_graph=True)]) for value in output]
        for output in network(x)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.fixture(params=["two layers", "convolution"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    return two_layers(3, 4, 2, 7) if request.param == "two layers" else Convolution().double()


@pytest.mark.parametrize("block", [1, 200, 2**28], ids="block-{}".format)
def test_every_entry_is_a_product_of_gradients(network: nn.Module, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of the blocks: with one gradient at a time, with some that do not divide the rows, at once."""
    size = sum(value.numel() for value in network.parameters() if value.requires_grad)
    monkeypatch.setattr(empirical, "_BLOCK_BYTES", block if block != 200 else 3 * size * 8)
    x, y = random(0, 5, 4), random(1, 3, 4)
    left, right = jacobian(network, x), jacobian(network, y)
    expected = torch.einsum("iap,jbp->iajb", left, right)
    torch.testing.assert_close(empirical_ntk(network, x, y, trace=False), expected, rtol=1e-12, atol=1e-14)
    traced = torch.einsum("iaja->ij", expected) / 2
    torch.testing.assert_close(empirical_ntk(network, x, y), traced, rtol=1e-12, atol=1e-14)
    itself = torch.einsum("iap,jbp->iajb", left, left)
    torch.testing.assert_close(empirical_ntk(network, x, trace=False), itself, rtol=1e-12, atol=1e-14)
    square = empirical_ntk(network, x)
    torch.testing.assert_close(square, torch.einsum("iaja->ij", itself) / 2, rtol=1e-12, atol=1e-14)
    # On the diagonal blocks it is a matrix product's symmetry, rounded.
    torch.testing.assert_close(square, square.T, rtol=1e-14, atol=0)


def test_the_formula_of_two_layers() -> None:
    """By hand: [relu(z)·relu(z')·δ_jl + a_j·a_l·1[z > 0]·1[z' > 0]·x·x'/k] summed over units, over n."""
    network = two_layers(5, 4, 3, 50)
    x, y = random(0, 6, 4), random(1, 2, 4)
    z, z_right = (v @ network.hidden.detach().T / 2 for v in (x, y))
    readout = network.readout.detach()
    features = torch.einsum("iu,ju,ab->iajb", z.relu(), z_right.relu(), torch.eye(3, dtype=torch.float64))
    gates = torch.einsum("au,bu,iu,ju,ij->iajb", readout, readout, (z > 0).double(), (z_right > 0).double(), x @ y.T)
    expected = (features + gates / 4) / 50
    torch.testing.assert_close(empirical_ntk(network, x, y, trace=False), expected, rtol=1e-12, atol=1e-14)


def test_it_approaches_the_analytic_kernels() -> None:
    """One network of each width: the deviation falls like 1/√width, and stays within five of its standard errors."""
    x, y = random(0, 8, 10), random(1, 6, 10)
    both, readout_alone = ntk(x, y), nngp(x, y)
    root_mean_square = []
    for width in (1_000, 10_000, 100_000):
        network = two_layers(width, 10, 3, width)
        deviation = empirical_ntk(network, x, y) - both
        # One unit's contribution has a standard deviation of at most about twice the kernel's largest entries.
        assert deviation.abs().max() < 5 * 2 * both.max() / math.sqrt(width)
        root_mean_square.append(float(deviation.square().mean().sqrt()))
        full = empirical_ntk(network, x, y, trace=False)
        other_outputs = full[:, 0, :, 1]
        assert other_outputs.abs().max() < 5 * both.max() / math.sqrt(width)
        network.hidden.requires_grad_(False)
        assert (empirical_ntk(network, x, y) - readout_alone).abs().max() < 5 * both.max() / math.sqrt(width)
    # Ratios of √10 but for the luck of one draw.
    assert 1.5 < root_mean_square[0] / root_mean_square[1] < 7
    assert 1.5 < root_mean_square[1] / root_mean_square[2] < 7


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_linearised_training_is_explicit_least_squares(network: nn.Module, antisymmetric: bool) -> None:
    """The least-norm change of the weights that fits the labels, by the pseudoinverse of the Jacobian."""
    if antisymmetric and isinstance(network, TwoLayerMLP):
        with torch.no_grad():
            network.hidden[4:] = network.hidden[1:4]
            network.readout[:, 4:] = -network.readout[:, 1:4]
            network.readout[:, 0] = 0
    x, labels, tests = random(2, 3, 4), random(3, 3, 2), random(4, 5, 4)
    start, before = network(x).detach(), {name: value.clone() for name, value in network.state_dict().items()}
    change = torch.linalg.pinv(jacobian(network, x).flatten(0, 1)) @ (labels - start).flatten()
    trained = linearise(network, x, labels)
    expected = network(tests).detach() + jacobian(network, tests) @ change
    torch.testing.assert_close(trained(tests), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(trained(x), labels, rtol=0, atol=1e-10)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    # What happens to the network afterwards is not its business.
    with torch.no_grad():
        for value in network.parameters():
            value.zero_()
    torch.testing.assert_close(trained(tests), expected, rtol=1e-9, atol=1e-10)


def test_float32_networks_are_linearised_in_float64() -> None:
    network = two_layers(1, 4, 2, 40).float()
    x, labels = random(2, 3, 4), random(3, 3, 2)
    trained = linearise(network, x.float(), labels.float())
    assert trained(x.float()).dtype == torch.float64
    # 1e-6 would be float32.
    torch.testing.assert_close(trained(x.float()), labels.float().double(), rtol=0, atol=1e-12)
    assert empirical_ntk(network, x).dtype == torch.float32
    assert next(network.parameters()).dtype == torch.float32


@pytest.mark.parametrize("case", ["few weights", "parallel", "zero"])
def test_singular_kernels_are_refused(case: str) -> None:
    network = two_layers(1, 4, 2, 1 if case == "few weights" else 200)
    x, labels = random(2, 4, 4), random(3, 4, 2)
    if case == "parallel":
        x[3] = 2 * x[0]
    if case == "zero":
        x[3] = 0
    with pytest.raises(ValueError, match="empirical kernel of 4 inputs with 2 outputs each is singular"):
        linearise(network, x, labels)


def test_unfit_arguments_are_refused() -> None:
    network = two_layers(1, 4, 2, 5)
    with pytest.raises(ValueError, match=r"labels of shape \(3, 1\): expected \(3, 2\)"):
        inspect.unwrap(linearise)(network, random(0, 3, 4), random(1, 3, 1))
    with pytest.raises(ValueError, match=r"output has shape \(1,\) for one input"):
        empirical_ntk(
            nn.Sequential(network, nn.Flatten(0), nn.Unflatten(0, (1, 2)), nn.MaxPool1d(2), nn.Flatten(0)),
            random(0, 1, 4),
        )
    with pytest.raises(ValueError, match="no parameters that require gradients"):
        empirical_ntk(network.requires_grad_(False), random(0, 3, 4))


@pytest.mark.slow
def test_wide_networks_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 65,536: never more than one block of gradients on either side."""
    network = TwoLayerMLP(10, 3, 65_536)
    weights = sum(value.numel() for value in network.parameters())
    monkeypatch.setattr(empirical, "_BLOCK_BYTES", 8 * weights * 4)
    rows: list[int] = []
    original = empirical._Model.gradients

    def counted(model: empirical._Model, inputs: Tensor, chosen: Tensor) -> dict[str, Tensor]:
        rows.append(len(inputs))
        return original(model, inputs, chosen)

    monkeypatch.setattr(empirical._Model, "gradients", counted)
    x, y = random(0, 20, 10).float(), random(1, 10, 10).float()
    kernel = empirical_ntk(network, x, y)
    assert max(rows) == 8
    assert (kernel - ntk(x, y)).abs().max() < 5 * 2 * float(ntk(x, x).max()) / 256
