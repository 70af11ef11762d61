"""Exact algorithms from ensembles of wide two-layer networks, beside their NTK limit.

Implements and extends Back de Luca, Giapitzakis, Fountoulakis, "Learning to Add, Multiply, and Execute
Algorithmic Instructions Exactly with Neural Networks" (arXiv:2502.16763).

`templates` are if-then rows, `tasks` are algorithms made of them and the training set, `theory` gives the mean and
variance of what is learned, `ensemble` trains members that approach them, `training` runs and measures whole ensembles,
`reuse` takes them from their run directories, `computer` is the one-instruction computer.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_ensembles.ensemble import Cohort, Recipe, TwoLayerMLP, train_cohort
    from ntk_ensembles.reuse import Ensemble
    from ntk_ensembles.tasks import SBN, TASKS, Addition, EvaluationSet, Machine, Multiplication, Permutation, Task
    from ntk_ensembles.templates import StateLayout, Template, TemplateSet
    from ntk_ensembles.theory import LimitPrediction, NTKExecutor, TemplatePredictor, rollout
    from ntk_ensembles.training import EnsembleModule, RunOptions, convergence, train

__all__ = [
    "SBN",
    "TASKS",
    "Addition",
    "Cohort",
    "Ensemble",
    "EnsembleModule",
    "EvaluationSet",
    "LimitPrediction",
    "Machine",
    "Multiplication",
    "NTKExecutor",
    "Permutation",
    "Recipe",
    "RunOptions",
    "StateLayout",
    "Task",
    "Template",
    "TemplatePredictor",
    "TemplateSet",
    "TwoLayerMLP",
    "convergence",
    "rollout",
    "train",
    "train_cohort",
]

_FOLDERS = {
    "templates": ("StateLayout", "Template", "TemplateSet"),
    "tasks": ("SBN", "TASKS", "Addition", "EvaluationSet", "Machine", "Multiplication", "Permutation", "Task"),
    "theory": ("LimitPrediction", "NTKExecutor", "TemplatePredictor", "rollout"),
    "ensemble": ("Cohort", "Recipe", "TwoLayerMLP", "train_cohort"),
    "reuse": ("Ensemble",),
    "training": ("EnsembleModule", "RunOptions", "convergence", "train"),
}
_FOLDER_OF = {name: folder for folder, names in _FOLDERS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: Lightning alone takes seconds, and most commands do without it."""
    if name in _FOLDER_OF:
        return getattr(importlib.import_module(f"ntk_ensembles.{_FOLDER_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
