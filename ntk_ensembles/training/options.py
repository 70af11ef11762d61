"""The options of a run, and what follows from them and the task."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ntk_ensembles.ensemble import DescentOptions, Engine, Init, Loss, Precision, Recipe
from ntk_ensembles.errors import check_range
from ntk_ensembles.tasks import EvaluationSet, Task


@dataclass(frozen=True)
class RunOptions:
    """What to train, on what to judge it, and where to leave it."""

    width: int = 8192
    """Hidden units n of each member, 1 to 16777216; even with --init antisymmetric."""

    ensemble: int = 64
    """Members of the ensemble, 1 to 1048576."""

    seed: int = 0
    """Member i is a function of this seed, i and the kind of device alone; 0 to 2^63 - 1."""

    init: Init = "gaussian"
    """Initial weights: i.i.d. N(0, 1), or antisymmetric, with which a network starts at exactly 0."""

    loss: Loss = "whitened"
    """Squared error whitened by the analytic kernel (converges in a few steps), or plain."""

    precision: Precision = "32-true"
    """Lightning's names; bf16-mixed computes gradients in bfloat16 and all else in float32."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; auto takes a GPU if there is one."""

    evaluation_states: int = 1000
    """Distinct states of true trajectories to judge members on, 1 to 1000000."""

    evaluation_seed: int = 0
    """Draws the evaluation states; apart from --seed, so that both can vary alone."""

    tolerance: float = 1e-6
    """A member has converged when its squared training error has fallen to this share of the first."""

    steps: int = 50
    """Steps after which a member is given up as not converged, 1 to 100000."""

    cohort: int | None = None
    """Members to hold at once; by default as many as memory allows, up to 64. Results do not depend on it."""

    engine: Engine = "identity"
    """The fast path for templates as training inputs, or the general one of torch.func, as a check."""

    first_member: int = 0
    """Index of the first member; jobs of an array train parts of one ensemble, for ntk-ensembles merge."""

    keep_weights: Literal["auto", "all", "none"] = "auto"
    """Keep trained weights: all, none, or auto, which keeps them if they take at most 1 GiB together. Members whose
    weights are not kept are redrawn and retrained when they are needed again."""

    devices: int | None = None
    """Processes on this machine, each with members (and, on GPUs, a device) of its own; by default as many as
    torchrun or SLURM started, otherwise 1. Results do not depend on it."""

    num_nodes: int | None = None
    """Machines with so many processes each; by default as many as torchrun or SLURM started, otherwise 1."""

    out: str | None = None
    """Directory for what the run leaves: a new or empty one. By default a fresh one under runs/."""

    resume: str | None = None
    """Directory of a run to go on with: members that it lacks are trained. Its options hold; what may be given is
    --ensemble to grow it, and what numbers do not depend on."""

    def __post_init__(self) -> None:
        """Refuse what no run can use.

        Raises:
            ValueError: an option outside its range; the message names it.
        """
        check_range("width", self.width, 1, 1 << 24)
        check_range("ensemble", self.ensemble, 1, 1 << 20)
        check_range("seed", self.seed, 0, (1 << 63) - 1)
        check_range("evaluation_states", self.evaluation_states, 1, 1_000_000)
        check_range("evaluation_seed", self.evaluation_seed, 0, (1 << 63) - 1)
        check_range("steps", self.steps, 1, 100_000)
        check_range("first_member", self.first_member, 0, 1 << 30)
        for name, value in (("devices", self.devices), ("num_nodes", self.num_nodes)):
            if value is not None:
                check_range(name, value, 1, 4096)
        if self.out is not None and self.resume is not None:
            raise ValueError("--out and --resume: expected one of them; a resumed run stays where it is")
        if self.cohort is not None:
            check_range("cohort", self.cohort, 1, 1 << 20)
        if not 0 < self.tolerance < 1:
            raise ValueError(f"--tolerance {self.tolerance}: expected a number between 0 and 1")
        if self.init == "antisymmetric" and self.width % 2:
            raise ValueError(f"--width {self.width}: expected an even number with --init antisymmetric")
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError("--accelerator gpu: PyTorch sees no GPU here; expected auto or cpu")


_SESSION_ONLY = ("out", "resume", "devices", "num_nodes", "cohort", "accelerator")
"""Options that hold for one session."""
RECORDED = tuple(name for name in RunOptions.__dataclass_fields__ if name not in _SESSION_ONLY)
"""Options that belong to the run itself, as in ``config.yaml``."""


@functools.lru_cache(maxsize=2)
def evaluation_of(task: Task[Any, Any], options: RunOptions) -> EvaluationSet:
    """The states that members are judged on; the last ones are remembered."""
    return EvaluationSet.sample(task, options.evaluation_states, options.evaluation_seed)


def recipe_of(task: Task[Any, Any], options: RunOptions) -> Recipe:
    """How members are made."""
    return Recipe(
        task.templates.labels.to(torch.float32),
        options.width,
        options.init,
        options.loss,
        options.seed,
        options.precision,
        options.engine,
        DescentOptions(options.tolerance, options.steps),
    )


def device_of(options: RunOptions) -> torch.device:
    """Where members are trained."""
    return torch.device("cuda" if options.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
