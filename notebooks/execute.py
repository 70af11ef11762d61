"""Execute the notebooks and keep their outputs in the files.

From the repository's root, with the package and its ``test`` extra installed:

    python notebooks/execute.py
    python notebooks/execute.py notebooks/1-from-templates-to-addition.ipynb

Each notebook runs in a fresh kernel and in an empty directory of its own, so that it finds nothing but the package, and
what it writes goes away with it. `execute` is also what the tests call.
"""

from __future__ import annotations

import argparse
import base64
import io
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from ntk_ensembles.files import write_atomically

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))
"""All notebooks, in the order in which they are to be read."""

_CELL_SECONDS_MAX = 600


def execute(path: Path, directory: Path) -> NotebookNode:
    """Execute a notebook and return it with its outputs; the file stays as it is.

    Args:
        path: Notebook.
        directory: Directory that the code runs in, best an empty one.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raises an exception, such as by an ``assert``.
        ValueError: A cell writes to standard error. Warnings and log lines name files of the machine, and a reader
            should see none.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=_CELL_SECONDS_MAX,
        record_timing=False,  # it would be different in every run
        resources={"metadata": {"path": str(directory)}},
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise ValueError(f"{path.name}: cell {cell.id} writes to standard error: {output.text}")
            if picture := output.get("data", {}).get("image/png"):
                output.data["image/png"] = _with_few_colours(picture)
    # The kernel adds its own version; what a file needs to say is the language.
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _with_few_colours(picture: str) -> str:
    """Return a PNG in base64 with a palette of 256 colours: a third of the bytes, and a chart looks the same."""
    opened = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    small = io.BytesIO()
    opened.quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> None:
    """Execute notebooks in place."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("notebooks", type=Path, nargs="*", default=NOTEBOOKS, help="by default all")
    for path in parser.parse_args().notebooks:
        started_at = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            text = nbformat.writes(execute(path, Path(directory)), indent=1) + "\n"
        write_atomically(path, lambda part, text=text: part.write_text(text, encoding="utf-8"))
        print(f"{path.name}: {time.monotonic() - started_at:.0f} s, {len(text.encode()) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
