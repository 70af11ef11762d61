"""Exact algorithms from ensembles of wide two-layer networks, beside their NTK limit.

Implements and extends Back de Luca, Giapitzakis, Fountoulakis, "Learning to Add, Multiply, and Execute
Algorithmic Instructions Exactly with Neural Networks" (arXiv:2502.16763).

`tasks` give templates, templates are the training set, `theory` gives the mean and variance of what is
learned, `ensemble` trains members that approach them, `training` makes whole runs through Lightning, `runs` holds them
as data and loads them again.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntk_ensembles.ensemble import MLPStack, TwoLayerMLP
    from ntk_ensembles.runs import Ensemble, RunOptions
    from ntk_ensembles.tasks import SBN, TASKS, Addition, EvaluationSet, Multiplication, Permutation, Task
    from ntk_ensembles.theory import LimitPrediction, TemplatePredictor, posterior
    from ntk_ensembles.training import EnsembleModule, TaskData, train

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

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"ntk_ensembles.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
