"""The network, and the weights of a cohort of members (DESIGN §2 and §4).

`TwoLayerMLP` is the definition. `Cohort` holds the weights of several members, with an axis of their
own, in blocks of hidden units: a block of one member fits a core's cache, and its input weights lie
transposed, so that adding up a few input columns reads contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Init = Literal["gaussian", "antisymmetric"]
"""``gaussian``: all weights i.i.d. N(0, 1), the paper's. ``antisymmetric``: the second half of the hidden
units repeats the first with its output weights negated, so that the network starts at exactly 0."""

INITS: tuple[Init, ...] = get_args(Init)

BLOCK_UNITS = 1024
"""Hidden units a block. Weights are drawn block by block, so another value means other members."""


class TwoLayerMLP(nn.Module):
    """f(x) = W2·relu(W1·x/√k)/√n: two layers, no biases, NTK parameterization (DESIGN §2).

    Args:
        templates: k, the inputs' dimension.
        bits: m, the outputs' dimension.
        width: n, the number of hidden units.

    Attributes:
        hidden: W1, shape (width, templates); unit-variance entries, the 1/√k is in `forward`.
        readout: W2, shape (bits, width); likewise, with 1/√n.
    """

    def __init__(self, templates: int, bits: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(width, templates))
        self.readout = nn.Parameter(torch.randn(bits, width))

    def forward(self, inputs: Float[Tensor, "inputs templates"]) -> Float[Tensor, "inputs bits"]:
        """The outputs for a batch of inputs."""
        width, templates = self.hidden.shape
        hidden = torch.relu(inputs @ self.hidden.T / math.sqrt(templates))
        return hidden @ self.readout.T / math.sqrt(width)


@dataclass(frozen=True, eq=False)
class Cohort:
    """The weights of several members at once, changed in place by training.

    Attributes:
        seed: the run's seed; with ``indices`` it determines the initial weights.
        indices: which members of the ensemble these are.
        init: how they were drawn.
        width: n, without the units that fill up the last block (all their weights are 0, and stay 0).
        hidden: W1 in blocks, each transposed: (members, blocks, templates, units).
        readout: W2 in blocks: (members, blocks, bits, units).
    """

    seed: int
    indices: tuple[int, ...]
    init: Init
    width: int
    hidden: Float[Tensor, "members blocks templates units"]
    readout: Float[Tensor, "members blocks bits units"]

    @classmethod
    def allocate(
        cls,
        seed: int,
        indices: Sequence[int],
        init: Init,
        *,
        width: int,
        templates: int,
        bits: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Cohort:
        """Room for members whose weights are still to be drawn.

        Raises:
            ValueError: an odd width with ``antisymmetric``, an unknown ``init``, or no units.
        """
        if init not in INITS:
            raise ValueError(f"--init {init}: expected one of {', '.join(INITS)}")
        if init == "antisymmetric" and width % 2:
            raise ValueError(f"--width {width}: antisymmetric initialisation needs an even width")
        blocks, units = block_shape(width)
        return cls(
            seed,
            tuple(indices),
            init,
            width,
            torch.empty((len(indices), blocks, templates, units), device=device, dtype=dtype),
            torch.empty((len(indices), blocks, bits, units), device=device, dtype=dtype),
        )

    def draw(self) -> Cohort:
        """Give every member its initial weights, a function of (seed, index) and the device's type alone."""
        for position in range(len(self.indices)):
            self.redraw(position)
        return self

    def redraw(self, position: int) -> None:
        """Set one member back to its initial weights."""
        generator = torch.Generator(self.hidden.device).manual_seed(member_seed(self.seed, self.indices[position]))
        hidden, readout = self.hidden[position], self.readout[position]
        if self.init == "gaussian":
            _draw_units(hidden, readout, range(self.width), generator)
        else:
            half = self.width // 2
            _draw_units(hidden, readout, range(half), generator)
            _mirror(hidden, half, 1)
            _mirror(readout, half, -1)

    def member(self, position: int) -> Cohort:
        """A cohort of one member, sharing its weights."""
        return self.part(slice(position, position + 1))

    def part(self, positions: slice) -> Cohort:
        """A cohort of some of the members, sharing their weights."""
        indices, hidden, readout = self.indices[positions], self.hidden[positions], self.readout[positions]
        return Cohort(self.seed, indices, self.init, self.width, hidden, readout)

    def state(self) -> dict[str, Tensor]:
        """Copies of the weights as `TwoLayerMLP` names them, each with the members' axis in front."""
        hidden = self.hidden.permute(0, 1, 3, 2).flatten(1, 2)
        readout = self.readout.permute(0, 2, 1, 3).flatten(2, 3)
        return {
            "hidden": hidden[:, : self.width].contiguous(),
            "readout": readout[:, :, : self.width].contiguous(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take weights back from `state`.

        Raises:
            ValueError: weights of other members, widths, templates or bits.
        """
        members, blocks, templates, units = self.hidden.shape
        bits = self.readout.shape[2]
        shapes = {"hidden": (members, self.width, templates), "readout": (members, bits, self.width)}
        for name, shape in shapes.items():
            if name not in state or tuple(state[name].shape) != shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"weights {name!r} have shape {found}; expected {shape}")
        room = blocks * units - self.width
        hidden = functional.pad(state["hidden"].to(self.hidden), (0, 0, 0, room))
        readout = functional.pad(state["readout"].to(self.readout), (0, room))
        self.hidden.copy_(hidden.view(members, blocks, units, templates).transpose(2, 3))
        self.readout.copy_(readout.view(members, bits, blocks, units).transpose(1, 2))


def block_shape(width: int) -> tuple[int, int]:
    """How many blocks ``width`` hidden units fill, and the units of a block.

    Raises:
        ValueError: no units.
    """
    if width < 1:
        raise ValueError(f"--width {width}: expected at least 1")
    units = min(width, BLOCK_UNITS)
    return -(-width // units), units


def member_seed(seed: int, index: int) -> int:
    """The generator seed of one member.

    A CPU generator uses 32 bits of its seed. For a fixed run seed this maps indices below 2³² to
    distinct values (each step can be undone), so no two members of an ensemble are alike.
    """
    value = index & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B):
        value = (value ^ value >> 16) * factor & 0xFFFFFFFF
        value ^= value >> 15
    return value ^ (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019 & 0xFFFFFFFFFFFFFFFF) >> 32


def _draw_units(hidden: Tensor, readout: Tensor, units: range, generator: torch.Generator) -> None:
    """Fill the first units with N(0, 1), a whole block after the other, and the rest with 0."""
    size = hidden.shape[-1]
    for block in range(hidden.shape[0]):
        used = min(max(len(units) - block * size, 0), size)
        for weights in (hidden[block], readout[block]):
            if used:
                weights.normal_(generator=generator)
            weights[:, used:] = 0


def _mirror(weights: Tensor, half: int, sign: int) -> None:
    """Copy units 0…half−1 of one member to half…2·half−1, times ``sign``."""
    flat = weights.permute(0, 2, 1).reshape(-1, weights.shape[1]).clone()
    flat[half : 2 * half] = sign * flat[:half]
    weights.copy_(flat.view(weights.shape[0], weights.shape[2], weights.shape[1]).permute(0, 2, 1))
