"""A whole run: from options to a run directory."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, Trainer
from rich.console import Console

from ntk_ensembles.ensemble import Recipe, choose_cohort
from ntk_ensembles.tasks import Task, load_task_class, task_spec
from ntk_ensembles.theory import LimitPrediction
from ntk_ensembles.training.module import EnsembleModule, MembersDataModule, Plan
from ntk_ensembles.training.options import RECORDED, RunOptions, device_of, evaluation_of, recipe_of
from ntk_ensembles.training.processes import (
    MembersLauncher,
    MembersStrategy,
    devices_of_launcher,
    end_with_parent,
    is_lost_peer,
    nodes_of_launcher,
    process_rank,
)
from ntk_ensembles.training.progress import MemberProgress
from ntk_ensembles.training.recorder import Gather, RunRecorder
from ntk_ensembles.training.records import Records
from ntk_ensembles.training.report import report
from ntk_ensembles.training.results import leave_results
from ntk_ensembles.training.store import RunStore, StoreError, difference, identity, lock

WEIGHTS_BUDGET = 1 << 30
"""Bytes of weights that ``--keep-weights auto`` keeps at most."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run that was begun: what is learned, how, and where it lies.

    Attributes:
        task: what is learned.
        options: how.
        store: its directory.
    """

    task: Task[Any, Any]
    options: RunOptions
    store: RunStore

    @classmethod
    def open(cls, directory: Path) -> Run:
        """The run in a directory; this machine need not have the device that it was trained on.

        Raises:
            StoreError: there is none, it is damaged, or the task's code has changed since.
        """
        run = cls._read(directory)
        run.check(run.task, run.options, run.device)
        return run

    @classmethod
    def _read(cls, directory: Path) -> Run:
        """The run as its files tell it, not yet compared with the code."""
        store = RunStore.open(directory)
        path = directory / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            word, given = str(config.pop("task")), {name: config.pop(name) for name in RECORDED}
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: is damaged ({error!r}); expected the options of the run") from None
        try:
            return cls(load_task_class(word).from_options(config), RunOptions(**given), store)
        except ValueError as error:
            raise StoreError(f"{path}: {error}") from None

    @classmethod
    def begin(
        cls,
        task: Task[Any, Any],
        options: RunOptions,
        word: str,
        directory: Path,
        device: torch.device | None = None,
    ) -> Run:
        """A new run in an empty directory, of members trained on this device, by default as the options say."""
        run = cls(task, options, RunStore(directory, _identity(task, options, device)))
        run.write_config(word)
        run.store.begin()
        return run

    def write_config(self, word: str) -> None:
        """Record the options, as `--config` and `--resume` take them back."""
        recorded = {name: getattr(self.options, name) for name in RECORDED}
        values = {"task": word, **self.task.options, **recorded}
        self.store.write_text("config.yaml", yaml.safe_dump(values, sort_keys=False))

    def check(self, task: Task[Any, Any], options: RunOptions, device: torch.device | None = None) -> None:
        """Refuse options under which members would not be this run's.

        Args:
            task: what is learned.
            options: how.
            device: where, by default as the options say.

        Raises:
            StoreError: names the difference.
        """
        found = difference(_identity(task, options, device), self.store.manifest)
        if found is not None:
            raise StoreError(f"{self.store.directory}: {found}; a run that goes on can change only --ensemble, to grow")

    @cached_property
    def recipe(self) -> Recipe:
        """How members are made."""
        return recipe_of(self.task, self.options)

    @cached_property
    def theory(self) -> LimitPrediction:
        """The run's own evaluation states and what infinite width says of them."""
        return LimitPrediction(self.task, evaluation_of(self.task, self.options), self.options.init == "antisymmetric")

    @property
    def device(self) -> torch.device:
        """Where its members are trained."""
        return torch.device("cuda" if self.store.manifest.get("device") == "cuda" else "cpu")

    @property
    def planned(self) -> range:
        """All its members, trained or not."""
        return range(self.options.first_member, self.options.first_member + self.options.ensemble)

    def records(self) -> Records:
        """Of all finished members.

        Raises:
            StoreError: a checkpoint is damaged, or two have a member in common.
        """
        parts = self.store.load()
        try:
            return Records.join([Records.none(*self.theory.mean.shape), *parts])
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.store.directory}/checkpoints: {error}; move one of the files away") from None

    def leave_results(self, records: Records, seconds_total: float) -> dict[str, Any]:
        """Write ``results.json``, the figure and the charts for the members so far; returns the results."""
        return leave_results(
            self.store,
            self.task,
            self.theory,
            records,
            members_planned=len(self.planned),
            dtype=self.recipe.dtype,
            device=self.device,
            seconds_total=seconds_total,
        )


