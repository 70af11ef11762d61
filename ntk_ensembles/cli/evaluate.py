"""`ntk-ensembles evaluate`: a run's members evaluated again, retrained only where their weights were not kept."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float16
from rich.console import Console
from torch import Tensor

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.options import DecoderOptions, EvaluationOptions, OutputOptions
from ntk_ensembles.cli.parsing import Parser
from ntk_ensembles.console import Progress
from ntk_ensembles.errors import OptionError
from ntk_ensembles.files import write_atomically
from ntk_ensembles.reuse import Ensemble, without_weights
from ntk_ensembles.tasks import EvaluationSet
from ntk_ensembles.theory import LimitPrediction
from ntk_ensembles.training import Records, Run, convergence
from ntk_ensembles.training.report import show_rows

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

    out: str | None = None
    """File to write the JSON object to, beside what is printed."""


@command("ntk-ensembles evaluate")
def evaluate_command(arguments: list[str], prog: str) -> int:
    """Evaluate a run again."""
    parser = Parser(prog, _DESCRIPTION)
    parser.add_argument("run", type=str, metavar="RUN_DIR", help="A run directory of train.py, finished or not.")
    parser.add_options(_Options, evaluation_states=None, evaluation_seed=None)
    values = parser.parse(arguments)
    directory = values.pop("run")
    run = Run.open(Path(directory))
    own = {name: getattr(run.options, name) for name in ("evaluation_states", "evaluation_seed")}
    options = _Options(**values | {name: value for name, value in own.items() if values[name] is None})
    records = run.records()
    sizes = _sizes(options.members, int(records.converged.sum()))
    if own == {name: getattr(options, name) for name in own}:
        theory, deviations = run.theory, records.deviations[records.converged]
    else:
        evaluation = EvaluationSet.sample(run.task, options.evaluation_states, options.evaluation_seed)
        theory = LimitPrediction(run.task, evaluation, run.options.init == "antisymmetric")
        deviations = _deviations(run, records, theory, options.messages)
    rows = [asdict(row) for row in convergence(theory, deviations, sizes)]
    results = {
        "run": directory,
        "evaluation_states": len(theory.evaluation),
        "evaluation_seed": options.evaluation_seed,
        "convergence": rows,
    }
    if options.out is not None:
        text = json.dumps(results, allow_nan=False) + "\n"
        write_atomically(Path(options.out), lambda part: part.write_text(text, encoding="utf-8"))

    def as_text(out: Console) -> None:
        states = f"{len(theory.evaluation)} states (seed {options.evaluation_seed})"
        out.print(f"{run.task!r}: {len(deviations)} members on {states}.")
        show_rows(rows, out, options.decoders)

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
    try:
        sizes = sorted({int(number) for number in numbers.split(",")})
    except ValueError:
        raise OptionError("members", numbers, "integers separated by commas") from None
    if not 1 <= sizes[0] <= sizes[-1] <= converged:
        raise OptionError("members", numbers, f"integers from 1 to {converged}, as many have converged")
    return sizes


def _deviations(
    run: Run, records: Records, theory: LimitPrediction, messages: Console
) -> Float16[Tensor, "members states bits"]:
    """Return how far every converged member deviates from the NTK mean on new states."""
    converged = records.indices[records.converged].tolist()
    retrained = without_weights(run, converged)
    if retrained:
        each = float(records.seconds[:, :2].sum()) / len(records)
        messages.print(
            f"{len(retrained)} members have no kept weights and are retrained from their seeds: about "
            f"{each * len(retrained):.0f} s.",
            highlight=False,
        )
    order = {index: position for position, index in enumerate(converged)}
    deviations = torch.empty((len(order), *theory.mean.shape), dtype=torch.float16)
    total = len(converged)
    with Progress("members", total, messages, describe=lambda done: f"{done:.0f}/{total}") as progress:
        ensemble = Ensemble.of(run, converged, progress=progress.advance)
        for indices, rows, outputs in ensemble.member_predictions(theory.evaluation.states):
            # One at a time: the differences are float64.
            for index, output in zip(indices, outputs, strict=True):
                deviations[order[index], rows] = (output - theory.mean[rows]).to(torch.float16)
    return deviations
