"""Evaluation sets: distinct states, true next_states, complete executions, and faulty tasks found out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ntk_ensembles.tasks import SBN, Addition, EvaluationSet, Multiplication, Permutation, Task, TaskError, Template
from ntk_ensembles.tasks.evaluation import template_trajectories

TASKS: list[Task[Any, Any]] = [Permutation(12), Permutation(30, 2), Addition(4), Addition(20), Multiplication(3)]
TASKS += [Multiplication(9), SBN(8, 4), SBN(branch="nonpositive")]


@pytest.mark.parametrize("count", [1, 57, 1500])
@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_states_are_distinct_and_successors_true(task: Task[Any, Any], count: int) -> None:
    chosen = EvaluationSet.sample(task, count, seed=0)
    assert len({tuple(row) for row in chosen.states.tolist()}) == len(chosen)
    # As many as were asked for; the small tasks have fewer than 1500, but more than 57.
    assert len(chosen) == count or (count == 1500 and 57 < len(chosen) < 1500 and task_is_small(task))
    assert torch.equal(chosen.matches, task.templates.matches(chosen.states))
    assert torch.equal(chosen.next_states, task.templates.micro_step(chosen.states))


def task_is_small(task: Task[Any, Any]) -> bool:
    """Whether all its inputs are gone through: 435 words with two ones of 30 bits, 256 and 64 pairs."""
    return isinstance(task, (Permutation, Addition, Multiplication)) and len(list(task_inputs(task))) < 1000


def task_inputs(task: Task[Any, Any]) -> Iterator[Any]:
    return itertools.islice(task.inputs(random.Random(0)), 1000)


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_executions_are_whole_trajectories(task: Task[Any, Any]) -> None:
    chosen = EvaluationSet.sample(task, 700, seed=1)
    # A plain run of each input, one at a time, in the order of the inputs.
    seen: set[tuple[bool, ...]] = set()
    runs = []
    for value in itertools.islice(task.inputs(random.Random(1)), len(chosen.trajectories)):
        state = task.initial_state(value)
        run = []
        for _ in range(task.num_micro_steps(value)):
            successor = task.templates.micro_step(state[None])[0]
            run.append(tuple(state.tolist()))
            if torch.equal(successor, state):
                break
            state = successor
        seen |= set(run)
        runs.append(run)
    rows = [tuple(row) for row in chosen.states.tolist()]
    assert [[rows[i] for i in execution.tolist()] for execution in chosen.trajectories] == runs
    assert seen <= set(rows)
    assert len(chosen.trajectories) > 1


def test_the_fixed_point_is_predicted_too_where_the_machine_rests_early() -> None:
    task = Addition(4)
    chosen = EvaluationSet.sample(task, 10_000, seed=0)
    lasts = torch.tensor([int(execution[-1]) for execution in chosen.trajectories])
    assert torch.equal(chosen.states[lasts], chosen.next_states[lasts])
    one_step = EvaluationSet.sample(Permutation(6), 10_000, seed=0)
    assert all(len(execution) == 1 for execution in one_step.trajectories)


def test_small_tasks_end() -> None:
    assert len(EvaluationSet.sample(Permutation(6), 10_000, seed=0)) == 64
    addition = EvaluationSet.sample(Addition(3), 10_000, seed=0)
    assert len(addition.trajectories) == 64
    assert len(addition) < 10_000


def test_a_cut_execution_is_no_execution() -> None:
    task = Addition(10)
    third = EvaluationSet.sample(task, 500, seed=0).trajectories[2]
    needed = int(third[-1]) + 1
    assert third.tolist() == list(range(int(third[0]), needed))
    cut = EvaluationSet.sample(task, needed - 1, seed=0)
    assert len(cut) == needed - 1
    assert len(cut.trajectories) == 2
    assert len(EvaluationSet.sample(task, needed, seed=0).trajectories) == 3


def test_a_smaller_set_is_the_beginning_of_a_larger_one_and_seeds_differ() -> None:
    task = SBN(8, 5)
    small, large = (EvaluationSet.sample(task, count, seed=3) for count in (100, 1000))
    assert torch.equal(small.states, large.states[:100])
    assert not torch.equal(EvaluationSet.sample(task, 100, seed=4).states, small.states)


class Repeating(Permutation):
    """Gives the same few inputs for ever."""

    def inputs(self, generator: random.Random) -> Iterator[int]:
        return itertools.cycle(range(5))


def test_inputs_that_repeat_come_to_an_end() -> None:
    chosen = EvaluationSet.sample(Repeating(8), 100, seed=0)
    assert len(chosen) == len(chosen.trajectories) == 5


class Forgetful(Addition):
    """Lost the template that keeps the top carry."""

    def make_templates(self) -> Iterator[Template]:
        return (template for template in super().make_templates() if template.group != "keep top carry")


def test_faulty_templates_are_found_out() -> None:
    with pytest.raises(TaskError) as error:
        EvaluationSet.sample(Forgetful(3), 100, seed=0)
    # The top carry is 1 after the first micro-step, in (7, 7), and lost in the second.
    assert str(error.value) == (
        "the templates of task 'addition' are wrong: for input (7, 7) the output is 6, should be 14; bit carry[2] is "
        "wrongly 0 from micro-step 2 on: set by none of group 'carry'"
    )


class Silent(Permutation):
    """Gives no inputs."""

    def inputs(self, generator: random.Random) -> Iterator[int]:
        return iter(())


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="of 0 states: expected at least 1"):
        EvaluationSet.sample(Addition(3), 0, seed=0)
    with pytest.raises(ValueError, match="no input"):
        EvaluationSet.sample(Silent(3), 10, seed=0)


def test_trajectories_of_different_lengths() -> None:
    task = Addition(3)
    starts = torch.stack([task.initial_state(pair) for pair in [(0, 0), (7, 1), (7, 1), (1, 2)]])
    visited, finals = template_trajectories(task.templates, starts, [6, 6, 2, 0])
    # 0 + 0 rests at once; 7 + 1 carries through three bits; cut after two; not run at all.
    assert [len(states) for states in visited] == [1, 6, 2, 0]
    assert task.result(finals[1]) == 8
    assert torch.equal(finals[2], visited[1][2])
    assert torch.equal(finals[3], starts[3])
