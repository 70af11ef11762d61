"""What a very large run costs in time, storage and traffic: a simulation, from rates that are stated, not measured.

    python benchmarks/large_run.py
    python benchmarks/large_run.py --members 100000 --gpus 1

GPUs take cohorts as the processes of a run do, train and evaluate them at the given rates, and write one file for each.
Files of neighbours are joined as in a run (`ntk_ensembles.runs.groups`), and every byte written or read is counted.
Operations and bytes of memory are those of `docs/large-runs.md`.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from dataclasses import dataclass, fields
from pathlib import Path

from ntk_ensembles.runs.groups import aligned_blocks, sibling_of

MEMBER_BYTES = 185
"""What a file keeps of each member beside the sum: how its training went, and what two groups decode."""


@dataclass(frozen=True)
class Assumptions:
    """Sizes of the run, by default those of the headline, and rates of one GPU."""

    members: int = 1 << 20
    """Members of the ensemble."""
    gpus: int = 64
    """GPUs, each with a process of its own."""
    width: int = 65536
    """Hidden units n."""
    templates: int = 805
    """Templates k."""
    bits: int = 189
    """Bits m of a state."""
    states: int = 1000
    """Evaluation states."""
    steps: int = 3
    """Steps of training."""
    cohort: int = 64
    """Members that a GPU holds at once."""
    flops: float = 1e14
    """Operations a second in matrix products, a fifth of what an H100 is sold as for dense TF32 (assumed)."""
    bytes_per_second: float = 2e12
    """Memory traffic, 60% of what an H100 is sold as (assumed)."""
    draw_per_second: float = 1e11
    """Normal numbers drawn a second (assumed)."""
    measure_per_second: float = 1e8
    """Outputs of means that a process decodes and adds up a second; two busy cores of a Xeon do (measured)."""
    spread: float = 0.1
    """Standard deviation of a cohort's time, as a share of it (assumed)."""


@dataclass(frozen=True)
class Costs:
    """What the run costs.

    Attributes:
        member_seconds: Time of a GPU for one member.
        hours: Time from start to end.
        gpu_hours: The same, times the GPUs.
        files_most: Files of members that lie in the directory at the same time, at most.
        files: Files at the end.
        stored_bytes: Their bytes at the end.
        stored_bytes_most: Bytes of files at the same time, at most.
        written_bytes: Bytes written over the whole run.
        read_bytes: Bytes read to join files.
        deviations_bytes: What deviations of each member would take instead.
        plan_bytes: What the first process sends to each of the others: the only traffic between them.
        statistics_bytes: Memory of what is loaded at the end.
    """

    member_seconds: float
    hours: float
    gpu_hours: float
    files_most: int
    files: int
    stored_bytes: int
    stored_bytes_most: int
    written_bytes: int
    read_bytes: int
    deviations_bytes: int
    plan_bytes: int
    statistics_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Assumptions()
    for field in fields(Assumptions):
        default = getattr(defaults, field.name)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    options = vars(parser.parse_args())
    out = options.pop("out")
    assumed = Assumptions(**options)
    costs = simulate(assumed)
    for name, value in vars(costs).items():
        print(f"{name:20} {_shown(name, value)}")
    if out:
        text = json.dumps({"measured": False, "assumed": vars(assumed), "costs": vars(costs)}, indent=2)
        out.write_text(text + "\n", encoding="utf-8")


def member_seconds(assumed: Assumptions) -> float:
    """Return the time of one member: of each part, the slower of arithmetic and memory traffic."""
    k, m, n = assumed.templates, assumed.bits, assumed.width
    weights, outputs = n * (k + m), assumed.states * m
    draw = max(weights / assumed.draw_per_second, 4 * weights / assumed.bytes_per_second)
    # Three products a step, one for the first outputs; weights are read and written once a step.
    train = max(
        (3 * assumed.steps + 1) * 2 * n * k * m / assumed.flops,
        (2 * assumed.steps + 1) * 4 * weights / assumed.bytes_per_second,
    )
    # Two products with all states; relu(W1·x) is written and read.
    evaluate = max(
        2 * n * assumed.states * (k + m) / assumed.flops,
        4 * (weights + 2 * n * assumed.states) / assumed.bytes_per_second,
    )
    # A member and half of a mean for it, as groups of 2, 4, 8, … have half, a quarter, … as many means.
    return draw + train + evaluate + 2 * outputs / assumed.measure_per_second


def simulate(assumed: Assumptions) -> Costs:
    """Return the costs of a run whose processes take cohorts in turn and join files as they finish."""
    cohorts = aligned_blocks(range(assumed.members), assumed.cohort)
    each = member_seconds(assumed)
    order = random.Random(0)
    shares = [iter(cohorts[rank :: assumed.gpus]) for rank in range(assumed.gpus)]
    sums_bytes = 8 * assumed.states * assumed.bits

    def size(members: int) -> int:
        return sums_bytes + MEMBER_BYTES * members

    finishing: list[tuple[float, int, int, int]] = []

    def begin(rank: int, now: float) -> None:
        if cohort := next(shares[rank], None):
            took = each * len(cohort) * max(order.gauss(1, assumed.spread), 0.1)
            heapq.heappush(finishing, (now + took, rank, cohort[0], len(cohort)))

    for rank in range(assumed.gpus):
        begin(rank, 0.0)
    files: set[tuple[int, int]] = set()
    now, stored, most, files_most, written, read = 0.0, 0, 0, 0, 0, 0
    while finishing:
        now, rank, first, members = heapq.heappop(finishing)
        files.add((first, members))
        stored += size(members)
        written += size(members)
        files_most, most = max(files_most, len(files)), max(most, stored)
        while (sibling := sibling_of(first, members)) in files:
            read += 2 * size(members)
            written += size(2 * members)
            most = max(most, stored + size(2 * members))
            files -= {sibling, (first, members)}
            stored += size(2 * members) - 2 * size(members)
            first, members = min(first, sibling[0]), 2 * members
            files.add((first, members))
        begin(rank, now)
    return Costs(
        member_seconds=each,
        hours=now / 3600,
        gpu_hours=now / 3600 * assumed.gpus,
        files_most=files_most,
        files=len(files),
        stored_bytes=stored,
        stored_bytes_most=most,
        written_bytes=written,
        read_bytes=read,
        deviations_bytes=2 * assumed.members * assumed.states * assumed.bits,
        plan_bytes=len(json.dumps([cohorts[rank :: assumed.gpus] for rank in range(assumed.gpus)])),
        statistics_bytes=sum(size(members) for _, members in files),
    )


def _shown(name: str, value: float) -> str:
    if name.endswith("_bytes") or name.endswith("_bytes_most"):
        return f"{value / 1e9:.4g} GB" if value >= 1e9 else f"{value / 1e6:.4g} MB"
    return f"{value:.4g}"


if __name__ == "__main__":
    main()
