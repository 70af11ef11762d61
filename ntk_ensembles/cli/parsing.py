"""Command lines from dataclasses and constructors: arguments become flags, their docstrings the help."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import docstring_parser
import yaml
from jsonargparse import ArgumentParser
from rich.console import Console

import ntk_ensembles
from ntk_ensembles.cli.main import suggestion
from ntk_ensembles.console import console
from ntk_ensembles.errors import OptionError, check_range
from ntk_ensembles.tasks import TASKS, Task, find_task
from ntk_ensembles.theory import DECODERS, Decoder

ChosenT = TypeVar("ChosenT")
OptionsT = TypeVar("OptionsT")

_CONFIG_BYTES_MAX, _CONFIG_DEPTH_MAX = 1 << 16, 20


@dataclass(frozen=True)
class EvaluationOptions:
    """States that members or templates are evaluated on."""

    evaluation_states: int = 1000
    """Distinct states of true trajectories to evaluate on, 1 to 1000000."""

    evaluation_seed: int = 0
    """Seed that the evaluation states are drawn from, 0 to 2^63 - 1."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: An option is outside its range.
        """
        check_range("evaluation_states", self.evaluation_states, 1, 1_000_000)
        check_range("evaluation_seed", self.evaluation_seed, 0, (1 << 63) - 1)


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
    """Form of the results: tables for people, or an object for programs."""

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


class Parser(ArgumentParser):
    """Parser whose flags have dashes, are never abbreviated, and whose errors are raised for `command` to print.

    Args:
        prog: Name of the command for usage and messages.
        description: Sentences that say what the command does.
        epilog: Sentences to end the help with.
    """

    def __init__(self, prog: str, description: str = "", epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            # An abbreviation that works today is another option's tomorrow.
            allow_abbrev=False,
            exit_on_error=False,
            version=ntk_ensembles.__version__,
        )
        self._readers: dict[str, _Reader] = {}

    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        """Return the help, with flags in the spelling with dashes alone."""
        text: str = super().format_help(formatter)
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
        hints = typing.get_type_hints(source if dataclasses.is_dataclass(source) else source.__init__)
        for name, parameter in inspect.signature(source).parameters.items():
            default = defaults.get(name, parameter.default)
            annotation = hints.get(name, Any)
            reader = _Reader.of(name, annotation)
            settings: dict[str, Any] = {"help": helps.get(name)}
            if annotation is bool and default is False:
                settings["action"] = "store_true"
            else:
                settings |= {"type": annotation} if reader is None else {"type": reader, "metavar": reader.metavar}
                settings |= {"required": True} if default is inspect.Parameter.empty else {"default": default}
            # The package's options are written either way; in a file they are Python's names.
            group.add_argument(*dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")), **settings)
            if reader is not None:
                self._readers[name] = reader

    def check(self, config: Mapping[str, object]) -> None:
        """Check the values of a config file, of which jsonargparse takes null for any flag and anything for a switch.

        Args:
            config: Values by the name of the argument.

        Raises:
            OptionError: An option has a value of another kind than it takes.
        """
        try:
            for name, value in config.items():
                if reader := self._readers.get(name.replace("-", "_")):
                    reader(value)
        except _ValueOfAnotherKind as error:
            raise error.error from None

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the value of every argument by its name with underscores.

        Args:
            arguments: Arguments of the command line.

        Raises:
            OptionError: An option has a value of another kind than it takes.
            argparse.ArgumentError: The arguments cannot be parsed.
        """
        try:
            values = vars(self.parse_args(list(arguments)))
        except _ValueOfAnotherKind as error:
            raise error.error from None
        except argparse.ArgumentError as error:
            known = set(re.findall(r"--[a-z-]+", self.format_help()))
            unknown = {flag.replace("_", "-") for flag in re.findall(r"--[\w-]+", str(error))} - known
            hints = [hint for flag in sorted(unknown) if (hint := suggestion(flag, known))]
            raise argparse.ArgumentError(None, f"{error}{''.join(hints[:1])}") from error
        return {name: value for name, value in values.items() if name != "config"}