def _identity(task: Task[Any, Any], options: RunOptions, device: torch.device | None = None) -> dict[str, Any]:
    return identity(
        task,
        recipe_of(task, options),
        evaluation_of(task, options),
        options.evaluation_states,
        options.evaluation_seed,
        device or device_of(options),
    )


def train(
    task: Task[Any, Any], options: RunOptions, console: Console | None = None, word: str | None = None
) -> dict[str, Any]:
    """Train and judge an ensemble, or go on with one, show progress, and leave a run directory (DESIGN §6).

    Args:
        task: what to learn.
        options: how.
        console: where to show progress and the final table.
        word: how the command line named the task, for ``config.yaml``.

    Returns:
        The content of ``results.json``; in other processes than the first, nothing.

    Raises:
        ValueError: an option that this machine, this task or the run to go on with cannot satisfy; nothing has
            been computed or written. `StoreError` is one.
        SaveError: the disk is full or cannot be written.
        MemoryError: not even one member fits.
        Interrupted: Ctrl-C, or a process died; finished cohorts are kept and the results so far written.
    """
    started_at = time.perf_counter()
    word = word or task_spec(task)
    if process_rank():
        # The first process decides and speaks.
        end_with_parent()
        _fit(task, options, None, None, Console(quiet=True))
        return {}
    console = console or Console()
    device = device_of(options)
    processes = options.devices or devices_of_launcher()
    recipe = recipe_of(task, options)
    cohort = choose_cohort(
        recipe, options.evaluation_states, options.ensemble, device, options.cohort, processes=processes
    )
    with _begun(task, options, word) as run:
        earlier = run.records()
        done = set(earlier.indices.tolist())
        missing = tuple(index for index in run.planned if index not in done)
        keep_weights, decision = _keeping(options, recipe)
        states = len(run.theory.evaluation)
        console.print(
            f"{task!r}: {len(task.templates)} templates, {task.layout.bits} bits. {options.ensemble} members of width "
            f"{options.width} on {device.type}, {cohort} at a time"
            + (f" in each of {processes} processes" if processes > 1 else "")
            + f", judged on {states} states. {decision}"
            + (f" {len(done)} members are there already." if done else ""),
            highlight=False,
        )
        if missing:
            plan = Plan(str(run.store.directory), missing, cohort)
            try:
                records = _fit(task, options, run, plan, console, earlier, keep_weights)
            except Stopped as stopped:
                # Ctrl-C reaches the program again: Lightning ignores it from the first one on.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                so_far = run.records()
                if len(so_far):
                    report(run.leave_results(so_far, time.perf_counter() - started_at), run.store.directory, console)
                raise Interrupted(stopped.reason, run.store.directory, len(so_far), options.ensemble) from None
        else:
            records = earlier
        results = run.leave_results(records, time.perf_counter() - started_at)
        report(results, run.store.directory, console)
    return results


class Interrupted(KeyboardInterrupt):
    """A run has ended early; what it had finished is kept.

    Args:
        reason: why, in a few words.
        directory: the run's.
        members: how many are finished.
        planned: how many there should be.
    """

    def __init__(self, reason: str, directory: Path, members: int, planned: int) -> None:
        super().__init__(
            f"{reason}; {members} of {planned} members are finished and kept. Go on with --resume {directory}"
        )


