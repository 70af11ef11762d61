"""The LightningModule: each batch is a cohort of member indices, each step trains it whole (DESIGN §4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch.utils.data import DataLoader

from ntk_ensembles.ensemble import TrainedCohort, train_cohort
from ntk_ensembles.tasks import load_task_class
from ntk_ensembles.theory import LimitPrediction
from ntk_ensembles.training.options import RunOptions, evaluation_of, recipe_of
from ntk_ensembles.training.records import MemberRecords, Records


class EnsembleModule(LightningModule):
    """Streams an ensemble: draws, trains and evaluates one cohort a training step, then drops its weights.

    It has no parameters of its own and no optimizer: members live for one step, and the rule that trains
    them is `descend`. What stays are their records, which a Lightning checkpoint holds too
    (``EnsembleModule.load_from_checkpoint(path, weights_only=True)``).

    Args:
        task: the word with which `load_task_class` finds the task's class.
        task_options: its options.
        options: those of `RunOptions` that differ from their defaults, or all.
        theory: made from the three, where it is there already.
        keep_weights: leave the trained weights in ``cohort``.
        say: told in one line when memory runs out and a cohort is halved.

    Attributes:
        recipe: how members are made.
        theory: the evaluation states and what infinite width says of them.
        records: of all members so far, in all processes once computed.
        cohort: what the last training step trained; None before the first and where there was nothing to do.
        cohort_records: its records.
    """

    def __init__(
        self,
        task: str,
        task_options: dict[str, Any],
        options: dict[str, Any],
        *,
        theory: LimitPrediction | None = None,
        keep_weights: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # Plain values, so that a checkpoint with them loads without executing anything from it.
        self.save_hyperparameters("task", "task_options", "options")
        chosen = RunOptions(**options)
        if theory is None:
            found = load_task_class(task).from_options(task_options)
            theory = LimitPrediction(found, evaluation_of(found, chosen), chosen.init == "antisymmetric")
        self.recipe = recipe_of(theory.task, chosen)
        self.theory = theory
        self._keep_weights = keep_weights
        self._say = say
        self._members_max: int | None = None
        self.records = MemberRecords(*theory.mean.shape)
        self.cohort: TrainedCohort | None = None
        self.cohort_records = Records.none(*theory.mean.shape)

    def configure_optimizers(self) -> None:
        """None: training is `descend`'s."""

    def training_step(self, indices: Sequence[int]) -> None:
        """Train and evaluate the members with these indices."""
        if not indices:
            self.cohort = None
            return
        self.cohort = self._train(list(indices))
        deviations = (self.cohort.predictions.cpu() - self.theory.mean).to(torch.float16)
        self.cohort_records = Records.of(self.cohort, deviations)
        self.records.update(self.cohort_records)

    def _train(self, indices: list[int]) -> TrainedCohort:
        """The members, as many at once as memory has been seen to hold; they do not depend on it."""
        size = min(len(indices), self._members_max or len(indices))
        try:
            parts = [
                train_cohort(
                    self.recipe,
                    indices[start : start + size],
                    self.theory.inputs,
                    self.device,
                    keep_weights=self._keep_weights,
                )
                for start in range(0, len(indices), size)
            ]
            return TrainedCohort.join(parts)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise MemoryError(
                    f"one member of width {self.recipe.width} does not fit the memory of {self.device}; expected a "
                    "smaller --width"
                ) from None
        # Outside the handler, whose exception still holds the tensors of the attempt.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._members_max = size // 2
        self._say(f"out of memory with {size} members at once; going on with {self._members_max}")
        return self._train(indices)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; PyTorch has a type for that on a GPU only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@dataclass(frozen=True)
class Plan:
    """What all processes of a run must agree on; the first one decides.

    Attributes:
        directory: the run's.
        indices: the members still to be trained.
        cohort: how many at once.
    """

    directory: str
    indices: tuple[int, ...]
    cohort: int


class MembersDataModule(LightningDataModule):
    """Cohorts of member indices, dealt out to the processes; every process gets as many, the last ones may be empty.

    Args:
        plan: the first process's; the others' is replaced by it.

    Attributes:
        plan: the agreed one.
    """

    def __init__(self, plan: Plan | None) -> None:
        super().__init__()
        self.plan = plan

    def setup(self, stage: str) -> None:
        """Agree on the plan."""
        assert self.trainer is not None
        self.plan = self.trainer.strategy.broadcast(self.plan)

    def train_dataloader(self) -> DataLoader[list[int]]:
        """This process's cohorts, in order."""
        assert self.trainer is not None
        assert self.plan is not None
        indices, size = self.plan.indices, self.plan.cohort
        cohorts = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
        world, rank = self.trainer.world_size, self.trainer.global_rank
        cohorts += [[] for _ in range(-len(cohorts) % world)]
        return DataLoader(cohorts[rank::world], batch_size=None, collate_fn=list)  # type: ignore[arg-type]
