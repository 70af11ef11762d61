"""What is kept of every member: its status, and its deviations from the NTK mean on the evaluation states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float16, Float64, Int64
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ntk_ensembles.ensemble import TrainedCohort

PHASES = ("init", "train", "evaluate")
"""The columns of `Records.seconds`."""


@dataclass(frozen=True, eq=False)
class Records:
    """Members, from which every statistic for every N follows without training again.

    Deviations are kept in float16, 2 bytes for each member, state and bit (200 MB for 512 members, 1000 states
    of 200 bits); their rounding is at most 2⁻¹¹ of themselves.

    Attributes:
        indices: which members, each once.
        converged: whether training reached its tolerance; the others are never averaged in.
        steps: steps taken.
        relative_loss: the last squared training error over the first.
        loss_counts: how many of ``losses`` belong to each member.
        losses: the squared training error before each step and after the last, member after member.
        deviations: outputs minus the NTK mean.
        seconds: wall time of `PHASES`, a row for each cohort.
    """

    indices: Int64[Tensor, " members"]
    converged: Bool[Tensor, " members"]
    steps: Int64[Tensor, " members"]
    relative_loss: Float64[Tensor, " members"]
    loss_counts: Int64[Tensor, " members"]
    losses: Float64[Tensor, " losses"]
    deviations: Float16[Tensor, "members states bits"]
    seconds: Float64[Tensor, "cohorts phases"]

    def __len__(self) -> int:
        """The number of members."""
        return len(self.indices)

    @classmethod
    def of(cls, cohort: TrainedCohort, deviations: Float16[Tensor, "members states bits"]) -> Records:
        """Records of a cohort just trained."""
        statuses = cohort.statuses
        return cls(
            torch.tensor(cohort.indices),
            torch.tensor([status.converged for status in statuses]),
            torch.tensor([status.steps for status in statuses]),
            torch.tensor([status.relative_loss for status in statuses], dtype=torch.float64),
            torch.tensor([len(status.losses) for status in statuses]),
            torch.tensor([loss for status in statuses for loss in status.losses], dtype=torch.float64),
            deviations,
            torch.tensor([[cohort.seconds[phase] for phase in PHASES]], dtype=torch.float64),
        )

    @classmethod
    def none(cls, states: int, bits: int) -> Records:
        """No members."""
        whole, real = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        return cls(
            whole,
            torch.empty(0, dtype=torch.bool),
            whole,
            real,
            whole,
            real,
            torch.empty(0, states, bits, dtype=torch.float16),
            torch.empty(0, len(PHASES), dtype=torch.float64),
        )

    @classmethod
    def join(cls, parts: Iterable[Records]) -> Records:
        """Members of several records, in the order of their indices.

        Raises:
            ValueError: no records, or a member that is in two of them.
        """
        listed = list(parts)
        if not listed:
            raise ValueError("no records to join")
        columns = {name: torch.cat([getattr(part, name) for part in listed]) for name in cls.__dataclass_fields__}
        order = columns["indices"].argsort()
        indices = columns["indices"][order]
        if (twice := indices[1:][indices[1:] == indices[:-1]]).numel():
            raise ValueError(f"member {int(twice[0])} is there twice")
        losses = torch.split(columns["losses"], columns["loss_counts"].tolist())
        columns["losses"] = torch.cat([losses[i] for i in order.tolist()]) if len(order) else columns["losses"]
        for name in ("indices", "converged", "steps", "relative_loss", "loss_counts"):
            columns[name] = columns[name][order]
        if not torch.equal(order, torch.arange(len(order))):
            columns["deviations"] = columns["deviations"][order]
        return cls(**columns)


class MemberRecords(Metric):
    """Gathers the records of all processes; the statistics that follow from them are metrics of their own.

    Its states are the columns of `Records`, concatenated when processes are synchronised.

    Args:
        states: the number of evaluation states.
        bits: m.
    """

    full_state_update = False

    def __init__(self, states: int, bits: int) -> None:
        super().__init__()
        for name in Records.__dataclass_fields__:
            self.add_state(name, [], dist_reduce_fx="cat", persistent=True)
        self._none = Records.none(states, bits)
        self.reset()

    def reset(self) -> None:
        """Forget all members."""
        super().reset()
        # A process that trains nobody takes part in the exchange with columns of the same types and shapes.
        self.update(self._none)

    def update(self, records: Records) -> None:
        """Add members in any order, each once."""
        for name in Records.__dataclass_fields__:
            getattr(self, name).append(getattr(records, name).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """The columns of all processes, process after process."""
        return {name: dim_zero_cat(getattr(self, name)) for name in Records.__dataclass_fields__}

    def gathered(self) -> Records:
        """All members of all processes; every process has to ask."""
        columns = {
            # A metric's values lose the axes of a single element.
            name: column.cpu().reshape(-1, *getattr(self._none, name).shape[1:])
            for name, column in self.compute().items()
        }
        return Records.join([Records(**columns)])
