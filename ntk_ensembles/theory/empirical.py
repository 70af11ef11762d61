"""Kernels of networks of finite width, and what training by them leads to (docs/theory.md, sections 4 and 5).

A network's gradients at its weights θ give its own, empirical neural tangent kernel: with J(x) = ∂f(x)/∂θ,
Θ̂(x, y) = J(x)J(y)ᵀ, one matrix (outputs × outputs) for each pair of inputs. As the width grows it approaches
the analytic kernel, Θ(x, y) times the identity matrix. `linearise` trains the network that is linear in its
weights, f₀(x) + J(x)(θ − θ₀): what stands between a trained network and the infinitely wide one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

_BLOCK_BYTES = 2**28
"""Size of the gradients held at once, for each of the kernel's two sides."""

_INPUTS_AT_ONCE = 1024

Weights = dict[str, Tensor]


def empirical_ntk(
    network: nn.Module,
    x: Float[Tensor, "left features"],
    y: Float[Tensor, "right features"] | None = None,
    *,
    trace: bool = True,
) -> Float[Tensor, "left right"] | Float[Tensor, "left outputs right outputs"]:
    """Compute the neural tangent kernel of one network of finite width, at its present weights.

    The trace of Θ̂(x, y) over the number of outputs is one number a pair, to be compared with `ntk`. The whole matrix,
    with ``trace=False``, is what training goes by: its off-diagonal entries, of order 1/√width, couple the outputs.

    Only parameters that require gradients count. With the hidden layer of a `TwoLayerMLP` frozen the
    result is the empirical NNGP kernel, to be compared with `nngp`.

    Args:
        network: Any module that maps (inputs, features) to (inputs, outputs), each row by itself; in
            evaluation mode where the modes differ. It is not changed.
        x: Inputs of the kernel's rows, on the network's device; converted to its dtype.
        y: Inputs of the kernel's columns; those of the rows by default.
        trace: Whether to average over outputs.

    Returns:
        The kernel in the network's dtype. Costs a gradient for each input and output, and products of all pairs;
        beside the result, memory for two blocks of gradients of 256 MiB each (one gradient where a single one is
        larger).

    Raises:
        ValueError: The network's output has not two axes, or it has no parameters that require gradients.
    """
    model = _Model(network)
    left = x.to(model.dtype)
    right = left if y is None else y.to(model.dtype)
    outputs = model.outputs(right)
    if trace:
        parts = (_gram(model, (left, _all(left, i)), (right, _all(right, i))) for i in range(outputs))
        return sum(parts, start=left.new_zeros(len(left), len(right))) / outputs
    rows, columns = (_every_output(side, outputs) for side in (left, right))
    kernel = _gram(model, rows, rows if right is left else columns)
    return kernel.view(len(left), outputs, len(right), outputs)


def linearise(
    network: nn.Module,
    inputs: Float[Tensor, "templates features"],
    labels: Float[Tensor, "templates outputs"],
) -> Callable[[Float[Tensor, "inputs features"]], Float64[Tensor, "inputs outputs"]]:
    """Train the linearised network to convergence, in closed form.

    The network that is linear in its weights, trained by gradient descent on the squared error (or on any
    loss that keeps its steps in the row space of J(X)), ends at docs/theory.md, equation (14):

        f(x) = f₀(x) + J(x)J(X)ᵀ(J(X)J(X)ᵀ)⁻¹(Y − f₀(X)).

    The kernel is the full one, over all pairs of inputs and outputs, and is solved in float64, whatever the
    network's dtype.

    Args:
        network: Any module that maps (inputs, features) to (inputs, outputs), each row by itself; in
            evaluation mode where the modes differ. It is not changed, and later changes of it have no effect.
            Parameters that do not require gradients stay as they are.
        inputs: X, one training input a row.
        labels: Y, the target of each.

    Returns:
        The trained linear network: a function of inputs, any float dtype, on the network's device.

    Raises:
        ValueError: The network cannot fit all labels when it is linearised, because J(X)J(X)ᵀ is singular (equal
            or parallel inputs, zero rows, too few weights); or shapes do not fit together.
    """
    model = _Model(network, torch.float64)
    x, y = inputs.to(torch.float64), labels.to(torch.float64)
    outputs = model.outputs(x)
    if y.shape != (len(x), outputs):
        raise ValueError(f"labels of shape {tuple(y.shape)}: expected {(len(x), outputs)}, the shape of the outputs")
    rows = _every_output(x, outputs)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(kernel := _gram(model, rows, rows))
    # As for the analytic kernel: a squared pivot below this share of the diagonal is rounding.
    rounding = len(kernel) * torch.finfo(kernel.dtype).eps * kernel.diagonal()
    if int(failed) or bool((factor.diagonal() ** 2 <= rounding).any()):
        raise ValueError(
            f"the empirical kernel of {len(x)} inputs with {outputs} outputs each is singular: {model.size} weights, "
            "linearised, cannot fit labels at these inputs (equal or parallel rows, a zero row, or too few weights)"
        )
    start, pull = vjp(lambda weights: model(weights, x), model.weights)[:2]
    cotangents = torch.cholesky_solve((y - start).reshape(-1, 1), factor).view_as(y)
    (change,) = pull(cotangents)

    def trained(at: Float[Tensor, "inputs features"]) -> Float64[Tensor, "inputs outputs"]:
        parts = torch.split(at.to(torch.float64), _INPUTS_AT_ONCE)
        return torch.cat([_tangent(model, part, change) for part in parts])

    return trained