def parse_task(
    arguments: Sequence[str], prog: str, description: str, options: type[OptionsT]
) -> tuple[Task[Any, Any], OptionsT, dict[str, Any]]:
    """Parse a command line that is about a task, one of the package's or a user's own.

    Args:
        arguments: Arguments of the command line.
        prog: Name of the command for usage and messages.
        description: Sentences that say what the command does, for ``--help``.
        options: Dataclass of the options that the command has for every task.

    Returns:
        The task, the options, and all values by name, ``task`` (as it was written) first.

    Raises:
        ValueError: A config file, the task or an option cannot be used.
        argparse.ArgumentError: The arguments cannot be parsed.
    """
    return parse_choice(arguments, prog, description, find_task, [*TASKS, "file.py:Class"], options)


def parse_choice(
    arguments: Sequence[str],
    prog: str,
    description: str,
    find: Callable[[str], type[ChosenT]],
    names: Sequence[str],
    options: type[OptionsT],
) -> tuple[ChosenT, OptionsT, dict[str, Any]]:
    """Parse a command line whose flags depend on what ``--task`` names.

    Flags take precedence over YAML files named by ``--config``, and later files over earlier ones.

    Args:
        arguments: Arguments of the command line.
        prog: Name of the command for usage and messages.
        description: Sentences that say what the command does, for ``--help``.
        find: Function from the word after ``--task`` to a class; raises ValueError where there is none.
        names: Words to list in the help.
        options: Dataclass of the options that are the same for all tasks.

    Returns:
        The chosen object, the options, and all values by name, ``task`` first.

    Raises:
        ValueError: A config file, the task or an option cannot be used.
        argparse.ArgumentError: The arguments cannot be parsed.
    """
    asked = first_look(arguments)
    configs = {path: read_config(Path(path)) for path in asked.config}
    written = [str(config["task"]) for config in configs.values() if "task" in config]
    word: str | None = asked.task or (written[-1] if written else None)
    parser = Parser(prog, description)
    parser.add_argument("--config", action="config", help="A YAML file of options by name, such as configs/*.yaml.")
    parser.add_argument("--task", type=str, metavar=f"{{{','.join(names)}}}", help="Which algorithm.")
    if word is None:
        parser.add_options(options)
        parser.epilog = f"Each task has options of its own: {prog} --task NAME --help shows them."
        parser.parse(asked.information)
        raise ValueError(f"--task: expected one of {', '.join(names)} (see {prog} --help)")
    with _code_of(word):
        chosen = find(word)
        parser.add_options(chosen)
    own, shared = inspect.signature(chosen).parameters.keys(), inspect.signature(options).parameters.keys()
    if clash := own & shared:
        raise ValueError(f"--task {word}: options {', '.join(sorted(clash))} belong to {prog} too; rename the task's")
    parser.add_options(options)
    for path, config in configs.items():
        for name in config:
            if name.replace("-", "_") not in {"task", *own, *shared}:
                raise ValueError(f"{path}: there is no option {name}{suggestion(name, {'task', *own, *shared})}")
        parser.check(config)
    values = parser.parse(arguments)
    with _code_of(word):
        made = chosen(**{name: values[name] for name in own})
    common = {name: values[name] for name in shared}
    return made, options(**common), {"task": word, **{name: values[name] for name in own}, **common}


