"""Train three small ensembles and photograph what TensorBoard shows of them: the pictures of the README.

``python benchmarks/dashboard.py`` writes docs/dashboard.png (the Custom Scalars tab) and docs/dashboard-hparams.png. It
needs Chromium, which it runs without a window, and about a minute on two cores.
"""

from __future__ import annotations

import argparse
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
TABS = {"dashboard": ("custom_scalars", (1360, 980)), "dashboard-hparams": ("hparams", (1560, 420))}
"""Names of the pictures: the tab, and the window's width and height."""

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


def photograph(browser: str, url: str, path: Path, size: tuple[int, int]) -> None:
    """Let the browser load a page and write a picture of it."""
    command = [browser, "--headless", "--hide-scrollbars", "--virtual-time-budget=30000"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")
    command += [f"--window-size={size[0]},{size[1]}", f"--screenshot={path.resolve()}", url]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=120)
    print(path)


def main() -> None:
    """Train, serve and photograph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default=next(filter(shutil.which, BROWSERS), None), help="Chromium's command.")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="Where to write the pictures.")
    parser.add_argument("--runs", type=Path, help="Where to keep the runs. By default they are deleted.")
    arguments = parser.parse_args()
    if arguments.browser is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed; name one with --browser")
    with tempfile.TemporaryDirectory() as folder:
        runs = arguments.runs or Path(folder)
        for name, options in RUNS.items():
            train(Addition(10), RunOptions(ensemble=64, out=str(runs / name), **options))
        url = serve(runs)
        for name, (tab, size) in TABS.items():
            photograph(arguments.browser, f"{url}#{tab}", arguments.out / f"{name}.png", size)


if __name__ == "__main__":
    main()
