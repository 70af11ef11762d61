"""What the module measures and refuses, on members in every stage of their training."""

from __future__ import annotations

import csv
import functools
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console
from torch.utils.data import DataLoader

from ntk_ensembles import Addition, EnsembleModule, RunOptions, TaskData
from ntk_ensembles.errors import OptionError
from ntk_ensembles.tasks import EvaluationSet
from ntk_ensembles.training import train

Trainers = Callable[..., L.Trainer]

DATA = TaskData(Addition(2), evaluation_states=30)


def module(members: Any = 3, width: int = 48, **changes: Any) -> EnsembleModule:
    return EnsembleModule(DATA.in_features, DATA.out_features, width, members, **changes)


@pytest.mark.parametrize(
    ("stages", "averaged"),
    [
        # Converged members and those that are still trained count, those that were given up do not.
        ("crg", [0, 1]),
        ("gcr", [1, 2]),
        ("ggr", [2]),
        # Where all were given up there is nothing else to show.
        ("ggg", [0, 1, 2]),
    ],
)
def test_members_in_any_stage_but_those_given_up_are_averaged_in(
    stages: str, averaged: list[int], trainer: Trainers
) -> None:
    ensemble = module()
    for status, stage in zip(ensemble.statuses, stages, strict=True):
        status.running, status.converged = stage == "r", stage == "c"
    (found,) = trainer().test(ensemble, DATA, verbose=False)
    outputs = ensemble(DATA.limit.inputs.float()).detach().double()[averaged].mean(0)
    measured = float((outputs - DATA.limit.mean).square().mean().sqrt())
    assert found["test/rms_deviation"] == pytest.approx(measured, rel=1e-5)
    predicted = float((DATA.limit.variance.mean() / len(averaged)).sqrt())
    assert found["test/predicted_rms_deviation"] == pytest.approx(predicted, rel=1e-5)


def test_the_log_has_the_largest_the_middle_and_the_smallest_loss_of_every_step(
    tmp_path: Path, trainer: Trainers
) -> None:
    ensemble, logger = module(members=5), CSVLogger(tmp_path)
    trainer(max_epochs=20, logger=logger, limit_val_batches=0).fit(ensemble, DATA)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss_max")]
    histories = [status.losses for status in ensemble.statuses]
    assert len(rows) == max(map(len, histories)) - 1
    for step, row in enumerate(rows, start=1):
        # A member that has stopped keeps its last loss.
        losses = sorted(history[min(step, len(history) - 1)] for history in histories)
        assert float(row["train/loss_min"]) == pytest.approx(losses[0], rel=1e-5)
        assert float(row["train/loss_median"]) == pytest.approx(losses[2], rel=1e-5)
        assert float(row["train/loss_max"]) == pytest.approx(losses[4], rel=1e-5)
        relative = max(history[min(step, len(history) - 1)] / history[0] for history in histories)
        assert float(row["train/relative_loss_max"]) == pytest.approx(relative, rel=1e-5)
        assert float(row["train/running"]) == sum(len(history) - 1 > step for history in histories)


def test_several_processes_are_refused() -> None:
    ensemble = module()
    ensemble.trainer = cast(Any, SimpleNamespace(world_size=2, precision="32-true"))
    with pytest.raises(ValueError, match="trains on one device, not in 2 processes"):
        ensemble.setup("fit")


@pytest.mark.parametrize("form", ["states", "tensor", "pair"])
def test_predictions_of_batches_of_any_form(form: str, trainer: Trainers) -> None:
    ensemble = module()
    inputs = DATA.limit.inputs.float()
    batches: dict[str, Any] = {
        "states": DATA.predict_dataloader(),
        "tensor": DataLoader(cast(Any, [inputs]), batch_size=None),
        "pair": DataLoader(cast(Any, [(inputs, torch.zeros(len(inputs), DATA.out_features))]), batch_size=None),
    }
    (outputs,) = trainer().predict(ensemble, batches[form])  # type: ignore[misc]
    torch.testing.assert_close(outputs, ensemble(inputs).detach(), rtol=0, atol=1e-5)


def test_data_are_of_the_default_type_and_predictions_stay_in_double_precision() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        (x, y), (batch,) = next(iter(DATA.train_dataloader())), list(DATA.val_dataloader())
    finally:
        torch.set_default_dtype(torch.float32)
    assert x.dtype == y.dtype == batch["inputs"].dtype == torch.float64
    assert torch.equal(batch["inputs"], DATA.limit.inputs)
    (single,) = list(DATA.val_dataloader())
    assert single["inputs"].dtype == torch.float32
    assert single["mean"].dtype == single["variance"].dtype == torch.float64


def test_evaluation_states_are_those_of_the_seed_in_batches_that_lose_none() -> None:
    task = Addition(6)
    data = TaskData(task, evaluation_states=1500, evaluation_seed=4)
    batches = list(data.test_dataloader())
    assert [len(batch["inputs"]) for batch in batches] == [1024, 476]
    expected = EvaluationSet.sample(task, 1500, 4)
    assert torch.equal(torch.cat([batch["next_states"] for batch in batches]), expected.next_states)
    hot = torch.cat([batch["inputs"] for batch in batches]) > 0
    assert torch.equal(hot, expected.matches)


def test_what_a_user_adds_to_trainers_is_for_one_process(tmp_path: Path) -> None:
    options = RunOptions(width=16, ensemble=2, devices=2, out=str(tmp_path / "run"))
    for extras in ({"callbacks": [L.Callback()]}, {"trainer": functools.partial(L.Trainer, max_steps=1)}):
        with pytest.raises(OptionError, match="devices=2: expected 1 with a trainer, logger or callbacks"):
            train(Addition(2), options, console=Console(quiet=True), **extras)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the signal is POSIX's")
def test_lightning_does_not_listen_to_a_slurm_jobs_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own plugin for SLURM would save a checkpoint at SIGUSR1 and start the job again."""
    slurm = {"JOB_ID": "7", "JOB_NAME": "job", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1"}
    for name, value in {**slurm, "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    handlers = []

    class Listening(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            handlers.append(signal.getsignal(signal.SIGUSR1))

    options = RunOptions(width=16, ensemble=1, evaluation_states=10, tolerance=0.5, out=str(tmp_path / "run"))
    train(Addition(2), options, console=Console(quiet=True), callbacks=[Listening()])
    assert handlers == [signal.SIG_DFL]


def test_the_directory_of_a_job_is_named_by_it_unless_another_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a job may resume a run of another directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    small: dict[str, Any] = {"width": 16, "evaluation_states": 10, "tolerance": 0.5}
    quiet = Console(quiet=True)
    train(Addition(2), RunOptions(**small, ensemble=1), console=quiet)
    train(Addition(2), RunOptions(**small, ensemble=1, out="asked"), console=quiet)
    assert sorted(path.name for path in tmp_path.rglob("config.yaml") for path in [path.parent]) == [
        "addition-slurm-7",
        "asked",
    ]
    results = train(Addition(2), RunOptions(**small, ensemble=2, resume="asked"), console=quiet)
    assert results is not None
    assert results["members"] == 2
