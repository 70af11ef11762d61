"""Train three small ensembles and photograph what TensorBoard shows of them: the dashboard in the README.

``python benchmarks/dashboard.py`` writes docs/dashboard.png. It needs Chromium, which it runs without a window.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from tensorboard import program

from ntk_ensembles import Addition, RunOptions, train

RUNS: dict[str, dict[str, Any]] = {
    "width-1024": {"width": 1024},
    "width-8192": {"width": 8192},
    "antisymmetric-1024": {"width": 1024, "init": "antisymmetric"},
}
TAB, WIDTH, HEIGHT = "custom_scalars", 1560, 1130
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS_TO_LOAD = 60


def serve(runs: Path) -> str:
    """Start TensorBoard in this process, and return its address once it has read every run."""
    board = program.TensorBoard()
    board.configure(argv=["", "--logdir", str(runs), "--port", "0"])
    url: str = board.launch()
    for _ in range(SECONDS_TO_LOAD):
        with urllib.request.urlopen(f"{url}data/runs") as answer:
            if len(json.load(answer)) == len(RUNS):
                return url
        time.sleep(1)
    raise SystemExit(f"TensorBoard has not read {runs} within {SECONDS_TO_LOAD} seconds")


def photograph(browser: str, url: str, path: Path) -> None:
    """Let the browser load a page and write a picture of it."""
    command = [browser, "--headless", "--hide-scrollbars", "--virtual-time-budget=30000"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")
    command += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={path}", url]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=120)


def main() -> None:
    """Train, serve and photograph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default=next(filter(shutil.which, BROWSERS), None), help="Chromium's command.")
    parser.add_argument("--out", type=Path, default=Path("docs/dashboard.png"), help="Where to write the picture.")
    parser.add_argument("--runs", type=Path, help="Where to keep the runs. By default they are deleted.")
    arguments = parser.parse_args()
    if arguments.browser is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed; name one with --browser")
    out = arguments.out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        runs = (arguments.runs or Path(folder, "runs")).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        # TensorBoard shows the path that it is given.
        with contextlib.chdir(runs.parent):
            for name, options in RUNS.items():
                train(Addition(10), RunOptions(ensemble=64, out=str(runs / name), **options))
            photograph(arguments.browser, f"{serve(Path(runs.name))}#{TAB}", out)
    print(out)


if __name__ == "__main__":
    main()
