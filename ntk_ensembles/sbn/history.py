"""What happened in an execution, micro-step by micro-step: as a file, and as a picture."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from ntk_ensembles.files import write_atomically
from ntk_ensembles.sbn.execution import PHASES, History
from ntk_ensembles.tasks.sbn import SBN

DPI = 150
"""Pixels to an inch, at which the figure is meant to be saved."""

_COLUMNS_MAX = 1200
"""Of longer histories several micro-steps share a column: there are no more pixels to show them."""

# Okabe and Ito's palette; two tones tell neighbouring cells apart.
_PHASE, _REGISTER, _SELECT = "#000000", "#D55E00", "#009E73"
_CHANGING, _CONSTANT = ("#0072B2", "#56B4E9"), ("#9AA3AB", "#BCC4CA")
_PAPER = ("#FFFFFF", "#F3F3F3")


def write_trace(path: Path, task: SBN, history: History, labels: Mapping[str, int]) -> None:
    """Write a history as JSON lines.

    The first line describes the machine: ``cells``, ``word``, ``branch``, ``labels``. Each further line is the state
    after a micro-step, and the first of them the state before any: ``micro_step``; ``instruction``, that it belongs
    to, from 1; ``margin``, null where nothing matched; ``agreed``; ``phase``, what the next micro-step does, or
    ``halted``; ``memory`` in signed words; ``select``, the cells to be written; and the other fields of the state as
    unsigned integers. Before any micro-step ``margin`` and ``agreed`` are null.

    Args:
        path: where to.
        task: the machine.
        history: of one program.
        labels: of the program.

    Raises:
        SaveError: it cannot be written.
    """
    head = {"cells": task.cells, "word": task.word, "branch": task.branch, "labels": dict(labels)}

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            for line in itertools.chain([head], _trace(task, history)):
                file.write(json.dumps(line, allow_nan=False) + "\n")

    write_atomically(path, write)


def _trace(task: SBN, history: History) -> Iterator[dict[str, Any]]:
    phases = {
        bit: name if len(task.layout[name]) == 1 else task.layout.bit_name(bit)
        for name in PHASES
        for bit in task.layout[name]
    }
    memory = [f"memory{cell}" for cell in range(task.cells)]
    registers = [name for name in task.layout if name not in (*PHASES, *memory, "select")]
    margins, agreed = history.margins.tolist(), history.agreed.tolist()
    for moment, state in enumerate(history.states):
        fields = task.layout.unpack(state)
        margin = margins[moment - 1] if moment else math.inf
        yield {
            "micro_step": moment,
            "instruction": -(-moment // task.step_micro_steps),
            "margin": margin if math.isfinite(margin) else None,
            "agreed": agreed[moment - 1] if moment else None,
            "phase": " ".join(name for bit, name in phases.items() if state[bit]) or "halted",
            "memory": [task.machine.wrap(fields[name]) for name in memory],
            "select": [cell for cell in range(task.cells) if fields["select"] >> cell & 1],
            **{name: fields[name] for name in registers},
        }


def history_figure(task: SBN, history: History, labels: Mapping[str, int], title: str) -> Figure:
    """The state as a raster over time, a row a bit, and the decision margin under it.

    Args:
        task: the machine.
        history: of one program, at least one micro-step.
        labels: of the program, shown beside their cells.
        title: a line above.
    """
    bands = _bands(task, history)
    states = history.states.numpy()
    together = -(-len(states) // _COLUMNS_MAX)
    columns = _unite(states, together)
    rows = [row for band in bands for row in np.repeat(band.bits, band.repeat)]
    # Four pixels a bit, as long as that is a picture one can look at; never less than one.
    height = max(4, min(4 * len(rows) / DPI, 15), len(rows) / DPI)
    figure = Figure(figsize=(13, height + 2.6), layout="constrained")
    raster, margin = figure.subplots(2, 1, sharex=True, height_ratios=[height, 1.3])
    right = len(columns) * together - 0.5
    raster.imshow(
        np.where(columns.T[rows, :, None], *(_rgb(bands, tone)[:, None] for tone in ("ink", "paper"))),
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, right, len(rows) - 0.5, -0.5),
    )
    _name_rows(raster, bands, task, labels)
    _draw_margin(margin, history)
    margin.set_xlim(-0.5, right)
    margin.set_xlabel("micro-step" if together == 1 else f"micro-step (a column is the union of {together} states)")
    length = task.step_micro_steps
    instructions = raster.secondary_xaxis("top", functions=(lambda x: x / length, lambda x: x * length))
    instructions.xaxis.set_major_locator(MaxNLocator(integer=True))
    instructions.set_xlabel(f"instructions, of {length} micro-steps each")
    meaning = {_PHASE: "phase", _REGISTER: "registers", _SELECT: "cell to be written"}
    meaning |= {_CHANGING[0]: "memory", _CONSTANT[0]: "memory that stays as it was"}
    patches = [Patch(color=colour, label=text) for colour, text in meaning.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def chart(directory: Path, task: SBN, history: History, labels: Mapping[str, int], title: str) -> None:
    """Write the figure, and the margin of every micro-step, as TensorBoard events.

    Args:
        directory: for TensorBoard's ``--logdir``.
        task: the machine.
        history: of one program, at least one micro-step.
        labels: of the program.
        title: a line above the figure.

    Raises:
        OSError: it cannot be written.
    """
    writer: Any = SummaryWriter(str(directory))
    writer.add_figure("execution/state", history_figure(task, history, labels, title))
    for number, margin in enumerate(history.margins.tolist(), start=1):
        writer.add_scalar("execution/margin", margin, number)
    writer.close()


@dataclass(frozen=True)
class _Band:
    """Rows of the raster that belong together, from top to bottom."""

    name: str
    bits: tuple[int, ...]
    ink: str
    paper: str
    repeat: int
    """Pixels a bit; registers are few among many memory cells, and small otherwise."""


def _bands(task: SBN, history: History) -> list[_Band]:
    """What the machine does, what it holds in hand, and its memory; the highest bit of a number on top."""
    changing = (history.states != history.states[0]).any(0).tolist()
    tall = 2 if task.cells >= 32 else 1
    phases = tuple(bit for name in PHASES for bit in task.layout[name])
    bands = [_Band("phase", phases, _PHASE, _PAPER[0], tall)]
    for name in task.layout:
        if name in PHASES or name.startswith("memory"):
            continue
        bits = tuple(task.layout[name]) if name == "select" else tuple(reversed(task.layout[name]))
        ink, repeat = (_SELECT, 1) if name == "select" else (_REGISTER, tall)
        bands.append(_Band(name.replace("_", " "), bits, ink, _PAPER[len(bands) % 2], repeat))
    for cell in range(task.cells):
        bits = tuple(reversed(task.layout[f"memory{cell}"]))
        tones = _CHANGING if any(changing[bit] for bit in bits) else _CONSTANT
        bands.append(_Band(f"cell {cell}", bits, tones[cell % 2], _PAPER[len(bands) % 2], 1))
    return bands


def _unite(states: Bool[NDArray[np.bool_], "moments bits"], together: int) -> Bool[NDArray[np.bool_], "columns bits"]:
    padded = np.zeros((-(-len(states) // together) * together, states.shape[1]), np.bool_)
    padded[: len(states)] = states
    return np.maximum.reduceat(padded, np.arange(0, len(padded), together), axis=0)


def _rgb(bands: list[_Band], tone: str) -> UInt8[NDArray[np.uint8], "rows 3"]:
    colours = [getattr(band, tone) for band in bands for _ in range(len(band.bits) * band.repeat)]
    return np.array([list(bytes.fromhex(colour[1:])) for colour in colours], np.uint8)


def _name_rows(axes: Axes, bands: list[_Band], task: SBN, labels: Mapping[str, int]) -> None:
    """Field names on the left, the program's own labels on the right."""
    middles: dict[str, float] = {}
    start = 0
    for band in bands:
        height = len(band.bits) * band.repeat
        middles[band.name] = start + (height - 1) / 2
        start += height
    # More names than this would run into each other.
    hidden = {f"cell {cell}" for cell in range(task.cells) if cell % max(1, task.cells // 64)}
    shown = {middle: name for name, middle in middles.items() if name not in hidden}
    size = 7 if task.cells <= 32 else 5
    axes.set_yticks(list(shown), list(shown.values()), fontsize=size)
    of_cell: dict[int, list[str]] = {}
    for label, address in labels.items():
        of_cell.setdefault(address, []).append(label)
    named = {middles[f"cell {cell}"]: ", ".join(names) for cell, names in of_cell.items() if cell < task.cells}
    beside = axes.twinx()
    beside.set_ylim(axes.get_ylim())
    beside.set_yticks(list(named), list(named.values()), fontsize=size)
    for side in (axes, beside):
        side.tick_params(axis="y", length=2)
        side.spines[["top", "right", "bottom", "left"]].set_color("#BBBBBB")


def _draw_margin(axes: Axes, history: History) -> None:
    margins = history.margins.numpy()
    steps = np.arange(1, len(margins) + 1)
    finite = np.isfinite(margins)
    axes.plot(steps[finite], margins[finite], color="#444444", linewidth=0.8)
    wrong = ~history.agreed.numpy()
    if wrong.any():
        axes.plot(steps[wrong & finite], margins[wrong & finite], "x", color=_REGISTER, label="a wrong bit")
        axes.legend(fontsize="small")
    axes.axhline(0, color="#BBBBBB", linewidth=0.8)
    if finite.any():
        least, smallest = float(steps[finite][margins[finite].argmin()]), float(margins[finite].min())
        axes.plot([least], [smallest], "o", color=_REGISTER, markersize=4)
        late = least > len(margins) / 2
        axes.annotate(
            f"smallest {smallest:.4f}",
            (least, smallest),
            xytext=(-6 if late else 6, -3),
            textcoords="offset points",
            fontsize=8,
            ha="right" if late else "left",
            va="top",
        )
    axes.set_ylabel("decision margin")
    axes.grid(alpha=0.3)
