"""Evaluation states: distinct states on the reference trajectories of sampled inputs (teacher forcing)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ntk_ensembles.errors import check_seed
from ntk_ensembles.tasks.base import Task, TaskError, user_code
from ntk_ensembles.templates import TemplateSet

_INPUTS_AT_ONCE = 32
_STATES_AT_ONCE = 4096
_FRUITLESS_INPUTS = 1000
"""Number of inputs in a row without a new state after which the inputs are taken to repeat."""

InputT = TypeVar("InputT")


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Distinct states on reference trajectories, with their true next states.

    Attributes:
        states: States in the order in which they were first seen.
        matches: Templates that match each state.
        next_states: State after one micro-step of the template machine.
        trajectories: For each complete trajectory the indices of its states, in order. A rollout from its first state
            is right if and only if the prediction for each of them is.
    """

    states: Bool[Tensor, "states bits"]
    matches: Bool[Tensor, "states templates"]
    next_states: Bool[Tensor, "states bits"]
    trajectories: tuple[Int[Tensor, " _steps"], ...]

    def __len__(self) -> int:
        """Return the number of states."""
        return len(self.states)

    @classmethod
    def sample(cls, task: Task[InputT, Any], count: int, seed: int) -> EvaluationSet:
        """Take the first ``count`` distinct states on the trajectories of the task's inputs, in their order.

        A trajectory that would lead beyond ``count`` is cut: its states stay, but it is not among ``trajectories``.
        There are fewer than ``count`` states if the inputs end, or repeat.

        Args:
            task: Task whose `Task.inputs` are used.
            count: Number of states wanted, at least 1.
            seed: Seed of the random inputs, 0 to 2^63 - 1.

        Raises:
            ValueError: ``count`` is below 1, or ``seed`` outside its range.
            TaskError: The task has no inputs, its code fails, or its templates do not lead to its reference.
        """
        if count < 1:
            raise ValueError(f"an evaluation set of {count} states: expected at least 1")
        check_seed("seed", seed)
        index: dict[bytes, int] = {}
        complete: dict[tuple[bytes, int], Int[Tensor, " _steps"]] = {}
        states: list[Bool[Tensor, " bits"]] = []
        fruitless = 0
        inputs = checked_inputs(task, seed)
        while len(states) < count and fruitless < _FRUITLESS_INPUTS:
            batch = _next_batch(task, inputs, count - len(states))
            if not batch:
                break
            for trajectory in _checked_trajectories(task, batch):
                known = len(states)
                keys = [row.tobytes() for row in np.packbits(trajectory.numpy(), axis=1)]
                for key, state in zip(keys, trajectory, strict=True):
                    if key not in index and len(states) < count:
                        index[key] = len(states)
                        states.append(state)
                if keys and all(key in index for key in keys):
                    # Equal starts have equal trajectories, as far as they go.
                    complete.setdefault((keys[0], len(keys)), torch.tensor([index[key] for key in keys]))
                fruitless = 0 if len(states) > known else fruitless + 1
                if len(states) == count:
                    break
        if not states:
            raise TaskError(f"task {task.name!r} gives no input to evaluate on")
        return cls.of_states(task.templates, torch.stack(states), tuple(complete.values()))

    @classmethod
    def of_states(
        cls,
        templates: TemplateSet,
        states: Bool[Tensor, "states bits"],
        trajectories: tuple[Int[Tensor, " _steps"], ...],
    ) -> EvaluationSet:
        """Return given states as an evaluation set.

        Args:
            templates: Templates of the task.
            states: Distinct states on trajectories, at least one.
            trajectories: Indices of the states of each complete trajectory.
        """
        chunks = [slice(start, start + _STATES_AT_ONCE) for start in range(0, len(states), _STATES_AT_ONCE)]
        matches = torch.cat([templates.matches(states[chunk]) for chunk in chunks])
        next_states = torch.cat([templates.set_counts(matches[chunk]) > 0 for chunk in chunks])
        return cls(states, matches, next_states, trajectories)


def checked_inputs(task: Task[InputT, Any], seed: int) -> Iterator[InputT]:
    """Yield the task's inputs; what its code raises becomes a `TaskError`."""
    with user_code(task.name, "inputs"):
        yield from task.inputs(random.Random(seed))


