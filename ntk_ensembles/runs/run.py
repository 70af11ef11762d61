"""Runs: an experiment and its directory. Begin one, resume it, open it, merge several."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch

from ntk_ensembles.files import options_text, read_options, write_atomically
from ntk_ensembles.runs.groups import Measure, joined
from ntk_ensembles.runs.options import SAVED_OPTIONS, Experiment, RunOptions
from ntk_ensembles.runs.record import from_data, to_data
from ntk_ensembles.runs.results import Results, results_of
from ntk_ensembles.runs.store import MemberResults, RunStore, StoreError, check_manifest, first_difference, lock, plain
from ntk_ensembles.tasks import TASKS, Task

TaskOrClass: TypeAlias = Task[Any, Any] | type[Task[Any, Any]]
"""A task, or its class, which is made with the options that a run has recorded."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run that was begun.

    Attributes:
        experiment: What is trained, how, and on what it is evaluated.
        store: The run's directory.
    """

    experiment: Experiment
    store: RunStore

    @classmethod
    def open(cls, directory: str | Path, task: TaskOrClass | None = None) -> Run:
        """Return the run in a directory, from its data. This machine need not have the device that it was trained on.

        Args:
            directory: The run's directory.
            task: Task, or its class, that says what inputs and outputs mean, where the run was trained from a user's
                own. Nothing in the directory is executed; the package's own tasks are found by their names.

        Raises:
            StoreError: There is no run, it is damaged, or it is not of this task.
            TaskError: The task's class fails.
        """
        directory = Path(directory)
        store = RunStore.open(directory)
        path = directory / "config.yaml"
        try:
            config = read_options(path)
            spec, given = str(config.pop("task")), {name: config.pop(name) for name in SAVED_OPTIONS}
            if plain(config) != plain(store.manifest["task_options"]):
                raise ValueError(f"the task's options are not those of {store.directory / 'manifest.json'}")
            options = RunOptions(**given)
        except (ValueError, KeyError) as error:
            raise StoreError(f"{path}: is damaged ({error}); expected the options of the run") from None
        tensors, texts = store.load_task()
        try:
            recorded, evaluation = from_data(store.manifest["task"], config, spec, tensors, texts)
        except ValueError as error:
            raise StoreError(f"{directory / 'task.safetensors'}: is damaged ({error})") from None
        run = cls(Experiment(recorded, options, evaluation), store)
        if found := run.difference(run.experiment, run.device.type):
            raise StoreError(f"{directory}: is damaged, its files do not belong together: {found}")
        return run._with_meaning(task)

    def _with_meaning(self, given: TaskOrClass | None) -> Run:
        """Return the run with a task that knows what inputs and outputs mean, if there is one."""
        recorded, chosen = self.experiment.task, given or TASKS.get(self.experiment.task_spec)
        if chosen is None:
            return self
        # Before it is made: another task has other options, which nobody has asked for.
        if given is not None and given.name != recorded.name:
            raise StoreError(
                f"{self.directory}: is not a run of this task, task is {given.name} here and {recorded.name} there"
            )
        try:
            task = chosen if isinstance(chosen, Task) else chosen.from_options(recorded.options)
            fields = None if repr(task.layout) == repr(recorded.layout) else "the fields of its state are others"
            # A recorded state is as large as its file; one that follows from options in a file could be of any size.
            found = fields if given is None else None
            found = found or self.difference(dataclasses.replace(self.experiment, task=task), self.device.type)
        except ValueError:
            if given is not None:
                raise
            return self
        if found or fields:
            if given is not None:
                raise StoreError(f"{self.directory}: is not a run of this task, {found or fields}")
            return self
        return Run(dataclasses.replace(self.experiment, task=task), self.store)

    def write_config(self) -> None:
        """Write the options, as ``--config`` and ``--resume`` take them back."""
        # The task's as JSON gives them back.
        values = self.experiment.named_options | self.store.manifest["task_options"]
        self.store.write_text("config.yaml", options_text(values))

    def difference(self, experiment: Experiment, device_type: str | None = None) -> str | None:
        """Return in words why members of an experiment would not be this run's; None if they would."""
        return first_difference(experiment.fingerprint(device_type), self.store.manifest)

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.store.directory

    @property
    def device(self) -> torch.device:
        """Kind of device that trains its members."""
        return torch.device("cuda" if self.store.manifest.get("device") == "cuda" else "cpu")

    def member_results(self) -> MemberResults:
        """Return the results of all finished members, with their deviations if those of all of them are kept.

        Raises:
            StoreError: A file is damaged, or two have a member in common.
        """
        if not self.store.has_deviations:
            return self.summary()
        shape = self._shape
        return self.store.together([MemberResults.empty(*shape), *self.store.parts(*shape)])

    def summary(self) -> MemberResults:
        """Return the results of all finished members with sums over aligned groups in place of deviations.

        Its memory hardly grows with the members, as each file's deviations are dropped before the next is read.

        Raises:
            StoreError: A file is damaged, or two have a member in common.
        """
        found = self._without_deviations(lambda part: part.summed(self.measure))
        return dataclasses.replace(found, blocks=tuple(joined(self.measure, found.blocks)))

    def statuses(self) -> MemberResults:
        """Return how training of all finished members went, without deviations and sums.

        Raises:
            StoreError: A file is damaged, or two have a member in common.
        """
        return self._without_deviations(MemberResults.statuses)

    def _without_deviations(self, reduced: Callable[[MemberResults], MemberResults]) -> MemberResults:
        parts = [reduced(part) for part in self.store.parts(*self._shape)]
        return self.store.together([MemberResults.empty(0, 0).statuses(), *parts])

    @cached_property
    def measure(self) -> Measure:
        """What decodes the means of groups of members on the evaluation states."""
        return Measure(self.experiment.limit)

    @property
    def _shape(self) -> tuple[int, int]:
        return len(self.experiment.evaluation), self.experiment.task.layout.bits

    def save(self, results: MemberResults, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write a cohort, with which it counts as finished: with its deviations, or with their sums, as was asked for.

        Args:
            results: The members' results, with deviations.
            weights: Their weights, as from `MLPStack.state_dict`; None to keep none.

        Raises:
            SaveError: The disk is full, or the directory cannot be written; earlier cohorts are intact.
        """
        if self.experiment.keeps_deviations:
            self.store.save(results, weights)
            return
        self.store.save(results.summed(self.measure), weights)
        self.store.join(int(results.indices[0]), len(results), self.measure)

    def missing(self) -> list[int]:
        """Return the indices of the planned members that are not finished.

        Raises:
            StoreError: A file is damaged.
        """
        finished = self.store.finished()
        return [index for index in self.experiment.planned if index not in finished]

    def write_results(self, results: Results, started_at: float) -> None:
        """Write ``results.json``, with the time until now as that which the user has waited.

        Args:
            results: What follows from the members so far; ``total`` is set in its seconds.
            started_at: When the user began to wait, as from `time.time`.

        Raises:
            SaveError: The file cannot be written.
        """
        results["training"]["seconds"]["total"] = time.time() - started_at
        self.store.write_text("results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")


@contextmanager
def begin_or_resume(experiment: Experiment) -> Iterator[Run]:
    """Begin a run, or resume the one in the directory that the options name; hold its lock meanwhile.

    Raises:
        StoreError: The directory holds a run of other options, or another process is writing there.
        ValueError: The directory has other content, or cannot be written.
    """
    options = experiment.options
    directory = Path(options.resume or options.out or "")
    if options.resume is not None or (options.out is not None and RunStore.has_begun(directory)):
        run = _resumed(experiment, directory)
        with lock(directory):
            run.store.sweep()
            run.write_config()
            yield run
        return
    with _begun(experiment, options.out) as run:
        yield run


@contextmanager
def _begun(
    experiment: Experiment,
    out: str | None,
    device_type: str | None = None,
    fill: Callable[[Run], object] = lambda run: None,
) -> Iterator[Run]:
    """Begin a new run in a directory of its own and hold its lock; if that fails, nothing is left.

    Args:
        experiment: What is trained, how, and on what it is evaluated.
        out: Path of a new or an empty directory; None for a fresh one under ``runs/``.
        device_type: Kind of device that trains the members; by default this machine's.
        fill: Function that writes what the run is to have from its first moment on.
    """
    # All that can be refused is refused before there is a directory.
    manifest, data = experiment.fingerprint(device_type), to_data(experiment.task, experiment.evaluation)
    check_manifest(manifest)
    from_data(experiment.task.name, {}, "", *data)
    if clash := ", ".join(sorted(manifest["task_options"].keys() & {"task", *RunOptions.__dataclass_fields__})):
        raise ValueError(f"task {experiment.task.name!r}: options {clash} belong to every run too; rename the task's")
    directory, made = prepare_directory(out, experiment.task.name)
    with lock(directory):
        run = Run(experiment, RunStore(directory, manifest))
        try:
            with run.store.beginning():
                run.write_config()
                run.store.save_task(*data)
                fill(run)
        except BaseException:
            if made and not RunStore.has_begun(directory):
                shutil.rmtree(directory, ignore_errors=True)
            raise
        yield run


def _resumed(experiment: Experiment, directory: Path) -> Run:
    """Return the run in a directory with the options of this session, which may only add members."""
    before = Run.open(directory)
    options, saved = experiment.options, before.experiment.options
    if options.resume is not None:
        # With --out, what the task gives today is compared instead.
        experiment = dataclasses.replace(experiment, recorded=before.experiment.recorded)
    found = before.difference(experiment)
    if found is None and options.first_member != saved.first_member:
        found = f"first_member is {options.first_member} here and {saved.first_member} there"
    if found is None and options.ensemble < saved.ensemble:
        found = f"ensemble is {options.ensemble} here and {saved.ensemble} there"
    if found is not None:
        raise StoreError(f"{directory}: cannot be resumed, {found}. Only the ensemble may change, and only grow.")
    return Run(experiment, before.store)


def prepare_directory(out: str | None, task: str) -> tuple[Path, bool]:
    """Make the directory of a new run, so that an unwritable place is known before training.

    Args:
        out: Its path; None for a fresh one under ``runs/``.
        task: Name of the task, for a fresh directory.

    Returns:
        The directory, and whether it is new.

    Raises:
        ValueError: The directory has content already, or cannot be written.
    """
    if out is None:
        stem = f"{re.sub(r'[^a-zA-Z0-9_-]', '-', task)}-{datetime.now():%Y%m%d-%H%M%S}"
        for attempt in itertools.count(1):
            path = Path("runs") / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                path.mkdir(parents=True)
                return path, True
            except FileExistsError:
                continue
            except OSError as error:
                raise ValueError(f"runs: cannot be written ({error.strerror}); choose --out DIR") from None
    path = Path(str(out))
    try:
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        if not RunStore.is_free(path):
            raise ValueError(f"--out {out}: is not empty; expected a new or an empty directory, or a run to resume")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"--out {out}: cannot be written ({reason}); expected a writable directory") from None
    return path, made


def merge_runs(directories: Sequence[Path], out: str | None = None) -> tuple[Run, Results]:
    """Put the finished members of several runs into a new one.

    The new run is as if one run had trained them all: from the first to the last member, with what is missing
    between them left to ``--resume``. Files of sums over aligned groups that make up larger ones are joined.

    Args:
        directories: Directories of runs of the same options, with no member in common; at least two.
        out: Directory of the new run; by default a fresh one under ``runs/``.

    Returns:
        The new run and its results.

    Raises:
        ValueError: Fewer than two runs, or one that cannot be merged with the first; nothing has been written.
            `StoreError` is one.
        SaveError: The new directory cannot be written.
    """
    started_at = time.time()
    if len(directories) < 2:
        raise ValueError(f"{len(directories)} run directories: expected at least 2 to merge")
    runs = [Run.open(directory) for directory in directories]
    first_run = runs[0]
    owner: dict[int, Path] = {}
    for run in runs:
        if found := first_difference(run.store.manifest, first_run.store.manifest):
            raise StoreError(f"{run.directory} cannot be merged with {directories[0]}: {found}")
        for index in run.statuses().indices.tolist():
            if index in owner:
                raise StoreError(f"member {index} is in {owner[index]} and in {run.directory}")
            owner[index] = run.directory
    if not owner:
        raise StoreError(f"{directories[0]} and the others have no finished member yet")
    # Those of weights too, whose content is not read otherwise.
    sources = [run.store.files() for run in runs]
    for run, files in zip(runs, sources, strict=True):
        for path in files:
            run.store.members_of(path)
    first, last = min(owner), max(owner)
    options: Any = dataclasses.replace(
        first_run.experiment.options, first_member=first, ensemble=last - first + 1, out=None, resume=None
    )

    def fill(merged: Run) -> None:
        for run, files in zip(runs, sources, strict=True):
            for path in files:
                copy = merged.directory / path.relative_to(run.directory)
                write_atomically(copy, functools.partial(shutil.copyfile, path), follow=False)
        merged.store.join_all(merged.measure)
        results.append(results_of(experiment, merged.summary(), merged.device))
        merged.write_results(results[0], started_at)

    results: list[Results] = []
    experiment = dataclasses.replace(first_run.experiment, options=options)
    with _begun(experiment, out, first_run.device.type, fill) as merged:
        return merged, results[0]
