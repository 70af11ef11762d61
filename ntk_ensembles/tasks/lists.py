"""The OR-machine on a few states at a time: templates as lists of positions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from ntk_ensembles.tasks.templates import TemplateSet


class TemplateLists:
    """Counts like `TemplateSet.matches` and `TemplateSet.counts`, quickest for a handful of states.

    Memory is k times the longest condition and the most bits that one template sets; no k × m matrix.

    Args:
        templates: the templates.
    """

    def __init__(self, templates: TemplateSet) -> None:
        rules, bits = templates.templates, templates.layout.bits
        self._bits = bits
        # Literals 0 … m − 1 are the bits, m … 2m − 1 their complements; literal 2m is always true.
        self._conditions = _padded([[*rule.ones, *(bits + bit for bit in rule.zeros)] for rule in rules], 2 * bits).T
        # What a template sets beyond its last bit is bit m, which is dropped.
        self._sets = _padded([list(rule.sets) for rule in rules], bits)

    def matches(self, states: Bool[NDArray[np.bool_], "states bits"]) -> Bool[NDArray[np.bool_], "states templates"]:
        """Which templates match each state."""
        count, bits = states.shape
        literals = np.ones((count, 2 * bits + 1), np.bool_)
        literals[:, :bits] = states
        np.logical_not(states, out=literals[:, bits : 2 * bits])
        # A mode that cannot fail spares a second copy.
        holds = literals.take(self._conditions, axis=1, mode="clip")
        matches: NDArray[np.bool_] = np.logical_and.reduce(holds, axis=1)
        return matches

    def counts(
        self, states: Bool[NDArray[np.bool_], "states bits"]
    ) -> tuple[Int[NDArray[np.int64], " states"], Int[NDArray[np.int64], "states bits"]]:
        """Count s and C_j of every state."""
        count, bits = states.shape
        state, template = np.nonzero(self.matches(states))
        cells = state[:, None] * (bits + 1) + self._sets[template]
        setting = np.bincount(cells.reshape(-1), minlength=count * (bits + 1)).reshape(count, bits + 1)
        return np.bincount(state, minlength=count), setting[:, :bits]


def _padded(rows: list[list[int]], filler: int) -> NDArray[np.intp]:
    width = max(map(len, rows))
    return np.array([[*row, *[filler] * (width - len(row))] for row in rows], np.intp)
