"""`ntk-ensembles validate`: exact execution checked on every input, through the NTK mean and its decoders."""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import DecoderOptions, OutputOptions, parse_task
from ntk_ensembles.console import Progress, console
from ntk_ensembles.errors import OptionError, check_choice, check_range, check_seed
from ntk_ensembles.tasks import SBN, TASKS, Branch, Task, TaskError, load_task_class
from ntk_ensembles.tasks.base import user_code
from ntk_ensembles.tasks.evaluation import checked_inputs, num_micro_steps
from ntk_ensembles.templates import MatchBounds, TemplateSet
from ntk_ensembles.theory import (
    LAYERS,
    PADDING_MAX,
    TIE,
    Decoder,
    Layers,
    NTKExecutor,
    TemplatePredictor,
    sign_padding,
)
from ntk_ensembles.theory.validation import Tally, validate_programs, validate_task

_DESCRIPTION = (
    "Execute a task by the mean of the infinitely wide ensemble on every input, and compare each decoded state with "
    "the templates' own and each result with plain arithmetic. The quickest look: --task addition --max-bits 6. Exit "
    "status 0 if nothing fails, else 1."
)
_INPUTS = 10_000

Row = dict[str, Any]


@dataclass(frozen=True)
class ValidateOptions(OutputOptions, DecoderOptions):
    """Options of a validation."""

    max_bits: int | None = None
    """Every length from 1 to this, 1 to 12, of a task with an option --bits; by default the task's own length."""

    inputs: int | None = None
    """First inputs to run of a task with too many to run all, 1 to 1000000000; by default 10000."""

    seed: int = 0
    """Seed of random inputs, where not all are run."""

    layers: Layers = "both"
    """Layers that are trained: both, or the readout alone, while the hidden layer stays as it was drawn."""

    padding: int | None = None
    """Padding templates beside the task's own, 0 to 16777216; by default none for midpoint, and for sign as many as it
    needs to be exact."""

    def __post_init__(self) -> None:
        """Check the options."""
        if self.max_bits is not None:
            check_range("max_bits", self.max_bits, 1, 12)
        if self.inputs is not None:
            check_range("inputs", self.inputs, 1, 1_000_000_000)
        check_seed("seed", self.seed)
        check_choice("layers", self.layers, LAYERS)
        if self.padding is not None:
            check_range("padding", self.padding, 0, PADDING_MAX)


@dataclass(frozen=True)
class RandomPrograms:
    """Random programs on the one-instruction computer, in place of the task's inputs."""

    cells: int = 16
    """Memory cells, a power of two, 4 to 256."""

    word_bits: int = 8
    """Bits of a cell, 2 to 16; enough to hold an address."""

    branch: Branch = "negative"
    """Branch if the result is negative (SBN), or negative or zero (SUBLEQ)."""

    instructions: int = 1_000_000
    """Instructions to execute at least, from random memories, 1 to 1000000000."""

    def __post_init__(self) -> None:
        """Check the options."""
        check_range("instructions", self.instructions, 1, 1_000_000_000)
        self.make_task()

    def make_task(self) -> SBN:
        """Make the computer."""
        return SBN(self.cells, self.word_bits, self.branch)


_TASK_COLUMNS = {
    "bits": "bits",
    "inputs": "inputs",
    "micro_steps": "micro-steps",
    "distinct_states": "distinct states",
    "predictions": "predictions",
}
_PROGRAM_COLUMNS = {
    "instructions": "instructions",
    "memories": "random memories",
    "halted": "of them halted",
    "micro_steps": "micro-steps",
}


