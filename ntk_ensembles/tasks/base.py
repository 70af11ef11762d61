"""What a task declares: everything that the package needs to know about an algorithm."""

from __future__ import annotations

import inspect
import random
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from ntk_ensembles.errors import OptionError
from ntk_ensembles.templates import StateLayout, Template, TemplateSet

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")
T = TypeVar("T")

Number: TypeAlias = int | NDArray[np.int64]
"""An integer, or an array with one for each input (`Task.takes_arrays`)."""

ENUMERABLE_INPUTS = 1 << 16
"""Largest number of inputs that `structured_first` yields all of."""

LISTED_INPUTS = 1 << 24
"""Largest number of inputs that the package's tasks list in `Task.all_inputs`: all pairs of 12 bits."""


class TaskError(ValueError):
    """A task whose code fails, or whose templates do not lead to its reference."""


class Task(ABC, Generic[InputT, OutputT]):
    """A fixed-size binary machine given by templates, beside its meaning in plain integers.

    A subclass is one file. Its constructor's arguments become the task's command-line options and their docstrings
    the help; it checks them (`check_range`), keeps them as attributes of the same names, and sets `layout`.
    """

    name: str
    """Name of the task, in results and messages."""

    takes_arrays: ClassVar[bool] = False
    """Whether all methods that take an input or fields accept int64 arrays, one element for each input, in place of the
    integers; the inputs are integers or tuples of integers then. `validate` runs such a task much faster."""

    layout: StateLayout
    """Fields of the state."""

    @abstractmethod
    def make_templates(self) -> Iterable[Template]:
        """Return the templates in training-set order, block by block."""

    @abstractmethod
    def inputs(self, generator: random.Random) -> Iterator[InputT]:
        """Yield inputs to evaluate on: structured ones first (corner cases, real programs), then random ones.

        May end (small tasks enumerate everything) or go on for ever; the caller stops.

        Args:
            generator: Source of all randomness.
        """

    def all_inputs(self) -> Iterable[InputT] | None:
        """Return every input of the task, each once; None if they are too many to list."""
        return None

    @abstractmethod
    def initial_fields(self, task_input: InputT) -> dict[str, Any]:
        """Return the integer fields of the state that an input starts from; fields left out are 0."""

    @abstractmethod
    def read_output(self, fields: dict[str, Any]) -> OutputT:
        """Return the task's output, read from the integer fields of a final state."""

    @abstractmethod
    def reference(self, task_input: InputT) -> OutputT:
        """Return the right output, computed by plain arithmetic (never by templates)."""

    @abstractmethod
    def num_micro_steps(self, task_input: InputT) -> int:
        """Return the number of micro-steps after which the output can be read.

        An upper bound is enough where the final state is a fixed point: a trajectory that reaches it earlier stays.
        """

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Task[InputT, OutputT]:
        """Make the task from saved options.

        Raises:
            ValueError: There is an option that the task does not have, or one outside its range.
            TaskError: The constructor fails otherwise.
        """
        known = inspect.signature(cls).parameters
        if unknown := [name for name in options if name not in known]:
            raise OptionError(unknown[0], options[unknown[0]], f"an option of task {cls.name!r}: {', '.join(known)}")
        try:
            return cls(**options)
        except ValueError:
            raise
        except Exception as error:
            raise TaskError(f"task {cls.name!r}: the constructor fails with {describe_error(error)}") from error

    @cached_property
    def templates(self) -> TemplateSet:
        """The compiled templates."""
        with user_code(self.name, "make_templates"):
            return TemplateSet(self.layout, self.make_templates())

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments with their values, as saved in a run's results."""
        names = inspect.signature(type(self)).parameters
        if lost := [name for name in names if not hasattr(self, name)]:
            raise TaskError(
                f"task {self.name!r}: the constructor has to keep its argument {lost[0]} as an attribute of that name"
            )
        return {name: getattr(self, name) for name in names}

    def initial_state(self, task_input: InputT) -> Bool[Tensor, " bits"]:
        """Return the state that an input starts from."""
        with user_code(self.name, "initial_fields", task_input):
            return self.layout.pack(self.initial_fields(task_input))

    def result(self, state: Bool[Tensor, " bits"]) -> OutputT:
        """Return the output that a final state holds."""
        with user_code(self.name, "read_output"):
            return self.read_output(self.layout.unpack(state))

    def encode(self, inputs: Sequence[InputT]) -> Float[Tensor, "inputs templates"]:
        """Return the encoded initial states of inputs, as a network takes them, in torch's default dtype."""
        if not inputs:
            return torch.zeros(0, len(self.templates))
        states = torch.stack([self.initial_state(task_input) for task_input in inputs])
        return self.templates.encode(self.templates.matches(states)).to(torch.get_default_dtype())

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({options})"


