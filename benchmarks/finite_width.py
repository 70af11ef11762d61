"""What a finite width adds, measured beside predicted: bias, variance, deviation and exact match against the width.

    python benchmarks/finite_width.py --out study.json --figure study.png
    python benchmarks/finite_width.py --read study.json --figure study.png

For four tasks, both initialisations, plain and corrected labels, at widths 2^11 to 2^16; about an hour on two cores.
``--share 0.25`` trains a quarter of the members, ``--width-max`` leaves the larger widths out. ``--read`` trains
nothing: it prints the table and draws the figure of earlier results. Results are written after every width; run again
with the same ``--out``, it goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ntk_ensembles.ensemble import choose_cohort, predict, train_members
from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs import Experiment, RunOptions, convergence_rows
from ntk_ensembles.tasks import load_task_class

TASKS: dict[str, dict[str, int]] = {
    "permutation": {"bits": 20},
    "addition": {"bits": 10},
    "multiplication": {"bits": 4},
    "sbn": {"cells": 16, "word_bits": 8},
}
MEMBERS = {"permutation": 256, "addition": 256, "multiplication": 256, "sbn": 64}
WIDTHS = [1 << exponent for exponent in range(11, 17)]
STATES = 400
INITS, LABELS = ("gaussian", "antisymmetric"), ("plain", "corrected")


def measure(task_name: str, width: int, init: str, labels: str, members: int) -> dict[str, Any] | None:
    """Train members and return what they do beside what is predicted; None where labels cannot be corrected."""
    task = load_task_class(task_name)(**TASKS[task_name])
    options: Any = {"width": width, "ensemble": members, "init": init, "labels": labels, "evaluation_states": STATES}
    experiment = Experiment(task, RunOptions(accelerator="cpu", **options))
    try:
        recipe = experiment.recipe
    except ValueError:
        return None
    limit, predicted, device = experiment.limit, experiment.at_width, experiment.device
    started = time.perf_counter()
    size = choose_cohort(recipe, STATES, members, device)
    parts, initial, failed = [], [], 0
    every = torch.eye(len(task.templates))
    on, off = (weight[:, None] for weight in limit.predictor.weights(limit.evaluation.matches.sum(1)))
    weights = off.where(~limit.evaluation.matches, on).float()
    for start in range(0, members, size):
        indices = range(start, min(start + size, members))
        stack = recipe.make_stack(indices, device)
        before = predict(stack, limit.inputs) - weights @ predict(stack, every)
        del stack
        stack, statuses = train_members(recipe, indices, device)
        kept = [position for position, status in enumerate(statuses) if status.converged]
        failed += len(stack) - len(kept)
        parts.append(predict(stack, limit.inputs)[kept] - limit.mean.float())
        initial.append(before[kept])
    deviations = torch.cat(parts)
    variance = deviations.double().var(0)
    # Each member is taken without its initial function's own part, which is known and has the mean 0; and of the mean's
    # square what that number of members leaves by chance is taken off.
    cleaned = deviations.double() - torch.cat(initial)
    squared = float((cleaned.mean(0).square() - cleaned.var(0) / len(cleaned)).mean())
    return {
        "task": task_name,
        **TASKS[task_name],
        "templates": len(task.templates),
        "width": width,
        "init": init,
        "labels": labels,
        "members": len(deviations),
        "not_converged": failed,
        "states": len(limit.mean),
        "movement": experiment.finite_width.movement,
        "bias_rms": max(squared, 0.0) ** 0.5,
        "predicted_bias_rms": float(predicted.bias.square().mean().sqrt()) if predicted else None,
        "variance": float(variance.mean()),
        "predicted_variance": float(predicted.variance.mean()) if predicted else None,
        "infinite_width_variance": float(limit.variance.mean()),
        "convergence": convergence_rows(limit, deviations, at_width=predicted),
        "seconds": time.perf_counter() - started,
    }


def study(path: Path, share: float, width_max: int) -> list[dict[str, Any]]:
    """Measure what is not in the file yet, the cheap first."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(row["task"], row["width"], row["init"], row["labels"]) for row in rows}
    for width, task, init, labels in itertools.product(WIDTHS, TASKS, INITS, LABELS):
        if width > width_max or (task, width, init, labels) in done:
            continue
        found = measure(task, width, init, labels, max(16, round(MEMBERS[task] * share)))
        if found is not None:
            rows.append(found)
            text = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
            write_atomically(path, lambda part, text=text: part.write_text(text))
            print(f"{task}, width {width}, {init}, {labels}: {found['seconds']:.0f} s", flush=True)
    return rows


