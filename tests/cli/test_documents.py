"""What the README and the notebooks show is what works."""

import json
import re
from pathlib import Path

import pytest

from ntk_ensembles import Addition, train
from ntk_ensembles.cli.main import main
from ntk_ensembles.cli.parsing import parse_task
from ntk_ensembles.cli.train import train_command
from ntk_ensembles.training import RunOptions

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKPOINTS = ROOT / "docs" / "checkpoints.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def test_every_training_command_of_the_readme_parses() -> None:
    commands = re.findall(r"python train\.py ([^`\n]*)", README)
    assert len(commands) >= 4
    for command in commands:
        if "RUN_DIR" in command:
            continue
        arguments = command.replace("configs/", f"{ROOT}/configs/").replace("examples/", f"{ROOT}/examples/").split()
        if arguments[-1] == "--help":
            with pytest.raises(SystemExit) as stop:
                train_command(arguments)
            assert stop.value.code == 0
        else:
            parse_task(arguments, "train.py", "", RunOptions)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_exist(path: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("http") or (path.parent / link).exists(), link


def commands_of(path: Path) -> list[str]:
    """The lines of code blocks that run a command of the package."""
    blocks = re.findall(r"```\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("ntk-ensembles ")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist_with_the_flags_that_documents_give_them(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands_of(path):
        name = command.split()[1]
        with pytest.raises(SystemExit) as stop:
            main([name, *(["--task", "sbn"] if name in ("certify", "validate") else []), "--help"])
        assert stop.value.code == 0
        explained = capsys.readouterr().out
        for flag in re.findall(r"--[a-z-]+", command):
            assert flag in explained or flag == "--max-bits"


def test_the_python_of_the_checkpoints_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(Addition(bits=8), RunOptions(width=2048, ensemble=16, evaluation_states=50, out="runs/add"))
    (block,) = re.findall(r"```python\n(.*?)```", CHECKPOINTS.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, object] = {}
    exec(block, scope)
    assert scope["sums"] == [8, 255]
    assert bool(scope["step"].agreed.all())  # type: ignore[attr-defined]


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(block.replace("width=4096, ensemble=16", "width=256, ensemble=2, tolerance=1e-3"), scope)
    assert len(scope["results"]["convergence"]) == 2  # type: ignore[index]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path) -> None:
    scope: dict[str, object] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    results = scope["results"]
    assert results["convergence"][-1]["exact_match"]["midpoint"] == 1  # type: ignore[index]
