"""What is measured, as torchmetrics: states are registered, so `reset`, `sync` and checkpoints work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric


class _Share(Metric):
    """A share of things that are right.

    Args:
        options: those of every metric, such as ``sync_on_compute``.
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    total: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
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

    def update(self, decoded: Bool[Tensor, "states bits"], next_states: Bool[Tensor, "states bits"]) -> None:
        """Count the states of one ensemble's decoded predictions."""
        self._count((decoded == next_states).all(-1))


class BitAccuracy(_Share):
    """The share of bits that are right."""

    def update(self, decoded: Bool[Tensor, "states bits"], next_states: Bool[Tensor, "states bits"]) -> None:
        """Count the bits of one ensemble's decoded predictions."""
        self._count(decoded == next_states)


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

    def update(self, decoded: Bool[Tensor, "states bits"], next_states: Bool[Tensor, "states bits"]) -> None:
        """Count the executions of one ensemble's decoded predictions."""
        states = (decoded == next_states).all(-1)
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