def at(row: dict[str, Any], members: int) -> dict[str, Any]:
    """Return the convergence row of this number of members, or of the most there are."""
    return [one for one in row["convergence"] if one["members"] <= members][-1]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="measured (predicted at this width)")
    for heading in (
        "task",
        "n",
        "n/k",
        "init",
        "labels",
        "members",
        "RMS bias",
        "variance",
        "RMS, N = 16",
        "exact, N = 4",
    ):
        table.add_column(heading, no_wrap=True)

    def beside(measured: float, predicted: float | None, form: str) -> str:
        return f"{measured:{form}} ({'-' if predicted is None else f'{predicted:{form}}'})"

    for row in sorted(rows, key=lambda row: (list(TASKS).index(row["task"]), row["init"], row["labels"], row["width"])):
        four, sixteen = at(row, 4), at(row, 16)
        exact = four["finite_width_exact_match"]
        table.add_row(
            row["task"],
            f"{row['width']}",
            f"{row['width'] / row['templates']:.0f}",
            row["init"],
            row["labels"],
            f"{row['members']}",
            beside(row["bias_rms"], row["predicted_bias_rms"], ".2e"),
            beside(row["variance"], row["predicted_variance"], ".2e"),
            beside(sixteen["rms_deviation"], sixteen["finite_width_rms_deviation"], ".2e"),
            beside(four["exact_match"]["midpoint"], exact and exact["midpoint"], ".4f"),
        )
    Console(width=160).print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.4), layout="constrained")
    axes = figure.subplots(2, len(TASKS), squeeze=False)
    colours = {"gaussian": "#0072B2", "antisymmetric": "#D55E00"}
    for column, task in enumerate(TASKS):
        for init, labels in itertools.product(INITS, LABELS):
            chosen = [row for row in rows if (row["task"], row["init"], row["labels"]) == (task, init, labels)]
            chosen.sort(key=lambda row: row["width"])
            if not chosen:
                continue
            style: dict[str, Any] = {"color": colours[init], "markerfacecolor": colours[init], "markersize": 4}
            line = "-"
            if labels == "corrected":
                style["markerfacecolor"], line = "white", ":"
            widths = [row["width"] for row in chosen]
            name = f"{init}, {labels} labels"
            bias, misses = axes[0, column], axes[1, column]
            bias.plot(widths, [row["bias_rms"] or None for row in chosen], "o", **style, label=name)
            bias.plot(widths, [row["predicted_bias_rms"] or None for row in chosen], line, color=colours[init])
            fours = [at(row, 4) for row in chosen]
            misses.plot(widths, [one["rms_deviation"] for one in fours], "o", **style)
            misses.plot(widths, [one["finite_width_rms_deviation"] for one in fours], line, color=colours[init])
            if init == "gaussian" and labels == "plain":
                infinite = [one["predicted_rms_deviation"] for one in fours]
                misses.plot(widths, infinite, "--", color="grey", linewidth=1, label="infinite width, gaussian")
        title = f"{task}, k = {next((row['templates'] for row in rows if row['task'] == task), 0)}"
        axes[0, column].set(title=title, ylabel="RMS bias of the mean")
        axes[1, column].set(xlabel="width n", ylabel="RMS deviation, N = 4")
        for panel in axes[:, column]:
            panel.set(xscale="log", yscale="log")
            panel.set_xscale("log", base=2)
            panel.grid(alpha=0.3)
    (points, names), (line, name) = (panel.get_legend_handles_labels() for panel in axes[:, 0])
    figure.legend(points + line, names + name, loc="outside lower center", ncols=5)
    figure.suptitle("Finite width: measured (points; open: corrected labels) and predicted (lines)")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("finite-width.json"), help="file of the results")
    parser.add_argument("--read", type=Path, help="file of earlier results, to show only")
    parser.add_argument("--figure", type=Path, help="picture to write")
    parser.add_argument("--share", type=float, default=1.0, help="share of the members to train, at least 16")
    parser.add_argument("--width-max", type=int, default=WIDTHS[-1], help="largest width")
    options = parser.parse_args()
    rows = (
        json.loads(options.read.read_text()) if options.read else study(options.out, options.share, options.width_max)
    )
    show(rows)
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
