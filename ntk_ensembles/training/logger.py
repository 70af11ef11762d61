"""The dashboard of a run as a Lightning logger, so that callbacks put their own charts beside the run's."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

from ntk_ensembles.events import EventFile
from ntk_ensembles.runs import Dashboard

_OF_A_COHORT = ("epoch", "train/loss_", "train/relative_loss_max", "train/running")
"""Beginnings of what Lightning and `EnsembleModule` log of one cohort; the dashboard has the same of all members."""


class DashboardLogger(Logger):
    """Logger of every cohort's trainer, for what a user's callbacks log.

    Of two cohorts that log one name at one step, the later is kept.

    Args:
        dashboard: The run's dashboard.
    """

    def __init__(self, dashboard: Dashboard) -> None:
        super().__init__()
        self._dashboard = dashboard

    @property
    def experiment(self) -> EventFile:
        """What TensorBoard is shown; has ``add_scalar``, ``add_figure`` and ``add_summary``."""
        return self._dashboard.events

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return self._dashboard.directory.name

    @property
    def version(self) -> str:
        """Name of the folder for what Lightning's callbacks write by default."""
        return "lightning"

    @property
    def save_dir(self) -> str:
        """Folder of the run's directory."""
        return str(self._dashboard.directory.parent)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a point to each of several charts."""
        values = {name: float(value) for name, value in metrics.items() if not name.startswith(_OF_A_COHORT)}
        if values:
            self.experiment.add_scalars(values, step or 0)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the dashboard has the options of the whole run."""
