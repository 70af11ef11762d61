"""Tables of the README and of other pages, written from the results that they quote.

    python benchmarks/tables.py

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. A test checks that every page has what
this command would write.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs.figures import median_passing
from ntk_ensembles.runs.reproduce import TARGETS, published_passings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_PLACE = re.compile(r"(?<=<!-- table: )([\w-]+)( -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


def results(name: str) -> Any:
    """Return committed results, by the name of their file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rounded(value: float, digits: int = 2) -> str:
    """Return a number with this many significant digits, without an exponent."""
    value = float(f"{value:.{digits - 1}e}")
    decimals = max(digits - 1 - int(f"{value:e}".partition("e")[2]), 0)
    return f"{value:,.{decimals}f}"


def duration(seconds: float) -> str:
    """Return a time in the unit that reads best."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{rounded(seconds / size)} {unit}"
    return f"{rounded(seconds)} s" if seconds >= 1 else f"{rounded(seconds * 1000)} ms"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def task_name(task: dict[str, Any]) -> str:
    """Return a task with its size in words."""
    name = task["name"]
    size = f"{task['cells']} × {task['word_bits']}" if name == "sbn" else f"{task['bits']} bits"
    return f"`sbn`, {size}" if name == "sbn" else f"{name}, {size}"


def rivals() -> str:
    """Time to the same training error, a task a row."""

    def cell(found: dict[str, Any] | None) -> str:
        if found is None:
            return "-"
        if not found["reached"]:
            return f"not in {found['steps']:,} steps, {duration(found['seconds'])}"
        ratio = "" if found["times_descent"] == 1 else f" ({rounded(found['times_descent'])} times)"
        return f"{found['steps']} steps, {duration(found['seconds'])}{ratio}"

    figures = results("rivals")
    ways = ("descent", "sgd", "sgd, X = I", "adam")
    return markdown(
        [
            "task, members × width",
            "this package",
            "`torch.func`, SGD, best step",
            "the same, for one-hot inputs",
            "`torch.func`, Adam, best rate",
        ],
        [
            [
                f"{task_name(row['task'])}, {row['members']} × {row['width']:,}",
                *(cell(row["methods"].get(way)) for way in ways),
            ]
            for row in figures["cases"]
            if "sgd" in row["methods"]
        ],
    )


def rivals_quality() -> str:
    """Return what the members' mean is at the end, a row for each task and way."""
    return markdown(
        [
            "task, members × width",
            "trained by",
            "step or rate",
            "steps",
            "processor time",
            "squared error left",
            "mean's exact match (midpoint)",
            "its RMS distance from the NTK mean (expected)",
        ],
        [
            [
                f"{task_name(row['task'])}, {row['members']} × {row['width']:,}",
                name,
                rounded(found.get("step") or found["rate"], 3) if name != "descent" else "-",
                f"{found['steps']}",
                duration(found["seconds"]),
                f"{found['relative_error']:.1e}",
                f"{100 * found['exact_match']:.4g}%",
                f"{found['rms_deviation']:.4f} ({row['rms_deviation_at_infinite_width']:.4f})",
            ]
            for row in results("rivals")["cases"]
            for name, found in row["methods"].items()
        ],
    )


def published() -> str:
    """Return the published recipe beside this package, a row for each task."""
    figures = results("rivals")

    def recipe(row: dict[str, Any]) -> list[str]:
        found = row["published"]
        about = "about " if found["extrapolated"] else ""
        error = f"{found['relative_error_after_steps_timed']:.2f} after {found['steps_timed']:,} steps"
        return [f"{about}{duration(found['member_seconds'])}", error]

    rows = []
    for row in figures["cases"]:
        ours = row["methods"]["descent"]
        each = ours["seconds"] / row["members"]
        ratio = rounded(row["published"]["member_seconds"] / each)
        rows.append(
            [
                f"{task_name(row['task'])}, {row['width']:,}",
                f"{duration(each)} ({ours['steps']} steps)",
                *recipe(row),
                ratio,
            ]
        )
    # The last case is the published one, whose number of members is known.
    needed, theirs = row["members_to_99.9_percent"], figures["published_members"]
    ours, whole = needed * each, theirs * row["published"]["member_seconds"]
    rows.append(
        [
            "the last, to 99.9% exact",
            f"{duration(ours)} ({needed} member{'s' if needed > 1 else ''})",
            f"about {duration(whole)} ({theirs} members, as published)",
            "",
            rounded(whole / ours),
        ]
    )
    return markdown(
        [
            "task, width",
            "this package, a member",
            "recipe, a member",
            "squared error that the recipe had left",
            "times",
        ],
        rows,
    )


def neural_tangents() -> str:
    """Predictions a second beside neural-tangents."""
    names = ("addition, 4 bits", "addition, 10 bits", "multiplication, 4 bits", "`sbn`, 16 × 8")
    rows = zip(names, results("neural-tangents")["tasks"], strict=True)
    return markdown(
        [
            "task",
            "theirs, a state a call",
            "theirs, one batch",
            "`NTKExecutor.predict`: mean and variance",
            "closed loop: match, predict, decode, compare",
            "times their single call",
        ],
        [
            [
                name,
                *(rounded(row[key]) for key in ("peer_single", "peer_batch", "predict", "run")),
                f"{rounded(row['predict_ratio'])} and {rounded(row['run_ratio'])}",
            ]
            for name, row in rows
        ],
    )


