"""How long commands take to begin, beside a bare ``import torch`` in the same run.

    python benchmarks/startup.py --out benchmarks/results/startup.json

Commands and ``import torch`` take turns, in new processes; medians over the rounds, after one round that warms the
machine's file cache. Ratios are of processor seconds too, which a busy machine changes less. At the end
``train.py --task addition`` runs in a terminal of its own and is watched: when the first sign of life comes, when
members are trained, when it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TORCH = "import torch"
NTK_ENSEMBLES = "from ntk_ensembles.cli.main import main; main({!r})"
COMMANDS = {
    TORCH: ["-c", TORCH],
    "import torch, lightning": ["-c", "import torch, lightning"],
    "train.py --help": ["train.py", "--help"],
    "train.py --task addition --help": ["train.py", "--task", "addition", "--help"],
    **{
        f"ntk-ensembles {' '.join(arguments)}": ["-c", NTK_ENSEMBLES.format(arguments)]
        for arguments in (["--help"], ["certify", "--help"], ["plan", "--help"], ["run", "--help"], ["merge", "--help"])
    },
}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TRAINED = re.compile(r"evaluating|\b(\d+)/\1\b")
"""What the bar of members shows once training is over: the next stage, or, should that be short, that all is done."""


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """Run Python and return the seconds that pass, and the processor seconds."""
    started_at = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    elapsed = time.perf_counter() - started_at
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"python {' '.join(arguments)}: exit status {process.returncode}")
    return elapsed, used.ru_utime + used.ru_stime


def time_commands(rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians of every command, and their ratios to ``import torch``."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            found = seconds_of(arguments)
            if turn:
                measured[name].append(found)
    keys = ("seconds", "processor_seconds")
    rows = {
        name: {key: statistics.median(pair[i] for pair in pairs) for i, key in enumerate(keys)}
        for name, pairs in measured.items()
    }
    return {
        name: {**row, **{f"{key}_ratio": row[key] / rows[TORCH][key] for key in keys}} for name, row in rows.items()
    }


def watch_training(directory: Path) -> dict[str, Any]:
    """Train in a terminal; return when what was seen, in seconds from the start of the process."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "train.py", "--task", "addition", "--out", str(directory)]
    started_at = time.perf_counter()
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "120"})
    os.close(theirs)
    seen: dict[str, float] = {}
    text = ""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:
            # How Linux says that nobody has the terminal open any more.
            break
        if not part:
            break
        now = time.perf_counter() - started_at
        text += ESCAPES.sub("", part.decode(errors="replace"))
        seen.setdefault("first_sign", now)
        if "members ━" in text:
            seen.setdefault("members_bar", now)
        if TRAINED.search(text):
            seen.setdefault("trained", now)
    os.close(ours)
    if process.wait():
        sys.exit(text)
    seen["end"] = time.perf_counter() - started_at
    results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    return {"seconds": seen, "members": results["members"], "width": results["width"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of the results")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each command")
    options = parser.parse_args()
    rows = time_commands(options.rounds)
    for name, row in rows.items():
        print(
            f"{name}: {row['seconds']:.2f} s, {row['seconds_ratio']:.2f} times import torch (processor seconds: "
            f"{row['processor_seconds_ratio']:.2f} times)"
        )
    runs = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(watch_training(Path(folder) / "run"))
        times = ", ".join(f"{what.replace('_', ' ')} {seconds:.2f} s" for what, seconds in runs[-1]["seconds"].items())
        print(f"train.py --task addition ({runs[-1]['members']} members of width {runs[-1]['width']}): {times}")
    if options.out:
        # Not before: a benchmark of imports begins with none of its own.
        import torch

        from ntk_ensembles.runs.results import environment

        found = {"commands": rows, "training": runs, "environment": environment(torch.device("cpu"), "float32")}
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
