"""Bounds over restricted states by enumeration, and what they say where a search ends before its proof."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntk_ensembles.tasks import Addition
from ntk_ensembles.templates import MatchBounds, StateLayout, Template, TemplateSet, exclusive_bits

BITS = 5


def random_templates(generator: random.Random, count: int) -> TemplateSet:
    rules = []
    for _ in range(count):
        chosen = generator.sample(range(BITS), generator.randint(1, 3))
        split = generator.randint(1, len(chosen))
        sets = generator.sample(range(BITS), generator.randint(0, 3))
        rules.append(Template.rule("random", ones=chosen[:split], zeros=chosen[split:], sets=sets))
    return TemplateSet(StateLayout(x=BITS), rules)


def counts_by_loops(templates: TemplateSet, allowed: Callable[[tuple[int, ...]], bool]) -> list[int]:
    """Number of matching templates of every allowed state."""
    return [
        sum(all(state[i] for i in t.ones) and not any(state[i] for i in t.zeros) for t in templates.templates)
        for state in itertools.product([0, 1], repeat=templates.layout.bits)
        if allowed(state)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 8), st.integers(0, 4))
def test_bounds_over_states_without_certain_pairs_are_enumerated_ones(seed: int, count: int, pairs: int) -> None:
    """To the number itself, from either side; a bit paired with itself is never 1."""
    generator = random.Random(seed)
    templates = random_templates(generator, count)
    never = {tuple(sorted(generator.choices(range(BITS), k=2))) for _ in range(pairs)}
    exclusive = torch.zeros(BITS, BITS, dtype=torch.bool)
    for i, j in never:
        exclusive[i, j] = exclusive[j, i] = True
    matched = counts_by_loops(templates, lambda state: not any(state[i] and state[j] for i, j in never))
    bounds = MatchBounds(templates, exclusive)
    most, fewest = bounds.max_matches(), bounds.min_matches()
    assert most is not None
    assert (most.bound, most.attained) == (max(matched), max(matched))
    some = [s for s in matched if s]
    assert (fewest.bound if fewest else None) == (min(some) if some else None)
    for found in (most, fewest):
        if found is not None:
            assert not any(found.state[i] and found.state[j] for i, j in never)


def test_a_bit_that_is_never_1_matches_nothing_that_wants_it() -> None:
    """Only the templates of the other bits match; without the restriction all three do."""
    rules = [Template.rule("own", ones=[i], sets=[i]) for i in range(3)]
    templates = TemplateSet(StateLayout(x=3), rules)
    exclusive = torch.zeros(3, 3, dtype=torch.bool)
    exclusive[1, 1] = True
    found, free = MatchBounds(templates, exclusive).max_matches(), MatchBounds(templates).max_matches()
    assert found is not None
    assert free is not None
    assert (found.bound, found.attained, bool(found.state[1])) == (2, 2, False)
    assert free.bound == 3


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_addition_reaches_what_the_proof_about_it_allows(bits: int) -> None:
    """The bound over states that may be reached lies between those that are, followed one by one, and all of them."""
    task = Addition(bits)
    start = torch.zeros(task.layout.bits, dtype=torch.bool)
    start[list(task.layout["p"]) + list(task.layout["q"])] = True
    found = MatchBounds(task.templates, exclusive_bits(task.templates, start)).max_matches()
    reached = []
    for p, q in itertools.product(range(1 << bits), repeat=2):
        state = task.initial_state((p, q))[None]
        for _ in range(2 * bits + 1):
            reached.append(int(task.templates.matches(state).sum()))
            state = task.templates.micro_step(state)
    every = counts_by_loops(task.templates, lambda state: True)
    assert found is not None
    assert max(reached) <= found.bound <= max(every)


def hard_templates() -> TemplateSet:
    """300 templates of three bits among 60, of which every other one sets bit 0: minutes, not tenths of a second."""
    generator = random.Random(1)
    rules = []
    for number in range(300):
        chosen = generator.sample(range(60), 3)
        zeros = [p for p in chosen[1:] if generator.random() < 0.5]
        rules.append(Template.rule("hard", ones=[p for p in chosen if p not in zeros], zeros=zeros, sets=[number % 2]))
    return TemplateSet(StateLayout(x=60), rules)


def test_a_search_for_the_most_that_ends_early_keeps_what_is_proven() -> None:
    """The bound allows for the best of many states; the state attains what is said of it."""
    templates = hard_templates()
    found = MatchBounds(templates, seconds_max=0.1).max_matches(0, 40)
    assert found is not None
    assert found.attained < found.bound < 300
    matches = templates.matches(found.state[None])
    assert int(matches.sum()) == found.attained
    assert int(templates.set_counts(matches)[0, 0]) == 40
    longer = MatchBounds(templates, seconds_max=1.0).max_matches(0, 40)
    assert longer is not None
    assert max(found.attained, longer.attained) <= min(found.bound, longer.bound)
    # The quick estimate is the bound of a longer way round.
    assert longer.bound <= MatchBounds(templates).max_matches_estimate(0, 40)


def test_a_search_for_the_fewest_that_ends_early_keeps_what_is_proven() -> None:
    """40 matching templates set the bit, so no state has fewer."""
    templates = hard_templates()
    found = MatchBounds(templates, seconds_max=0.1).min_matches(0, 40)
    assert found is not None
    assert 40 <= found.bound < found.attained
    matches = templates.matches(found.state[None])
    assert int(matches.sum()) == found.attained
    assert int(templates.set_counts(matches)[0, 0]) == 40


def test_a_search_that_ends_without_a_state_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"the solver found no state within 0\.1 s"):
        MatchBounds(hard_templates(), seconds_max=0.1).max_matches(0, 60)


def test_a_bit_that_too_few_templates_set_has_no_state() -> None:
    bounds = MatchBounds(Addition(3).templates)
    fan_in = len(Addition(3).templates.setters[0])
    assert bounds.max_matches(0, fan_in + 1) is None
    assert bounds.min_matches(0, fan_in + 1) is None


def test_searches_share_their_time() -> None:
    """Each may take half of what is left, so all end soon after the limit, and what is easy is still proven."""
    templates = hard_templates()
    bounds = MatchBounds(templates, seconds_max=0.8)
    started_at = time.monotonic()
    unproven = [bounds.max_matches(0, set_count) for set_count in range(30, 42)]
    took = time.monotonic() - started_at
    assert all(found and found.attained < found.bound for found in unproven)
    assert took < 6  # 9.6 if each took 0.8
    fewest = bounds.min_matches()
    assert fewest is not None
    assert (fewest.bound, fewest.attained) == (1, 1)
