"""`ntk-ensembles validate`: exact execution checked on every input, through the NTK mean and its decoders."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from rich import box
from rich.console import Console
from rich.table import Table

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.options import DecoderOptions, OutputOptions
from ntk_ensembles.cli.parsing import parse_task
from ntk_ensembles.console import Progress, console
from ntk_ensembles.errors import OptionError, check_range
from ntk_ensembles.sbn import Branch
from ntk_ensembles.tasks import SBN, Addition, Multiplication, Permutation, TemplateSet
from ntk_ensembles.tasks.extremes import MatchExtremes
from ntk_ensembles.theory import TIE, Decoder, TemplatePredictor, sign_padding
from ntk_ensembles.theory.execution import NTKExecutor
from ntk_ensembles.validation import Inputs, Tally, validate_computer, validate_inputs

_DESCRIPTION = (
    "Execute a task by the mean of the infinitely wide ensemble on every input, and compare each decoded state with "
    "the templates' own and each result with plain arithmetic. The quickest look: --task addition --max-bits 6. Exit "
    "status 0 if nothing fails, else 1."
)

Advance = Callable[[int, str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class ValidateOptions(OutputOptions, DecoderOptions):
    """Options of a validation."""


class Validation(ABC):
    """What ``--task`` chooses; its constructor's arguments are flags."""

    columns: ClassVar[dict[str, str]]
    """What a row tells beside the decoders, with the table's headings."""

    executions: ClassVar[str]
    """What may fail."""

    @abstractmethod
    def work(self) -> int:
        """How much there is to do."""

    @abstractmethod
    def rows(self, decoders: Sequence[Decoder], advance: Advance) -> list[Row]:
        """Do it, and tell ``advance`` how much has been done of what."""


@dataclass(frozen=True)
class _Exhaustive(Validation):
    """Every input of every length."""

    max_bits: int = 10
    """Every length from 1 to so many bits, 1 to 12; of two operands all pairs."""

    columns = {
        "bits": "bits",
        "inputs": "inputs",
        "micro_steps": "micro-steps",
        "distinct_states": "distinct states",
        "predictions": "predictions",
    }
    executions = "inputs"

    def __post_init__(self) -> None:
        check_range("max_bits", self.max_bits, 1, 12)

    @abstractmethod
    def inputs(self, bits: int) -> Inputs:
        """All inputs of one length."""

    def work(self) -> int:
        """All inputs, times the micro-steps that each may take."""
        every = [self.inputs(bits) for bits in range(1, self.max_bits + 1)]
        return sum(inputs.count * inputs.micro_steps for inputs in every)

    def rows(self, decoders: Sequence[Decoder], advance: Advance) -> list[Row]:
        """One a length."""
        rows = []
        for bits in range(1, self.max_bits + 1):
            inputs = self.inputs(bits)
            checked = _Checked(inputs.task.templates, decoders)

            def count(done: int, inputs: Inputs = inputs, bits: int = bits) -> None:
                advance(done * inputs.micro_steps, f"{inputs.task.name}, {bits} bits")

            report = validate_inputs(inputs, checked.executors, count)
            rows.append({"bits": bits, **asdict(report), "tallies": checked.tell(report.tallies)})
        return rows


class PermutationValidation(_Exhaustive):
    """All words, by the default permutation of each length."""

    def inputs(self, bits: int) -> Inputs:
        """All words."""
        return Inputs.of_permutation(Permutation(bits))


class AdditionValidation(_Exhaustive):
    """All pairs of summands."""

    def inputs(self, bits: int) -> Inputs:
        """All pairs."""
        return Inputs.of_addition(Addition(bits))


class MultiplicationValidation(_Exhaustive):
    """All pairs of factors."""

    def inputs(self, bits: int) -> Inputs:
        """All pairs."""
        return Inputs.of_multiplication(Multiplication(bits))


@dataclass(frozen=True)
class ComputerValidation(Validation):
    """Random programs on the one-instruction computer."""

    cells: int = 16
    """Memory cells, a power of two, 4 to 256."""

    word: int = 8
    """Bits of a cell, 2 to 16; enough to hold an address."""

    branch: Branch = "negative"
    """Branch if the result is negative (SBN), or negative or zero (SUBLEQ)."""

    instructions: int = 1_000_000
    """Instructions to execute at least, from random memories, 1 to 1000000000."""

    seed: int = 0
    """Draws memories and pcs."""

    columns = {
        "instructions": "instructions",
        "memories": "random memories",
        "halted": "of them halted",
        "micro_steps": "micro-steps",
    }
    executions = "instructions"

    def __post_init__(self) -> None:
        check_range("instructions", self.instructions, 1, 1_000_000_000)
        check_range("seed", self.seed, 0, (1 << 63) - 1)
        self._task()

    def _task(self) -> SBN:
        return SBN(self.cells, self.word, self.branch)

    def work(self) -> int:
        """The instructions."""
        return self.instructions

    def rows(self, decoders: Sequence[Decoder], advance: Advance) -> list[Row]:
        """One."""
        task = self._task()
        checked = _Checked(task.templates, decoders)
        report = validate_computer(
            task, checked.executors, self.instructions, self.seed, lambda done: advance(done, "random programs")
        )
        return [{**asdict(report), "tallies": checked.tell(report.tallies)}]


