"""How fast a GPU is: the headline's stages beside their floors, and ratios by which its engines are to be decided.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --out try.json --device cpu --small

Each section runs in a process of its own, within a budget of time, and writes what it has found as soon as it has it.
What fails (out of memory, no compiler, not supported) is recorded in its place, and the rest goes on. All of them take
less than eight minutes. With --small they show on a CPU that everything runs; such times mean nothing.
benchmarks/README.md says what each key means.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from ntk_ensembles import SBN, Addition, MLPStack
from ntk_ensembles.ensemble import Descent, DescentOptions, MemberStatus, OneHotEngine, Recipe, choose_cohort, predict
from ntk_ensembles.ensemble import engines as package_engines
from ntk_ensembles.ensemble.network import member_seed
from ntk_ensembles.ensemble.products import add_product, units_at_once
from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs.results import environment
from ntk_ensembles.tasks import EvaluationSet, Task

ROOT = Path(__file__).parents[1]
SECONDS_MAX = 440
"""Time after which no section begins. What runs then is ended half a minute later."""
SECONDS_OF_GRACE = 30
ROUNDS = 3
"""Rounds in which variants are timed in turns; the least time counts."""
CALLS_SECONDS = 0.1
"""Time of the calls that are timed together, so that waiting for the GPU at their end does not count."""
FAR = 0.01
"""Relative loss down to which a step with TF32 operands is good enough, as it is with bfloat16 ones."""
PIECE = 1 << 16
"""Numbers that members are drawn by at once."""

Operands = Literal["float32", "tf32"]
WAYS = ("float32", "tf32", "tf32-mixed", "bf16-mixed")
"""How members are trained. ``tf32-mixed``: steps with TF32 operands as long as the loss is far from its end, then
float32. The others: throughout, or as the package's precision of that name."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: the headline and small members, or the same in miniature."""

    task: SBN | Addition
    width: int
    members: int
    states: int
    at_once: int
    """Members by which variants are compared."""
    units: tuple[int, ...]
    together: tuple[int, ...]
    """Numbers of members to train at once."""
    small_task: Addition
    small_width: int
    small_together: tuple[int, ...]

    @classmethod
    def of(cls, small: bool) -> Sizes:
        """Return the sizes of the headline, or small ones that show that everything runs."""
        if small:
            return cls(Addition(2), 96, 4, 10, 2, (32, 96), (1, 2), Addition(2), 64, (2, 4))
        return cls(
            SBN(16, 8),
            65536,
            512,
            1000,
            16,
            (512, 1024, 2048, 4096, 8192, 16384),
            (1, 2, 4, 8, 16, 32, 64, 128),
            Addition(10),
            2048,
            (64, 256, 1024, 4096),
        )


@dataclass
class Bench:
    """One section: where it computes, what was found before, and what it finds."""

    device: torch.device
    small: bool
    deadline: float
    """When its time is over, as from `time.time`."""
    earlier: Mapping[str, Any] = field(default_factory=dict)
    """Sections that are done, by name."""
    save: Callable[[dict[str, Any]], None] = lambda found: None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> Sizes:
        """What is measured."""
        return Sizes.of(self.small)

    @property
    def on_gpu(self) -> bool:
        """Whether this is a GPU and not a rehearsal on the CPU."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.time()

    def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """Record and save what is found, or why there is nothing."""
        self.found[name] = self.outcome(work)
        self.save(self.found)

    def outcome(self, work: Callable[[], Any]) -> Any:
        """Return what is found, or why there is nothing."""
        if self.left() <= 0:
            return {"left_out": "no time was left"}
        try:
            return work()
        except Exception as error:  # whatever it is, the other figures are worth having
            failure = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"}
        # After the handler, whose exception holds the tensors of the attempt.
        if self.on_gpu:
            torch.cuda.empty_cache()
        return failure

    def wait(self) -> None:
        """Wait until the GPU has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the time of one call, waited for."""
        self.wait()
        started_at = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started_at

    def least_seconds(self, work: Callable[[], object], rounds: int = ROUNDS) -> float:
        """Return the least time of a call: one to warm up, then rounds of as many as take a tenth of a second."""
        work()
        wanted = CALLS_SECONDS / 100 if self.small else CALLS_SECONDS
        calls = max(1, min(100, int(wanted / max(self.seconds(work), 1e-6))))
        return min(self.seconds(lambda: [work() for _ in range(calls)]) for _ in range(rounds)) / calls

    def labels(self) -> Tensor:
        """Return the headline's labels."""
        return self.sizes.task.templates.labels.float().to(self.device)

    def inputs(self, task: Task[Any, Any] | None = None) -> Tensor:
        """Return evaluation states of a task, by default the headline's, encoded."""
        task = task or self.sizes.task
        evaluation = EvaluationSet.sample(task, self.sizes.states, 0)
        return task.templates.encode(evaluation.matches).float().to(self.device)

    def stack(self, members: int | Sequence[int], **changes: Any) -> MLPStack:
        """Return members of the headline."""
        (templates, bits), width = self.sizes.task.templates.labels.shape, self.sizes.width
        return MLPStack(templates, bits, width, members, device=self.device, **changes).requires_grad_(False)

    def small_stack(self, members: int) -> MLPStack:
        """Return small members."""
        templates, bits = self.sizes.small_task.templates.labels.shape
        return MLPStack(templates, bits, self.sizes.small_width, members, device=self.device).requires_grad_(False)

    def compare(self, variants: Mapping[str, Callable[[], Tensor]], restore: Callable[[], object]) -> dict[str, Any]:
        """Return time, memory and deviation of variants beside the first of them, the plain path.

        Args:
            variants: Ways to compute the same tensor; they may change weights.
            restore: Function that sets the weights back, so that all begin alike.
        """
        rows: dict[str, Any] = {}
        working: dict[str, Callable[[], Tensor]] = {}
        plain: Tensor | None = None

        def check(name: str) -> dict[str, Any]:
            nonlocal plain
            restore()
            self.wait()
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
                before = torch.cuda.memory_allocated(self.device)
            found = variants[name]().double()
            if plain is None:
                plain = found
            row = {"deviation": float((found - plain).abs().max() / plain.square().mean().sqrt())}
            if self.on_gpu:
                row["working_bytes"] = torch.cuda.max_memory_allocated(self.device) - before
            working[name] = variants[name]
            return row

        for name in variants:
            rows[name] = self.outcome(lambda name=name: check(name))  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in working}
        for i in range(ROUNDS):
            for name, work in working.items():
                if self.left() > 0 or i == 0:
                    times[name].append(self.least_seconds(work, 1))
        restore()
        for name, values in times.items():
            if values:
                rows[name]["seconds"] = min(values)
        first = next(iter(rows.values())).get("seconds")
        for row in rows.values():
            if first and "seconds" in row:
                row["times_plain"] = row["seconds"] / first
        return rows


