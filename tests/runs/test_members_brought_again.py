"""Members that are trained again are the kept ones, in every kind of run, in every cohort, and in their own places."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntk_ensembles.cli.main import main
from ntk_ensembles.runs import Dashboard, Ensemble, Experiment, Run, RunOptions, StoreError, results_of
from ntk_ensembles.runs.run import prepare_directory
from ntk_ensembles.runs.store import digest
from ntk_ensembles.tasks import Addition
from ntk_ensembles.training import train

pytestmark = pytest.mark.usefixtures("undrawn")

QUIET = Console(quiet=True)
SMALL: dict[str, Any] = {"width": 64, "ensemble": 3, "evaluation_states": 20, "tolerance": 0.01}


def run(directory: Path, bits: int = 2, **options: Any) -> Path:
    train(Addition(bits), RunOptions(**{**SMALL, **options}, out=str(directory)), console=QUIET)
    return directory


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"engine": "functional", "seed": 3},
        {"loss": "mse", "tolerance": 0.1},
        {"init": "antisymmetric", "first_member": 4},
    ],
    ids=lambda options: next(iter(options)),
)
def test_members_trained_again_are_the_kept_ones_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    directory = run(tmp_path / "run", **options)
    kept = Ensemble.load(directory).state_dict()
    shutil.rmtree(directory / "weights")
    again = Ensemble.load(directory).state_dict()
    assert len(kept["hidden"]) == 3
    for name, weights in kept.items():
        assert weights.dtype == (torch.float64 if options.get("precision") == "64-true" else torch.float32)
        assert torch.equal(again[name], weights)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven members in cohorts of three, three and one."""
    return run(tmp_path_factory.mktemp("seven") / "run", ensemble=7, cohort=3)


