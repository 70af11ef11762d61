"""Bit planes and lists count like plain loops over rules, on every state of random template sets."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntk_ensembles.tasks import SBN, Addition, Multiplication, StateLayout, Task, Template, TemplateSet
from ntk_ensembles.templates import SparseMatcher
from ntk_ensembles.templates.matching import (
    LANES,
    BitPlaneMatcher,
    add,
    columns_for,
    from_integers,
    pack,
    to_integers,
    to_mask,
    unpack,
)

TASKS: list[Task[Any, Any]] = [Addition(5), Multiplication(4), SBN(8, 4), SBN(16, 8, "nonpositive")]


def random_templates(seed: int, bits: int, count: int) -> TemplateSet:
    """Few conditions and few outputs, so that both repeat: C_j above 1, large F_j, conditions that conflict."""
    draw = random.Random(seed)
    conditions = []
    for _ in range(draw.randint(1, count)):
        chosen = draw.sample(range(bits), draw.randint(1, bits))
        ones = draw.randint(1, len(chosen))
        conditions.append((chosen[:ones], chosen[ones:]))
    outputs = [draw.sample(range(bits), draw.randint(0, bits)) for _ in range(draw.randint(1, count))]
    rules = []
    for _ in range(count):
        ones, zeros = draw.choice(conditions)
        rules.append(Template.rule("random", ones=ones, zeros=zeros, sets=draw.choice(outputs)))
    return TemplateSet(StateLayout(x=bits), rules)


def all_states(bits: int) -> Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=bits)))


def loop_counts(templates: TemplateSet, states: Tensor) -> tuple[list[int], list[list[int]]]:
    matched, setting = [], []
    for state in states.tolist():
        found = [t for t in templates.templates if all(state[i] for i in t.ones) and not any(state[i] for i in t.zeros)]
        matched.append(len(found))
        setting.append([sum(i in t.sets for t in found) for i in range(templates.layout.bits)])
    return matched, setting


def plane_counts(planes: BitPlaneMatcher, states: Tensor) -> tuple[list[int], list[list[int]]]:
    """What `BitPlaneMatcher` counts, state by state."""
    counts = planes.match_and_count(pack(states))
    setting = np.zeros((states.shape[1], len(states)), np.int64)
    for group, digits in zip(planes.groups, counts.set_counts, strict=True):
        for row, bit in enumerate(group.bits):
            setting[bit] = to_integers(np.stack([digit[row] for digit in digits]))[: len(states)]
    return to_integers(counts.num_matches)[: len(states)].tolist(), setting.T.tolist()


cases = st.tuples(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 40))


@given(cases)
@settings(max_examples=80, deadline=None)
def test_counts_are_those_of_loops(case: tuple[int, int, int]) -> None:
    templates = random_templates(*case)
    states = all_states(templates.layout.bits)
    matched, setting = loop_counts(templates, states)
    planes = BitPlaneMatcher(templates)
    assert plane_counts(planes, states) == (matched, setting)
    by_lists = SparseMatcher(templates).match_and_count(states.numpy())
    assert (by_lists[0].tolist(), by_lists[1].tolist()) == (matched, setting)
    union = unpack(planes.union(planes.match_and_count(pack(states))), len(states))
    assert union.tolist() == [[count > 0 for count in row] for row in setting]
    # The promised bounds hold, and groups are the bits by fan-in.
    assert max(matched) <= planes.num_matches_max
    assert sorted(bit for group in planes.groups for bit in group.bits) == list(range(templates.layout.bits))
    for group in planes.groups:
        for bit in group.bits:
            assert group.fan_in == sum(bit in t.sets for t in templates.templates)
            assert max(row[bit] for row in setting) <= group.set_count_max


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_counts_on_the_tasks(task: Task[Any, Any]) -> None:
    """On arbitrary states, not only reachable ones, of several densities."""
    generator = torch.Generator().manual_seed(0)
    density = torch.linspace(0.02, 0.98, 300)[:, None]
    states = torch.rand(300, task.layout.bits, generator=generator) < density
    matches = task.templates.matches(states)
    expected = matches.sum(1).tolist(), task.templates.set_counts(matches).tolist()
    assert plane_counts(BitPlaneMatcher(task.templates), states) == expected


def test_templates_that_exclude_each_other_count_as_one() -> None:
    """Reading a cell: no state matches more than one of an address's templates, and the compiler sees it."""
    task = SBN(16, 8)
    planes = BitPlaneMatcher(task.templates)
    most = {int(bit): group.set_count_max for group in planes.groups for bit in group.bits}
    # An address bit is set while its word is fetched, or kept; memory is written or kept.
    assert {most[bit] for bit in task.layout["address_a"]} == {1}
    assert {most[bit] for bit in task.layout["address_b"]} == {2}
    assert {most[bit] for cell in range(16) for bit in task.layout[f"memory{cell}"]} == {1}


@given(st.integers(1, 200), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_packing(count: int, bits: int, seed: int) -> None:
    states = torch.rand(count, bits, generator=torch.Generator().manual_seed(seed)) < 0.5
    planes = pack(states)
    assert planes.shape == (bits, columns_for(count)) == (bits, -(-count // 64))
    for row, column in zip(planes.tolist(), states.T.tolist(), strict=True):
        number = sum(word << 64 * index for index, word in enumerate(row))
        assert number == sum(1 << lane for lane, value in enumerate(column) if value)
    assert torch.equal(unpack(planes, count), states)
    assert to_mask(planes[0])[:count].tolist() == states[:, 0].tolist()


@given(st.integers(1, 64), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_integers_in_lanes(digits: int, words: int, seed: int) -> None:
    draw = random.Random(seed)
    numbers = [draw.getrandbits(digits) for _ in range(words * LANES)]
    planes = from_integers(np.array(numbers, np.uint64), digits)
    assert planes.shape == (digits, words)
    for lane in (0, 5, words * LANES - 1):
        digit = [int(plane[lane // 64]) >> lane % 64 & 1 for plane in planes]
        assert sum(value << place for place, value in enumerate(digit)) == numbers[lane]
    assert to_integers(planes).tolist() == numbers


def test_more_digits_than_an_integer_holds() -> None:
    with pytest.raises(ValueError, match="65 planes: expected at most 64"):
        to_integers(np.zeros((65, 1), np.uint64))


@pytest.mark.parametrize("addends", [*range(10), 31, 32, 100])
def test_adding(addends: int) -> None:
    values = np.random.default_rng(addends).random((3, addends, 2 * LANES)) < 0.6
    planes = np.packbits(values, axis=2, bitorder="little").view(np.uint64)
    digits = add(planes)
    sums = np.stack([to_integers(np.stack([digit[row] for digit in digits])) for row in range(3)])
    assert np.array_equal(sums, values.sum(1))
    assert len(digits) == max(addends.bit_length(), 1)
