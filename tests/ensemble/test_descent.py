"""The training rule: against least squares, through divergence, in every packaging, and resumed at any step."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ntk_ensembles.ensemble import Descent, DescentOptions, Loss, MLPStack, predict
from ntk_ensembles.ensemble import descent as descent_module
from ntk_ensembles.ensemble.descent import MemberStatus, inverse_kernel_of
from ntk_ensembles.ensemble.engines import members_at_once
from ntk_ensembles.theory import Layers, nngp, ntk

TEMPLATES, BITS = 12, 4
LABELS = torch.rand(TEMPLATES, BITS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
EYE = torch.eye(TEMPLATES, dtype=torch.float64)


def stack_of(members: Any = 2, width: int = 600, dtype: torch.dtype = torch.float64, **changes: Any) -> MLPStack:
    return MLPStack(TEMPLATES, BITS, width, members, dtype=dtype, **changes)


def trained(stack: MLPStack, options: DescentOptions | None = None, **changes: Any) -> Descent:
    descent = Descent(stack, options, **changes)
    descent.bind(EYE, LABELS)
    while descent.running:
        descent.step()
    return descent


class LinearEngine:
    """f = A·θ of each output bit, so that Jᵀ and the limit are known; A differs from member to member."""

    def __init__(self, jacobians: Tensor) -> None:
        self.jacobians = jacobians  # members, templates, parameters
        self.theta = torch.zeros(len(jacobians), BITS, jacobians.shape[2], dtype=torch.float64)

    def outputs(self, *, coarse: bool = False) -> Tensor:
        return self.theta @ self.jacobians.mT

    def step(self, cotangents: Tensor, *, coarse: bool = False) -> Tensor:
        self.theta = self.theta - cotangents @ self.jacobians
        return self.outputs()


def linear(spread: float, members: int = 2) -> LinearEngine:
    """Kernel A·Aᵀ = Θ^½(1 + noise)Θ^½: whitened, its eigenvalues spread about 1."""
    generator = torch.Generator().manual_seed(0)
    values, vectors = torch.linalg.eigh(ntk(EYE, EYE))
    root = vectors * values.sqrt() @ vectors.T
    noise = torch.randn(members, TEMPLATES, TEMPLATES, dtype=torch.float64, generator=generator)
    orthogonal = torch.linalg.qr(noise)[0]
    stretch = 1 + spread * (2 * torch.rand(members, 1, TEMPLATES, dtype=torch.float64, generator=generator) - 1)
    return LinearEngine(root @ (orthogonal * stretch.sqrt() @ orthogonal.mT))


@pytest.fixture
def descend_linear(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Trains a linear engine by the rule, and returns the statuses."""

    def descend(engine: LinearEngine, options: DescentOptions, stack: MLPStack | None = None) -> list[Any]:
        monkeypatch.setattr(descent_module, "make_engine", lambda *arguments, **options: engine)
        return trained(stack or stack_of(len(engine.theta), 4), options, together=100).statuses

    return descend


@pytest.mark.parametrize("loss", ["whitened", "mse"])
def test_a_linear_model_reaches_the_least_norm_interpolant(loss: Loss, descend_linear: Any) -> None:
    engine = linear(0.3)
    statuses = descend_linear(engine, DescentOptions(loss, 1e-22, 60))
    assert all(status.converged for status in statuses)
    for jacobian, theta in zip(engine.jacobians, engine.theta, strict=True):
        torch.testing.assert_close(theta, LABELS.T @ torch.linalg.pinv(jacobian).T, rtol=1e-8, atol=1e-9)


def test_it_is_never_slower_than_steps_of_size_one(descend_linear: Any) -> None:
    plain = linear(0.5)
    inverse = torch.linalg.inv(ntk(EYE, EYE))
    residuals = plain.outputs() - LABELS.T
    first, steps = residuals.square().mean((1, 2)), 0
    while (residuals.square().mean((1, 2)) > 1e-10 * first).any():
        residuals, steps = plain.step(residuals @ inverse) - LABELS.T, steps + 1
    statuses = descend_linear(linear(0.5), DescentOptions(tolerance=1e-10, steps_max=60))
    assert max(status.steps for status in statuses) < steps


