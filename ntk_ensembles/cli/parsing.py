"""Command lines from dataclasses and constructors, and the options that several commands have.

Arguments become flags, their docstrings the help. A dataclass of options checks itself when it is made, and raises
`OptionError` for an option outside its range.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import docstring_parser
from jsonargparse import ArgumentParser
from rich.console import Console

import ntk_ensembles
from ntk_ensembles.cli.main import suggestion
from ntk_ensembles.console import console
from ntk_ensembles.errors import OptionError, check_choice, check_range, check_seed
from ntk_ensembles.files import read_options
from ntk_ensembles.runs import Experiment, RecordedTask
from ntk_ensembles.tasks import TASKS, load_task_class
from ntk_ensembles.theory import DECODERS, LAYERS, PADDING_MAX, Decoder, Layers

OptionsT = TypeVar("OptionsT")

_TASK_WORDS = (*TASKS, "file.py:Class")
"""What ``--task`` can be, in words for the help and for errors."""


class Parser(ArgumentParser):
    """Parser that takes flags with dashes and unabbreviated, and raises its errors for `command` to print.

    Args:
        prog: Name of the command for usage and messages.
        description: Sentences that say what the command does.
        epilog: Sentences to end the help with.
    """

    def __init__(self, prog: str, description: str = "", epilog: str | None = None) -> None:
        # An abbreviation that works today is another option's tomorrow.
        settings: dict[str, Any] = {"allow_abbrev": False, "exit_on_error": False}
        super().__init__(
            prog=prog, description=description, epilog=epilog, version=ntk_ensembles.__version__, **settings
        )
        self._kinds: dict[str, _Kind] = {}

    def format_help(self, *arguments: Any, **settings: Any) -> str:
        """Return the help, with flags in the spelling with dashes alone."""
        text: str = super().format_help(*arguments, **settings)
        return re.sub(r", --\w*_\w*( \S+)?$", "", text, flags=re.MULTILINE)

    def add_options(self, source: type[Any], **defaults: Any) -> None:
        """Add a flag for each argument of a constructor.

        Args:
            source: Dataclass or other class. The annotations say what the flags accept, the docstrings of attributes
                and arguments are the help, and a bool that is False by default becomes a switch.
            **defaults: Defaults to use instead of the constructor's.
        """
        title, helps = _documentation(source)
        group = self.add_argument_group(title)
        annotations = typing.get_type_hints(source if dataclasses.is_dataclass(source) else source.__init__)
        for name, parameter in inspect.signature(source).parameters.items():
            annotation, default = annotations.get(name, Any), defaults.get(name, parameter.default)
            settings: dict[str, Any] = {"help": helps.get(name), "default": default}
            if default is inspect.Parameter.empty:
                settings |= {"required": True, "default": None}
            kind = _Kind.of(annotation, optional=default is None)
            if annotation is bool and default is False:
                settings |= {"action": "store_const", "const": True}
            else:
                # A kind is not left to jsonargparse, whose errors speak of Python's types and name no flag.
                settings |= {"type": annotation} if kind is None else {"metavar": kind.metavar}
            if kind is not None:
                self._kinds[name] = kind
            # Underscores are accepted too, as in a file of options.
            group.add_argument(*dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")), **settings)

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the value of every argument by its name.

        Args:
            arguments: Arguments of the command line.

        Raises:
            OptionError: A value is of another kind than its option takes.
            argparse.ArgumentError: The arguments cannot be parsed.
        """
        try:
            values = vars(self.parse_args(list(arguments)))
        except argparse.ArgumentError as error:
            known = set(re.findall(r"--[a-z-]+", self.format_help()))
            unknown = {flag.replace("_", "-") for flag in re.findall(r"--[\w-]+", str(error))} - known
            hints = [hint for flag in sorted(unknown) if (hint := suggestion(flag, known))]
            raise argparse.ArgumentError(None, f"{error}{''.join(hints[:1])}") from error
        values.pop("config", None)
        return {
            name: self._kinds[name].read(name, value) if name in self._kinds else value
            for name, value in values.items()
        }


