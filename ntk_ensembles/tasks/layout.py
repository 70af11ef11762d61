"""The named fields of a task's state, declared once; every bit position derives from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Bool
from torch import Tensor


class StateLayout:
    """Bit positions of a state of named fields, in the order of declaration.

    ``StateLayout(p=4, q=4)`` is a state of 8 bits; ``layout["p"][2]`` is the position of the bit
    worth 2² in field ``p``. Fields hold unsigned integers, least significant bit first.

    Raises:
        ValueError: a field narrower than one bit.
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

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={len(bits)}" for name, bits in self._fields.items())
        return f"StateLayout({fields})"

    def bit_name(self, position: int) -> str:
        """The name of one bit, for messages and figures: ``carry[3]``."""
        for name, bits in self._fields.items():
            if position in bits:
                return f"{name}[{position - bits.start}]"
        raise ValueError(f"bit {position} is outside the state's {self.bits} bits")

    def pack(self, values: Mapping[str, int]) -> Bool[Tensor, " bits"]:
        """The state in which each named field holds its integer; fields not named hold 0.

        Raises:
            ValueError: an unknown field, or a value that does not fit its field.
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
        """The integer in every field of one state; the inverse of `pack`."""
        digits = state.tolist()
        return {
            name: sum(1 << i for i, position in enumerate(bits) if digits[position])
            for name, bits in self._fields.items()
        }
