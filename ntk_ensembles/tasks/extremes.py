"""How many templates can match a state at once: exact extremes over states, by integer programming.

Two templates *conflict* where one wants a bit 1 and the other wants it 0; a set of templates matches some
state together if and only if no two of them conflict. The largest such set is found by HiGHS
(`scipy.optimize.milp`), whose relaxation becomes tight once a cover of the conflict graph by cliques is
stated: of a clique at most one template matches.

The states are all 2^m, or those that executions can reach: `exclusive_bits` proves by induction which bits
are never 1 together (one phase at a time, one selected cell).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_matrix
from torch import Tensor

from ntk_ensembles.tasks.templates import TemplateSet

SECONDS_MAX = 60.0
"""After so long a search for one extreme ends with what is proven by then."""

_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2


@dataclass(frozen=True)
class Extreme:
    """The most, or the fewest, templates that match one state.

    Attributes:
        bound: no state has more (fewer).
        attained: how many match ``state``; ``bound`` itself unless the search ran out of time.
        state: a state that shows it.
    """

    bound: int
    attained: int
    state: Bool[Tensor, " bits"]


class MatchExtremes:
    """Extremes of s, the number of matching templates, over all states or those with a given C_j.

    Args:
        templates: the task's templates.
        exclusive: only states without two 1-bits i, j (or a 1-bit i = j) with ``exclusive[i, j]``.
        seconds_max: limit for one search.
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
        self._found: dict[tuple[str, int | None, int | None], Extreme | None] = {}

    @cached_property
    def _conflicts(self) -> NDArray[np.bool_]:
        return _conflicts(self._templates, self._exclusive)

    @cached_property
    def _cliques(self) -> list[list[int]]:
        """Templates in groups of which at most one matches any state."""
        return _cover(self._conflicts, range(self._size))

    def most_setting(self, bit: int, setting: int) -> int:
        """A quick upper bound of ``most(bit, setting)``: of the templates that do not set it, one of each clique."""
        if bit not in self._others:
            others = torch.nonzero(~self._templates.labels[:, bit]).flatten().tolist()
            self._others[bit] = len(_cover(self._conflicts, others))
        return setting + self._others[bit]

    def most(self, bit: int | None = None, setting: int | None = None) -> Extreme | None:
        """The most templates that one state matches.

        Args:
            bit: only states where exactly ``setting`` matching templates set this bit.
            setting: C_j there.

        Returns:
            None if there is no such state.
        """
        return self._remembered(self._most, bit, setting)

    def fewest(self, bit: int | None = None, setting: int | None = None) -> Extreme | None:
        """The fewest templates, but at least one, that one state matches; arguments and result as for `most`."""
        return self._remembered(self._fewest, bit, setting)

    def _remembered(
        self, search: Callable[[int | None, int | None], Extreme | None], bit: int | None, setting: int | None
    ) -> Extreme | None:
        key = (search.__name__, bit, setting)
        if key not in self._found:
            self._found[key] = search(bit, setting)
        return self._found[key]

    def _most(self, bit: int | None, setting: int | None) -> Extreme | None:
        rows, setters = self._conditions(bit, setting)
        # Elsewhere more matches are better, so that a template whose conditions hold counts by itself.
        self._count_all(rows, setters)
        found = self._solve(rows, -1)
        if found.status == _INFEASIBLE:
            return None
        extreme = self._extreme(found)
        if found.status == _OPTIMAL:
            return extreme
        return Extreme(math.floor(-found.mip_dual_bound + 1e-6), extreme.attained, extreme.state)

    def _fewest(self, bit: int | None, setting: int | None) -> Extreme | None:
        # Asked whether a state with at most 1, 2, … exists, HiGHS propagates the limit into every condition;
        # to minimise, it would have to branch over most of the state.
        rows, _ = self._conditions(bit, setting)
        self._count_all(rows, range(self._size))
        at_least = max(1, setting or 0)
        rows.add(dict.fromkeys(range(self._size), 1), at_least, self._size)
        some = self._solve(rows, 0)
        if some.status == _INFEASIBLE:
            return None
        extreme = self._extreme(some)
        for limit in range(at_least, extreme.attained):
            rows.limit_last(limit)
            found = self._solve(rows, 0)
            if found.status == _OPTIMAL:
                return self._extreme(found)
            if found.status != _INFEASIBLE:
                return Extreme(limit, extreme.attained, extreme.state)
        return extreme

    def _conditions(self, bit: int | None, setting: int | None) -> tuple[_Rows, list[int]]:
        """What holds for a state's bits and for templates that count as matching; the templates that set ``bit``."""
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
        if bit is None or setting is None:
            return rows, []
        setters: list[int] = torch.nonzero(self._templates.labels[:, bit]).flatten().tolist()
        rows.add(dict.fromkeys(setters, 1), setting, setting)
        return rows, setters

    def _count_all(self, rows: _Rows, templates: Iterable[int]) -> None:
        """Let these templates count wherever their conditions hold."""
        for template in templates:
            ones, zeros = self._literals[template]
            row = {template: 1, **{self._size + position: -1 for position in ones}}
            rows.add({**row, **{self._size + position: 1 for position in zeros}}, 1 - len(ones), np.inf)

    def _solve(self, rows: _Rows, weight: int) -> OptimizeResult:
        """Minimise ``weight`` times the number of matching templates."""
        counted = np.concatenate([np.ones(self._size), np.zeros(self._bits)])
        return milp(
            weight * counted,
            constraints=rows.constraint(),
            # With the state's bits whole, the matches are.
            integrality=1 - counted,
            bounds=Bounds(0, 1),
            options={"time_limit": self._seconds_max},
        )

    def _extreme(self, found: OptimizeResult) -> Extreme:
        """The state found, taken to be extreme."""
        if found.status not in (_OPTIMAL, _LIMIT) or found.x is None:
            raise RuntimeError(f"no state was found in {self._seconds_max:.0f} s: {found.message}")
        state = torch.from_numpy(found.x[self._size :] > 0.5)
        attained = int(self._templates.matches(state[None]).sum())
        return Extreme(attained, attained, state)


