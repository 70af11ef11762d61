"""Exact algorithms from ensembles of wide two-layer networks, beside their NTK limit.

Implements and extends Back de Luca, Giapitzakis, Fountoulakis, "Learning to Add, Multiply, and Execute
Algorithmic Instructions Exactly with Neural Networks" (arXiv:2502.16763).

`tasks` have templates, which are the training set; `theory` predicts the mean and variance of what is learned from
them; `ensemble` trains members that approach the prediction; `training` makes whole runs through Lightning; `runs`
holds runs as data and loads them again; `computer` has programs for the one-instruction computer.
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

_NAMES = {
    "ensemble": ("MLPStack", "TwoLayerMLP"),
    "runs": ("Ensemble", "RunOptions"),
    "tasks": ("SBN", "TASKS", "Addition", "EvaluationSet", "Multiplication", "Permutation", "Task"),
    "theory": ("LimitPrediction", "TemplatePredictor", "posterior"),
    "training": ("EnsembleModule", "TaskData", "train"),
}
"""Public names by the folder that each is imported from, when it is asked for.

A type checker reads the imports above instead; a test compares the two.
"""

_FOLDER_OF = {name: folder for folder, names in _NAMES.items() for name in names}


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return [*_FOLDER_OF, "__version__"]


if not TYPE_CHECKING:
    # To a type checker these would hide the names above, and that another name is wrong.
    __all__ = list(_FOLDER_OF)

    def __getattr__(name: str) -> Any:
        """Import a public name when it is asked for: Lightning takes seconds to import, which most commands save."""
        if name == "__version__":
            return metadata.version("ntk-ensembles")
        if name in _FOLDER_OF:
            return getattr(importlib.import_module(f"ntk_ensembles.{_FOLDER_OF[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