def test_the_first_mse_step_has_the_best_constant_size(descend_linear: Any) -> None:
    """2/(λmin + λmax) of the kernel, by its eigenvalues."""
    engine = linear(0.0)
    descend_linear(engine, DescentOptions("mse", 1e-6, 1))
    eigenvalues = torch.linalg.eigvalsh(ntk(EYE, EYE))
    first = 2 / (eigenvalues[0] + eigenvalues[-1]) * LABELS.T
    torch.testing.assert_close(engine.theta, first @ engine.jacobians, rtol=1e-9, atol=1e-12)


def test_too_large_steps_are_survived(descend_linear: Any) -> None:
    engine = linear(0.2)
    engine.jacobians = engine.jacobians * math.sqrt(7)  # steps of size 1 would grow the residual sixfold
    statuses = descend_linear(engine, DescentOptions(tolerance=1e-10, steps_max=60))
    assert [status.converged for status in statuses] == [True, True]


def test_divergence_restarts_with_half_the_step_and_is_reported(descend_linear: Any) -> None:
    """One member diverges for ever, one converges: each as if it were alone."""

    class Hopeless(LinearEngine):
        sizes: list[float]

        def step(self, cotangents: Tensor, *, coarse: bool = False) -> Tensor:
            self.sizes.append(float(cotangents[0].norm()))
            super().step(cotangents)
            self.theta[0] = math.nan
            return self.outputs()

    class Counting(MLPStack):
        redrawn: list[int]

        def redraw(self, position: int) -> None:
            if hasattr(self, "redrawn"):
                self.redrawn.append(position)
                engine.theta[position] = 0
            super().redraw(position)

    engine = Hopeless(linear(0.1).jacobians)
    engine.sizes = []
    stack = Counting(TEMPLATES, BITS, 4, 2, dtype=torch.float64)
    stack.redrawn = []
    bad, good = descend_linear(engine, DescentOptions(tolerance=1e-12, steps_max=60), stack)
    assert not bad.converged
    assert bad.restarts == 4
    assert stack.redrawn == [0, 0, 0, 0]
    assert not math.isfinite(bad.relative_loss)
    # Each restart begins at the same residuals with an empty history, so its first step shows the damping alone.
    assert [size / engine.sizes[0] for size in engine.sizes[:5]] == pytest.approx([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16])
    assert good.converged
    assert good.restarts == 0
    alone = linear(0.1)
    (_, expected) = descend_linear(alone, DescentOptions(tolerance=1e-12, steps_max=60))
    assert good.losses == pytest.approx(expected.losses, rel=1e-9)


def test_a_member_that_cannot_converge_says_so() -> None:
    # 4 hidden units cannot interpolate 12 templates × 4 bits.
    (status,) = trained(stack_of(1, 4), DescentOptions(tolerance=1e-6, steps_max=20)).statuses
    assert not status.converged
    assert not status.running
    assert status.steps == 20 == len(status.losses) - 1
    assert status.relative_loss == status.losses[-1] / status.losses[0]