@contextmanager
def products_of(operands: Operands) -> Iterator[None]:
    """Compute float32 products with operands of this type meanwhile.

    By the setting that PyTorch's compiler reads as well; with the newer one, of each backend, compiling fails.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if operands == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_of_halves(left: Tensor, right: Tensor) -> Tensor:
    """Return a float32 product by three with TF32 operands: what TF32 cuts off an operand is an operand of its own."""
    (left_high, left_low), (right_high, right_low) = halves(left), halves(right)
    with products_of("tf32"):
        return left_high @ right_high + (left_high @ right_low + left_low @ right_high)


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 numbers as a sum of two: the 10 bits of the mantissa that TF32 reads, and the rest."""
    high = (values.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)
    return high, values - high


def train(stack: MLPStack, labels: Tensor, way: str = "float32") -> list[MemberStatus]:
    """Train members to the end, all together, one of `WAYS`; return how they fared."""
    descent = Descent(stack, DescentOptions(), bfloat16=way == "bf16-mixed", together=len(stack))
    with products_of("tf32" if way == "tf32" else "float32"):
        descent.bind(torch.eye(len(labels), device=labels.device), labels)
    while descent.running:
        far = all(status.relative_loss >= FAR for status in descent.statuses if status.running)
        with products_of("tf32" if way == "tf32" or (way == "tf32-mixed" and far) else "float32"):
            descent.step()
    return descent.statuses


# ---- the machine, its rates, and the headline beside them ----


def machine(bench: Bench) -> None:
    """Name the device and measure its rates at the headline's shapes."""
    sizes = bench.sizes
    (k, m), n = sizes.task.templates.labels.shape, sizes.width
    bench.attempt("environment", lambda: environment(bench.device, "float32"))
    if bench.on_gpu:
        bench.attempt("gpu", lambda: gpu(bench.device))
    hidden, readout = torch.randn(n, k, device=bench.device), torch.randn(m, n, device=bench.device)
    cotangents, inputs = torch.randn(m, k, device=bench.device), bench.inputs()
    exact = readout.double() @ hidden.double()

    def rates(multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> dict[str, float]:
        w1, w2, p, x = (values.to(dtype) for values in (hidden, readout, cotangents, inputs))
        sums = multiply(x, w1.mT).to(dtype)
        step = bench.least_seconds(lambda: (multiply(w2.mT, p), multiply(p, w1.mT), multiply(w2, w1)))
        evaluation = bench.least_seconds(lambda: (multiply(x, w1.mT), multiply(sums, w2.mT)))
        return {
            "training_flops": 6 * k * m * n / step,
            "evaluation_flops": 2 * sizes.states * n * (k + m) / evaluation,
            "relative_error": float((multiply(w2, w1) - exact).square().mean().sqrt() / exact.square().mean().sqrt()),
        }

    def with_tf32() -> dict[str, float]:
        with products_of("tf32"):
            return rates(torch.mm)

    bench.attempt("float32", lambda: rates(torch.mm))
    bench.attempt("tf32", with_tf32)
    bench.attempt("bf16", lambda: rates(torch.mm, torch.bfloat16))
    bench.attempt(
        "bf16, float32 results",
        lambda: rates(lambda left, right: torch.mm(left, right, out_dtype=torch.float32), torch.bfloat16),
    )
    bench.attempt("three tf32 products", lambda: rates(product_of_halves))
    other = torch.empty_like(hidden)
    bench.attempt(
        "copy", lambda: {"bytes_per_second": 2 * hidden.nbytes / bench.least_seconds(lambda: other.copy_(hidden))}
    )
    bench.attempt("normal", lambda: {"numbers_per_second": hidden.numel() / bench.least_seconds(hidden.normal_)})


def gpu(device: torch.device) -> dict[str, Any]:
    """Return what kind of GPU this is."""
    found = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "compute_capability": f"{found.major}.{found.minor}",
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "driver": driver or None,
    }