class Stopped(Exception):
    """Training has stopped before its end."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def _begun(task: Task[Any, Any], options: RunOptions, word: str) -> Iterator[Run]:
    """A new run, or the one to go on with, locked."""
    if options.resume is None:
        directory = prepare_directory(options.out, task.name)
        with lock(directory):
            yield Run.begin(task, options, word, directory)
        return
    directory = Path(options.resume)
    before = Run._read(directory)
    before.check(task, options)
    if options.first_member != before.options.first_member:
        raise StoreError(
            f"{directory}: --first-member is {options.first_member} here and {before.options.first_member} there"
        )
    if options.ensemble < before.options.ensemble:
        raise StoreError(
            f"{directory}: --ensemble {options.ensemble}: it has {before.options.ensemble} members; expected at least "
            "as many"
        )
    with lock(directory):
        run = Run(task, options, before.store)
        run.store.sweep()
        run.write_config(word)
        yield run


def _keeping(options: RunOptions, recipe: Recipe) -> tuple[bool, str]:
    """Whether weights are kept, and the decision in words."""
    templates, bits = recipe.labels.shape
    size = options.ensemble * recipe.width * (templates + bits) * recipe.dtype.itemsize
    keep = options.keep_weights == "all" or (options.keep_weights == "auto" and size <= WEIGHTS_BUDGET)
    amount = f"{size / 2**30:.1f} GiB" if size >= 1 << 27 else f"{size / 2**20:.1f} MiB"
    return keep, f"Weights are kept ({amount})." if keep else f"Weights are not kept (they would take {amount})."


def _fit(
    task: Task[Any, Any],
    options: RunOptions,
    run: Run | None,
    plan: Plan | None,
    console: Console,
    earlier: Records | None = None,
    keep_weights: bool | None = None,
) -> Records:
    """Train the planned members, in this process and the others, and gather the records of all."""
    recipe = recipe_of(task, options)
    theory = run.theory if run else LimitPrediction(task, evaluation_of(task, options), options.init == "antisymmetric")
    if keep_weights is None:
        keep_weights, _ = _keeping(options, recipe)
    module = EnsembleModule(
        task_spec(task),
        task.options,
        {name: getattr(options, name) for name in RECORDED},
        theory=theory,
        keep_weights=keep_weights,
        say=console.print,
    )
    if earlier is not None:
        module.records.update(earlier)
    nodes = options.num_nodes or nodes_of_launcher()
    devices = options.devices or devices_of_launcher()
    gathered = Gather()
    share = len(plan.indices) if plan else 0
    callbacks: list[Callback] = [RunRecorder(earlier), gathered]
    if run is not None:
        callbacks.append(MemberProgress(-(-share // (devices * nodes)), console))
    with _quiet_lightning():
        trainer = Trainer(
            accelerator="gpu" if device_of(options).type == "cuda" else "cpu",
            devices=devices,
            num_nodes=nodes,
            strategy=MembersStrategy() if devices * nodes > 1 else "auto",
            use_distributed_sampler=False,
            precision=options.precision,
            max_epochs=1,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        launcher = trainer.strategy.launcher
        try:
            trainer.fit(module, datamodule=MembersDataModule(plan))
        except SystemExit:
            # Lightning ends the program on Ctrl-C; what to say then is the command's to decide.
            if not trainer.interrupted:
                raise
            died = getattr(launcher, "died", None)
            raise Stopped("interrupted" if died is None else f"a process died (exit status {died})") from None
        except RuntimeError as error:
            # A collective fails in the first process when another one dies.
            if devices * nodes == 1 or not is_lost_peer(error):
                raise
            raise Stopped("a process died") from None
        finally:
            if isinstance(launcher, MembersLauncher) and trainer.interrupted:
                launcher.end_children()
            # What follows is the first process's alone, and its metrics should not wait for the others.
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    assert gathered.records is not None
    return gathered.records


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
        # A session that was killed before it had begun may have left hidden files.
        if any(not entry.name.startswith(".") for entry in path.iterdir()):
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
