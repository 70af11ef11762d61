"""`train` from Python: a user's own logger, callbacks and trainer; what a cohort reports; what is refused."""

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from ntk_ensembles import Addition, RunOptions, train
from ntk_ensembles.ensemble import MemberStatus, Recipe, train_members
from ntk_ensembles.runs import Experiment, MemberResults
from ntk_ensembles.training import stream

pytestmark = pytest.mark.usefixtures("undrawn")

OPTIONS = RunOptions(width=256, ensemble=5, cohort=2, evaluation_states=40, tolerance=1e-4)
QUIET = Console(quiet=True)


class Seen(L.Callback):
    """Remembers which members were trained."""

    def __init__(self) -> None:
        self.cohorts: list[tuple[int, ...]] = []
        self.precisions: list[str] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, stream.EnsembleModule)
        self.cohorts.append(pl_module.stack.indices)
        self.precisions.append(str(trainer.precision))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_each_cohort_is_a_module_for_the_users_logger_and_callbacks(tmp_path: Path) -> None:
    seen, logger = Seen(), CSVLogger(tmp_path / "logs")
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", monitor="train/loss_max", every_n_epochs=1)
    options = dataclasses.replace(OPTIONS, out=str(tmp_path / "run"))
    results = train(Addition(3), options, console=QUIET, logger=logger, callbacks=[seen, checkpoints])
    assert results is not None
    assert seen.cohorts == [(0, 1), (2, 3), (4,)]
    assert "train/loss_max" in (Path(logger.log_dir) / "metrics.csv").read_text()
    assert list((tmp_path / "checkpoints").glob("*.ckpt"))
    # The same numbers as without.
    plain = train(Addition(3), dataclasses.replace(OPTIONS, out=str(tmp_path / "plain")), console=QUIET)
    assert plain is not None
    assert results["convergence"] == plain["convergence"]


def test_a_users_trainer_is_made_for_every_cohort(tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []

    def make(**arguments: Any) -> L.Trainer:
        made.append(arguments)
        return L.Trainer(**arguments, default_root_dir=str(tmp_path))

    train(Addition(3), dataclasses.replace(OPTIONS, out=str(tmp_path / "run")), console=QUIET, trainer=make)
    assert len(made) == 3
    assert {arguments["precision"] for arguments in made} == {"32-true"}
    seen = Seen()
    train(
        Addition(3),
        dataclasses.replace(OPTIONS, out=str(tmp_path / "low"), precision="bf16-mixed"),
        console=QUIET,
        callbacks=[seen],
    )
    assert set(seen.precisions) == {"bf16-mixed"}


def test_no_checkpoint_of_lightnings_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(Addition(3), dataclasses.replace(OPTIONS, out="run"), console=QUIET)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "lightning_logs").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_lightning_trains_the_members_that_the_plain_loop_trains(tmp_path: Path) -> None:
    """To the bit: members without kept weights are trained again by the plain loop."""
    experiment = Experiment(Addition(3), OPTIONS)
    _, weights = stream._train_cohort(experiment, [3, 1], 0, lambda share, note: None, stream._Extras())
    stack, _ = train_members(experiment.recipe, [3, 1], torch.device("cpu"))
    assert torch.equal(weights["hidden"], stack.hidden)
    assert torch.equal(weights["readout"], stack.readout)


def test_progress_moves_within_a_cohort() -> None:
    shares: list[float] = []
    notes: list[str] = []

    def advance(share: float, note: str) -> None:
        shares.append(share)
        notes.append(note)

    experiment = Experiment(Addition(3), OPTIONS)
    results, _ = stream._train_cohort(experiment, [0, 1], 0, advance, stream._Extras())
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert len(set(shares)) > 3
    assert notes[0] == "drawing weights"
    assert notes[-1] == "evaluating"
    assert notes[1].startswith("step 1, relative loss")
    assert results.seconds.shape == (1, 3)
    assert (results.seconds > 0).all()


def test_the_remark_on_a_cohort_tells_its_worst_member_and_how_many_failed() -> None:
    statuses = [MemberStatus(False, False, 0, [1.0, 0.5, 0.25]), MemberStatus(False, True, 0, [1.0, 1e-9])]
    results = MemberResults.from_cohort([4, 5], statuses, torch.zeros(2, 1, 1), [0.0] * 3)
    assert stream._summary(results) == "1 did not converge; relative loss ≤ 2.5e-01 in 2 steps"
    converged = dataclasses.replace(results, converged=torch.tensor([True, True]))
    assert stream._summary(converged) == "relative loss ≤ 2.5e-01 in 2 steps"


def test_what_cannot_be_spread_over_processes_is_refused(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, devices=2, out=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="devices=2: expected 1 with a trainer, logger or callbacks"):
        train(Addition(3), options, console=QUIET, callbacks=[Seen()])
    assert not (tmp_path / "run").exists()


def test_the_time_that_the_user_waited_is_told(tmp_path: Path) -> None:
    import time

    options = dataclasses.replace(OPTIONS, out=str(tmp_path / "run"))
    began = time.time()
    train(Addition(3), options, console=QUIET, started_at=began - 100)
    waited = 100 + time.time() - began
    seconds = json.loads((tmp_path / "run" / "results.json").read_text())["training"]["seconds"]
    # The figures and charts are in it, which come after the statistics.
    written = [next((tmp_path / "run").glob(name)).stat().st_mtime for name in ("figures/*.png", "events.*")]
    assert 100 <= seconds["startup"] < max(written) - began + 100 <= seconds["total"] < waited
    assert seconds["init"] + seconds["train"] + seconds["evaluate"] < seconds["total"] - seconds["startup"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "bf16"}, "precision='bf16': expected one of 32-true, bf16-mixed, 64-true"),
        ({"engine": "functionl"}, "engine='functionl'"),
        ({"loss": "huber"}, "loss='huber'"),
        ({"init": "zeros"}, "init='zeros'"),
        ({"accelerator": "tpu"}, "accelerator='tpu'"),
        ({"keep_weights": "some"}, "keep_weights='some'"),
        ({"width": 1.5}, "width=1.5: expected an integer"),
        ({"ensemble": True}, "ensemble=True: expected an integer"),
        ({"tolerance": 2}, "tolerance=2: expected a number between 0 and 1"),
        ({"devices": 0}, "devices=0"),
    ],
)
def test_wrong_options_are_refused_in_python_too(unchecked: None, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RunOptions(**changes)


def test_a_recipe_needs_no_task() -> None:
    """Any zero-one labels make members, with X = I_k."""
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    stack, (status,) = train_members(Recipe(labels, 512), [0], torch.device("cpu"))
    assert status.converged
    torch.testing.assert_close(stack(torch.eye(3))[0], labels, rtol=0, atol=5e-3)


def test_a_cohorts_weights_are_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    """Module and trainer are a cycle; of 24 GiB of weights that it kept alive, a run of the headline died."""
    options = dataclasses.replace(OPTIONS, width=1024, ensemble=6, cohort=1, out=str(tmp_path / "run"))
    largest: list[int] = []

    class Alive(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            weights = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Parameter)]
            largest.append(sum(thing.numel() for thing in weights if thing.shape[0] == 1))

    gc.collect()
    gc.disable()
    try:
        train(Addition(3), options, console=QUIET, callbacks=[Alive()])
    finally:
        gc.enable()
    # One member's weights at a time: 1,024 units, 12 templates and 9 bits.
    assert largest == [1024 * (12 + 9)] * 6
