"""Runs on corrected labels: what members learn, what the results say of them, and that they cannot be mixed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ntk_ensembles import Addition, Ensemble, RunOptions, TaskData, train
from ntk_ensembles.errors import OptionError
from ntk_ensembles.runs import Experiment, StoreError, merge_runs
from ntk_ensembles.theory import FiniteWidth, TemplatePredictor

QUIET = Console(quiet=True)
TASK = Addition(3)
SIZE = len(TASK.templates)
OPTIONS = RunOptions(width=16 * SIZE, ensemble=8, evaluation_states=60, tolerance=1e-9, labels="corrected")


@pytest.fixture(scope="module")
def corrected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corrected") / "run"
    train(TASK, dataclasses.replace(OPTIONS, out=str(directory)), console=QUIET)
    return directory


def test_members_learn_the_corrected_labels(corrected: Path) -> None:
    wanted = FiniteWidth(TemplatePredictor(TASK.templates), OPTIONS.width, corrected=True).labels
    assert float((wanted - TASK.templates.labels.double()).abs().max()) > 0.05
    outputs = Ensemble.load(corrected).members(torch.eye(SIZE))
    # The tolerance is a relative squared error of 1e-9: about 2e-5 of labels that are a third ones.
    torch.testing.assert_close(outputs.double(), wanted.expand_as(outputs), rtol=0, atol=3e-4)


def test_results_are_predicted_by_the_theory_of_corrected_labels(corrected: Path) -> None:
    results = json.loads((corrected / "results.json").read_text())
    assert results["labels"] == "corrected"
    experiment = Experiment(TASK, OPTIONS)
    assert experiment.at_width is not None
    # The bias that is left is that of states that one template matches.
    alone = experiment.evaluation.matches.sum(1) == 1
    assert experiment.at_width.bias[alone].any()
    assert not experiment.at_width.bias[~alone].any()
    for row in results["convergence"]:
        assert row["finite_width_rms_deviation"] == experiment.at_width.rms_deviation(row["members"])
    # 9 bits of 60 states in 8 groups of one member, at a width where the variance is overstated by up to 15%.
    first = results["convergence"][0]
    assert 0.75 < first["rms_deviation"] / first["finite_width_rms_deviation"] < 1.15


def test_thresholds_are_those_of_plain_labels() -> None:
    plain = Experiment(TASK, dataclasses.replace(OPTIONS, labels="plain"))
    for decoder, thresholds in Experiment(TASK, OPTIONS).limit.thresholds.items():
        assert torch.equal(thresholds, plain.limit.thresholds[decoder])


def test_they_are_not_mixed_with_others(corrected: Path, tmp_path: Path) -> None:
    plain = dataclasses.replace(OPTIONS, labels="plain", resume=str(corrected))
    with pytest.raises(StoreError, match="cannot be resumed, labels is plain here and corrected there"):
        train(TASK, plain, console=QUIET)
    other = tmp_path / "plain"
    train(TASK, dataclasses.replace(plain, resume=None, out=str(other), first_member=8, ensemble=2), console=QUIET)
    with pytest.raises(StoreError, match="labels is plain here and corrected there"):
        merge_runs([corrected, other], str(tmp_path / "merged"))


def test_they_need_enough_width_and_the_whitened_loss(tmp_path: Path) -> None:
    out = tmp_path / "none"
    with pytest.raises(OptionError, match="labels='corrected': expected plain at width 20, or a larger width"):
        train(TASK, dataclasses.replace(OPTIONS, width=20, out=str(out)), console=QUIET)
    assert not out.exists()
    with pytest.raises(OptionError, match="labels='corrected': expected plain with another loss than whitened"):
        dataclasses.replace(OPTIONS, loss="mse")


def test_task_data_takes_labels() -> None:
    wanted = FiniteWidth(TemplatePredictor(TASK.templates), 300, corrected=True).labels
    ((inputs, labels),) = list(TaskData(TASK, evaluation_states=10, labels=wanted).train_dataloader())
    assert torch.equal(inputs, torch.eye(SIZE))
    assert torch.equal(labels, wanted.float())