def parse_task(
    arguments: Sequence[str],
    prog: str,
    description: str,
    options: type[OptionsT],
    find: Callable[[str], type[Any]] = load_task_class,
    saved: Experiment | None = None,
) -> tuple[Any, OptionsT, dict[str, Any]]:
    """Parse a command line whose flags depend on the task that ``--task`` names.

    Flags take precedence over YAML files named by ``--config``, and later files over earlier ones.

    Args:
        arguments: Arguments of the command line.
        prog: Name of the command for usage and messages.
        description: Sentences that say what the command does, for ``--help``.
        options: Dataclass of the options that are the same for all tasks.
        find: Function from the word after ``--task`` to a class; raises ValueError where there is none.
        saved: Experiment of the run to resume, whose task and options are the defaults. A user's own task is then
            executed only if the command line names it again.

    Returns:
        The task (an instance of the class), the options, and all values by name, ``task`` (the word) first.

    Raises:
        ValueError: A file, the task or an option cannot be used.
        argparse.ArgumentError: The arguments cannot be parsed.
    """
    asked = first_look(arguments)
    named = asked.task is not None
    if not named and saved is not None and not isinstance(saved.task, RecordedTask):
        asked.task = saved.task_spec
    parser = Parser(prog, description)
    parser.add_argument("--config", action="config", help="A YAML file of options by name, such as configs/*.yaml.")
    parser.add_argument("--task", type=str, metavar=f"{{{','.join(_TASK_WORDS)}}}", help="Which algorithm.")
    if asked.task is None and saved is None:
        parser.add_options(options)
        parser.epilog = f"Each task has options of its own: {prog} --task NAME --help shows them."
        parser.parse(asked.information)
        raise ValueError(f"--task: expected one of {', '.join(_TASK_WORDS)} (see {prog} --help)")
    chosen: type[Any] | None = None
    own: Mapping[str, object] = {}
    shared = inspect.signature(options).parameters
    if asked.task is not None:
        with _users_code(asked.task):
            chosen = find(asked.task)
            own = inspect.signature(chosen).parameters
            parser.add_options(chosen, **({} if saved is None else saved.task.options))
    if clash := ", ".join(sorted(own.keys() & shared.keys())):
        raise ValueError(f"--task {asked.task}: options {clash} belong to {prog} too; rename the task's")
    parser.add_options(options, **({} if saved is None else vars(saved.options)))
    for path, config in asked.config.items():
        for name in config.keys() - {"task", *own, *shared}:
            raise ValueError(f"{path}: there is no option {name}{suggestion(name, [*own, *shared])}")
    values = parser.parse(arguments)
    own_values, shared_values = ({name: values[name] for name in part} for part in (own, shared))
    if saved is not None and not named and own_values == (saved.task.options if chosen else {}):
        task = saved.task
    else:
        assert chosen is not None
        with _users_code(asked.task):
            task = chosen(**own_values)
    return task, options(**shared_values), {"task": asked.task, **own_values, **shared_values}


def read_integers(name: str, text: str) -> list[int]:
    """Return the integers of a list such as 1,8,64, each once, ascending.

    Args:
        name: Name of the option.
        text: What the user wrote.

    Raises:
        OptionError: It is no such list.
    """
    if (numbers := _integers(text)) is None:
        raise OptionError(name, text, _INTEGERS)
    return sorted(set(numbers))


def _integers(value: object) -> list[int] | None:
    """Return integers in the order in which they are written, as text or as a list in a file; None if they are not."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list):
        return None
    numbers = [_Kind(int).convert(part) for part in parts]
    return None if None in numbers else numbers


def check_file(argument: str, name: str | None) -> None:
    """Check that a file can be written where an option wants it, before there is anything to write.

    Args:
        argument: Name of the option.
        name: Path of the file; None where none is wanted.

    Raises:
        OptionError: It is a directory, or in none that exists and can be written.
    """
    if name is not None and (Path(name).is_dir() or not os.access(Path(name).parent, os.W_OK | os.X_OK)):
        raise OptionError(argument, name, "a file, in a directory that exists and can be written")


def first_look(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse what decides which other options there are.

    Args:
        arguments: Arguments of the command line.

    Returns:
        ``task``, the word after ``--task`` or else in the last file that has one, or None; ``config``, the content of
        every file by its path; ``resume``, a directory, or None; ``information``, ``["--help"]``, ``["--version"]``,
        or nothing.

    Raises:
        ValueError: A file cannot be used.
        argparse.ArgumentError: One of the flags has no value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--task", "--resume"):
        parser.add_argument(flag)
    parser.add_argument("--config", action="append", default=[])
    for flags in (("-h", "--help"), ("--version",)):
        parser.add_argument(*flags, action="append_const", dest="information", const=flags[-1], default=[])
    asked = parser.parse_known_args(list(arguments))[0]
    asked.config = {path: read_options(Path(path)) for path in asked.config}
    for config in asked.config.values() if asked.task is None else ():
        asked.task = str(config["task"]) if "task" in config else asked.task
    return asked


@contextmanager
def _users_code(word: str) -> Iterator[None]:
    """Raise ValueError for anything that goes wrong in a task's class, which a user may have written."""
    try:
        yield
    except ValueError as error:
        hint = "" if word in _TASK_WORDS else suggestion(word, _TASK_WORDS)
        if isinstance(error, OptionError):
            raise OptionError(error.argument, error.value, f"{error.expected}{hint}") from error
        raise ValueError(f"{error}{hint}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"--task {word}: fails with {type(error).__name__}: {error}") from error


_INTEGERS = "integers separated by commas"
_EXPECTED: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: _INTEGERS,
}


