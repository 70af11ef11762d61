"""Micro-steps per second of the NTK mean on the one-instruction computer, beside the dense path in the same run.

    python benchmarks/execution.py

Both execute instructions of random programs in closed loop, from the same states, and must end in the same ones.
The dense path is `TemplateSet.matches` and `TemplatePredictor.predict`, decoded bit by bit; ours is `NTKExecutor`.
Rounds are interleaved; the median counts. Both run on one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import rate
from torch import Tensor

from ntk_ensembles import SBN, TemplatePredictor
from ntk_ensembles.runs.results import environment as recorded_environment
from ntk_ensembles.tasks import Program
from ntk_ensembles.theory import decode, margins, thresholds
from ntk_ensembles.theory.executor import NTKExecutor, rollout

SIZES = ((16, 8), (32, 8), (64, 8), (256, 16))
BATCH = 16384
DENSE_BATCH = 1024
DENSE_TEMPLATES_MAX = 2000
"""Beyond, the dense path takes too long to be timed side by side."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median counts")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [compare(SBN(cells, word), options.rounds) for cells, word in SIZES]
    for row in rows:
        print(
            f"{row['task']}: micro-steps a second in a batch of {BATCH}: {row['batch']:.3g}{against(row, 'batch')}; "
            f"one program: {row['single']:.3g}{against(row, 'single')}; smallest margin {row['smallest_margin']:.3g}"
        )
    if options.out:
        environment = recorded_environment(torch.device("cpu"), "float64")
        figures = {"unit": "micro-steps a second", "tasks": rows, "environment": environment}
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(task: SBN, rounds: int) -> dict[str, Any]:
    """Return the figures of one machine."""
    states = random_states(task, BATCH)
    executor, predictor = NTKExecutor(task.templates), TemplatePredictor(task.templates)
    steps = task.micro_steps_per_instruction
    done = rollout(executor, states, steps)
    if not done.agreed.all():
        sys.exit(f"{task!r}: the NTK mean has left the OR-machine")
    work: dict[str, tuple[Callable[[], object], int]] = {
        "batch": (lambda: rollout(executor, states, steps), BATCH),
        "single": (lambda: rollout(executor, states[:1], steps), 1),
    }
    if len(task.templates) <= DENSE_TEMPLATES_MAX:
        if not torch.equal(dense_run(predictor, states[:DENSE_BATCH], steps), done.states[:DENSE_BATCH]):
            sys.exit(f"{task!r}: the two paths end in different states")
        work["dense_batch"] = (lambda: dense_run(predictor, states[:DENSE_BATCH], steps), DENSE_BATCH)
        work["dense_single"] = (lambda: dense_run(predictor, states[:1], steps), 1)
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, (run, count) in work.items():
            rates[name].append(rate(run, count * steps))
    figures = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "task": repr(task),
        "templates": len(task.templates),
        "state_bits": task.layout.bits,
        "smallest_margin": float(done.margins.min()),
        **figures,
    }


def against(row: dict[str, Any], name: str) -> str:
    """Return the dense path's rate and the ratio, where it was timed."""
    dense = row.get(f"dense_{name}")
    return "" if dense is None else f", dense {dense:.3g} ({row[name] / dense:.0f} times)"


def random_states(task: SBN, count: int) -> Tensor:
    """Random memories, about to fetch."""
    programs = (value for value in task.inputs(random.Random(0)) if isinstance(value, Program))
    return torch.stack([task.initial_state(next(programs)) for _ in range(count)])


def dense_run(predictor: TemplatePredictor, states: Tensor, steps: int) -> Tensor:
    """Match, predict, decode, compare, and feed back."""
    templates = predictor.templates
    for _ in range(steps):
        matches = templates.matches(states)
        mean, levels = predictor.predict(matches).mean, thresholds("midpoint", predictor, matches.sum(1))
        margins(mean, levels, templates.set_counts(matches) > 0).min(1)
        states = decode(mean, levels)
    return states


if __name__ == "__main__":
    main()
