"""Time to train the same members to the same accuracy, beside what one would otherwise write.

    python benchmarks/rivals.py --out benchmarks/results/rivals.json

All begin at the same initial weights and stop when every member's squared training error is 1e-6 of its first:

- ``descent``: this package, `Descent` in float32 as `train` uses it. Nothing is tuned.
- ``sgd``: gradient descent on the squared error by `torch.func` (`vmap` over members, `grad` through the network) with
  the best constant step: the fastest of a few shares of 2/(λmin + λmax) of the analytic kernel.
- ``sgd, X = I``: the same, written for one-hot inputs, so that the first layer needs no product.
- ``adam``: as ``sgd``, with `torch.optim.Adam`, all else at its defaults, at the fastest rate of a grid.
- ``published``: what the paper's code does: one network at a time, standard parameterization with biases, the mean
  squared error, SGD at the rate 1e-3, 10,000 steps whatever the error. Its initial function is the same, and its loop
  is that of tensors already on the device (the published one goes through a data loader). Of long trainings the first
  steps are timed, and the whole is extrapolated.

On a CPU all use one thread, and its processor time counts: what else the machine does changes a ratio little. Searches
for a step or a rate are not counted; they look at the first member alone. A rival that is not there after STEPS_MAX
steps or SECONDS_MAX is given with how far it came; its time is then a lower bound. Rivals are timed in turns, each
right after ``descent``; medians count, and a ratio is that of neighbours.

The members' mean is then compared with the mean of the infinitely wide ensemble, for equal training error is not an
equal function: Adam moves weights out of the span of the gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional

from ntk_ensembles import SBN, Addition, EvaluationSet, LimitPrediction, Multiplication, Permutation, Task
from ntk_ensembles.ensemble import Descent, MLPStack, Recipe, TwoLayerMLP, predict
from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs import convergence_rows
from ntk_ensembles.runs.plan import MEMBERS_MAX, smallest_reaching
from ntk_ensembles.runs.reproduce import published_passings
from ntk_ensembles.runs.results import environment
from ntk_ensembles.theory import InverseKernel

TOLERANCE = 1e-6
STEPS_MAX, SECONDS_MAX = 4000, 120.0
STATES = 300
STEP_SHARES = (1.05, 1.0, 0.95, 0.9, 0.8, 0.6)
"""Of 2/(λmin + λmax), above which the analytic kernel predicts slower progress, and from a little above it none."""

ADAM_RATES = (0.1, 0.03, 0.3, 0.01, 1.0, 0.003)
PUBLISHED_RATE, PUBLISHED_STEPS, PUBLISHED_SECONDS = 1e-3, 10_000, 15.0
PUBLISHED_MEMBERS = published_passings()[30][0.999]
"""Members to 99.9% on the permutation of 30 bits, inputs with two ones, width 50,000 (the paper, appendix E)."""

Weights = dict[str, Tensor]
Forward = Callable[[Weights, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """What is trained: a task, a width and a number of members, and how often it is timed."""

    task: Task[Any, Any]
    width: int
    members: int
    rounds: int
    rivals: tuple[str, ...] = ("sgd", "sgd, X = I", "adam")


CASES = (
    Case(Addition(10), 4096, 16, 3),
    Case(Multiplication(4), 8192, 8, 3),
    Case(SBN(16, 8), 4096, 1, 1),
    # The one that was published.
    Case(Permutation(30, ones=2), 50_000, 2, 3, rivals=()),
)


@dataclass
class Training:
    """How the training of some members went."""

    seconds: float
    steps: int
    relative_errors: list[float]
    stack: MLPStack | None = field(repr=False, default=None)

    @property
    def reached(self) -> bool:
        """Whether every member reached the tolerance."""
        return all(error <= TOLERANCE for error in self.relative_errors)


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class Contest:
    """One case: its members' initial weights, and every way to train them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        task = case.task
        self.labels = task.templates.labels.to(torch.float32).to(device)
        self.inputs = torch.eye(len(self.labels), device=device)
        self.recipe = Recipe(self.labels.cpu(), case.width)
        self.initial = self.recipe.make_stack(range(case.members), device).requires_grad_(False)
        self.limit = LimitPrediction(task, EvaluationSet.sample(task, STATES, 0))
        # Only its forward pass is used, which needs no memory of its own.
        templates, bits = self.labels.shape
        network = TwoLayerMLP(templates, bits, case.width, device="meta")

        def plain(weights: Weights, inputs: Tensor) -> Tensor:
            outputs: Tensor = functional_call(network, weights, (inputs,))
            return outputs

        def one_hot(weights: Weights, inputs: Tensor) -> Tensor:
            return torch.relu(weights["hidden"].mT) @ weights["readout"].mT / math.sqrt(templates * case.width)

        self.plain: Forward = plain
        self.one_hot: Forward = one_hot

    def copy(self, members: int | None = None) -> MLPStack:
        """Return the first members at their initial weights."""
        stack = self.recipe.make_stack(range(members or self.case.members), self.device, draw=False)
        with torch.no_grad():
            stack.hidden.copy_(self.initial.hidden[: len(stack)])
            stack.readout.copy_(self.initial.readout[: len(stack)])
        return stack

    def descent(self) -> Training:
        """Train by this package."""
        stack = self.copy()
        started = clock(self.device)
        descent = Descent(stack, self.recipe.descent)
        descent.bind(self.inputs, self.labels)
        while descent.running:
            descent.step()
        seconds = clock(self.device) - started
        statuses = descent.statuses
        return Training(
            seconds, max(status.steps for status in statuses), [status.relative_loss for status in statuses], stack
        )

    def first_order(
        self,
        forward: Forward,
        rate: float,
        *,
        adam: bool = False,
        members: int | None = None,
        steps_max: int = STEPS_MAX,
    ) -> Training:
        """Train by gradients of the squared error, all members at once."""
        stack = self.copy(members).requires_grad_(True)
        parameters = {"hidden": stack.hidden, "readout": stack.readout}

        def loss(weights: Weights, inputs: Tensor, labels: Tensor) -> Tensor:
            return (forward(weights, inputs) - labels).square().sum() / 2

        gradient = vmap(grad_and_value(loss), in_dims=(0, None, None))
        kind: Any = torch.optim.Adam if adam else torch.optim.SGD
        optimizer = kind(parameters.values(), lr=rate)
        started = clock(self.device)
        first: list[float] = []
        steps = 0
        with torch.no_grad():
            while True:
                found, losses = gradient(parameters, self.inputs, self.labels)
                errors = losses.tolist()
                first = first or errors
                relative = [error / begin for error, begin in zip(errors, first, strict=True)]
                late = steps >= steps_max or clock(self.device) - started > SECONDS_MAX
                # Written so that an error that is not a number ends it.
                if late or not max(relative) <= 1e4 or max(relative) <= TOLERANCE:
                    break
                for name, parameter in parameters.items():
                    parameter.grad = found[name]
                optimizer.step()
                steps += 1
        return Training(clock(self.device) - started, steps, relative, stack.requires_grad_(False))

    def search(self, rates: dict[float, float], *, adam: bool) -> tuple[float, dict[str, Any]]:
        """Return the rate that takes the fewest steps with the first member, and what each took.

        The steps are those of any forward pass, so the quick one is used. A rate is left, with None, once it is slower
        than the best.
        """
        best, fewest, tried = math.nan, STEPS_MAX, {}
        for name, rate in rates.items():
            found = self.first_order(self.one_hot, rate, adam=adam, members=1, steps_max=fewest)
            tried[f"{name:g}"] = found.steps if found.reached else None
            if found.reached and (found.steps < fewest or math.isnan(best)):
                best, fewest = rate, found.steps
        return best, tried

    def published_network(self) -> nn.Module:
        """Return the first member as the published recipe has it: the same function in standard parameterization."""
        templates, bits = self.labels.shape
        layers = nn.Linear(templates, self.case.width), nn.Linear(self.case.width, bits)
        with torch.no_grad():
            for layer, weights in zip(layers, (self.initial.hidden[0], self.initial.readout[0]), strict=True):
                layer.weight.copy_(weights / math.sqrt(weights.shape[1]))
                layer.bias.zero_()
        return nn.Sequential(layers[0], nn.ReLU(), layers[1]).to(self.device)

    def published(self) -> dict[str, Any]:
        """Time the published recipe on the first member."""
        model = self.published_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=PUBLISHED_RATE)
        first, steps = 0.0, 0
        started = clock(self.device)
        while steps < PUBLISHED_STEPS and clock(self.device) - started < PUBLISHED_SECONDS:
            optimizer.zero_grad()
            loss = functional.mse_loss(model(self.inputs), self.labels)
            loss.backward()
            optimizer.step()
            first = first or loss.item()
            steps += 1
        seconds = clock(self.device) - started
        return {
            "rate": PUBLISHED_RATE,
            "steps": PUBLISHED_STEPS,
            "steps_timed": steps,
            "relative_error_after_steps_timed": loss.item() / first,
            "member_seconds": seconds / steps * PUBLISHED_STEPS,
            "extrapolated": steps < PUBLISHED_STEPS,
        }

    def quality(self, stack: MLPStack) -> dict[str, float]:
        """Return how the members' mean does on evaluation states."""
        deviations = predict(stack, self.limit.inputs).cpu() - self.limit.mean.float()
        row = convergence_rows(self.limit, deviations, [len(stack)])[0]
        return {"exact_match": row["exact_match"]["midpoint"], "rms_deviation": row["rms_deviation"]}

    def run(self) -> dict[str, Any]:
        """Return the figures of this case."""
        smallest, largest = InverseKernel.for_one_hot(len(self.labels)).eigenvalue_bounds
        step = 2 / (smallest + largest)
        ways: dict[str, tuple[dict[str, Any], Callable[[], Training]]] = {}
        if self.case.rivals:
            rate, tried = self.search({share: share * step for share in STEP_SHARES}, adam=False)
            about = {"step": rate, "2/(λmin + λmax)": step, "steps of the first member by share of it": tried}
            ways["sgd"] = about, lambda: self.first_order(self.plain, rate)
            ways["sgd, X = I"] = about, lambda: self.first_order(self.one_hot, rate)
            adam, tried_adam = self.search({rate: rate for rate in ADAM_RATES}, adam=True)
            about_adam = {"rate": adam, "steps of the first member by rate": tried_adam}
            ways["adam"] = about_adam, lambda: self.first_order(self.plain, adam, adam=True)
        self.descent()
        times: dict[str, list[Training]] = {name: [] for name in ("descent", *ways)}
        ratios: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.case.rounds):
            if not ways:
                times["descent"].append(self.descent())
            for name, (_, train) in ways.items():
                ours, rival = self.descent(), train()
                times["descent"].append(ours)
                times[name].append(rival)
                ratios[name].append(rival.seconds / ours.seconds)
        task = self.case.task
        return {
            "task": {"name": task.name, **task.options},
            "templates": len(self.labels),
            "state_bits": self.labels.shape[1],
            "width": self.case.width,
            "members": self.case.members,
            "rounds": self.case.rounds,
            "states": len(self.limit.mean),
            "rms_deviation_at_infinite_width": self.limit.rms_deviation(self.case.members),
            "members_to_99.9_percent": smallest_reaching(self.limit, "midpoint", 0.999, MEMBERS_MAX),
            "methods": {
                name: self.describe(runs, ways[name][0] if name in ways else {}, ratios.get(name))
                for name, runs in times.items()
            },
            "published": self.published(),
        }

    def describe(self, runs: list[Training], about: dict[str, Any], ratios: list[float] | None) -> dict[str, Any]:
        """Return the figures of one way to train."""
        last = runs[-1]
        assert last.stack is not None
        return {
            **about,
            "reached": last.reached,
            "steps": last.steps,
            "relative_error": max(last.relative_errors),
            "seconds": statistics.median(run.seconds for run in runs),
            "seconds_spread": [min(run.seconds for run in runs), max(run.seconds for run in runs)],
            "times_descent": statistics.median(ratios) if ratios else 1.0,
            **self.quality(last.stack),
        }


def show(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['task']}, width {row['width']}, {row['members']} members"
    for name, found in row["methods"].items():
        reached = "" if found["reached"] else " NOT reached"
        yield (
            f"  {name}: {found['steps']} steps, {found['seconds']:.3g} s ({found['times_descent']:.3g} times), "
            f"error {found['relative_error']:.1e}{reached}, exact {found['exact_match']:.2%}, "
            f"RMS {found['rms_deviation']:.2e}"
        )
    found = row["published"]
    yield (
        f"  published, a member: {found['member_seconds']:.3g} s, "
        f"error {found['relative_error_after_steps_timed']:.1e} after {found['steps_timed']} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where to train, cpu or cuda")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = []
    for case in CASES:
        rows.append(Contest(case, device).run())
        print("\n".join(show(rows[-1])), flush=True)
    figures = {
        "tolerance": TOLERANCE,
        "steps_max": STEPS_MAX,
        "seconds_max": SECONDS_MAX,
        "published_members": PUBLISHED_MEMBERS,
        "cases": rows,
        "seconds": time.perf_counter() - started,
        "environment": environment(device, "float32"),
    }
    if options.out:
        text = json.dumps(figures, indent=2) + "\n"
        write_atomically(options.out, lambda part: part.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
