"""Training where the training inputs are the templates themselves, X = I_k: the fast path (DESIGN §4).

There W1·X = W1, so the first layer costs no product, neither forwards nor backwards; and a state's
pre-activations are a sum of the columns of W1 that its matched templates select. What is left are
three matrix products a step. They run block by block of hidden units: one pass applies a step to a
block and at once adds up what the block contributes to the new outputs, so weights travel through the
cache once a step and no temporary is larger than a block.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ntk_ensembles.ensemble.network import Cohort

_STATES_AT_ONCE = 1024
_SUMS_AT_ONCE = 1 << 17
"""So many pre-activations stay in a core's cache until they are multiplied with W2."""


class IdentityModel:
    """A cohort trained on X = I_k (a `Trainable`), changed in place.

    Args:
        cohort: the members.
        low_precision: compute the two products of a step's update in bfloat16. Weights, outputs and so
            residuals keep the cohort's dtype: like iterative refinement, training corrects in its next
            step what the rounding of the last one left.
    """

    def __init__(self, cohort: Cohort, *, low_precision: bool = False) -> None:
        self._cohort = cohort
        self._blocks = cohort.hidden.shape[1]
        self._scale = 1 / math.sqrt(cohort.width * cohort.hidden.shape[2])
        self._low_precision = low_precision

    @cached_property
    def _active(self) -> Tensor:
        """relu(W1) of a block; a buffer, made when training begins."""
        return torch.empty_like(self._cohort.hidden[:, 0], memory_format=torch.contiguous_format)

    @cached_property
    def _pulled(self) -> Tensor:
        """W2ᵀp of a block; a buffer likewise."""
        return torch.empty_like(self._active)

    def outputs(self) -> Float[Tensor, "members bits templates"]:
        """f(X)ᵀ of every member."""
        return self._sweep(None)

    def step(self, cotangents: Float[Tensor, "members bits templates"]) -> Float[Tensor, "members bits templates"]:
        """Change every member's weights by −Jᵀ·cotangent and return the new outputs."""
        return self._sweep(cotangents * self._scale)

    def restart(self, position: int) -> None:
        """Set one member back to its initial weights."""
        self._cohort.redraw(position)

    def _sweep(self, cotangents: Tensor | None) -> Tensor:
        cohort = self._cohort
        members, _, templates, _ = cohort.hidden.shape
        totals = cohort.hidden.new_zeros((members, cohort.readout.shape[2], templates))
        for block in range(self._blocks):
            hidden, readout = cohort.hidden[:, block], cohort.readout[:, block]
            if cotangents is not None:
                self._update(hidden, readout, cotangents)
            torch.clamp_min(hidden, 0, out=self._active)
            totals.baddbmm_(readout, self._active.mT)
        return totals.mul_(self._scale)

    def _update(self, hidden: Tensor, readout: Tensor, cotangents: Tensor) -> None:
        """One block's step: W1 −= (W2ᵀp)·relu'(W1), W2 −= p·relu(W1)ᵀ, both with the weights before it."""
        torch.clamp_min(hidden, 0, out=self._active)
        if self._low_precision:
            low = torch.bfloat16
            active, pulled = self._active.to(low), torch.bmm(cotangents.mT.to(low), readout.to(low))
            readout.sub_(torch.bmm(cotangents.to(low), active))
        else:
            active, pulled = self._active, torch.bmm(cotangents.mT, readout, out=self._pulled)
            readout.baddbmm_(cotangents, active, alpha=-1)
        # The gradient of relu, in one pass and in place: `pulled` where the unit is active, else 0.
        torch.ops.aten.threshold_backward.grad_input(pulled, active, 0, grad_input=pulled)
        hidden.sub_(pulled)

    def predict(self, inputs: Float[Tensor, "inputs templates"]) -> Float[Tensor, "members inputs bits"]:
        """f(x) of every member at sparse inputs, such as encoded states."""
        return torch.cat([self._predict(part) for part in torch.split(inputs, _STATES_AT_ONCE)], 1)

    def _predict(self, inputs: Tensor) -> Tensor:
        cohort = self._cohort
        members, blocks, bits, units = cohort.readout.shape
        totals = inputs.new_zeros((members, len(inputs), bits))
        if inputs.device.type == "cpu":
            # Adding up a few rows that the cache holds beats a product with the sparse inputs. Few inputs take several
            # blocks, and several members, at once: the same sums in the same order, with fewer calls.
            count = blocks_at_once(len(inputs), units)
            together, count = min(max(count // blocks, 1), members), min(count, blocks)
            sparse = _SparseInputs(inputs, together * count)
            for first in range(0, members, together):
                some = slice(first, first + together)
                for start in range(0, blocks, count):
                    part = some, slice(start, start + count)
                    sums = sparse.times(cohort.hidden[part]).relu_()
                    for total, *factors in zip(totals[some], sums, cohort.readout[part].mT, strict=True):
                        total.addbmm_(*factors)
        else:
            for block in range(blocks):
                sums = inputs @ cohort.hidden[:, block]
                totals.baddbmm_(sums.relu_(), cohort.readout[:, block].mT)
        return totals.mul_(self._scale)


def blocks_at_once(inputs: int, units: int) -> int:
    """How many blocks of so many hidden units predict together on a CPU: what they compute should stay in its cache."""
    return max(_SUMS_AT_ONCE // max(inputs * units, 1), 1)


class _SparseInputs:
    """Inputs that are mostly 0, to be multiplied with up to so many blocks of W1 at once."""

    def __init__(self, inputs: Float[Tensor, "inputs templates"], blocks: int) -> None:
        count, templates = inputs.shape
        rows, columns = inputs.nonzero(as_tuple=True)
        offsets = functional.pad(rows.bincount(minlength=count).cumsum(0), (1, 0))[:-1]
        positions = torch.arange(blocks)[:, None]
        self._columns = columns + templates * positions
        self._offsets = offsets + len(columns) * positions
        self._values = inputs[rows, columns].repeat(blocks, 1)

    def times(
        self, hidden: Float[Tensor, "members blocks templates units"]
    ) -> Float[Tensor, "members blocks inputs units"]:
        """The pre-activations of these blocks' units."""
        members, blocks, _, units = hidden.shape
        count = members * blocks
        sums = functional.embedding_bag(
            self._columns[:count].view(-1),
            hidden.reshape(-1, units),
            self._offsets[:count].view(-1),
            mode="sum",
            per_sample_weights=self._values[:count].view(-1),
        )
        return sums.view(members, blocks, -1, units)
