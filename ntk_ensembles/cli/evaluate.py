"""`ntk-ensembles evaluate`: a run's members evaluated again, retrained only where their weights were not kept."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import (
    DecoderOptions,
    EvaluationOptions,
    OutputOptions,
    Parser,
    check_file,
    read_integers,
)
from ntk_ensembles.console import Progress
from ntk_ensembles.ensemble.network import one_thread
from ntk_ensembles.errors import OptionError
from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs import (
    ConvergenceRow,
    Ensemble,
    MemberResults,
    Run,
    convergence_rows,
    print_rows,
    rows_of_blocks,
    without_weights,
)
from ntk_ensembles.runs.groups import Measure
from ntk_ensembles.runs.results import print_finite_width
from ntk_ensembles.tasks import EvaluationSet, load_task_class
from ntk_ensembles.theory import LimitPrediction, WidthPrediction

_DESCRIPTION = (
    "Evaluate a run's members again: on other evaluation states, by one decoder, for other numbers of members N. On "
    "the run's own states, the default, nothing is computed but statistics. On others the members predict anew, from "
    "their kept weights or, where these were not kept, redrawn and retrained from their seeds."
)


@dataclass(frozen=True)
class _Options(OutputOptions, DecoderOptions, EvaluationOptions):
    """Options of an evaluation."""

    members: str | None = None
    """Numbers of members N, such as 1,8,64. By default 1, 2, 4, …."""

    task: str | None = None
    """The run's own task as file.py:Class, where it is a user's and other states are wanted: the file is executed."""

    out: str | None = None
    """File to write the JSON object to, beside what is printed."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_file("out", self.out)


@command("ntk-ensembles evaluate")
def evaluate_command(arguments: list[str], prog: str) -> int:
    """Evaluate a run again."""
    parser = Parser(prog, _DESCRIPTION)
    parser.add_argument("run", type=str, metavar="RUN_DIR", help="A run directory of train.py, finished or not.")
    parser.add_options(_Options, evaluation_states=None, evaluation_seed=None)
    values = parser.parse(arguments)
    directory = values.pop("run")
    spec = values["task"]
    run = Run.open(directory, None if spec is None else load_task_class(spec))
    experiment = run.experiment
    own = {name: getattr(experiment.options, name) for name in ("evaluation_states", "evaluation_seed")}
    options = _Options(**values | {name: value for name, value in own.items() if values[name] is None})
    members = run.statuses()
    converged = members.indices[members.converged]
    sizes = _sizes(options.members, len(converged))
    if own == {name: getattr(options, name) for name in own}:
        limit, at_width = experiment.limit, experiment.at_width
        if sizes is None or not run.store.has_deviations:
            rows = rows_of_blocks(run.measure, run.summary().blocks, at_width)
        else:
            members = run.member_results()
            assert members.deviations is not None
            rows = convergence_rows(limit, members.deviations[members.converged], sizes, at_width, converged)
    else:
        with one_thread():
            evaluation = EvaluationSet.sample(experiment.task, options.evaluation_states, options.evaluation_seed)
        limit = LimitPrediction(experiment.task, evaluation, experiment.predictor)
        at_width = experiment.predict_width(limit)
        rows = _rows_elsewhere(run, members, limit, sizes, at_width, options.messages)
    if sizes is not None:
        found = {row["members"]: row for row in rows}
        if left := [size for size in sizes if size not in found]:
            known = ", ".join(map(str, sorted({*found, len(converged)})))
            kept = "of each member" if run.store.has_deviations else "as sums over groups of 2, 4, 8, …"
            raise OptionError(
                "members",
                options.members,
                f"{known}: there is no group of {left[0]}, as deviations are kept {kept}, and a group is "
                "of consecutive members, from a multiple of N on, all of them converged",
            )
        rows = [found[size] for size in sizes]
    results = {
        "run": directory,
        "evaluation_states": len(limit.evaluation),
        "evaluation_seed": options.evaluation_seed,
        "convergence": rows,
    }
    if options.out is not None:
        text = json.dumps(results, allow_nan=False) + "\n"
        write_atomically(Path(options.out), lambda part: part.write_text(text, encoding="utf-8"))

    def as_text(out: Console) -> None:
        states = f"{len(limit.evaluation)} states (seed {options.evaluation_seed})"
        out.print(f"{experiment.task!r}: {len(converged)} members on {states}.", markup=False)
        print_rows(rows, out, options.decoders)
        omitted = experiment.without_finite_width
        print_finite_width(rows, experiment.options.width, omitted, out, options.decoders)

    options.show(results, as_text)
    return 0


def _sizes(numbers: str | None, converged: int) -> list[int] | None:
    """Return the numbers of members N that were asked for, or None for the usual ones.

    Raises:
        ValueError: They are no numbers, or not from 1 to the number of members that have converged.
    """
    if not converged:
        raise ValueError("the run has no converged member yet")
    if numbers is None:
        return None
    sizes = read_integers("members", numbers)
    if not 1 <= sizes[0] <= sizes[-1] <= converged:
        raise OptionError("members", numbers, f"integers from 1 to {converged}, as many have converged")
    return sizes


def _rows_elsewhere(
    run: Run,
    members: MemberResults,
    limit: LimitPrediction,
    sizes: list[int] | None,
    at_width: WidthPrediction | None,
    messages: Console,
) -> list[ConvergenceRow]:
    """Return the rows of every converged member on new states."""
    indices = members.indices[members.converged]
    converged = indices.tolist()
    retrained = without_weights(run, converged)
    if retrained:
        each = float(members.seconds[:, :2].sum()) / len(members)
        messages.print(
            f"{len(retrained)} members have no kept weights and are trained again from their seeds: about "
            f"{each * len(retrained):.0f} s.",
            highlight=False,
        )
    total = len(converged)
    with Progress("members", total, messages, describe=lambda done: f"{done:.0f}/{total}") as progress:
        ensemble = Ensemble.from_run(run, converged, on_progress=progress.advance)
        if sizes is None:
            measure = Measure(limit)
            return rows_of_blocks(measure, ensemble.blocks(measure), at_width)
        return convergence_rows(limit, ensemble.deviations(limit), sizes, at_width, indices)