class _Model:
    """A module as a function of those of its weights that require gradients."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None) -> None:
        copied = {name: value.detach().to(dtype, copy=dtype is not None) for name, value in network.named_parameters()}
        trained = {name for name, value in network.named_parameters() if value.requires_grad}
        if not trained:
            raise ValueError("the network has no parameters that require gradients")
        self._network = network
        self.weights: Weights = {name: copied[name] for name in sorted(trained)}
        self._constants = {name: value for name, value in copied.items() if name not in trained}
        for name, value in network.named_buffers():
            floating = value.is_floating_point()
            self._constants[name] = value.detach().to(dtype if floating else None, copy=dtype is not None)
        self.dtype = next(iter(self.weights.values())).dtype
        self.size = sum(value.numel() for value in self.weights.values())

    def __call__(self, weights: Weights, inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self._network, {**self._constants, **weights}, (inputs,))
        return outputs

    def outputs(self, inputs: Tensor) -> int:
        """Return the number of outputs."""
        with torch.no_grad():
            found = self(self.weights, inputs[:1])
        if found.ndim != 2:
            raise ValueError(
                f"the network's output has shape {tuple(found.shape)} for one input: expected (1, outputs), "
                "one row for each input"
            )
        return found.shape[1]

    def gradients(self, inputs: Tensor, chosen: Tensor) -> Weights:
        """Return the gradient of one output at each input: by parameter, (inputs, parameter's size)."""

        def output(weights: Weights, single: Tensor, index: Tensor) -> Tensor:
            # gather, because under vmap an index is a tensor that cannot become a number.
            return self(weights, single[None])[0].gather(0, index[None])[0]

        found: Weights = vmap(grad(output), in_dims=(None, 0, 0))(self.weights, inputs, chosen)
        return {name: value.flatten(1) for name, value in found.items()}


Side = tuple[Tensor, Tensor]
"""Inputs, and for each the index of an output."""


def _all(inputs: Tensor, output: int) -> Tensor:
    return torch.full((len(inputs),), output, device=inputs.device)


def _every_output(inputs: Tensor, outputs: int) -> Side:
    numbers = torch.arange(outputs, device=inputs.device)
    return inputs.repeat_interleave(outputs, 0), numbers.repeat(len(inputs))


def _gram(model: _Model, left: Side, right: Side) -> Tensor:
    """Return J·Jᵀ between the rows of two sides, in blocks; gradients on the right are made again for each block."""
    size = max(1, _BLOCK_BYTES // (model.size * model.dtype.itemsize))
    symmetric = left[0] is right[0]
    result = left[0].new_zeros(len(left[0]), len(right[0]))
    for i in range(0, len(result), size):
        rows = slice(i, i + size)
        first = model.gradients(left[0][rows], left[1][rows])
        for j in range(i if symmetric else 0, result.shape[1], size):
            columns = slice(j, j + size)
            diagonal = symmetric and i == j
            second = first if diagonal else model.gradients(right[0][columns], right[1][columns])
            for name, value in first.items():
                result[rows, columns] += value @ second[name].T
            if symmetric and not diagonal:
                result[columns, rows] = result[rows, columns].T
    return result


def _tangent(model: _Model, inputs: Tensor, change: Weights) -> Tensor:
    """Return f₀(x) + J(x)·change."""
    outputs, changes = jvp(lambda weights: model(weights, inputs), (model.weights,), (change,))[:2]
    result: Tensor = outputs + changes
    return result