def headline(bench: Bench) -> None:
    """Run the headline's command, as a user does."""
    sizes = bench.sizes
    task = f"--task addition --bits {sizes.task.bits}" if isinstance(sizes.task, Addition) else "--task sbn"

    def run(precision: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as directory:
            command = (
                f"train.py {task} --width {sizes.width} --ensemble {sizes.members} --precision {precision} "
                f"--evaluation-states {sizes.states} --accelerator {'gpu' if bench.on_gpu else 'cpu'}"
            )
            arguments = [sys.executable, *command.split(), "--out", f"{directory}/run"]
            started_at = time.perf_counter()
            ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=max(bench.left(), 1))
            wall = time.perf_counter() - started_at
            if ended.returncode:
                raise RuntimeError((ended.stderr.strip() or ended.stdout.strip()).splitlines()[-1])
            results = json.loads(Path(directory, "run", "results.json").read_text(encoding="utf-8"))
        return {"command": f"python {command}", "wall_seconds": wall, "results": results}

    for precision in ("32-true", "bf16-mixed"):
        bench.attempt(precision, lambda precision=precision: run(precision))  # type: ignore[misc]


def stages(bench: Bench) -> None:
    """Draw, train in each way and evaluate the headline's members, cohort by cohort, beside the floors."""
    sizes, labels, inputs = bench.sizes, bench.labels(), bench.inputs()
    size = choose_cohort(Recipe(labels.cpu(), sizes.width), sizes.states, sizes.members, bench.device)
    stack = bench.stack(range(min(size, sizes.members)))
    reference, initial = float64_members(bench, min(2, len(stack)), labels, inputs)
    for way in WAYS:
        train(bench.stack(1), labels, way)  # to warm up
    times: dict[str, float] = {}
    reached: dict[str, Any] = {}
    done = 0
    while done + len(stack) <= sizes.members and (not done or bench.left() > 0):
        stack.indices = tuple(range(done, done + len(stack)))
        for way in WAYS:
            drawn = bench.seconds(lambda: [stack.redraw(position) for position in range(len(stack))])
            times["drawing"] = times.get("drawing", 0) + drawn / len(WAYS)
            statuses: list[MemberStatus] = []
            trained = bench.seconds(lambda way=way, into=statuses: into.extend(train(stack, labels, way)))  # type: ignore[misc]
            times[f"training, {way}"] = times.get(f"training, {way}", 0) + trained
            outputs: list[Tensor] = []
            evaluated = bench.seconds(lambda into=outputs: into.append(predict(stack, inputs)))  # type: ignore[misc]
            times["evaluation"] = times.get("evaluation", 0) + evaluated / len(WAYS)
            if not done:
                reached[way] = {
                    "steps": max(status.steps for status in statuses),
                    "converged": sum(status.converged for status in statuses),
                    "relative_loss_believed": max(status.relative_loss for status in statuses),
                    "relative_loss_in_float64": max(
                        loss_in_float64(stack, i, labels) / initial[i] for i in range(len(reference))
                    ),
                    "rms_from_float64": float(
                        (outputs[0][: len(reference)].double() - reference).square().mean().sqrt()
                    ),
                }
        done += len(stack)
        steps = {way: found["steps"] for way, found in reached.items()}
        bench.found.update(
            cohort=len(stack),
            members_measured=done,
            members=sizes.members,
            rms_output=float(reference.square().mean().sqrt()),
            reached=reached,
            stages=beside_floors(bench, {name: value / done for name, value in times.items()}, steps),
        )
        bench.save(bench.found)


def float64_members(bench: Bench, count: int, labels: Tensor, inputs: Tensor) -> tuple[Tensor, list[float]]:
    """Return outputs of the first members, trained in double precision from the same weights, and first losses."""
    stack = bench.stack(range(count), dtype=torch.float64)
    statuses = train(stack, labels.double())
    return predict(stack, inputs), [status.losses[0] for status in statuses]