def test_stopped_members_are_left_as_they_were() -> None:
    """Members converge after different numbers of steps; the early ones do not move while the others go on."""
    stack = stack_of(6, 40)
    options = DescentOptions(tolerance=1e-8, steps_max=30)
    descent = Descent(stack, options, together=100)
    descent.bind(EYE, LABELS)
    at_stop: dict[int, Tensor] = {}
    while descent.running:
        descent.step()
        for i, status in enumerate(descent.statuses):
            if not status.running:
                at_stop.setdefault(i, stack.hidden[i].detach().clone())
    assert len({status.steps for status in descent.statuses}) > 1
    for i, weights in at_stop.items():
        assert torch.equal(stack.hidden[i], weights)
    # Each is what it is alone. Narrow networks amplify rounding from step to step.
    for i, status in enumerate(descent.statuses):
        alone = trained(stack_of([i], 40), options, together=100)
        assert alone.statuses[0].steps == status.steps
        torch.testing.assert_close(alone._stack.hidden[0], stack.hidden[i], rtol=0, atol=1e-7)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_member_is_the_same_to_the_bit_in_every_stack_on_any_number_of_cores(threads: int) -> None:
    together = stack_of(5, 1100, torch.float32)
    reference = trained(together)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for indices in ([3], [4, 3], [0, 1, 3]):
            alone = stack_of(indices, 1100, torch.float32)
            statuses = trained(alone).statuses
            position = indices.index(3)
            assert torch.equal(alone.hidden[position], together.hidden[3])
            assert torch.equal(alone.readout[position], together.readout[3])
            assert statuses[position] == reference.statuses[3]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("templates", "bits", "width", "batch"), [(24, 18, 600, 16), (57, 31, 513, 9), (30, 1, 700, 16), (5, 8, 511, 16)]
)
def test_small_members_come_in_batches_and_are_the_same_to_the_bit_in_each(
    templates: int, bits: int, width: int, batch: int, dtype: torch.dtype
) -> None:
    inputs = torch.eye(templates, dtype=dtype)
    labels = (torch.rand(templates, bits, generator=torch.Generator().manual_seed(1)) < 0.3).to(dtype)
    whole = MLPStack(templates, bits, width, 18, dtype=dtype)
    assert members_at_once(whole.hidden, whole.readout, inputs) == batch
    reference = run(whole, inputs, labels)
    for indices, together in (([0], None), ([17], None), ([3, 16, 9], None), (range(12), 5)):
        some = MLPStack(templates, bits, width, list(indices), dtype=dtype)
        statuses = run(some, inputs, labels, together)
        for position, i in enumerate(indices):
            assert torch.equal(some.hidden[position], whole.hidden[i])
            assert torch.equal(some.readout[position], whole.readout[i])
            assert statuses[position] == reference[i]


def run(stack: MLPStack, inputs: Tensor, labels: Tensor, together: int | None = None) -> list[MemberStatus]:
    """Train members for at most six steps."""
    descent = Descent(stack, DescentOptions(steps_max=6), together=together)
    descent.bind(inputs, labels)
    while descent.running:
        descent.step()
    return descent.statuses


def test_large_members_are_trained_each_by_itself() -> None:
    stack = MLPStack(200, 100, 512, 2, draw=False)
    assert members_at_once(stack.hidden, stack.readout, torch.eye(200)) == 1
    small = MLPStack(24, 18, 512, 2)
    assert members_at_once(small.hidden, small.readout, torch.eye(24), bfloat16=True) == 1
    assert members_at_once(small.hidden, small.readout, torch.eye(24), "functional") == 1


def test_members_in_one_batch_are_the_same_up_to_rounding() -> None:
    """The branch that a GPU takes, on a CPU."""
    one, other = stack_of(4, 1100), stack_of(4, 1100)
    first, second = trained(one, together=1), trained(other, together=100)
    assert [status.steps for status in first.statuses] == [status.steps for status in second.statuses]
    torch.testing.assert_close(one.hidden, other.hidden, rtol=0, atol=1e-10)


