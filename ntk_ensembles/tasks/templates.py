"""Templates and the OR-machine that they define (DESIGN §1; paper, section 3)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ntk_ensembles.tasks.layout import StateLayout


@dataclass(frozen=True)
class Template:
    """One rule: if the bits in ``ones`` are 1 and those in ``zeros`` are 0, set those in ``sets``.

    The members are bit positions of the task's layout. ``group`` names the block of rules that the
    template belongs to, for messages ("preserve memory").
    """

    ones: frozenset[int]
    zeros: frozenset[int]
    sets: frozenset[int]
    group: str

    @classmethod
    def rule(cls, group: str, *, ones: Iterable[int] = (), zeros: Iterable[int] = (), sets: Iterable[int]) -> Template:
        """A template from any iterables of bit positions."""
        return cls(frozenset(ones), frozenset(zeros), frozenset(sets), group)


class TemplateSet:
    """The k templates of a task: the training set (X = I_k, Y = labels) and the OR-machine.

    Attributes:
        layout: the fields of the state (m bits).
        templates: the rules, in training-set order.
        fan_in: F_j, how many templates set bit j.

    Raises:
        ValueError: no templates, a template without a condition on a 1-bit (it would match the
            zero state, whose next state must be zero), a bit required to be both 1 and 0, or a
            position outside the layout.
    """

    def __init__(self, layout: StateLayout, templates: Iterable[Template]) -> None:
        self.layout = layout
        self.templates = tuple(templates)
        self._check()
        written = torch.tensor([bit for template in self.templates for bit in template.sets], dtype=torch.int64)
        self.fan_in: Int[Tensor, " bits"] = torch.bincount(written, minlength=layout.bits)

    @cached_property
    def labels(self) -> Bool[Tensor, "templates bits"]:
        """Y, the output bits of each template; made when first asked for, as large machines run without it."""
        labels = torch.zeros(len(self.templates), self.layout.bits, dtype=torch.bool)
        for row, template in enumerate(self.templates):
            labels[row, list(template.sets)] = True
        return labels

    @cached_property
    def _labels_float(self) -> Float[Tensor, "templates bits"]:
        return self.labels.to(torch.float32)

    @cached_property
    def _conditions(self) -> Float[Tensor, "templates bits"]:
        """+1 on bits that must be 1, -1 on bits that must be 0.

        The product with a state reaches the number of required ones exactly where all conditions hold.
        """
        conditions = torch.zeros(len(self.templates), self.layout.bits)
        for row, template in enumerate(self.templates):
            conditions[row, list(template.ones)] = 1
            conditions[row, list(template.zeros)] = -1
        return conditions

    @cached_property
    def _required(self) -> Float[Tensor, " templates"]:
        return torch.tensor([float(len(template.ones)) for template in self.templates])

    def _check(self) -> None:
        if not self.templates:
            raise ValueError("a task needs at least one template")
        for template in self.templates:
            where = f"a template of group {template.group!r}"
            if not template.ones:
                raise ValueError(f"{where} requires no 1-bit; it would match the zero state")
            if both := template.ones & template.zeros:
                raise ValueError(f"{where} requires bits {sorted(both)} to be both 1 and 0")
            outside = [b for b in template.ones | template.zeros | template.sets if not 0 <= b < self.layout.bits]
            if outside:
                raise ValueError(f"{where} names bits {sorted(outside)} outside the state's {self.layout.bits} bits")

    def __len__(self) -> int:
        """k, the number of templates."""
        return len(self.templates)

    def matches(self, states: Bool[Tensor, "states bits"]) -> Bool[Tensor, "states templates"]:
        """Which templates match each state. Exact: sums of at most m ones in float32."""
        return states.to(torch.float32) @ self._conditions.T == self._required

    def counts(self, matches: Bool[Tensor, "states templates"]) -> Int[Tensor, "states bits"]:
        """C_j: how many of the matched templates set bit j."""
        return (matches.to(torch.float32) @ self._labels_float).to(torch.int64)

    def encode(self, matches: Bool[Tensor, "states templates"]) -> Float[Tensor, "states templates"]:
        """The network's input: the multi-hot matches divided by √s; zero where nothing matches."""
        hot = matches.to(torch.float64)
        return hot / hot.sum(1, keepdim=True).clamp_min(1).sqrt()

    def micro_step(self, states: Bool[Tensor, "states bits"]) -> Bool[Tensor, "states bits"]:
        """The next state: the union of the outputs of all matching templates."""
        return self.counts(self.matches(states)) > 0