_NOTHING = object()


@contextmanager
def user_code(task: str, what: str, task_input: object = _NOTHING) -> Iterator[None]:
    """Turn any exception of a task's own code into a `TaskError` of one line, except `TaskError` and `OptionError`.

    Args:
        task: Name of the task, for the message.
        what: Method that is called, for the message.
        task_input: Input that it is called with, if any, for the message.

    Raises:
        TaskError: The code in the block fails.
    """
    try:
        yield
    except (TaskError, OptionError):
        raise
    except Exception as error:
        given = "" if task_input is _NOTHING else f" of input {task_input!r}"
        raise TaskError(f"task {task!r}: {what}{given} fails with {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """Return an exception's type, text, file and line as one line."""
    # The last line of a file that is neither this package's nor an installed library's: the user's.
    others = ("<", str(Path(__file__).parents[1]), sys.prefix, sys.base_prefix)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(others)]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def structured_first(
    structured: Iterable[T],
    *,
    size: int,
    every: Callable[[], Iterable[T]],
    draw: Callable[[], T],
    generator: random.Random,
) -> Iterator[T]:
    """Yield the structured inputs, once each, then every other input in a shuffled order, or random ones for ever.

    Args:
        structured: Inputs to begin with.
        size: Number of inputs that exist; beyond `ENUMERABLE_INPUTS` they are drawn, not listed.
        every: Function that lists all inputs.
        draw: Function that draws one input.
        generator: Source of the order.
    """
    first = dict.fromkeys(structured)
    yield from first
    if size <= ENUMERABLE_INPUTS:
        rest = [task_input for task_input in every() if task_input not in first]
        generator.shuffle(rest)
        yield from rest
        return
    while True:
        yield draw()


class AllNumbers(Sequence[Any]):
    """All numbers of some bits, or all tuples of them; the first of a tuple varies fastest.

    Args:
        bits: Number of bits of each.
        operands: Number of numbers in a tuple; with 1 the inputs are the numbers themselves.
        positions: Positions in the whole sequence that this part holds; by default all.
    """

    def __init__(self, bits: int, operands: int = 1, positions: range | None = None) -> None:
        self._bits, self._operands = bits, operands
        self._positions = range(1 << bits * operands) if positions is None else positions

    def __len__(self) -> int:
        """Return the number of inputs."""
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        """Return an input, or a part of the sequence."""
        if isinstance(index, slice):
            return AllNumbers(self._bits, self._operands, self._positions[index])
        return self._inputs(self._positions[index])

    def arrays(self) -> Any:
        """Return all inputs at once, with an array in place of every integer."""
        return self._inputs(np.arange(self._positions.start, self._positions.stop, dtype=np.int64))

    def _inputs(self, positions: Number) -> Any:
        mask = (1 << self._bits) - 1
        numbers = tuple(positions >> self._bits * operand & mask for operand in range(self._operands))
        return numbers if self._operands > 1 else numbers[0]


def alternating_bits(bits: int) -> tuple[int, int]:
    """Return the ``bits``-bit numbers …0101 and …1010."""
    return sum(1 << i for i in range(0, bits, 2)), sum(1 << i for i in range(1, bits, 2))


def random_operand(generator: random.Random, bits: int) -> int:
    """Draw a number below 2^bits: uniform, or of uniformly random bit length, with equal chances.

    Uniform draws alone nearly always have about the full length: carries would start at many bits and rarely run far.
    """
    return generator.getrandbits(bits if generator.random() < 0.5 else generator.randint(0, bits))