@pytest.mark.parametrize("together", [1, 100])
@pytest.mark.parametrize("loss", ["whitened", "mse"])
@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_a_resumed_descent_takes_the_same_steps_to_the_bit(stop_after: int, loss: Loss, together: int) -> None:
    options = DescentOptions(loss, 1e-10, 40)
    whole = stack_of(3, 300)
    expected = trained(whole, options, together=together)
    stack = stack_of(3, 300)
    descent = Descent(stack, options, together=together)
    descent.bind(EYE, LABELS)
    for _ in range(stop_after):
        descent.step()
    state, weights = descent.state_dict(), copy.deepcopy(stack.state_dict())
    descent.step()  # what is saved does not change afterwards
    rest = MLPStack(TEMPLATES, BITS, 300, 3, dtype=torch.float64, draw=False)
    rest.load_state_dict(weights)
    resumed = Descent(rest, options, together=together)
    resumed.load_state_dict(state)
    resumed.bind(EYE, LABELS)
    while resumed.running:
        resumed.step()
    assert resumed.statuses == expected.statuses
    assert torch.equal(rest.hidden, whole.hidden)
    assert torch.equal(rest.readout, whole.readout)


def test_the_same_data_again_have_nothing_to_train_and_other_data_begin_anew() -> None:
    stack = stack_of(2, 300)
    descent = trained(stack)
    before = stack.hidden.detach().clone()
    descent.release()
    descent.bind(EYE, LABELS)
    assert not descent.running
    assert torch.equal(stack.hidden, before)
    descent.release()
    descent.bind(EYE, 1 - LABELS)
    assert descent.running
    while descent.running:
        descent.step()
    outputs = predict(stack, EYE)
    torch.testing.assert_close(outputs, (1 - LABELS).expand_as(outputs), rtol=0, atol=5e-3)


