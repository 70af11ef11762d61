"""Runs: an experiment and its directory. Begin one, resume it, open it, merge several."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs.options import SAVED_OPTIONS, Experiment, RunOptions
from ntk_ensembles.runs.results import Results, results_of, write_results
from ntk_ensembles.runs.store import MemberResults, RunStore, StoreError, first_difference, lock
from ntk_ensembles.tasks import load_task_class


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
    def open(cls, directory: str | Path) -> Run:
        """Return the run in a directory. This machine need not have the device that it was trained on.

        Raises:
            StoreError: There is none, it is damaged, or the task's code has changed since.
        """
        run = cls._read(Path(directory))
        if found := run.difference(run.experiment, run.device.type):
            raise StoreError(f"{directory}: {found}. The run cannot be used with this version of the task.")
        return run

    @classmethod
    def _read(cls, directory: Path) -> Run:
        """Return the run as its files describe it, not yet compared with the code."""
        store = RunStore.open(directory)
        path = directory / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            spec, given = str(config.pop("task")), {name: config.pop(name) for name in SAVED_OPTIONS}
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: is damaged ({error!r}); expected the options of the run") from None
        try:
            return cls(Experiment(load_task_class(spec).from_options(config), RunOptions(**given)), store)
        except ValueError as error:
            raise StoreError(f"{path}: {error}") from None

    @classmethod
    def begin(cls, experiment: Experiment, directory: Path, device_type: str | None = None) -> Run:
        """Begin a new run in an empty directory.

        Args:
            experiment: What is trained, how, and on what it is evaluated.
            directory: The directory, which exists.
            device_type: Kind of device that trains the members; by default this machine's.

        Raises:
            SaveError: The directory cannot be written.
        """
        run = cls(experiment, RunStore(directory, experiment.fingerprint(device_type)))
        run.write_config()
        run.store.begin()
        return run

    def write_config(self) -> None:
        """Write the options, as ``--config`` and ``--resume`` take them back."""
        experiment = self.experiment
        saved = {name: getattr(experiment.options, name) for name in SAVED_OPTIONS}
        values = {"task": experiment.task_spec, **experiment.task.options, **saved}
        self.store.write_text("config.yaml", yaml.safe_dump(values, sort_keys=False))

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
        """Return the results of all finished members.

        Raises:
            StoreError: A file is damaged, or two have a member in common.
        """
        return self.store.load(*self.experiment.limit.mean.shape)

    def missing(self) -> list[int]:
        """Return the indices of the planned members that are not finished.

        Raises:
            StoreError: A file is damaged.
        """
        finished = self.store.finished()
        return [index for index in self.experiment.planned if index not in finished]

    def write_results(self, results: MemberResults, *, seconds_total: float, seconds_startup: float = 0.0) -> Results:
        """Write ``results.json``, the figure and the charts for the members so far, and return the results.

        Args:
            results: All members so far, at least one.
            seconds_total: Time that the user has waited in this session.
            seconds_startup: Part of it before training began.
        """
        found = results_of(
            self.experiment,
            results,
            self.device,
            self.store.manifest,
            seconds_total=seconds_total,
            seconds_startup=seconds_startup,
        )
        write_results(self.store, self.experiment, results, found)
        return found


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
    directory = prepare_directory(options.out, experiment.task.name)
    with lock(directory):
        yield Run.begin(experiment, directory)


def _resumed(experiment: Experiment, directory: Path) -> Run:
    """Return the run in a directory with the options of this session, which may only add members."""
    before = Run._read(directory)
    options, saved = experiment.options, before.experiment.options
    found = before.difference(experiment)
    if found is None and options.first_member != saved.first_member:
        found = f"first_member is {options.first_member} here and {saved.first_member} there"
    if found is None and options.ensemble < saved.ensemble:
        found = f"ensemble is {options.ensemble} here and {saved.ensemble} there"
    if found is not None:
        raise StoreError(f"{directory}: cannot be resumed, {found}. Only the ensemble may change, and only grow.")
    return Run(experiment, before.store)


def prepare_directory(out: str | None, task: str) -> Path:
    """Make the directory of a new run, so that an unwritable place is known before training.

    Args:
        out: Its path; None for a fresh one under ``runs/``.
        task: Name of the task, for a fresh directory.

    Raises:
        ValueError: The directory has content already, or cannot be written.
    """
    if out is None:
        stem = f"{task}-{datetime.now():%Y%m%d-%H%M%S}"
        for attempt in itertools.count(1):
            path = Path("runs") / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                continue
            except OSError as error:
                raise ValueError(f"runs: cannot be written ({error.strerror}); choose --out DIR") from None
    path = Path(str(out))
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A session that was killed before it had begun may have left hidden files.
        if any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise ValueError(f"--out {out}: is not empty; expected a new or an empty directory, or a run to resume")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"--out {out}: cannot be written ({reason}); expected a writable directory") from None
    return path


def merge_runs(directories: Sequence[Path], out: str | None = None) -> tuple[Run, Results]:
    """Put the finished members of several runs into a new one.

    The new run is as if one run had trained them all: from the first to the last member, with what is missing
    between them left to ``--resume``.

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
    started_at = time.perf_counter()
    if len(directories) < 2:
        raise ValueError(f"{len(directories)} run directories: expected at least 2 to merge")
    runs = [Run.open(directory) for directory in directories]
    first_run = runs[0]
    owner: dict[int, Path] = {}
    for run in runs:
        if found := first_difference(run.store.manifest, first_run.store.manifest):
            raise StoreError(f"{run.directory} cannot be merged with {directories[0]}: {found}")
        for index in run.member_results().indices.tolist():
            if index in owner:
                raise StoreError(f"member {index} is in {owner[index]} and in {run.directory}")
            owner[index] = run.directory
    if not owner:
        raise StoreError(f"{directories[0]} and the others have no finished member yet")
    first, last = min(owner), max(owner)
    options: Any = dataclasses.replace(
        first_run.experiment.options, first_member=first, ensemble=last - first + 1, out=None, resume=None
    )
    target = prepare_directory(out, first_run.experiment.task.name)
    with lock(target):
        merged = Run.begin(Experiment(first_run.experiment.task, options), target, first_run.device.type)
        for run in runs:
            for path in run.store.files():
                copy = target / path.relative_to(run.directory)
                write_atomically(copy, lambda part, path=path: shutil.copyfile(path, part))  # type: ignore[misc]
        results = merged.write_results(merged.member_results(), seconds_total=time.perf_counter() - started_at)
    return merged, results
