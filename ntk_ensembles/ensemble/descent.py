"""The training rule: gradient descent, extrapolated in the space of outputs (docs/theory.md, section 8).

A step changes the weights by −Jᵀp, where J is the network's Jacobian at the training inputs and p, the
*cotangent*, has the shape of the outputs: with p the loss gradient ∂L/∂f this is gradient descent.
Wide networks are nearly linear in their weights, so the change that a step made to the outputs tells
what a multiple of it would have made. The rule therefore picks p as the combination of earlier
cotangents that would have left the least residual, plus the gradient there (Anderson acceleration;
on a linear model it is GMRES). It needs no step size to be tuned or spectrum to be known, keeps the
weights in the Jacobian's row space, and so ends at the interpolant of gradient descent itself. All it
remembers has the size of the outputs, not of the weights.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ntk_ensembles.ensemble.engines import ENGINES, Engine, EngineChoice, is_one_hot, make_engine, members_at_once
from ntk_ensembles.ensemble.network import MLPStack, map_members
from ntk_ensembles.errors import check_choice, check_fraction, check_range
from ntk_ensembles.theory.kernels import LAYERS, InverseKernel, Layers, check_finite

Loss = Literal["whitened", "mse"]
"""``whitened``: ½·tr(R Θ⁻¹ Rᵀ) with the analytic kernel Θ = Θ(X, X), whose curvature is 1 in every direction
up to O(√(k/n)). ``mse``: ½·tr(R Rᵀ) at the step size 2/(λmin + λmax) of Θ. R are the residuals f(X) − Y. Where the
readout alone is trained, the kernel is K in place of Θ."""

LOSSES: tuple[Loss, ...] = get_args(Loss)

_MEMORY = 6
"""Earlier steps remembered: what a step in output space costs is nothing beside one in weight space."""

_FAR = 0.01
"""Loss, relative to the initial one, from which a step's outcome may be measured in bfloat16. That is off by
a loss of about 1e-6, which would keep a member from coming closer than that in the step after."""

_DIVERGED = 1e4
"""Loss, relative to the initial one, above which a member counts as diverged. Well above 10, which mse
training can exceed and still converge."""

_RESTARTS = 4
"""Restarts, each with half the step of the one before, after which a member is given up."""


@dataclass(frozen=True)
class DescentOptions:
    """What members minimise, and when they stop."""

    loss: Loss = "whitened"
    """Squared error whitened by the analytic kernel (converges in a few steps), or plain."""
    tolerance: float = 1e-6
    """A member has converged when its mean squared training error has fallen to this share of the first."""
    steps_max: int = 50
    """Steps after which a member is given up as not converged; restarts count on."""
    engine: EngineChoice = "auto"
    """Fast path for one-hot training inputs where they are one-hot, or `torch.func` in any case."""
    layers: Layers = "both"
    """Which layers are trained: both, or the readout alone, while the hidden layer stays as it was drawn."""

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            OptionError: An option outside its range.
        """
        check_choice("loss", self.loss, LOSSES)
        check_choice("engine", self.engine, ENGINES)
        check_choice("layers", self.layers, LAYERS)
        check_range("steps_max", self.steps_max, 1, 100_000)
        check_fraction("tolerance", self.tolerance)


@dataclass
class MemberStatus:
    """How far one member's training has come."""

    running: bool = True
    """Whether it is still being trained."""
    converged: bool = False
    """Whether it reached the tolerance."""
    restarts: int = 0
    """How often its training diverged and began again, with half the step."""
    losses: list[float] = field(default_factory=list)
    """Mean squared training error before each step, and after the last."""

    @property
    def steps(self) -> int:
        """Steps taken, those before a restart included."""
        return max(len(self.losses) - 1, 0)

    @property
    def relative_loss(self) -> float:
        """The last mean squared training error over the first; 0 if the first is 0."""
        if not self.losses:
            return 1.0
        return self.losses[-1] / self.losses[0] if self.losses[0] else 0.0


