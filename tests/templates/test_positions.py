"""Positions of templates inside the state, and words that are just full."""

from __future__ import annotations

import pytest
import torch

from ntk_ensembles.templates import StateLayout, Template, TemplateSet
from ntk_ensembles.templates.matching import columns_for, pack


@pytest.mark.parametrize("condition", ["ones", "zeros", "sets"])
@pytest.mark.parametrize("bit", [-1, 3, 70])
def test_a_position_outside_the_state_is_refused_wherever_it_stands(condition: str, bit: int) -> None:
    conditions = {"ones": [0], "zeros": [1], "sets": [2]}
    conditions[condition] = [*conditions[condition], bit]
    with pytest.raises(ValueError, match=rf"names bits \[{bit}\] outside the state's 3 bits"):
        TemplateSet(StateLayout(x=3), [Template.rule("g", **conditions)])


def test_as_many_words_as_states_need() -> None:
    """A word holds 64: counted state by state."""
    words = 0
    for states in range(260):
        words += states % 64 == 1
        assert columns_for(states) == words
        assert pack(torch.zeros(states, 3, dtype=torch.bool)).shape == (3, words)
