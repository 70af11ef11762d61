"""Micro-steps per second of the NTK mean on the one-instruction computer, beside the dense path in the same run.

    python benchmarks/execution.py

Both execute instructions of random programs in closed loop, from the same states, and must end in the same ones.
The dense path is `TemplateSet.matches` and `TemplatePredictor.predict`, decoded bit by bit; ours is `NTKExecutor`.
Rounds are interleaved; the median counts. Both use the threads that PyTorch uses by default, ours one of them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntk_ensembles import SBN, TemplatePredictor
from ntk_ensembles.tasks import Program
from ntk_ensembles.theory import decode, margins, thresholds
from ntk_ensembles.theory.execution import NTKExecutor
from ntk_ensembles.training.environment import environment as recorded_environment

SIZES = ((16, 8), (32, 8))
BATCH = 16384
DENSE_BATCH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median counts")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    rows = [compare(SBN(cells, word), options.rounds) for cells, word in SIZES]
    for row in rows:
        print(
            f"{row['task']}: micro-steps a second in a batch of {BATCH}: {row['batch']:.3g}, dense {row['dense']:.3g} "
            f"({row['batch'] / row['dense']:.0f} times); one program: {row['single']:.3g}, dense "
            f"{row['dense_single']:.3g} ({row['single'] / row['dense_single']:.1f} times)"
        )
    if options.out:
        environment = recorded_environment(torch.device("cpu"), "float64")
        figures = {"unit": "micro-steps a second", "tasks": rows, "environment": environment}
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(task: SBN, rounds: int) -> dict[str, Any]:
    """The figures of one machine."""
    states = random_states(task, BATCH)
    executor, predictor = NTKExecutor(task.templates), TemplatePredictor(task.templates)
    steps = task.step_micro_steps
    expected = executor.run(states[:DENSE_BATCH], steps).states
    if not torch.equal(dense_run(predictor, states[:DENSE_BATCH], steps), expected):
        sys.exit(f"{task!r}: the two paths end in different states")
    work: dict[str, tuple[Callable[[], object], int]] = {
        "batch": (lambda: executor.run(states, steps), BATCH),
        "dense": (lambda: dense_run(predictor, states[:DENSE_BATCH], steps), DENSE_BATCH),
        "single": (lambda: executor.run(states[:1], steps), 1),
        "dense_single": (lambda: dense_run(predictor, states[:1], steps), 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, (run, count) in work.items():
            rates[name].append(rate(run, count * steps))
    figures = {name: statistics.median(values) for name, values in rates.items()}
    return {"task": repr(task), "templates": len(task.templates), "state_bits": task.layout.bits, **figures}


def random_states(task: SBN, count: int) -> Tensor:
    """Random memories, about to fetch."""
    programs = (value for value in task.inputs(random.Random(0)) if isinstance(value, Program))
    return torch.stack([task.layout.pack(task.fields(next(programs))) for _ in range(count)])


def dense_run(predictor: TemplatePredictor, states: Tensor, steps: int) -> Tensor:
    """Match, predict, decode, compare, and feed back."""
    templates = predictor.templates
    for _ in range(steps):
        matches = templates.matches(states)
        mean, levels = predictor.predict(matches).mean, thresholds("midpoint", predictor, matches.sum(1))
        margins(mean, levels, templates.counts(matches) > 0).min(1)
        states = decode(mean, levels)
    return states


def rate(run: Callable[[], object], micro_steps: int) -> float:
    """Micro-steps a second, after one call to warm up; repeated until half a second has passed."""
    run()
    started_at = time.perf_counter()
    calls = 0
    while time.perf_counter() - started_at < 0.5:
        run()
        calls += 1
    return calls * micro_steps / (time.perf_counter() - started_at)


if __name__ == "__main__":
    main()
