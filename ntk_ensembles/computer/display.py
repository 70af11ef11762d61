"""Programs shown to people: memory and instructions in a terminal, traces as files, figures and events."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ntk_ensembles.computer.assembler import names_of
from ntk_ensembles.computer.batch import ProgramResult
from ntk_ensembles.events import EventFile
from ntk_ensembles.files import write_atomically
from ntk_ensembles.tasks.machine import Machine, MachineState
from ntk_ensembles.tasks.sbn import PHASES, SBN
from ntk_ensembles.theory import Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL_WIDTH, _WORD_WIDTH, _ADDRESS_WIDTH = 11, 6, 4


def memory_table(
    memory: Sequence[int], labels: Mapping[str, int], width: int, styles: Mapping[int, str] | None = None
) -> Table:
    """Return a table of all words with their labels, as many in a row as fit (a power of two up to 8).

    Args:
        memory: Words of the memory.
        labels: Addresses by label.
        width: Number of columns of the terminal.
        styles: Styles of rich by address.
    """
    a_row = 8
    while a_row > 1 and _ADDRESS_WIDTH + a_row * (_LABEL_WIDTH + _WORD_WIDTH + 2) > width:
        a_row //= 2
    names = names_of(labels)
    table = Table.grid(padding=(0, 1, 0, 0))
    for start in range(0, len(memory), a_row):
        row = [Text(f"{start:>{_ADDRESS_WIDTH}}", style="dim")]
        for cell, word in enumerate(memory[start : start + a_row], start):
            label = ",".join(names.get(cell, []))
            label = label if len(label) <= _LABEL_WIDTH else f"{label[: _LABEL_WIDTH - 1]}…"
            row += [Text(f"{label:>{_LABEL_WIDTH}}", style="cyan")]
            row += [Text(f"{word:>{_WORD_WIDTH}}", style=(styles or {}).get(cell, ""))]
        table.add_row(*row)
    return table


class Watch:
    """Display of one program instruction by instruction: redrawn in place in a terminal, otherwise a line each.

    Args:
        console: Console to show the program on.
        machine: Interpreter of the computer.
        labels: Addresses by label.
        title: Line above.
        delay_seconds: Time to wait after each instruction, in a terminal.
    """

    def __init__(
        self, console: Console, machine: Machine, labels: Mapping[str, int], title: str, delay_seconds: float
    ) -> None:
        self._console = console
        self._machine = machine
        self._labels = labels
        self._names = names_of(labels)
        self._title = title
        self._delay_seconds = delay_seconds
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Watch:
        if self._live is None:
            self._console.print(Text(self._title), soft_wrap=True)
        else:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, before: ProgramResult, after: ProgramResult) -> None:
        """Show the instruction that led from one state to the next."""
        line = self._instruction(before.state, after.state)
        margin = "" if after.smallest_margin is None else f"  smallest margin {after.smallest_margin:.4f}"
        wrong = "  not as the interpreter" if after.agreed is False else ""
        if self._live is None:
            self._console.print(Text(f"{after.instructions:>6}  {line}{margin}{wrong}"), soft_wrap=True)
            return
        summary = f"instruction {after.instructions}, micro-step {after.micro_steps}{margin}{wrong}"
        # Memory comes last: where it is higher than the terminal, its end is cut off.
        lines = (Text(self._title, style="bold"), Text(line), Text(summary, style="red" if wrong else "dim"))
        self._live.update(Group(*lines, self._memory(before.state, after.state)), refresh=True)
        time.sleep(self._delay_seconds)

    def _operands(self, state: MachineState) -> tuple[int, int, int]:
        cells = self._machine.cells
        a, b, c = (state.memory[(state.pc + offset) % cells] for offset in range(3))
        return a % cells, b % cells, c

    def _instruction(self, before: MachineState, after: MachineState) -> str:
        """Return the instruction at pc, what it subtracted, and where it led, as a line."""
        a, b, c = self._operands(before)
        names = [self._names.get(address, [str(address)])[0] for address in (a, b, c % self._machine.cells)]
        shown = " ".join([*names[:2], str(c) if c < 0 else names[2]])
        change = f"{names[1]} = {before.memory[b]} - {before.memory[a]} = {after.memory[b]}"
        return f"pc {before.pc:>3}  {shown:<26} {change:<32} {'halts' if after.halted else f'to {after.pc}'}"

    def _memory(self, before: MachineState, after: MachineState) -> Table:
        """Return all cells, with the instruction and what it read and wrote marked."""
        a, b, _ = self._operands(before)
        styles = {(before.pc + offset) % self._machine.cells: "reverse" for offset in range(3)}
        styles[a] = f"{styles.get(a, '')} bold green".strip()
        styles[b] = f"{styles.get(b, '')} bold red".strip()
        return memory_table(after.memory, self._labels, self._console.width, styles)


DPI = 150
"""Resolution, in pixels per inch, at which the figure is meant to be saved."""

_COLUMNS_MAX = 1200
"""Largest number of columns; of a longer trace several micro-steps share one, as there are no more pixels."""

# Okabe and Ito's palette; two tones tell neighbouring cells apart.
_PHASE, _REGISTER, _SELECT = "#000000", "#D55E00", "#009E73"
_CHANGING, _CONSTANT = ("#0072B2", "#56B4E9"), ("#9AA3AB", "#BCC4CA")
_PAPER = ("#FFFFFF", "#F3F3F3")


def write_trace(path: Path, task: SBN, trace: Trace, labels: Mapping[str, int]) -> None:
    """Write a trace as JSON lines.

    The first line describes the machine: ``cells``, ``word_bits``, ``branch``, ``labels``. Each further line is the
    state after a micro-step, and the first of them the state before any: ``micro_step``; ``instruction``, the one that
    it belongs to, from 1; ``margin``, null where nothing matched; ``agreed``; ``phase``, what the next micro-step does,
    or ``halted``; ``memory`` in signed words; ``select``, the cells to be written; and the other fields of the state as
    unsigned integers. Before any micro-step ``margin`` and ``agreed`` are null.

    Args:
        path: File to write.
        task: Computer.
        trace: Trace of one program.
        labels: Addresses by label.

    Raises:
        SaveError: The file cannot be written.
    """
    head = {"cells": task.cells, "word_bits": task.word_bits, "branch": task.branch, "labels": dict(labels)}

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            for line in itertools.chain([head], _trace(task, trace)):
                file.write(json.dumps(line, allow_nan=False) + "\n")

    write_atomically(path, write)


def _trace(task: SBN, trace: Trace) -> Iterator[dict[str, Any]]:
    phases = {
        bit: name if len(task.layout[name]) == 1 else task.layout.bit_name(bit)
        for name in PHASES
        for bit in task.layout[name]
    }
    memory = [f"memory{cell}" for cell in range(task.cells)]
    registers = [name for name in task.layout if name not in (*PHASES, *memory, "select")]
    margins, agreed = trace.margins.tolist(), trace.agreed.tolist()
    for moment, state in enumerate(trace.states):
        fields = task.layout.unpack(state)
        margin = margins[moment - 1] if moment else math.inf
        yield {
            "micro_step": moment,
            "instruction": -(-moment // task.micro_steps_per_instruction),
            "margin": margin if math.isfinite(margin) else None,
            "agreed": agreed[moment - 1] if moment else None,
            "phase": " ".join(name for bit, name in phases.items() if state[bit]) or "halted",
            "memory": [task.machine.wrap(fields[name]) for name in memory],
            "select": [cell for cell in range(task.cells) if fields["select"] >> cell & 1],
            **{name: fields[name] for name in registers},
        }


def trace_figure(task: SBN, trace: Trace, labels: Mapping[str, int], title: str) -> Figure:
    """Draw the state as a raster over time, a row for each bit, and the decision margin under it.

    Args:
        task: Computer.
        trace: Trace of one program, at least one micro-step.
        labels: Addresses by label, shown beside their cells.
        title: Line above.
    """
    # Matplotlib takes a second to import, which most commands save.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    bands = _bands(task, trace)
    states = trace.states.numpy()
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
    _draw_margin(margin, trace)
    margin.set_xlim(-0.5, right)
    margin.set_xlabel("micro-step" if together == 1 else f"micro-step (a column is the union of {together} states)")
    length = task.micro_steps_per_instruction
    instructions = raster.secondary_xaxis("top", functions=(lambda x: x / length, lambda x: x * length))
    instructions.xaxis.set_major_locator(MaxNLocator(integer=True))
    instructions.set_xlabel(f"instructions, of {length} micro-steps each")
    meaning = {_PHASE: "phase", _REGISTER: "registers", _SELECT: "cell to be written"}
    meaning |= {_CHANGING[0]: "memory", _CONSTANT[0]: "memory that stays as it was"}
    patches = [Patch(color=colour, label=text) for colour, text in meaning.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def write_trace_events(directory: Path, task: SBN, trace: Trace, labels: Mapping[str, int], title: str) -> None:
    """Write the figure, and the margin of every micro-step, as TensorBoard events.

    Args:
        directory: Directory for TensorBoard's ``--logdir``.
        task: Computer.
        trace: Trace of one program, at least one micro-step.
        labels: Addresses by label.
        title: Line above the figure.

    Raises:
        SaveError: The events cannot be written.
    """
    writer = EventFile(directory)
    writer.add_figure("execution/state", trace_figure(task, trace, labels, title))
    for number, margin in enumerate(trace.margins.tolist(), start=1):
        writer.add_scalar("execution/margin", margin, number)
    writer.write()


@dataclass(frozen=True)
class _Band:
    """Rows of the raster that belong together, from top to bottom."""

    name: str
    bits: tuple[int, ...]
    ink: str
    paper: str
    repeat: int
    """Number of pixels for each bit; registers are few among many memory cells, and small otherwise."""


def _bands(task: SBN, trace: Trace) -> list[_Band]:
    """Return bands for phases, registers and memory; the highest bit of a number on top."""
    changing = (trace.states != trace.states[0]).any(0).tolist()
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
    """Put field names on the left, the program's own labels on the right."""
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
    named = {middles[f"cell {cell}"]: ", ".join(names) for cell, names in names_of(labels).items() if cell < task.cells}
    beside = axes.twinx()
    beside.set_ylim(axes.get_ylim())
    beside.set_yticks(list(named), list(named.values()), fontsize=size)
    for side in (axes, beside):
        side.tick_params(axis="y", length=2)
        side.spines[["top", "right", "bottom", "left"]].set_color("#BBBBBB")


def _draw_margin(axes: Axes, trace: Trace) -> None:
    margins = trace.margins.numpy()
    steps = np.arange(1, len(margins) + 1)
    finite = np.isfinite(margins)
    axes.plot(steps[finite], margins[finite], color="#444444", linewidth=0.8)
    wrong = ~trace.agreed.numpy()
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
    axes.margins(y=0.2)  # room for the text below the smallest
    axes.set_ylabel("decision margin")
    axes.grid(alpha=0.3)
