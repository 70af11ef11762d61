"""The states on which ensembles are judged: true trajectories of true inputs (DESIGN §4, teacher forcing)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ntk_ensembles.tasks.base import Task
from ntk_ensembles.tasks.templates import TemplateSet

_INPUTS_AT_ONCE = 32
_STATES_AT_ONCE = 4096
_FRUITLESS_INPUTS = 1000
"""After so many inputs in a row without a new state the inputs are taken to repeat."""

InputT = TypeVar("InputT")


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Distinct states from true trajectories with their true next_states.

    Attributes:
        states: the states, in the order in which they were first seen.
        matches: which templates match each state.
        next_states: the state after one micro-step.
        trajectories: for each complete execution the indices of its states, in order. An execution
            is right if and only if the prediction for each of them is.
    """

    states: Bool[Tensor, "states bits"]
    matches: Bool[Tensor, "states templates"]
    next_states: Bool[Tensor, "states bits"]
    trajectories: tuple[Int[Tensor, " _steps"], ...]

    def __len__(self) -> int:
        """The number of states."""
        return len(self.states)

    @classmethod
    def sample(cls, task: Task[InputT, Any], count: int, seed: int) -> EvaluationSet:
        """The first ``count`` distinct states of the task's inputs, in the order of `Task.inputs`.

        An execution that would lead beyond ``count`` is cut: its states stay, but it does not count
        among ``trajectories``. There are fewer than ``count`` states if the inputs end, or repeat.

        Raises:
            ValueError: ``count`` below 1, or a task without inputs.
            RuntimeError: an execution's output is not the task's reference: its templates are wrong.
        """
        if count < 1:
            raise ValueError(f"an evaluation set of {count} states: expected at least 1")
        index: dict[bytes, int] = {}
        trajectories: dict[tuple[bytes, int], Int[Tensor, " _steps"]] = {}
        states: list[Bool[Tensor, " bits"]] = []
        fruitless = 0
        inputs = task.inputs(random.Random(seed))
        while len(states) < count and fruitless < _FRUITLESS_INPUTS:
            batch = _next_batch(task, inputs, count - len(states))
            if not batch:
                break
            for trajectory in _trajectories(task, batch):
                known = len(states)
                keys = [row.tobytes() for row in np.packbits(trajectory.numpy(), axis=1)]
                for key, state in zip(keys, trajectory, strict=True):
                    if key not in index and len(states) < count:
                        index[key] = len(states)
                        states.append(state)
                if keys and all(key in index for key in keys):
                    # Equal starts have equal trajectories, as far as they go.
                    trajectories.setdefault((keys[0], len(keys)), torch.tensor([index[key] for key in keys]))
                fruitless = 0 if len(states) > known else fruitless + 1
                if len(states) == count:
                    break
        if not states:
            raise ValueError(f"task {task.name!r} gives no input to evaluate on")
        stacked = torch.stack(states)
        chunks = [slice(start, start + _STATES_AT_ONCE) for start in range(0, len(stacked), _STATES_AT_ONCE)]
        matches = torch.cat([task.templates.matches(stacked[chunk]) for chunk in chunks])
        next_states = torch.cat([task.templates.counts(matches[chunk]) > 0 for chunk in chunks])
        return cls(stacked, matches, next_states, tuple(trajectories.values()))


def trajectories(
    templates: TemplateSet, starts: Bool[Tensor, "inputs bits"], micro_steps: Sequence[int]
) -> tuple[list[Bool[Tensor, "_steps bits"]], Bool[Tensor, "inputs bits"]]:
    """The OR-machine run on several inputs at once, each until a fixed point or for its micro-steps.

    Returns:
        For each input the states that a micro-step was made from, a fixed point included once; and
        the final states.
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
        going_on = [row for row, i in enumerate(active) if not fixed[row] and len(visited[i]) < micro_steps[i]]
        active = [active[row] for row in going_on]
        states = next_states[going_on]
    empty = starts.new_zeros((0, starts.shape[1]))
    return [torch.stack(rows) if rows else empty for rows in visited], finals


def _next_batch(task: Task[InputT, Any], inputs: Iterator[InputT], wanted: int) -> list[InputT]:
    """The inputs to run next: no more of them than it may take to find ``wanted`` states."""
    batch: list[InputT] = []
    for value in itertools.islice(inputs, _INPUTS_AT_ONCE):
        batch.append(value)
        wanted -= task.micro_steps(value)
        if wanted <= 0:
            break
    return batch


def _trajectories(task: Task[InputT, Any], values: list[InputT]) -> Iterator[Bool[Tensor, "_steps bits"]]:
    """Each input's trajectory, once its output has been compared with the task's reference."""
    starts = torch.stack([task.layout.pack(task.fields(value)) for value in values])
    visited, finals = trajectories(task.templates, starts, [task.micro_steps(value) for value in values])
    for value, trajectory, final in zip(values, visited, finals, strict=True):
        output, expected = task.output(task.layout.unpack(final)), task.reference(value)
        if output != expected:
            raise RuntimeError(
                f"the templates of task {task.name!r} are wrong: from {value!r} they lead to {output!r}, "
                f"the reference is {expected!r}"
            )
        yield trajectory
