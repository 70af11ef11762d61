"""Kill -9 at random moments, then resume: the end must be the numbers of a run that nobody disturbed.

    python benchmarks/faults.py --kills 50

Each trial starts a run, kills it after a random time (while it imports, begins, trains, saves or writes its
results), resumes it, and so on; after some kills it is left to finish and its ``results.json``, timings aside, is
compared with that of an undisturbed run. Every trial has another number of processes and another cohort.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KILLS_A_TRIAL = 5
OPTIONS = ["--task", "addition", "--bits", "4", "--width", "4096", "--ensemble", "400", "--evaluation-states", "200"]


def numbers(directory: Path) -> dict[str, Any]:
    """Everything in results.json that does not tell of time or of the machine."""
    results: dict[str, Any] = json.loads((directory / "results.json").read_text())
    results["training"].pop("seconds")
    results["training"].pop("peak_memory_bytes")
    results["environment"].pop("cpu_threads")
    return results


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start train.py in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def main() -> None:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        started_at = time.monotonic()
        if start([*OPTIONS, "--out", str(undisturbed)]).wait():
            sys.exit("the undisturbed run failed")
        longest = time.monotonic() - started_at
        expected = numbers(undisturbed)
        kills = trial = 0
        while kills < options.kills:
            trial += 1
            directory = Path(folder) / f"trial-{trial}"
            extra = ["--cohort", str(generator.randint(1, 9)), "--devices", str(generator.choice((1, 1, 2)))]
            finished = []
            for _ in range(min(KILLS_A_TRIAL, options.kills - kills)):
                process = start([*begin_or_resume(directory), *extra])
                try:
                    process.wait(generator.uniform(0.3, 1.1) * longest)
                except subprocess.TimeoutExpired:
                    # The whole group: a process that Lightning started would go on alone otherwise.
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
                process.communicate()
                finished.append(len(list(directory.glob("checkpoints/members-*"))))
            process = start([*begin_or_resume(directory), *extra])
            _, complaint = process.communicate()
            if process.returncode:
                sys.exit(f"trial {trial}: resuming failed: {complaint.decode()}")
            if numbers(directory) != expected:
                sys.exit(f"trial {trial}: the numbers are not those of the undisturbed run")
            print(f"trial {trial}: {' '.join(extra)}, files after each kill {finished}: same numbers", flush=True)
    print(f"{kills} kills in {trial} trials: every run ended with the numbers of the undisturbed one")


def begin_or_resume(directory: Path) -> list[str]:
    """The command's options, as a user would give them."""
    if (directory / "manifest.json").exists():
        return ["--resume", str(directory)]
    return [*OPTIONS, "--out", str(directory)]


if __name__ == "__main__":
    main()
