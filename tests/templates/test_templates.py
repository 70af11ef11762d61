"""Layouts round-trip; template sets match and step like plain loops over their rules; bad ones are refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntk_ensembles.tasks import SBN, TASKS, Addition, Multiplication, StateLayout, Task, Template, TemplateSet

SMALL: list[Task[Any, Any]] = [Addition(3), Multiplication(2), Multiplication(3), SBN(4, 3), SBN(8, 4, "nonpositive")]


def loop_matches(templates: TemplateSet, state: list[bool]) -> list[bool]:
    return [all(state[i] for i in t.ones) and not any(state[i] for i in t.zeros) for t in templates.templates]


def test_layout_places_fields_in_order() -> None:
    layout = StateLayout(p=3, flag=1, q=2)
    assert layout.bits == 6
    assert (list(layout["p"]), list(layout["flag"]), list(layout["q"])) == ([0, 1, 2], [3], [4, 5])
    assert list(layout) == ["p", "flag", "q"]
    assert "flag" in layout
    assert "carry" not in layout
    assert repr(layout) == "StateLayout(p=3, flag=1, q=2)"
    assert [layout.bit_name(i) for i in (0, 2, 3, 5)] == ["p[0]", "p[2]", "flag[0]", "q[1]"]


def test_layout_packs_least_significant_bit_first() -> None:
    layout = StateLayout(p=3, flag=1, q=2)
    assert layout.pack({"p": 6, "q": 1}).tolist() == [False, True, True, False, True, False]


@given(p=st.integers(0, 2**70 - 1), q=st.integers(0, 7))
def test_layout_round_trip(p: int, q: int) -> None:
    layout = StateLayout(p=70, q=3)
    assert layout.unpack(layout.pack({"p": p, "q": q})) == {"p": p, "q": q}


def test_layout_refuses_what_does_not_fit() -> None:
    layout = StateLayout(p=3)
    with pytest.raises(ValueError, match=r"p=8 does not fit 3 bits \(0 to 7\)"):
        layout.pack({"p": 8})
    with pytest.raises(ValueError, match="p=-1"):
        layout.pack({"p": -1})
    with pytest.raises(ValueError, match="no field 'r'; the fields are p"):
        layout.pack({"r": 0})
    with pytest.raises(ValueError, match="bit 3 is outside"):
        layout.bit_name(3)
    with pytest.raises(ValueError, match="'q' has 0 bits"):
        StateLayout(q=0)


@pytest.mark.parametrize("task", SMALL, ids=repr)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_matches_and_micro_step_agree_with_loops(task: Task[Any, Any], density: float) -> None:
    # Arbitrary states, not only reachable ones: most templates match somewhere.
    generator = torch.Generator().manual_seed(0)
    states = torch.rand(50, task.layout.bits, generator=generator) < density
    matches, next_states = task.templates.matches(states), task.templates.micro_step(states)
    counts = task.templates.set_counts(matches)
    for state, matched, successor, count in zip(states.tolist(), matches, next_states, counts, strict=True):
        expected = loop_matches(task.templates, state)
        assert matched.tolist() == expected
        written = [t.sets for t, matching in zip(task.templates.templates, expected, strict=True) if matching]
        assert count.tolist() == [sum(i in bits for bits in written) for i in range(task.layout.bits)]
        assert successor.tolist() == [i in set().union(*written) for i in range(task.layout.bits)]


@pytest.mark.parametrize("task", SMALL, ids=repr)
def test_labels_and_fan_in(task: Task[Any, Any]) -> None:
    templates = task.templates
    assert templates.labels.shape == (len(templates), task.layout.bits)
    assert all(
        set(row.nonzero().flatten().tolist()) == t.sets
        for row, t in zip(templates.labels, templates.templates, strict=True)
    )
    assert templates.fan_in.tolist() == [sum(i in t.sets for t in templates.templates) for i in range(task.layout.bits)]
    assert all(t.sets for t in templates.templates)


def test_encoding_is_a_unit_vector_or_zero() -> None:
    templates = Addition(4).templates
    states = torch.rand(100, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    states[0] = False
    matches = templates.matches(states)
    codes = templates.encode(matches)
    assert codes[0].count_nonzero() == 0
    assert torch.equal(codes > 0, matches)
    # Sums of at most 16 squares of correctly rounded doubles.
    torch.testing.assert_close(codes.square().sum(1), matches.any(1).to(torch.float64), rtol=0, atol=1e-14)


def test_the_zero_state_stays_zero() -> None:
    for task in SMALL:
        zero = torch.zeros(1, task.layout.bits, dtype=torch.bool)
        assert not task.templates.matches(zero).any()
        assert not task.templates.micro_step(zero).any()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (Template.rule("g", zeros=[0], sets=[1]), "'g' requires no 1-bit"),
        (Template.rule("g", ones=[0, 1], zeros=[1], sets=[1]), r"bits \[1\] to be both 1 and 0"),
        (Template.rule("g", ones=[0], sets=[2]), r"bits \[2\] outside the state's 2 bits"),
    ],
)
def test_bad_templates_are_refused(template: Template, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemplateSet(StateLayout(x=2), [template])


def test_a_task_needs_templates() -> None:
    with pytest.raises(ValueError, match="at least one template"):
        TemplateSet(StateLayout(x=2), [])


@pytest.mark.parametrize("name", TASKS)
def test_registered_tasks_rebuild_from_their_options(name: str) -> None:
    task = TASKS[name]()
    again = TASKS[name](**task.options)
    assert task.name == name
    assert again.templates.templates == task.templates.templates
    assert repr(again) == repr(task)


@pytest.mark.parametrize("name", TASKS)
def test_inputs_follow_the_generator_alone(name: str) -> None:
    task = TASKS[name]()
    first, second = (
        [value for value, _ in zip(task.inputs(random.Random(3)), range(40), strict=False)] for _ in range(2)
    )
    assert first == second


def test_another_default_type_changes_nothing() -> None:
    """What a trainer in double precision sets while it makes its module."""
    states = torch.tensor([[True, False], [True, True]])
    layout = StateLayout(word=2)
    rules = [Template.rule("low", ones=[0], zeros=[1], sets=[1]), Template.rule("both", ones=[0, 1], sets=[0])]
    torch.set_default_dtype(torch.float64)
    try:
        templates = TemplateSet(layout, rules)
        assert templates.matches(states).tolist() == [[True, False], [False, True]]
        assert templates.micro_step(states).tolist() == [[False, True], [True, False]]
    finally:
        torch.set_default_dtype(torch.float32)
