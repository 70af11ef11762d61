"""Command lines from dataclasses and constructors: their arguments are the flags, their docstrings the help."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from ntk_ensembles.tasks import TASKS, Task, load_task_class

set_parsing_settings(docstring_parse_attribute_docstrings=True)

ChosenT = TypeVar("ChosenT")
OptionsT = TypeVar("OptionsT")


class OneLineParser(ArgumentParser):
    """Refuses bad input in one line and exit status 2, shows flags with dashes, and takes no abbreviations."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message on one line, with a way to help."""
        text = " ".join(str(message).split())
        sys.stderr.write(f"{self.prog}: error: {text} (see {self.prog} --help)\n")
        sys.exit(2)

    def add_options(self, source: type[Any]) -> None:
        """Add a flag for each argument of a constructor; a bool that is False by default is a switch."""
        switches = [
            name
            for name, parameter in inspect.signature(source).parameters.items()
            if parameter.default is False and parameter.annotation in (bool, "bool")
        ]
        self.add_class_arguments(source, None, skip=set(switches))
        help_of = {entry.arg_name: entry.description for entry in docstring_parser.parse_from_object(source).params}
        for name in switches:
            self.add_argument(f"--{name}", action="store_true", help=help_of.get(name))

    def finish(self) -> None:
        """Show flags with dashes, and go on accepting underscores."""
        for action in self._actions:
            dashed = [option.replace("_", "-") for option in action.option_strings]
            self._option_string_actions.update(dict.fromkeys(dashed, action))
            action.option_strings = dashed
        # An abbreviation that works today is another option's tomorrow.
        self.allow_abbrev = False


def parse_task(
    arguments: Sequence[str], prog: str, description: str, options: type[OptionsT]
) -> tuple[Task[Any, Any], OptionsT, dict[str, Any]]:
    """`parse_choice` among tasks, the package's and a user's own."""
    return parse_choice(arguments, prog, description, load_task_class, list(TASKS), options)


def parse_choice(
    arguments: Sequence[str],
    prog: str,
    description: str,
    find: Callable[[str], type[ChosenT]],
    names: Sequence[str],
    options: type[OptionsT],
) -> tuple[ChosenT, OptionsT, dict[str, Any]]:
    """What ``--task`` chooses, made with the flags of its own, and the options that every choice shares.

    Flags go over YAML files named by ``--config``. Bad input ends the program with one line on standard
    error and exit status 2.

    Args:
        arguments: of the command line.
        prog: the command, for messages.
        description: what it does, for ``--help``.
        find: the class that a word stands for; raises ValueError, with a message that names ``--task``.
        names: the words to show.
        options: a dataclass; its fields are flags too.

    Returns:
        The chosen object, the options, and all resolved values by name, ``task`` first.
    """
    word = chosen_task(arguments)
    parser = OneLineParser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="A YAML file of options by name, such as configs/*.yaml.")
    chosen: type[ChosenT] | None = None
    if word is None:
        parser.epilog = f"Each task has options of its own: {prog} --task NAME --help shows them."
    else:
        try:
            chosen = find(word)
        except ValueError as error:
            parser.error(str(error))
    listed = f"{{{','.join(names)}}}" + ("" if find is not load_task_class else " or file.py:Class")
    parser.add_argument("--task", metavar=listed, required=True, help="Which algorithm.")
    if chosen is not None:
        if clash := inspect.signature(chosen).parameters.keys() & inspect.signature(options).parameters.keys():
            parser.error(f"--task {word}: options {', '.join(sorted(clash))} belong to {prog} too; rename the task's")
        parser.add_options(chosen)
    parser.add_options(options)
    parser.finish()
    if chosen is None:
        if any(argument in ("-h", "--help") for argument in arguments):
            parser.parse_args(["--help"])
        parser.error(f"--task: choose {', '.join(names)}")
    values = {key: value for key, value in vars(parser.parse_args(list(arguments))).items() if key != "config"}
    shared = {field.name: values[field.name] for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    own = {key: value for key, value in values.items() if key not in shared and key != "task"}
    try:
        return chosen(**own), options(**shared), {"task": word, **own, **shared}
    except ValueError as error:
        parser.error(str(error))


def value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The first value that a flag has on a command line, before it is parsed."""
    for position, argument in enumerate(arguments):
        name, separator, value = argument.partition("=")
        if name == flag:
            return value if separator else next(iter(arguments[position + 1 :]), "")
    return None


def chosen_task(arguments: Sequence[str]) -> str | None:
    """The task that flags or, where they do not say, the last config file names."""
    word = value_of("--task", arguments)
    if word is not None:
        return word
    for position, argument in enumerate(arguments):
        path = value_of("--config", arguments[position:]) if argument.startswith("--config") else None
        if path is None:
            continue
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the parser says what is wrong with it
        if isinstance(content, dict) and "task" in content:
            word = str(content["task"])
    return word
