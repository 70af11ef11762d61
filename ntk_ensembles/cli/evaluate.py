"""`ntk-ensembles evaluate`: a run's members judged again, without training them again where that can be spared."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float16
from rich.console import Console
from torch import Tensor

from ntk_ensembles.cli.parsing import OneLineParser
from ntk_ensembles.cli.progress import WorkProgress
from ntk_ensembles.cli.terminal import command, console
from ntk_ensembles.errors import check_range
from ntk_ensembles.files import write_atomically
from ntk_ensembles.reuse import Ensemble, without_weights
from ntk_ensembles.tasks import EvaluationSet
from ntk_ensembles.theory import DECODERS, Decoder, LimitPrediction
from ntk_ensembles.training import Records, Run, convergence
from ntk_ensembles.training.report import show_rows

_DESCRIPTION = (
    "Judge a run's members again: on other evaluation states, by one decoder, for other numbers of members N. On the "
    "run's own states nothing is computed but statistics. On others the members predict anew, from their kept weights "
    "or, where these were not kept, redrawn and retrained from their seeds."
)


@command("ntk-ensembles evaluate")
def evaluate_command(arguments: list[str], prog: str) -> int:
    """Judge a run again; exit status 0, 1 if the disk gave out, 2 for bad input, 130 if interrupted."""
    parser = OneLineParser(prog=prog, description=_DESCRIPTION)
    parser.add_argument("run", type=str, metavar="RUN_DIR", help="A run directory of train.py, finished or not.")
    parser.add_argument("--evaluation-states", type=int, help="Distinct states to judge on. By default the run's own.")
    parser.add_argument("--evaluation-seed", type=int, help="Draws them. By default the run's own.")
    parser.add_argument("--decode", choices=[*DECODERS, "both"], default="both", help="Decoders to show.")
    parser.add_argument("--members", type=str, help="Numbers of members N, such as 1,8,64. By default 1, 2, 4, ….")
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    parser.add_argument("--out", type=str, help="Write that JSON object to a file.")
    parser.finish()
    options = parser.parse_args(arguments)
    # Beside an object that programs read, talk goes to standard error.
    talk = console(stderr=options.json)
    run = Run.open(Path(options.run))
    states, seed = options.evaluation_states, options.evaluation_seed
    states = run.options.evaluation_states if states is None else states
    seed = run.options.evaluation_seed if seed is None else seed
    check_range("evaluation_states", states, 1, 1_000_000)
    check_range("evaluation_seed", seed, 0, (1 << 63) - 1)
    records = run.records()
    sizes = _sizes(options.members, int(records.converged.sum()))
    if (states, seed) == (run.options.evaluation_states, run.options.evaluation_seed):
        theory, deviations = run.theory, records.deviations[records.converged]
    else:
        theory = LimitPrediction(
            run.task, EvaluationSet.sample(run.task, states, seed), run.options.init == "antisymmetric"
        )
        deviations = _deviations(run, records, theory, talk)
    rows = [asdict(row) for row in convergence(theory, deviations, sizes)]
    found = {"run": options.run, "evaluation_states": len(theory.evaluation), "evaluation_seed": seed}
    text = json.dumps({**found, "convergence": rows}, allow_nan=False)
    if options.out is not None:
        write_atomically(Path(options.out), lambda part: part.write_text(text + "\n", encoding="utf-8"))
    if options.json:
        print(text)
    else:
        decoders: tuple[Decoder, ...] = DECODERS if options.decode == "both" else (options.decode,)
        talk.print(f"{run.task!r}: {len(deviations)} members on {len(theory.evaluation)} states (seed {seed}).")
        show_rows(rows, talk, decoders)
    return 0


def _sizes(given: str | None, members: int) -> list[int] | None:
    """The N asked for.

    Raises:
        ValueError: not numbers, or not from 1 to the number of members.
    """
    if not members:
        raise ValueError("the run has no converged member yet")
    if given is None:
        return None
    try:
        sizes = sorted({int(part) for part in given.split(",")})
    except ValueError:
        raise ValueError(f"--members {given}: expected integers separated by commas") from None
    if not 1 <= sizes[0] <= sizes[-1] <= members:
        raise ValueError(f"--members {given}: expected integers from 1 to {members}, as many have converged")
    return sizes


def _deviations(
    run: Run, records: Records, theory: LimitPrediction, talk: Console
) -> Float16[Tensor, "members states bits"]:
    """What every converged member deviates from the NTK mean on new states."""
    converged = records.indices[records.converged].tolist()
    retrained = without_weights(run, converged)
    if retrained:
        each = float(records.seconds[:, :2].sum()) / len(records)
        talk.print(
            f"{len(retrained)} members have no kept weights and are retrained from their seeds: about "
            f"{each * len(retrained):.0f} s.",
            highlight=False,
        )
    order = {index: position for position, index in enumerate(converged)}
    deviations = torch.empty((len(order), *theory.mean.shape), dtype=torch.float16)
    with WorkProgress("members", len(converged), talk) as bar:
        ensemble = Ensemble.of(run, converged, progress=bar.advance)
        for indices, rows, outputs in ensemble.member_predictions(theory.evaluation.states):
            # One at a time: the differences are float64.
            for index, output in zip(indices, outputs, strict=True):
                deviations[order[index], rows] = (output - theory.mean[rows]).to(torch.float16)
    return deviations