@pytest.mark.parametrize("lost", [[0], [1], [0, 2], [0, 1, 2]])
def test_kept_members_and_those_trained_again_stand_in_the_order_of_their_indices(
    lost: list[int], seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory has room for two at a time, which seven is no multiple of."""
    expected = Ensemble.load(seven)
    each = Run.open(seven).experiment.recipe.training_bytes + 1024 * 6 * 12
    directory = Path(shutil.copytree(seven, tmp_path / "copy"))
    files = sorted((directory / "weights").iterdir())
    for position in lost:
        files[position].unlink()
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort.free_memory_bytes", lambda device: int(8.5 * each))
    brought: list[int] = []
    ensemble = Ensemble.load(directory, on_progress=brought.append)
    assert sum(brought) == 7
    assert max(brought[len(files) - len(lost) :]) == min(2, sum((3, 3, 1)[position] for position in lost))
    assert ensemble.indices == tuple(range(7))
    for name, weights in expected.state_dict().items():
        assert torch.equal(ensemble.state_dict()[name], weights)
    for position in range(7):
        assert torch.equal(ensemble.member(position).hidden, expected.state_dict()["hidden"][position])


def test_seconds_are_those_of_all_cohorts(seven: Path) -> None:
    seconds = json.loads((seven / "results.json").read_text())["training"]["seconds"]
    by_cohort = Run.open(seven).member_results().seconds
    assert by_cohort.shape == (3, 3)
    for column, stage in enumerate(("init", "train", "evaluate")):
        assert seconds[stage] == pytest.approx(sum(by_cohort[:, column].tolist()))


@pytest.mark.parametrize(("init", "states"), [("gaussian", 1100), ("antisymmetric", 40)])
def test_all_of_other_states_are_evaluated(
    init: Any, states: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Members predict 1024 at a time; the rows are those of a run that was evaluated on these states."""
    small: dict[str, Any] = {"bits": 5, "width": 16, "ensemble": 1, "tolerance": 0.5, "init": init}
    others = {"evaluation_states": states, "evaluation_seed": 2}
    expected = json.loads((run(tmp_path / "whole", **small, **others) / "results.json").read_text())
    directory = run(tmp_path / "run", **small)
    capsys.readouterr()
    flags = ["--evaluation-states", str(states), "--evaluation-seed", "2", "--json"]
    assert main(["evaluate", str(directory), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["evaluation_states"] == expected["evaluation_states"] == states
    assert found["convergence"] == expected["convergence"]
    assert (found["convergence"][0]["predicted_rms_deviation"] == 0) == (init == "antisymmetric")


def test_events_of_an_earlier_session_are_replaced(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", ensemble=2)
    options = RunOptions(**{**SMALL, "ensemble": 4}, resume=str(directory))
    train(Addition(2), options, console=QUIET)
    # The earlier file is emptied; it goes when there is another.
    assert [path.stat().st_size > 0 for path in sorted(directory.rglob("*tfevents*"))] == [False, True]


def test_losses_that_are_no_numbers_are_told_and_not_charted(tmp_path: Path) -> None:
    """JSON has no infinity: a member that has diverged leaves the largest loss open."""
    opened = Run.open(run(tmp_path / "run"))
    members = opened.member_results()
    losses, relative = members.losses.clone(), members.relative_loss.clone()
    first = int(members.loss_counts[0])
    losses[first - 1], relative[0] = torch.inf, torch.inf
    converged = torch.tensor([False, True, True])
    spoilt = dataclasses.replace(members, losses=losses, relative_loss=relative, converged=converged)
    results = results_of(opened.experiment, spoilt, opened.device)
    opened.write_results(results, time.time())
    assert results["training"]["relative_loss_max"] is None
    assert json.loads((opened.directory / "results.json").read_text())["training"]["not_converged"] == [0]
    assert Dashboard(opened).finish(spoilt, results) == []
    events = EventAccumulator(str(opened.directory))
    events.Reload()
    values = [event.value for event in events.Scalars("log10 training loss by 10 step/worst")]
    assert values
    assert max(values) == 0


def test_weights_are_kept_by_themselves_while_they_take_a_gibibyte_at_most() -> None:
    """8 templates and 6 bits of Addition(2): 56 bytes a hidden unit in float32."""

    def keeps(width: int, members: int, keep: Any = "auto", **options: Any) -> bool:
        return Experiment(
            Addition(2), RunOptions(width=width, ensemble=members, keep_weights=keep, **options)
        ).keeps_weights

    each = 56 * 1024
    most = (1 << 30) // each
    assert keeps(1024, most)
    assert not keeps(1024, most + 1)
    assert not keeps(1024, most, precision="64-true")
    assert keeps(1024, most + 1, "all")
    assert not keeps(1, 1, "none")


@pytest.mark.parametrize("version", [4, 6])
def test_a_run_of_another_version_is_refused_be_it_older_or_newer(version: int, tmp_path: Path) -> None:
    directory = run(tmp_path / "run")
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["format"] == 5
    path.write_text(json.dumps({**manifest, "format": version}))
    with pytest.raises(StoreError, match=rf"was written by another version \(format {version}, this one reads 5\)"):
        Ensemble.load(directory)


def test_a_digest_tells_names_types_shapes_and_contents_apart() -> None:
    zeros = torch.zeros(2, 3)
    others = [
        {"a": zeros, "b": zeros},
        {"b": zeros},
        {"a": zeros.T},
        {"a": torch.zeros(6)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.ones(2, 3)},
        {},
    ]
    found = {digest(tensors) for tensors in [{"a": zeros}, *others]}
    assert len(found) == 8
    assert digest({"a": torch.zeros(3, 2).T, "b": zeros}) == digest({"b": zeros, "a": zeros.clone()})


def test_runs_that_begin_in_one_second_have_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directories = [prepare_directory(None, "addition")[0] for _ in range(4)]
    assert len({directory.resolve() for directory in directories}) == 4
    assert all(directory.parent == Path("runs") and directory.is_dir() for directory in directories)
