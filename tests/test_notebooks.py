"""The notebooks run, and their kept outputs are what they give: complete, small, and without traces of a machine."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

BYTES_MAX = 500_000
"""Largest notebook that is pleasant in a repository."""


def load_execute() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXECUTE = load_execute()

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output: NotebookNode) -> str:
    return str(output.get("text") or output.get("data", {}).get("text/plain", ""))


def outline(cell: NotebookNode) -> list[tuple[str, list[str], str]]:
    """What a cell puts out, but for its numbers, whose last digits are another processor's business."""
    return [
        (
            output.output_type,
            sorted(output.get("data", {})),
            " ".join(re.sub(r"-?\d[\d,.]*(e-?\d+)?", "#", text_of(output)).split()),
        )
        for output in cell.outputs
    ]


def test_all_are_tested() -> None:
    assert len(NOTEBOOKS) == 4
    assert EXECUTE.NOTEBOOKS == NOTEBOOKS


@every_notebook
def test_runs_as_kept(path: Path, tmp_path: Path) -> None:
    """No cell fails, an ``assert`` in particular, and what is kept in the file belongs to the code beside it."""
    executed, kept = EXECUTE.execute(path, tmp_path), nbformat.read(path, as_version=4)
    for fresh, old in zip(code_cells(executed), code_cells(kept), strict=True):
        assert outline(fresh) == outline(old), fresh.source


@every_notebook
def test_kept_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < BYTES_MAX
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    # A figure that was not drawn, warnings, colours of a terminal, and files of the machine that executed it.
    for output in outputs:
        assert "Figure" not in text_of(output) or "image/png" in output.data
        assert output.get("name", "stdout") == "stdout"
        assert "\x1b" not in text_of(output)
        assert not re.search(r"(?<![\w.])/(?:home|mnt|opt|private|root|tmp|usr|var|Users)/|[A-Z]:\\", text_of(output))


@every_notebook
def test_code_is_checked_and_public(path: Path) -> None:
    """Each notebook asserts facts, and imports nothing of the package that is private."""
    sources = [cell.source for cell in code_cells(nbformat.read(path, as_version=4))]
    lines = "\n".join(line for source in sources for line in source.splitlines() if not line.startswith("%"))
    nodes = list(ast.walk(ast.parse(lines)))
    assert sum(isinstance(node, ast.Assert) for node in nodes) >= 4
    imports = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("ntk_ensembles")]
    assert imports
    for node in imports:
        names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        assert not any(name.startswith("_") for name in names), names
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not {name for name in attributes if name.startswith("_")}


@pytest.mark.parametrize(
    ("code", "error"),
    [("assert 1 + 1 == 3", CellExecutionError), ("import sys; print('here', file=sys.stderr)", ValueError)],
)
def test_faults_are_seen(code: str, error: type[Exception], tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell("x = 1"), nbformat.v4.new_code_cell(code)]
    path = tmp_path / "faulty.ipynb"
    path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells)), encoding="utf-8")
    before = json.loads(path.read_text(encoding="utf-8"))
    with pytest.raises(error):
        EXECUTE.execute(path, tmp_path)
    assert json.loads(path.read_text(encoding="utf-8")) == before
