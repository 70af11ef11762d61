"""What a validation has seen of one decoder, and how a failure is told."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.tasks.planes import PlaneCounts
from ntk_ensembles.tasks.templates import TemplateSet
from ntk_ensembles.theory import TIE
from ntk_ensembles.theory.execution import NTKExecutor


@dataclass(frozen=True)
class Tally:
    """Counts over executions; a tally and a later one add up.

    Attributes:
        failures: executions with a decoded bit that is not the OR-machine's, or with a wrong result.
        first_failure: what went wrong where, in the first of them.
        smallest_one: the smallest margin of a bit that the OR-machine sets; ∞ if it never sets one.
        smallest_zero: the smallest margin of a bit that it does not set.
        ties: states, repeated or not, with a margin of `TIE` or less: right in the limit only.
    """

    failures: int = 0
    first_failure: str | None = None
    smallest_one: float = math.inf
    smallest_zero: float = math.inf
    ties: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.failures + other.failures,
            self.first_failure or other.first_failure,
            min(self.smallest_one, other.smallest_one),
            min(self.smallest_zero, other.smallest_zero),
            self.ties + other.ties,
        )

    def with_margins(
        self, executor: NTKExecutor, counts: PlaneCounts, lanes: Bool[NDArray[np.bool_], " lanes"]
    ) -> Tally:
        """This and the margins of a micro-step in some lanes."""
        ones, zeros = (executor.plane_margins(counts, ones=kind)[lanes] for kind in (True, False))
        return replace(
            self,
            smallest_one=min(self.smallest_one, float(ones.min(initial=math.inf))),
            smallest_zero=min(self.smallest_zero, float(zeros.min(initial=math.inf))),
            ties=self.ties + int(np.count_nonzero(np.abs(np.minimum(ones, zeros)) <= TIE)),
        )


def wrong_bit(
    executor: NTKExecutor, templates: TemplateSet, start: Bool[Tensor, " bits"], micro_steps: int
) -> str | None:
    """Where the closed loop from a state first leaves the OR-machine; None if it does not."""
    state = start[None]
    for number in range(1, micro_steps + 1):
        decoded, expected = executor.step(state).next_states, templates.micro_step(state)
        if (wrong := (decoded != expected)[0].nonzero()).numel():
            bit = int(wrong[0])
            return (
                f"micro-step {number}: bit {templates.layout.bit_name(bit)} is decoded {int(decoded[0, bit])}, "
                f"should be {int(expected[0, bit])}"
            )
        state = decoded
    return None
