"""Training runs: the Lightning module, metrics, convergence to theory, and what a run leaves.

`module` streams cohorts through Lightning, `metrics` and `convergence` measure them, `recorder` writes the
run directory, `run` puts a run together.
"""

from ntk_ensembles.training.convergence import ConvergenceRow, convergence, ensemble_sizes
from ntk_ensembles.training.metrics import BitAccuracy, ExactMatch, ExecutionMatch, RMSDeviation
from ntk_ensembles.training.module import EnsembleModule, MembersDataModule
from ntk_ensembles.training.options import RunOptions
from ntk_ensembles.training.records import MemberRecords, Records
from ntk_ensembles.training.run import Interrupted, Run, train
from ntk_ensembles.training.store import RunStore, StoreError

__all__ = [
    "BitAccuracy",
    "ConvergenceRow",
    "EnsembleModule",
    "ExactMatch",
    "ExecutionMatch",
    "Interrupted",
    "MemberRecords",
    "MembersDataModule",
    "RMSDeviation",
    "Records",
    "Run",
    "RunOptions",
    "RunStore",
    "StoreError",
    "convergence",
    "ensemble_sizes",
    "train",
]
