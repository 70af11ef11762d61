"""One cohort from its draw to its predictions: draw, train, evaluate, each spread over the device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from ntk_ensembles.ensemble.descent import DescentOptions, Loss, MemberStatus, descend
from ntk_ensembles.ensemble.functional import FunctionalModel
from ntk_ensembles.ensemble.identity import IdentityModel, blocks_at_once
from ntk_ensembles.ensemble.network import Cohort, Init, block_shape
from ntk_ensembles.theory.kernels import InverseKernel

Engine = Literal["identity", "functional"]
"""``identity``: the fast path for X = I_k. ``functional``: `torch.func` on the same inputs, as a check."""

Precision = Literal["32-true", "bf16-mixed", "64-true"]
"""Lightning's names. ``bf16-mixed``: weights, outputs and residuals in float32, gradients in bfloat16."""

COHORT_MAX = 64
"""More members at once bring nothing, and delay the first result."""

_MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.7}
_MEMORY_CAP_CPU = 2 << 30

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Recipe:
    """Everything a member's training depends on, apart from its index.

    Attributes:
        labels: Y, the output bits of each template (X is the identity).
        width: n, the number of hidden units.
        init: how weights are drawn.
        loss: what is minimised.
        seed: the run's seed.
        precision: of the arithmetic.
        engine: which implementation.
        descent: when training stops.
    """

    labels: Float[Tensor, "templates bits"]
    width: int
    init: Init = "gaussian"
    loss: Loss = "whitened"
    seed: int = 0
    precision: Precision = "32-true"
    engine: Engine = "identity"
    descent: DescentOptions = field(default_factory=DescentOptions)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, outputs and residuals."""
        return torch.float64 if self.precision == "64-true" else torch.float32

    @property
    def member_bytes(self) -> int:
        """The memory that one member takes while it is trained."""
        blocks, units = block_shape(self.width)
        templates, bits = self.labels.shape
        weights = (templates + bits) * blocks * units
        # Gradients and hidden units of vmap, or two buffers of a block; and six steps of outputs, thrice.
        working = 2 * weights if self.engine == "functional" else 3 * templates * units
        return (weights + working + 20 * templates * bits) * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class TrainedCohort:
    """What is left of a cohort when it has been evaluated."""

    indices: tuple[int, ...]
    statuses: list[MemberStatus]
    predictions: Float[Tensor, "members states bits"]
    seconds: dict[str, float]
    """Wall time of the phases ``init``, ``train`` and ``evaluate``."""
    weights: dict[str, Tensor] | None = None
    """As from `Cohort.state`, where they were to be kept."""

    @property
    def converged(self) -> list[int]:
        """The positions in this cohort of the members that converged."""
        return [position for position, status in enumerate(self.statuses) if status.converged]

    @classmethod
    def join(cls, parts: Sequence[TrainedCohort]) -> TrainedCohort:
        """One cohort of the members of several."""
        if len(parts) == 1:
            return parts[0]
        weights = [part.weights for part in parts if part.weights is not None]
        return cls(
            tuple(index for part in parts for index in part.indices),
            [status for part in parts for status in part.statuses],
            torch.cat([part.predictions for part in parts]),
            {phase: sum(part.seconds[phase] for part in parts) for phase in parts[0].seconds},
            {name: torch.cat([part[name] for part in weights]) for name in weights[0]} if weights else None,
        )


def train_cohort(
    recipe: Recipe,
    indices: Sequence[int],
    inputs: Float[Tensor, "states templates"],
    device: torch.device,
    *,
    keep_weights: bool = False,
) -> TrainedCohort:
    """Draw the members, train them, and predict at the evaluation inputs.

    Args:
        recipe: how members are made.
        indices: which members.
        inputs: encoded evaluation states.
        device: where to compute.
        keep_weights: hand out a copy of the trained weights.
    """
    members = Members.train(recipe, indices, device)
    started_at = time.perf_counter()
    predictions = members.predict(inputs)
    seconds = {**members.seconds, "evaluate": time.perf_counter() - started_at}
    return TrainedCohort(
        tuple(indices), members.statuses, predictions, seconds, members.weights() if keep_weights else None
    )


class Members:
    """A cohort with its weights, ready to predict.

    On a CPU the fast engine gives each core members of its own and computes each on one thread: the
    numbers of a member then depend neither on the cohort nor on how many cores there are.

    Args:
        recipe: how members are made.
        cohort: their weights, at whatever stage.

    Attributes:
        statuses: how training ended; empty before `train`, and for restored members.
        seconds: wall time of the phases ``init`` and ``train``.
    """

    def __init__(self, recipe: Recipe, cohort: Cohort) -> None:
        self.statuses: list[MemberStatus] = []
        self.seconds: dict[str, float] = {}
        self._recipe = recipe
        self._cohort = cohort
        self._device = cohort.hidden.device
        self._by_member = self._device.type == "cpu" and recipe.engine == "identity"

    @classmethod
    def train(cls, recipe: Recipe, indices: Sequence[int], device: torch.device) -> Members:
        """Members drawn and trained."""
        members = cls(recipe, _allocate(recipe, indices, device))
        labels = recipe.labels.T.to(device, recipe.dtype)
        inverse_kernel = InverseKernel.for_one_hot(len(recipe.labels))

        def descend_model(model: IdentityModel | FunctionalModel) -> list[MemberStatus]:
            return descend(model, labels, recipe.loss, inverse_kernel, recipe.descent)

        members._phase("init", members._cohort.redraw, range(len(indices)))
        trained = members._phase("train", descend_model, members._models)
        members.statuses = [status for part in trained for status in part]
        return members

    @classmethod
    def restore(
        cls, recipe: Recipe, indices: Sequence[int], weights: Mapping[str, Tensor], device: torch.device
    ) -> Members:
        """Members whose trained weights were kept.

        Args:
            recipe: how they were made.
            indices: which members.
            weights: as from `Cohort.state`.
            device: where to compute.

        Raises:
            ValueError: weights of another shape.
        """
        cohort = _allocate(recipe, indices, device)
        cohort.restore(weights)
        return cls(recipe, cohort)

    def predict(self, inputs: Float[Tensor, "states templates"]) -> Float[Tensor, "members states bits"]:
        """Every member's outputs at encoded states."""
        return self.predict_together([self], inputs)

    @staticmethod
    def predict_together(
        parts: Sequence[Members], inputs: Float[Tensor, "states templates"]
    ) -> Float[Tensor, "members states bits"]:
        """The outputs of the members of several cohorts, so that no core waits at the end of each.

        Args:
            parts: cohorts of the same recipe and device.
            inputs: encoded states.
        """
        first, *_ = parts
        inputs = inputs.to(first._device, first._recipe.dtype)
        models = [model for part in parts for model in part._predictors(len(inputs))]
        return torch.cat(first._phase("predict", lambda model: model.predict(inputs), models))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the weights, as from `Cohort.state`."""
        (*_, model) = self._models
        return model.weights if isinstance(model, FunctionalModel) else self._cohort.state()

    @cached_property
    def _models(self) -> list[IdentityModel | FunctionalModel]:
        """What computes; made when the weights are there, for the general engine copies them."""
        count = len(self._cohort.indices) if self._by_member else 0
        parts = [self._cohort.member(position) for position in range(count)] or [self._cohort]
        return [self._model(part) for part in parts]

    def _predictors(self, states: int) -> Sequence[IdentityModel | FunctionalModel]:
        """What predicts so many states. For a few of them a core takes several members at once, its share at most."""
        if not self._by_member:
            return self._models
        members, blocks, _, units = self._cohort.hidden.shape
        size = max(min(-(-members // cpu_workers()), blocks_at_once(states, units) // blocks), 1)
        parts = [self._cohort.part(slice(start, start + size)) for start in range(0, members, size)]
        return [self._model(part) for part in parts]

    def _model(self, part: Cohort) -> IdentityModel | FunctionalModel:
        low_precision = self._recipe.precision == "bf16-mixed"
        if self._recipe.engine == "identity":
            return IdentityModel(part, low_precision=low_precision)
        eye = torch.eye(len(self._recipe.labels), device=self._device, dtype=self._recipe.dtype)
        return FunctionalModel(part, eye, low_precision=low_precision)

    def _phase(self, name: str, work: Callable[[T], R], over: Sequence[T]) -> list[R]:
        started_at = time.perf_counter()
        with _workers(self._by_member) as pool:
            # Threads do not inherit inference mode or no_grad; nothing here needs autograd but vjp, which has its own.
            results = list(pool.map(torch.no_grad()(work), over))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = time.perf_counter() - started_at
        return results


def _allocate(recipe: Recipe, indices: Sequence[int], device: torch.device) -> Cohort:
    templates, bits = recipe.labels.shape
    return Cohort.allocate(
        recipe.seed,
        indices,
        recipe.init,
        width=recipe.width,
        templates=templates,
        bits=bits,
        device=device,
        dtype=recipe.dtype,
    )


def _workers(by_member: bool) -> ThreadPoolExecutor:
    if by_member:
        return ThreadPoolExecutor(cpu_workers(), initializer=torch.set_num_threads, initargs=(1,))
    return ThreadPoolExecutor(1)


def cpu_workers() -> int:
    """How many members are trained at the same time on a CPU: the cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, torch.get_num_threads()))


