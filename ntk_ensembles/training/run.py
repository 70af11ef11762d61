"""A whole run: from options to a run directory."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from ntk_ensembles.ensemble import (
    DescentOptions,
    Engine,
    Init,
    Loss,
    Precision,
    Recipe,
    choose_cohort,
)
from ntk_ensembles.tasks import EvaluationSet, Task, check_range
from ntk_ensembles.training.convergence import Theory
from ntk_ensembles.training.module import EnsembleModule, MembersDataModule
from ntk_ensembles.training.progress import MemberProgress
from ntk_ensembles.training.recorder import RunRecorder, write_atomically
from ntk_ensembles.training.report import report


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

    out: str | None = None
    """Directory for what the run leaves: a new or empty one. By default a fresh one under runs/."""

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
        if self.cohort is not None:
            check_range("cohort", self.cohort, 1, 1 << 20)
        if not 0 < self.tolerance < 1:
            raise ValueError(f"--tolerance {self.tolerance}: expected a number between 0 and 1")
        if self.init == "antisymmetric" and self.width % 2:
            raise ValueError(f"--width {self.width}: expected an even number with --init antisymmetric")
        if self.accelerator == "gpu" and not torch.cuda.is_available():
            raise ValueError("--accelerator gpu: PyTorch sees no GPU here; expected auto or cpu")


def train(
    task: Task[Any, Any], options: RunOptions, config: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Train and judge an ensemble, show progress, and leave a run directory (DESIGN §6).

    Args:
        task: what to learn.
        options: how.
        config: the resolved configuration as YAML, to be saved as ``config.yaml``.
        console: where to show progress and the final table.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: an option that this machine or this task cannot satisfy; nothing has been computed
            or written.
        KeyboardInterrupt: Ctrl-C; finished cohorts are in the run's checkpoints.
    """
    console = console or Console()
    device = torch.device("cuda" if options.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    recipe = Recipe(
        task.templates.labels.to(torch.float32),
        options.width,
        options.init,
        options.loss,
        options.seed,
        options.precision,
        options.engine,
        DescentOptions(options.tolerance, options.steps),
    )
    cohort = choose_cohort(recipe, options.evaluation_states, options.ensemble, device, options.cohort)
    directory = prepare_directory(options.out, task.name)
    theory = Theory(task, EvaluationSet.sample(task, options.evaluation_states, options.evaluation_seed), options.init)
    if config is not None:
        write_atomically(directory / "config.yaml", lambda path: path.write_text(config, encoding="utf-8"))

    description = {
        "seed": options.seed,
        "evaluation_seed": options.evaluation_seed,
        "width": options.width,
        "members": options.ensemble,
        "init": options.init,
        "loss": options.loss,
        "precision": options.precision,
        "tolerance": options.tolerance,
    }
    states = len(theory.evaluation)
    console.print(
        f"{task!r}: {len(task.templates)} templates, {task.layout.bits} bits. {options.ensemble} members of width "
        f"{options.width} on {device.type}, {cohort} at a time, judged on {states} states.",
        highlight=False,
    )
    recorder = RunRecorder(directory, task, description)
    with _quiet_lightning():
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision=options.precision,
            max_epochs=1,
            logger=TensorBoardLogger(directory, name="", version="tensorboard"),
            callbacks=[MemberProgress(options.ensemble, console), recorder],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(EnsembleModule(recipe, theory), MembersDataModule(options.ensemble, cohort))
        except SystemExit:
            # Lightning ends the program on Ctrl-C; what to say then is the command's to decide.
            if trainer.interrupted:
                raise KeyboardInterrupt from None
            raise
    assert recorder.results is not None
    report(recorder.results, directory, console)
    return recorder.results


def prepare_directory(out: str | None, task: str) -> Path:
    """The run's directory, made now so that an unwritable place is known before training.

    Raises:
        ValueError: the directory has content already, or cannot be written.
    """
    if out is None:
        stem = f"{task}-{datetime.now():%Y%m%d-%H%M%S}"
        for attempt in itertools.count(1):
            path = Path("runs") / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                if not path.is_dir():
                    raise ValueError("runs: is a file; choose a directory with --out DIR") from None
            except OSError as error:
                raise ValueError(f"runs: cannot be written ({error.strerror}); choose --out DIR") from None
    path = Path(str(out))
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ValueError(f"--out {out}: is not empty; expected a new or an empty directory")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"--out {out}: cannot be written ({reason}); expected a writable directory") from None
    return path


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's notes on choices that are made on purpose here."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            # Members are trained by `descend`; there is nothing for an optimizer to hold.
            r".*configure_optimizers.*returned `None`.*",
            # The data loader counts integers.
            r".*does not have many workers.*",
            r".*smaller than the logging interval.*",
            r".*GPU available but not used.*",
            # Lightning 2.6 on torch 2.13; its own to mend.
            r".*isinstance.treespec, LeafSpec.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            logger.setLevel(level)
