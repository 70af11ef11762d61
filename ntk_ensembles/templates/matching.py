"""Two fast ways to match templates: by lists of positions for a few states, on bit planes for many.

On bit planes a batch of states is an array of unsigned 64-bit integers, one row (plane) for each bit of the state. Bit
l of column w belongs to state 64w + l, its *lane*. `BitPlaneMatcher` compiles templates once into few operations on
many columns, and counts exactly what `TemplateSet.matches` and `TemplateSet.set_counts` count:

- conditions that begin alike share their conjunctions (a trie of literals, the most frequent first), and a level of the
  trie is one operation on all its rows;
- of templates that conflict, each with each, at most one matches, so such a *clique* adds its OR to a count: cliques
  are found once, from the conditions alone;
- carry-save adders turn the cliques' planes into binary digits of s and of every C_j.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer, UInt, UInt64
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.templates.bounds import clique_cover, conflict_masks
from ntk_ensembles.templates.templates import TemplateSet


class SparseMatcher:
    """Templates as lists of positions: counts like `TemplateSet`, fastest for a handful of states.

    Memory is k times the longest condition and the most bits that one template sets; no k × m matrix.

    Args:
        templates: Templates of the task.
    """

    def __init__(self, templates: TemplateSet) -> None:
        bits = templates.layout.bits
        # Literal 2m is always true.
        self._conditions = _padded(_literals(templates), 2 * bits).T
        # What a template sets beyond its last bit is bit m, which is dropped.
        self._sets = _padded([list(template.sets) for template in templates.templates], bits)

    def matches(self, states: Bool[NDArray[np.bool_], "states bits"]) -> Bool[NDArray[np.bool_], "states templates"]:
        """Return which templates match each state."""
        count, bits = states.shape
        literals = np.ones((count, 2 * bits + 1), np.bool_)
        literals[:, :bits] = states
        np.logical_not(states, out=literals[:, bits : 2 * bits])
        # A mode that cannot fail spares a second copy.
        holds = literals.take(self._conditions, axis=1, mode="clip")
        matches: NDArray[np.bool_] = np.logical_and.reduce(holds, axis=1)
        return matches

    def match_and_count(
        self, states: Bool[NDArray[np.bool_], "states bits"]
    ) -> tuple[Int[NDArray[np.int64], " states"], Int[NDArray[np.int64], "states bits"]]:
        """Count s and C_j of every state."""
        count, bits = states.shape
        state, template = np.nonzero(self.matches(states))
        cells = state[:, None] * (bits + 1) + self._sets[template]
        setting = np.bincount(cells.reshape(-1), minlength=count * (bits + 1)).reshape(count, bits + 1)
        return np.bincount(state, minlength=count), setting[:, :bits]


def _literals(templates: TemplateSet) -> list[list[int]]:
    """Return each template's conditions as literals: 0 … m − 1 are the bits, m … 2m − 1 their complements."""
    bits = templates.layout.bits
    return [[*template.ones, *(bits + bit for bit in template.zeros)] for template in templates.templates]


def _padded(rows: list[list[int]], filler: int) -> NDArray[np.intp]:
    width = max(map(len, rows))
    return np.array([[*row, *[filler] * (width - len(row))] for row in rows], np.intp)


LANES = 64
"""Number of states in a column."""

Planes: TypeAlias = NDArray[np.uint64]

_WORKING_SET_BYTES = 1 << 22
"""Memory that a micro-step should touch at most, so that it stays in a core's cache."""
_COLUMNS_MIN, _COLUMNS_MAX = 16, 1024


