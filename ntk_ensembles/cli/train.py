"""`train.py`, and `ntk-ensembles train`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ntk_ensembles.cli.parsing import chosen_task, parse_task, value_of
from ntk_ensembles.cli.terminal import command, console
from ntk_ensembles.training.options import RunOptions
from ntk_ensembles.training.run import train
from ntk_ensembles.training.store import RunStore, StoreError

_DESCRIPTION = (
    "Train an ensemble of wide two-layer networks on a task's templates and measure it against the NTK prediction. "
    "The quickest look: --task addition. Options can stand in YAML files too; flags go over them."
)


@command("train.py")
def train_command(arguments: list[str], prog: str) -> int:
    """Train an ensemble or go on with one.

    Exit status 0; 1 if no member converged, or if the disk or the memory gave out; 2 for bad input; 130 if
    interrupted.
    """
    arguments = [*_config_of_resumed(arguments), *arguments]
    task, options, values = parse_task(arguments, prog, _DESCRIPTION, RunOptions)
    try:
        results = train(task, options, console(), values["task"])
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "interrupted; what was finished is kept, go on with --resume"
        raise KeyboardInterrupt(said) from None
    return 0 if not results or results["convergence"] else 1


def _config_of_resumed(arguments: Sequence[str]) -> list[str]:
    """The options of the run to go on with, for flags to go over.

    Raises:
        StoreError: there is no such run, or it is of another task.
    """
    directory = value_of("--resume", arguments)
    if directory is None:
        return []
    # Says what is wrong with a directory that is no run.
    RunStore.open(Path(directory))
    config = ["--config", str(Path(directory) / "config.yaml")]
    asked, there = value_of("--task", arguments), chosen_task(config)
    if there is None:
        raise StoreError(f"{config[1]}: is damaged; expected the options of the run")
    if asked is not None and asked != there:
        raise StoreError(f"{directory}: --task is {asked} here and {there} there")
    return config