def first_look(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what decides which other options there are.

    Args:
        arguments: Arguments of the command line.

    Returns:
        ``task``, the word, or None; ``config``, the files as they are named; ``resume``, a directory, or None;
        ``information``, which of ``--help`` and ``--version`` there are.

    Raises:
        argparse.ArgumentError: One of the flags has no value.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--task")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--resume")
    for flag in ("--help", "--version"):
        parser.add_argument(
            flag,
            *(["-h"] if flag == "--help" else []),
            action="append_const",
            dest="information",
            const=flag,
            default=[],
        )
    return parser.parse_known_args(list(arguments))[0]


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of options by name.

    Files that are large, deeply nested, or use aliases or tags are refused before anything is built from them: a few
    hundred bytes of aliases can take gigabytes.

    Args:
        path: File to read.

    Raises:
        ValueError: There is no such file, or it holds no options.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'is no file' if path.exists() else 'there is no such file'}")
    with path.open("rb") as file:
        content = file.read(_CONFIG_BYTES_MAX + 1)
    if len(content) > _CONFIG_BYTES_MAX:
        raise ValueError(f"{path}: is larger than {_CONFIG_BYTES_MAX // 1024} KiB; expected a file of options")
    try:
        text = content.decode("utf-8")
        if refusal := _refusal(yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError(refusal)
        loaded = yaml.safe_load(text)
        if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
            raise ValueError("expected options by name, such as 'width: 1024'")
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be used: {error}") from None
    return loaded


def _refusal(events: Iterable[yaml.Event]) -> str | None:
    """Return what the parts of a YAML document have that options need not, or None."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _CONFIG_DEPTH_MAX:
            return "is nested too deeply; expected options by name"
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            return "has YAML anchors, aliases or tags; expected plain values"
    return None


@contextmanager
def _code_of(word: str) -> Iterator[None]:
    """Turn what goes wrong in a class that a user chose, and may have written, into a ValueError."""
    try:
        yield
    except ValueError as error:
        hint = suggestion(word, TASKS) if word not in TASKS else ""
        if isinstance(error, OptionError):
            raise OptionError(error.argument, error.value, f"{error.expected}{hint}") from error
        raise ValueError(f"{error}{hint}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"--task {word}: fails with {type(error).__name__}: {error}") from error


class _ValueOfAnotherKind(Exception):
    """Carrier of an `OptionError` past argparse, which would replace the message of a ValueError by its own."""

    def __init__(self, error: OptionError) -> None:
        super().__init__(str(error))
        self.error = error


_EXPECTED: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
"""Annotations of values that `_Reader` reads, with what it expects."""


class _Reader:
    """Function from what stands on the command line or in a YAML file to the value of an argument.

    jsonargparse could convert these values too, but its errors speak of Python's types and name no flag.

    Args:
        name: Name of the argument.
        kind: ``int``, ``float``, ``str`` or ``bool``.
        choices: Words that are accepted; none where any value is.
        optional: Whether None is accepted too.
    """

    def __init__(self, name: str, kind: type[Any], choices: Sequence[str], optional: bool) -> None:
        self._name = name
        self._kind = kind
        self._choices = choices
        self._optional = optional
        self._expected = f"one of {', '.join(choices)}" if choices else _EXPECTED[kind]

    @classmethod
    def of(cls, name: str, annotation: Any) -> _Reader | None:
        """Return a reader for an annotation, or None for one that jsonargparse has to read, such as a list."""
        kinds = [annotation]
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        choices = typing.get_args(kinds[0]) if typing.get_origin(kinds[0]) is Literal else ()
        if len(kinds) > 1 or not (choices or kinds[0] in _EXPECTED):
            return None
        return cls(name, str if choices else kinds[0], choices, optional=kinds != [annotation])

    def __call__(self, value: object) -> object:
        """Return the value, converted."""
        if value is None and self._optional:
            return None
        converted = self._convert(value)
        if converted is None:
            raise _ValueOfAnotherKind(OptionError(self._name, value, self._expected))
        if self._choices and converted not in self._choices:
            expected = f"{self._expected}{suggestion(str(converted), self._choices)}"
            raise _ValueOfAnotherKind(OptionError(self._name, value, expected))
        return converted

    def _convert(self, value: object) -> object | None:
        """Return the value as one of this kind, or None where it is of another."""
        if self._kind is bool:
            return {"True": True, "true": True, "False": False, "false": False}.get(str(value))
        # A bool is an integer to Python, and int() would cut 3.5 to 3.
        if isinstance(value, bool) or not isinstance(value, (str, int, self._kind)):
            return None
        try:
            converted: object = self._kind(value)
        except (ValueError, OverflowError):
            return None
        return converted

    def __repr__(self) -> str:
        """Return the kind of value, for the help."""
        return self._kind.__name__

    @property
    def metavar(self) -> str | None:
        """Words to show in the help, or None where any value is accepted."""
        return f"{{{','.join(self._choices)}}}" if self._choices else None


def _documentation(source: type[Any]) -> tuple[str, dict[str, str]]:
    """Return the first sentence of a class, and what it and its bases say of their arguments and attributes."""
    helps: dict[str, str] = {}
    for part in reversed([base for base in inspect.getmro(source) if base is source or dataclasses.is_dataclass(base)]):
        for entry in docstring_parser.parse_from_object(part).params:
            helps[entry.arg_name] = (entry.description or "").replace("%", "%%")
    return (inspect.getdoc(source) or source.__name__).partition("\n")[0].rstrip("."), helps
