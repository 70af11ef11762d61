"""`train.py`, and `ntk-ensembles train`."""

from __future__ import annotations

import psutil
from rich.text import Text

import ntk_ensembles
from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import first_look, parse_task
from ntk_ensembles.console import console
from ntk_ensembles.runs import Run, RunOptions, StoreError
from ntk_ensembles.tasks import TASKS

_DESCRIPTION = (
    "Train an ensemble of wide two-layer networks on a task's templates and measure it against the NTK prediction. "
    "The quickest look: --task addition. Options can stand in YAML files too; flags take precedence."
)


@command("train.py")
def train_command(arguments: list[str], prog: str) -> int:
    """Train an ensemble, or resume a run; the exit status is 1 if a member did not converge."""
    asked = first_look(arguments)
    saved = None if asked.resume is None else Run.open(asked.resume).experiment
    if saved is not None and asked.task not in (None, saved.task_spec) and (asked.task in TASKS):
        raise StoreError(f"{asked.resume}: --task is {asked.task} here and {saved.task_spec} there")
    task, options, _ = parse_task(arguments, prog, _DESCRIPTION, RunOptions, saved=saved)
    out = console()
    with out.status(Text(f"{options.ensemble} members of width {options.width} for {task.name}: loading Lightning …")):
        # Now and no sooner, for it takes longer than PyTorch: the package imports Lightning with this name.
        train = ntk_ensembles.train
    results = train(task, options, console=out, started_at=psutil.Process().create_time())
    return int(results is not None and bool(results["training"]["not_converged"]))
