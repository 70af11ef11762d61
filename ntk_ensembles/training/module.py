"""The LightningModule: each batch is a cohort of member indices, each step trains it whole (DESIGN §4)."""

from __future__ import annotations

import torch
from jaxtyping import Int
from lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from ntk_ensembles.ensemble import Recipe, TrainedCohort, train_cohort
from ntk_ensembles.training.convergence import Theory
from ntk_ensembles.training.metrics import MemberDeviations


class EnsembleModule(LightningModule):
    """Streams an ensemble: draws, trains and evaluates one cohort a training step, then drops its weights.

    It has no parameters of its own and no optimizer: members live for one step, and the rule that trains
    them is `descend`. What stays are the members' deviations from the NTK mean.

    Args:
        recipe: how members are made.
        theory: the evaluation states and what infinite width says of them.

    Attributes:
        deviations: of all members that converged; the others are never averaged in.
        cohort: what the last training step trained; None before the first.
        cohort_deviations: of all its members, converged or not, as they are kept: in float16.
    """

    def __init__(self, recipe: Recipe, theory: Theory) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.recipe = recipe
        self.theory = theory
        self.deviations = MemberDeviations()
        self.cohort: TrainedCohort | None = None
        self.cohort_deviations = torch.empty(0, *theory.mean.shape, dtype=torch.float16)

    def configure_optimizers(self) -> None:
        """None: training is `descend`'s."""

    def training_step(self, indices: Int[Tensor, " members"]) -> None:
        """Train and evaluate the members with these indices."""
        cohort = train_cohort(self.recipe, indices.tolist(), self.theory.inputs, self.device)
        self.cohort = cohort
        self.cohort_deviations = (cohort.predictions.cpu() - self.theory.mean).to(torch.float16)
        if cohort.converged:
            self.deviations.update(indices.cpu()[cohort.converged], self.cohort_deviations[cohort.converged])


class MembersDataModule(LightningDataModule):
    """Member indices 0 … members − 1 in cohorts.

    Args:
        members: how many.
        cohort: how many at once.
    """

    def __init__(self, members: int, cohort: int) -> None:
        super().__init__()
        self._members, self._cohort = members, cohort

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Cohorts in order."""
        return DataLoader(torch.arange(self._members), batch_size=self._cohort)  # type: ignore[arg-type]
