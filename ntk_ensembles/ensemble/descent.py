"""How members are trained: gradient descent, extrapolated in the space of outputs (DESIGN §4).

A step changes the weights by −Jᵀp, where J is the network's Jacobian at the training inputs and p, the
*cotangent*, has the shape of the outputs: with p the loss gradient ∂L/∂f this is gradient descent.
Wide networks are nearly linear in their weights, so the change that a step made to the outputs tells
what a multiple of it would have made. `descend` therefore picks p as the combination of earlier
cotangents that would have left the least residual, plus the gradient there (Anderson acceleration;
on a linear model it is GMRES). It needs no step size to be tuned or spectrum to be known, keeps the
weights in the Jacobian's row space, and so ends at the interpolant of gradient descent itself. All it
remembers has the size of the outputs, not of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_ensembles.theory.kernels import InverseKernel

Loss = Literal["whitened", "mse"]
"""``whitened``: ½·tr(R Θ⁻¹ Rᵀ) with the analytic kernel Θ = Θ(X, X), whose curvature is 1 in every direction
up to O(√(k/n)). ``mse``: ½·tr(R Rᵀ) at the step size 2/(λmin + λmax) of Θ. R are the residuals f(X) − Y."""

LOSSES: tuple[Loss, ...] = get_args(Loss)

_MEMORY = 6
"""Earlier steps remembered: what a step in output space costs is nothing beside one in weight space."""

_DIVERGED = 1e4
"""A loss so many times the first is not coming back; mse steps pass 10 on their way to convergence."""

_RESTARTS = 4


@dataclass(frozen=True)
class DescentOptions:
    """When to stop."""

    tolerance: float = 1e-6
    """Converged when the mean squared training error has fallen to this share of the first."""
    steps_max: int = 50
    """Give up after so many steps (a restart counts on)."""


@dataclass
class MemberStatus:
    """How one member's training ended."""

    converged: bool
    """Whether the tolerance was reached."""
    steps: int
    """Steps taken, restarts included."""
    relative_loss: float
    """The last mean squared training error over the first (DESIGN §4)."""
    restarts: int
    """How often training diverged and began again, with half the step."""
    losses: list[float] = field(default_factory=list)
    """The mean squared training error before each step, and after the last."""


@runtime_checkable
class Trainable(Protocol):
    """A cohort and its training inputs, as `descend` sees them: a function of cotangents."""

    def outputs(self) -> Float[Tensor, "members bits templates"]:
        """f(X)ᵀ of every member."""
        ...

    def step(self, cotangents: Float[Tensor, "members bits templates"]) -> Float[Tensor, "members bits templates"]:
        """Change every member's weights by −Jᵀ·cotangent and return the new outputs."""
        ...

    def restart(self, position: int) -> None:
        """Set one member back to its initial weights."""
        ...


def descend(
    model: Trainable,
    labels: Float[Tensor, "bits templates"],
    loss: Loss,
    inverse_kernel: InverseKernel,
    options: DescentOptions | None = None,
) -> list[MemberStatus]:
    """Train all members of a cohort to the labels.

    Each member has its own extrapolation, stops by itself, and is not changed by the others. A member
    that diverges is drawn anew and trained with half the step.

    Args:
        model: the members, changed in place.
        labels: Yᵀ.
        loss: which gradient.
        inverse_kernel: Θ(X, X)⁻¹ of the training inputs.
        options: when to stop.

    Returns:
        A status for each member. Non-convergence is a status, not an error.

    Raises:
        ValueError: an unknown loss.
    """
    options = options or DescentOptions()
    if loss not in LOSSES:
        raise ValueError(f"--loss {loss}: expected one of {', '.join(LOSSES)}")
    outputs = model.outputs()
    members = outputs.shape[0]
    statuses = [MemberStatus(False, 0, 1.0, 0) for _ in range(members)]
    running = set(range(members))
    damping = torch.ones(members, 1, 1, dtype=outputs.dtype, device=outputs.device)
    history = _History(inverse_kernel)
    while True:
        residuals = outputs - labels
        diverged = _observe(residuals, statuses, running, options)
        if not running:
            return statuses
        for i in diverged:
            statuses[i].restarts += 1
            damping[i] /= 2
            model.restart(i)
            history.forget(i)
        if diverged:
            residuals = model.outputs() - labels
        # A member that has stopped takes part in the cohort's arithmetic, but with zeros (its own numbers
        # may not even be finite).
        stopped = [i for i in range(members) if i not in running]
        residuals[stopped] = 0
        for i in stopped:
            history.forget(i)
        cotangents = history.propose(residuals, lambda r: damping * _gradient(r, loss, inverse_kernel))
        cotangents[stopped] = 0
        outputs = model.step(cotangents)
        changes = outputs - labels - residuals
        changes[stopped] = 0
        history.record(cotangents, changes)