class Descent(torch.optim.Optimizer):
    """Full-batch descent of all members of a stack: an optimizer that computes its own gradients.

    Each member has its own extrapolation, stops by itself, and is not changed by the others. A member that
    diverges is drawn anew and trained with half the step. Not converging is a status, not an error.

    ```python
    descent = Descent(stack)
    descent.bind(X, Y)
    while descent.running:
        descent.step()
    ```

    Args:
        stack: The members; their weights are changed in place.
        options: What they minimise, and when they stop.
        bfloat16: Compute products in bfloat16, except those of the outputs near the end, by which a member
            is said to have converged.
        together: Members to compute on as one batch. None chooses by the device and the size: all members on a
            GPU; on a CPU, where each batch is one thread's, a single one, or several that are small.

    Attributes:
        statuses: How far each member has come.
    """

    def __init__(
        self,
        stack: MLPStack,
        options: DescentOptions | None = None,
        *,
        bfloat16: bool = False,
        together: int | None = None,
    ) -> None:
        # A step of size 1 is right for networks of infinite width; nothing needs to be tuned.
        super().__init__(list(stack.parameters()), {"lr": 1.0})
        self.bfloat16 = bfloat16
        self.statuses = [MemberStatus() for _ in range(len(stack))]
        self._stack = stack
        self._options = options or DescentOptions()
        self._together = together
        self._trainings: list[_Training] = []
        self._loaded: list[dict[str, Any]] | None = None
        self._digest: str | None = None

    @property
    def running(self) -> bool:
        """Whether any member is still being trained."""
        return any(status.running for status in self.statuses)

    @property
    def is_bound(self) -> bool:
        """Whether `bind` has been called."""
        return bool(self._trainings)

    def bind(self, inputs: Float[Tensor, "inputs in_features"], labels: Float[Tensor, "inputs out_features"]) -> None:
        """Choose what the members are trained on, and measure their first losses.

        Args:
            inputs: X, one training input a row; no zero and no parallel rows, as Θ(X, X) has to be invertible.
            labels: Y, the target of each.

        Raises:
            ValueError: Inputs and labels that fit neither each other nor the members, or have a number that is not
                finite; or a singular Θ(X, X).
        """
        hidden, readout = self._stack.hidden.detach(), self._stack.readout.detach()
        if inputs.dim() != 2 or labels.dim() != 2 or len(inputs) != len(labels):
            raise ValueError(
                f"training inputs of shape {tuple(inputs.shape)} and labels of shape {tuple(labels.shape)}: "
                "expected as many rows in both"
            )
        if inputs.shape[1] != hidden.shape[2] or labels.shape[1] != readout.shape[1]:
            raise ValueError(
                f"training inputs with {inputs.shape[1]} features and labels with {labels.shape[1]}: "
                f"expected {hidden.shape[2]} and {readout.shape[1]}, the members' own"
            )
        inputs, targets = inputs.detach().to(hidden), labels.detach().to(readout).mT.contiguous()
        check_finite("training inputs", inputs)
        check_finite("labels", targets.mT)
        digest = _digest(inputs, targets)
        if self._digest not in (None, digest):
            # Other data: what was learned before is where training starts now.
            self.statuses[:] = [MemberStatus() for _ in self.statuses]
            self._loaded = None
        self._digest = digest
        options = self._options
        inverse_kernel = inverse_kernel_of(inputs, options.layers)
        together = self._together or members_at_once(hidden, readout, inputs, options.engine, bfloat16=self.bfloat16)
        members = range(len(hidden))
        parts = [slice(start, start + together) for start in members[::together]]
        self._trainings = [
            _Training(
                make_engine(
                    hidden[part],
                    readout[part],
                    inputs,
                    options.engine,
                    layers=options.layers,
                    bfloat16=self.bfloat16,
                ),
                targets,
                inverse_kernel,
                options,
                self.statuses[part],
                [partial(self._stack.redraw, position) for position in members[part]],
                bfloat16=self.bfloat16,
            )
            for part in parts
        ]
        if self._loaded is not None:
            for training, state in zip(self._trainings, self._loaded, strict=True):
                training.load_state(state)
            self._loaded = None
        map_members(_Training.observe, self._trainings, hidden.device)

    def release(self) -> None:
        """Free the training data and all temporaries. After another `bind` to the same data, steps continue."""
        if self.running and self.is_bound:
            self._loaded = [training.state() for training in self._trainings]
        self._trainings = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with every member that is still running.

        Args:
            closure: Called first, as by every PyTorch optimizer; it need not compute gradients.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: `bind` has not been called.
        """
        result = None if closure is None else closure()
        if not self.is_bound:
            raise RuntimeError("Descent.bind(inputs, labels) has to be called before the first step")
        map_members(_Training.step, self._trainings, self._stack.hidden.device)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the remaining steps depend on, beside the weights, in plain values and tensors."""
        trainings = self._loaded if self._loaded is not None else [training.state() for training in self._trainings]
        statuses = [asdict(status) for status in self.statuses]
        return {"statuses": statuses, "trainings": trainings, "data": self._digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`; the members' weights have to be those of the same moment.

        Raises:
            ValueError: The state of another number of members.
        """
        if len(state_dict["statuses"]) != len(self.statuses):
            raise ValueError(f"a state of {len(state_dict['statuses'])} members: expected {len(self.statuses)}")
        self.statuses[:] = [MemberStatus(**copy.deepcopy(status)) for status in state_dict["statuses"]]
        self._loaded = list(state_dict["trainings"]) or None
        self._digest = state_dict["data"]
        self._trainings = []


class _Training:
    """Members that are trained together: all of a stack, or a single one."""

    def __init__(
        self,
        engine: Engine,
        targets: Float[Tensor, "out_features inputs"],
        inverse_kernel: InverseKernel,
        options: DescentOptions,
        statuses: list[MemberStatus],
        redraw: list[Callable[[], None]],
        *,
        bfloat16: bool,
    ) -> None:
        self._engine = engine
        self._targets = targets
        self._inverse_kernel = inverse_kernel
        self._options = options
        self._statuses = statuses
        self._redraw = redraw
        self._bfloat16 = bfloat16
        self._coarse = False
        self._damping = torch.ones(len(statuses), 1, 1, dtype=targets.dtype, device=targets.device)
        self._history = _History(inverse_kernel)
        self._residuals: Tensor | None = None
        self._diverged: list[int] = []

    def observe(self) -> None:
        """Compute the outputs as the weights are now, and the first losses of members that have none yet."""
        is_first = not any(status.losses for status in self._statuses)
        if is_first:
            self._coarse = self._is_far()
        # Otherwise as precisely as before, so that a resumed run goes on with the same numbers.
        self._residuals = self._engine.outputs(coarse=self._coarse) - self._targets
        if is_first:
            self._update_statuses()

    def step(self) -> None:
        """Take one step with the members that are still running."""
        assert self._residuals is not None
        if not any(status.running for status in self._statuses):
            return
        for i in self._diverged:
            self._statuses[i].restarts += 1
            self._damping[i] /= 2
            self._redraw[i]()
        self._history.forget(torch.tensor(self._diverged, dtype=torch.int64, device=self._residuals.device))
        self._coarse = self._is_far()
        if self._diverged:
            self._residuals = self._engine.outputs(coarse=self._coarse) - self._targets
        residuals = self._residuals
        # A member that has stopped takes part in the arithmetic of its part, but with zeros (its own numbers
        # may not even be finite). Their positions go to the device once: each list of them would make a GPU wait.
        stopped = torch.tensor(
            [i for i, status in enumerate(self._statuses) if not status.running],
            dtype=torch.int64,
            device=residuals.device,
        )
        residuals[stopped] = 0
        self._history.forget(stopped)
        cotangents = self._history.propose(residuals, self._gradient)
        cotangents[stopped] = 0
        self._residuals = self._engine.step(cotangents, coarse=self._coarse) - self._targets
        changes = self._residuals - residuals
        changes[stopped] = 0
        self._history.record(cotangents, changes)
        self._update_statuses()

    def _update_statuses(self) -> None:
        """Record the losses of the running members, and decide which of them stop and which have diverged."""
        losses = self._losses()
        if self._coarse and any(
            status.running and loss <= self._options.tolerance * (status.losses or losses)[0]
            for status, loss in zip(self._statuses, losses, strict=True)
        ):
            # Only outputs of the weights' own type say that a member has converged.
            self._coarse = False
            self._residuals = self._engine.outputs() - self._targets
            losses = self._losses()
        self._diverged = []
        for i, status in enumerate(self._statuses):
            if not status.running:
                continue
            status.losses.append(losses[i])
            status.converged = status.relative_loss <= self._options.tolerance
            # Written so that a loss that is not a number counts as diverged.
            has_diverged = not status.relative_loss <= _DIVERGED
            given_up = status.steps >= self._options.steps_max or (has_diverged and status.restarts == _RESTARTS)
            if status.converged or given_up:
                status.running = False
            elif has_diverged:
                self._diverged.append(i)

    def _losses(self) -> list[float]:
        """Return every member's mean squared training error."""
        assert self._residuals is not None
        losses: list[float] = self._residuals.to(torch.float64).square().mean((1, 2)).tolist()
        return losses

    def _is_far(self) -> bool:
        """Return whether bfloat16 is asked for, and good enough to see where the next step leads."""
        return self._bfloat16 and all(status.relative_loss >= _FAR for status in self._statuses if status.running)

    def _gradient(self, residuals: Tensor) -> Tensor:
        """Return ∂L/∂f, scaled so that a step of size 1 is right for a network of infinite width."""
        if self._options.loss == "whitened":
            return self._damping * self._inverse_kernel(residuals)
        smallest, largest = self._inverse_kernel.eigenvalue_bounds
        return self._damping * residuals * (2 / (smallest + largest))

    def state(self) -> dict[str, Any]:
        """Return what the next steps depend on, beside weights and statuses."""
        return {
            "damping": self._damping.clone(),
            "diverged": list(self._diverged),
            "coarse": self._coarse,
            "history": self._history.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a `state`."""
        self._damping.copy_(state["damping"])
        self._diverged = list(state["diverged"])
        self._coarse = state["coarse"]
        self._history.load_state(state["history"], self._targets)


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

    def forget(self, positions: Int64[Tensor, " stopped"]) -> None:
        if not len(positions):
            return
        for memory in (self._cotangents, self._changes, self._whitened):
            for value in memory:
                value[positions] = 0

    def state(self) -> dict[str, list[Tensor]]:
        # Copies, as the next step may forget members in place.
        return {
            "cotangents": [value.clone() for value in self._cotangents],
            "changes": [value.clone() for value in self._changes],
        }

    def load_state(self, state: dict[str, list[Tensor]], like: Tensor) -> None:
        self._cotangents = [value.to(like, copy=True) for value in state["cotangents"]]
        self._changes = [value.to(like, copy=True) for value in state["changes"]]
        self._whitened = [self._inverse_kernel(change) for change in self._changes]

    def propose(self, residuals: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the combination of past cotangents that leaves the least residual, plus the gradient there.

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


def inverse_kernel_of(inputs: Float[Tensor, "inputs in_features"], layers: Layers = "both") -> InverseKernel:
    """Return Θ(X, X)⁻¹, or K(X, X)⁻¹: in closed form if X is one-hot, otherwise factored in double precision.

    Args:
        inputs: X, one training input a row.
        layers: Which layers are trained.

    Raises:
        ValueError: The kernel's matrix is singular: a zero row, or parallel rows.
    """
    return (
        InverseKernel.for_one_hot(len(inputs), layers)
        if is_one_hot(inputs)
        else InverseKernel.from_inputs(inputs.double().cpu(), layers)
    )


def _digest(inputs: Tensor, targets: Tensor) -> str:
    """Return a digest that tells training data apart."""
    summed = hashlib.sha256()
    for tensor in (targets,) if is_one_hot(inputs) else (inputs, targets):
        summed.update(tensor.double().cpu().contiguous().numpy().data)
    return summed.hexdigest()


def _products(left: list[Tensor], right: Tensor) -> Tensor:
    """Return ⟨left_i, right⟩ of each member, (members, len(left)), in double precision."""
    return torch.stack([(value * right).sum((1, 2), dtype=torch.float64) for value in left], 1)
