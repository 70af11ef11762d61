"""What a run is asked for, and the experiment that follows from a task and these options."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch

from ntk_ensembles.ensemble import (
    INITS,
    LOSSES,
    PRECISIONS,
    DescentOptions,
    EngineChoice,
    Init,
    Loss,
    Precision,
    Recipe,
)
from ntk_ensembles.ensemble.engines import ENGINES
from ntk_ensembles.ensemble.network import FEATURES_MAX, WIDTH_MAX, one_thread
from ntk_ensembles.errors import OptionError, check_choice, check_fraction, check_range, check_seed
from ntk_ensembles.runs.record import RecordedTask
from ntk_ensembles.runs.store import FORMAT, digest, digest_templates
from ntk_ensembles.tasks import EvaluationSet, Task, task_spec
from ntk_ensembles.theory import (
    LAYERS,
    MOVEMENT_MAX,
    PADDING_MAX,
    FiniteWidth,
    Labels,
    Layers,
    LimitPrediction,
    TemplatePredictor,
    WidthPrediction,
    check_labels,
)

Accelerator = Literal["auto", "cpu", "gpu"]
KeepWeights = Literal["auto", "all", "none"]
KeepDeviations = Literal["auto", "all", "sums"]

WEIGHTS_BUDGET_BYTES = 1 << 30
"""Weights that ``keep_weights="auto"`` keeps at most."""

DEVIATIONS_BUDGET_BYTES = 1 << 28
"""Deviations of members that ``keep_deviations="auto"`` keeps at most."""


@dataclass(frozen=True)
class RunOptions:
    """What to train, on which states to evaluate it, and where to write the run."""

    width: int = 8192
    """Hidden units n of each member, 1 to 16777216; even with --init antisymmetric."""

    ensemble: int = 64
    """Members of the ensemble, 1 to 1048576."""

    seed: int = 0
    """Seed of the ensemble: member i is a function of it, of i and of the kind of device alone; 0 to 2^63 - 1."""

    init: Init = "gaussian"
    """Initial weights: i.i.d. N(0, 1), or antisymmetric, with which a network starts at exactly 0."""

    loss: Loss = "whitened"
    """Squared error whitened by the analytic kernel (converges in a few steps), or plain."""

    labels: Labels = "plain"
    """Train on the templates' labels, or on labels corrected for the width, so that the mean of many members approaches
    that of infinite width."""

    layers: Layers = "both"
    """Layers to train: both, or the readout alone, while the hidden layer stays as it was drawn."""

    padding: int = 0
    """Padding templates to add, 0 to 16777216: they set no bit and match no state, and bring the sign decoder's 1-bits
    above 0 where there are enough (ntk-ensembles certify)."""

    precision: Precision = "32-true"
    """Lightning's names; bf16-mixed computes the products of training in bfloat16, except near its end, and all else in
    float32."""

    accelerator: Accelerator = "auto"
    """Where to train; auto takes a GPU if there is one."""

    evaluation_states: int = 1000
    """Distinct states of true trajectories to evaluate members on, 1 to 1000000."""

    evaluation_seed: int = 0
    """Seed of the evaluation states; apart from --seed, so that either can vary alone."""

    tolerance: float = 1e-6
    """A member has converged when its squared training error has fallen to this share of the first."""

    steps: int = 50
    """Steps after which a member is given up as not converged, 1 to 100000."""

    cohort: int | None = None
    """Members to hold at once; by default as many as memory allows, up to 64, or 1024 small ones that take 256 MiB.
    Results do not depend on it. Where only sums of deviations are kept, the next lower power of two is taken."""

    engine: EngineChoice = "auto"
    """Fast path for one-hot training inputs, which templates are, or torch.func in any case, as a check."""

    first_member: int = 0
    """Index of the first member. Jobs of an array train parts of one ensemble, for ntk-ensembles merge."""

    keep_weights: KeepWeights = "auto"
    """Keep trained weights: all, none, or auto, which keeps them if they take at most 1 GiB together. Members whose
    weights are not kept are drawn and trained again when they are needed."""

    keep_deviations: KeepDeviations = "auto"
    """Keep each member's deviations from the NTK mean on the evaluation states: all; only sums over groups of 2, 4, 8,
    … consecutive members, which give the same statistics of N = 1, 2, 4, … members and hardly grow with the ensemble;
    or auto, which keeps all if they take at most 256 MiB together."""

    devices: int = 1
    """Processes to start on this machine, each with members (and, on GPUs, a device) of its own. Under torchrun and
    srun, which start the processes, leave it at 1. Results do not depend on it."""

    out: str | None = None
    """Run directory to write. If it holds a run with the same options already, that run is resumed. By default a
    new directory under runs/."""

    resume: str | None = None
    """Run directory to resume: trains the members that are still missing. The run's saved task and options apply; only
    --ensemble (to add members) and what does not affect the numbers, such as --cohort or --devices, may differ."""

    def __post_init__(self) -> None:
        """Check every option.

        Raises:
            OptionError: An option outside its range.
            ValueError: Options that exclude each other.
        """
        check_range("width", self.width, 1, WIDTH_MAX)
        check_range("ensemble", self.ensemble, 1, 1 << 20)
        check_seed("seed", self.seed)
        check_choice("init", self.init, INITS)
        check_choice("loss", self.loss, LOSSES)
        check_choice("layers", self.layers, LAYERS)
        check_labels(self.labels, self.layers)
        check_range("padding", self.padding, 0, PADDING_MAX)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("accelerator", self.accelerator, get_args(Accelerator))
        check_choice("engine", self.engine, ENGINES)
        check_choice("keep_weights", self.keep_weights, get_args(KeepWeights))
        check_choice("keep_deviations", self.keep_deviations, get_args(KeepDeviations))
        check_range("evaluation_states", self.evaluation_states, 1, 1_000_000)
        check_seed("evaluation_seed", self.evaluation_seed)
        check_range("steps", self.steps, 1, 100_000)
        check_range("first_member", self.first_member, 0, 1 << 30)
        check_range("devices", self.devices, 1, 4096)
        if self.cohort is not None:
            check_range("cohort", self.cohort, 1, 1 << 20)
        check_fraction("tolerance", self.tolerance)
        if self.init == "antisymmetric" and self.width % 2:
            raise OptionError("width", self.width, "an even number with antisymmetric initialisation")
        if self.labels == "corrected" and self.loss != "whitened":
            raise OptionError("labels", "corrected", "plain with another loss than whitened, whose bias is not known")
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise OptionError("accelerator", "gpu", "auto or cpu, as PyTorch sees no GPU here")
        if self.out is not None and self.resume is not None:
            raise ValueError("--out and --resume: expected one of them; a resumed run stays where it is")

    @property
    def saved(self) -> dict[str, Any]:
        """Options that belong to the run itself, by their names."""
        return {name: getattr(self, name) for name in SAVED_OPTIONS}


SESSION_OPTIONS = ("out", "resume", "devices", "cohort", "accelerator")
"""Options that hold for one session."""

SAVED_OPTIONS = tuple(name for name in RunOptions.__dataclass_fields__ if name not in SESSION_OPTIONS)
"""Options that belong to the run itself, as in ``config.yaml``."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """A task and options, with everything that follows from them.

    Attributes:
        task: What is learned.
        options: How.
        recorded: The states that members are evaluated on, where a run has recorded them; otherwise the task gives
            them.
    """

    task: Task[Any, Any]
    options: RunOptions
    recorded: EvaluationSet | None = None

    @property
    def task_spec(self) -> str:
        """Text that selects the task on a command line."""
        return _spec(self.task)

    @property
    def named_options(self) -> dict[str, Any]:
        """The task, its options and those of the run, by the names of their flags."""
        return {"task": self.task_spec, **self.task.options, **self.options.saved}

    @property
    def command_line(self) -> str:
        """Command line that trains the same members."""
        usual, kept = RunOptions().saved, ("width", "ensemble")
        options = {name: value for name, value in self.options.saved.items() if name in kept or value != usual[name]}
        return train_command_line(self.task, options)

    @cached_property
    def evaluation(self) -> EvaluationSet:
        """The states that members are evaluated on."""
        if self.recorded is not None:
            return self.recorded
        with one_thread():
            return EvaluationSet.sample(self.task, self.options.evaluation_states, self.options.evaluation_seed)

    @cached_property
    def predictor(self) -> TemplatePredictor:
        """Theory of infinitely wide members of this kind."""
        options = self.options
        antisymmetric = options.init == "antisymmetric"
        return TemplatePredictor(
            self.task.templates, options.padding, layers=options.layers, antisymmetric=antisymmetric
        )

    @cached_property
    def limit(self) -> LimitPrediction:
        """What infinite width predicts of the evaluation states."""
        return LimitPrediction(self.task, self.evaluation, self.predictor)

    @cached_property
    def finite_width(self) -> FiniteWidth:
        """Theory of the members' own width."""
        return FiniteWidth(self.predictor, self.options.width, corrected=self.options.labels == "corrected")

    @property
    def without_finite_width(self) -> str | None:
        """Why nothing is predicted for the members' own width, in words; None if it is."""
        options, finite = self.options, self.finite_width
        if options.layers == "readout":
            # The path of training does not matter, and so not the loss.
            return None if finite.trusted else f"it is for widths of at least {finite.trusted_from} here"
        if options.loss != "whitened":
            return (
                f"the expansion is for training by the whitened loss, not by {options.loss}, whose steps lead to "
                "another bias"
            )
        if not finite.trusted:
            return (
                f"training moves hidden weights by {finite.movement:.2f} of their scale, and the expansion means "
                f"little above {MOVEMENT_MAX}; it needs a larger width"
            )
        return None

    @cached_property
    def at_width(self) -> WidthPrediction | None:
        """What the members' own width predicts of the evaluation states; None where it is not valid."""
        return self.predict_width(self.limit)

    def predict_width(self, limit: LimitPrediction) -> WidthPrediction | None:
        """Return what the members' own width predicts of states; None where it is not valid.

        Args:
            limit: Infinite width on these states.
        """
        return None if self.without_finite_width else WidthPrediction(limit, self.finite_width)

    @cached_property
    def recipe(self) -> Recipe:
        """How members are made.

        Raises:
            OptionError: The width is too small for labels to be corrected, or a network has no room for the padding.
        """
        options, templates = self.options, len(self.task.templates)
        if options.padding > (room := FEATURES_MAX - templates):
            raise OptionError("padding", options.padding, f"an integer from 0 to {room} beside {templates} templates")
        labels = self.predictor.labels
        if options.labels == "corrected":
            if not self.finite_width.trusted:
                raise OptionError("labels", "corrected", f"plain at width {options.width}, or a larger width")
            labels = self.finite_width.labels
        return Recipe(
            labels.to(torch.float32),
            options.width,
            options.init,
            options.seed,
            options.precision,
            DescentOptions(options.loss, options.tolerance, options.steps, options.engine, options.layers),
        )

    @cached_property
    def device(self) -> torch.device:
        """Where members are trained on this machine."""
        use_gpu = self.options.accelerator != "cpu" and torch.cuda.is_available()
        return torch.device("cuda" if use_gpu else "cpu")

    @property
    def planned(self) -> range:
        """Indices of all members."""
        return range(self.options.first_member, self.options.first_member + self.options.ensemble)

    @property
    def keeps_weights(self) -> bool:
        """Whether trained weights are kept."""
        return _is_kept(self.options.keep_weights, self.weights_bytes, WEIGHTS_BUDGET_BYTES)

    @property
    def weights_bytes(self) -> int:
        """Bytes that the weights of all members take."""
        return self.options.ensemble * self.recipe.weight_bytes

    @property
    def keeps_deviations(self) -> bool:
        """Whether deviations of each member are kept, rather than sums over groups."""
        return _is_kept(self.options.keep_deviations, self.deviations_bytes, DEVIATIONS_BUDGET_BYTES)

    @property
    def deviations_bytes(self) -> int:
        """Bytes that the deviations of all members take in 16 bits."""
        return self.options.ensemble * len(self.evaluation) * self.task.layout.bits * 2

    def fingerprint(self, device_type: str | None = None) -> dict[str, Any]:
        """Return everything that the numbers of a member depend on, in plain values.

        Args:
            device_type: Kind of device that trains the members, "cpu" or "cuda"; by default this machine's.
        """
        evaluation = self.evaluation
        trajectories = {f"trajectory {i}": states for i, states in enumerate(evaluation.trajectories)}
        first = ("width", "init", "loss", "precision", "engine", "layers", "seed", "tolerance", "steps")
        return {
            "format": FORMAT,
            "task": self.task.name,
            "task_options": self.task.options,
            "templates": digest_templates(self.task.templates),
            **{name: getattr(self.options, name) for name in (*first, "evaluation_states", "evaluation_seed")},
            "evaluation_digest": digest({"states": evaluation.states, "matches": evaluation.matches, **trajectories}),
            "device": device_type or self.device.type,
            "labels": self.options.labels,
            "padding": self.options.padding,
        }


def _is_kept(choice: str, size: int, budget: int) -> bool:
    """Return whether something of a size in bytes is kept; "auto" keeps what is within the budget."""
    return choice == "all" or (choice == "auto" and size <= budget)


def _spec(task: Task[Any, Any]) -> str:
    return task.spec if isinstance(task, RecordedTask) else task_spec(task)


def train_command_line(task: Task[Any, Any], options: Mapping[str, Any]) -> str:
    """Return the command line that trains with these options.

    Args:
        task: What is learned.
        options: Options of the run, by name.
    """
    usual = {name: parameter.default for name, parameter in inspect.signature(type(task)).parameters.items()}
    # What is None by default is left out: there may be no word for it.
    own = {name: value for name, value in task.options.items() if value is not None or usual.get(name) is not None}
    words = ["ntk-ensembles", "train", "--task", _spec(task)]
    for name, value in (own | dict(options)).items():
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        words += [f"--{name.replace('_', '-')}", "none" if value is None else text]
    return shlex.join(words)
