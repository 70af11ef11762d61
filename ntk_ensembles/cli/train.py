"""`train.py`, and `ntk-ensembles train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import first_look, parse_task
from ntk_ensembles.console import console
from ntk_ensembles.files import read_options
from ntk_ensembles.training.options import RunOptions
from ntk_ensembles.training.run import train
from ntk_ensembles.training.store import RunStore, StoreError

_DESCRIPTION = (
    "Train an ensemble of wide two-layer networks on a task's templates and measure it against the NTK prediction. "
    "The quickest look: --task addition. Options can stand in YAML files too; flags take precedence."
)


@command("train.py")
def train_command(arguments: list[str], prog: str) -> int:
    """Train an ensemble, or resume a run; the exit status is 1 if no member converged."""
    task, options, values = parse_task(_with_saved_options(arguments), prog, _DESCRIPTION, RunOptions)
    try:
        results = train(task, options, console(), values["task"])
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted; what was finished is kept, resume it with --resume"
        raise KeyboardInterrupt(message) from None
    return 0 if not results or results["convergence"] else 1


def _with_saved_options(arguments: Sequence[str]) -> list[str]:
    """Put the options of the run that is resumed, if any, before the arguments, which take precedence.

    Raises:
        StoreError: There is no such run, or it is of another task.
    """
    asked = first_look(arguments)
    if asked.resume is None:
        return list(arguments)
    directory = Path(asked.resume)
    # Says what is wrong with a directory that is no run.
    RunStore.open(directory)
    config = directory / "config.yaml"
    try:
        saved = read_options(config)["task"]
    except (KeyError, ValueError) as error:
        raise StoreError(f"{config}: is damaged; expected the options of the run") from error
    if asked.task not in (None, saved):
        raise StoreError(f"{directory}: --task is {asked.task} here and {saved} there")
    return ["--config", str(config), *arguments]
