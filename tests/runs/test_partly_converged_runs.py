"""A run in which some members converge and others do not: only the converged ones count, wherever members do."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ntk_ensembles.cli.main import main
from ntk_ensembles.ensemble import Descent, DescentOptions, MLPStack
from ntk_ensembles.runs import Ensemble, RunOptions, StoreError
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import DECODERS, LimitPrediction
from ntk_ensembles.training import train

pytestmark = pytest.mark.usefixtures("undrawn")

TASK = Addition(3)
FIRST, MEMBERS, WIDTH, STEPS, STATES = 7, 12, 48, 5, 60
INDICES = range(FIRST, FIRST + MEMBERS)
"""From 7 to 18, so that neither a member's position nor its place in the order of texts is its index."""

EYE, LABELS = torch.eye(12), TASK.templates.labels.float()


class PartlyConverged(NamedTuple):
    """A run, and what training its members one by one without Lightning tells of them."""

    directory: Path
    options: RunOptions
    converged: list[int]
    outputs: dict[int, Tensor]
    """Of every member, at the evaluation states."""
    printed: str

    @property
    def failed(self) -> list[int]:
        return [index for index in INDICES if index not in self.converged]

    @property
    def results(self) -> Any:
        return json.loads((self.directory / "results.json").read_text())


def limit_of(states: int, seed: int) -> LimitPrediction:
    return LimitPrediction(TASK, EvaluationSet.sample(TASK, states, seed))


def alone(index: int, tolerance: float) -> tuple[MLPStack, list[float]]:
    """A member trained by itself, and its losses relative to the first."""
    stack = MLPStack(12, 9, WIDTH, [index])
    descent = Descent(stack, DescentOptions(tolerance=tolerance, steps_max=STEPS))
    descent.bind(EYE, LABELS)
    while descent.running:
        descent.step()
    losses = descent.statuses[0].losses
    return stack, [loss / losses[0] for loss in losses]


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> PartlyConverged:
    """The tolerance stands between the least losses of the sixth and of the seventh best member."""
    least = {index: min(alone(index, 1e-30)[1]) for index in INDICES}
    low, high = sorted(least.values())[5:7]
    tolerance = math.sqrt(low * high)
    converged = [index for index in INDICES if least[index] <= tolerance]
    inputs = limit_of(STATES, 0).inputs.float()
    outputs = {index: alone(index, tolerance)[0](inputs).detach()[0] for index in INDICES}
    directory = tmp_path_factory.mktemp("partly") / "run"
    options = RunOptions(
        width=WIDTH,
        ensemble=MEMBERS,
        first_member=FIRST,
        steps=STEPS,
        tolerance=tolerance,
        evaluation_states=STATES,
        cohort=5,
        out=str(directory),
    )
    printed = StringIO()
    train(TASK, options, console=Console(file=printed, width=200))
    return PartlyConverged(directory, options, converged, outputs, printed.getvalue())


@pytest.fixture
def without_weights(partly: PartlyConverged, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(partly.directory, tmp_path / "copy"))
    shutil.rmtree(directory / "weights")
    return directory


def rows_by_hand(limit: LimitPrediction, deviations: dict[int, Tensor]) -> list[dict[str, Any]]:
    """Measured values of whole groups of 1, 2, 4, … consecutive members, from a multiple of that on; state by state."""
    count = len(deviations)
    rows = []
    for size in sorted({*itertools.takewhile(lambda n: n <= count, (1 << i for i in range(20))), count}):
        groups = [range(first, first + size) for first in range(0, max(deviations) + 1, size)]
        whole: list[list[int]] = [list(group) for group in groups if deviations.keys() >= set(group)]
        if size == count:
            whole = [sorted(deviations)]
        if not whole:
            continue
        exact: dict[str, list[float]] = {decoder: [] for decoder in DECODERS}
        squares = []
        for group in whole:
            mean = torch.stack([deviations[index] for index in group]).sum(0) / size
            squares.append(float(mean.square().mean()))
            for decoder in DECODERS:
                decoded = limit.mean + mean > limit.thresholds[decoder]
                right = [bool((a == b).all()) for a, b in zip(decoded, limit.evaluation.next_states, strict=True)]
                exact[decoder].append(sum(right) / len(right))
        shares = {decoder: sum(values) / len(values) for decoder, values in exact.items()}
        rows.append({"members": size, "exact_match": shares, "rms": math.sqrt(sum(squares) / len(squares))})
    return rows


