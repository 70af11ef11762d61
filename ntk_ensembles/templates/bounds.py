"""Exact bounds on how many templates match a state at once, by integer programming (docs/theory.md, section 9).

Two templates *conflict* if one wants a bit 1 and the other wants it 0; a set of templates matches some state together
if and only if no two of them conflict. The largest such set is found by HiGHS (`scipy.optimize.milp`), whose relaxation
becomes tight once a cover of the conflict graph by cliques is stated: of a clique at most one template matches.

The states are all 2^m, or those that trajectories can reach: `exclusive_bits` proves by induction which bits are never
1 together (one phase at a time, one selected cell).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy  # imports its parts when they are first used: only certificates wait for them
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.templates.templates import TemplateSet

SECONDS_MAX = 60.0
"""Time limit of one search; it ends with the bound that is proven by then."""

_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2


@dataclass(frozen=True)
class Bound:
    """The largest, or the smallest, number of templates that match one state.

    Attributes:
        bound: Number that no state exceeds (undercuts).
        attained: Number of templates that match ``state``; ``bound`` itself unless the search ran out of time.
        state: State that shows it.
    """

    bound: int
    attained: int
    state: Bool[Tensor, " bits"]


class MatchBounds:
    """Bounds on s, the number of matching templates, over all states or those with a given C_j.

    Args:
        templates: Templates of the task.
        exclusive: Which pairs of bits i, j are never both 1 (i = j: which bits are never 1) in the states considered,
            as from `exclusive_bits`; by default all states are considered.
        seconds_max: Time limit for one search, in seconds.
    """

    def __init__(
        self,
        templates: TemplateSet,
        exclusive: Bool[Tensor, "bits bits"] | None = None,
        seconds_max: float = SECONDS_MAX,
    ) -> None:
        self._templates = templates
        self._exclusive = None if exclusive is None else exclusive.numpy()
        self._seconds_max = seconds_max
        self._size, self._bits = len(templates), templates.layout.bits
        self._literals = [(sorted(template.ones), sorted(template.zeros)) for template in templates.templates]
        self._others: dict[int, int] = {}
        self._found: dict[tuple[str, int | None, int | None], Bound | None] = {}

    @cached_property
    def _cliques(self) -> list[list[int]]:
        return self._cover(range(self._size))

    def _cover(self, indices: Sequence[int]) -> list[list[int]]:
        return _smaller_cover(conflict_masks(self._templates, indices, self._exclusive))

    def max_matches_estimate(self, bit: int, set_count: int) -> int:
        """Return a quick upper bound on ``max_matches(bit, set_count)``.

        Of the templates that do not set the bit, at most one of each clique matches.
        """
        if bit not in self._others:
            others = sorted(set(range(self._size)) - set(self._templates.setters[bit]))
            self._others[bit] = len(self._cover(others))
        return set_count + self._others[bit]

    @property
    def most(self) -> Bound:
        """Largest number of templates that match one state; the zero state, at least, is among those considered."""
        found = self.max_matches()
        assert found is not None
        return found

    def max_matches(self, bit: int | None = None, set_count: int | None = None) -> Bound | None:
        """Return the largest number of templates that one state matches.

        Args:
            bit: Bit to consider; only states where exactly ``set_count`` matching templates set it.
            set_count: C_j of this bit.

        Returns:
            None if there is no such state.

        Raises:
            RuntimeError: The solver found no state within the time limit.
        """
        return self._remembered(self._max, bit, set_count)

    def min_matches(self, bit: int | None = None, set_count: int | None = None) -> Bound | None:
        """Return the smallest number of templates, but at least one, that one state matches; else as `max_matches`."""
        return self._remembered(self._min, bit, set_count)

    def _remembered(
        self, search: Callable[[int | None, int | None], Bound | None], bit: int | None, set_count: int | None
    ) -> Bound | None:
        key = (search.__name__, bit, set_count)
        if key not in self._found:
            self._found[key] = search(bit, set_count)
        return self._found[key]

    def _max(self, bit: int | None, set_count: int | None) -> Bound | None:
        rows, setters = self._conditions(bit, set_count)
        # Elsewhere more matches are better, so that a template whose conditions hold counts by itself.
        self._count_all(rows, setters)
        found = self._solve(rows, -1)
        if found.status == _INFEASIBLE:
            return None
        bound = self._bound(found)
        if found.status == _OPTIMAL:
            return bound
        return Bound(math.floor(-found.mip_dual_bound + 1e-6), bound.attained, bound.state)

    def _min(self, bit: int | None, set_count: int | None) -> Bound | None:
        # Asked whether a state with at most 1, 2, … exists, HiGHS propagates the limit into every condition; to
        # minimise, it would have to branch over most of the state.
        rows, _ = self._conditions(bit, set_count)
        self._count_all(rows, range(self._size))
        at_least = max(1, set_count or 0)
        rows.add(dict.fromkeys(range(self._size), 1), at_least, self._size)
        some = self._solve(rows, 0)
        if some.status == _INFEASIBLE:
            return None
        bound = self._bound(some)
        for limit in range(at_least, bound.attained):
            rows.limit_last(limit)
            found = self._solve(rows, 0)
            if found.status == _OPTIMAL:
                return self._bound(found)
            if found.status != _INFEASIBLE:
                return Bound(limit, bound.attained, bound.state)
        return bound

    def _conditions(self, bit: int | None, set_count: int | None) -> tuple[_Rows, list[int]]:
        """Return the rows of docs/theory.md, equation (33), one for C_j, and the templates that set ``bit``."""
        rows = _Rows(self._size + self._bits)
        for template, (ones, zeros) in enumerate(self._literals):
            for position in ones:
                rows.add({template: 1, self._size + position: -1}, -np.inf, 0)
            for position in zeros:
                rows.add({template: 1, self._size + position: 1}, -np.inf, 1)
        for clique in self._cliques:
            if len(clique) > 1:
                rows.add(dict.fromkeys(clique, 1), -np.inf, 1)
        if self._exclusive is not None:
            for i, j in np.argwhere(np.triu(self._exclusive)).tolist():
                rows.add({self._size + i: 1, self._size + j: 1}, -np.inf, int(i != j))
        if bit is None or set_count is None:
            return rows, []
        setters = self._templates.setters[bit]
        rows.add(dict.fromkeys(setters, 1), set_count, set_count)
        return rows, setters

    def _count_all(self, rows: _Rows, templates: Iterable[int]) -> None:
        """Let these templates count wherever their conditions hold."""
        for template in templates:
            ones, zeros = self._literals[template]
            row = {template: 1, **{self._size + position: -1 for position in ones}}
            rows.add({**row, **{self._size + position: 1 for position in zeros}}, 1 - len(ones), np.inf)

    def _solve(self, rows: _Rows, weight: int) -> scipy.optimize.OptimizeResult:
        """Minimise ``weight`` times the number of matching templates."""
        counted = np.concatenate([np.ones(self._size), np.zeros(self._bits)])
        # At times HiGHS ends with a "solve error" (status 4) where presolve meets an infeasible question; without
        # presolve it answers the same question. HiGHS 1.12 then writes a line to the standard output that no option
        # silences (https://github.com/ERGO-Code/HiGHS/issues/2783).
        for presolve in (True, False):
            found = scipy.optimize.milp(
                weight * counted,
                constraints=rows.constraint(),
                # With the state's bits whole, the matches are.
                integrality=1 - counted,
                bounds=scipy.optimize.Bounds(0, 1),
                options={"time_limit": self._seconds_max, "presolve": presolve},
            )
            if found.status in (_OPTIMAL, _LIMIT, _INFEASIBLE):
                break
        return found

    def _bound(self, found: scipy.optimize.OptimizeResult) -> Bound:
        """Return the state found, taken to attain the bound."""
        if found.status not in (_OPTIMAL, _LIMIT) or found.x is None:
            raise RuntimeError(f"the solver found no state: {found.message} (limit: {self._seconds_max:.0f} s)")
        state = torch.from_numpy(found.x[self._size :] > 0.5)
        attained = int(self._templates.matches(state[None]).sum())
        return Bound(attained, attained, state)


def conflict_masks(
    templates: TemplateSet, indices: Sequence[int], exclusive: Bool[NDArray[np.bool_], "bits bits"] | None = None
) -> list[int]:
    """Return which of some templates cannot match one state together, as a bit mask for each.

    Args:
        templates: Templates of the task.
        indices: Templates to consider; position p among them is bit p of a mask.
        exclusive: Pairs of bits that are never both 1, as for `MatchBounds`. A template that needs such a pair
            conflicts with itself: it never matches.
    """
    wanting_one, wanting_zero = [0] * templates.layout.bits, [0] * templates.layout.bits
    for position, index in enumerate(indices):
        for bit in templates.templates[index].ones:
            wanting_one[bit] |= 1 << position
        for bit in templates.templates[index].zeros:
            wanting_zero[bit] |= 1 << position
    # Whoever wants a bit 1 conflicts with those who want it 0, or want a bit 1 that excludes it.
    against_one = list(wanting_zero)
    for i, j in np.argwhere(exclusive).tolist() if exclusive is not None else ():
        against_one[i] |= wanting_one[j]
    return [
        functools.reduce(
            operator.or_,
            [
                *(against_one[bit] for bit in templates.templates[index].ones),
                *(wanting_one[bit] for bit in templates.templates[index].zeros),
            ],
        )
        for index in indices
    ]


def clique_cover(masks: Sequence[int], order: Iterable[int] | None = None) -> list[list[int]]:
    """Cover templates by cliques, of which at most one template matches any state; each joins the first that it can.

    Args:
        masks: Conflicts, from `conflict_masks`.
        order: Positions in the order in which they look for a clique; by default as they are declared.

    Returns:
        The positions in each clique.
    """
    cliques: list[list[int]] = []
    # The templates that conflict with all of a clique.
    joinable: list[int] = []
    for position in range(len(masks)) if order is None else order:
        for clique, mask in enumerate(joinable):
            if mask >> position & 1:
                cliques[clique].append(position)
                joinable[clique] &= masks[position]
                break
        else:
            cliques.append([position])
            joinable.append(masks[position])
    return cliques


def _smaller_cover(masks: Sequence[int]) -> list[list[int]]:
    """Return the smaller of two covers: in declared order, where blocks tend to be cliques, or by falling degree."""
    by_degree = sorted(range(len(masks)), key=lambda position: -masks[position].bit_count())
    return min(clique_cover(masks), clique_cover(masks, by_degree), key=len)


def exclusive_bits(templates: TemplateSet, start: Bool[Tensor, " bits"]) -> Bool[Tensor, "bits bits"]:
    """Return which pairs of bits are provably never both 1 on any trajectory from certain states.

    The proof is by induction (docs/theory.md, equation (35)). A pair is kept if its bits are not both 1 at the start
    and if, as long as all kept pairs have held, no two templates that match together set one bit of the pair each.
    Pairs that fail are dropped until none does.

    Args:
        templates: Templates of the task.
        start: Bits that may be 1 in the states that trajectories begin in.

    Returns:
        A symmetric matrix; on the diagonal the bits that are never 1.
    """
    labels = templates.labels.to(torch.float32)
    ones, zeros = ((templates.conditions == value).to(torch.float32) for value in (1, -1))
    conflicts = ones @ zeros.T + zeros @ ones.T
    exclusive = ~(start[:, None] & start)
    while True:
        together = conflicts + ones @ exclusive.to(torch.float32) @ ones.T == 0
        kept = exclusive & (labels.T @ together.to(torch.float32) @ labels == 0)
        if kept.equal(exclusive):
            return exclusive
        exclusive = kept


class _Rows:
    """Linear constraints, collected row by row."""

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._at: tuple[list[int], list[int], list[float]] = ([], [], [])
        self._low: list[float] = []
        self._high: list[float] = []

    def add(self, row: dict[int, int], low: float | int, high: float | int) -> None:
        rows, columns, values = self._at
        rows.extend([len(self._low)] * len(row))
        columns.extend(row)
        values.extend(row.values())
        self._low.append(low)
        self._high.append(high)

    def limit_last(self, high: int) -> None:
        self._high[-1] = high

    def constraint(self) -> scipy.optimize.LinearConstraint:
        rows, columns, values = self._at
        matrix = scipy.sparse.csr_matrix((values, (rows, columns)), shape=(len(self._low), self._columns))
        return scipy.optimize.LinearConstraint(matrix, self._low, self._high)
