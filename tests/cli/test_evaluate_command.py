"""`ntk-ensembles evaluate` as a user runs it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ntk_ensembles.cli.main import main
from ntk_ensembles.cli.train import train_command

SMALL = ["--task", "addition", "--bits", "3", "--width", "256", "--ensemble", "6", "--tolerance", "1e-4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    assert train_command([*SMALL, "--evaluation-states", "40", "--out", str(directory)]) == 0
    return directory


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_runs_own_states_give_its_own_rows(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((trained / "results.json").read_text())
    assert evaluate(capsys, str(trained))["convergence"] == results["convergence"]
    rows = evaluate(capsys, str(trained), "--members", "2,5")["convergence"]
    assert [row["members"] for row in rows] == [2, 5]
    assert rows[0] == next(row for row in results["convergence"] if row["members"] == 2)


def test_other_states_give_what_a_run_on_them_gives(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--evaluation-states", "70", "--evaluation-seed", "4"]
    assert train_command([*SMALL, *other, "--out", str(tmp_path / "other")]) == 0
    expected = json.loads((tmp_path / "other" / "results.json").read_text())["convergence"]
    assert evaluate(capsys, str(trained), *other)["convergence"] == expected
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    shutil.rmtree(copy / "weights")
    assert evaluate(capsys, str(copy), *other, "--out", str(tmp_path / "out.json"))["convergence"] == expected
    assert json.loads((tmp_path / "out.json").read_text())["convergence"] == expected
    assert main(["evaluate", str(copy), *other]) == 0
    assert "6 members have no kept weights and are trained again" in capsys.readouterr().out


def test_one_decoder(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(trained), "--decode", "sign"]) == 0
    printed = capsys.readouterr().out
    assert "whole executions by sign" in " ".join(printed.split())
    assert "midpoint" not in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--members", "7"], "--members 7: expected integers from 1 to 6"),
        (["--members", "x"], "expected integers separated by commas"),
        (["--evaluation-states", "0"], "--evaluation-states 0: expected an integer from 1"),
    ],
)
def test_bad_input(trained: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(trained), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize("out", [".", "nowhere/results.json"])
def test_where_results_cannot_be_written_is_known_before_they_are_computed(
    out: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntk_ensembles.cli.evaluate.Ensemble.from_run", lambda *_: pytest.fail("members are evaluated"))
    capsys.readouterr()
    assert main(["evaluate", str(trained), "--evaluation-seed", "9", "--out", str(tmp_path / out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("expected a file, in a directory that exists and can be written")


def test_a_run_of_another_task(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule110 = Path(__file__).parents[2] / "examples" / "rule110.py"
    capsys.readouterr()
    assert main(["evaluate", str(trained), "--task", f"{rule110}:Rule110"]) == 2
    assert "is not a run of this task, task is rule110 here and addition there" in capsys.readouterr().err


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is no run directory" in capsys.readouterr().err
