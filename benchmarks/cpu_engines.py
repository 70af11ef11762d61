"""Drawing, training and evaluation on a CPU, each as a share of its floor on the same machine in the same run.

    python benchmarks/cpu_engines.py

Members of the one-instruction computer, one for each core, in float32 and in bf16-mixed. Floors are measured at the
shapes of the work: matrix products of a slice of hidden units, in bfloat16 and, in float32, by PyTorch's own product
and by the one that the engine takes; drawing normal numbers; for evaluation, the last product and a read of W1 by
columns. Rounds are interleaved. Times are processor time for each member, which other work on the machine changes
little, and the least counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ntk_ensembles import SBN
from ntk_ensembles.ensemble import Descent, MLPStack, predict
from ntk_ensembles.ensemble.network import cpu_workers, map_members
from ntk_ensembles.ensemble.products import onednn_is_faster, product, units_at_once
from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs.results import environment
from ntk_ensembles.tasks import EvaluationSet

CPU = torch.device("cpu")
PRODUCTS = 100
"""Matrix products by which their rate is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=65536, help="hidden units of a member")
    parser.add_argument("--states", type=int, default=1000, help="states to evaluate")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; the least time counts")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    figures = measure(options.width, options.states, options.rounds)
    for name, rate in figures["gflops_of_a_core"].items():
        print(f"products, {name}: {rate:.0f} GFLOP/s a core")
    for name, stage in figures["stages"].items():
        print(f"{name}: {stage['seconds']:.3f} s a member; floor {stage['floor_seconds']:.3f} s, {stage['share']:.0%}")
    print(f"bf16-mixed takes {figures['bf16_over_float32']:.2f} of the time of float32")
    if options.out:
        text = json.dumps(figures, indent=2) + "\n"
        write_atomically(options.out, lambda path: path.write_text(text, encoding="utf-8"))


def measure(width: int, count: int, rounds: int) -> dict[str, Any]:
    """Return the figures.

    Args:
        width: Hidden units of a member.
        count: Number of evaluation states.
        rounds: How often each stage is timed.
    """
    task = SBN(16, 8)
    labels = task.templates.labels.float()
    (templates, bits), workers = labels.shape, cpu_workers()
    evaluation = EvaluationSet.sample(task, count, 0)
    inputs = task.templates.encode(evaluation.matches).float()
    units = units_at_once(CPU)
    factors = [(torch.randn(bits, units), torch.randn(units, templates)) for _ in range(workers)]
    rounded = [(left.bfloat16(), right.bfloat16()) for left, right in factors]
    finals = [(torch.randn(bits, width), torch.randn(width, count)) for _ in range(workers)]
    stack = MLPStack(templates, bits, width, workers)
    times: dict[str, list[float]] = {}
    reached: dict[str, Any] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        started_at = time.process_time()
        work()
        times.setdefault(name, []).append((time.process_time() - started_at) / workers)

    def repeat(pair: tuple[torch.Tensor, torch.Tensor], multiply: Callable[..., object]) -> None:
        for _ in range(PRODUCTS):
            multiply(*pair)

    def on_all(work: Callable[[int], object]) -> Callable[[], object]:
        return lambda: map_members(work, range(workers), CPU)

    for _ in range(rounds):
        note("float32 by PyTorch's own", on_all(lambda i: repeat(factors[i], torch.mm)))
        note("float32", on_all(lambda i: repeat(factors[i], product)))
        note("bfloat16", on_all(lambda i: repeat(rounded[i], product)))
        note("generator", on_all(lambda i: stack.hidden[i].normal_(generator=torch.Generator())))
        note("final", on_all(lambda i: product(*finals[i])))
        note("read", on_all(lambda i: [part.mT.contiguous() for part in stack.hidden[i].split(128)]))
        for precision in ("float32", "bf16-mixed"):
            note("drawing", on_all(stack.redraw))
            descent = Descent(stack, bfloat16=precision == "bf16-mixed")
            note(f"training, {precision}", lambda descent=descent: train(descent, labels))  # type: ignore[misc]
            if not all(status.converged for status in descent.statuses):
                sys.exit(f"{precision}: a member has not converged")
            reached[precision] = {
                "steps": [status.steps for status in descent.statuses],
                "relative_losses": [status.relative_loss for status in descent.statuses],
            }
        note("evaluation", lambda: predict(stack, inputs))
    least = {name: min(values) for name, values in times.items()}
    operations = 2 * templates * bits * width
    rates = {
        name: PRODUCTS * 2 * templates * bits * units / least[name]
        for name in ("float32 by PyTorch's own", "float32", "bfloat16")
    }
    floors = {"drawing": least["generator"] * (templates + bits) / templates}
    for precision, name in (("float32", "float32"), ("bf16-mixed", "bfloat16")):
        # Three products a step and one for the first outputs. With bf16-mixed the last outputs are in float32.
        products = 3 * max(reached[precision]["steps"]) + 1
        floors[f"training, {precision}"] = operations * ((products - 1) / rates[name] + 1 / rates["float32"])
    floors["evaluation"] = least["final"] + least["read"]
    return {
        "task": repr(task),
        "width": width,
        "members": workers,
        "states": count,
        "rounds": rounds,
        "onednn": onednn_is_faster(),
        "gflops_of_a_core": {name: rate / 1e9 for name, rate in rates.items()},
        "stages": {
            name: {"seconds": least[name], "floor_seconds": floor, "share": floor / least[name]}
            for name, floor in floors.items()
        },
        "bf16_over_float32": least["training, bf16-mixed"] / least["training, float32"],
        "reached": reached,
        "environment": environment(CPU, "float32"),
    }


def train(descent: Descent, labels: torch.Tensor) -> None:
    """Train members to the end."""
    descent.bind(torch.eye(len(labels)), labels)
    while descent.running:
        descent.step()


if __name__ == "__main__":
    main()