def loss_in_float64(stack: MLPStack, position: int, labels: Tensor) -> float:
    """Return a member's mean squared training error, computed in double precision from its weights."""
    one = slice(position, position + 1)
    outputs = OneHotEngine(stack.hidden[one].double(), stack.readout[one].double()).outputs()
    return float((outputs[0] - labels.double().mT).square().mean())


def beside_floors(bench: Bench, seconds: Mapping[str, float], steps: Mapping[str, int]) -> dict[str, Any]:
    """Return each stage's seconds a member and for all members, its floors, and the larger floor's share.

    Args:
        bench: The section, which knows the rates that were measured.
        seconds: Time of one member by stage.
        steps: Steps that the ways to train took.
    """
    sizes, rates = bench.sizes, bench.earlier.get("machine", {})
    (k, m), n = sizes.task.templates.labels.shape, sizes.width

    def rate(name: str, key: str) -> float:
        return float(rates.get(name, {}).get(key, math.nan))

    bandwidth = rate("copy", "bytes_per_second")
    floors = {
        "drawing": {
            "generator": n * (k + m) / rate("normal", "numbers_per_second"),
            "bytes": 4 * n * (k + m) / bandwidth,
        },
        "evaluation": {
            "operations": 2 * sizes.states * n * (k + m) / rate("float32", "evaluation_flops"),
            "bytes": 4 * n * (k + m) / bandwidth,
        },
    }
    product = 2 * k * m * n
    for way, count in steps.items():
        coarse = rate({"float32": "float32", "bf16-mixed": "bf16"}.get(way, "tf32"), "training_flops")
        # Three products a step and one for the first outputs; the mixed ways' last is in float32.
        last = coarse if way == "tf32" else rate("float32", "training_flops")
        floors[f"training, {way}"] = {
            "operations": product * (3 * count / coarse + 1 / last),
            "bytes": 4 * n * k * (2 * count + 1) / bandwidth,
        }
    found: dict[str, Any] = {}
    for name, value in seconds.items():
        known = {key: floor for key, floor in floors[name].items() if math.isfinite(floor)}
        share = max(known.values()) / value if known else None
        found[name] = {"seconds": value, "seconds_of_all": value * sizes.members, "floors": known, "share": share}
    return found


# ---- what measurement decides ----


def layouts(bench: Bench) -> None:
    """Compare a loop over members with a call for all, and sizes of slices, for one step in each type."""
    stack, labels = bench.stack(bench.sizes.at_once), bench.labels()
    hidden, readout, restore = kept(stack)
    cotangents = 1e-3 * torch.randn(len(stack), *labels.mT.shape, device=bench.device)
    plain_units = units_at_once(bench.device)

    def step(loop: bool, units: int, bfloat16: bool) -> Tensor:
        with patch.object(package_engines, "units_at_once", return_value=units):
            if not loop:
                return OneHotEngine(hidden, readout, bfloat16=bfloat16).step(cotangents, coarse=bfloat16)
            members = (slice(i, i + 1) for i in range(len(hidden)))
            return torch.cat(
                [
                    OneHotEngine(hidden[one], readout[one], bfloat16=bfloat16).step(cotangents[one], coarse=bfloat16)
                    for one in members
                ]
            )

    def variants(bfloat16: bool) -> dict[str, Callable[[], Tensor]]:
        found = {"batch, plain": lambda: step(False, plain_units, bfloat16)}
        for units in bench.sizes.units:
            found[f"batch, {units} units"] = lambda units=units: step(False, units, bfloat16)  # type: ignore[misc]
        for units in (*bench.sizes.units, bench.sizes.width):
            found[f"loop, {units} units"] = lambda units=units: step(True, units, bfloat16)  # type: ignore[misc]
        return found

    def with_tf32() -> dict[str, Any]:
        with products_of("tf32"):
            return bench.compare(variants(False), restore)

    bench.found["members"] = len(stack)
    bench.attempt("bf16", lambda: bench.compare(variants(True), restore))
    bench.attempt("tf32", with_tf32)
    bench.attempt("float32", lambda: bench.compare(variants(False), restore))


def kept(stack: MLPStack) -> tuple[Tensor, Tensor, Callable[[], None]]:
    """Return the weights of members, and a function that sets them back to what they are now."""
    before = (stack.hidden.clone(), stack.readout.clone())

    def restore() -> None:
        stack.hidden.copy_(before[0])
        stack.readout.copy_(before[1])

    return stack.hidden.detach(), stack.readout.detach(), restore


