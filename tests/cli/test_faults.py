"""What benchmarks/faults.py tries at length, in brief: a user's faulty task, impossible places, a few of its draws."""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ntk_ensembles.cli.main import main

ROOT = Path(__file__).parents[2]
SMALL = ["--task", "addition", "--bits", "2", "--width", "64", "--evaluation-states", "20", "--tolerance", "1e-2"]


def faults() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", ROOT / "benchmarks" / "faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    capsys.readouterr()
    assert main(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.usefixtures("unchecked")
def test_a_users_faulty_task_is_one_line_and_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path)
    specs = faults().place(tmp_path / "files")["tasks"]
    assert len(specs) >= 12
    for spec in specs:
        line = complaint(capsys, ["train", "--task", spec, "--width", "64", "--ensemble", "1", "--out", "out"])
        assert "error: " in line, spec
        assert not (tmp_path / "out").exists(), spec
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


@pytest.mark.parametrize("where", ["--out", "results.json", "evaluate", "--trace"])
def test_a_loop_of_links_is_one_line(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, loop = tmp_path / "run", tmp_path / "loop"
    loop.symlink_to(loop)
    train = ["train", *SMALL, "--ensemble", "1", "--out"]
    if where == "--out":
        assert "loop" in complaint(capsys, [*train, str(loop)])
    elif where == "--trace":
        assert "loop" in complaint(capsys, ["run", "add", "--trace", str(loop)], status=1)
    else:
        assert main([*train, str(run)]) == 0
        if where == "evaluate":
            assert "loop" in complaint(capsys, ["evaluate", str(run), "--out", str(loop)], status=1)
        else:
            (run / "results.json").unlink()
            (run / "results.json").symlink_to(run / "results.json")
            assert main([*train, str(run)]) == 0
            assert (run / "results.json").is_file()


@pytest.mark.slow
def test_a_few_bad_command_lines_and_mutations(tmp_path: Path) -> None:
    process = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "faults.py"),
            "--commands",
            "40",
            "--mutations",
            "15",
            "--kills",
            "0",
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "bad 0" in process.stdout.splitlines()[-1]


def test_what_is_tried_is_drawn_from_the_seed(tmp_path: Path) -> None:
    module = faults()
    drawn = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = module.command_lines(random.Random(5), tmp_path / "run", tmp_path / name)
        drawn.append(str([next(lines) for _ in range(50)]).replace(str(tmp_path / name), ""))
    assert drawn[0] == drawn[1]
