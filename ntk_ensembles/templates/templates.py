"""States, templates, and the template machine that they define (docs/theory.md, section 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class StateLayout:
    """Bit positions of a state of named fields, in the order of declaration.

    ``StateLayout(p=4, q=4)`` is a state of 8 bits; ``layout["p"][2]`` is the position of the bit worth 2² in field
    ``p``. Fields hold unsigned integers, least significant bit first.

    Args:
        widths: Number of bits of each field, at least 1.

    Attributes:
        bits: Number of bits m of a state.

    Raises:
        ValueError: A field is narrower than one bit.
    """

    def __init__(self, **widths: int) -> None:
        self._fields: dict[str, range] = {}
        start = 0
        for name, width in widths.items():
            if width < 1:
                raise ValueError(f"field {name!r} has {width} bits; a field needs at least 1")
            self._fields[name] = range(start, start + width)
            start += width
        self.bits = start

    def __getitem__(self, name: str) -> range:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={len(bits)}" for name, bits in self._fields.items())
        return f"StateLayout({fields})"

    def bit_name(self, position: int) -> str:
        """Return the name of one bit for messages and figures, such as ``carry[3]``."""
        for name, bits in self._fields.items():
            if position in bits:
                return f"{name}[{position - bits.start}]"
        raise ValueError(f"bit {position} is outside the state's {self.bits} bits")

    def pack(self, values: Mapping[str, int]) -> Bool[Tensor, " bits"]:
        """Return the state whose named fields hold these integers; fields that are not named hold 0.

        Raises:
            ValueError: A field is unknown, or a value does not fit its field.
        """
        state = torch.zeros(self.bits, dtype=torch.bool)
        for name, value in values.items():
            if name not in self._fields:
                raise ValueError(f"no field {name!r}; the fields are {', '.join(self._fields)}")
            bits = self._fields[name]
            if not 0 <= value < 1 << len(bits):
                raise ValueError(f"{name}={value} does not fit {len(bits)} bits (0 to {(1 << len(bits)) - 1})")
            state[bits.start : bits.stop] = torch.tensor([value >> i & 1 for i in range(len(bits))], dtype=torch.bool)
        return state

    def unpack(self, state: Bool[Tensor, " bits"]) -> dict[str, int]:
        """Return the integer in every field of one state; the inverse of `pack`."""
        digits = state.tolist()
        return {
            name: sum(1 << i for i, position in enumerate(bits) if digits[position])
            for name, bits in self._fields.items()
        }


@dataclass(frozen=True)
class Template:
    """One row of the training set: if the bits in ``ones`` are 1 and those in ``zeros`` are 0, set those in ``sets``.

    Attributes:
        ones: Positions of the bits that must be 1.
        zeros: Positions of the bits that must be 0.
        sets: Positions of the bits that are 1 in the output.
        group: Name of the block of templates that this one belongs to, for messages ("keep memory").
    """

    ones: frozenset[int]
    zeros: frozenset[int]
    sets: frozenset[int]
    group: str

    @classmethod
    def rule(cls, group: str, *, ones: Iterable[int] = (), zeros: Iterable[int] = (), sets: Iterable[int]) -> Template:
        """Make a template from any iterables of bit positions."""
        return cls(frozenset(ones), frozenset(zeros), frozenset(sets), group)

    def matches(self, state: Bool[Tensor, " bits"]) -> bool:
        """Check whether one state meets all conditions."""
        return all(state[bit] for bit in self.ones) and not any(state[bit] for bit in self.zeros)


class TemplateSet:
    """The k templates of a task: the training set (X = I_k, Y = `labels`) and the template machine.

    The template machine maps a state to the union of the outputs of all templates that match it.

    Args:
        layout: Fields of the state, m bits.
        templates: Templates in training-set order, at least one.

    Attributes:
        layout: Fields of the state.
        templates: Templates in training-set order.
        setters: For each bit the indices of the templates that set it, in ascending order.
        fan_in: F_j, the number of templates that set bit j.

    Raises:
        ValueError: There is no template, a template has no condition on a 1-bit (it would match the zero state, whose
            next state must be zero), requires a bit to be both 1 and 0, or names a position outside the layout.
    """

    def __init__(self, layout: StateLayout, templates: Iterable[Template]) -> None:
        self.layout = layout
        self.templates = tuple(templates)
        self._check()
        self.setters: list[list[int]] = [[] for _ in range(layout.bits)]
        for index, template in enumerate(self.templates):
            for bit in template.sets:
                self.setters[bit].append(index)
        self.fan_in: Int[Tensor, " bits"] = torch.tensor([len(setters) for setters in self.setters], dtype=torch.int64)

    @cached_property
    def labels(self) -> Bool[Tensor, "templates bits"]:
        """Output bits Y of each template; made at the first use, because large machines run without them."""
        labels = torch.zeros(len(self.templates), self.layout.bits, dtype=torch.bool)
        for row, template in enumerate(self.templates):
            labels[row, list(template.sets)] = True
        return labels

    @cached_property
    def _labels_float(self) -> Float[Tensor, "templates bits"]:
        return self.labels.to(torch.float32)

    @cached_property
    def conditions(self) -> Float[Tensor, "templates bits"]:
        """Value 1 on bits that must be 1, −1 on bits that must be 0, and 0 elsewhere.

        The product with a state reaches the number of required ones exactly where all conditions hold.
        """
        conditions = torch.zeros(len(self.templates), self.layout.bits, dtype=torch.float32)
        for row, template in enumerate(self.templates):
            conditions[row, list(template.ones)] = 1
            conditions[row, list(template.zeros)] = -1
        return conditions

    @cached_property
    def _required(self) -> Float[Tensor, " templates"]:
        return torch.tensor([len(template.ones) for template in self.templates], dtype=torch.float32)

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
        """Return the number of templates k."""
        return len(self.templates)

    def matches(self, states: Bool[Tensor, "states bits"]) -> Bool[Tensor, "states templates"]:
        """Return which templates match each state. Exact: sums of at most m ones in float32."""
        return states.to(torch.float32) @ self.conditions.T == self._required

    def set_counts(self, matches: Bool[Tensor, "states templates"]) -> Int[Tensor, "states bits"]:
        """Return C_j, the number of matching templates that set bit j."""
        return (matches.to(torch.float32) @ self._labels_float).to(torch.int64)

    def encode(self, matches: Bool[Tensor, "states templates"]) -> Float[Tensor, "states templates"]:
        """Return the network's inputs (docs/theory.md, equation (3)), float64: the matches divided by √s, or zero."""
        hot = matches.to(torch.float64)
        return hot / hot.sum(1, keepdim=True).clamp_min(1).sqrt()

    def micro_step(self, states: Bool[Tensor, "states bits"]) -> Bool[Tensor, "states bits"]:
        """Return the next states: the union of the outputs of all matching templates."""
        return self.set_counts(self.matches(states)) > 0
