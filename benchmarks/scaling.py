"""How time and memory grow with the width n, the templates k, the bits m, the members, and the evaluation states.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

Each size is varied over two orders of magnitude while the others stay. A point is a process of its own on one thread:
processor time, which other programs hardly disturb, and the most memory beyond what the process began with. Members of
random templates are drawn, trained for three steps, evaluated, and added up, as in a run; for the number of members it
is a whole run of addition that keeps sums. An exponent is the slope of a straight line through the logarithms: over all
points, and over the last two alone, where fixed costs show least. A quarter of a minute on a quiet core.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ntk_ensembles import Addition, RunOptions, train
from ntk_ensembles.ensemble import DescentOptions, Recipe, predict, train_members
from ntk_ensembles.runs.groups import exact
from ntk_ensembles.runs.results import environment

FACTORS = (1, 4, 20, 100)
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of what is trained."""

    width: int = 4096
    templates: int = 160
    bits: int = 64
    states: int = 400


FIRST = {"width": 1024, "templates": 50, "bits": 16, "states": 200}
"""Smallest value of each size that is varied."""

MEMBERS_FIRST, MEMBERS_WIDTH = 32, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factors", type=int, nargs="+", default=FACTORS, help="sizes as multiples of the smallest")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    axes = []
    for name, first in {**FIRST, "members": MEMBERS_FIRST}.items():
        work = many_members if name == "members" else functools.partial(one_of_size, name)
        axis = measure(name, [first * factor for factor in options.factors], work)
        axes.append(axis)
        time_slopes, memory_slopes = axis["exponents"]["seconds"], axis["exponents"]["bytes"]
        print(
            f"{name} {axis['values'][0]} to {axis['values'][-1]}: "
            f"time^{time_slopes['all']:.2f} (at the end {time_slopes['last']:.2f}), "
            f"memory^{memory_slopes['all']:.2f} (at the end {memory_slopes['last']:.2f})",
            flush=True,
        )
    if options.out:
        figures = {"others": dataclasses.asdict(Sizes()), "axes": axes, "environment": environment(CPU, "float32")}
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(name: str, values: list[int], work: Callable[[int], object]) -> dict[str, Any]:
    """Return time, memory and their exponents for the values of one size."""
    # What happens once in a process is not of any size.
    work(values[0])
    points = [apart(work, value) for value in values]
    seconds, sizes = [point[0] for point in points], [point[1] for point in points]
    exponents = {"seconds": slopes(values, seconds), "bytes": slopes(values, sizes)}
    return {"size": name, "values": values, "seconds": seconds, "bytes": sizes, "exponents": exponents}


def slopes(values: list[int], measured: list[float]) -> dict[str, float]:
    """Return the slope of logarithms by least squares over all points, and between the last two."""
    x, y = torch.tensor(values).double().log(), torch.tensor(measured).double().log()
    x, y = x - x.mean(), y - y.mean()
    last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    return {"all": float((x * y).sum() / x.square().sum()), "last": last}


def apart(work: Callable[[int], object], value: int) -> tuple[float, float]:
    """Return processor seconds and bytes that some work takes in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def run() -> None:
        before, started_at = resident_bytes("VmRSS"), time.process_time()
        work(value)
        there.send((time.process_time() - started_at, max(resident_bytes("VmHWM") - before, 1)))

    process = context.Process(target=run)
    process.start()
    there.close()
    found: tuple[float, float] = here.recv()
    process.join()
    return found


def resident_bytes(name: str) -> int:
    """Return the memory that this process has now (VmRSS), or had at most (VmHWM); on Linux alone."""
    (line,) = (
        row for row in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if row.startswith(name)
    )
    return int(line.split()[1]) * 1024


def one_of_size(name: str, value: int) -> Tensor:
    """Do `one_member` with one of the sizes changed."""
    return one_member(dataclasses.replace(Sizes(), **{name: value}))


def one_member(sizes: Sizes) -> Tensor:
    """Train one member on random templates for three steps, evaluate it, and add it up."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (sizes.templates, sizes.bits), generator=generator).float()
    recipe = Recipe(labels, sizes.width, descent=DescentOptions(tolerance=1e-30, steps_max=3))
    stack, _ = train_members(recipe, [0], CPU)
    # As many templates match a state as in the tasks: about four, however many there are.
    chosen = torch.randint(sizes.templates, (sizes.states, 4), generator=generator)
    inputs = torch.zeros(sizes.states, sizes.templates).scatter_(1, chosen, 1 / math.sqrt(4))
    return exact(predict(stack, inputs)).sum(0)


def many_members(members: int) -> None:
    """Run an ensemble of small members from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        options = RunOptions(
            width=MEMBERS_WIDTH,
            ensemble=members,
            evaluation_states=100,
            tolerance=1e-3,
            keep_weights="none",
            keep_deviations="sums",
            out=f"{folder}/run",
        )
        train(Addition(4), options, console=Console(quiet=True))


if __name__ == "__main__":
    main()
