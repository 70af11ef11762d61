"""One run from several that trained different members of the same ensemble."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ntk_ensembles.files import write_atomically
from ntk_ensembles.tasks import task_spec
from ntk_ensembles.training.report import report
from ntk_ensembles.training.run import Run, prepare_directory
from ntk_ensembles.training.store import StoreError, difference, lock


def merge(directories: Sequence[Path], out: str | None = None, console: Console | None = None) -> dict[str, Any]:
    """Put the finished members of several runs into a new one.

    The new run is as if one run had trained them all: from the first to the last member, with what is missing
    between them left to ``--resume``.

    Args:
        directories: the runs; of one configuration, with no member in common.
        out: the new run's directory, by default a fresh one under ``runs/``.
        console: where to show the table.

    Returns:
        The content of the new ``results.json``.

    Raises:
        ValueError: fewer than two runs, or one that cannot be merged with the first; nothing has been written.
            `StoreError` is one.
        SaveError: the new directory cannot be written.
    """
    started_at = time.perf_counter()
    if len(directories) < 2:
        raise ValueError(f"{len(directories)} run directories: expected at least 2 to merge")
    runs = [Run.open(directory) for directory in directories]
    owner: dict[int, Path] = {}
    for run in runs:
        found = difference(run.store.manifest, runs[0].store.manifest)
        if found is not None:
            raise StoreError(f"{run.store.directory} cannot be merged with {directories[0]}: {found}")
        for index in run.records().indices.tolist():
            if index in owner:
                raise StoreError(f"member {index} is in {owner[index]} and in {run.store.directory}")
            owner[index] = run.store.directory
    if not owner:
        raise StoreError(f"{directories[0]} and the others have no finished member yet")
    first, last = min(owner), max(owner)
    options = dataclasses.replace(runs[0].options, first_member=first, ensemble=last - first + 1, out=None, resume=None)
    target = prepare_directory(out, runs[0].task.name)
    with lock(target):
        merged = Run.begin(runs[0].task, options, task_spec(runs[0].task), target, runs[0].device)
        for run in runs:
            for path in run.store.files():
                place = target / path.relative_to(run.store.directory)
                write_atomically(place, lambda part, path=path: shutil.copyfile(path, part))  # type: ignore[misc]
        results = merged.leave_results(merged.records(), time.perf_counter() - started_at)
    report(results, target, console or Console())
    return results