def check_rows(rows: list[dict[str, Any]], expected: list[dict[str, Any]], states: int) -> None:
    assert [row["members"] for row in rows] == [row["members"] for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        for decoder in DECODERS:
            # Deviations are stored in float16: a state on the edge may fall to the other side.
            assert row["exact_match"][decoder] == pytest.approx(wanted["exact_match"][decoder], abs=0.5 / states)
        assert row["rms_deviation"] == pytest.approx(wanted["rms"], rel=1e-3)


def test_the_fixture_is_mixed(partly: PartlyConverged) -> None:
    """Neither the first members have converged nor the last: a wrong choice of as many shows."""
    assert len(partly.converged) == len(partly.failed) == 6
    assert partly.converged not in (list(INDICES)[:6], list(INDICES)[6:])
    assert partly.converged != sorted(partly.converged, key=str)


def test_members_that_did_not_converge_are_named_by_their_indices(partly: PartlyConverged) -> None:
    training = partly.results["training"]
    assert training["not_converged"] == partly.failed
    assert partly.results["members"] == MEMBERS
    assert training["relative_loss_max"] > partly.options.tolerance
    named = ", ".join(map(str, partly.failed))
    printed = " ".join(partly.printed.split())
    assert f"6 of 12 members did not converge and are left out of every number above: {named}. Try more" in printed


def test_each_member_is_recorded_with_its_own_end(partly: PartlyConverged) -> None:
    seen = []
    for path in partly.directory.glob("checkpoints/*.safetensors"):
        columns = load_file(path)
        seen += columns["indices"].tolist()
        for row, index in enumerate(columns["indices"].tolist()):
            assert bool(columns["converged"][row]) == (index in partly.converged)
            assert (float(columns["relative_loss"][row]) <= partly.options.tolerance) == (index in partly.converged)
            deviation = partly.outputs[index].double() - limit_of(STATES, 0).mean
            # float16 has 11 bits; float32 sums of 48 terms.
            torch.testing.assert_close(columns["deviations"][row].double(), deviation, rtol=2**-10, atol=1e-4)
    assert sorted(seen) == list(INDICES)


def test_no_average_has_a_member_that_did_not_converge(partly: PartlyConverged) -> None:
    limit = limit_of(STATES, 0)
    deviations = {index: outputs.double() - limit.mean for index, outputs in partly.outputs.items()}
    rows = partly.results["convergence"]
    expected = rows_by_hand(limit, {index: deviations[index] for index in partly.converged})
    check_rows(rows, expected, STATES)
    # The oracle would tell: with all members, or with the first six, the numbers are others.
    for others in (list(INDICES), list(INDICES)[:6]):
        wrong = rows_by_hand(limit, {index: deviations[index] for index in others})
        assert wrong[0]["rms"] != pytest.approx(expected[0]["rms"], rel=1e-2)


def test_charts_show_the_averages_of_converged_members_and_the_losses_of_all(partly: PartlyConverged) -> None:
    events = EventAccumulator(str(partly.directory))
    events.Reload()

    def scalars(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(tag)}

    limit = limit_of(STATES, 0)
    deviations = {index: partly.outputs[index].double() - limit.mean for index in partly.converged}
    first = [dict(itertools.islice(deviations.items(), n)) for n in range(1, len(deviations) + 1)]
    prefixes = [rows_by_hand(limit, own)[-1] for own in first]
    expected = {row["members"]: row["rms"] for row in prefixes}
    assert scalars("RMS deviation/measured") == pytest.approx(expected, rel=1e-3)
    for decoder in DECODERS:
        exact = {row["members"]: row["exact_match"][decoder] for row in prefixes}
        assert scalars(f"exact match/{decoder}") == pytest.approx(exact, abs=0.5 / STATES)
    losses = [alone(index, partly.options.tolerance)[1] for index in INDICES]
    # Members that have stopped keep their last loss.
    table = [sorted(own[min(step, len(own) - 1)] for own in losses) for step in range(STEPS + 1)]
    for name, row in (("worst", -1), ("median", (len(INDICES) - 1) // 2), ("best", 0)):
        shown = scalars(f"log10 training loss by 10 step/{name}")
        # float32 in both, in other orders of summation.
        assert {step: 10 ** shown[10 * step] for step in range(STEPS + 1)} == {
            step: pytest.approx(values[row], rel=1e-3) for step, values in enumerate(table)
        }


@pytest.mark.parametrize("kept", [True, False])
def test_a_loaded_ensemble_is_the_converged_members(kept: bool, partly: PartlyConverged, without_weights: Path) -> None:
    ensemble = Ensemble.load(partly.directory if kept else without_weights)
    assert list(ensemble.indices) == partly.converged
    assert len(ensemble) == 6
    evaluation = EvaluationSet.sample(TASK, STATES, 0)
    outputs = torch.stack([partly.outputs[index].double() for index in partly.converged])
    # float32 sums of 48 terms, after a few steps.
    torch.testing.assert_close(ensemble.predict(evaluation.states), outputs.mean(0), rtol=0, atol=1e-5)
    inputs = limit_of(STATES, 0).inputs.float()
    torch.testing.assert_close(ensemble.members(inputs).double(), outputs, rtol=0, atol=1e-5)
    for position in range(6):
        torch.testing.assert_close(
            ensemble.member(position)(inputs).detach().double(), outputs[position], rtol=0, atol=1e-5
        )


def test_the_first_few_are_the_first_that_converged(partly: PartlyConverged) -> None:
    assert list(Ensemble.load(partly.directory, members=2).indices) == partly.converged[:2]
    with pytest.raises(StoreError, match="7 members: expected 1 to 6, as many have converged"):
        Ensemble.load(partly.directory, members=7)


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_evaluation_on_the_runs_own_states_is_of_converged_members(
    partly: PartlyConverged, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(capsys, str(partly.directory))["convergence"] == partly.results["convergence"]
    assert main(["evaluate", str(partly.directory)]) == 0
    assert "6 members on 60 states (seed 0)" in capsys.readouterr().out
    assert main(["evaluate", str(partly.directory), "--members", "7"]) == 2
    assert "--members 7: expected integers from 1 to 6, as many have converged" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("states", "seed"), [(60, 3), (45, 0)])
def test_evaluation_on_other_states_is_of_converged_members(
    states: int, seed: int, kept: bool, partly: PartlyConverged, without_weights: Path, capsys: Any
) -> None:
    directory = partly.directory if kept else without_weights
    other = ["--evaluation-states", str(states), "--evaluation-seed", str(seed)]
    found = evaluated(capsys, str(directory), *other)
    limit = limit_of(states, seed)
    inputs = limit.inputs.float()
    deviations = {
        index: alone(index, partly.options.tolerance)[0](inputs).detach()[0].double() - limit.mean
        for index in partly.converged
    }
    check_rows(found["convergence"], rows_by_hand(limit, deviations), states)
    assert (found["evaluation_states"], found["evaluation_seed"]) == (states, seed)


def test_members_that_did_not_converge_are_not_trained_again_to_be_evaluated(
    without_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(without_weights), "--evaluation-states", "20"]) == 0
    assert "6 members have no kept weights and are trained again" in capsys.readouterr().out


def test_members_that_did_not_converge_are_finished_all_the_same(partly: PartlyConverged, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(partly.directory, tmp_path / "copy"))
    before = {path: path.read_bytes() for path in directory.glob("checkpoints/*")}
    again = dataclasses.replace(partly.options, out=None, resume=str(directory))
    results = train(TASK, again, console=Console(quiet=True))
    assert results is not None
    assert results["training"]["not_converged"] == partly.failed
    assert results["convergence"] == partly.results["convergence"]
    assert {path: path.read_bytes() for path in directory.glob("checkpoints/*")} == before
