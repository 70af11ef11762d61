"""Exact bounds on how many templates match a state at once (docs/theory.md, section 9).

Two templates *conflict* if one wants a bit 1 and the other wants it 0; a set of templates matches some state together
if and only if no two of them conflict. The largest such set is found by clingo, which reasons about true and false only
and has no rounding. Of a clique of the conflict graph at most one template matches, so clingo counts the cliques of a
cover that are matched, instead of the templates: it then begins at a bound that is nearly always attained.

The states are all 2^m, or those that trajectories can reach: `exclusive_bits` proves by induction which bits are never
1 together (one phase at a time, one selected cell).
"""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import clingo
import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.templates.templates import TemplateSet

SECONDS_MAX = 60.0
"""Time limit of all searches together, by default."""

_SECONDS_OF_A_SEARCH = 0.1
"""What a search may take when the time is over."""


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
        seconds_max: Time limit for all searches together, in seconds. A search may take half of what is left, and a
            tenth of a second at least; it ends with the bound that is proven by then.
    """

    def __init__(
        self,
        templates: TemplateSet,
        exclusive: Bool[Tensor, "bits bits"] | None = None,
        seconds_max: float = SECONDS_MAX,
    ) -> None:
        self._templates = templates
        self._exclusive = None if exclusive is None else exclusive.numpy()
        self._seconds_left = seconds_max
        self._size = len(templates)
        self._others: dict[int, int] = {}
        self._found: dict[tuple[bool, int | None, int | None], Bound | None] = {}

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
            RuntimeError: The search found no state within its time limit.
        """
        return self._remembered(True, bit, set_count)

    def min_matches(self, bit: int | None = None, set_count: int | None = None) -> Bound | None:
        """Return the smallest number of templates, but at least one, that one state matches; else as `max_matches`."""
        return self._remembered(False, bit, set_count)

    def _remembered(self, largest: bool, bit: int | None, set_count: int | None) -> Bound | None:
        key = (largest, bit, set_count)
        if key not in self._found:
            self._found[key] = self._search(largest, bit, set_count)
        return self._found[key]

    def _search(self, largest: bool, bit: int | None, set_count: int | None) -> Bound | None:
        control = clingo.Control(["0"])  # a better state after every state, not only the first
        search = _StateSearch(control, self._write_program(control, largest, bit, set_count))
        seconds, started_at = max(self._seconds_left / 2, _SECONDS_OF_A_SEARCH), time.monotonic()
        search.run(seconds)
        self._seconds_left -= time.monotonic() - started_at
        if not search.state:
            if search.ended:
                return None
            raise RuntimeError(f"the solver found no state within {seconds:.2g} s")
        state = torch.tensor(search.state)
        attained = int(self._templates.matches(state[None]).sum())
        if search.ended:
            return Bound(attained, attained, state)
        if largest:
            return Bound(len(self._cliques) - search.cost_at_least, attained, state)
        return Bound(max(1, set_count or 0, search.cost_at_least), attained, state)

    def _write_program(
        self, control: clingo.Control, largest: bool, bit: int | None, set_count: int | None
    ) -> list[int]:
        """Write down (33) of docs/theory.md, that exactly ``set_count`` matching templates set ``bit``, and the cost.

        Returns:
            The atoms of the state's bits.
        """
        templates = self._templates
        with control.backend() as program:
            state = [program.add_atom() for _ in range(templates.layout.bits)]
            program.add_rule(state, choice=True)
            matches = [program.add_atom() for _ in range(self._size)]
            for match, template in zip(matches, templates.templates, strict=True):
                program.add_rule([match], [*(state[i] for i in template.ones), *(-state[i] for i in template.zeros)])
            if self._exclusive is not None:
                for i, j in np.argwhere(np.triu(self._exclusive)).tolist():
                    program.add_rule([], [state[i], state[j]])
            if bit is not None and set_count is not None:
                setters = [(matches[index], 1) for index in templates.setters[bit]]
                enough = program.add_atom()
                program.add_weight_rule([enough], set_count, setters)
                program.add_rule([], [-enough])
                program.add_weight_rule([], set_count + 1, setters)
            matched = [program.add_atom() for _ in self._cliques]
            for atom, clique in zip(matched, self._cliques, strict=True):
                for index in clique:
                    program.add_rule([atom], [matches[index]])
            if largest:
                # The most matches are the fewest cliques without one.
                program.add_minimize(0, [(-atom, 1) for atom in matched])
            else:
                some = program.add_atom()
                for atom in matched:
                    program.add_rule([some], [atom])
                program.add_rule([], [-some])
                program.add_minimize(0, [(atom, 1) for atom in matched])
        return state


class _StateSearch:
    """A search for the state that costs least, which can be stopped.

    Attributes:
        state: Bits of the best state found; empty if none was.
        cost_at_least: Bound on the cost of every state.
        ended: Whether `state` is proven to be the best, or it is proven that there is none.
    """

    def __init__(self, control: clingo.Control, state: list[int]) -> None:
        self._control, self._atoms = control, state
        self.state: list[bool] = []
        self.cost_at_least, self.ended = 0, False

    def run(self, seconds_max: float) -> None:
        """Find better states for a moment, then raise the bound until a state attains it."""
        settings: Any = self._control.configuration
        ends_at = time.monotonic() + seconds_max
        for strategy, conflicts_max in (("bb", "5000"), ("usc", "umax")):
            settings.solver.opt_strategy = strategy
            settings.solve.solve_limit = conflicts_max
            with self._control.solve(on_model=self._keep_state, on_unsat=self._keep_bound, async_=True) as handle:
                # Short waits, so that Ctrl-C is heard.
                while not handle.wait(0.1) and time.monotonic() < ends_at:
                    pass
                handle.cancel()
                self.ended = handle.get().exhausted
            if self.ended or time.monotonic() >= ends_at:
                return

    def _keep_state(self, model: clingo.Model) -> None:
        self.state = [model.is_true(atom) for atom in self._atoms]

    def _keep_bound(self, costs: Sequence[int]) -> None:
        self.cost_at_least = max(self.cost_at_least, costs[0])


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
    ones, zeros = ((templates.conditions == value).to(torch.float32) for value in (1, -1))
    # Templates want and set few bits. A sparse factor stands on the left, so products with one on the right are
    # written as transposes; all of them are symmetric.
    ones, labels = ones.to_sparse(), templates.labels.T.to(torch.float32).to_sparse()
    conflicts = ones @ zeros.T
    conflicts = conflicts + conflicts.T
    exclusive = ~(start[:, None] & start)
    while True:
        together = conflicts + ones @ (ones @ exclusive.to(torch.float32)).T == 0
        kept = exclusive & (labels @ (labels @ together.to(torch.float32)).T == 0)
        if kept.equal(exclusive):
            return exclusive
        exclusive = kept
