"""Exact algorithms from ensembles of wide two-layer networks, beside their NTK limit.

Implements and extends Back de Luca, Giapitzakis, Fountoulakis, "Learning to Add, Multiply, and Execute
Algorithmic Instructions Exactly with Neural Networks" (arXiv:2502.16763).

`tasks` give templates, templates are the training set, `theory` gives the mean and variance of what is
learned, `ensemble` trains members that approach them, `training` runs and measures whole ensembles, `reuse` takes
them from their run directories, `sbn` is the one-instruction computer, `validation` tries every input.
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
    from ntk_ensembles.tasks import Multiplication as Multiplication
    from ntk_ensembles.tasks import Permutation as Permutation
    from ntk_ensembles.tasks import Task as Task
    from ntk_ensembles.theory import TemplatePredictor as TemplatePredictor
    from ntk_ensembles.training import EnsembleModule as EnsembleModule
    from ntk_ensembles.training import RunOptions as RunOptions
    from ntk_ensembles.training import Theory as Theory
    from ntk_ensembles.training import convergence as convergence
    from ntk_ensembles.training import train as train

    __version__: str

_MODULE_OF = {
    "SBN": "tasks",
    "TASKS": "tasks",
    "Addition": "tasks",
    "Cohort": "ensemble",
    "Ensemble": "reuse",
    "EnsembleModule": "training",
    "EvaluationSet": "tasks",
    "Multiplication": "tasks",
    "Permutation": "tasks",
    "Recipe": "ensemble",
    "RunOptions": "training",
    "Task": "tasks",
    "TemplatePredictor": "theory",
    "Theory": "training",
    "TwoLayerMLP": "ensemble",
    "convergence": "training",
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
