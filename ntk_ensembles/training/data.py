"""A task as a LightningDataModule: its templates to train on, encoded evaluation states to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Float64
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.theory import Decoder, LimitPrediction, TemplatePredictor

_STATES_AT_ONCE = 1024

BatchT = TypeVar("BatchT")


class EvaluationBatch(TypedDict):
    """Evaluation states with what infinite width predicts of them: all that a module needs to know of a task."""

    inputs: Float[Tensor, "states templates"]
    """Encoded states."""
    next_states: Bool[Tensor, "states bits"]
    """Their true next states."""
    mean: Float64[Tensor, "states bits"]
    """NTK mean."""
    variance: Float64[Tensor, " states"]
    """Variance of one member of infinite width and Gaussian initialisation."""
    thresholds: dict[Decoder, Float64[Tensor, "states bits"]]
    """Thresholds of each decoder."""


class TaskData(LightningDataModule):
    """Training and evaluation data of a task, for `EnsembleModule`.

    The training batch is (X, Y): the k templates, each alone, X = I_k, and their output bits. Validation, test and
    prediction batches are the same evaluation states, as `EvaluationBatch`.

    Args:
        task: What is learned.
        evaluation_states: Number of distinct states of true trajectories to measure on, at least 1. There are
            fewer if the task's inputs do not lead to as many.
        evaluation_seed: Seed of their draw.
        labels: What to train on, a row for each template; by default the templates' output bits. The ``labels`` of
            `FiniteWidth` with ``corrected=True`` take away the bias of members of a finite width.
        predictor: Theory to compare with, of the task's templates, and the padding templates to add to the training
            set; by default that of modules of which both layers are trained, without padding. For
            ``EnsembleModule(layers="readout")`` it is a `TemplatePredictor` with the same ``layers``.

    Attributes:
        task: What is learned.
        limit: The evaluation states and what infinite width predicts of them.

    Raises:
        ValueError: The task's templates contradict its reference, or it has no inputs.
    """

    def __init__(
        self,
        task: Task[Any, Any],
        *,
        evaluation_states: int = 1000,
        evaluation_seed: int = 0,
        labels: Float[Tensor, "templates bits"] | None = None,
        predictor: TemplatePredictor | None = None,
    ) -> None:
        super().__init__()
        self.task = task
        self.limit = LimitPrediction(task, EvaluationSet.sample(task, evaluation_states, evaluation_seed), predictor)
        self._labels = self.limit.predictor.labels if labels is None else labels

    @property
    def in_features(self) -> int:
        """k, the number of templates, padding included."""
        return self.limit.predictor.size

    @property
    def out_features(self) -> int:
        """m, the bits of a state."""
        return self.task.layout.bits

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the one training batch (X, Y)."""
        return template_batch(self._labels)

    def val_dataloader(self) -> DataLoader[EvaluationBatch]:
        """Return the evaluation states."""
        return evaluation_batches(self.limit)

    test_dataloader = predict_dataloader = val_dataloader


def template_batch(
    labels: Bool[Tensor, "templates bits"] | Float[Tensor, "templates bits"],
) -> DataLoader[tuple[Tensor, ...]]:
    """Return the training data of templates, X = I_k and Y, as one batch."""
    dtype = torch.get_default_dtype()
    return _loader([(torch.eye(len(labels), dtype=dtype), labels.to(dtype))])


def evaluation_batches(limit: LimitPrediction) -> DataLoader[EvaluationBatch]:
    """Return evaluation states in batches.

    Args:
        limit: The evaluation states and what infinite width predicts of them.
    """
    # Inputs of the type that networks have by default; predictions stay in double precision.
    inputs = limit.inputs.to(torch.get_default_dtype())
    parts = [slice(start, start + _STATES_AT_ONCE) for start in range(0, len(inputs), _STATES_AT_ONCE)]
    return _loader(
        [
            {
                "inputs": inputs[part],
                "next_states": limit.evaluation.next_states[part],
                "mean": limit.mean[part],
                "variance": limit.variance[part],
                "thresholds": {decoder: thresholds[part] for decoder, thresholds in limit.thresholds.items()},
            }
            for part in parts
        ]
    )


def _loader(batches: Sequence[BatchT]) -> DataLoader[BatchT]:
    """Return a loader of batches that are whole already."""
    # A list is all that a loader needs of a data set; its annotation asks for more.
    return DataLoader(cast(Dataset[BatchT], batches), batch_size=None)
