"""Tasks: fixed-size binary machines given by templates, one file each (DESIGN §1)."""

from ntk_ensembles.tasks.addition import Addition
from ntk_ensembles.tasks.base import Task, check_range
from ntk_ensembles.tasks.evaluation import EvaluationSet
from ntk_ensembles.tasks.layout import StateLayout
from ntk_ensembles.tasks.multiplication import Multiplication
from ntk_ensembles.tasks.permutation import Permutation
from ntk_ensembles.tasks.registry import TASKS, find_task, task_word
from ntk_ensembles.tasks.sbn import SBN, Program
from ntk_ensembles.tasks.templates import Template, TemplateSet

__all__ = [
    "SBN",
    "TASKS",
    "Addition",
    "EvaluationSet",
    "Multiplication",
    "Permutation",
    "Program",
    "StateLayout",
    "Task",
    "Template",
    "TemplateSet",
    "check_range",
    "find_task",
    "task_word",
]
