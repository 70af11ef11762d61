"""Tasks: algorithms as templates beside their meaning in plain integers, one file each.

`TASKS` lists those of the package by name; `load_task_class` finds a user's own by file and class. `machine` is the
interpreter of the one-instruction computer, `evaluation` samples the states that ensembles are evaluated on.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from ntk_ensembles.errors import OptionError
from ntk_ensembles.tasks.addition import Addition
from ntk_ensembles.tasks.base import Task, TaskError, describe_error
from ntk_ensembles.tasks.evaluation import EvaluationSet
from ntk_ensembles.tasks.machine import Branch, Machine, MachineState, parse_image
from ntk_ensembles.tasks.multiplication import Multiplication
from ntk_ensembles.tasks.permutation import Permutation
from ntk_ensembles.tasks.sbn import SBN, Program
from ntk_ensembles.templates import StateLayout, Template, TemplateSet

__all__ = [
    "SBN",
    "TASKS",
    "Addition",
    "Branch",
    "EvaluationSet",
    "Machine",
    "MachineState",
    "Multiplication",
    "Permutation",
    "Program",
    "StateLayout",
    "Task",
    "TaskError",
    "Template",
    "TemplateSet",
    "load_task_class",
    "parse_image",
    "task_spec",
]

TASKS: dict[str, type[Task[Any, Any]]] = {
    "permutation": Permutation,
    "addition": Addition,
    "multiplication": Multiplication,
    "sbn": SBN,
}
"""The package's tasks by name."""


def load_task_class(spec: str) -> type[Task[Any, Any]]:
    """Return the task class that a task spec selects.

    Args:
        spec: Name in `TASKS`, or ``path/to/file.py:ClassName`` for a subclass of `Task` in a user's file. The file
            is executed, like any Python module that is imported.

    Raises:
        OptionError: The name is unknown, the file does not exist, or the class is no complete task.
        TaskError: The file fails when it is executed.
    """
    if spec in TASKS:
        return TASKS[spec]
    file, separator, name = spec.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise OptionError("task", spec, f"one of {', '.join(TASKS)}, or path/to/file.py:ClassName")
    path = Path(file)
    if not path.is_file():
        raise OptionError("task", spec, f"an existing file, there is no file {file}")
    found = getattr(_execute(path, spec), name, None)
    if inspect.isclass(found) and issubclass(found, Task) and not inspect.isabstract(found) and hasattr(found, "name"):
        return found
    raise OptionError("task", spec, f"a class {name} in {file} that is a complete subclass of ntk_ensembles.Task")


def task_spec(task: Task[Any, Any]) -> str:
    """Return the task spec with which `load_task_class` finds a task's class again."""
    for name, known in TASKS.items():
        if type(task) is known:
            return name
    return f"{inspect.getsourcefile(type(task))}:{type(task).__name__}"


def _execute(path: Path, spec: str) -> object:
    """Execute a user's file as a module of its own name, once a process."""
    name = f"ntk_ensembles_user_task_{path.resolve().as_posix().encode().hex()}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and typing look their module up while it is executed.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TaskError(f"task {spec!r}: the file fails with {describe_error(error)}") from error
    return module
