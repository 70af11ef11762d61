"""`ntk-ensembles reproduce`: the paper's ensemble experiment, beside theory and the published figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import Parser, read_integers
from ntk_ensembles.console import Progress, TextTable, console, print_parts
from ntk_ensembles.runs.reproduce import TARGETS, ReproduceOptions, published_passings, reproduce

_DESCRIPTION = (
    "Train the paper's ensembles that permute k bits, for inputs with two ones, and count the members at which they "
    "first decode 90% and 99.9% of 1,000 random inputs right, beside theory and the published numbers: by sign with "
    "the readout alone trained, which is what the published code does in effect, by sign with both layers trained, and "
    "by midpoint. Results are written after every k; with the same --out and options, the command goes on where it "
    "was. The defaults take several minutes on two cores."
)


@dataclass(frozen=True)
class _Options(ReproduceOptions):
    """Options of a reproduction."""

    bits: str = "2,3,5,7,10,15,20,25,30"
    """Bits of the permutations, each 2 to 64."""

    out: str | None = None
    """Directory to write: new, empty, or begun with the same options. By default a fresh one under runs/."""


@command("ntk-ensembles reproduce")
def reproduce_command(arguments: list[str], prog: str) -> int:
    """Reproduce the published figure, and print the members needed."""
    parser = Parser(prog, _DESCRIPTION)
    parser.add_options(_Options)
    values = parser.parse(arguments)
    bits, out = read_integers("bits", values.pop("bits")), values.pop("out")
    options = ReproduceOptions(**values)
    total = len(bits)
    with Progress("bits", total, console(stderr=True), describe=lambda done: f"{done:.0f}/{total}") as progress:
        directory, results = reproduce(bits, options, out, progress.update)
    _show(results, console())
    console().print(f"Results and figure in {directory}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _show(results: dict[str, Any], out: Console) -> None:
    published = published_passings()
    for target in TARGETS:
        title = f"Members at which {100 * target:g}% of inputs are first right: measured (theory at this width)"
        headings = ("k", "published", "sign, readout", "sign, both layers", "midpoint, both layers")
        rows = []
        for row in results["rows"]:
            known = published.get(row["bits"], {}).get(target)
            cells = [_cell(way["passings"][f"{target:g}"]) for way in row["ways"]]
            rows.append([str(row["bits"]), "-" if known is None else f"{known:,}", *cells])
        print_parts([TextTable(title, headings, rows, words=())], out)


def _cell(passings: dict[str, Any]) -> str:
    from ntk_ensembles.runs.figures import median_passing

    def text(values: list[int | None] | None) -> str:
        found = None if values is None else median_passing(values)
        return "-" if found is None else f"{found:,.0f}"

    return f"{text(passings['measured'])} ({text(passings['at_width'])})"
