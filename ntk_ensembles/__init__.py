"""Exact algorithms from ensembles of wide two-layer networks, beside their NTK limit.

Implements and extends Back de Luca, Giapitzakis, Fountoulakis, "Learning to Add, Multiply, and Execute
Algorithmic Instructions Exactly with Neural Networks" (arXiv:2502.16763).

`tasks` give templates, templates are the training set, `theory` gives the mean and variance of what is
learned, `ensemble` trains members that approach them, `training` makes whole runs through Lightning, `runs` holds runs
as data and loads them again, `computer` is the one-instruction computer.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_ensembles.ensemble import MLPStack as MLPStack
    from ntk_ensembles.ensemble import TwoLayerMLP as TwoLayerMLP
    from ntk_ensembles.runs import Ensemble as Ensemble
    from ntk_ensembles.runs import RunOptions as RunOptions
    from ntk_ensembles.tasks import SBN as SBN
    from ntk_ensembles.tasks import TASKS as TASKS
    from ntk_ensembles.tasks import Addition as Addition
    from ntk_ensembles.tasks import EvaluationSet as EvaluationSet
    from ntk_ensembles.tasks import Multiplication as Multiplication
    from ntk_ensembles.tasks import Permutation as Permutation
    from ntk_ensembles.tasks import Task as Task
    from ntk_ensembles.theory import LimitPrediction as LimitPrediction
    from ntk_ensembles.theory import TemplatePredictor as TemplatePredictor
    from ntk_ensembles.theory import posterior as posterior
    from ntk_ensembles.training import EnsembleModule as EnsembleModule
    from ntk_ensembles.training import TaskData as TaskData
    from ntk_ensembles.training import train as train

    __version__: str

_MODULE_OF = {
    "SBN": "tasks",
    "TASKS": "tasks",
    "Addition": "tasks",
    "Ensemble": "runs",
    "EnsembleModule": "training",
    "EvaluationSet": "tasks",
    "LimitPrediction": "theory",
    "MLPStack": "ensemble",
    "Multiplication": "tasks",
    "Permutation": "tasks",
    "RunOptions": "runs",
    "Task": "tasks",
    "TaskData": "training",
    "TemplatePredictor": "theory",
    "TwoLayerMLP": "ensemble",
    "posterior": "theory",
    "train": "training",
}
"""Modules of this package by the public name that each is imported for, when it is asked for.

A type checker reads the imports above instead; a test compares the two.
"""


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return [*_MODULE_OF, "__version__"]


if not TYPE_CHECKING:
    # To a type checker these would hide the names above, and that another name is wrong.
    __all__ = list(_MODULE_OF)

    def __getattr__(name: str) -> Any:
        """Import what a public name needs when it is asked for: Lightning takes seconds that most commands save."""
        if name == "__version__":
            return metadata.version("ntk-ensembles")
        if name in _MODULE_OF:
            return getattr(importlib.import_module(f"ntk_ensembles.{_MODULE_OF[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