VALIDATIONS: dict[str, type[Validation]] = {
    "permutation": PermutationValidation,
    "addition": AdditionValidation,
    "multiplication": MultiplicationValidation,
    "sbn": ComputerValidation,
}
"""What can be validated, by the word after ``--task``."""


class _Checked:
    """Decoders of some templates with the padding that each needs."""

    def __init__(self, templates: TemplateSet, decoders: Sequence[Decoder]) -> None:
        self._decoders = decoders
        self._paddings = [
            sign_padding(TemplatePredictor(templates), MatchExtremes(templates)) if decoder == "sign" else 0
            for decoder in decoders
        ]
        self.executors = [
            NTKExecutor(templates, decoder, padding=padding)
            for decoder, padding in zip(decoders, self._paddings, strict=True)
        ]

    def tell(self, tallies: Sequence[Tally]) -> Row:
        """What came of it, by decoder, as plain values."""
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
            for decoder, padding, tally in zip(self._decoders, self._paddings, tallies, strict=True)
        }


@command("ntk-ensembles validate")
def validate_command(arguments: list[str], prog: str) -> int:
    """Validate and print a table; exit status 0 if nothing fails, 1 if something does, 2 for bad input."""
    validation, options, values = parse_task(arguments, prog, _DESCRIPTION, ValidateOptions, _find, list(VALIDATIONS))
    started_at = time.monotonic()
    with Progress(values["task"], validation.work(), console(stderr=True)) as progress:
        rows = validation.rows(options.decoders, progress.advance)
    results = {
        "task": {key: value for key, value in values.items() if key not in ("decode", "json")},
        "rows": rows,
        "failures": sum(tally["failures"] for row in rows for tally in row["tallies"].values()),
        "seconds": time.monotonic() - started_at,
    }
    options.show(results, lambda out: _show(validation, results, out))
    return 1 if results["failures"] else 0


def _find(word: str) -> type[Validation]:
    if word not in VALIDATIONS:
        raise OptionError("task", word, f"one of {', '.join(VALIDATIONS)}")
    return VALIDATIONS[word]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _show(validation: Validation, results: Row, out: Console) -> None:
    title = f"{results['task']['task']}: every micro-step by the NTK mean"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    numbers = ("failures", "margin of 1-bits", "margin of 0-bits", "ties")
    for heading in (*validation.columns.values(), "decoder", *numbers):
        # In a narrow terminal no digit may be lost.
        table.add_column(heading, justify="left" if heading == "decoder" else "right", overflow="fold")
    for row in results["rows"]:
        estimates = () if row.get("distinct_exact", True) else ("distinct_states", "predictions")
        common = [f"≈ {row[key]:.4g}" if key in estimates else f"{row[key]:,}" for key in validation.columns]
        for decoder, tally in row["tallies"].items():
            name = f"{decoder} + {tally['padding']:,}" if tally["padding"] else decoder
            smallest = [_margin(tally["smallest_margin_ones"]), _margin(tally["smallest_margin_zeros"])]
            table.add_row(*common, name, f"{tally['failures']:,}", *smallest, f"{tally['ties']:,}")
            # What the decoders share is told once.
            common = [""] * len(common)
    out.print(table)
    for line in _remarks(validation, results):
        out.print(line, highlight=False)


def _remarks(validation: Validation, results: Row) -> list[str]:
    lines = []
    for row in results["rows"]:
        for decoder, tally in row["tallies"].items():
            if tally["failures"]:
                where = f"{row['bits']} bits, " if "bits" in row else ""
                failures = f"{tally['failures']:,} {validation.executions} fail"
                lines.append(f"{where}{decoder}: {failures}; the first: {tally['first_failure']}.")
    tallies = [tally for row in results["rows"] for tally in row["tallies"].values()]
    if not lines:
        lines.append(f"Nothing fails, in {results['seconds']:.1f} s.")
    if "predictions" in validation.columns:
        lines.append("Predictions: distinct states times bits, a mean compared with a threshold for each.")
    if any(not row.get("distinct_exact", True) for row in results["rows"]):
        lines.append("Numbers with ≈ are estimates from a sample of the states; everything was executed.")
    if any(tally["padding"] for tally in tallies):
        lines.append("sign + n: with n zero-label templates more, which it needs to be exact (ntk-ensembles certify).")
    if any(tally["ties"] for tally in tallies):
        lines.append(
            f"Ties: micro-steps with a bit closer than {TIE:.0e} to its threshold. The limit's mean is 0 there, which "
            "reads 0 and is right; a finite ensemble decodes such a bit by a coin."
        )
    return lines


def _margin(margin: float | None) -> str:
    return "-" if margin is None else f"{margin:.4g}"
