"""Lightning: the module around a stack of members, its data, its metrics, and `train`, which makes whole runs."""

from ntk_ensembles.training.data import EvaluationBatch, TaskData
from ntk_ensembles.training.module import EnsembleModule, EvaluationMetrics
from ntk_ensembles.training.stream import Interrupted, train

__all__ = ["EnsembleModule", "EvaluationBatch", "EvaluationMetrics", "Interrupted", "TaskData", "train"]
