"""Training runs as data: options and experiment, the run directory, results, and loaded ensembles. No Lightning."""

from ntk_ensembles.runs.convergence import ConvergenceRow, convergence_rows, ensemble_sizes, rows_of_blocks
from ntk_ensembles.runs.dashboard import Dashboard
from ntk_ensembles.runs.ensemble import Ensemble, converged_members, without_weights
from ntk_ensembles.runs.options import Experiment, RunOptions
from ntk_ensembles.runs.record import RecordedTask
from ntk_ensembles.runs.results import Results, print_rows, results_of
from ntk_ensembles.runs.run import Run, begin_or_resume, merge_runs
from ntk_ensembles.runs.store import MemberResults, RunStore, StoreError

__all__ = [
    "ConvergenceRow",
    "Dashboard",
    "Ensemble",
    "Experiment",
    "MemberResults",
    "RecordedTask",
    "Results",
    "Run",
    "RunOptions",
    "RunStore",
    "StoreError",
    "begin_or_resume",
    "converged_members",
    "convergence_rows",
    "ensemble_sizes",
    "merge_runs",
    "print_rows",
    "results_of",
    "rows_of_blocks",
    "without_weights",
]
