"""A task as data: what a run keeps of it, so that nobody needs its Python to use the run's numbers."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ntk_ensembles.tasks import EvaluationSet, StateLayout, Task, TaskError, Template, TemplateSet

BITS_MAX, LABELS_MAX = 1 << 20, 1 << 32
"""Bits of a state, and templates times bits, that a recorded task may have."""

PARTS = ("ones", "zeros", "sets")
"""Tensors of a recorded task with what its templates require and set."""


class RecordedTask(Task[Any, Any]):
    """A task as a run has recorded it: state, templates and options, without its meaning.

    Whatever needs the meaning (inputs, outputs, the reference) raises a `TaskError` that says how to supply it.

    Args:
        name: Name of the task.
        options: Its options, as plain values.
        layout: Fields of its state.
        templates: Its templates.
        spec: Text that selected the task on the command line that began the run.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], layout: StateLayout, templates: TemplateSet, spec: str
    ) -> None:
        self.name = name
        self.layout = layout
        self.templates = templates
        self.spec = spec
        self._options = dict(options)

    @property
    def options(self) -> dict[str, Any]:
        """Options that the run has recorded."""
        return dict(self._options)

    def make_templates(self) -> tuple[Template, ...]:
        """Return the recorded templates."""
        return self.templates.templates

    def inputs(self, generator: random.Random) -> Iterator[Any]:
        """Raise a `TaskError`, as inputs are not recorded."""
        self._raise()

    def initial_fields(self, task_input: Any) -> dict[str, Any]:
        """Raise a `TaskError`, as the meaning of inputs is not recorded."""
        self._raise()

    def read_output(self, fields: dict[str, Any]) -> Any:
        """Raise a `TaskError`, as the meaning of outputs is not recorded."""
        self._raise()

    def reference(self, task_input: Any) -> Any:
        """Raise a `TaskError`, as the reference is not recorded."""
        self._raise()

    def num_micro_steps(self, task_input: Any) -> int:
        """Raise a `TaskError`, as the meaning of inputs is not recorded."""
        self._raise()

    def _raise(self) -> NoReturn:
        raise TaskError(
            f"what inputs and outputs of task {self.name!r} mean stands in its code, which a run directory is not "
            f"trusted to name: name it yourself (--task FILE:CLASS, in Python task=…; it was {self.spec})"
        )

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"{self.name}({options})"


def to_data(task: Task[Any, Any], evaluation: EvaluationSet) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a task's state, templates and evaluation states as tensors and texts (docs/checkpoints.md).

    Args:
        task: The task.
        evaluation: States that members are evaluated on.
    """
    layout, templates = task.layout, task.templates.templates
    tensors = {
        part: torch.tensor(
            [(row, bit) for row, template in enumerate(templates) for bit in sorted(getattr(template, part))],
            dtype=torch.int64,
        ).view(-1, 2)
        for part in PARTS
    }
    none = torch.empty(0, dtype=torch.int64)
    tensors["states"] = evaluation.states
    tensors["trajectory_states"] = torch.cat([none, *evaluation.trajectories])
    lengths = [len(states) for states in evaluation.trajectories]
    tensors["trajectory_lengths"] = torch.tensor(lengths, dtype=torch.int64)
    groups = [(name, len(list(block))) for name, block in itertools.groupby(str(t.group) for t in templates)]
    fields = [(name, len(layout[name])) for name in layout]
    return tensors, {"fields": json.dumps(fields), "groups": json.dumps(groups)}


def from_data(
    name: str, options: Mapping[str, Any], spec: str, tensors: Mapping[str, Tensor], texts: Mapping[str, str]
) -> tuple[RecordedTask, EvaluationSet]:
    """Return the task and the evaluation states that `to_data` has made tensors and texts of.

    Args:
        name: Name of the task.
        options: Its options.
        spec: Text that selected it on a command line.
        tensors: Tensors of `to_data`, of the right types and numbers of axes.
        texts: Texts of `to_data`.

    Raises:
        ValueError: They are no task's.
    """
    fields, groups = (_counts(texts.get(key, ""), key) for key in ("fields", "groups"))
    bits, count = sum(n for _, n in fields), sum(n for _, n in groups)
    # A template has a condition on a 1-bit at least, so that a file that claims many is as large.
    if count > len(tensors["ones"]) or bits > BITS_MAX or count * max(bits, len(tensors["states"])) > LABELS_MAX:
        raise ValueError(f"{count} templates of {bits} bits cannot be used")
    if len(dict(fields)) < len(fields) or any(name == "self" for name, _ in fields):
        raise ValueError("its fields have names that cannot be used")
    rows: dict[str, list[list[int]]] = {}
    for part in PARTS:
        pairs = tensors[part]
        if bool((pairs < 0).any()) or bool((pairs >= torch.tensor([count, bits])).any()):
            raise ValueError(f"{part} lie outside the {count} templates of {bits} bits")
        rows[part] = [[] for _ in range(count)]
        for row, bit in pairs.tolist():
            rows[part][row].append(bit)
    names = itertools.chain.from_iterable(itertools.repeat(group, n) for group, n in groups)
    rules = [
        Template.rule(group, ones=ones, zeros=zeros, sets=sets)
        for group, ones, zeros, sets in zip(names, *rows.values(), strict=True)
    ]
    layout = StateLayout(**dict(fields))
    task = RecordedTask(name, options, layout, TemplateSet(layout, rules), spec)
    return task, _evaluation(task.templates, tensors)


def _counts(text: str, what: str) -> list[tuple[str, int]]:
    """Return pairs of a name and a number, at least 1, from their JSON."""
    try:
        pairs = json.loads(text)
    except RecursionError:
        pairs = None
    if not isinstance(pairs, list) or not pairs or len(pairs) > BITS_MAX:
        raise ValueError(f"its {what} are no list of names and numbers")
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is str and type(pair[1]) is int):
            raise ValueError(f"its {what} are no list of names and numbers")
        if not 1 <= pair[1] <= BITS_MAX:
            raise ValueError(f"its {what} have a number outside 1 to {BITS_MAX}")
    return [(name, number) for name, number in pairs]


def _evaluation(templates: TemplateSet, tensors: Mapping[str, Tensor]) -> EvaluationSet:
    states, steps, lengths = (tensors[key] for key in ("states", "trajectory_states", "trajectory_lengths"))
    if not len(states) or states.shape[1] != templates.layout.bits:
        raise ValueError(f"its evaluation states are {len(states)} of {states.shape[1]} bits")
    if bool((lengths < 1).any()) or bool((lengths > len(steps)).any()) or int(lengths.sum()) != len(steps):
        raise ValueError("the lengths of its trajectories do not add up")
    if bool((steps < 0).any()) or bool((steps >= len(states)).any()):
        raise ValueError("its trajectories have states that are not there")
    evaluation = EvaluationSet.of_states(templates, states, torch.split(steps, lengths.tolist()))
    for trajectory in evaluation.trajectories:
        if not torch.equal(evaluation.next_states[trajectory[:-1]], states[trajectory[1:]]):
            raise ValueError("its trajectories are not the templates'")
    return evaluation
