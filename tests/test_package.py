"""The names of the package, as users, completion and type checkers find them."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import ntk_ensembles

SOURCE = Path(ntk_ensembles.__file__)


def test_public_names_are_listed_and_there() -> None:
    names = dir(ntk_ensembles)
    assert "__version__" in names
    assert set(ntk_ensembles.__all__) == set(names) - {"__version__"}
    for name in ntk_ensembles.__all__:
        assert getattr(ntk_ensembles, name) is not None
    assert ntk_ensembles.Addition(bits=3).bits == 3


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    imported = {
        alias.name for node in imports if (node.module or "").startswith("ntk_ensembles.") for alias in node.names
    }
    assert imported == set(ntk_ensembles.__all__)
    assert (SOURCE.parent / "py.typed").is_file()


def test_the_version_is_the_installed_one() -> None:
    assert ntk_ensembles.__version__ == metadata.version("ntk-ensembles")


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'ntk_ensembles' has no attribute 'Subtraction'"):
        _ = ntk_ensembles.Subtraction  # type: ignore[attr-defined]


def imported_by(script: str, *candidates: str) -> set[str]:
    """Return which of some modules a new process has imported when the script has ended."""
    code = f"import sys\ntry:\n    {script}\nfinally:\n    print(*sys.modules, file=sys.stderr)\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(candidates) & set(ended.stderr.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported_by("import ntk_ensembles, ntk_ensembles.cli.main", "torch", "lightning") == set()


@pytest.mark.parametrize("arguments", [["train"], ["train", "--task", "addition"], ["certify"], ["run"]])
def test_help_imports_nothing_that_only_work_needs(arguments: list[str]) -> None:
    only_work = ("lightning", "torchmetrics", "matplotlib", "tensorboard", "torch._dynamo", "torch._inductor", "scipy")
    script = f"from ntk_ensembles.cli.main import main; main({[*arguments, '--help']})"
    assert imported_by(script, "torch", *only_work) == {"torch"}


def test_processes_of_a_run_import_no_command() -> None:
    """Processes that multiprocessing spawns import the script that was started, under this name."""
    script = f"import runpy; runpy.run_path({str(SOURCE.parents[1] / 'train.py')!r}, run_name='__mp_main__')"
    assert imported_by(script, "torch", "jsonargparse", "ntk_ensembles.cli.main") == {"ntk_ensembles.cli.main"}
