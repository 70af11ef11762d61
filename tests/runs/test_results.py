"""The final table says what the results say."""

import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ntk_ensembles.ensemble import MemberStatus
from ntk_ensembles.runs import Experiment, MemberResults, RunOptions
from ntk_ensembles.runs.figures import convergence_figure
from ntk_ensembles.runs.results import (
    exact_from,
    in_short,
    print_finite_width,
    print_report,
    print_training,
    results_of,
)
from ntk_ensembles.tasks import Addition
from ntk_ensembles.theory import DECODERS, FiniteWidth, WidthPrediction


def row(members: int, midpoint: float) -> dict[str, Any]:
    both = {"midpoint": midpoint, "sign": 0.00001}
    return {
        "members": members,
        "exact_match": both,
        "predicted_exact_match": {"midpoint": 0.999999, "sign": 0.0},
        "execution_match": None,
        "rms_deviation": 0.5,
        "predicted_rms_deviation": 0.25,
        "finite_width_exact_match": {"midpoint": 0.75, "sign": 0.125},
        "finite_width_rms_deviation": 0.375,
    }


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([1, 1, 1], 1), ([0.5, 1, 1], 2), ([1, 0.9, 1], 4), ([1, 1, 0.9], None), ([], None)],
)
def test_exact_from(shares: list[float], expected: int | None) -> None:
    assert exact_from([row(1 << i, share) for i, share in enumerate(shares)]) == expected


def test_it_never_rounds_to_all_or_none_and_names_failures() -> None:
    seconds = {"init": 1.0, "train": 2.0, "evaluate": 3.0, "startup": 0.5, "total": 6.0}
    training = {"not_converged": [3, 5], "seconds": seconds, "steps_max": 50}
    training |= {"relative_loss_max": None, "peak_memory_bytes": 1 << 30}
    text = StringIO()
    results = {"members": 8, "convergence": [row(1, 0.5), row(2, 1.0)], "training": training, "width": 64}
    results["finite_width"] = {"omitted": None}
    console = Console(file=text, width=120)
    print_report(results, console)
    print_training(results, Path("my runs"), console)
    printed = " ".join(text.getvalue().split())
    assert "50% (<100%)" in printed
    assert ">0% (0%)" in printed
    assert "exact by midpoint from N = 2 on" in printed
    assert "2 of 8 members did not converge" in printed
    assert "3, 5" in printed
    assert "not finite" in printed
    assert "peak memory 1.00 GiB" in printed
    assert "tensorboard --logdir 'my runs'" in printed


def test_twenty_members_are_named_and_more_are_hinted_at() -> None:
    assert in_short(range(20)) == ", ".join(map(str, range(20)))
    assert in_short(range(21)) == ", ".join(map(str, range(20))) + " …"


def test_the_table_of_the_members_own_width_or_why_there_is_none() -> None:
    text = StringIO()
    print_finite_width([row(1, 0.5), row(4, 1.0)], 64, None, Console(file=text, width=120))
    lines = text.getvalue().splitlines()
    assert "theory at width 64" in lines[0]
    cells = ["4", "100% (75%)", ">0% (12.50%)", "5.00e-01 (3.75e-01)"]
    assert [cell.strip() for cell in lines[-2].split("│")[1:-1]] == cells
    text = StringIO()
    print_finite_width([row(1, 0.5)], 8, "it is too small", Console(file=text, width=120))
    assert text.getvalue() == "No theory at width 8: it is too small.\n"


def test_results_hold_the_members_own_width_where_it_is_valid() -> None:
    """A width of 10 templates' size is; 1 is not, nor is the plain squared error."""
    task = Addition(3)
    size = len(task.templates)
    deviations = torch.zeros(4, 40, task.layout.bits, dtype=torch.float16)
    for width, loss, valid in ((10 * size, "whitened", True), (size, "whitened", False), (10 * size, "mse", False)):
        options = RunOptions(width=width, loss=loss, evaluation_states=40)  # type: ignore[arg-type]
        experiment = Experiment(task, options)
        members = MemberResults.from_cohort(
            range(4), [MemberStatus(False, True, 0, [1.0, 0.0])] * 4, deviations, [0.0] * 3
        )
        results = results_of(experiment, members, torch.device("cpu"))
        assert results["executions"] == len(experiment.evaluation.trajectories) < results["evaluation_states"] == 40
        finite = results["finite_width"]
        assert finite["movement"] == pytest.approx(FiniteWidth(experiment.limit.predictor, width).movement)
        assert (finite["omitted"] is None) == valid
        prediction = WidthPrediction(experiment.limit, FiniteWidth(experiment.limit.predictor, width))
        for found in results["convergence"]:
            if valid:
                expected = prediction.exact_match(found["members"], "midpoint")
                assert found["finite_width_exact_match"] is not None
                assert found["finite_width_exact_match"]["midpoint"] == expected
                assert found["finite_width_rms_deviation"] == prediction.rms_deviation(found["members"])
                assert finite["states"] == 40
                assert finite["bias_rms"] == pytest.approx(math.sqrt(float(prediction.bias.square().mean())), rel=1e-12)
                assert finite["variance"] == float(prediction.variance.mean())
            else:
                assert found["finite_width_exact_match"] is None
                assert found["finite_width_bit_accuracy"] is None
                assert found["finite_width_rms_deviation"] is None
                assert finite["bias_rms"] is finite["variance"] is finite["states"] is None
        bands = {decoder: experiment.limit.band([1, 2, 4], decoder) for decoder in DECODERS}
        figure = convergence_figure(results["convergence"], bands, "title")
        labels = [line.get_label() for axes in figure.axes for line in axes.get_lines()]
        assert ("theory, this width" in labels) == valid