@command("ntk-ensembles validate")
def validate_command(arguments: list[str], prog: str) -> int:
    """Print a validation; exit status 0 if nothing fails, 1 if something does, 2 for bad input."""
    chosen, options, values = parse_task(arguments, prog, _DESCRIPTION, ValidateOptions, find=_find)
    started_at = time.monotonic()
    if isinstance(chosen, RandomPrograms):
        for name in ("max_bits", "inputs"):
            if getattr(options, name) is not None:
                raise OptionError(name, getattr(options, name), "a task other than sbn, which has --instructions")
        rows = [_validate_programs(chosen, options)]
    else:
        rows = _validate_tasks(chosen, options)
    left_out = ("decode", "json", *([] if options.max_bits is None else ["bits"]))
    results = {
        "task": {key: value for key, value in values.items() if key not in left_out and value is not None},
        "rows": rows,
        "failures": sum(tally["failures"] for row in rows for tally in row["tallies"].values()),
        "seconds": time.monotonic() - started_at,
    }
    options.show(results, lambda out: _show(results, out))
    return 1 if results["failures"] else 0


def _find(spec: str) -> type[RandomPrograms] | type[Task[Any, Any]]:
    return RandomPrograms if TASKS.get(spec) is SBN else load_task_class(spec)


def _validate_tasks(task: Task[Any, Any], options: ValidateOptions) -> list[Row]:
    """Validate a task, or each of its lengths; a row each."""
    tasks = [task]
    if options.max_bits is not None:
        if "bits" not in inspect.signature(type(task)).parameters:
            raise OptionError("max_bits", options.max_bits, f"a task with an option bits, not {task.name}")
        lengths = range(1, options.max_bits + 1)
        tasks = [type(task).from_options({**task.options, "bits": bits}) for bits in lengths]
    work = [(one, *_choose_inputs(one, options)) for one in tasks]
    total = sum(operator.length_hint(inputs) * steps for _, inputs, steps, _ in work)
    rows = []
    with Progress(task.name, total, console(stderr=True)) as progress:
        for one, inputs, steps, complete in work:
            bits = one.options.get("bits")
            label = one.name if bits is None else f"{one.name}, {bits} bits"
            checked = _Checked(one.templates, options)

            def advance(done: int, steps: int = steps, label: str = label) -> None:
                progress.advance(done * steps, label)

            report = validate_task(one, checked.executors, inputs=inputs, on_progress=advance)
            row = {} if bits is None else {"bits": bits}
            rows.append({**row, "all_inputs": complete, **asdict(report), "tallies": checked.as_rows(report.tallies)})
    return rows


def _choose_inputs(task: Task[Any, Any], options: ValidateOptions) -> tuple[Iterable[Any], int, bool]:
    """Return all inputs of a task, or a list of the first; the micro-steps of the first; and whether they are all."""
    with user_code(task.name, "all_inputs"):
        every = task.all_inputs()
    if every is not None and options.inputs is None:
        inputs, first = every, list(itertools.islice(task.all_inputs() or (), 1))
    else:
        source = checked_inputs(task, options.seed) if every is None else every
        inputs = list(itertools.islice(source, options.inputs or _INPUTS))
        first = inputs[:1]
    if not first:
        raise TaskError(f"task {task.name!r} gives no input to evaluate on")
    return inputs, num_micro_steps(task, first[0]), inputs is every


def _validate_programs(chosen: RandomPrograms, options: ValidateOptions) -> Row:
    task = chosen.make_task()
    checked = _Checked(task.templates, options)
    with Progress(task.name, chosen.instructions, console(stderr=True)) as progress:
        report = validate_programs(
            task,
            checked.executors,
            chosen.instructions,
            options.seed,
            on_progress=lambda done: progress.advance(done, "random programs"),
        )
    return {**asdict(report), "tallies": checked.as_rows(report.tallies)}