def execution() -> str:
    """Micro-steps a second of the computer on the NTK mean."""
    found = []
    for row in results("execution")["tasks"]:
        cells, word = re.findall(r"cells=(\d+), word\w*=(\d+)", row["task"])[0]
        found.append(
            [
                f"{cells} × {word}",
                f"{row['templates']:,}",
                f"{row['state_bits']:,}",
                rounded(row["single"]),
                rounded(row["batch"]),
                rounded(row["smallest_margin"]),
            ]
        )
    return markdown(
        [
            "cells × bits",
            "templates",
            "state bits",
            "micro-steps a second, one program",
            "batch of 16,384",
            "smallest margin met",
        ],
        found,
    )


def members_needed() -> str:
    """Members that the smallest and the largest tasks need."""

    def number(value: int | None) -> str:
        return "never" if value is None else f"{value:,}"

    def pair(found: dict[str, int | None] | None) -> str:
        return "-" if found is None else f"{number(found['0.9'])} / {number(found['0.999'])}"

    def at_width(row: dict[str, Any], init: str, labels: str) -> str:
        found = next(one for one in row["at_width"] if (one["init"], one["labels"]) == (init, labels))
        predicted, measured = (found[key] and found[key]["0.999"] for key in ("predicted", "measured"))
        return f"{'-' if measured is None else number(measured)} ({'-' if predicted is None else number(predicted)})"

    ways = (
        ("gaussian", "plain"),
        ("gaussian", "corrected"),
        ("antisymmetric", "plain"),
        ("antisymmetric", "corrected"),
    )
    return markdown(
        [
            "task",
            "k",
            "midpoint: 90% / 99.9%",
            "certified: one state / all 2^m",
            "sign: 90% / 99.9%",
            "padding for sign",
            "sign, padded: 90% / 99.9%",
            *(f"width 16k, {init}, {labels}: 99.9%" for init, labels in ways),
        ],
        [
            [
                task_name(row["task"]),
                f"{row['templates']:,}",
                pair(row["infinite_width"]["midpoint"]),
                f"{number(row['certificate']['one_state'])} / {number(row['certificate']['all_states'])}",
                pair(row["infinite_width"]["sign"]),
                f"{row['padding']:,}",
                pair(row["infinite_width"]["sign, padded"]),
                *(at_width(row, init, labels) for init, labels in ways),
            ]
            for row in results("members-needed")["rows"]
        ],
    )


def reproduction() -> str:
    """Members at which permutation ensembles first reach 90% and 99.9%, a number of bits and a target a row."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:,g}"

    def cells(found: dict[str, Any]) -> list[str]:
        measured = sorted(math.inf if value is None else value for value in found["measured"])
        spread = f"{number(median_passing(found['measured']))} ({measured[0]:,} to {measured[-1]:,})"
        theory = (found[key] and median_passing(found[key]) for key in ("at_width", "infinite_width"))
        return [spread, " / ".join(number(value) for value in theory), number(found["infinite_width_average"])]

    published = published_passings()
    return markdown(
        [
            "k",
            "target",
            "published",
            *(
                f"{way}: {what}"
                for way in ("sign, readout", "sign, both layers")
                for what in ("measured (least to most)", "theory, this / infinite width", "on average, infinite width")
            ),
            "midpoint: measured (least to most)",
        ],
        [
            [
                f"{row['bits']}",
                f"{100 * target:g}%",
                number(published[row["bits"]][target]),
                # Of midpoint, the last, only what was measured: theory says 1 throughout.
                *[cell for way in row["ways"] for cell in cells(way["passings"][f"{target:g}"])][:-2],
            ]
            for target in TARGETS
            for row in results("reproduction")["rows"]
        ],
    )


def headline() -> str:
    """Exact match and deviation of the headline run, a number of members a row."""
    return markdown(
        [
            "members",
            "exact match by midpoint",
            "predicted: infinite width",
            "predicted: this width",
            "RMS deviation from the NTK mean",
            "predicted: infinite width",
            "predicted: this width",
        ],
        [
            [
                f"{row['members']}",
                *(
                    f"{100 * row[key]['midpoint']:.5g}%"
                    for key in ("exact_match", "predicted_exact_match", "finite_width_exact_match")
                ),
                *(
                    f"{row[key]:.2e}"
                    for key in ("rms_deviation", "predicted_rms_deviation", "finite_width_rms_deviation")
                ),
            ]
            for row in results("headline-cpu")["convergence"]
        ],
    )


def finite_width() -> str:
    """Bias, variance and deviation at the largest width studied, a way to train a row."""
    rows = results("finite-width")
    largest = max(row["width"] for row in rows)

    def deviation(row: dict[str, Any]) -> str:
        found = next(one for one in row["convergence"] if one["members"] == 16)
        return f"{found['rms_deviation']:.2e} ({found['finite_width_rms_deviation']:.2e})"

    return markdown(
        ["task", "width", "initial weights, labels", "members", "RMS bias", "variance", "RMS deviation, N = 16"],
        [
            [
                row["task"],
                f"{row['width']:,}",
                f"{row['init']}, {row['labels']}",
                f"{row['members']}",
                *(f"{row[key]:.2e} ({row[f'predicted_{key}']:.2e})" for key in ("bias_rms", "variance")),
                deviation(row),
            ]
            for row in rows
            if row["width"] == largest
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "rivals": rivals,
    "rivals-quality": rivals_quality,
    "published": published,
    "neural-tangents": neural_tangents,
    "execution": execution,
    "headline": headline,
    "finite-width": finite_width,
    "members-needed": members_needed,
    "reproduction": reproduction,
}


def filled(text: str) -> str:
    """Return a page with its tables as the results have them."""
    return _PLACE.sub(lambda place: f"{place[1]}{place[2]}{TABLES[place[1]]()}", text)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            write_atomically(page, lambda part, after=after: part.write_text(after, encoding="utf-8"))
            print(f"{page.relative_to(ROOT)}: written anew")


if __name__ == "__main__":
    main()
