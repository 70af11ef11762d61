"""A task of one's own: Rule 110 on a ring of cells, learned from five templates a cell.

Rule 110 looks at a cell and its two neighbours and is known to be Turing-complete. Nothing in the package
knows of this file. From the repository's root:

    ntk-ensembles certify --task examples/rule110.py:Rule110
    python train.py --task examples/rule110.py:Rule110 --width 16384 --ensemble 16 --keep-weights all --out runs/rule110
    python examples/rule110.py runs/rule110 --out rule110.png

The last command draws the space-time diagram that the trained ensemble computes: each row is the decoded
mean of its members at the row above, fed back.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ntk_ensembles.errors import check_range
from ntk_ensembles.tasks import Task
from ntk_ensembles.templates import StateLayout, Template

# The neighbourhoods (left, cell, right) in which the next generation's cell is alive. Everything else
# follows from "a bit that no template sets becomes 0".
ALIVE = [(1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 1, 0), (0, 0, 1)]


# The type parameters say what an input is (a generation and how many steps to take) and what an output is.
class Rule110(Task[tuple[int, int], int]):
    """Steps of the elementary cellular automaton 110 on a ring: one bit and five templates a cell.

    Args:
        cells: Size of the ring, 3 to 1024.
        generations: Number of generations from each input, 1 to 65536.

    Raises:
        OptionError: An option is outside its range.
    """

    name = "rule110"

    # Each argument becomes a flag of train.py and certify, and its line above becomes the help.
    def __init__(self, cells: int = 64, generations: int = 32) -> None:
        check_range("cells", cells, 3, 1024)
        check_range("generations", generations, 1, 1 << 16)
        self.cells = cells
        self.generations = generations
        # The state: named fields of bits.
        self.layout = StateLayout(ring=cells)

    # What the networks are trained on. A template: if these bits are 1 and those 0, set these.
    def make_templates(self) -> Iterator[Template]:
        """Yield five templates a cell, one for each neighbourhood that makes it alive."""
        ring = self.layout["ring"]
        for cell in range(self.cells):
            around = [ring[(cell - 1) % self.cells], ring[cell], ring[(cell + 1) % self.cells]]
            for pattern in ALIVE:
                yield Template.rule(
                    f"alive after {''.join(map(str, pattern))}",
                    ones=[bit for bit, value in zip(around, pattern, strict=True) if value],
                    zeros=[bit for bit, value in zip(around, pattern, strict=True) if not value],
                    sets=[ring[cell]],
                )

    # What it is evaluated on: telling inputs first, then random ones for as long as the caller asks.
    def inputs(self, generator: random.Random) -> Iterator[tuple[int, int]]:
        """Yield one living cell, all of them, and then random generations."""
        yield 1 << (self.cells - 1), self.generations
        yield (1 << self.cells) - 1, self.generations
        while True:
            yield generator.getrandbits(self.cells), self.generations

    def initial_fields(self, task_input: tuple[int, int]) -> dict[str, int]:
        """Put the first generation into the ring."""
        return {"ring": task_input[0]}

    def read_output(self, fields: dict[str, int]) -> int:
        """Return the last generation."""
        return fields["ring"]

    # The meaning in plain integers, never by templates. Every evaluation input is checked against it before
    # training, so a wrong template is found at once. Bit 0 is the leftmost cell, so left neighbours come
    # from a shift up.
    def reference(self, task_input: tuple[int, int]) -> int:
        """Return the last generation: a cell lives if it differs from its right neighbour, or lives its left not."""
        full = (1 << self.cells) - 1
        ring, generations = task_input
        for _ in range(generations):
            left = (ring << 1 | ring >> (self.cells - 1)) & full
            right = (ring >> 1 | ring << (self.cells - 1)) & full
            ring = (ring ^ right) | (ring & ~left & full)
        return ring

    def num_micro_steps(self, task_input: tuple[int, int]) -> int:
        """Return one a generation."""
        return task_input[1]


def space_time(run: Path, generations: int) -> torch.Tensor:
    """Return generations of the ring as the run's ensemble computes them, one a row, from one living cell."""
    from ntk_ensembles import Ensemble
    from ntk_ensembles.theory import rollout

    ensemble = Ensemble.load(run)
    start = ensemble.task.layout.pack({"ring": 1 << (ensemble.task.layout.bits - 1)})
    trace = rollout(ensemble, start[None], generations, trace=True).trace
    assert trace is not None
    return trace.states[:, 0]


def main() -> None:
    """Draw the space-time diagram of a run's ensemble."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", type=Path, help="a run directory of train.py --task examples/rule110.py:Rule110")
    parser.add_argument("--generations", type=int, default=64, help="rows below the first")
    parser.add_argument("--out", type=Path, default=Path("rule110.png"), help="picture to write")
    options = parser.parse_args()
    rows = space_time(options.run, options.generations)
    task = Rule110(cells=rows.shape[1])
    last = task.reference((1 << (task.cells - 1), options.generations))
    same = task.layout.unpack(rows[-1])["ring"] == last
    figure = Figure(figsize=(4, 4 * len(rows) / task.cells + 0.3))
    axes = figure.subplots()
    axes.imshow(rows.numpy(), cmap="binary", interpolation="nearest")
    axes.set(xlabel="cell", ylabel="generation")
    axes.set_title("Rule 110, computed by a trained ensemble", fontsize="medium")
    figure.savefig(options.out, dpi=120, bbox_inches="tight")
    print(f"generation {options.generations} is {'exactly' if same else 'not'} Rule 110's; drawn to {options.out}")


if __name__ == "__main__":
    main()