class _Checked:
    """Decoders of some templates with the padding that was asked for, or that each needs."""

    def __init__(self, templates: TemplateSet, options: ValidateOptions) -> None:
        self._paddings = {decoder: _padding(templates, decoder, options) for decoder in options.decoders}
        self.executors = [
            NTKExecutor(templates, decoder, padding=padding, layers=options.layers)
            for decoder, padding in self._paddings.items()
        ]

    def as_rows(self, tallies: Sequence[Tally]) -> Row:
        """Return the tallies by decoder, as plain values."""
        return {
            decoder: {
                "padding": padding,
                "failures": tally.failures,
                "first_failure": tally.first_failure,
                "smallest_margin": _finite(min(tally.smallest_one, tally.smallest_zero)),
                "smallest_margin_ones": _finite(tally.smallest_one),
                "smallest_margin_zeros": _finite(tally.smallest_zero),
                "ties": tally.ties,
            }
            for (decoder, padding), tally in zip(self._paddings.items(), tallies, strict=True)
        }


def _padding(templates: TemplateSet, decoder: Decoder, options: ValidateOptions) -> int:
    if options.padding is not None or decoder != "sign":
        return options.padding or 0
    return sign_padding(TemplatePredictor(templates, layers=options.layers), MatchBounds(templates))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _show(results: Row, out: Console) -> None:
    columns = _PROGRAM_COLUMNS if "instructions" in results["rows"][0] else _TASK_COLUMNS
    columns = {key: heading for key, heading in columns.items() if key in results["rows"][0]}
    title = f"{results['task']['task']}: every micro-step by the NTK mean"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    numbers = ("failures", "margin of 1-bits", "margin of 0-bits", "ties")
    for heading in (*columns.values(), "decoder", *numbers):
        # In a narrow terminal no digit may be lost.
        table.add_column(heading, justify="left" if heading == "decoder" else "right", overflow="fold")
    for row in results["rows"]:
        estimates = () if row.get("distinct_exact", True) else ("distinct_states", "predictions")
        common = [f"≈ {row[key]:.4g}" if key in estimates else f"{row[key]:,}" for key in columns]
        for decoder, tally in row["tallies"].items():
            name = f"{decoder} + {tally['padding']:,}" if tally["padding"] else decoder
            smallest = [_margin(tally["smallest_margin_ones"]), _margin(tally["smallest_margin_zeros"])]
            table.add_row(*common, name, f"{tally['failures']:,}", *smallest, f"{tally['ties']:,}")
            # What the decoders share is printed once.
            common = [""] * len(common)
    out.print(table)
    for line in _remarks(columns, results):
        out.print(line, highlight=False)


def _remarks(columns: dict[str, str], results: Row) -> list[str]:
    counted = "inputs" if "inputs" in columns else "instructions"
    lines = []
    for row in results["rows"]:
        for decoder, tally in row["tallies"].items():
            if tally["failures"]:
                where = f"{row['bits']} bits, " if "bits" in row else ""
                failures = f"{tally['failures']:,} {counted} fail"
                lines.append(f"{where}{decoder}: {failures}; the first: {tally['first_failure']}.")
    tallies = [tally for row in results["rows"] for tally in row["tallies"].values()]
    if not lines:
        lines.append(f"Nothing fails, in {results['seconds']:.1f} s.")
    if "predictions" in columns:
        lines.append("Predictions: distinct states times bits, a mean compared with a threshold for each.")
    if any(not row.get("distinct_exact", True) for row in results["rows"]):
        lines.append("Numbers with ≈ are estimates from a sample of the states; everything was executed.")
    if not all(row.get("all_inputs", True) for row in results["rows"]):
        lines.append("Not all inputs were run: the task does not list them, or --inputs limits them.")
    if results["task"].get("padding") is not None:
        lines.append("+ n: with n padding templates.")
    elif any(tally["padding"] for tally in tallies):
        lines.append("sign + n: with n padding templates, which it needs to be exact (ntk-ensembles certify).")
    if any(tally["ties"] for tally in tallies):
        lines.append(
            f"Ties: micro-steps with a bit closer than {TIE:.0e} to its threshold. The limit's mean is 0 there, which "
            "reads 0 and is right; a finite ensemble decodes such a bit at random."
        )
    return lines


def _margin(margin: float | None) -> str:
    return "-" if margin is None else f"{margin:.4g}"
