"""Tasks by the word after ``--task``: those of the package by name, a user's own by file and class."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from ntk_ensembles.tasks.addition import Addition
from ntk_ensembles.tasks.base import Task
from ntk_ensembles.tasks.multiplication import Multiplication
from ntk_ensembles.tasks.permutation import Permutation
from ntk_ensembles.tasks.sbn import SBN

TASKS: dict[str, type[Task[Any, Any]]] = {
    "permutation": Permutation,
    "addition": Addition,
    "multiplication": Multiplication,
    "sbn": SBN,
}
"""The package's tasks by name."""


def find_task(word: str) -> type[Task[Any, Any]]:
    """The task that a user means.

    Args:
        word: a name in `TASKS`, or ``path/to/file.py:ClassName`` for a subclass of `Task` in a file of the
            user's. That file is executed, like any Python module that is imported.

    Raises:
        ValueError: an unknown name, a file that is not there or fails, or a class that is not a task.
    """
    if word in TASKS:
        return TASKS[word]
    file, separator, name = word.rpartition(":")
    if not separator or not file.endswith(".py"):
        raise ValueError(f"--task {word}: expected one of {', '.join(TASKS)}, or path/to/file.py:ClassName")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"--task {word}: there is no file {file}")
    found = getattr(_module(path, word), name, None)
    if not (inspect.isclass(found) and issubclass(found, Task)) or inspect.isabstract(found):
        raise ValueError(f"--task {word}: {file} has no class {name} that is a complete subclass of ntk_ensembles.Task")
    return found


def task_word(task: Task[Any, Any]) -> str:
    """The word with which `find_task` finds a task's class again."""
    for name, known in TASKS.items():
        if type(task) is known:
            return name
    return f"{inspect.getsourcefile(type(task))}:{type(task).__name__}"


def _module(path: Path, word: str) -> object:
    """The user's file as a module of its own name, executed once a process."""
    name = f"ntk_ensembles_user_task_{path.resolve().as_posix().encode().hex()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and typing look their module up while it is executed.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"--task {word}: the file fails with {type(error).__name__}: {error}") from error
    return module