def test_general_training_inputs() -> None:
    """Inputs that are not orthonormal are interpolated like by the NTK's posterior mean."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(12, 20, dtype=torch.float64, generator=generator)
    test_inputs = torch.randn(6, 20, dtype=torch.float64, generator=generator)
    stack = MLPStack(20, BITS, 8192, 6, seed=1, init="antisymmetric", dtype=torch.float64)
    descent = Descent(stack, DescentOptions(tolerance=1e-12))
    descent.bind(inputs, LABELS)
    while descent.running:
        descent.step()
    assert all(status.converged for status in descent.statuses)
    mean = ntk(test_inputs, inputs) @ torch.linalg.solve(ntk(inputs, inputs), LABELS)
    # The kernel of n units fluctuates by about 1/√n: 0.01 a member; five times that of the mean of six.
    assert (predict(stack, test_inputs).mean(0) - mean).abs().max() < 5 * 0.01 * mean.abs().max()


@pytest.mark.parametrize("engine", ["auto", "functional"])
def test_bfloat16_products_reach_the_same_loss(engine: Any) -> None:
    stack = stack_of(1, 4096, torch.float32)
    (status,) = trained(stack, DescentOptions(tolerance=1e-9, engine=engine), bfloat16=True).statuses
    assert status.converged
    assert stack.hidden.dtype == torch.float32


@pytest.mark.parametrize("engine", ["auto", "functional"])
@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-7])
def test_only_outputs_of_the_weights_own_type_say_that_a_member_has_converged(engine: Any, tolerance: float) -> None:
    stack = stack_of(1, 2048, torch.float32)
    (status,) = trained(stack, DescentOptions(tolerance=tolerance, engine=engine), bfloat16=True).statuses
    assert status.converged
    residuals = stack(EYE.float())[0].detach().double() - LABELS
    # The outputs in bfloat16 are off by a loss of 1e-6 of the first, which the last of these would show.
    assert status.losses[-1] == pytest.approx(float(residuals.square().mean()), rel=1e-2, abs=1e-13)


def test_a_member_that_converges_at_once_is_measured_in_the_weights_own_type() -> None:
    """The first step leaves half a percent of the loss, of which bfloat16 would tell two digits or three."""
    stack = stack_of(1, 2048, torch.float32)
    (status,) = trained(stack, DescentOptions(tolerance=0.05), bfloat16=True).statuses
    assert (status.converged, status.steps) == (True, 1)
    residuals = stack(EYE.float())[0].detach().double() - LABELS
    assert status.losses[-1] == pytest.approx(float(residuals.square().mean()), rel=1e-5)


@pytest.mark.parametrize("layers", ["both", "readout"])
def test_residuals_are_whitened_by_the_kernel_of_the_layers_that_are_trained(layers: Layers) -> None:
    kernel = ntk if layers == "both" else nngp
    generator = torch.Generator().manual_seed(0)
    for inputs in (EYE, torch.randn(7, TEMPLATES, dtype=torch.float64, generator=generator)):
        residuals = torch.randn(2, BITS, len(inputs), dtype=torch.float64, generator=generator)
        expected = torch.linalg.solve(kernel(inputs, inputs), residuals.mT).mT
        torch.testing.assert_close(inverse_kernel_of(inputs, layers)(residuals), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_resumed_descent_in_bfloat16_takes_the_same_steps_to_the_bit(stop_after: int) -> None:
    options = DescentOptions(tolerance=1e-9, steps_max=40)
    whole = stack_of(2, 600, torch.float32)
    expected = trained(whole, options, bfloat16=True)
    stack = stack_of(2, 600, torch.float32)
    descent = Descent(stack, options, bfloat16=True)
    descent.bind(EYE, LABELS)
    for _ in range(stop_after):
        descent.step()
    resumed = Descent(stack, options, bfloat16=True)
    resumed.load_state_dict(copy.deepcopy(descent.state_dict()))
    resumed.bind(EYE, LABELS)
    while resumed.running:
        resumed.step()
    assert resumed.statuses == expected.statuses
    assert torch.equal(stack.hidden, whole.hidden)
    assert torch.equal(stack.readout, whole.readout)


@pytest.mark.parametrize(
    ("inputs", "labels", "says"),
    [
        (EYE[:, :5], LABELS, "with 5 features and labels with 4: expected 12 and 4"),
        (EYE, LABELS[:, :2], "labels with 2: expected 12 and 4"),
        (EYE[:3], LABELS, "expected as many rows"),
        (torch.zeros(3, 12, dtype=torch.float64), LABELS[:3], "row 0 is zero"),
        (EYE[[0, 1, 0]] * 2, LABELS[:3], "rows 0 and 2 are parallel"),
    ],
)
def test_data_that_do_not_fit_are_refused(unchecked: None, inputs: Tensor, labels: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Descent(stack_of(1, 8)).bind(inputs, labels)


def test_wrong_options_are_refused(unchecked: None) -> None:
    for options, says in (
        ({"loss": "huber"}, "loss='huber': expected one of whitened, mse"),
        ({"engine": "functionl"}, "engine='functionl': expected one of auto, functional"),
        ({"tolerance": 1.5}, "tolerance=1.5"),
        ({"steps_max": 0}, "steps_max=0"),
    ):
        with pytest.raises(ValueError, match=says):
            DescentOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="bind"):
        Descent(stack_of(1, 8)).step()
    descent = Descent(stack_of(1, 8))
    descent.bind(EYE, LABELS)
    with pytest.raises(ValueError, match="a state of 1 members: expected 2"):
        Descent(stack_of(2, 8)).load_state_dict(descent.state_dict())


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300])
def test_data_that_are_not_finite_are_refused(number: float) -> None:
    inputs, labels = EYE.double().clone(), LABELS.double().clone()
    # Beyond what float32 holds, in which these members are trained, is infinite to them.
    labels[1, 0] = number
    with pytest.raises(ValueError, match="^labels: row 1 has a number that is not finite"):
        Descent(MLPStack(len(EYE), LABELS.shape[1], 16, 2)).bind(inputs, labels)
    inputs[2, 0] = number
    with pytest.raises(ValueError, match="^training inputs: row 2 has a number that is not finite"):
        Descent(MLPStack(len(EYE), LABELS.shape[1], 16, 2)).bind(inputs, LABELS)