def free_memory(device: torch.device) -> int:
    """Bytes that a cohort could take."""
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
    """How many members to hold at once.

    Args:
        recipe: how members are made.
        states: the number of evaluation states.
        members: how many there are to train.
        device: where.
        wanted: the user's choice, None to choose from the memory that is free.
        processes: how many there are to be on this machine; on a CPU they share its memory and its cores.

    Raises:
        ValueError: not even one member fits, or not as many as ``wanted``.
    """
    each = recipe.member_bytes + states * recipe.labels.shape[1] * (recipe.dtype.itemsize + 8)
    sharing = processes if device.type == "cpu" else 1
    free = free_memory(device) // sharing
    fit = free // each
    if fit < 1:
        raise ValueError(
            f"--width {recipe.width}: one member needs {each / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free on "
            f"{device}; expected a smaller width"
        )
    if wanted is not None:
        if wanted < 1:
            raise ValueError(f"--cohort {wanted}: expected an integer of at least 1")
        if wanted > fit:
            raise ValueError(
                f"--cohort {wanted}: needs {wanted * each / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free on "
                f"{device}; expected at most {fit}"
            )
        return min(wanted, members)
    budget = int(free * _MEMORY_SHARE.get(device.type, 0.25))
    workers = 1
    if device.type == "cpu":
        budget, workers = min(budget, _MEMORY_CAP_CPU), max(1, cpu_workers() // sharing)
    size = min(max(budget // each, 1), COHORT_MAX)
    # Whole rounds, so that no core waits; but never more than fit.
    size = max(size // workers * workers, min(workers, fit))
    return int(min(size, members))
