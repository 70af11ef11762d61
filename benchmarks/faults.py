"""Kill -9 at random moments, then resume: the end must be the numbers of a run that nobody disturbed.

    python benchmarks/faults.py --kills 50

Each trial starts a run, kills it, resumes it, and so on; after some kills it is left to finish and its
``results.json``, timings aside, is compared with that of an undisturbed run. Most kills come while it trains and saves,
a random number of checkpoints after the start; the others at any time (while it imports, begins, or writes its
results). Every trial has another number of processes and another cohort.
"""

from __future__ import annotations

import argparse
import contextlib
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
MEMBERS = 400
OPTIONS = ["--task", "addition", "--bits", "4", "--width", "4096", "--evaluation-states", "200"]
OPTIONS += ["--ensemble", str(MEMBERS)]


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
            cohort = generator.randint(1, 9)
            extra = ["--cohort", str(cohort), "--devices", str(generator.choice((1, 1, 2)))]
            finished = [0]
            for _ in range(min(KILLS_A_TRIAL, options.kills - kills)):
                process = start([*begin_or_resume(directory), *extra])
                if generator.random() < 0.25:
                    wait(process, generator.uniform(0, 1.1) * longest)
                else:
                    left = -(-MEMBERS // cohort) - finished[-1]
                    target = finished[-1] + generator.randint(1, max(1, left // 3))
                    while process.poll() is None and checkpoints(directory) < target:
                        time.sleep(0.002)
                    wait(process, generator.uniform(0, 0.1))
                if process.poll() is None:
                    # The whole group: a process that Lightning started would go on alone otherwise.
                    os.killpg(process.pid, signal.SIGKILL)
                    kills += 1
                process.communicate()
                finished.append(checkpoints(directory))
            process = start([*begin_or_resume(directory), *extra])
            _, complaint = process.communicate()
            if process.returncode:
                sys.exit(f"trial {trial}: resuming failed: {complaint.decode()}")
            if numbers(directory) != expected:
                sys.exit(f"trial {trial}: the numbers are not those of the undisturbed run")
            print(f"trial {trial}: {' '.join(extra)}, files after each kill {finished[1:]}: same numbers", flush=True)
    print(f"{kills} kills in {trial} trials: every run ended with the numbers of the undisturbed one")


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until a process ends, but not longer."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def checkpoints(directory: Path) -> int:
    """How many cohorts have been saved."""
    return len(list(directory.glob("checkpoints/members-*")))


def begin_or_resume(directory: Path) -> list[str]:
    """The command's options, as a user would give them."""
    if (directory / "manifest.json").exists():
        return ["--resume", str(directory)]
    return [*OPTIONS, "--out", str(directory)]


if __name__ == "__main__":
    main()
