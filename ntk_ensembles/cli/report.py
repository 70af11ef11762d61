"""`ntk-ensembles report`: what runs have shown, as pictures and one HTML page."""

from __future__ import annotations

from dataclasses import dataclass

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import Parser
from ntk_ensembles.console import console
from ntk_ensembles.tasks import load_task_class

_DESCRIPTION = (
    "Draw and tabulate one run, or several side by side, on one HTML page that needs no network, with every figure as "
    "PNG and SVG beside it: convergence over theory, margins, the members needed, time, the certificate, and which "
    "bits fail. Nothing is trained."
)


@dataclass(frozen=True)
class _Options:
    """Options of a report."""

    out: str | None = None
    """Directory to write: new, empty, or of an earlier report. By default report/ in the directory of a single run, and
    for several runs a fresh one under runs/."""

    members: int | None = None
    """Number of members N whose margins and failures are shown. By default all members, and for failures the largest N
    that has any."""

    task: str | None = None
    """The runs' own task as file.py:Class, where it is a user's and a certificate is wanted: the file is executed."""

    no_certificate: bool = False
    """Leave out the certificate, which can take minutes where a task is large."""


@command("ntk-ensembles report")
def report_command(arguments: list[str], prog: str) -> int:
    """Write a report and print where it is."""
    parser = Parser(prog, _DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN_DIR", help="Run directories, finished or not.")
    parser.add_options(_Options)
    values = parser.parse(arguments)
    runs, options = values.pop("runs"), _Options(**values)
    task = None if options.task is None else load_task_class(options.task)
    with console(stderr=True).status("reading the runs …") as status:
        # Matplotlib takes a second to import.
        from ntk_ensembles.runs.report import write_report

        page = write_report(
            runs,
            options.out,
            task=task,
            members=options.members,
            certificates=not options.no_certificate,
            on_progress=lambda what: status.update(f"{what} …"),
        )
    console().print(f"Report in {page}", highlight=False, markup=False, soft_wrap=True)
    return 0
