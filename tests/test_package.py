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


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, ntk_ensembles, ntk_ensembles.cli.main; print(sorted({'torch', 'lightning'} & sys.modules.keys()))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
