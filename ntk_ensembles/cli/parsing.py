"""The command line of `train.py`: options from dataclasses and constructors, layered over YAML."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ntk_ensembles.tasks import TASKS, Task
from ntk_ensembles.training.run import RunOptions

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class OneLineParser(ArgumentParser):
    """Refuses bad input in one line and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message on one line, with a way to help."""
        text = " ".join(str(message).split())
        sys.stderr.write(f"{self.prog}: error: {text} (see {self.prog} --help)\n")
        sys.exit(2)

    def use_dashes(self) -> None:
        """Show flags with dashes, and go on accepting underscores."""
        for action in self._actions:
            dashed = [option.replace("_", "-") for option in action.option_strings]
            self._option_string_actions.update(dict.fromkeys(dashed, action))
            action.option_strings = dashed


def parse_run(arguments: Sequence[str], prog: str) -> tuple[Task[Any, Any], RunOptions, str]:
    """The task, the options and the resolved configuration as YAML.

    Bad input ends the program with one line on standard error and exit status 2.
    """
    name = _task_name(arguments)
    if name is None or name not in TASKS:
        parser = _parser(prog, None)
        if name is None and any(argument in ("-h", "--help") for argument in arguments):
            parser.parse_args(["--help"])
        parser.error(
            f"--task {name}: expected one of {', '.join(TASKS)}" if name else f"--task: choose {', '.join(TASKS)}"
        )
    parser = _parser(prog, name)
    values = parser.parse_args(list(arguments))
    task_options, run_options = _split(values)
    try:
        options = RunOptions(**run_options)
        task = TASKS[name](**task_options)
    except ValueError as error:
        parser.error(str(error))
    resolved = {"task": name, **task_options, **{key: value for key, value in run_options.items() if key != "out"}}
    return task, options, yaml.safe_dump(resolved, sort_keys=False)


def _parser(prog: str, task: str | None) -> OneLineParser:
    parser = OneLineParser(
        prog=prog,
        description="Train an ensemble of wide two-layer networks on a task's templates and measure it against the "
        "NTK prediction. Options can stand in YAML files too; flags go over them.",
        epilog=None
        if task
        else f"Each task has options of its own: {prog} --task NAME --help shows them. "
        f"The quickest look: {prog} --task addition",
    )
    parser.add_argument("--config", action="config", help="A YAML file of options by name, such as configs/*.yaml.")
    parser.add_argument("--task", choices=list(TASKS), required=True, help="What to learn.")
    if task is not None:
        parser.add_class_arguments(TASKS[task], None)
    parser.add_class_arguments(RunOptions, None)
    parser.use_dashes()
    # An abbreviation that works today is another option's tomorrow.
    parser.allow_abbrev = False
    return parser


def _split(values: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task's options and the run's."""
    given = {key: value for key, value in vars(values).items() if key not in ("config", "task")}
    run = {key: given.pop(key) for key in RunOptions.__dataclass_fields__}
    return given, run


def _task_name(arguments: Sequence[str]) -> str | None:
    """The task that flags or, where they do not say, the last config file names."""
    name = None
    for position, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        value = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
        if flag == "--task":
            return value
        if flag == "--config":
            try:
                content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError):
                continue  # the parser says what is wrong with it
            if isinstance(content, dict) and "task" in content:
                name = str(content["task"])
    return name
