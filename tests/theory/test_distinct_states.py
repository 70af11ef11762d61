"""Codes of states and counts of codes, against Python's sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_ensembles.templates.matching import pack
from ntk_ensembles.theory import validation
from ntk_ensembles.theory.validation import DistinctCount, StateCodes


def test_a_short_state_is_its_own_code() -> None:
    states = torch.rand(300, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    codes = StateCodes(50)(pack(states))[:300]
    assert codes.tolist() == [sum(1 << i for i, bit in enumerate(state) if bit) for state in states.tolist()]


@pytest.mark.parametrize("bits", [65, 200])
def test_codes_of_long_states(bits: int) -> None:
    """Equal for equal states, different for different ones, even for those that differ in one bit or two."""
    generator = torch.Generator().manual_seed(bits)
    base = torch.rand(bits, generator=generator) < 0.5
    flips = torch.cat([torch.zeros(1, bits), torch.eye(bits), torch.triu(torch.ones(bits, bits))]).bool()
    states = torch.cat([base ^ flips, torch.rand(5000, bits, generator=generator) < 0.5])
    codes = StateCodes(bits)(pack(states))[: len(states)]
    again = StateCodes(bits)(pack(states.flip(0)))[: len(states)][::-1]
    assert np.array_equal(codes, again)
    assert len(set(codes.tolist())) == len({tuple(state) for state in states.tolist()})


@given(st.lists(st.lists(st.integers(0, 40), max_size=30), max_size=30), st.integers(82, 200))
@settings(max_examples=100, deadline=None)
def test_counts_are_exact_while_half_the_room_suffices(batches: list[list[int]], capacity: int) -> None:
    """However often codes are repeated, also where a block of sorted ones ends: 41 different ones fill half of 82."""
    counter = DistinctCount(capacity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_BLOCK", 7)
        for batch in batches:
            counter.add(np.array(batch, np.uint64))
        found = counter.result()
    assert found == (len({code for batch in batches for code in batch}), True)


@pytest.mark.parametrize("codes", [np.arange(200_000), np.random.default_rng(1).integers(0, 1 << 62, 200_000)])
def test_estimates(codes: np.ndarray) -> None:
    """Of regular codes and of random ones, each met three times."""
    counter = DistinctCount(8192)
    for _ in range(3):
        for batch in np.array_split(codes.astype(np.uint64), 40):
            counter.add(batch)
    count, exact = counter.result()
    assert not exact
    # Five times the standard error promised.
    assert abs(count - len(set(codes.tolist()))) < 5 * 2 / 8192**0.5 * 200_000
