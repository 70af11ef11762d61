"""Both engines against autograd through the written-out formula, against each other, and in every precision."""

import math

import pytest
import torch

from ntk_ensembles.ensemble import FunctionalEngine, Init, MLPStack, OneHotEngine, make_engine, predict
from ntk_ensembles.ensemble.engines import is_one_hot

EYE = torch.eye(12, dtype=torch.float64)


def stack_of(width: int, members: int = 2, init: Init = "gaussian", dtype: torch.dtype = torch.float64) -> MLPStack:
    return MLPStack(12, 4, width, members, seed=5, init=init, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("one_hot", [True, False])
@pytest.mark.parametrize("init", ["gaussian", "antisymmetric"])
@pytest.mark.parametrize("width", [6, 1500])
def test_one_step_is_autograds_gradient(width: int, init: Init, one_hot: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = EYE if one_hot else torch.randn(9, 12, dtype=torch.float64, generator=generator)
    cotangents = torch.randn(2, 4, len(inputs), dtype=torch.float64, generator=generator)
    stack = stack_of(width, init=init)
    engine = make_engine(stack.hidden, stack.readout, inputs)
    assert isinstance(engine, OneHotEngine if one_hot else FunctionalEngine)
    expected = []
    for i in range(2):
        hidden, readout = (value[i].clone().requires_grad_() for value in (stack.hidden, stack.readout))
        outputs = readout @ torch.relu(hidden @ inputs.T / math.sqrt(12)) / math.sqrt(width)
        torch.testing.assert_close(engine.outputs()[i], outputs.detach(), rtol=0, atol=1e-13)
        outputs.backward(cotangents[i])
        assert hidden.grad is not None
        assert readout.grad is not None
        expected.append((hidden.detach() - hidden.grad, readout.detach() - readout.grad))
    outputs = engine.step(cotangents)
    for i, (hidden, readout) in enumerate(expected):
        torch.testing.assert_close(stack.hidden[i], hidden, rtol=0, atol=1e-13)
        torch.testing.assert_close(stack.readout[i], readout, rtol=0, atol=1e-13)
    # What a step returns is what the weights give, to the bit: a resumed run depends on it.
    assert torch.equal(outputs, engine.outputs())


@pytest.mark.parametrize("width", [900, 1024, 2600])
def test_the_engines_agree(width: int) -> None:
    fast_stack, general_stack = stack_of(width), stack_of(width)
    fast = make_engine(fast_stack.hidden, fast_stack.readout, EYE)
    general = make_engine(general_stack.hidden, general_stack.readout, EYE, "functional")
    assert isinstance(general, FunctionalEngine)
    for seed in range(3):
        cotangents = torch.randn(2, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(fast.step(cotangents), general.step(cotangents), rtol=0, atol=1e-12)
    torch.testing.assert_close(fast_stack.hidden, general_stack.hidden, rtol=0, atol=1e-12)


@pytest.mark.parametrize("choice", ["auto", "functional"])
def test_bfloat16_reaches_a_steps_products_and_nothing_else(choice) -> None:  # type: ignore[no-untyped-def]
    inputs = torch.eye(12)
    cotangents = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0)) * 30
    full, low = stack_of(2048, dtype=torch.float32), stack_of(2048, dtype=torch.float32)
    before = full.hidden.clone()
    exact = make_engine(full.hidden, full.readout, inputs, choice)
    rounded = make_engine(low.hidden, low.readout, inputs, choice, bfloat16=True)
    # Outputs are of full precision whatever the caller's autocast.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.outputs(), rounded.outputs())
    exact.step(cotangents)
    rounded.step(cotangents)
    change, rounded_change = full.hidden - before, low.hidden - before
    relative = float((change - rounded_change).norm() / change.norm())
    # bfloat16 has 8 bits: rounding of 0.2% to 0.4% a product, on average.
    assert 1e-4 < relative < 1e-2
    assert low.hidden.dtype == torch.float32
    assert rounded.outputs(coarse=True).dtype == torch.float32


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (torch.eye(3), True),
        (torch.eye(1), True),
        (2 * torch.eye(3), False),
        (torch.eye(3)[[1, 0, 2]], False),
        (torch.ones(3, 3), False),
        (torch.eye(3)[:2], False),
    ],
)
def test_what_is_one_hot(inputs: torch.Tensor, expected: bool) -> None:
    assert is_one_hot(inputs) is expected


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("count", [0, 1, 7, 1025])
@pytest.mark.parametrize("by_column", [False, True])
def test_predictions_are_forward(share: float, count: int, by_column: bool) -> None:
    """Sparse and dense inputs, few and many, and weights stored by columns as loaded ensembles have them.

    One input and one hidden unit are left over when they are worked on by powers of two.
    """
    stack = stack_of(1025, 3, dtype=torch.float32)
    if by_column:
        stack.hidden.data = stack.hidden.data.mT.contiguous().mT
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 12, generator=generator) * (torch.rand(count, 12, generator=generator) < share)
    found = predict(stack, inputs)
    # float32 sums of 1025 terms.
    torch.testing.assert_close(found.double(), stack.double()(inputs.double()), rtol=0, atol=2e-5)


def test_predictions_ignore_autocast_and_work_in_inference_mode() -> None:
    stack = stack_of(600, dtype=torch.float32)
    inputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    plain = predict(stack, inputs)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predict(stack, inputs), plain)


def test_a_members_prediction_does_not_depend_on_the_others_or_on_the_number_of_threads() -> None:
    inputs = torch.eye(12)[[0, 3, 3]] + torch.eye(12)[[1, 2, 5]]
    together = predict(MLPStack(12, 4, 2100, range(5)), inputs)
    threads = torch.get_num_threads()
    try:
        for workers in (1, 2, 3):
            torch.set_num_threads(workers)
            assert torch.equal(predict(MLPStack(12, 4, 2100, [3]), inputs)[0], together[3])
            assert torch.equal(predict(MLPStack(12, 4, 2100, range(5)), inputs), together)
    finally:
        torch.set_num_threads(threads)
