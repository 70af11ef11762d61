"""Exact algorithms from ensembles of wide two-layer networks, beside their NTK limit.

Implements and extends Back de Luca, Giapitzakis, Fountoulakis, "Learning to Add, Multiply, and Execute
Algorithmic Instructions Exactly with Neural Networks" (arXiv:2502.16763).

`tasks` give templates, templates are the training set, `theory` gives the mean and variance of what is
learned, `ensemble` trains members that approach them, `training` runs and measures whole ensembles, `reuse` takes
them from their run directories, `sbn` is the one-instruction computer, `validation` tries every input.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_ensembles.ensemble import Cohort, Recipe, TwoLayerMLP, train_cohort
    from ntk_ensembles.reuse import Ensemble
    from ntk_ensembles.tasks import SBN, TASKS, Addition, EvaluationSet, Multiplication, Permutation, Task
    from ntk_ensembles.theory import TemplatePredictor
    from ntk_ensembles.training import EnsembleModule, RunOptions, Theory, convergence, train

__all__ = [
    "SBN",
    "TASKS",
    "Addition",
    "Cohort",
    "Ensemble",
    "EnsembleModule",
    "EvaluationSet",
    "Multiplication",
    "Permutation",
    "Recipe",
    "RunOptions",
    "Task",
    "TemplatePredictor",
    "Theory",
    "TwoLayerMLP",
    "convergence",
    "train",
    "train_cohort",
]

_PARTS = ("tasks", "theory", "ensemble", "reuse", "training")


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: Lightning alone takes seconds, and most commands do without it."""
    if name in __all__:
        for part in _PARTS:
            module = importlib.import_module(f"ntk_ensembles.{part}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
