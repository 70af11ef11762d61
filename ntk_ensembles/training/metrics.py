"""What is measured, as torchmetrics: states are registered, so `reset`, `sync` and checkpoints work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class _Share(Metric):
    """A share of things that are right."""

    full_state_update = False
    higher_is_better = True
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def _count(self, right: Tensor) -> None:
        self.right += right.sum()
        self.total += right.numel()

    def compute(self) -> Tensor:
        """The share, float64; nan before any update."""
        return self.right.to(torch.float64) / self.total


class ExactMatch(_Share):
    """The share of states all of whose bits are right."""

    def update(self, decoded: Bool[Tensor, "states bits"], successors: Bool[Tensor, "states bits"]) -> None:
        """Count the states of one ensemble's decoded predictions."""
        self._count((decoded == successors).all(-1))


class BitAccuracy(_Share):
    """The share of bits that are right."""

    def update(self, decoded: Bool[Tensor, "states bits"], successors: Bool[Tensor, "states bits"]) -> None:
        """Count the bits of one ensemble's decoded predictions."""
        self._count(decoded == successors)


class ExecutionMatch(_Share):
    """The share of whole executions all of whose micro-steps are right.

    Under teacher forcing, which for this question equals the closed loop: the first wrong micro-step
    of an execution is wrong in both (DESIGN §4).

    Args:
        executions: for each the indices of its states.
    """

    def __init__(self, executions: Sequence[Int[Tensor, " _steps"]]) -> None:
        super().__init__()
        self._executions = executions

    def update(self, decoded: Bool[Tensor, "states bits"], successors: Bool[Tensor, "states bits"]) -> None:
        """Count the executions of one ensemble's decoded predictions."""
        states = (decoded == successors).all(-1)
        self._count(torch.stack([states[steps].all() for steps in self._executions]))


class RMSDeviation(Metric):
    """The root mean square of outputs minus the NTK mean."""

    full_state_update = False
    higher_is_better = False
    squares: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squares", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, deviations: Float[Tensor, "states bits"]) -> None:
        """Add one ensemble's deviations from the NTK mean."""
        self.squares += deviations.square().sum(dtype=torch.float64)
        self.total += deviations.numel()

    def compute(self) -> Tensor:
        """The root mean square, float64; nan before any update."""
        return (self.squares / self.total).sqrt()


class MemberDeviations(Metric):
    """Every member's deviation from the NTK mean on the evaluation states, in float16.

    From these every statistic for every number of members can be computed again without training. It
    buffers all members: 2 bytes for each member, state and bit (200 MB for 512 members, 1000 states of
    200 bits). A deviation's rounding is at most 2⁻¹¹ of itself.
    """

    full_state_update = False
    indices: list[Tensor]
    deviations: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("indices", [], dist_reduce_fx="cat")
        self.add_state("deviations", [], dist_reduce_fx="cat")

    def update(self, indices: Int[Tensor, " members"], deviations: Float[Tensor, "members states bits"]) -> None:
        """Add members in any order, each once."""
        self.indices.append(indices.cpu())
        self.deviations.append(deviations.to(torch.float16).cpu())

    def compute(self) -> tuple[Int[Tensor, " members"], Float[Tensor, "members states bits"]]:
        """Indices and deviations of all members, sorted by index."""
        indices = dim_zero_cat(self.indices)
        deviations = dim_zero_cat(self.deviations)
        order = indices.argsort()
        if torch.equal(order, torch.arange(len(order))):
            return indices, deviations
        return indices[order], deviations[order]
