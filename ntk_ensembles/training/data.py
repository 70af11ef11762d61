"""A task as a LightningDataModule: its templates to train on, encoded evaluation states to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float, Float64
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset

from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.theory import Decoder, LimitPrediction, TemplatePredictor

_STATES_AT_ONCE = 1024


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


class EvaluationStates(Dataset[EvaluationBatch]):
    """Evaluation states as a data set that gives out whole batches.

    Args:
        limit: The evaluation states and what infinite width predicts of them.
    """

    def __init__(self, limit: LimitPrediction) -> None:
        self._limit = limit
        # Inputs of the type that networks have by default; predictions stay in double precision.
        self._inputs = limit.inputs.to(torch.get_default_dtype())

    def __len__(self) -> int:
        """Return the number of states."""
        return len(self._inputs)

    def __getitem__(self, rows: Sequence[int]) -> EvaluationBatch:
        """Return the batch of these states."""
        limit, rows = self._limit, list(rows)
        return {
            "inputs": self._inputs[rows],
            "next_states": limit.evaluation.next_states[rows],
            "mean": limit.mean[rows],
            "variance": limit.variance[rows],
            "thresholds": {decoder: thresholds[rows] for decoder, thresholds in limit.thresholds.items()},
        }


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
        in_features: k, the number of templates, padding included.
        out_features: m, the bits of a state.

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
        """Number of templates k, padding included."""
        return self.limit.predictor.size

    @property
    def out_features(self) -> int:
        """Bits of a state, m."""
        return self.task.layout.bits

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the one training batch (X, Y)."""
        return template_batch(self._labels)

    def val_dataloader(self) -> DataLoader[EvaluationBatch]:
        """Return the evaluation states."""
        return self.predict_dataloader()

    def test_dataloader(self) -> DataLoader[EvaluationBatch]:
        """Return the evaluation states."""
        return self.predict_dataloader()

    def predict_dataloader(self) -> DataLoader[EvaluationBatch]:
        """Return the evaluation states."""
        return evaluation_batches(self.limit)


def template_batch(
    labels: Bool[Tensor, "templates bits"] | Float[Tensor, "templates bits"],
) -> DataLoader[tuple[Tensor, ...]]:
    """Return the training data of templates, X = I_k and Y, as one batch."""
    dtype = torch.get_default_dtype()
    data = TensorDataset(torch.eye(len(labels), dtype=dtype), labels.to(dtype))
    # As the one batch that it is, rather than put together row by row.
    return DataLoader(data, sampler=[list(range(len(labels)))], batch_size=None)


def evaluation_batches(limit: LimitPrediction) -> DataLoader[EvaluationBatch]:
    """Return evaluation states in batches."""
    states = EvaluationStates(limit)
    sampler = BatchSampler(SequentialSampler(states), _STATES_AT_ONCE, drop_last=False)
    return DataLoader(states, sampler=sampler, batch_size=None)