@dataclass(frozen=True)
class _Kind:
    """Kind of value that an option takes, from a command line, where all is text, or from a file.

    Attributes:
        type: Type of the value; a list is one of integers.
        choices: Words that it can be, if it can be no others.
        optional: Whether it can be None, which a command line writes as ``none``, unless any text can be meant.
    """

    type: type[Any]
    choices: tuple[str, ...] = ()
    optional: bool = False

    @classmethod
    def of(cls, annotation: Any, optional: bool) -> _Kind | None:
        """Return the kind for an annotation, or None for one that jsonargparse has to read, such as a list."""
        types_ = [annotation]
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            types_ = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        choices = typing.get_args(types_[0]) if typing.get_origin(types_[0]) is Literal else ()
        found = list if types_[0] in (list[int], Sequence[int]) else types_[0]
        if len(types_) > 1 or not (choices or found in _EXPECTED):
            return None
        return cls(str if choices else found, choices, optional or types_ != [annotation])

    @property
    def metavar(self) -> str:
        """Words for the help."""
        if self.choices:
            return f"{{{','.join(self.choices)}}}"
        return "INT,INT,…" if self.type is list else self.type.__name__.upper()

    def read(self, name: str, value: object) -> object:
        """Return a value of this kind.

        Args:
            name: Name of the option.
            value: Text, or what YAML has made of it.

        Raises:
            OptionError: The value is of another kind.
        """
        is_text = self.type is str and not self.choices
        if self.optional and (value is None or (value == "none" and not is_text)):
            return None
        converted = self.convert(value)
        if self.choices and converted not in self.choices:
            expected = f"one of {', '.join(self.choices)}{suggestion(str(value), self.choices)}"
            raise OptionError(name, value, expected)
        if converted is None:
            raise OptionError(name, value, _EXPECTED[self.type])
        return converted

    def convert(self, value: object) -> Any:
        """Return a value of this kind, or None if it is of another; whether it is a choice is not checked."""
        if self.type is list:
            return _integers(value)
        if self.type is bool:
            return {"true": True, "false": False}.get(str(value).lower())
        # A bool is an integer to Python, and int() would cut 3.5 to 3.
        if isinstance(value, bool) or not isinstance(value, (str, int, self.type)):
            return None
        try:
            return self.type(value)
        except (ValueError, OverflowError):
            return None


def _documentation(source: type[Any]) -> tuple[str, dict[str, str]]:
    """Return the first sentence of a class, and what it and its bases say of their arguments and attributes."""
    helps: dict[str, str] = {}
    for part in reversed(inspect.getmro(source)):
        if part is source or dataclasses.is_dataclass(part):
            entries = docstring_parser.parse_from_object(part).params
            helps |= {entry.arg_name: entry.description or "" for entry in entries}
    return (inspect.getdoc(source) or source.__name__).partition("\n")[0].rstrip("."), helps


@dataclass(frozen=True)
class EvaluationOptions:
    """States that members or templates are evaluated on."""

    evaluation_states: int = 1000
    """Distinct states of true trajectories to evaluate on, 1 to 1000000."""

    evaluation_seed: int = 0
    """Seed that the evaluation states are drawn from, 0 to 2^63 - 1."""

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("evaluation_states", self.evaluation_states, 1, 1_000_000)
        check_seed("evaluation_seed", self.evaluation_seed)


@dataclass(frozen=True)
class PredictionOptions(EvaluationOptions):
    """Kind of ensemble that is predicted, and states that it is predicted on."""

    layers: Layers = "both"
    """Layers that are trained: both, or the readout alone, while the hidden layer stays as it was drawn."""

    padding: int = 0
    """Padding templates beside the task's own, 0 to 16777216: they set no bit and match no state."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_choice("layers", self.layers, LAYERS)
        check_range("padding", self.padding, 0, PADDING_MAX)


@dataclass(frozen=True)
class DecoderOptions:
    """Decoders to report on."""

    decode: Literal["midpoint", "sign", "both"] = "both"
    """Decoder to report on."""

    @property
    def decoders(self) -> tuple[Decoder, ...]:
        """Decoders that were asked for."""
        return DECODERS if self.decode == "both" else (self.decode,)


@dataclass(frozen=True)
class OutputOptions:
    """Form of the results: text for people, or an object for programs."""

    json: bool = False
    """Print one JSON object instead of text."""

    @property
    def messages(self) -> Console:
        """Console for messages; with ``--json``, standard output carries the JSON object alone."""
        return console(stderr=self.json)

    def show(self, results: Mapping[str, Any], as_text: Callable[[Console], None]) -> None:
        """Print results to standard output in the form that was asked for.

        Args:
            results: Results, as values that JSON can hold.
            as_text: Function that prints them for people, to the console that it is given.
        """
        if self.json:
            print(json.dumps(results, allow_nan=False))
        else:
            as_text(console())