def _cover(conflicts: NDArray[np.bool_], vertices: Iterable[int]) -> list[list[int]]:
    """Cliques that cover these vertices of the conflict graph: each joins the first that it can.

    Two orders are tried: as declared, where a task's blocks tend to be cliques, and by falling degree.
    """
    declared = np.array(list(vertices), dtype=np.int64)
    orders = (declared, declared[np.argsort(-conflicts[declared].sum(1), kind="stable")])
    return min((_first_fit(conflicts, order.tolist()) for order in orders), key=len)


def _first_fit(conflicts: NDArray[np.bool_], order: list[int]) -> list[list[int]]:
    cliques: list[list[int]] = []
    # In row q the vertices that conflict with all of clique q.
    joinable = np.empty((len(order), len(conflicts)), dtype=np.bool_)
    for vertex in order:
        fitting = np.flatnonzero(joinable[: len(cliques), vertex])
        if len(fitting):
            cliques[fitting[0]].append(vertex)
            joinable[fitting[0]] &= conflicts[vertex]
        else:
            joinable[len(cliques)] = conflicts[vertex]
            cliques.append([vertex])
    return cliques


def exclusive_bits(templates: TemplateSet, start: Bool[Tensor, " bits"]) -> Bool[Tensor, "bits bits"]:
    """Which pairs of bits are never both 1 in any execution from certain states: the largest provable set.

    The proof is by induction. A pair is kept if it is not both 1 at the start and if, as long as all kept
    pairs have held, no two templates that match together set one bit of the pair each. Pairs that fail are
    dropped until none does.

    Args:
        templates: the task's templates.
        start: executions begin in states that have 1-bits nowhere else.

    Returns:
        Symmetric; on the diagonal the bits that are never 1.
    """
    labels = templates.labels.to(torch.float32).numpy()
    begins = start.numpy()
    exclusive = ~(begins[:, None] & begins[None, :])
    while True:
        together = (~_conflicts(templates, exclusive)).astype(np.float32)
        kept = exclusive & ~(labels.T @ together @ labels > 0)
        if np.array_equal(kept, exclusive):
            return torch.from_numpy(exclusive)
        exclusive = kept


def _conflicts(templates: TemplateSet, exclusive: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """Which templates cannot match one state together; on the diagonal those that never match."""
    ones = np.zeros((len(templates), templates.layout.bits), np.float32)
    zeros = np.zeros_like(ones)
    for row, template in enumerate(templates.templates):
        ones[row, list(template.ones)] = 1
        zeros[row, list(template.zeros)] = 1
    conflicts: NDArray[np.bool_] = ones @ zeros.T > 0
    conflicts |= conflicts.T
    if exclusive is not None:
        conflicts |= ones @ exclusive.astype(np.float32) @ ones.T > 0
    return conflicts


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

    def constraint(self) -> LinearConstraint:
        rows, columns, values = self._at
        matrix: csr_matrix[np.float64] = csr_matrix((values, (rows, columns)), shape=(len(self._low), self._columns))
        return LinearConstraint(matrix, self._low, self._high)