def _observe(residuals: Tensor, statuses: list[MemberStatus], running: set[int], options: DescentOptions) -> list[int]:
    """Write the losses of the running members into their statuses and take out those that stop.

    Returns:
        The running members that have diverged and may begin again.
    """
    losses = residuals.to(torch.float64).square().mean((1, 2)).tolist()
    diverged = []
    for i in sorted(running):
        status = statuses[i]
        status.losses.append(losses[i])
        status.steps = len(status.losses) - 1
        status.relative_loss = losses[i] / status.losses[0] if status.losses[0] else 0.0
        status.converged = status.relative_loss <= options.tolerance
        # Written so that a loss that is not a number counts as diverged.
        has_diverged = not status.relative_loss <= _DIVERGED
        if status.converged or status.steps >= options.steps_max or (has_diverged and status.restarts == _RESTARTS):
            running.remove(i)
        elif has_diverged:
            diverged.append(i)
    return diverged


def _gradient(residuals: Tensor, loss: Loss, inverse_kernel: InverseKernel) -> Tensor:
    """∂L/∂f, scaled so that a step of size 1 is right for a network of infinite width."""
    if loss == "whitened":
        return inverse_kernel(residuals)
    smallest, largest = inverse_kernel.eigenvalue_bounds
    return residuals * (2 / (smallest + largest))


class _History:
    """The last steps: their cotangents, what they did to the outputs, and the products needed of them."""

    def __init__(self, inverse_kernel: InverseKernel) -> None:
        self._inverse_kernel = inverse_kernel
        self._cotangents: list[Tensor] = []
        self._changes: list[Tensor] = []
        self._whitened: list[Tensor] = []

    def record(self, cotangents: Tensor, changes: Tensor) -> None:
        for memory, value in (
            (self._cotangents, cotangents),
            (self._changes, changes),
            (self._whitened, self._inverse_kernel(changes)),
        ):
            memory.append(value)
            del memory[:-_MEMORY]

    def forget(self, position: int) -> None:
        for memory in (self._cotangents, self._changes, self._whitened):
            for value in memory:
                value[position] = 0

    def propose(self, residuals: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """The combination of past cotangents that leaves the least residual, and the gradient there.

        Least in the norm tr(R Θ⁻¹ Rᵀ), in which steps of the whitened loss are near-orthogonal.
        """
        if not self._changes:
            return gradient(residuals)
        gram = torch.stack([_products(self._whitened, change) for change in self._changes], 1)
        target = _products(self._whitened, residuals)
        # A forgotten or vanishing step has a zero row; the ridge gives it the coefficient 0.
        ridge = 1e-12 * gram.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(gram.dtype).tiny ** 0.5)
        gram = gram + ridge[:, None, None] * torch.eye(len(self._changes), dtype=gram.dtype, device=gram.device)
        weights = -torch.linalg.solve(gram, target).to(residuals.dtype)[:, :, None, None]
        predicted = residuals.clone()
        for i, change in enumerate(self._changes):
            predicted += weights[:, i] * change
        proposal = gradient(predicted)
        for i, cotangent in enumerate(self._cotangents):
            proposal += weights[:, i] * cotangent
        return proposal


def _products(left: list[Tensor], right: Tensor) -> Tensor:
    """⟨left_i, right⟩ of each member, (members, len(left)), in double precision."""
    return torch.stack([(value * right).sum((1, 2), dtype=torch.float64) for value in left], 1)
