"""From member results to ``results.json`` and the table.

The same for a run that has ended, was interrupted, was resumed, or was merged from others: everything follows from
the member results and the run's options.
"""

from __future__ import annotations

import platform
import resource
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console
from rich.table import Table

from ntk_ensembles.ensemble.network import one_thread
from ntk_ensembles.ensemble.products import processor
from ntk_ensembles.runs.convergence import ConvergenceRow, rows_of_blocks
from ntk_ensembles.runs.groups import Measure
from ntk_ensembles.runs.options import Experiment
from ntk_ensembles.runs.store import STAGES, MemberResults
from ntk_ensembles.theory import DECODERS, Decoder


class TrainingResults(TypedDict):
    """How training went: ``training`` in ``results.json``."""

    steps_max: int
    relative_loss_max: float | None
    not_converged: list[int]
    seconds: dict[str, float]
    peak_memory_bytes: int


class FiniteWidthResults(TypedDict):
    """What the members' own width predicts: ``finite_width`` in ``results.json``."""

    movement: float
    bias_rms: float | None
    variance: float | None
    variance_error: float | None
    states: int | None
    omitted: str | None


class Results(TypedDict):
    """Content of ``results.json`` (docs/checkpoints.md)."""

    task: dict[str, Any]
    seed: int
    evaluation_seed: int
    width: int
    members: int
    members_planned: int
    init: str
    labels: str
    layers: str
    padding: int
    loss: str
    precision: str
    tolerance: float
    templates: int
    state_bits: int
    evaluation_states: int
    executions: int
    convergence: list[ConvergenceRow]
    finite_width: FiniteWidthResults
    training: TrainingResults
    environment: Environment


def results_of(
    experiment: Experiment, members: MemberResults, device: torch.device, seconds_startup: float = 0.0
) -> Results:
    """Return the results that follow from the members so far.

    Args:
        experiment: What was trained, how, and on what it was evaluated.
        members: All members so far, at least one.
        device: Where members were trained.
        seconds_startup: Time that the user had waited when training began, in this session.
    """
    measure, losses = Measure(experiment.limit), members.relative_loss
    blocks = members.summed(measure).blocks
    with one_thread():
        rows = rows_of_blocks(measure, blocks, experiment.at_width)
    task, options = experiment.task, experiment.options
    return {
        "task": {"name": task.name, **task.options},
        "seed": options.seed,
        "evaluation_seed": options.evaluation_seed,
        "width": options.width,
        "members": len(members),
        "members_planned": len(experiment.planned),
        "init": options.init,
        "labels": options.labels,
        "layers": options.layers,
        "padding": options.padding,
        "loss": options.loss,
        "precision": options.precision,
        "tolerance": options.tolerance,
        "templates": len(task.templates),
        "state_bits": task.layout.bits,
        "evaluation_states": len(experiment.evaluation),
        "executions": len(experiment.evaluation.trajectories),
        "convergence": rows,
        "finite_width": _finite_width(experiment),
        "training": {
            "steps_max": int(members.steps.max()),
            "relative_loss_max": float(losses.max()) if bool(losses.isfinite().all()) else None,
            "not_converged": members.indices[~members.converged].tolist(),
            "seconds": dict(
                zip((*STAGES, "startup"), [*members.seconds.sum(0).tolist(), seconds_startup], strict=True)
            ),
            "peak_memory_bytes": peak_memory_bytes(device),
        },
        "environment": environment(device, str(experiment.recipe.dtype)),
    }


def _finite_width(experiment: Experiment) -> FiniteWidthResults:
    predicted = experiment.at_width
    return {
        "movement": experiment.finite_width.movement,
        "bias_rms": float(predicted.bias.square().mean().sqrt()) if predicted else None,
        "variance": float(predicted.variance.mean()) if predicted else None,
        "variance_error": predicted.variance_error if predicted else None,
        "states": len(predicted.rows) if predicted else None,
        "omitted": experiment.without_finite_width,
    }


def print_report(results: Results, console: Console) -> None:
    """Print the convergence tables, and which members are not in them.

    Args:
        results: Content of ``results.json``.
        console: Console to print on.
    """
    print_rows(results["convergence"], console)
    print_finite_width(results["convergence"], results["width"], results["finite_width"]["omitted"], console)
    if failed := results["training"]["not_converged"]:
        console.print(
            f"[bold red]{len(failed)} of {results['members']} members did not converge[/bold red] and are left out of "
            f"every number above: {in_short(failed)}. Try more --steps or a larger --width.",
            highlight=False,
        )


def print_training(results: Results, directory: Path, console: Console) -> None:
    """Print how training went, what it took, and where the files are.

    Args:
        results: Content of ``results.json``.
        directory: Directory of the run.
        console: Console to print on.
    """
    training = results["training"]
    stages = ", ".join(f"{name} {training['seconds'][name]:.1f} s" for name in (*STAGES, "startup", "total"))
    memory = f"peak memory {training['peak_memory_bytes'] / 2**30:.2f} GiB"
    console.print(f"{training_in_words(training)}; {stages}; {memory}.", highlight=False)
    where = f"Results in {directory}; charts: {shlex.join(['tensorboard', '--logdir', str(directory)])}"
    console.print(where, highlight=False, soft_wrap=True, markup=False)


