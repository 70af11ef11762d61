"""What a run writes down of itself, in which order, and what it refuses afterwards."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Callback
from rich.console import Console
from safetensors.torch import load_file

from ntk_ensembles.ensemble import DescentOptions
from ntk_ensembles.files import SaveError
from ntk_ensembles.runs import Ensemble, Experiment, Run, RunOptions, StoreError
from ntk_ensembles.tasks import Addition, Task, load_task_class
from ntk_ensembles.training import train

QUIET = Console(quiet=True)
SMALL: dict[str, Any] = {"width": 64, "ensemble": 3, "evaluation_states": 20, "tolerance": 0.01}

OTHERS: dict[str, Any] = {
    "width": 66,
    "ensemble": 3,
    "seed": 5,
    "init": "antisymmetric",
    "loss": "mse",
    "precision": "64-true",
    "evaluation_states": 21,
    "evaluation_seed": 7,
    "tolerance": 0.02,
    "steps": 40,
    "engine": "functional",
    "layers": "readout",
    "padding": 2,
    "first_member": 11,
    "keep_weights": "none",
    "keep_deviations": "all",
}
"""None of them is its default, and no two numbers are alike."""


def run(directory: Path, task: Task[Any, Any] | None = None, **options: Any) -> Any:
    train(task or Addition(2), RunOptions(**{**SMALL, **options}, out=str(directory)), console=QUIET)
    return json.loads((directory / "results.json").read_text())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("other") / "run"
    run(directory, **OTHERS)
    return directory


def test_a_run_trains_by_default_as_python_does() -> None:
    """The defaults stand in two places; documented are a tolerance of 1e-6 and 50 steps."""
    assert Experiment(Addition(2), RunOptions()).recipe.descent == DescentOptions(tolerance=1e-6, steps_max=50)
    assert DescentOptions() == DescentOptions(tolerance=1e-6, steps_max=50)


def columns_of(directory: Path) -> dict[str, torch.Tensor]:
    (path,) = directory.glob("checkpoints/*.safetensors")
    return load_file(path)


def test_results_tell_the_options(other: Path) -> None:
    results = json.loads((other / "results.json").read_text())
    for name in ("seed", "evaluation_seed", "width", "init", "loss", "precision", "tolerance", "evaluation_states"):
        assert results[name] == OTHERS[name], name
    assert results["task"] == {"name": "addition", "bits": 2}
    assert (results["members"], results["members_planned"]) == (3, 3)
    assert (results["templates"], results["state_bits"]) == (8, 6)
    assert results["environment"]["dtypes"]["weights"] == "float64"


def test_the_config_has_every_option_of_the_run_and_none_of_the_session(other: Path) -> None:
    saved = yaml.safe_load((other / "config.yaml").read_text())
    assert saved == {"task": "addition", "bits": 2, "labels": "plain", **OTHERS}


def test_a_run_that_keeps_no_weights_goes_on_keeping_none(other: Path) -> None:
    assert not (other / "weights").exists()
    assert Run.open(other).experiment.options.keep_weights == "none"


def test_training_is_summed_up_as_the_checkpoints_tell_it(other: Path) -> None:
    training = json.loads((other / "results.json").read_text())["training"]
    columns = columns_of(other)
    assert training["not_converged"] == []
    losses = torch.split(columns["losses"], columns["loss_counts"].tolist())
    assert training["steps_max"] == max(len(own) - 1 for own in losses) < 40
    assert training["relative_loss_max"] == max(float(own[-1] / own[0]) for own in losses) <= 0.02
    stages = dict(zip(("init", "train", "evaluate"), columns["seconds"][0].tolist(), strict=True))
    assert all(training["seconds"][name] == value > 0 for name, value in stages.items())
    assert sum(stages.values()) < training["seconds"]["total"]


def test_members_that_start_at_zero_are_predicted_not_to_vary(other: Path) -> None:
    for row in json.loads((other / "results.json").read_text())["convergence"]:
        assert row["predicted_rms_deviation"] == 0
        assert row["predicted_exact_match"]["midpoint"] == row["predicted_bit_accuracy"]["midpoint"] == 1
        # Theirs do, by what a finite width adds.
        assert 0 < row["rms_deviation"] < 1


def test_peak_memory_is_in_bytes(tmp_path: Path) -> None:
    """Against the kernel's own account of this process, in kilobytes."""
    results = run(tmp_path / "run")
    status = Path("/proc/self/status").read_text()
    (peak,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
    assert results["training"]["peak_memory_bytes"] == pytest.approx(1024 * peak, rel=0.1)


class SpoilsWeights(Callback):
    """Puts a file where the folder of weights belongs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        (self.directory / "weights").touch()


def test_a_cohort_whose_weights_cannot_be_written_does_not_count_as_finished(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = RunOptions(**SMALL, keep_weights="all", out=str(out))
    with pytest.raises(SaveError, match="members-000000-000002.safetensors: cannot be written"):
        train(Addition(2), options, console=QUIET, callbacks=[SpoilsWeights(out)])
    assert not list(out.glob("checkpoints/members-*"))
    assert Run.open(out).missing() == [0, 1, 2]


class StartsAgain(Callback):
    """Starts the same run a second time while it goes on."""

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.refusals: list[str] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        with pytest.raises(StoreError) as refused:
            train(Addition(2), self.options, console=QUIET)
        self.refusals.append(str(refused.value))


def test_a_new_run_keeps_others_out_of_its_directory(tmp_path: Path) -> None:
    options = RunOptions(**SMALL, out=str(tmp_path / "run"))
    again = StartsAgain(options)
    train(Addition(2), options, console=QUIET, callbacks=[again])
    (refusal,) = again.refusals
    assert "another process is writing there" in refusal


TASK = """
from ntk_ensembles.tasks import StateLayout, Task, Template

INPUTS = [1, 2, 4, 8]
SECOND = {"zeros": []}


class Word(Task):
    name = "word"

    def __init__(self) -> None:
        self.layout = StateLayout(word=4)

    def make_templates(self):
        first, second, *rest = [Template.rule("keep", ones=[i], sets=[i]) for i in range(4)]
        return [first, Template.rule("keep", ones=[1], sets=[1], **SECOND), *rest]

    def inputs(self, generator):
        return iter(INPUTS)

    def initial_fields(self, task_input):
        return {"word": task_input}

    def read_output(self, fields):
        return fields["word"]

    def reference(self, task_input):
        return task_input

    def num_micro_steps(self, task_input):
        return 1
"""


@pytest.mark.parametrize(("changed", "same"), [([1, 2, 4, 8], True), ([1, 2, 4, 9], False), ([2, 1, 4, 8], False)])
def test_a_task_that_gives_other_inputs_since_is_told(changed: list[int], same: bool, tmp_path: Path) -> None:
    """The first input may be the old one, and the number of states: each of them counts."""
    file = tmp_path / "word.py"
    file.write_text(TASK, encoding="utf-8")
    kind = load_task_class(f"{file}:Word")
    run(tmp_path / "run", kind(), evaluation_states=4)
    module: Any = inspect.getmodule(kind)
    module.INPUTS = changed
    # The run has its own states; the task is asked again where it is trained on.
    assert len(Ensemble.load(tmp_path / "run")) == 3
    if same:
        run(tmp_path / "run", kind(), evaluation_states=4)
        return
    with pytest.raises(StoreError, match="the task's evaluation states are not the same"):
        run(tmp_path / "run", kind(), evaluation_states=4)


def test_a_task_whose_templates_are_others_since_is_told(tmp_path: Path) -> None:
    """As many as before, and the same next states of all that is evaluated: a condition more on one of them."""
    file = tmp_path / "word.py"
    file.write_text(TASK, encoding="utf-8")
    kind = load_task_class(f"{file}:Word")
    run(tmp_path / "run", kind(), evaluation_states=4)
    module: Any = inspect.getmodule(kind)
    module.SECOND = {"zeros": [0]}
    assert len(Ensemble.load(tmp_path / "run")) == 3
    with pytest.raises(StoreError, match="the task's templates are not the same"):
        Ensemble.load(tmp_path / "run", task=kind)


def test_numbers_in_results_are_finite_or_none(other: Path) -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            for part in value.values():
                check(part)
        elif isinstance(value, list):
            for part in value:
                check(part)
        elif isinstance(value, float):
            assert math.isfinite(value)

    check(json.loads((other / "results.json").read_text()))