def evaluation(bench: Bench) -> None:
    """Compare ways to evaluate members: sizes of slices, one after the other, and other products."""
    stack, inputs = bench.stack(bench.sizes.at_once), bench.inputs()

    def by(units: int, loop: bool = False, operands: Operands = "float32") -> Tensor:
        with patch.object(package_engines, "units_at_once", return_value=units), products_of(operands):
            return torch.cat([predict(one, inputs) for one in singles]) if loop else predict(stack, inputs)

    singles = [single(stack, i) for i in range(len(stack))]
    plain_units = units_at_once(bench.device)
    variants: dict[str, Callable[[], Tensor]] = {"batch, plain": lambda: by(plain_units)}
    for units in bench.sizes.units:
        variants[f"batch, {units} units"] = lambda units=units: by(units)  # type: ignore[misc]
        variants[f"loop, {units} units"] = lambda units=units: by(units, loop=True)  # type: ignore[misc]
    variants["batch, tf32"] = lambda: by(plain_units, operands="tf32")
    variants["loop, three tf32 products"] = lambda: predict_by_halves(stack, inputs, max(bench.sizes.units))
    bench.found["members"] = len(stack)
    bench.attempt("float32", lambda: bench.compare(variants, lambda: None))


def single(stack: MLPStack, position: int) -> MLPStack:
    """Return one member as a stack that shares its memory."""
    (_, n, k), m = stack.hidden.shape, stack.readout.shape[1]
    found = MLPStack(k, m, n, [stack.indices[position]], device="meta", draw=False)
    found.hidden = torch.nn.Parameter(stack.hidden[position : position + 1], requires_grad=False)
    found.readout = torch.nn.Parameter(stack.readout[position : position + 1], requires_grad=False)
    return found


def predict_by_halves(stack: MLPStack, inputs: Tensor, units: int) -> Tensor:
    """Return every member's outputs, each product by three with TF32 operands."""
    (members, width, features), bits = stack.hidden.shape, stack.readout.shape[1]
    totals = inputs.new_zeros(members, len(inputs), bits)
    for total, hidden, readout in zip(totals, stack.hidden, stack.readout, strict=True):
        for w1, w2 in zip(hidden.split(units), readout.split(units, 1), strict=True):
            total += product_of_halves(product_of_halves(inputs, w1.mT).relu_(), w2.mT)
    return totals / math.sqrt(width * features)


def members_at_once(bench: Bench) -> None:
    """Train and evaluate several numbers of members at once: time and memory of each, beside the predicted memory."""
    sizes = bench.sizes
    for kind, task, together in (
        ("headline", sizes.task, sizes.together),
        ("small", sizes.small_task, sizes.small_together),
    ):
        labels = task.templates.labels.float()
        inputs = bench.inputs(task)

        def measure(count: int, kind: str, labels: Tensor, inputs: Tensor) -> dict[str, Any]:
            if bench.on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(bench.device)
            here = labels.to(bench.device)
            stack = bench.stack(count) if kind == "headline" else bench.small_stack(count)
            train(stack, here)
            drawn = bench.seconds(lambda: [stack.redraw(position) for position in range(count)])
            trained = bench.seconds(lambda: train(stack, here))
            evaluated = bench.least_seconds(lambda: predict(stack, inputs))
            recipe = Recipe(labels, stack.hidden.shape[1])
            each = recipe.training_bytes + len(inputs) * labels.shape[1] * (recipe.dtype.itemsize + 8)
            found = {
                "drawing_seconds_each": drawn / count,
                "training_seconds_each": trained / count,
                "evaluation_seconds_each": evaluated / count,
                "bytes_predicted": each * count,
            }
            if bench.on_gpu:
                found["bytes_peak"] = torch.cuda.max_memory_allocated(bench.device)
            return found

        for count in together:
            work = lambda count=count, kind=kind, labels=labels, inputs=inputs: measure(count, kind, labels, inputs)  # noqa: E731
            bench.attempt(f"{kind}, {count}", work)


