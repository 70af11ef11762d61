"""The step rule on models whose answer is known, and on networks against autograd."""

import math

import pytest
import torch
from torch import Tensor

from ntk_ensembles.ensemble import (
    Cohort,
    DescentOptions,
    FunctionalModel,
    IdentityModel,
    Init,
    Loss,
    descend,
)
from ntk_ensembles.theory import InverseKernel, ntk


class Linear:
    """f = A·θ of each output bit, so that Jᵀ and the limit are known; A differs from member to member."""

    def __init__(self, jacobians: Tensor, bits: int) -> None:
        self.jacobians = jacobians  # members, templates, parameters
        self.theta = torch.zeros(len(jacobians), bits, jacobians.shape[2], dtype=torch.float64)
        self.restarts = 0

    def outputs(self) -> Tensor:
        return self.theta @ self.jacobians.mT

    def step(self, cotangents: Tensor) -> Tensor:
        self.theta = self.theta - cotangents @ self.jacobians
        return self.outputs()

    def restart(self, position: int) -> None:
        self.restarts += 1
        self.theta[position] = 0


def linear(spread: float, seed: int = 0, members: int = 2, templates: int = 12) -> Linear:
    """Kernel A·Aᵀ = Θ^½(1 + noise)Θ^½: whitened, its eigenvalues spread about 1."""
    generator = torch.Generator().manual_seed(seed)
    kernel = ntk(torch.eye(templates, dtype=torch.float64), torch.eye(templates, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(kernel)
    root = vectors * values.sqrt() @ vectors.T
    noise = torch.randn(members, templates, templates, dtype=torch.float64, generator=generator)
    orthogonal = torch.linalg.qr(noise)[0]
    stretch = 1 + spread * (2 * torch.rand(members, 1, templates, dtype=torch.float64, generator=generator) - 1)
    return Linear(root @ (orthogonal * stretch.sqrt() @ orthogonal.mT), 4)


LABELS = torch.rand(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("loss", ["whitened", "mse"])
def test_a_linear_model_reaches_the_least_norm_interpolant(loss: Loss) -> None:
    model = linear(0.3)
    statuses = descend(model, LABELS, loss, InverseKernel.for_one_hot(12), DescentOptions(1e-22, 60))
    assert all(status.converged for status in statuses)
    for jacobian, theta in zip(model.jacobians, model.theta, strict=True):
        torch.testing.assert_close(theta, LABELS @ torch.linalg.pinv(jacobian).T, rtol=1e-8, atol=1e-9)


def test_it_is_never_slower_than_steps_of_size_one() -> None:
    plain = linear(0.5)
    residuals = plain.outputs() - LABELS
    whiten = InverseKernel.for_one_hot(12)
    first, steps = residuals.square().mean((1, 2)), 0
    while (residuals.square().mean((1, 2)) > 1e-10 * first).any():
        residuals, steps = plain.step(whiten(residuals)) - LABELS, steps + 1
    statuses = descend(linear(0.5), LABELS, "whitened", whiten, DescentOptions(1e-10, 60))
    assert max(status.steps for status in statuses) < steps


def test_too_large_steps_are_survived() -> None:
    model = linear(0.2)
    model.jacobians = model.jacobians * math.sqrt(7)  # steps of size 1 would grow the residual sixfold
    statuses = descend(model, LABELS, "whitened", InverseKernel.for_one_hot(12), DescentOptions(1e-10, 60))
    assert [status.converged for status in statuses] == [True, True]


def test_divergence_restarts_and_is_reported() -> None:
    class Hopeless(Linear):
        def step(self, cotangents: Tensor) -> Tensor:
            super().step(cotangents)
            self.theta[0] = math.nan
            return self.outputs()

    model = Hopeless(linear(0.1).jacobians, 4)
    bad, good = descend(model, LABELS, "whitened", InverseKernel.for_one_hot(12), DescentOptions(1e-12, 60))
    assert not bad.converged
    assert bad.restarts == model.restarts == 4
    assert not math.isfinite(bad.relative_loss)
    assert good.converged
    assert good.restarts == 0


def test_a_member_that_cannot_converge_says_so() -> None:
    # 4 hidden units cannot interpolate 12 templates × 4 bits.
    cohort = Cohort.allocate(0, [0], "gaussian", width=4, templates=12, bits=4, dtype=torch.float64).draw()
    (status,) = descend(
        IdentityModel(cohort), LABELS, "whitened", InverseKernel.for_one_hot(12), DescentOptions(1e-6, 20)
    )
    assert not status.converged
    assert status.steps == 20 == len(status.losses) - 1
    assert status.relative_loss == status.losses[-1] / status.losses[0]


def test_members_do_not_influence_each_other() -> None:
    def trained(indices: list[int]) -> tuple[list[float], Tensor]:
        cohort = Cohort.allocate(0, indices, "gaussian", width=600, templates=12, bits=4, dtype=torch.float64).draw()
        statuses = descend(IdentityModel(cohort), LABELS, "whitened", InverseKernel.for_one_hot(12))
        return [status.relative_loss for status in statuses], cohort.state()["hidden"]

    losses, weights = trained([0, 1, 2])
    alone_losses, alone = trained([1])
    # Sums may be taken in another order: rounding, nothing else.
    assert losses[1] == pytest.approx(alone_losses[0], rel=1e-9)
    torch.testing.assert_close(weights[1], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["gaussian", "antisymmetric"])
@pytest.mark.parametrize("width", [6, 1500])
def test_one_step_is_autograds_gradient(width: int, init: Init) -> None:
    """Both engines against `torch.autograd` through the formula written out here."""
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(1, 4, 12, dtype=torch.float64, generator=generator)
    cohort = Cohort.allocate(5, [2], init, width=width, templates=12, bits=4, dtype=torch.float64).draw()
    hidden, readout = (value[0].clone().requires_grad_() for value in cohort.state().values())
    outputs = readout @ torch.relu(hidden / math.sqrt(12)) / math.sqrt(width)
    outputs.backward(cotangent[0])
    assert hidden.grad is not None
    assert readout.grad is not None
    expected = {"hidden": hidden.detach() - hidden.grad, "readout": readout.detach() - readout.grad}

    functional = FunctionalModel(cohort, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(functional.outputs()[0], outputs.detach(), rtol=0, atol=1e-13)
    after = functional.step(cotangent)
    fast = IdentityModel(cohort)
    torch.testing.assert_close(fast.outputs()[0], outputs.detach(), rtol=0, atol=1e-13)
    torch.testing.assert_close(fast.step(cotangent), after, rtol=0, atol=1e-13)
    for name, value in expected.items():
        torch.testing.assert_close(functional.weights[name][0], value, rtol=0, atol=1e-13)
        torch.testing.assert_close(cohort.state()[name][0], value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("loss", ["whitened", "mse"])
def test_the_fast_engine_equals_the_general_one(loss: Loss) -> None:
    cohort = Cohort.allocate(5, [0, 3], "gaussian", width=1700, templates=12, bits=4, dtype=torch.float64).draw()
    functional, fast = FunctionalModel(cohort, torch.eye(12, dtype=torch.float64)), IdentityModel(cohort)
    general = InverseKernel.from_inputs(torch.eye(12, dtype=torch.float64))
    first = descend(functional, LABELS, loss, general, DescentOptions(1e-14))
    second = descend(fast, LABELS, loss, InverseKernel.for_one_hot(12), DescentOptions(1e-14))
    assert [status.steps for status in first] == [status.steps for status in second]
    inputs = torch.rand(30, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs[inputs < 0.5] = 0
    torch.testing.assert_close(fast.predict(inputs), functional.predict(inputs), rtol=0, atol=1e-12)


def test_general_training_inputs() -> None:
    """The general path interpolates inputs that are not orthonormal, like the NTK's posterior mean."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(12, 20, dtype=torch.float64, generator=generator)
    test_inputs = torch.randn(6, 20, dtype=torch.float64, generator=generator)
    cohort = Cohort.allocate(1, range(6), "antisymmetric", width=8192, templates=20, bits=4, dtype=torch.float64).draw()
    model = FunctionalModel(cohort, inputs)
    statuses = descend(model, LABELS, "whitened", InverseKernel.from_inputs(inputs), DescentOptions(1e-12))
    assert all(status.converged for status in statuses)
    mean = ntk(test_inputs, inputs) @ torch.linalg.solve(ntk(inputs, inputs), LABELS.T)
    # The kernel of n units fluctuates by about 1/√n: 0.01 a member; five times that of the mean of six.
    assert (model.predict(test_inputs).mean(0) - mean).abs().max() < 5 * 0.01 * mean.abs().max()


def test_low_precision_gradients_reach_the_same_loss() -> None:
    cohort = Cohort.allocate(0, [0], "gaussian", width=4096, templates=12, bits=4).draw()
    labels = LABELS.round().float()
    model = IdentityModel(cohort, low_precision=True)
    (status,) = descend(model, labels, "whitened", InverseKernel.for_one_hot(12), DescentOptions(1e-9))
    assert status.converged
    assert cohort.hidden.dtype == torch.float32
