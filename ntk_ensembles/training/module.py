"""An ensemble as a LightningModule: the members that are in memory, trained together; and what it measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, MultilabelExactMatch

from ntk_ensembles.ensemble import (
    PRECISIONS,
    Descent,
    DescentOptions,
    EngineChoice,
    Init,
    Loss,
    MemberStatus,
    MLPStack,
    TwoLayerMLP,
    predict,
)
from ntk_ensembles.ensemble.descent import inverse_kernel_of
from ntk_ensembles.theory import DECODERS, Layers, bit_error_probability, decode, exact_match_probability, margins
from ntk_ensembles.training.data import EvaluationBatch

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class EnsembleModule(LightningModule):
    """Members of an ensemble, trained by Lightning's `Trainer` on one batch (X, Y).

    By default they are trained by `Descent`, the package's rule: full-batch, a step an epoch, each member until it
    has converged by itself; `fit` ends when no member is left running. Its memory is the optimizer's state, so
    Lightning's checkpoints hold it and a resumed `fit` takes the very steps of one that was not interrupted.

    The members are drawn when the module is made, on PyTorch's default device. Make it inside
    ``trainer.init_module()`` to draw large members on a GPU: member i is a function of (seed, i) and of the type of
    device that it was drawn on.

    Args:
        in_features: k, the inputs' dimension.
        out_features: m, the outputs' dimension.
        width: n, the hidden units of each member.
        members: Number of members, which are then 0, 1, …; or their indices in the ensemble.
        seed: Seed of the ensemble.
        init: How weights are drawn, "gaussian" or "antisymmetric".
        loss: What is minimised: "whitened", the squared error whitened by the NTK, or "mse", the plain one.
        tolerance: Share of the first squared training error at which a member has converged; `Descent` only.
        steps_max: Steps after which a member is given up; `Descent` only.
        engine: "auto" takes a fast path for one-hot X; "functional" never does; `Descent` only.
        layers: Which layers are trained: "both", or the "readout" alone, while the hidden layer stays as it was drawn.
        optimizer: To study another rule, pass what makes a PyTorch optimizer from parameters, such as
            ``functools.partial(torch.optim.Adam, lr=1e-3)``. The loss is then the sum over members of ½·tr(R Rᵀ),
            or of ½·tr(R Θ⁻¹ Rᵀ) for "whitened", which needs all of X in one batch. It is given the parameters of the
            layers that are trained.

    Attributes:
        stack: The members.

    Raises:
        OptionError: An argument outside its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int,
        members: int | Sequence[int],
        *,
        seed: int = 0,
        init: Init = "gaussian",
        loss: Loss = "whitened",
        tolerance: float = 1e-6,
        steps_max: int = 50,
        engine: EngineChoice = "auto",
        layers: Layers = "both",
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(members, int):
            members = list(members)  # as plain values, so that a checkpoint loads without executing anything
        self.save_hyperparameters(ignore=["optimizer"])
        options = DescentOptions(loss, tolerance, steps_max, engine, layers)
        self.stack = MLPStack(in_features, out_features, width, members, seed=seed, init=init)
        self.stack.hidden.requires_grad_(layers == "both")
        self._layers: Layers = layers
        self._make_optimizer = optimizer
        self._loss: Loss = loss
        self._descent = Descent(self.stack, options)
        # Descent takes its steps itself; any other optimizer is left to Lightning.
        self.automatic_optimization = optimizer is not None
        self.val_metrics = EvaluationMetrics("val/", out_features)
        self.test_metrics = EvaluationMetrics("test/", out_features)

    def forward(self, x: Float[Tensor, "inputs in_features"]) -> Float[Tensor, "members inputs out_features"]:
        """Return every member's outputs at a batch of inputs."""
        outputs: Tensor = self.stack(x)
        return outputs

    def member(self, position: int) -> TwoLayerMLP:
        """Return a copy of one member as a network of its own; see `MLPStack.member`."""
        return self.stack.member(position)

    def initial(self, position: int) -> TwoLayerMLP:
        """Return one member as it was before training; see `MLPStack.initial`."""
        return self.stack.initial(position)

    @property
    def statuses(self) -> list[MemberStatus]:
        """How far each member has come; as at the start if another optimizer than `Descent` trains them."""
        return self._descent.statuses

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that was asked for, or the package's rule."""
        if self._make_optimizer is None:
            return self._descent
        return self._make_optimizer([weights for weights in self.stack.parameters() if weights.requires_grad])

    def setup(self, stage: str) -> None:
        """Refuse trainers that cannot train independent members.

        Raises:
            ValueError: Several processes, or a precision that `Descent` does not have.
        """
        if self.trainer.world_size > 1:
            raise ValueError(
                f"Trainer(devices=…): an EnsembleModule trains on one device, not in {self.trainer.world_size} "
                "processes; members are independent, so give each process members of its own, as train.py does"
            )
        if stage == "fit" and self._make_optimizer is None and self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"Trainer(precision={self.trainer.precision!r}): expected one of {', '.join(PRECISIONS)}, or an "
                "optimizer of your own"
            )

    def on_train_start(self) -> None:
        """Check that X comes in one batch, and let members know the precision.

        Raises:
            ValueError: Several training batches with a rule that needs all of X at once.
        """
        full_batch = self._make_optimizer is None or self._loss == "whitened"
        if full_batch and self.trainer.num_training_batches != 1:
            raise ValueError(
                f"{self.trainer.num_training_batches} training batches: expected one that holds all of X and Y "
                '(batch_size=len(X)), or an optimizer of your own with loss="mse"'
            )
        # Autocast reaches the main thread only; members are trained on several.
        self._descent.bfloat16 = self.trainer.precision == "bf16-mixed"

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        """Take one step with every member, or return the loss for another optimizer to descend."""
        x, y = batch
        if self._make_optimizer is not None:
            return self._training_loss(x, y)
        if not self._descent.is_bound:
            self._descent.bind(x, y)
        if self._descent.running:
            # Lightning's wrapper, which counts the step.
            cast(torch.optim.Optimizer, self.optimizers()).step()
        losses = torch.tensor([status.losses[-1] for status in self.statuses], dtype=torch.float64)
        relative = torch.tensor([status.relative_loss for status in self.statuses], dtype=torch.float64)
        self._log_losses(losses, relative)
        if not self._descent.running:
            self.trainer.should_stop = True
        return None

    def _training_loss(self, x: Tensor, y: Tensor) -> Tensor:
        residuals = self(x) - y
        self._log_losses(residuals.detach().double().square().mean((1, 2)), None)
        whitened = residuals if self._loss == "mse" else inverse_kernel_of(x, self._layers)(residuals.mT).mT
        loss: Tensor = (residuals * whitened).sum() / 2
        return loss

    def _log_losses(self, losses: Tensor, relative: Tensor | None) -> None:
        """Log the mean squared training errors of the members."""
        values = {"train/loss_max": losses.max(), "train/loss_median": losses.median(), "train/loss_min": losses.min()}
        # An epoch of Descent is one step; logged by epoch, no step is left out by the trainer's logging interval.
        by_step = self._make_optimizer is not None
        self.log_dict(values, on_step=by_step, on_epoch=not by_step, batch_size=1)
        if relative is not None:
            running = float(sum(status.running for status in self.statuses))
            progress: dict[str, Tensor | float] = {"train/relative_loss_max": relative.max(), "train/running": running}
            self.log_dict(progress, on_step=False, on_epoch=True, prog_bar=True, batch_size=1)

    def on_train_end(self) -> None:
        """Free what only training needs."""
        self._descent.release()

    def validation_step(self, batch: EvaluationBatch | Sequence[Tensor], batch_idx: int) -> None:
        """Measure the ensemble on evaluation states, or its squared error on a batch (X, Y)."""
        self._evaluate(batch, "val/", self.val_metrics)

    def test_step(self, batch: EvaluationBatch | Sequence[Tensor], batch_idx: int) -> None:
        """Measure the ensemble on evaluation states, or its squared error on a batch (X, Y)."""
        self._evaluate(batch, "test/", self.test_metrics)

    def predict_step(
        self, batch: EvaluationBatch | Sequence[Tensor] | Tensor, batch_idx: int
    ) -> Float[Tensor, "members inputs out_features"]:
        """Return every member's outputs at the batch's inputs."""
        inputs = batch["inputs"] if isinstance(batch, Mapping) else batch if isinstance(batch, Tensor) else batch[0]
        outputs: Tensor = predict(self.stack, inputs)
        return outputs

    def _evaluate(self, batch: EvaluationBatch | Sequence[Tensor], prefix: str, metrics: EvaluationMetrics) -> None:
        # Members that were given up are never averaged in; those that are still running are.
        kept = [i for i, status in enumerate(self.statuses) if status.running or status.converged]
        outputs = self.predict_step(batch, 0)
        mean = (outputs[kept] if 0 < len(kept) < len(outputs) else outputs).mean(0)
        if not isinstance(batch, Mapping):
            self.log(f"{prefix}loss", (mean - batch[1]).double().square().mean(), batch_size=len(mean))
            return
        members = len(kept) or len(outputs)
        metrics.update(mean, batch, members, antisymmetric=self.stack.init == "antisymmetric")
        self.log_dict(metrics, batch_size=len(mean))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the members' statuses, also where no `fit` follows."""
        states = checkpoint.get("optimizer_states")
        if states and self._make_optimizer is None:
            self._descent.load_state_dict(states[0])


