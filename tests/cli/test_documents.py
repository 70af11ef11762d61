"""What the README and the notebooks show is what works."""

import json
import re
from pathlib import Path

import pytest

from ntk_ensembles.cli.parsing import parse_task
from ntk_ensembles.cli.train import train_command
from ntk_ensembles.training import RunOptions

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_training_command_of_the_readme_parses() -> None:
    commands = re.findall(r"python train\.py ([^`\n]*)", README)
    assert len(commands) >= 4
    for command in commands:
        arguments = command.replace("configs/", f"{ROOT}/configs/").split()
        if arguments[-1] == "--help":
            with pytest.raises(SystemExit) as stop:
                train_command(arguments)
            assert stop.value.code == 0
        else:
            parse_task(arguments, "train.py", "", RunOptions)


def test_files_that_the_readme_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).is_file()


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
