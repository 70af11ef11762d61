"""`ntk-ensembles plan`: which width, members, labels and initial weights reach a target, and what they cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import DecoderOptions, OutputOptions, PredictionOptions, parse_task
from ntk_ensembles.console import console
from ntk_ensembles.errors import check_fraction
from ntk_ensembles.runs.plan import plan

_DESCRIPTION = (
    "Plan an ensemble before any training: widths, members, labels and initial weights that are expected to reach a "
    "target, with their cost on this machine, and the command that runs the cheapest. Members follow from theory at "
    "finite width, an asymptotic estimate; the time from a measurement of a few seconds. Exit status 0 if the target "
    "can be reached, else 1."
)

_ROWS = 12


@dataclass(frozen=True)
class PlanOptions(OutputOptions, DecoderOptions, PredictionOptions):
    """Options of a plan."""

    exact: float = 0.999
    """Share of evaluation states to be decoded exactly on average, or with --all-states the chance that no state at
    all is wrong; between 0 and 1."""

    all_states: bool = False
    """Plan for all 2^m states rather than for the evaluation states."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_fraction("exact", self.exact)


@command("ntk-ensembles plan")
def plan_command(arguments: list[str], prog: str) -> int:
    """Plan an ensemble; the exit status is 0 if the target can be reached, else 1."""
    task, options, _ = parse_task(arguments, prog, _DESCRIPTION, PlanOptions)
    try:
        with console(stderr=True).status("working out what reaches the target, and measuring this machine …"):
            choices, measured = plan(
                task,
                options.exact,
                decoders=options.decoders,
                all_states=options.all_states,
                layers=options.layers,
                padding=options.padding,
                evaluation_states=options.evaluation_states,
                evaluation_seed=options.evaluation_seed,
            )
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    found = {
        "task": {"name": task.name, **task.options},
        "exact": options.exact,
        "all_states": options.all_states,
        "layers": options.layers,
        "padding": options.padding,
        "calibration": asdict(measured),
        "choices": [asdict(choice) for choice in choices],
    }
    options.show(found, lambda out: _show(task, found, out))
    return 0 if choices else 1


def _show(task: Any, found: dict[str, Any], out: Console) -> None:
    choices = found["choices"]
    states = "all 2^m states, with that chance" if found["all_states"] else "the evaluation states"
    target = f"{100 * found['exact']:.7g}% exact on {states}"
    if not choices:
        out.print(f"{task!r}: nothing up to 131,072 hidden units and 16,384 members reaches {target}.")
        return
    table = Table(title=f"{target}: what reaches it, the quickest first", title_justify="left")
    for heading in ("width", "members", "decoder", "labels", "init", "multiply-adds", "memory", "time"):
        words = heading in ("decoder", "labels", "init")
        table.add_column(heading, justify="left" if words else "right", no_wrap=True)
    for position, choice in enumerate(choices[:_ROWS]):
        style = "bold" if position == 0 else None
        table.add_row(
            f"{choice['width']:,}",
            f"{choice['members']:,}",
            choice["decoder"],
            choice["labels"],
            choice["init"],
            f"{choice['multiply_adds']:.1e}",
            f"{choice['memory_bytes'] / 2**30:.2f} GiB",
            _duration(choice["seconds"]),
            style=style,
        )
    out.print(table)
    if len(choices) > _ROWS:
        out.print(f"{len(choices) - _ROWS} more with --json.", highlight=False)
    measured = found["calibration"]
    out.print(
        f"Members by theory at finite width, an asymptotic estimate. Time to draw, train and evaluate them, without "
        f"start-up, from {2 * measured['workers']} members of width {measured['width']:,} on this machine.",
        highlight=False,
    )
    out.print(f"The quickest: {choices[0]['command']}", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
