"""Steps and predictions of a stack of members, in place on its own weights (docs/theory.md, section 8).

`OneHotEngine` is the fast path for training inputs X = I_k, which templates are: there W1·X = W1, so the first
layer costs no product, neither forwards nor backwards. `FunctionalEngine` serves any X, through `torch.func`.
`make_engine` chooses from X. `predict` evaluates members at any inputs without recording gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional

from ntk_ensembles.ensemble.network import MLPStack, forward_of, map_members
from ntk_ensembles.ensemble.products import add_product, members_together, product, stored, units_at_once
from ntk_ensembles.theory.kernels import Layers

EngineChoice = Literal["auto", "functional"]
"""``auto``: the one-hot engine where the training inputs are one-hot, `torch.func` otherwise. ``functional``:
`torch.func` whatever they are, as a check."""

ENGINES: tuple[EngineChoice, ...] = get_args(EngineChoice)

_UNITS_TRANSPOSED, _NUMBERS_TRANSPOSED = 128, 1 << 16
"""Hidden units whose input weights are transposed together, to be added up by columns: at least as many, and as many
as have that many weights, since the calls for small slices take longer than the arithmetic."""

_FEW_INPUTS = 64
"""Inputs for which calls cost more than arithmetic, so that slices are larger."""

_STATES_AT_ONCE = 1024

_SPARSE_SHARE = 0.25
"""Inputs with at most this share of nonzeros are multiplied as sums of columns of W1."""


@runtime_checkable
class Engine(Protocol):
    """Members and their training inputs as a function of cotangents, which is all that descent needs to see."""

    def outputs(self, *, coarse: bool = False) -> Float[Tensor, "members out_features inputs"]:
        """Return f(X)ᵀ of every member.

        Args:
            coarse: Whether products in bfloat16 will do, if that is the engine's precision of steps.
        """
        ...

    def step(
        self, cotangents: Float[Tensor, "members out_features inputs"], *, coarse: bool = False
    ) -> Float[Tensor, "members out_features inputs"]:
        """Change every member's weights by −Jᵀ·cotangent, in place, and return the new outputs.

        Args:
            cotangents: p of every member.
            coarse: As for `outputs`, for the new ones.
        """
        ...


def make_engine(
    hidden: Float[Tensor, "members width in_features"],
    readout: Float[Tensor, "members out_features width"],
    inputs: Float[Tensor, "inputs in_features"],
    choice: EngineChoice = "auto",
    *,
    layers: Layers = "both",
    bfloat16: bool = False,
) -> Engine:
    """Return the engine for these training inputs.

    Args:
        hidden: W1 of the members, changed in place by steps.
        readout: W2 of the members, likewise.
        inputs: X, one training input a row, of the weights' type and device.
        choice: "auto" takes the fast engine if X is the identity; "functional" never does.
        layers: Which layers are trained; with "readout" W1 is never changed, and no gradient of it computed.
        bfloat16: Compute the products of a step's update in bfloat16, and those of outputs that are asked for
            as coarse. Weights and other outputs keep their type: like iterative refinement, training corrects in
            its next step what the rounding of the last one left.
    """
    if choice == "auto" and is_one_hot(inputs):
        return OneHotEngine(hidden, readout, layers=layers, bfloat16=bfloat16)
    return FunctionalEngine(hidden, readout, inputs, layers=layers, bfloat16=bfloat16)


def members_at_once(
    hidden: Float[Tensor, "members width in_features"],
    readout: Float[Tensor, "members out_features width"],
    inputs: Float[Tensor, "inputs in_features"],
    choice: EngineChoice = "auto",
    *,
    bfloat16: bool = False,
) -> int:
    """Return how many of the members are best given to one engine: on a GPU all, on a CPU one, or a batch if small.

    Args:
        hidden: W1 of the members.
        readout: W2 of the members.
        inputs: X.
        choice: Which engine it will be, as for `make_engine`.
        bfloat16: Whether it computes in bfloat16.
    """
    if hidden.device.type != "cpu":
        return len(hidden)
    return 1 if choice != "auto" or not is_one_hot(inputs) else _small_members_together(hidden, readout, bfloat16)


def _small_members_together(hidden: Tensor, readout: Tensor, bfloat16: bool) -> int:
    """Return the number of members in a batch of the one-hot engine on a CPU, 1 where batches do not pay."""
    units = min(hidden.shape[1], units_at_once(hidden.device))
    return 1 if bfloat16 else members_together(readout.shape[1], hidden.shape[2], units)


def is_one_hot(inputs: Float[Tensor, "inputs in_features"]) -> bool:
    """Check whether training inputs are the identity matrix, X = I_k."""
    size, features = inputs.shape
    # Without an identity matrix to compare with, which would take as much memory again.
    return size == features and bool((inputs.diagonal() == 1).all()) and int(inputs.count_nonzero()) == size


class FunctionalEngine:
    """Training on any inputs: `vmap` runs the network's definition over members, `vjp` pulls cotangents back.

    The arguments are those of `make_engine`.
    """

    def __init__(
        self, hidden: Tensor, readout: Tensor, inputs: Tensor, *, layers: Layers = "both", bfloat16: bool = False
    ) -> None:
        self._weights = {"hidden": hidden, "readout": readout}
        self._trained = ("readout",) if layers == "readout" else ("hidden", "readout")
        self._forward = forward_of(hidden, readout)
        self._inputs = inputs
        self._bfloat16 = bfloat16

    def outputs(self, *, coarse: bool = False) -> Float[Tensor, "members out_features inputs"]:
        """Return f(X)ᵀ of every member."""
        # The precision is this engine's own: an autocast of the caller would reach one thread of several.
        with torch.autocast(self._inputs.device.type, torch.bfloat16, enabled=coarse and self._bfloat16):
            outputs = vmap(self._forward, in_dims=(0, None))(self._weights, self._inputs).mT
        return outputs.to(self._inputs.dtype)

    def step(
        self, cotangents: Float[Tensor, "members out_features inputs"], *, coarse: bool = False
    ) -> Float[Tensor, "members out_features inputs"]:
        """Change every member's weights by −Jᵀ·cotangent, in place, and return the new outputs."""

        def gradients(weights: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
            trained = {name: weights[name] for name in self._trained}
            outputs, pullback = vjp(lambda state: self._forward({**weights, **state}, self._inputs), trained)[:2]
            (found,) = pullback(cotangent.to(outputs.dtype))
            return dict(found)

        with torch.autocast(self._inputs.device.type, torch.bfloat16, enabled=self._bfloat16):
            changes = vmap(gradients)(self._weights, cotangents.mT)
        for name, change in changes.items():
            self._weights[name].sub_(change)
        return self.outputs(coarse=coarse)


class OneHotEngine:
    """Training on X = I_k: three matrix products a step, slice by slice of hidden units.

    One pass applies a step to a slice and at once adds up what the slice contributes to the new outputs, so the
    weights travel through the cache once a step and no temporary is larger than a slice.

    The arguments are those of `make_engine`.
    """

    def __init__(self, hidden: Tensor, readout: Tensor, *, layers: Layers = "both", bfloat16: bool = False) -> None:
        self._hidden, self._readout = hidden, readout
        self._layers = layers
        self._bfloat16 = bfloat16
        width, features = hidden.shape[1:]
        self._scale = 1 / math.sqrt(width * features)
        self._units = min(width, units_at_once(hidden.device))
        # A member by itself is matrices, not a batch of one, but where small members come in batches.
        in_batches = hidden.device.type == "cpu" and _small_members_together(hidden, readout, bfloat16) > 1
        self._is_alone = len(hidden) == 1 and not in_batches

    def outputs(self, *, coarse: bool = False) -> Float[Tensor, "members out_features inputs"]:
        """Return f(X)ᵀ of every member."""
        return self._sweep(None, coarse)

    def step(
        self, cotangents: Float[Tensor, "members out_features inputs"], *, coarse: bool = False
    ) -> Float[Tensor, "members out_features inputs"]:
        """Change every member's weights by −Jᵀ·cotangent, in place, and return the new outputs."""
        return self._sweep(cotangents * self._scale, coarse)

    def _sweep(self, cotangents: Tensor | None, coarse: bool) -> Tensor:
        hidden, readout = self._hidden, self._readout
        if self._is_alone:
            hidden, readout = hidden[0], readout[0]
            cotangents = None if cotangents is None else cotangents[0]
        (*members, width, features) = hidden.shape
        totals = hidden.new_zeros(*members, readout.shape[-2], features)
        update_type = torch.bfloat16 if self._bfloat16 else totals.dtype
        output_type = update_type if coarse else totals.dtype
        if cotangents is not None:
            cotangents = stored(cotangents.to(update_type), self._units)
        buffers = {
            dtype: hidden.new_empty(2, *members, self._units, features, dtype=dtype)
            for dtype in {update_type, output_type}
        }
        with torch.autocast(totals.device.type, enabled=False):
            for start in range(0, width, self._units):
                units = slice(start, start + self._units)
                some, some_readout = hidden[..., units, :], readout[..., units]
                if cotangents is not None:
                    self._update(some, some_readout, cotangents, buffers[update_type][..., : some.shape[-2], :])
                active = _relu(some, buffers[output_type][0, ..., : some.shape[-2], :])
                add_product(totals, some_readout.to(output_type), active)
        return totals.mul_(self._scale).view(len(self._hidden), *totals.shape[-2:])

    def _update(self, hidden: Tensor, readout: Tensor, cotangents: Tensor, buffers: Tensor) -> None:
        """Apply a step to one slice: W1 −= (W2ᵀp)·relu'(W1), W2 −= p·relu(W1)ᵀ, both with the weights before it.

        Products are of the cotangents' type. The buffers, of that type too, are for relu(W1) and W2ᵀp.
        """
        active = _relu(hidden, buffers[0])
        pulled = None
        if self._layers == "both":
            pulled = product(readout.to(cotangents.dtype).mT, cotangents, out=buffers[1])
        add_product(readout, cotangents, active.mT, alpha=-1.0)
        if pulled is None:
            return
        # Passes over bfloat16 are slower than a copy as float32 and passes over that.
        change = pulled.to(hidden.dtype)
        # The gradient of relu, in one pass and in place: the change where the unit is active, else 0. Measured on
        # 805 x 1024 numbers 0.06 ms, against 0.6 ms for a product with a comparison.
        torch.ops.aten.threshold_backward.grad_input(change, hidden, 0, grad_input=change)
        hidden.sub_(change)


def _relu(hidden: Tensor, out: Tensor) -> Tensor:
    """Return relu(W1) in memory that is given, rounded to its type."""
    if out.dtype == hidden.dtype:
        return torch.clamp_min(hidden, 0, out=out)
    out.copy_(hidden)
    # The bits of a negative number are a negative integer, and integers are compared six times as fast.
    out.view(torch.int16).clamp_min_(0)
    return out


@torch.no_grad()
def predict(
    stack: MLPStack, inputs: Float[Tensor, "inputs in_features"]
) -> Float[Tensor, "members inputs out_features"]:
    """Return every member's outputs at a batch of inputs, without recording gradients.

    The same as ``stack(inputs)`` up to rounding, and faster where the inputs are mostly zeros, as encoded
    states are. On a CPU each core evaluates members of its own.

    Args:
        stack: The members.
        inputs: Inputs, the same for every member; they are converted to the weights' type and device.
    """
    inputs = inputs.to(stack.hidden)
    device = inputs.device
    outputs = inputs.new_empty(len(stack), len(inputs), stack.readout.shape[1])
    chunks = [slice(start, start + _STATES_AT_ONCE) for start in range(0, len(inputs), _STATES_AT_ONCE)]
    sparse = device.type == "cpu" and int(inputs.count_nonzero()) <= _SPARSE_SHARE * inputs.numel()
    evaluate = [_SparseInputs(inputs[chunk]) if sparse else _DenseInputs(inputs[chunk]) for chunk in chunks]

    def write(members: int | slice) -> None:
        for chunk, outputs_of in zip(chunks, evaluate, strict=True):
            with torch.autocast(device.type, enabled=False):
                outputs[members, chunk] = outputs_of(stack.hidden[members], stack.readout[members])

    parts: Sequence[int | slice] = range(len(stack)) if device.type == "cpu" else [slice(None)]
    map_members(write, parts, device)
    return outputs


class _DenseInputs:
    """Inputs without zeros to skip, for one member or, as matrix products of a batch, for several.

    Args:
        inputs: The inputs.
    """

    def __init__(self, inputs: Float[Tensor, "inputs in_features"]) -> None:
        self._inputs = inputs

    def __call__(
        self, hidden: Float[Tensor, "*members width in_features"], readout: Float[Tensor, "*members out_features width"]
    ) -> Float[Tensor, "*members inputs out_features"]:
        """Return the outputs of the members with these weights, slice by slice of hidden units."""
        width, features = hidden.shape[-2:]
        totals = hidden.new_zeros(*hidden.shape[:-2], len(self._inputs), readout.shape[-2])
        size = units_at_once(hidden.device)
        for start in range(0, width, size):
            units = slice(start, start + size)
            sums = product(self._inputs, hidden[..., units, :].mT)
            add_product(totals, sums.relu_(), readout[..., units].mT)
        return totals.mul_(1 / math.sqrt(width * features))


class _SparseInputs:
    """Inputs that are mostly 0: the pre-activations are sums of a few columns of W1, which beats a product.

    Args:
        inputs: The inputs, on a CPU.
    """

    def __init__(self, inputs: Float[Tensor, "inputs in_features"]) -> None:
        self._count = len(inputs)
        rows, self._columns = inputs.nonzero(as_tuple=True)
        self._offsets = functional.pad(rows.bincount(minlength=self._count).cumsum(0), (1, 0))[:-1]
        self._values = inputs[rows, self._columns]

    def __call__(
        self, hidden: Float[Tensor, "width in_features"], readout: Float[Tensor, "out_features width"]
    ) -> Float[Tensor, "inputs out_features"]:
        """Return the outputs of the member with these weights."""
        width, features = hidden.shape
        totals = hidden.new_zeros(len(readout), self._count)
        by_column = hidden.mT
        stored_by_column = by_column.is_contiguous()
        # The same slices whatever the layout, so that the numbers are the same to the bit.
        units = units_at_once(hidden.device)
        if self._count > _FEW_INPUTS:
            units = min(units, max(_UNITS_TRANSPOSED, _NUMBERS_TRANSPOSED // features))
        for start in range(0, width, units):
            columns = by_column[:, start : start + units]
            sums = functional.embedding_bag(
                self._columns,
                columns if stored_by_column else columns.contiguous(),
                self._offsets,
                mode="sum",
                per_sample_weights=self._values,
            )
            add_product(totals, readout[:, start : start + units], sums.relu_().mT)
        return totals.mul_(1 / math.sqrt(width * features)).mT