def compiled(bench: Bench) -> None:
    """Compare a step whose elementwise part is one operation, compiled or not, with the engine's."""
    stack, labels = bench.stack(bench.sizes.at_once), bench.labels()
    hidden, readout, restore = kept(stack)
    cotangents = 1e-3 * torch.randn(len(stack), *labels.mT.shape, device=bench.device)
    one_operation = torch.compile(apply_update, fullgraph=True, dynamic=False)

    def variants(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
        coarse = dtype == torch.bfloat16
        found: dict[str, Callable[[], Tensor]] = {
            "batch, plain": lambda: OneHotEngine(hidden, readout, bfloat16=coarse).step(cotangents, coarse=coarse)
        }
        for name, apply in (("not compiled", apply_update), ("compiled", one_operation)):
            for units in (min(bench.sizes.units), max(bench.sizes.units)):
                found[f"batch, {name}, {units} units"] = lambda units=units, apply=apply: fused_step(  # type: ignore[misc]
                    hidden, readout, cotangents, units, apply, dtype
                )
                found[f"loop, {name}, {units} units"] = (
                    lambda units=units, apply=apply: torch.cat(  # type: ignore[misc]
                        [
                            fused_step(
                                hidden[i : i + 1], readout[i : i + 1], cotangents[i : i + 1], units, apply, dtype
                            )
                            for i in range(len(hidden))
                        ]
                    )
                )
        return found

    def mixed() -> dict[str, Any]:
        units = max(bench.sizes.units)
        ways: dict[str, Callable[[], Tensor]] = {
            "float32": lambda: fused_step(hidden, readout, cotangents, units, apply_update)
        }

        def with_tf32(outputs: Operands) -> Tensor:
            with products_of("tf32"):
                return fused_step(hidden, readout, cotangents, units, apply_update, outputs=outputs)

        ways["tf32 update, float32 outputs"] = lambda: with_tf32("float32")
        ways["tf32"] = lambda: with_tf32("tf32")
        return bench.compare(ways, restore)

    bench.found["members"] = len(stack)
    bench.attempt("bf16", lambda: bench.compare(variants(torch.bfloat16), restore))
    bench.attempt("float32", lambda: bench.compare(variants(torch.float32), restore))
    bench.attempt("outputs of a last step", mixed)


def fused_step(
    hidden: Tensor,
    readout: Tensor,
    cotangents: Tensor,
    units: int,
    apply: Callable[[Tensor, Tensor, Tensor], object],
    dtype: torch.dtype = torch.float32,
    outputs: Operands | None = None,
) -> Tensor:
    """Take a step as `OneHotEngine` does, with the elementwise part of the update in one function.

    Args:
        hidden: W1 of the members, changed in place.
        readout: W2 of the members, changed in place.
        cotangents: p of every member.
        units: Hidden units of a slice.
        apply: `apply_update`, or what was compiled of it.
        dtype: Type of the products' operands.
        outputs: Operands of the products of the new outputs, if they are others than the rest's.
    """
    scale = 1 / math.sqrt(hidden.shape[1] * hidden.shape[2])
    cotangents = (cotangents * scale).to(dtype)
    totals = hidden.new_zeros(cotangents.shape)
    for w1, w2 in zip(hidden.split(units, 1), readout.split(units, 2), strict=True):
        active = w1.to(dtype).clamp_min(0)
        pulled = w2.to(dtype).mT @ cotangents
        add_product(w2, cotangents, active.mT, alpha=-1.0)
        apply(w1, pulled, active)
        with nullcontext() if outputs is None else products_of(outputs):
            add_product(totals, w2.to(dtype), active)
    return totals * scale


def apply_update(hidden: Tensor, pulled: Tensor, active: Tensor) -> None:
    """Change W1 by the gradient where its units are active, and write relu of the new W1, both in place."""
    hidden.sub_(torch.where(hidden > 0, pulled, 0))
    active.copy_(hidden.clamp_min(0))


def graphs(bench: Bench) -> None:
    """Compare a step of many small members with the replay of a CUDA graph of it."""
    for count in bench.sizes.small_together:
        stack = bench.small_stack(count)
        hidden, readout, restore = kept(stack)
        k, m = stack.hidden.shape[2], stack.readout.shape[1]
        cotangents = 1e-3 * torch.randn(count, m, k, device=bench.device)
        engine = OneHotEngine(hidden, readout)

        def measure(engine: OneHotEngine, cotangents: Tensor, restore: Callable[[], None]) -> dict[str, Any]:
            def plain() -> Tensor:
                return engine.step(cotangents)

            rows = bench.compare({"plain": plain}, restore)
            replay = bench.outcome(lambda: graph_of(plain, bench.device))
            if not callable(replay):
                return {**rows, "graph": replay}
            return bench.compare({"plain": plain, "graph": replay}, restore)

        bench.attempt(
            f"{count} members",
            lambda engine=engine, cotangents=cotangents, restore=restore: measure(engine, cotangents, restore),  # type: ignore[misc]
        )
        bench.attempt(f"{count} members, training", lambda stack=stack: training_of_small(bench, stack))  # type: ignore[misc]


def training_of_small(bench: Bench, stack: MLPStack) -> dict[str, float]:
    """Return the time to train small members to the end, and the steps: what their steps cost beside the products."""
    labels = bench.sizes.small_task.templates.labels.float().to(bench.device)
    train(stack, labels)
    for position in range(len(stack)):
        stack.redraw(position)
    statuses: list[MemberStatus] = []
    seconds = bench.seconds(lambda: statuses.extend(train(stack, labels)))
    return {"seconds": seconds, "steps": max(status.steps for status in statuses)}


def graph_of(
    work: Callable[[], Tensor], device: torch.device, generator: torch.Generator | None = None
) -> Callable[[], Tensor]:
    """Return a function that replays what a function does on a GPU, as one CUDA graph.

    Args:
        work: Function without arguments that always does the same with the same memory.
        device: A GPU.
        generator: What draws the random numbers that it uses, if any.

    Raises:
        ValueError: The device has no such graphs.
    """
    if device.type != "cuda":
        raise ValueError(f"no CUDA graphs on {device.type}")
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()
        work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph, stream=side):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def drawing(bench: Bench) -> None:
    """Compare ways to draw one member: piece by piece, in one call (other numbers), and by CUDA graphs."""
    stack = bench.stack(1)
    hidden, readout = stack.hidden.detach(), stack.readout.detach()
    seed = member_seed(stack.seed, stack.indices[0])
    generator = torch.Generator(bench.device)

    def plain() -> Tensor:
        stack.redraw(0)
        return hidden

    def whole() -> Tensor:
        generator.manual_seed(seed)
        hidden.normal_(generator=generator)
        readout.normal_(generator=generator)
        return hidden

    def pieces(branches: int = 1) -> Tensor:
        parts = [*hidden.view(-1).split(PIECE), *readout.view(-1).split(PIECE)]
        if branches == 1:
            for part in parts:
                part.normal_(generator=generator)
            return hidden
        main, sides = torch.cuda.current_stream(), [torch.cuda.Stream(bench.device) for _ in range(branches)]
        for side in sides:
            side.wait_stream(main)
        for i, part in enumerate(parts):
            # Numbers follow the order of the calls, not that in which the GPU comes to them.
            with torch.cuda.stream(sides[i % branches]):
                part.normal_(generator=generator)
        for side in sides:
            main.wait_stream(side)
        return hidden

    def seeded(work: Callable[[], Tensor]) -> Tensor:
        generator.manual_seed(seed)
        return work()

    variants: dict[str, Callable[[], Tensor]] = {
        "plain": plain,
        "one call": whole,
        "pieces": lambda: seeded(pieces),
    }
    for branches in (1, 8):
        replay = bench.outcome(lambda branches=branches: graph_of(lambda: pieces(branches), bench.device, generator))  # type: ignore[misc]
        if callable(replay):
            variants[f"graph, {branches} branches"] = lambda replay=replay: seeded(replay)  # type: ignore[misc]
        else:
            bench.found[f"graph, {branches} branches"] = replay
    bench.found["launches"] = sum(-(-weights.numel() // PIECE) for weights in (hidden, readout))
    bench.attempt("ways", lambda: bench.compare(variants, lambda: None))


def overlap(bench: Bench) -> None:
    """Compare drawing the next cohort while one is trained with drawing it before."""
    labels = bench.labels()
    now, following = bench.stack(bench.sizes.at_once), bench.stack(bench.sizes.at_once)
    _, _, restore = kept(now)
    stream = torch.cuda.Stream(bench.device) if bench.on_gpu else None

    def draw() -> None:
        for position in range(len(following)):
            following.redraw(position)

    def draw_beside() -> None:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            draw()
            if stream is not None:
                stream.synchronize()

    def plain() -> Tensor:
        restore()
        draw()
        train(now, labels)
        return now.hidden[0]

    def beside() -> Tensor:
        restore()
        bench.wait()
        drawn = worker.submit(draw_beside)
        train(now, labels)
        drawn.result()
        return now.hidden[0]

    bench.found["members"] = len(now)
    with ThreadPoolExecutor(1) as worker:
        bench.attempt("float32", lambda: bench.compare({"plain": plain, "two streams": beside}, restore))


# ---- identity and profile ----


def digests(bench: Bench) -> None:
    """Digest the drawn weights of members 0 and 7, which have to be the same on every kind of GPU."""
    small, task = bench.sizes.small_task, bench.sizes.task
    shapes = [
        (*small.templates.labels.shape, bench.sizes.small_width),
        (*task.templates.labels.shape, bench.sizes.width // 16),
        (*task.templates.labels.shape, bench.sizes.width),
    ]
    for k, m, n in shapes:
        for index in (0, 7):
            name, work = f"{k} x {m}, width {n}, member {index}", partial(digest, bench, k, m, n, index)
            bench.attempt(name, work)


def digest(bench: Bench, templates: int, bits: int, width: int, index: int) -> str:
    """Return the SHA-256 of a member's drawn weights as little-endian float32 numbers, W1 before W2."""
    stack = MLPStack(templates, bits, width, [index], device=bench.device)
    summed = hashlib.sha256()
    for weights in (stack.hidden, stack.readout):
        summed.update(weights.detach().cpu().numpy().astype("<f4", copy=False).tobytes())
    return summed.hexdigest()


def profile(bench: Bench) -> None:
    """Record which kernels take the time of each stage of one cohort."""
    stack, labels, inputs = bench.stack(bench.sizes.at_once), bench.labels(), bench.inputs()
    train(stack, labels)
    predict(stack, inputs)

    def draw() -> None:
        for position in range(len(stack)):
            stack.redraw(position)

    bench.found["members"] = len(stack)
    for way in ("float32", "bf16-mixed"):
        draw()
        bench.attempt(f"training, {way}", lambda way=way: kernels(bench, lambda: train(stack, labels, way)))  # type: ignore[misc]
    bench.attempt("evaluation", lambda: kernels(bench, lambda: predict(stack, inputs)))
    bench.attempt("drawing", lambda: kernels(bench, draw))


def kernels(bench: Bench, work: Callable[[], object], top: int = 15) -> dict[str, Any]:
    """Return the kernels by their time on the device (on a CPU operators), the longest first, and their share of it."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    bench.wait()
    with torch.profiler.profile(activities=activities, acc_events=True) as recorded:
        wall = bench.seconds(work)
    # Without the spans by which PyTorch names what the kernels belong to.
    averages = [
        event
        for event in recorded.key_averages()
        if event.device_type.name == ("CUDA" if bench.on_gpu else "CPU") and not event.is_user_annotation
    ]
    times = [(event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total) / 1e6 for event in averages]
    total = sum(times)
    rows = sorted(zip(times, averages, strict=True), key=lambda row: -row[0])[:top]
    return {
        "wall_seconds": wall,
        "busy_seconds": total,
        "kernels": sum(event.count for event in averages),
        "top": [
            {"name": event.key[:120], "calls": event.count, "seconds": seconds, "share": seconds / total}
            for seconds, event in rows
        ],
    }


# ---- the command ----

SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {
    "machine": (machine, 25),
    "headline": (headline, 75),
    "stages": (stages, 80),
    "digests": (digests, 15),
    "profile": (profile, 30),
    "layouts": (layouts, 45),
    "evaluation": (evaluation, 25),
    "compiled": (compiled, 45),
    "drawing": (drawing, 20),
    "members_at_once": (members_at_once, 40),
    "graphs": (graphs, 20),
    "overlap": (overlap, 20),
}
"""What is measured, the most important first, and the seconds that each may take."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="write the figures there, as JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to compute")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument(
        "--sections", nargs="+", choices=list(SECTIONS), help="measure these; others stay as they are in the file"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here; --device cpu --small shows that everything runs")
    started_at = time.time()
    figures = {"device_type": options.device, "small": options.small, "sections": {}}
    if options.sections:
        before = read(options.out)
        figures["sections"] = {name: row for name, row in before["sections"].items() if name not in options.sections}
    write(options.out, figures)
    for name in options.sections or SECTIONS:
        left = SECONDS_MAX - (time.time() - started_at)
        row = section_in_process(name, options.out, options.device, options.small, left) if left > 5 else None
        figures = read(options.out)
        figures["sections"].setdefault(name, {}).update(row or {"ended": "left out: no time was left"})
        write(options.out, figures)
        print(f"{name}: {figures['sections'][name]['ended']}, {time.time() - started_at:.0f} s in all", flush=True)
    figures["seconds"] = time.time() - started_at
    write(options.out, figures)


def section_in_process(name: str, out: Path, device: str, small: bool, left: float) -> dict[str, Any]:
    """Run a section in a process of its own; return how it ended.

    Args:
        name: One of `SECTIONS`.
        out: File of the figures, which the section adds to.
        device: "cuda" or "cpu".
        small: Whether to measure small sizes.
        left: Seconds that are left for it and all after it.
    """
    started_at = time.time()
    seconds = min(SECTIONS[name][1], left)
    process = multiprocessing.get_context("spawn").Process(
        target=run_section, args=(name, out, device, small, started_at + seconds)
    )
    process.start()
    process.join(seconds + SECONDS_OF_GRACE)
    if process.is_alive():
        process.kill()
        process.join()
        ended = "killed: it did not end in its time"
    else:
        ended = "complete" if process.exitcode == 0 else f"failed with exit status {process.exitcode}"
    return {"ended": ended, "section_seconds": time.time() - started_at}


def run_section(name: str, out: Path, device: str, small: bool, deadline: float) -> None:
    """Run a section and write what it finds, as it finds it; the arguments are those of `section_in_process`."""
    figures = read(out)

    def save(found: dict[str, Any]) -> None:
        figures["sections"][name] = found
        write(out, figures)

    bench = Bench(torch.device(device), small, deadline, dict(figures["sections"]), save)
    with torch.no_grad():
        failure = bench.outcome(lambda: SECTIONS[name][0](bench))
    save({**bench.found, **(failure or {})})


def read(out: Path) -> dict[str, Any]:
    """Return the figures found so far."""
    if not out.exists():
        return {"sections": {}}
    figures: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return figures


def write(out: Path, figures: Mapping[str, Any]) -> None:
    """Write the figures, so that a reader sees all of them or those before."""
    text = json.dumps(figures, indent=2) + "\n"
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