def pack(states: Bool[Tensor, "states bits"]) -> UInt64[Planes, "bits columns"]:
    """Return states as bit planes; lanes beyond the last state are zero."""
    digits = np.packbits(np.ascontiguousarray(states.numpy().T), axis=1, bitorder="little")
    planes = np.zeros((states.shape[1], columns_for(len(states)) * LANES // 8), np.uint8)
    planes[:, : digits.shape[1]] = digits
    return planes.view(np.uint64)


def unpack(planes: UInt64[Planes, "bits columns"], count: int) -> Bool[Tensor, "states bits"]:
    """Return the first ``count`` states of planes; the inverse of `pack`."""
    digits = np.unpackbits(planes.view(np.uint8), axis=1, count=count, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(digits.T).view(np.bool_))


def columns_for(states: int) -> int:
    """Return the number of columns that a number of states fill."""
    return -(-states // LANES)


def from_integers(values: Integer[NDArray[np.integer[Any]], " lanes"], digits: int) -> UInt64[Planes, "digits columns"]:
    """Return a plane for each of the lowest binary digits of integers, one a lane; they must fill whole columns."""
    planes = [np.packbits(values >> digit & 1, bitorder="little").view(np.uint64) for digit in range(digits)]
    return np.stack(planes)


def to_mask(planes: UInt64[Planes, " columns"]) -> Bool[NDArray[np.bool_], " lanes"]:
    """Return one plane as a boolean for each lane."""
    return np.unpackbits(planes.view(np.uint8), bitorder="little").view(np.bool_)


def to_integers(planes: UInt64[Planes, "digits columns"]) -> UInt[NDArray[np.unsignedinteger[Any]], " lanes"]:
    """Return the integer in every lane, the first plane its lowest digit; the inverse of `from_integers`.

    Returns:
        Integers of the smallest unsigned type that has a digit for each plane.

    Raises:
        ValueError: There are more than 64 planes.
    """
    octets = next((size for size in (1, 2, 4, 8) if len(planes) <= 8 * size), None)
    if octets is None:
        raise ValueError(f"{len(planes)} planes: expected at most 64")
    columns = planes.shape[1]
    padded = planes
    if len(planes) < 8 * octets:
        padded = np.zeros((8 * octets, columns), np.uint64)
        padded[: len(planes)] = planes
    # Eight octets, one from each plane, are an 8 × 8 matrix of bits; its transpose has one octet for each lane.
    octet_columns = padded.view(np.uint8).reshape(octets, 8, columns * 8).transpose(0, 2, 1)
    square = np.ascontiguousarray(octet_columns).view(np.uint64)
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swapped = square >> np.uint64(shift)
        swapped ^= square
        swapped &= np.uint64(mask)
        square ^= swapped
        swapped <<= np.uint64(shift)
        square ^= swapped
    lanes = square.view(np.uint8).reshape(octets, columns * LANES)
    return np.ascontiguousarray(lanes.T).view(f"<u{octets}")[:, 0]


@dataclass(frozen=True)
class BitGroup:
    """Bits of the state that are counted together.

    Attributes:
        bits: Positions of the bits.
        fan_in: Fan-in F_j of each.
        set_count_max: Bound on C_j: no state has a larger one at any of them.
    """

    bits: NDArray[np.intp]
    fan_in: int
    set_count_max: int


@dataclass(frozen=True)
class PlaneCounts:
    """Numbers of matching templates in a batch of states, in binary digits, the lowest first.

    Attributes:
        num_matches: Digits of s, a row each.
        set_counts: For each of `BitPlaneMatcher.groups` the digits of C_j, each with one row per bit of the group.
    """

    num_matches: UInt64[Planes, "digits columns"]
    set_counts: list[list[UInt64[Planes, "_bits columns"]]]

    @functools.cached_property
    def matches_in_lanes(self) -> NDArray[np.intp]:
        """The integer s in every lane, as an index; several look-ups share it."""
        return to_integers(self.num_matches).astype(np.intp)


class BitPlaneMatcher:
    """Templates as operations on bit planes, fastest for many states.

    Compiling takes time and memory in proportion to the number of literals in all conditions, and tests pairs of
    templates that set the same bit.

    Args:
        templates: Templates of the task.

    Attributes:
        groups: Bits of the state by fan-in and largest C_j; together all of them.
        num_matches_max: Bound on s: no state matches more templates.
        columns: Number of columns of planes that are best worked on at a time.
    """

    def __init__(self, templates: TemplateSet) -> None:
        self._bits, setters = templates.layout.bits, templates.setters
        # In s each template counts once: with those that have the same first bit.
        by_first_bit: dict[int, list[int]] = {}
        for index, template in enumerate(templates.templates):
            by_first_bit.setdefault(min(template.sets, default=-1), []).append(index)
        of_bit = [_cliques(templates, indices) for indices in setters]
        in_all = [
            clique
            for bit, indices in by_first_bit.items()
            for clique in (of_bit[bit] if bit >= 0 and indices == setters[bit] else _cliques(templates, indices))
        ]
        kinds: dict[tuple[int, int], list[int]] = {}
        for bit, cliques in enumerate(of_bit):
            kinds.setdefault((len(cliques), len(setters[bit])), []).append(bit)
        self.groups = tuple(
            BitGroup(np.array(bits), fan_in, set_count_max) for (set_count_max, fan_in), bits in sorted(kinds.items())
        )
        self.num_matches_max = len(in_all)

        unions = sorted({*in_all, *(clique for cliques in of_bit for clique in cliques)}, key=lambda c: (len(c), c))
        union_row = {clique: row for row, clique in enumerate(unions)}
        self._in_all = np.array([union_row[clique] for clique in in_all])
        self._in_groups = [
            np.array([[union_row[clique] for clique in of_bit[bit]] for bit in group.bits], np.intp)
            for group in self.groups
        ]
        self._levels, condition_row = _conjunctions(templates, [index for clique in unions for index in clique])
        # Cliques of one size are united together; a row a clique.
        self._unions = [
            np.array([[condition_row[index] for index in clique] for clique in unions if len(clique) == size])
            for size in sorted({len(clique) for clique in unions})
        ]
        self._rows = 2 * self._bits + sum(len(level) for level in self._levels)
        rows = self._rows + 2 * len(unions) + 4 * self._bits
        self.columns = min(max(_WORKING_SET_BYTES // (8 * rows), _COLUMNS_MIN), _COLUMNS_MAX)

    def match_and_count(self, planes: UInt64[Planes, "bits columns"]) -> PlaneCounts:
        """Count s and C_j of every state."""
        rows = np.empty((self._rows, planes.shape[1]), np.uint64)
        rows[: self._bits] = planes
        np.invert(planes, out=rows[self._bits : 2 * self._bits])
        start = 2 * self._bits
        for level in self._levels:
            stop = start + len(level)
            np.bitwise_and(_take(rows, level[:, 0]), _take(rows, level[:, 1]), out=rows[start:stop])
            start = stop
        unions = np.concatenate([_either(_take(rows, members)) for members in self._unions])
        num_matches = add(_take(unions, self._in_all[None]))
        set_counts = [add(_take(unions, members)) for members in self._in_groups]
        return PlaneCounts(np.concatenate(num_matches), set_counts)

    def union(self, counts: PlaneCounts) -> UInt64[Planes, "bits columns"]:
        """Return the template machine's next states: 1 where C_j > 0."""
        next_states = np.empty((self._bits, counts.num_matches.shape[1]), np.uint64)
        for group, digits in zip(self.groups, counts.set_counts, strict=True):
            next_states[group.bits] = above_zero(digits)
        return next_states


def above_zero(digits: list[UInt64[Planes, "rows columns"]]) -> UInt64[Planes, "rows columns"]:
    """Return where numbers given by their digits are above 0."""
    return functools.reduce(operator.or_, digits)


def equal(digits: list[UInt64[Planes, "rows columns"]], number: int) -> UInt64[Planes, "rows columns"]:
    """Return where numbers given by their digits equal ``number``."""
    literals = [digit if number >> place & 1 else ~digit for place, digit in enumerate(digits)]
    return functools.reduce(operator.and_, literals)


def add(planes: UInt64[Planes, "rows addends columns"]) -> list[UInt64[Planes, "rows columns"]]:
    """Add planes: return how many of a row's addends are 1 in each lane, in binary digits, the lowest first.

    Returns:
        As many digits as the number of addends has, at least one.
    """
    if not planes.shape[1]:
        return [np.zeros((planes.shape[0], planes.shape[2]), np.uint64)]
    digits = []
    while planes.shape[1]:
        carries = []
        while (count := planes.shape[1]) > 1:
            if count == 2:
                first, second = planes[:, :1], planes[:, 1:]
                carries.append(first & second)
                planes = first ^ second
                break
            third = count // 3
            first, second, last = (planes[:, i * third : (i + 1) * third] for i in range(3))
            odd = first ^ second
            carries.append(first & second | odd & last)
            odd ^= last
            planes = np.concatenate([odd, planes[:, 3 * third :]], axis=1) if count % 3 else odd
        digits.append(planes[:, 0])
        planes = np.concatenate(carries, axis=1) if carries else planes[:, :0]
    return digits


def _either(planes: UInt64[Planes, "rows members columns"]) -> UInt64[Planes, "rows columns"]:
    """Return the OR over members, by halves: few long operations cost less than many short ones."""
    while (count := planes.shape[1]) > 1:
        half = count // 2
        united = planes[:, :half] | planes[:, half : 2 * half]
        if count % 2:
            united[:, 0] |= planes[:, -1]
        planes = united
    return planes[:, 0]


def _take(rows: UInt64[Planes, "rows columns"], chosen: NDArray[np.intp]) -> Planes:
    """Return rows by an array of their indices, which gives the first axes of the result; a view where possible."""
    flat = chosen.reshape(-1)
    if len(flat) and flat[-1] - flat[0] == len(flat) - 1 and (flat[1:] > flat[:-1]).all():
        taken = rows[flat[0] : flat[-1] + 1]
    else:
        # A mode that cannot fail spares a second copy.
        taken = rows.take(flat, axis=0, mode="clip")
    return taken.reshape(*chosen.shape, rows.shape[1])


def _cliques(templates: TemplateSet, indices: Sequence[int]) -> list[tuple[int, ...]]:
    """Return templates in groups of which at most one matches any state."""
    cover = clique_cover(conflict_masks(templates, indices))
    return [tuple(indices[position] for position in clique) for clique in cover]


def _conjunctions(templates: TemplateSet, order: Sequence[int]) -> tuple[list[NDArray[np.intp]], list[int]]:
    """Return the rows that conditions are built from: first the literals, then each the AND of two earlier ones.

    Args:
        templates: Templates of the task.
        order: Templates in the order in which their rows will be read, which is the order of a level.

    Returns:
        Level by level the two operands of each row; and the row that says where each template matches.
    """
    conditions = _literals(templates)
    frequency = Counter(literal for condition in {frozenset(c) for c in conditions} for literal in condition)
    paths = [tuple(sorted(condition, key=lambda literal: (-frequency[literal], literal))) for condition in conditions]
    row_of: dict[tuple[int, ...], int] = {(literal,): literal for literal in range(2 * templates.layout.bits)}
    levels = []
    for size in range(2, max(map(len, paths)) + 1):
        ending = [paths[index] for index in order if len(paths[index]) == size]
        level = dict.fromkeys([*ending, *(path[:size] for path in paths if len(path) > size)])
        levels.append(np.array([(row_of[path[:-1]], path[-1]) for path in level]))
        for path in level:
            row_of[path] = len(row_of)
    return levels, [row_of[path] for path in paths]
