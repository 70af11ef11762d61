"""Cohorts: members that are in memory together, and how many of them fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from ntk_ensembles.ensemble.descent import Descent, DescentOptions, MemberStatus
from ntk_ensembles.ensemble.network import INITS, Init, MLPStack, cpu_workers
from ntk_ensembles.errors import OptionError, check_choice, check_range

Precision = Literal["32-true", "bf16-mixed", "64-true"]
"""Lightning's names. ``bf16-mixed``: products of training in bfloat16, except those of the outputs near the end, by
which a member is said to have converged; weights, residuals and predictions in float32."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

COHORT_MAX = 64
"""More members at once bring nothing, and delay the first result, unless they are small."""

_SMALL_BYTES, _SMALL_MAX = 1 << 28, 1 << 10
"""Memory of members that are small together, and their largest number. A cohort costs a tenth of a second by itself;
measured on addition of 10 bits and width 2,048, cohorts of 256 take 0.9 of the processor time of cohorts of 64."""

_MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.7}
_MEMORY_CAP_CPU = 2 << 30


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything that a member of an ensemble trained on templates depends on, apart from its index.

    Attributes:
        labels: Y, the output bits of each template, padding included; the training inputs are X = I_k.
        width: n, the number of hidden units.
        init: How weights are drawn.
        seed: Seed of the ensemble.
        precision: Precision of the arithmetic.
        descent: What members minimise, which of their layers are trained, and when they stop.

    Raises:
        OptionError: An unknown ``init`` or ``precision``.
    """

    labels: Float[Tensor, "templates bits"]
    width: int
    init: Init = "gaussian"
    seed: int = 0
    precision: Precision = "32-true"
    descent: DescentOptions = field(default_factory=DescentOptions)

    def __post_init__(self) -> None:
        """Check the words."""
        check_choice("init", self.init, INITS)
        check_choice("precision", self.precision, PRECISIONS)

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights, outputs and residuals."""
        return torch.float64 if self.precision == "64-true" else torch.float32

    @property
    def weight_bytes(self) -> int:
        """Memory of one member's weights, in bytes."""
        templates, bits = self.labels.shape
        return self.width * (templates + bits) * self.dtype.itemsize

    @property
    def training_bytes(self) -> int:
        """Memory that one member takes while it is trained, in bytes."""
        templates, bits = self.labels.shape
        # On top of the weights. functional: gradients and hidden activations. One-hot: two buffers of a slice,
        # and a third in bfloat16. Both: extrapolation keeps three output-sized tensors for each of six steps, and
        # the current step needs two more.
        functional = self.descent.engine == "functional"
        working = self.weight_bytes * 2 if functional else 3 * templates * min(self.width, 1024) * self.dtype.itemsize
        return self.weight_bytes + working + 20 * templates * bits * self.dtype.itemsize

    def make_stack(self, indices: Sequence[int], device: torch.device, *, draw: bool = True) -> MLPStack:
        """Return members with their initial weights.

        Args:
            indices: Indices of the members in the ensemble.
            device: Where they are drawn and lie.
            draw: Pass False to leave the weights uninitialised.
        """
        templates, bits = self.labels.shape
        return MLPStack(
            templates,
            bits,
            self.width,
            indices,
            seed=self.seed,
            init=self.init,
            device=device,
            dtype=self.dtype,
            draw=draw,
        )


def train_members(recipe: Recipe, indices: Sequence[int], device: torch.device) -> tuple[MLPStack, list[MemberStatus]]:
    """Draw members and train them to the end, without Lightning.

    Args:
        recipe: How members are made.
        indices: Indices of the members in the ensemble.
        device: Where to compute.

    Returns:
        The trained members and how each of them fared.
    """
    stack = recipe.make_stack(indices, device)
    descent = Descent(stack, recipe.descent, bfloat16=recipe.precision == "bf16-mixed")
    descent.bind(torch.eye(len(recipe.labels), dtype=recipe.dtype, device=device), recipe.labels)
    while descent.running:
        descent.step()
    return stack.requires_grad_(False), descent.statuses


def free_memory_bytes(device: torch.device) -> int:
    """Return the bytes that a cohort could take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def choose_cohort(
    recipe: Recipe,
    states: int,
    members: int,
    device: torch.device,
    wanted: int | None = None,
    *,
    processes: int = 1,
) -> int:
    """Return the number of members to hold at once.

    Args:
        recipe: How members are made.
        states: Number of evaluation states.
        members: Number of members to train.
        device: Where they are trained.
        wanted: The user's choice; None to choose from the memory that is free.
        processes: Number of processes on this machine; on a CPU they share its memory and its cores.

    Raises:
        OptionError: Not even one member fits, or not as many as ``wanted``.
    """
    each = recipe.training_bytes + states * recipe.labels.shape[1] * (recipe.dtype.itemsize + 8)
    sharing = processes if device.type == "cpu" else 1
    free = free_memory_bytes(device) // sharing
    fit = free // each
    if fit < 1:
        needs = f"one member needs {each / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB are free on {device}"
        raise OptionError("width", recipe.width, f"a smaller width ({needs})")
    if wanted is not None:
        check_range("cohort", wanted, 1, fit)
        return min(wanted, members)
    budget = int(free * _MEMORY_SHARE[device.type])
    workers = 1
    if device.type == "cpu":
        budget, workers = min(budget, _MEMORY_CAP_CPU), max(1, cpu_workers() // sharing)
    size = min(max(budget // each, 1), max(COHORT_MAX, min(_SMALL_BYTES // each, _SMALL_MAX)))
    # Whole rounds, so that no core waits; but never more than fit.
    size = max(size // workers * workers, min(workers, fit))
    return min(size, members)
