"""Members that an ensemble needs as its task grows: by theory for all sizes, by training where that takes seconds.

    nice -n 10 python benchmarks/members_needed.py --out benchmarks/results/members-needed.json
    python benchmarks/members_needed.py --read benchmarks/results/members-needed.json --figure docs/members-needed.png

For addition and multiplication of L bits and for the one-instruction computer of C cells, each on evaluation states:

- infinite width, Gaussian: the smallest N that decodes 90% and 99.9% of states right on average over ensembles, by
  ``midpoint``, by ``sign``, and by ``sign`` with the zero-labelled templates that its certificate asks for. The last is
  given the best case: bits that no template sets and states that one template matches, which ``sign`` decodes at random
  (their mean is 0), are left out.
- the certificate: members that suffice for one state, and for all 2^m states at once, with probability 1 − DELTA.
- width WIDTH_FACTOR·k: by ``midpoint``, with Gaussian and antisymmetric initial weights, on plain and on corrected
  labels, as predicted and as measured on disjoint groups of trained members.

About four minutes of processor time. Results are written after every size; run again with the same ``--out``, it
goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from ntk_ensembles import SBN, Addition, EvaluationSet, LimitPrediction, Multiplication, Task, TemplatePredictor
from ntk_ensembles.ensemble import INITS, choose_cohort, predict, train_members
from ntk_ensembles.errors import OptionError
from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs import Experiment, RunOptions, convergence_rows
from ntk_ensembles.runs.plan import smallest_reaching
from ntk_ensembles.runs.results import environment
from ntk_ensembles.theory import DECODERS, LABELS, Prediction, WidthPrediction, certify, sign_padding, thresholds
from ntk_ensembles.theory.certificate import scopes_of

TASKS: dict[str, tuple[Task[Any, Any], ...]] = {
    "addition": tuple(Addition(bits) for bits in (2, 4, 8, 16, 32, 64, 128)),
    "multiplication": tuple(Multiplication(bits) for bits in (2, 3, 4, 6, 8, 12, 16, 24)),
    "sbn": tuple(SBN(cells, 8) for cells in (4, 8, 16, 32, 64)),
}
SIZE = {"addition": "bits", "multiplication": "bits", "sbn": "cells"}
STATES, STATES_AT_WIDTH, UNITS = 400, 100, 128
TARGETS = (0.9, 0.999)
DELTA = 1e-6
MEMBERS_MAX = 1 << 40
"""More are as good as none that suffice."""

WIDTH_FACTOR = 16
MEMBERS_TRAINED = (16, 128)
OPERATIONS, OPERATIONS_MAX = 2e10, 6e11
"""Multiply-adds that the members of one row are to take, and more than which are not trained."""

_STEPS = 5


def study(task: Task[Any, Any]) -> dict[str, Any]:
    """Return everything about one task of one size."""
    started = time.perf_counter()
    evaluation = EvaluationSet.sample(task, STATES, 0)
    limit = LimitPrediction(task, evaluation)
    bounds = scopes_of(task)["all_states"]
    certificate = certify(limit.predictor, bounds, "midpoint")
    padding = sign_padding(limit.predictor, bounds)
    infinite = {decoder: reached(limit, decoder) for decoder in DECODERS}
    infinite["sign, padded"] = reached(padded_sign(task, evaluation, padding), "sign")
    row = {
        "task": {"name": task.name, **task.options},
        "size": task.options[SIZE[task.name]],
        "templates": len(task.templates),
        "state_bits": task.layout.bits,
        "states": len(evaluation),
        "matches_max": {"seen": int(evaluation.matches.sum(1).max()), "all_states": certificate.max_matches.bound},
        "infinite_width": infinite,
        "padding": padding,
        "certificate": {
            "proven": certificate.proven,
            "one_state": certificate.members(DELTA),
            "all_states": certificate.members(DELTA, task.layout.bits * math.log(2)),
        },
        "at_width": [at_width(task, init, labels) for init, labels in itertools.product(INITS, LABELS)],
    }
    row["seconds"] = time.perf_counter() - started
    return row


def reached(prediction: Prediction, decoder: Any) -> dict[str, int | None]:
    """Return the members that reach each target; None where no number does."""
    return {f"{target:g}": smallest_reaching(prediction, decoder, target, MEMBERS_MAX) for target in TARGETS}


def padded_sign(task: Task[Any, Any], evaluation: EvaluationSet, padding: int) -> Prediction:
    """Return what infinite width predicts with padding, where the sign decoder has a margin."""
    predictor = TemplatePredictor(task.templates, padding)
    rows, bits = evaluation.matches.sum(1) > 1, predictor.fan_in > 0
    matches = evaluation.matches[rows]
    gaussian = predictor.predict(matches)
    limits = thresholds("sign", predictor, matches.sum(1))
    return Prediction(
        gaussian.mean[:, bits], gaussian.variance, {"sign": limits[:, bits]}, evaluation.next_states[rows][:, bits]
    )


def at_width(task: Task[Any, Any], init: Any, labels: Any) -> dict[str, Any]:
    """Return the members needed at a finite width, predicted and measured."""
    templates, bits = len(task.templates), task.layout.bits
    width = WIDTH_FACTOR * templates
    each = 3 * _STEPS * width * templates * bits
    least, most = MEMBERS_TRAINED
    members = min(max(int(OPERATIONS / each), least), most)
    options = RunOptions(
        width=width, ensemble=members, init=init, labels=labels, evaluation_states=STATES, accelerator="cpu"
    )
    experiment = Experiment(task, options)
    found: dict[str, Any] = {"init": init, "labels": labels, "width": width, "predicted": None, "measured": None}
    if experiment.without_finite_width is None:
        prediction = WidthPrediction(experiment.limit, experiment.finite_width, units=UNITS, states_max=STATES_AT_WIDTH)
        found["predicted"] = reached(prediction, "midpoint")
    # Labels that are wanted corrected cannot be where the width is far too small.
    with contextlib.suppress(OptionError):
        found["measured"] = trained(experiment) if members * each <= OPERATIONS_MAX else None
    return found


def trained(experiment: Experiment) -> dict[str, Any]:
    """Train members, and return the smallest N whose disjoint groups reach each target on average."""
    limit, recipe, device = experiment.limit, experiment.recipe, experiment.device
    members = experiment.options.ensemble
    size = choose_cohort(recipe, STATES, members, device)
    parts = []
    for start in range(0, members, size):
        stack, statuses = train_members(recipe, range(start, min(start + size, members)), device)
        kept = [position for position, status in enumerate(statuses) if status.converged]
        parts.append(predict(stack, limit.inputs)[kept] - limit.mean.float())
    deviations = torch.cat(parts)
    found: dict[str, Any] = {"members": len(deviations), "not_converged": members - len(deviations)}
    found |= {f"{target:g}": None for target in TARGETS}
    # Of larger groups there are too few for an average.
    for size in range(1, len(deviations) // 2 + 1):
        exact = convergence_rows(limit, deviations, [size])[0]["exact_match"]["midpoint"]
        for target in TARGETS:
            if found[f"{target:g}"] is None and exact >= target:
                found[f"{target:g}"] = size
        if exact >= max(TARGETS):
            break
    return found


def study_all(path: Path) -> list[dict[str, Any]]:
    """Study what is not in the file yet, the cheap first, and write it after every size."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    done = [row["task"] for row in rows]
    tasks = list(itertools.chain.from_iterable(TASKS.values()))
    places = [{"name": task.name, **task.options} for task in tasks]
    for task in sorted(tasks, key=lambda task: len(task.templates)):
        if {"name": task.name, **task.options} in done:
            continue
        found = study(task)
        rows = sorted([*rows, found], key=lambda row: places.index(row["task"]))
        figures = {
            "delta": DELTA,
            "width_factor": WIDTH_FACTOR,
            "rows": rows,
            "environment": environment(torch.device("cpu"), "float32"),
        }
        text = json.dumps(figures, indent=1) + "\n"
        write_atomically(path, lambda part, text=text: part.write_text(text, encoding="utf-8"))
        print(f"{task!r}: {found['seconds']:.0f} s", flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(12, 7.2), layout="constrained")
    axes = figure.subplots(2, len(TASKS), sharex="col", sharey="row", squeeze=False)
    lines = (
        ("sign, padded", "#D55E00", "v", "sign, padded"),
        ("all_states", "#E69F00", "s", "midpoint: all $2^m$ states, certified, δ = 10⁻⁶"),
        ("one_state", "#009E73", "D", "midpoint: any one state, certified, δ = 10⁻⁶"),
        ("midpoint", "#0072B2", "o", "midpoint"),
    )
    ways = (
        ("gaussian", "plain", "#0072B2", "o"),
        ("gaussian", "corrected", "#56B4E9", "s"),
        ("antisymmetric", "plain", "#D55E00", "^"),
        ("antisymmetric", "corrected", "#E69F00", "D"),
    )
    for column, name in enumerate(TASKS):
        chosen = [row for row in rows if row["task"]["name"] == name]
        sizes = [row["size"] for row in chosen]
        top, bottom = axes[0, column], axes[1, column]
        for key, colour, marker, text in lines:
            if key in ("all_states", "one_state"):
                top.plot(sizes, [row["certificate"][key] for row in chosen], f"{marker}-", color=colour, label=text)
                continue
            for target, style in (("0.999", "-"), ("0.9", "--")):
                values = [row["infinite_width"][key][target] for row in chosen]
                share = "99.9%" if target == "0.999" else "90%"
                top.plot(sizes, values, marker + style, color=colour, label=f"{text}: {share} of states")
        for position, (init, labels, colour, marker) in enumerate(ways):
            found = [
                next(one for one in row["at_width"] if (one["init"], one["labels"]) == (init, labels)) for row in chosen
            ]
            # Small whole numbers coincide; each way has a place of its own beside them.
            shift = 1.03 ** (position - 1.5)
            predicted = [one["predicted"] and one["predicted"]["0.999"] for one in found]
            measured = [one["measured"] and one["measured"]["0.999"] for one in found]
            bottom.plot(sizes, [value and value * shift for value in predicted], "-", color=colour, linewidth=1.5)
            bottom.plot(
                sizes,
                [value and value * shift for value in measured],
                marker,
                color=colour,
                markersize=7,
                label=f"{init}, {labels} labels",
            )
        top.set_xscale("log", base=2)
        top.set_yscale("log")
        bottom.xaxis.set_major_locator(FixedLocator(sizes))
        bottom.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bottom.xaxis.set_minor_formatter(NullFormatter())
        top.set_title({"sbn": "one-instruction computer, 8-bit cells"}.get(name, name))
        bottom.set_xlabel("cells" if name == "sbn" else "bits of an operand, L")
        for panel in (top, bottom):
            panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel("members, infinite width")
    axes[1, 0].set_ylabel(f"members to 99.9%, width {WIDTH_FACTOR}k")
    axes[1, 0].set_yscale("log")
    axes[1, 0].yaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 10, 20, 50, 100, 200, 500]))
    axes[1, 0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[1, 0].yaxis.set_minor_formatter(NullFormatter())
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=3, fontsize=10)
    handles, texts = axes[1, 0].get_legend_handles_labels()
    figure.legend(
        handles, texts, loc="outside lower center", ncols=4, fontsize=10, title="points: trained; lines: predicted"
    )
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("members-needed.json"), help="file of the results")
    parser.add_argument("--read", type=Path, help="file of earlier results, to draw only")
    parser.add_argument("--figure", type=Path, help="picture to write")
    options = parser.parse_args()
    rows = json.loads(options.read.read_text(encoding="utf-8"))["rows"] if options.read else study_all(options.out)
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
