"""Extremes of s against every state of tiny machines, and proofs about reachable states against their enumeration."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_ensembles.tasks import SBN, Addition, Multiplication, StateLayout, Template, TemplateSet
from ntk_ensembles.tasks.base import Task
from ntk_ensembles.templates.bounds import MatchBounds, exclusive_bits

BITS = 6


def random_templates(seed: int, count: int, repeats: int) -> TemplateSet:
    """Templates with up to three conditions and labels; some stand several times."""
    generator = random.Random(seed)
    rules = []
    for _ in range(count):
        chosen = generator.sample(range(BITS), generator.randint(1, 3))
        split = generator.randint(1, len(chosen))
        sets = generator.sample(range(BITS), generator.randint(0, 3))
        rule = Template.rule("random", ones=chosen[:split], zeros=chosen[split:], sets=sets)
        rules.extend([rule] * generator.randint(1, repeats))
    return TemplateSet(StateLayout(x=BITS), rules)


def every_state(bits: int) -> torch.Tensor:
    return (torch.arange(1 << bits)[:, None] >> torch.arange(bits) & 1).bool()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(1, 3))
def test_extremes_equal_enumeration(seed: int, count: int, repeats: int) -> None:
    templates = random_templates(seed, count, repeats)
    states = every_state(BITS)
    matches = templates.matches(states)
    matched, counts = matches.sum(1), templates.set_counts(matches)
    extremes = MatchBounds(templates)
    most, fewest = extremes.max_matches(), extremes.min_matches()
    assert most is not None
    assert most.bound == most.attained == int(matched.max())
    assert fewest is not None
    assert fewest.bound == int(matched[matched > 0].min())
    bit = seed % BITS
    for setting in range(4):
        among = (counts[:, bit] == setting) & (matched > 0)
        found, least = extremes.max_matches(bit, setting), extremes.min_matches(bit, setting)
        if not among.any():
            assert least is None
            continue
        assert found is not None
        assert least is not None
        assert found.bound == int(matched[among].max())
        assert least.bound == int(matched[among].min())
        for extreme in (found, least):
            assert int(templates.matches(extreme.state[None]).sum()) == extreme.attained


def test_the_quick_estimate_is_of_each_bits_own_templates() -> None:
    """Templates without a common bit all match at once: C_j of those that set the bit, and all the others."""
    sets = [[0], [0], [0], [1], []]
    rules = [Template.rule("own", ones=[bit], sets=written) for bit, written in enumerate(sets)]
    bounds = MatchBounds(TemplateSet(StateLayout(x=len(rules)), rules))
    assert [bounds.max_matches_estimate(bit, 1) for bit in (0, 1)] == [1 + 2, 1 + 4]
    assert [bounds.max_matches_estimate(bit, 0) for bit in (0, 1, 2)] == [2, 4, 5]
    assert bounds.max_matches_estimate(0, 3) == 3 + 2


def test_the_quick_estimate_knows_the_pairs_that_are_never_both_1() -> None:
    """With at most one bit of a state 1, at most one of the templates that want one bit each matches."""
    rules = [Template.rule("own", ones=[bit], sets=[bit]) for bit in range(4)]
    templates = TemplateSet(StateLayout(x=4), rules)
    bounds = MatchBounds(templates, ~torch.eye(4, dtype=torch.bool))
    assert [bounds.max_matches_estimate(bit, 0) for bit in range(4)] == [1] * 4
    assert MatchBounds(templates).max_matches_estimate(0, 0) == 3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(1, (1 << BITS) - 1))
def test_exclusive_bits_are_never_one_together(seed: int, count: int, begins: int) -> None:
    templates = random_templates(seed, count, 1)
    start = (begins >> torch.arange(BITS) & 1).bool()
    exclusive = exclusive_bits(templates, start)
    states = every_state(BITS)
    reached = states[~(states & ~start).any(1)]
    seen = {tuple(state) for state in reached.tolist()}
    frontier = list(seen)
    while frontier:
        following = {tuple(state) for state in templates.micro_step(torch.tensor(frontier)).tolist()}
        frontier = list(following - seen)
        seen |= following
    reached = torch.tensor(sorted(seen))
    together = (reached[:, :, None] & reached[:, None, :]).any(0)
    assert not (together & exclusive).any()
    most = MatchBounds(templates, exclusive).max_matches()
    assert most is not None
    assert most.bound >= int(templates.matches(reached).sum(1).max())
    # And no more than what the proof allows: the states without the pairs that it excludes.
    allowed = states[~((states[:, :, None] & states[:, None, :]) & exclusive).any(2).any(1)]
    assert most.bound == int(templates.matches(allowed).sum(1).max())


def test_one_phase_at_a_time_is_proved() -> None:
    task = SBN(4, 3)
    start = torch.zeros(task.layout.bits, dtype=torch.bool)
    for field in ("memory0", "memory1", "memory2", "memory3", "pc", "fetch"):
        start[list(task.layout[field])] = True
    exclusive = exclusive_bits(task.templates, start)
    phases = [p for field in ("fetch", "read", "subtract", "write") for p in task.layout[field]]
    assert exclusive[phases][:, phases].logical_or(torch.eye(len(phases), dtype=torch.bool)).all()
    lines = list(task.layout["select"])
    assert exclusive[lines][:, lines].logical_or(torch.eye(len(lines), dtype=torch.bool)).all()


@pytest.mark.parametrize(("task", "most"), [(Addition(3), 6), (Multiplication(1), None)])
def test_the_bound_of_small_tasks(task: Task, most: int | None) -> None:  # type: ignore[type-arg]
    """Addition: each bit position matches one sum template or the carry one, and each carry moves or stays."""
    found = MatchBounds(task.templates).max_matches()
    assert found is not None
    assert found.bound == int(task.templates.matches(every_state(task.layout.bits)).sum(1).max())
    if most is not None:
        assert found.bound == most


def test_thousands_of_small_sets() -> None:
    """One question for each of 2000 sets: integer programming in floating point gets a few of such questions wrong."""
    states = every_state(BITS)
    for seed in range(2000):
        generator = random.Random(seed)
        templates = random_templates(seed, generator.randint(1, 6), generator.randint(1, 6))
        bit, set_count = generator.randrange(BITS), generator.randint(0, 2)
        matches = templates.matches(states)
        among = matches.sum(1)[(templates.set_counts(matches)[:, bit] == set_count) & matches.any(1)]
        search = MatchBounds(templates).max_matches if seed % 2 else MatchBounds(templates).min_matches
        found = search(bit, set_count)
        if len(among):
            assert found is not None
            assert found.bound == int(among.max() if seed % 2 else among.min()), seed
        else:
            assert found is None or found.bound == 0, seed
