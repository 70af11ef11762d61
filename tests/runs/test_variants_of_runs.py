"""Runs that train the readout alone, with padding: what members learn, what is predicted, and that they do not mix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from rich.console import Console

from ntk_ensembles import Addition, Ensemble, EnsembleModule, RunOptions, TaskData, train
from ntk_ensembles.errors import OptionError
from ntk_ensembles.runs import Experiment, StoreError, merge_runs
from ntk_ensembles.theory import TemplatePredictor, decode

pytestmark = pytest.mark.usefixtures("undrawn")

QUIET = Console(quiet=True)
TASK = Addition(3)
SIZE, PADDING = len(TASK.templates), 4
OPTIONS = RunOptions(
    width=480, ensemble=64, evaluation_states=60, tolerance=1e-9, layers="readout", padding=PADDING, loss="mse"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("readout") / "run"
    train(TASK, dataclasses.replace(OPTIONS, out=str(found)), console=QUIET)
    return found


def test_what_members_learn(directory: Path) -> None:
    """The labels and zeros for padding, by the readout; the hidden layer is as it was drawn, to the bit."""
    ensemble = Ensemble.load(directory)
    outputs = ensemble.members(torch.eye(SIZE + PADDING))
    wanted = torch.nn.functional.pad(TASK.templates.labels.float(), (0, 0, 0, PADDING))
    torch.testing.assert_close(outputs, wanted.expand_as(outputs), rtol=0, atol=3e-4)
    drawn = Experiment(TASK, OPTIONS).recipe.make_stack(range(64), torch.device("cpu"))
    assert torch.equal(ensemble.state_dict()["hidden"], drawn.hidden)


def test_a_loaded_ensemble_predicts_and_executes(directory: Path) -> None:
    ensemble = Ensemble.load(directory)
    states = Experiment(TASK, OPTIONS).evaluation.states
    encoded = TASK.templates.encode(TASK.templates.matches(states)).float()
    torch.testing.assert_close(ensemble(encoded), ensemble.predict(states), rtol=0, atol=1e-6)
    torch.testing.assert_close(ensemble.members(encoded).double().mean(0), ensemble.predict(states), rtol=0, atol=1e-5)
    limit = Experiment(TASK, OPTIONS).limit
    expected = decode(ensemble.predict(states), limit.thresholds["midpoint"])
    assert torch.equal(ensemble.step(states).batch, expected)
    assert ensemble.execute([(3, 4), (7, 7)]) == [7, 14]


def test_results_are_predicted_whatever_the_loss(directory: Path) -> None:
    results = json.loads((directory / "results.json").read_text())
    assert (results["layers"], results["padding"], results["loss"], results["templates"]) == ("readout", 4, "mse", SIZE)
    assert results["finite_width"]["omitted"] is None
    assert results["finite_width"]["movement"] == results["finite_width"]["bias_rms"] == 0
    for row in results["convergence"][:4]:
        # 60 states share 64 members: a standard error of 4%. Infinite width has 6% less.
        assert row["rms_deviation"] / row["finite_width_rms_deviation"] == pytest.approx(1, abs=0.12)
        assert row["finite_width_rms_deviation"] > row["predicted_rms_deviation"]


def test_they_are_not_mixed_with_others(directory: Path, tmp_path: Path) -> None:
    for change, words in (({"layers": "both"}, "layers is"), ({"padding": 5}, "padding is")):
        other = dataclasses.replace(OPTIONS, resume=str(directory), **change)  # type: ignore[arg-type]
        with pytest.raises(StoreError, match=words):
            train(TASK, other, console=QUIET)
    part = tmp_path / "part"
    train(TASK, dataclasses.replace(OPTIONS, layers="both", ensemble=1, first_member=64, out=str(part)), console=QUIET)
    assert json.loads((part / "results.json").read_text())["finite_width"]["omitted"].startswith("the expansion is for")
    with pytest.raises(StoreError, match="layers is"):
        merge_runs([directory, part], str(tmp_path / "merged"))


def test_what_is_refused(unchecked: None) -> None:
    for options, words in (
        ({"layers": "hidden"}, "layers='hidden': expected one of both, readout"),
        ({"padding": -1}, "padding=-1: expected an integer from 0 to 16777216"),
        ({"layers": "readout", "labels": "corrected"}, "expected plain where the readout alone is trained"),
    ):
        with pytest.raises(OptionError, match=words):
            RunOptions(**options)  # type: ignore[arg-type]


def test_no_prediction_below_three_units_a_template() -> None:
    narrow = Experiment(TASK, dataclasses.replace(OPTIONS, width=3 * (SIZE + PADDING) - 1))
    assert narrow.without_finite_width == f"it is for widths of at least {3 * (SIZE + PADDING)} here"
    assert narrow.at_width is None


@pytest.mark.parametrize("own_optimizer", [False, True])
def test_a_module_trains_the_readout_alone(own_optimizer: bool) -> None:
    """With `Descent` and with an optimizer of the user's: no gradient of the hidden layer is ever made."""
    data = TaskData(TASK, evaluation_states=60, predictor=TemplatePredictor(TASK.templates, 4, layers="readout"))
    assert data.in_features == SIZE + 4
    optimizer = (lambda weights: torch.optim.SGD(weights, lr=1.0)) if own_optimizer else None
    module = EnsembleModule(data.in_features, data.out_features, 320, 4, layers="readout", optimizer=optimizer)
    drawn = module.stack.hidden.detach().clone()
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=30, enable_model_summary=False, **settings)  # type: ignore[arg-type]
    trainer.fit(module, data)
    assert module.stack.hidden.grad is None
    assert torch.equal(module.stack.hidden, drawn)
    outputs = module(torch.eye(SIZE + 4)).detach()
    assert float((outputs - data.limit.predictor.labels.float()).square().mean()) < 1e-3