class EvaluationMetrics(MetricCollection):
    """Metrics of an ensemble's mean on evaluation states.

    For each decoder ``exact_match/DECODER``, the share of states all of whose bits are decoded right, and
    ``bit_accuracy/DECODER``, the share of bits; and ``rms_deviation``, the root mean square of the ensemble's mean
    minus the NTK mean. Each has a twin ``predicted_…``, its expected value at infinite width.

    Args:
        prefix: Prefix of the names, such as "val/".
        bits: Bits of a state, m.
    """

    def __init__(self, prefix: str, bits: int) -> None:
        metrics: dict[str, Metric | MetricCollection] = {}
        for decoder in DECODERS:
            metrics[f"exact_match/{decoder}"] = MultilabelExactMatch(bits, validate_args=False)
            metrics[f"predicted_exact_match/{decoder}"] = MeanMetric()
            metrics[f"bit_accuracy/{decoder}"] = BinaryAccuracy(validate_args=False)
            metrics[f"predicted_bit_accuracy/{decoder}"] = MeanMetric()
        metrics["rms_deviation"] = MeanSquaredError(squared=False)
        metrics["predicted_rms_deviation"] = MeanSquaredError(squared=False)
        super().__init__(metrics, prefix=prefix, compute_groups=False)

    def update(  # type: ignore[override]  # torchmetrics' own signature, which mypy takes from ModuleDict
        self, mean: Float[Tensor, "states bits"], batch: EvaluationBatch, members: int, *, antisymmetric: bool
    ) -> None:
        """Count one batch of states.

        Args:
            mean: The ensemble's mean outputs.
            batch: The states and what is known of them.
            members: Number of members in the mean.
            antisymmetric: Whether they started at exactly 0: their variance at infinite width is then 0.
        """
        next_states, variance = batch["next_states"], batch["variance"] * (not antisymmetric)
        for decoder in DECODERS:
            thresholds = batch["thresholds"][decoder]
            decoded = decode(mean.to(thresholds), thresholds).int()
            expected = margins(batch["mean"], thresholds, next_states)
            for name in ("exact_match", "bit_accuracy"):
                self[f"{name}/{decoder}"].update(decoded, next_states.int())
            exact = exact_match_probability(expected, variance, members)
            errors = bit_error_probability(expected, variance, members)
            self[f"predicted_exact_match/{decoder}"].update(exact)
            self[f"predicted_bit_accuracy/{decoder}"].update(1 - errors)
        spread = (variance / members).sqrt()
        self["rms_deviation"].update(mean.to(batch["mean"]), batch["mean"])
        self["predicted_rms_deviation"].update(spread, spread.new_zeros(spread.shape))
