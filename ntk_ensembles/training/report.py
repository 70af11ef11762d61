"""The table that a run ends with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ntk_ensembles.theory import DECODERS, Decoder


def report(results: dict[str, Any], directory: Path, console: Console) -> None:
    """Print the convergence table, how training went, and where everything is."""
    show_rows(results["convergence"], console)
    training = results["training"]
    failed = training["not_converged"]
    if failed:
        console.print(
            f"[bold red]{len(failed)} of {results['members']} members did not converge[/bold red] and are left out of "
            f"every number above: {', '.join(map(str, failed[:20]))}{' …' if len(failed) > 20 else ''}. "
            "Try more --steps or a larger --width.",
            highlight=False,
        )
    seconds = training["seconds"]
    phases = ", ".join(f"{name} {seconds[name]:.1f} s" for name in ("init", "train", "evaluate", "total"))
    loss = training["relative_loss_max"]
    worst = "not finite" if loss is None else f"{loss:.1e}"
    console.print(
        f"{training['steps_max']} steps at most, relative loss at most {worst}; "
        f"{phases}; peak memory {training['peak_memory_bytes'] / 2**30:.2f} GiB.",
        highlight=False,
    )
    console.print(f"Results in {directory}; charts: tensorboard --logdir {directory}", highlight=False, soft_wrap=True)


def show_rows(rows: Sequence[dict[str, Any]], console: Console, decoders: Sequence[Decoder] = DECODERS) -> None:
    """Print the convergence table.

    Args:
        rows: ``convergence`` of ``results.json``, N ascending; nothing is printed if there are none.
        console: where to.
        decoders: the columns.
    """
    if not rows:
        return
    table = Table(title="exact match on evaluation states, and on whole executions by midpoint: measured (theory)")
    table.add_column("N", justify="right")
    for decoder in decoders:
        table.add_column(decoder, justify="right", no_wrap=True)
    if rows[0]["execution_match"]:
        table.add_column("executions", justify="right", no_wrap=True)
    table.add_column("RMS deviation", justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row["members"])]
        cells += [
            f"{_percent(row['exact_match'][decoder])} ({_percent(row['predicted_exact_match'][decoder])})"
            for decoder in decoders
        ]
        if row["execution_match"]:
            cells.append(_percent(row["execution_match"]["midpoint"]))
        cells.append(f"{row['rms_deviation']:.2e} ({row['predicted_rms_deviation']:.2e})")
        table.add_row(*cells)
    console.print(table)
    exact = exact_from(rows)
    if exact is not None:
        console.print(f"[bold]All states exact by midpoint from N = {exact} on[/bold], in every group of members.")


def exact_from(rows: Sequence[dict[str, Any]]) -> int | None:
    """The smallest N from which on every group of members decodes every state right by midpoint.

    Args:
        rows: ``convergence`` of ``results.json``, N ascending.
    """
    smallest = None
    for row in reversed(rows):
        if row["exact_match"]["midpoint"] < 1:
            break
        smallest = int(row["members"])
    return smallest


def _percent(share: float) -> str:
    """Never rounded up to 100% or down to 0%: those mean all and none."""
    text = f"{100 * share:.2f}%"
    if text == "100.00%" and share < 1:
        return "<100%"
    if text == "0.00%" and share > 0:
        return ">0%"
    return text.replace(".00%", "%")