def training_in_words(training: TrainingResults) -> str:
    """Return how many steps members took and how far they came, as the beginning of a sentence."""
    loss = training["relative_loss_max"]
    worst = "not finite" if loss is None else f"{loss:.1e}"
    return f"{training['steps_max']} steps at most, relative loss at most {worst}"


def in_short(members: Sequence[int]) -> str:
    """Return indices of members as text, at most the first twenty."""
    return ", ".join(map(str, members[:20])) + (" …" if len(members) > 20 else "")


def print_rows(rows: Sequence[ConvergenceRow], console: Console, decoders: Sequence[Decoder] = DECODERS) -> None:
    """Print the convergence table; nothing if there are no rows.

    Args:
        rows: ``convergence`` of ``results.json``, N ascending.
        console: Console to print on.
        decoders: Decoders to show; whole executions are those of the first.
    """
    if not rows:
        return
    first = decoders[0]
    table = Table(title=f"exact match on evaluation states, and on whole executions by {first}: measured (theory)")
    table.add_column("N", justify="right")
    for decoder in decoders:
        table.add_column(decoder, justify="right", no_wrap=True)
    if rows[0]["execution_match"]:
        table.add_column("executions", justify="right", no_wrap=True)
    table.add_column("RMS deviation", justify="right", no_wrap=True)
    for row in rows:
        cells = [str(row["members"])]
        cells += [
            f"{percent(row['exact_match'][decoder])} ({percent(row['predicted_exact_match'][decoder])})"
            for decoder in decoders
        ]
        if row["execution_match"]:
            cells.append(percent(row["execution_match"][first]))
        cells.append(f"{row['rms_deviation']:.2e} ({row['predicted_rms_deviation']:.2e})")
        table.add_row(*cells)
    console.print(table)
    exact = exact_from(rows, first)
    if exact is not None:
        console.print(f"[bold]All states exact by {first} from N = {exact} on[/bold], in every group of members.")


def print_finite_width(
    rows: Sequence[ConvergenceRow],
    width: int,
    omitted: str | None,
    console: Console,
    decoders: Sequence[Decoder] = DECODERS,
) -> None:
    """Print what the members' own width predicts, or why it predicts nothing; nothing if there are no rows.

    Args:
        rows: ``convergence`` of ``results.json``, N ascending.
        width: Hidden units of each member.
        omitted: Why nothing is predicted; None if it is.
        console: Console to print on.
        decoders: Decoders to show.
    """
    if not rows:
        return
    if omitted is not None:
        console.print(f"No theory at width {width}: {omitted}.", highlight=False)
        return
    table = Table(title=f"theory at width {width} (asymptotic): measured (predicted)")
    table.add_column("N", justify="right")
    for heading in (*decoders, "RMS deviation"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        exact, deviation = row["finite_width_exact_match"], row["finite_width_rms_deviation"]
        assert exact is not None
        assert deviation is not None
        cells = [f"{percent(row['exact_match'][decoder])} ({percent(exact[decoder])})" for decoder in decoders]
        table.add_row(str(row["members"]), *cells, f"{row['rms_deviation']:.2e} ({deviation:.2e})")
    console.print(table)


def exact_from(rows: Sequence[ConvergenceRow], decoder: Decoder = "midpoint") -> int | None:
    """Return the smallest N from which on every group of members decodes every state right.

    Args:
        rows: ``convergence`` of ``results.json``, N ascending.
        decoder: How their mean is decoded.
    """
    smallest = None
    for row in reversed(rows):
        if row["exact_match"][decoder] < 1:
            break
        smallest = row["members"]
    return smallest


def percent(share: float) -> str:
    """Return a share in percent, never rounded up to 100% or down to 0%: those mean all and none.

    Args:
        share: Share from 0 to 1.
    """
    text = f"{100 * share:.2f}%"
    if text == "100.00%" and share < 1:
        return "<100%"
    if text == "0.00%" and share > 0:
        return ">0%"
    return text.replace(".00%", "%")


class Environment(TypedDict):
    """``environment`` in ``results.json``."""

    device: str
    device_type: str
    cpu_threads: int
    dtypes: dict[str, str]
    python: str
    versions: dict[str, str]


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory taken so far: on the GPU by tensors, otherwise by this process."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device, dtype: str) -> Environment:
    """Return device, types and versions, as ``results.json`` holds them.

    Args:
        device: Where members were trained.
        dtype: Type of their weights.
    """
    packages = ("torch", "lightning", "torchmetrics", "ntk-ensembles")
    return {
        "device": _gpu_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "cpu_threads": torch.get_num_threads(),
        "dtypes": {"weights": dtype.removeprefix("torch."), "stored_deviations": "float16"},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _gpu_name(device: torch.device) -> str:
    """Return the model, if it is in this machine: runs can be merged elsewhere."""
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "a GPU of another machine"


def _cpu_name() -> str:
    """Return the processor's model where the system knows it, otherwise its architecture."""
    return processor("model name") or platform.processor() or platform.machine()