def template_trajectories(
    templates: TemplateSet, starts: Bool[Tensor, "inputs bits"], micro_steps: Sequence[int]
) -> tuple[list[Bool[Tensor, "_steps bits"]], Bool[Tensor, "inputs bits"]]:
    """Run the template machine on several inputs at once, each until a fixed point or for its micro-steps.

    Returns:
        For each input the states that a micro-step was made from, a fixed point included once; and the final states.
    """
    visited: list[list[Bool[Tensor, " bits"]]] = [[] for _ in micro_steps]
    finals = starts.clone()
    active = [i for i, limit in enumerate(micro_steps) if limit > 0]
    states = starts[active]
    while active:
        next_states = templates.micro_step(states)
        finals[active] = next_states
        fixed = (next_states == states).all(1).tolist()
        for i, state in zip(active, states, strict=True):
            visited[i].append(state)
        unfinished = [row for row, i in enumerate(active) if not fixed[row] and len(visited[i]) < micro_steps[i]]
        active = [active[row] for row in unfinished]
        states = next_states[unfinished]
    empty = starts.new_zeros((0, starts.shape[1]))
    return [torch.stack(rows) if rows else empty for rows in visited], finals


def num_micro_steps(task: Task[InputT, Any], task_input: InputT) -> int:
    """Return the task's number of micro-steps for an input.

    Raises:
        TaskError: The task's code fails, or what it returns is no integer of at least 0.
    """
    with user_code(task.name, "num_micro_steps", task_input):
        steps = task.num_micro_steps(task_input)
        if operator.index(steps) < 0:
            raise ValueError(f"{steps} micro-steps: expected at least 0")
    return operator.index(steps)


def is_right(task: Task[InputT, Any], task_input: InputT, final: Bool[Tensor, " bits"]) -> bool:
    """Check whether a final state holds the reference's output."""
    output = task.result(final)
    with user_code(task.name, "reference", task_input):
        return bool(output == task.reference(task_input))


def describe_fault(task: Task[InputT, Any], task_input: InputT) -> str:
    """Return a wrong output, the right one, and which templates are most likely at fault, as a part of a sentence.

    A reference knows the output alone. So the bit that is named is the one whose flip in the final state brings the
    output nearest to the right one; none is named if no flip brings it nearer.
    """
    templates, expected = task.templates, task.reference(task_input)
    limit = num_micro_steps(task, task_input)
    (states,), finals = template_trajectories(templates, task.initial_state(task_input)[None], [limit])
    output = task.result(finals[0])
    said = f"the output is {output!r}, should be {expected!r}"
    nearest, bit = _distance(output, expected), None
    for position in range(templates.layout.bits):
        flipped = finals[0].clone()
        flipped[position] = ~flipped[position]
        try:
            distance = _distance(task.result(flipped), expected)
        except TaskError:
            continue  # no state that the task can read
        if distance < nearest:
            nearest, bit = distance, position
    if bit is None or not len(states):
        return said
    value = bool(finals[0, bit])
    others = (states[:, bit] != value).nonzero()
    # The micro-step that gave the bit its value, and the state before it.
    moment = int(others[-1]) if len(others) else 0
    setters = [templates.templates[index] for index in templates.setters[bit]]
    guilty = Counter(t.group for t in setters if not value or t.matches(states[moment]))
    groups = ", ".join(f"'{group}'" for group in guilty)
    cause = f"set by group {groups}" if value else f"set by none of group {groups}" if guilty else "no template sets it"
    name = templates.layout.bit_name(bit)
    return f"{said}; bit {name} is wrongly {int(value)} from micro-step {moment + 1} on: {cause}"


def _next_batch(task: Task[InputT, Any], inputs: Iterator[InputT], wanted: int) -> list[InputT]:
    """Return the inputs to run next: no more than it may take to find ``wanted`` states."""
    batch: list[InputT] = []
    for task_input in itertools.islice(inputs, _INPUTS_AT_ONCE):
        batch.append(task_input)
        wanted -= num_micro_steps(task, task_input)
        if wanted <= 0:
            break
    return batch


def _checked_trajectories(task: Task[InputT, Any], inputs: list[InputT]) -> Iterator[Bool[Tensor, "_steps bits"]]:
    """Yield each input's trajectory, once its output has been compared with the task's reference."""
    starts = torch.stack([task.initial_state(task_input) for task_input in inputs])
    limits = [num_micro_steps(task, task_input) for task_input in inputs]
    visited, finals = template_trajectories(task.templates, starts, limits)
    for task_input, trajectory, final in zip(inputs, visited, finals, strict=True):
        if not is_right(task, task_input, final):
            fault = describe_fault(task, task_input)
            raise TaskError(f"the templates of task {task.name!r} are wrong: for input {task_input!r} {fault}")
        yield trajectory


def _distance(output: Any, expected: Any) -> float:
    """Return how much two outputs differ: the number of different bits of the integers in them."""
    if isinstance(output, int) and isinstance(expected, int):
        return float((output ^ expected).bit_count())
    if dataclasses.is_dataclass(output) and type(output) is type(expected):
        output, expected = tuple(vars(output).values()), tuple(vars(expected).values())
    if isinstance(output, (list, tuple)) and isinstance(expected, (list, tuple)) and len(output) == len(expected):
        return sum((_distance(*pair) for pair in zip(output, expected, strict=True)), 0.0)
    return 0.0 if output == expected else math.inf
