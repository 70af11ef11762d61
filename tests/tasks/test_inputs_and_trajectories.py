"""Which inputs a task is evaluated on, and what becomes of their trajectories: none is cut, merged or lost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ntk_ensembles.tasks import (
    SBN,
    Addition,
    Branch,
    EvaluationSet,
    Multiplication,
    Permutation,
    StateLayout,
    Task,
    Template,
)
from ntk_ensembles.tasks import evaluation as evaluation_module


class Rotation(Task[tuple[int, int], int]):
    """Rotates a word of four bits, as often as the input says: equal starts, trajectories of different lengths."""

    name = "rotation"

    def __init__(self) -> None:
        self.layout = StateLayout(word=4)

    def make_templates(self) -> Iterator[Template]:
        for i in range(4):
            yield Template.rule("rotate", ones=[i], sets=[(i + 1) % 4])

    def inputs(self, generator: random.Random) -> Iterator[tuple[int, int]]:
        yield from [(1, 2), (1, 4), (1, 2), (3, 1), (1, 1)]

    def initial_fields(self, task_input: tuple[int, int]) -> dict[str, Any]:
        return {"word": task_input[0]}

    def read_output(self, fields: dict[str, Any]) -> int:
        return int(fields["word"])

    def reference(self, task_input: tuple[int, int]) -> int:
        word, times = task_input
        return (word << times | word >> (4 - times)) & 15

    def num_micro_steps(self, task_input: tuple[int, int]) -> int:
        return task_input[1]


def test_equal_starts_with_different_lengths_are_different_trajectories() -> None:
    chosen = EvaluationSet.sample(Rotation(), 100, seed=0)
    words = [sum(1 << i for i, bit in enumerate(state) if bit) for state in chosen.states.tolist()]
    assert words == [1, 2, 4, 8, 3]
    found = [[words[i] for i in trajectory.tolist()] for trajectory in chosen.trajectories]
    # The third input is the first again.
    assert found == [[1, 2], [1, 2, 4, 8], [3], [1]]


@pytest.mark.parametrize("count", [1, 6, 7, 8, 13, 14, 15, 20])
def test_states_are_matched_in_parts_and_none_is_lost(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Addition(4)
    monkeypatch.setattr(evaluation_module, "_STATES_AT_ONCE", 7)
    chosen = EvaluationSet.sample(task, count, seed=0)
    assert len(chosen.states) == len(chosen.matches) == len(chosen.next_states) == count
    for state, matches, after in zip(chosen.states, chosen.matches, chosen.next_states, strict=True):
        right = [template.matches(state) for template in task.templates.templates]
        union = {
            bit for template, on in zip(task.templates.templates, right, strict=True) if on for bit in template.sets
        }
        assert matches.tolist() == right
        assert after.tolist() == [bit in union for bit in range(task.layout.bits)]


def test_many_inputs_with_a_new_state_each_are_not_taken_to_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """More inputs than may be fruitless in a row; each of them brings one state."""
    monkeypatch.setattr(evaluation_module, "_FRUITLESS_INPUTS", 40)
    assert len(EvaluationSet.sample(Permutation(9), 300, seed=0)) == 300


class Sparing(Permutation):
    """After every 30 old words there is a new one."""

    def inputs(self, generator: random.Random) -> Iterator[int]:
        for word in range(8):
            yield from itertools.repeat(0, 30)
            yield word


def test_inputs_that_seldom_bring_a_new_state_are_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    for patience, expected in ((32, 8), (20, 1)):
        monkeypatch.setattr(evaluation_module, "_FRUITLESS_INPUTS", patience)
        assert len(EvaluationSet.sample(Sparing(8), 100, seed=0)) == expected


@pytest.mark.parametrize("branch", ["negative", "nonpositive"])
def test_shipped_programs_are_watched_for_one_instruction_after_they_have_halted(branch: Branch) -> None:
    task = SBN(branch=branch)
    programs = [p for p in itertools.islice(task.inputs(random.Random(0)), 40) if p.label != "random memory"]
    assert len(programs) == 6
    for program in programs:
        state, executed = program.state, 0
        while not state.halted:
            state, executed = task.machine.step(state), executed + 1
        assert program.instructions == executed + 1


@pytest.mark.parametrize("bits", [2, 3, 9, 16])
def test_multiplication_is_evaluated_on_the_longest_carry(bits: int) -> None:
    """An addend of ones at the bottom and one at the top: the sum of the two is p·q, and its carry crosses L bits."""
    full = (1 << bits) - 1
    first = list(itertools.islice(Multiplication(bits).inputs(random.Random(0)), 40))
    assert (full, 1 + (1 << bits - 1)) in first[: 12 + bits]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_additions_longest_carry_needs_every_micro_step(bits: int) -> None:
    """Counted by hand: until nothing moves, over all pairs; the fixed point itself is not a micro-step more."""
    task = Addition(bits)
    longest = 0
    for pair in itertools.product(range(1 << bits), range(1 << bits)):
        state, steps = task.initial_state(pair)[None], 0
        while not torch.equal(after := task.templates.micro_step(state), state):
            state, steps = after, steps + 1
        longest = max(longest, steps)
        assert task.num_micro_steps(pair) == 2 * bits
    # A carry at the bottom runs through every bit above: two micro-steps each, but for the last, which stays.
    assert longest == 2 * bits - 1


@pytest.mark.parametrize("task", [Addition(4), Multiplication(3), Permutation(8)], ids=repr)
def test_the_rest_of_few_inputs_comes_in_an_order_of_the_seed(task: Task[Any, Any]) -> None:
    orders = [list(task.inputs(random.Random(seed))) for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1])
    first = next(i for i, pair in enumerate(zip(*orders, strict=True)) if pair[0] != pair[1])
    rests = [order[first:] for order in orders]
    assert len(rests[0]) > len(orders[0]) / 2
    for rest in rests:
        assert rest != sorted(rest)
        # As random as can be: hardly any input is where the sorted order has it.
        same = sum(a == b for a, b in zip(rest, sorted(rest), strict=True))
        assert same < len(rest) / 4
