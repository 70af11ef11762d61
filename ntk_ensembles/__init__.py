"""Exact algorithms from ensembles of wide two-layer networks, beside their NTK limit.

Implements and extends Back de Luca, Giapitzakis, Fountoulakis, "Learning to Add, Multiply, and Execute
Algorithmic Instructions Exactly with Neural Networks" (arXiv:2502.16763).

`templates` are if-then rows, `tasks` are algorithms made of them and the training set, `theory` gives the mean and
variance of what is learned, `ensemble` trains members that approach them, `training` runs and measures whole ensembles,
`reuse` takes them from their run directories, `computer` is the one-instruction computer.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_ensembles.ensemble import Cohort as Cohort
    from ntk_ensembles.ensemble import Recipe as Recipe
    from ntk_ensembles.ensemble import TwoLayerMLP as TwoLayerMLP
    from ntk_ensembles.ensemble import train_cohort as train_cohort
    from ntk_ensembles.reuse import Ensemble as Ensemble
    from ntk_ensembles.tasks import SBN as SBN
    from ntk_ensembles.tasks import TASKS as TASKS
    from ntk_ensembles.tasks import Addition as Addition
    from ntk_ensembles.tasks import EvaluationSet as EvaluationSet
    from ntk_ensembles.tasks import Machine as Machine
    from ntk_ensembles.tasks import Multiplication as Multiplication
    from ntk_ensembles.tasks import Permutation as Permutation
    from ntk_ensembles.tasks import Task as Task
    from ntk_ensembles.templates import StateLayout as StateLayout
    from ntk_ensembles.templates import Template as Template
    from ntk_ensembles.templates import TemplateSet as TemplateSet
    from ntk_ensembles.theory import LimitPrediction as LimitPrediction
    from ntk_ensembles.theory import NTKExecutor as NTKExecutor
    from ntk_ensembles.theory import TemplatePredictor as TemplatePredictor
    from ntk_ensembles.theory import rollout as rollout
    from ntk_ensembles.training import EnsembleModule as EnsembleModule
    from ntk_ensembles.training import RunOptions as RunOptions
    from ntk_ensembles.training import convergence as convergence
    from ntk_ensembles.training import train as train

    __version__: str

_MODULE_OF = {
    "Addition": "tasks",
    "Cohort": "ensemble",
    "Ensemble": "reuse",
    "EnsembleModule": "training",
    "EvaluationSet": "tasks",
    "LimitPrediction": "theory",
    "Machine": "tasks",
    "Multiplication": "tasks",
    "NTKExecutor": "theory",
    "Permutation": "tasks",
    "Recipe": "ensemble",
    "RunOptions": "training",
    "SBN": "tasks",
    "StateLayout": "templates",
    "TASKS": "tasks",
    "Task": "tasks",
    "Template": "templates",
    "TemplatePredictor": "theory",
    "TemplateSet": "templates",
    "TwoLayerMLP": "ensemble",
    "convergence": "training",
    "rollout": "theory",
    "train": "training",
    "train_cohort": "ensemble",
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
