"""Groups of consecutive members: exact sums of their deviations, and what their means decode.

A group of N members is *aligned* if its first index is a multiple of N. Aligned groups of 2, 4, 8, … members nest, so
sums over the smaller ones give those over the larger ones, and nothing else has to be kept of a member for every
statistic of N = 1, 2, 4, …. Members may come in any order, from any process, machine or session.

Deviations are rounded to float16, whose numbers are all whole multiples of 2⁻²⁴. In this unit their sums are integers,
which int64 holds exactly for up to 2²³ members. So no number depends on the order in which members were added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from jaxtyping import Bool, Float, Float16, Float64, Int64
from torch import Tensor

from ntk_ensembles.ensemble.network import cpu_workers, map_members
from ntk_ensembles.theory import DECODERS, LimitPrediction, decode

_UNIT = 2.0**-24
"""Smallest positive float16, of which all others are multiples."""

_NUMBERS_AT_ONCE = 1 << 18
"""Outputs of ensembles that a thread decodes together: few enough for a core's cache."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What the mean outputs of groups decode, a row for each group; columns of decoders are in the order of `DECODERS`.

    Attributes:
        states_right: Evaluation states of which every bit is decoded right.
        bits_right: Bits of evaluation states that are decoded right.
        executions_right: Complete executions of which every state is decoded right.
        mean_square: Mean square of the group's mean deviation.
    """

    states_right: Int64[Tensor, "groups decoders"]
    bits_right: Int64[Tensor, "groups decoders"]
    executions_right: Int64[Tensor, "groups decoders"]
    mean_square: Float64[Tensor, " groups"]

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.mean_square)

    def __getitem__(self, rows: slice | Bool[Tensor, " groups"]) -> Outcomes:
        """Return those of some groups."""
        return Outcomes(*(getattr(self, name)[rows] for name in OUTCOMES))

    @classmethod
    def empty(cls, groups: int = 0) -> Outcomes:
        """Return rows of zeros.

        Args:
            groups: Number of rows.
        """
        states, bits, executions = torch.zeros(3, groups, len(DECODERS), dtype=torch.int64)
        return cls(states, bits, executions, torch.zeros(groups, dtype=torch.float64))

    @classmethod
    def concatenate(cls, parts: Iterable[Outcomes]) -> Outcomes:
        """Return the rows of several parts, one after the other."""
        listed = [cls.empty(), *parts]
        return cls(*(torch.cat([getattr(part, name) for part in listed]) for name in OUTCOMES))


OUTCOMES = tuple(column.name for column in fields(Outcomes))
"""Names of the columns of `Outcomes`."""


class Measure:
    """Decodes mean outputs of groups on evaluation states.

    Args:
        limit: The evaluation states and what infinite width predicts of them.

    Attributes:
        limit: The same.
    """

    def __init__(self, limit: LimitPrediction) -> None:
        self.limit = limit
        # Which execution each of their states belongs to; one is right if no state of it is wrong.
        trajectories = limit.evaluation.trajectories
        self._steps = torch.cat([torch.empty(0, dtype=torch.int64), *trajectories])
        self._owner = torch.repeat_interleave(torch.tensor([len(states) for states in trajectories], dtype=torch.int64))
        self._executions = len(trajectories)

    def __call__(self, sums: Int64[Tensor, "groups states bits"], members: int) -> Outcomes:
        """Return what the means of groups decode.

        Args:
            sums: Exact sums of their members' deviations, from `exact`.
            members: Members of each group.
        """
        together = max(_NUMBERS_AT_ONCE // self.limit.mean.numel(), 1)
        # One thread each, as a sum of floats would otherwise depend on the number of cores.
        parts = map_members(partial(self.alone, members=members), torch.split(sums, together), _CPU)
        return Outcomes.concatenate(parts)

    def alone(self, sums: Int64[Tensor, "groups states bits"], members: int) -> Outcomes:
        """Return the same, in the thread that calls; those of `map_members` call it."""
        evaluation = self.limit.evaluation
        means = mean_of(sums, members)
        found = Outcomes.empty(len(sums))
        for row, mean in enumerate(means):
            found.mean_square[row] = mean.square().mean()
        means += self.limit.mean
        for column, decoder in enumerate(DECODERS):
            right = decode(means, self.limit.thresholds[decoder]) == evaluation.next_states
            right_states = right.all(2)
            found.bits_right[:, column] = right.sum((1, 2))
            found.states_right[:, column] = right_states.sum(1)
            wrong = torch.zeros(len(sums), self._executions, dtype=torch.int32)
            wrong.index_add_(1, self._owner, (~right_states[:, self._steps]).to(torch.int32))
            found.executions_right[:, column] = (wrong == 0).sum(1)
        return found


def rounded_deviations(
    outputs: Float[Tensor, "members states bits"], mean: Float64[Tensor, "states bits"]
) -> Float16[Tensor, "members states bits"]:
    """Return outputs minus the NTK mean, as they are kept.

    Args:
        outputs: Outputs of members, any device.
        mean: NTK mean at the same states.
    """
    deviations = torch.empty(outputs.shape, dtype=torch.float16)
    # One at a time: the differences are float64.
    for deviation, output in zip(deviations, outputs.cpu(), strict=True):
        deviation.copy_(output - mean)
    return deviations


def exact(deviations: Float[Tensor, "members states bits"]) -> Int64[Tensor, "members states bits"]:
    """Return deviations, rounded to float16, in the unit in which sums are exact.

    Args:
        deviations: Deviations, any float dtype, all of them finite.
    """
    # float32 holds the products, of 11 significant bits and at most 2⁴⁰.
    return (deviations.to(torch.float16).to(torch.float32) / _UNIT).to(torch.int64)


def mean_of(sums: Int64[Tensor, "*groups states bits"], members: int) -> Float64[Tensor, "*groups states bits"]:
    """Return mean deviations of groups.

    Args:
        sums: Exact sums of their members' deviations, from `exact`.
        members: Members of each group.
    """
    return sums.to(torch.float64).mul_(_UNIT).div_(members)


@dataclass(frozen=True, eq=False)
class Block:
    """An aligned group of 2^j members with all that statistics need of it.

    Attributes:
        first: Index of its first member, a multiple of their number.
        converged: Whether each of its members has converged.
        sums: Exact sum of the deviations of those that have.
        outcomes: What the aligned groups in it decode: all groups of 1, then of 2, of 4, …, the block itself last. A
            group with a member that did not converge has zeros, and is never counted.
    """

    first: int
    converged: Bool[Tensor, " members"]
    sums: Int64[Tensor, "states bits"]
    outcomes: Outcomes

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self.converged)

    def of_size(self, members: int) -> Outcomes:
        """Return the outcomes of the groups of a size all of whose members have converged.

        Args:
            members: Size of the groups, a power of two up to that of the block.
        """
        return _level(self, members)[self.converged.view(-1, members).all(1)]


def aligned_blocks(indices: Sequence[int], members_max: int) -> list[list[int]]:
    """Return indices split into the largest aligned groups of 2^j members that all of them fill.

    Args:
        indices: Indices of members, ascending.
        members_max: Largest size of a group, at least 1.
    """
    found, start = [], 0
    while start < len(indices):
        size, first = 1, indices[start]
        while (
            2 * size <= members_max
            and first % (2 * size) == 0
            and start + 2 * size <= len(indices)
            and indices[start + 2 * size - 1] == first + 2 * size - 1
        ):
            size *= 2
        found.append(list(indices[start : start + size]))
        start += size
    return found


def blocks_of(
    measure: Measure,
    indices: Int64[Tensor, " members"],
    converged: Bool[Tensor, " members"],
    deviations: Float16[Tensor, "members states bits"],
) -> list[Block]:
    """Return members as blocks, the largest that they fill.

    Args:
        measure: What decodes the means of groups.
        indices: Indices of the members, ascending.
        converged: Whether each has converged.
        deviations: Their outputs minus the NTK mean.
    """
    rows = {index: row for row, index in enumerate(indices.tolist())}
    # Several for each core, so that none waits for long.
    parts = aligned_blocks(list(rows), max(len(rows) // (4 * cpu_workers()), 1))

    def work(part: list[int]) -> Block:
        chosen = slice(rows[part[0]], rows[part[-1]] + 1)
        return _block(measure, part[0], converged[chosen], deviations[chosen])

    return joined(measure, map_members(work, parts, _CPU))


def joined(measure: Measure, blocks: Iterable[Block]) -> list[Block]:
    """Return blocks with neighbours joined as far as they fill larger ones, by ascending indices.

    Args:
        measure: What decodes the means of groups.
        blocks: Blocks without a member in common.
    """

    def join_all(blocks: Iterable[Block]) -> list[Block]:
        found: list[Block] = []
        for block in sorted(blocks, key=lambda block: block.first):
            found.append(block)
            while len(found) > 1 and sibling_of(found[-1].first, len(found[-1])) == (found[-2].first, len(found[-2])):
                right, left = found.pop(), found.pop()
                found.append(_join(measure, left, right))
        return found

    return map_members(join_all, [blocks], _CPU)[0]


def sibling_of(first: int, members: int) -> tuple[int, int]:
    """Return first member and size of the aligned group that makes up a twice as large one together with another.

    Args:
        first: First member of that other.
        members: Its size, a power of two.
    """
    return first ^ members, members


def groups_by_size(blocks: Sequence[Block]) -> Iterator[tuple[int, Outcomes]]:
    """Yield 1, 2, 4, …, and the outcomes of all groups of as many members in blocks, as long as there are any.

    Args:
        blocks: Blocks, as from `joined`.
    """
    size = 1
    while any(size <= len(block) for block in blocks):
        outcomes = Outcomes.concatenate(block.of_size(size) for block in blocks if size <= len(block))
        if len(outcomes):
            yield size, outcomes
        size *= 2


def _block(measure: Measure, first: int, converged: Tensor, deviations: Tensor) -> Block:
    """Return members as a block, in the thread that calls."""
    size = len(converged)
    if size > 1 and deviations.numel() > _NUMBERS_AT_ONCE:
        # In halves that fit a core's cache, or are single members.
        half = size // 2
        left = _block(measure, first, converged[:half], deviations[:half])
        return _join(measure, left, _block(measure, first + half, converged[half:], deviations[half:]))
    # Those of a member that did not converge may be no numbers.
    sums, whole = exact(deviations.masked_fill(~converged[:, None, None], 0)), converged
    levels, members = [], 1
    while True:
        outcomes = measure.alone(sums, members)
        for name in OUTCOMES:
            getattr(outcomes, name)[~whole] = 0
        levels.append(outcomes)
        if len(sums) == 1:
            return Block(first, converged, sums[0], Outcomes.concatenate(levels))
        sums, whole, members = sums[::2] + sums[1::2], whole.view(-1, 2).all(1), 2 * members


def _join(measure: Measure, left: Block, right: Block) -> Block:
    converged, sums = torch.cat([left.converged, right.converged]), left.sums + right.sums
    levels, size = [], 1
    while size <= len(left):
        levels += [_level(left, size), _level(right, size)]
        size *= 2
    levels.append(measure.alone(sums[None], size) if bool(converged.all()) else Outcomes.empty(1))
    return Block(left.first, converged, sums, Outcomes.concatenate(levels))


def _level(block: Block, size: int) -> Outcomes:
    # Before the groups of this size come all smaller ones, twice as many for each halving.
    start = 2 * len(block) - 2 * len(block) // size
    return block.outcomes[start : start + len(block) // size]
