"""Predictions of the infinite ensemble per second, beside neural-tangents on the same states in the same run.

neural-tangents needs an old JAX, so it has an environment of its own:

    python -m venv nt-venv && nt-venv/bin/pip install -r benchmarks/neural-tangents-requirements.txt
    python benchmarks/against_neural_tangents.py --python nt-venv/bin/python

Both predict mean and variance for the same encoded states, from the same templates, in double precision; they
must agree to 1e-12. A prediction is one state, all of its bits. The peer is timed twice: one state a call, as
the paper's validation script uses it, and all states in one call, its best case. Ours start from the states
(matching the templates included): `NTKExecutor.predict` gives the same means and variances, `run` is the closed
loop of matching, predicting, decoding and comparing with the OR-machine. Rounds are interleaved; the median counts.
Ours run on one thread, the peer on as many as JAX takes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from timing import rate

AGREEMENT = 1e-12
STATES = 1 << 14
CLOSED_LOOP_STATES = 1 << 16


def peer() -> None:
    """Answer, as the other side, one JSON line for each task file named on standard input."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import neural_tangents as nt
    from neural_tangents import stax

    _, _, kernel = stax.serial(stax.Dense(1, W_std=1.0, b_std=None), stax.Relu(), stax.Dense(1, W_std=1.0, b_std=None))
    print(json.dumps({"neural-tangents": nt.__version__, "jax": jax.__version__}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        data = np.load(order["file"])
        inputs = data["inputs"][: order["states"]]
        predict = nt.predict.gradient_descent_mse_ensemble(kernel, np.eye(len(data["labels"])), data["labels"])

        def ask(rows: Any, predict: Callable[..., Any] = predict) -> Any:
            return jax.block_until_ready(predict(x_test=rows, get="ntk", compute_cov=True))

        rows = [inputs[i : i + 1] for i in range(len(inputs))] if order["single"] else [inputs]
        ask(rows[0])
        seconds = []
        answers = []
        for row in rows:
            started_at = time.perf_counter()
            answers.append(ask(row))
            seconds.append(time.perf_counter() - started_at)
        np.savez(
            order["out"],
            mean=np.concatenate([np.asarray(answer.mean) for answer in answers]),
            variance=np.concatenate([np.diagonal(np.asarray(answer.covariance)) for answer in answers]),
        )
        print(json.dumps({"seconds": sum(seconds), "predictions": len(inputs)}), flush=True)


def main() -> None:
    """Compare and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="the interpreter of the environment with neural-tangents")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median counts")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer()
        return
    if options.python is None:
        parser.error("--python: name the interpreter of the environment with neural-tangents")
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(options.python, options.rounds, Path(folder))
    for row in figures["tasks"]:
        print(
            f"{row['task']}: agree to {row['largest_difference']:.1e}; predictions a second: neural-tangents "
            f"{row['peer_single']:.3g} singly, {row['peer_batch']:.3g} in one batch; ours {row['predict']:.3g} by "
            f"predict ({row['predict_ratio']:,.0f} and {row['predict_batch_ratio']:,.0f} times), {row['run']:.3g} in "
            f"the closed loop ({row['run_ratio']:,.0f} times a single call)"
        )
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def compare(python: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Return all figures, task by task."""
    import torch

    from ntk_ensembles import SBN, Addition, EvaluationSet, Multiplication
    from ntk_ensembles.runs.results import environment
    from ntk_ensembles.theory import NTKExecutor, rollout

    torch.set_num_threads(1)
    process = subprocess.Popen(
        [python, __file__, "--peer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        sys.exit(f"{python} cannot import neural-tangents; see the head of this file")
    versions = json.loads(line)

    def ask(file: Path, states: int, single: bool, out: Path) -> float:
        """Predictions a second."""
        order = {"file": str(file), "states": states, "single": single, "out": str(out)}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        return float(answer["predictions"] / answer["seconds"])

    rows = []
    # The last number: how many states the peer gets singly, and in a batch.
    for task, single, batch in (
        (Addition(4), 20, 500),
        (Addition(10), 20, 500),
        (Multiplication(4), 20, 500),
        (SBN(16, 8), 5, 200),
    ):
        evaluation = EvaluationSet.sample(task, batch, 0)
        # Nothing matches the zero state; the peer's kernel is undefined there.
        keep = evaluation.matches.any(1)
        states, matches = evaluation.states[keep], evaluation.matches[keep]
        executor = NTKExecutor(task.templates)
        file, out = folder / "task.npz", folder / "answer.npz"
        labels = task.templates.labels.to(torch.float64).numpy()
        np.savez(file, inputs=task.templates.encode(matches).numpy(), labels=labels)
        gaussian = executor.predict(states)
        largest = 0.0
        many = states.repeat(-(-STATES // len(states)), 1)[:STATES]
        loop = states.repeat(-(-CLOSED_LOOP_STATES // len(states)), 1)[:CLOSED_LOOP_STATES]
        rates: dict[str, list[float]] = {"peer_single": [], "peer_batch": [], "predict": [], "run": []}
        # So few that no evaluation set comes to rest before they are done.
        steps = 4
        for _ in range(rounds):
            for name, count, alone in (("peer_single", single, True), ("peer_batch", batch, False)):
                rates[name].append(ask(file, count, alone, out))
                answer = np.load(out)
                size = len(answer["mean"])
                largest = max(
                    largest,
                    float(np.abs(answer["mean"] - gaussian.mean[:size].numpy()).max()),
                    float(np.abs(answer["variance"] - gaussian.variance[:size].numpy()).max()),
                )
            rates["predict"].append(
                rate(lambda: executor.predict(many), len(many))  # noqa: B023
            )
            rates["run"].append(rate(lambda: rollout(executor, loop, steps), len(loop) * steps))  # noqa: B023
        if largest > AGREEMENT:
            sys.exit(f"{task!r}: predictions differ by {largest:.2e}, more than {AGREEMENT:.0e}")
        medians = {name: statistics.median(values) for name, values in rates.items()}
        rows.append(
            {
                "task": repr(task),
                "templates": len(task.templates),
                "state_bits": task.layout.bits,
                "largest_difference": largest,
                **medians,
                "predict_ratio": medians["predict"] / medians["peer_single"],
                "predict_batch_ratio": medians["predict"] / medians["peer_batch"],
                "run_ratio": medians["run"] / medians["peer_single"],
            }
        )
    process.stdin.close()
    process.wait()
    return {
        "unit": "predictions (states) a second",
        "tasks": rows,
        "environment": environment(torch.device("cpu"), "float64"),
        "peer": {**versions, "machine": platform.machine()},
    }


if __name__ == "__main__":
    main()
