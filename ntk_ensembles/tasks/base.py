"""What a task declares; everything else in the package is derived from this."""

from __future__ import annotations

import inspect
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from ntk_ensembles.tasks.layout import StateLayout
from ntk_ensembles.tasks.templates import Template, TemplateSet

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


class Task(ABC, Generic[InputT, OutputT]):
    """A fixed-size binary machine, given by templates, beside its meaning in plain integers.

    A subclass is one file in this folder plus a line in the registry. Its constructor's arguments
    become the task's command-line options, their docstrings the help; it checks them (`check_range`)
    and sets `layout`.
    """

    name: ClassVar[str]
    """The word after ``--task``."""

    layout: StateLayout
    """The fields of the state."""

    @abstractmethod
    def rules(self) -> Iterable[Template]:
        """The templates, one block a rule."""

    @abstractmethod
    def inputs(self, generator: random.Random) -> Iterator[InputT]:
        """Inputs to evaluate on: structured ones first (corner cases, real programs), then random.

        May end (small tasks enumerate everything) or go on for ever; the caller stops. All
        randomness comes from ``generator``.
        """

    @abstractmethod
    def fields(self, value: InputT) -> dict[str, int]:
        """The initial state for an input, field by field."""

    @abstractmethod
    def output(self, fields: dict[str, int]) -> OutputT:
        """What a final state says."""

    @abstractmethod
    def reference(self, value: InputT) -> OutputT:
        """The right output, by plain Python integers (never by templates)."""

    @abstractmethod
    def micro_steps(self, value: InputT) -> int:
        """After so many micro-steps at most the output stands (it may stand earlier, as a fixed point)."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Task[InputT, OutputT]:
        """The task with these `options`.

        Raises:
            ValueError: an option that the task does not have, or outside its range.
        """
        try:
            return cls(**options)
        except TypeError as error:
            raise ValueError(f"task {cls.name!r} cannot be made from {dict(options)}: {error}") from None

    @cached_property
    def templates(self) -> TemplateSet:
        """The compiled templates."""
        return TemplateSet(self.layout, self.rules())

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments with their values, as recorded in a run's results."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options})"


def check_range(argument: str, value: int, low: int, high: int) -> None:
    """Refuse an option outside ``low..high``, in the words of its flag.

    Raises:
        ValueError: names the argument, the value and the accepted range.
    """
    if not low <= value <= high:
        raise ValueError(f"--{argument.replace('_', '-')} {value}: expected an integer from {low} to {high}")
