"""The main job as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntk_ensembles.cli.train import train_command

ROOT = Path(__file__).parents[2]
SMALL = ["--width", "256", "--ensemble", "5", "--evaluation-states", "40", "--tolerance", "1e-4"]
TASKS = {
    "permutation": ["--bits", "6"],
    "addition": ["--bits", "3"],
    "multiplication": ["--bits", "2"],
    "sbn": ["--cells", "4", "--word-bits", "3"],
}


def run(directory: Path, *arguments: str) -> dict[str, object]:
    assert train_command([*arguments, "--out", str(directory)]) == 0
    results: dict[str, object] = json.loads((directory / "results.json").read_text())
    return results


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_what_the_design_lists(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    results = run(out, "--task", task, *TASKS[task], *SMALL)
    assert results["task"]["name"] == task  # type: ignore[index]
    assert results["members"] == 5
    rows = results["convergence"]
    assert [row["members"] for row in rows] == [1, 2, 4, 5]  # type: ignore[attr-defined]
    keys = {"exact_match", "exact_match_spread", "predicted_exact_match", "execution_match", "bit_accuracy"}
    assert keys | {"rms_deviation", "predicted_rms_deviation"} <= set(rows[0])  # type: ignore[index]
    assert {"steps_max", "relative_loss_max", "not_converged", "seconds", "peak_memory_bytes"} == set(
        results["training"]  # type: ignore[call-overload]
    )
    assert (out / "figures" / "convergence.png").read_bytes().startswith(b"\x89PNG")
    shards = sorted((out / "checkpoints").glob("*.safetensors"))
    assert sorted(i for shard in shards for i in load_file(shard)["indices"].tolist()) == [0, 1, 2, 3, 4]
    events = EventAccumulator(str(out))
    events.Reload()
    last = rows[-1]  # type: ignore[index]
    for tag, key in (
        ("exact match/sign", "exact_match"),
        ("exact match/sign, infinite width", "predicted_exact_match"),
    ):
        points = {event.step: event.value for event in events.Scalars(tag)}
        assert sorted(points) == [1, 2, 3, 4, 5]
        assert points[5] == pytest.approx(last[key]["sign"])
    printed = capsys.readouterr().out
    assert "members 5/5" in printed
    assert "exact match on evaluation states" in printed


def test_results_do_not_depend_on_the_cohort_and_the_saved_config_repeats_the_run(tmp_path: Path) -> None:
    arguments = ["--task", "addition", "--bits", "3", *SMALL]
    first = run(tmp_path / "a", *arguments, "--cohort", "5")
    second = run(tmp_path / "b", *arguments, "--cohort", "2")
    third = run(tmp_path / "c", "--config", str(tmp_path / "a" / "config.yaml"))
    for results in (first, second, third):
        results["training"].pop("seconds")  # type: ignore[attr-defined]
        results["training"].pop("peak_memory_bytes")  # type: ignore[attr-defined]
    assert first == second == third
    other = run(tmp_path / "d", *arguments, "--seed", "1")
    assert other["convergence"] != first["convergence"]


def test_flags_go_over_the_config(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("task: addition\nbits: 2\nwidth: 128\nensemble: 3\nevaluation_states: 20\ntolerance: 0.001\n")
    results = run(tmp_path / "run", "--config", str(config), "--ensemble", "2")
    assert results["members"] == 2
    assert results["width"] == 128


def test_members_that_do_not_converge_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    status = train_command(
        ["--task", "addition", "--bits", "3", "--width", "8", "--ensemble", "3", "--steps", "3", "--out", str(out)]
    )
    assert status == 1
    results = json.loads((out / "results.json").read_text())
    assert results["training"]["not_converged"] == [0, 1, 2]
    assert results["convergence"] == []
    assert "3 of 3 members did not converge" in " ".join(capsys.readouterr().out.split())


BAD = {
    "unknown task": (["--task", "division"], "--task division: expected one of permutation, addition"),
    "no task": ([], "--task"),
    "unknown option": (["--task", "addition", "--bit", "3"], "--bit"),
    "option of another task": (["--task", "addition", "--cells", "16"], "--cells"),
    "bits": (["--task", "addition", "--bits", "0"], "--bits 0: expected an integer from 1 to"),
    "not a number": (["--task", "addition", "--bits", "many"], "bits"),
    "cells": (["--task", "sbn", "--cells", "12"], "--cells 12: expected a power of two"),
    "word": (["--task", "sbn", "--word-bits", "99"], "--word-bits 99: expected an integer from 2 to 16"),
    "odd width": (["--task", "addition", "--width", "9", "--init", "antisymmetric"], "--width 9: expected an even"),
    "width": (["--task", "addition", "--width", "0"], "--width 0: expected an integer from 1 to"),
    "ensemble": (["--task", "addition", "--ensemble", "0"], "--ensemble 0: expected an integer from 1 to"),
    "init": (["--task", "addition", "--init", "zero"], "init"),
    "cohort": (["--task", "addition", "--width", "1000000", "--ensemble", "999999", "--cohort", "99999"], "--cohort"),
    "steps": (["--task", "addition", "--steps", "0"], "--steps 0"),
    "tolerance": (["--task", "addition", "--tolerance", "2"], "--tolerance 2"),
    "padding": (
        ["--task", "addition", "--bits", "1", "--padding", "16777213", "--width", "1", "--ensemble", "1"],
        "--padding 16777213: expected an integer from 0 to 16777212 beside 4 templates",
    ),
    "no config": (["--task", "addition", "--config", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = BAD[case]
    out = tmp_path / "run"
    status = train_command([*arguments, "--out", str(out)])
    captured = capsys.readouterr()
    assert status == 2
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()


def test_unknown_config_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("task: addition\nwidht: 128\n")
    assert train_command(["--config", str(config)]) == 2
    assert "widht" in capsys.readouterr().err


def test_an_existing_run_is_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("mine")
    assert train_command(["--task", "addition", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    blocked = tmp_path / "results.json" / "below"
    assert train_command(["--task", "addition", "--out", str(blocked)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], ["--task NAME --help", "--evaluation-states", "Hidden units n"]),
        (["--task", "sbn", "--help"], ["--cells", "power of two", "--branch"]),
        (["--task", "permutation", "--help"], ["--ones", "--permutation-seed"]),
    ):
        with pytest.raises(SystemExit) as stop:
            train_command(arguments)
        assert stop.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        for word in words:
            assert word in printed


def test_the_script_runs(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), "--task", "addition", "--bits", "2", *SMALL, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Results in" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command(["--task", "addition", "--accelerator", "gpu"]) == 2
    assert "--accelerator gpu: expected auto or cpu, as PyTorch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_runs_at_small_size(path: Path, tmp_path: Path) -> None:
    small = ["--width", "512", "--ensemble", "2", "--evaluation-states", "20", "--tolerance", "0.01"]
    assert yaml.safe_load(path.read_text())["task"] in TASKS
    sizes = ["--cells", "4", "--word-bits", "4"] if "cells" in path.read_text() else ["--bits", "4"]
    if "ones" in path.read_text():
        sizes += ["--ones", "2"]
    run(tmp_path / "run", "--config", str(path), *sizes, *small)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_agrees_with_theory(tmp_path: Path) -> None:
    results = run(tmp_path / "run", "--task", "addition", "--bits", "4", "--accelerator", "gpu", "--ensemble", "32")
    row = results["convergence"][-1]  # type: ignore[index]
    assert row["exact_match"]["midpoint"] == 1
    assert row["rms_deviation"] == pytest.approx(row["predicted_rms_deviation"], rel=0.3)
