"""The benchmark for GPUs, rehearsed on a CPU: its variants compute what the plain path does; no failure stops it."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from ntk_ensembles import Addition, MLPStack
from ntk_ensembles.ensemble import OneHotEngine

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("gpu")


def gradient_step(stack: MLPStack, cotangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return W1, W2 and the outputs after a step, by autograd in double precision."""
    eye = torch.eye(stack.hidden.shape[2], dtype=torch.float64)
    ends = []
    for i in range(len(stack)):
        network = stack.member(i).double().requires_grad_(True)
        (network(eye) * cotangents[i].double().mT).sum().backward()
        moved = {name: weights.detach() - weights.grad for name, weights in network.named_parameters()}  # type: ignore[operator]
        ends.append((moved["hidden"], moved["readout"], functional_call(network, moved, (eye,)).detach().mT))
    return tuple(torch.stack(values) for values in zip(*ends, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.05)])
def test_a_fused_step_is_autograds(gpu: ModuleType, dtype: torch.dtype, tolerance: float) -> None:
    stack = MLPStack(8, 6, 96, 3).requires_grad_(False)
    cotangents = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = gradient_step(stack, cotangents)
    for outputs in (None, "float32"):
        weights = stack.hidden.clone(), stack.readout.clone()
        found = gpu.fused_step(*weights, cotangents, 40, gpu.apply_update, dtype, outputs)
        for value, exact in zip((*weights, found), expected, strict=True):
            torch.testing.assert_close(value.double(), exact, rtol=0, atol=tolerance)
        assert not torch.equal(weights[0], stack.hidden)


def test_three_products_of_halves_are_as_exact_as_float32(gpu: ModuleType) -> None:
    """Also where the halves are read as TF32 reads them, to 10 bits of the mantissa."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 300, generator=generator), torch.randn(300, 50, generator=generator)
    exact = left.double() @ right.double()

    def error(found: Tensor) -> float:
        return float((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    (left_high, left_low), (right_high, right_low) = gpu.halves(left), gpu.halves(right)
    assert torch.equal(left_high + left_low, left)
    mantissas, _ = torch.frexp(left_high)
    assert torch.equal(mantissas * 2**11, (mantissas * 2**11).round())  # 11 binary digits, the first of them implied
    read = [gpu.halves(low)[0] for low in (left_low, right_low)]
    assert error(left_high @ right_high) > 1e-4
    assert error(left_high @ right_high + (left_high @ read[1] + read[0] @ right_high)) < 2e-6
    assert error(gpu.product_of_halves(left, right)) < 1e-6
    assert torch.get_float32_matmul_precision() == "highest"


def test_prediction_by_halves_is_the_networks(gpu: ModuleType) -> None:
    stack = MLPStack(8, 6, 96, 3).requires_grad_(False)
    inputs = torch.rand(20, 8, generator=torch.Generator().manual_seed(0))
    exact = torch.stack([stack.member(i).double()(inputs.double()) for i in range(3)])
    torch.testing.assert_close(gpu.predict_by_halves(stack, inputs, 40).double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(gpu.single(stack, 1)(inputs)[0].double(), exact[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("way", "first", "last"),
    [("float32", "highest", "highest"), ("tf32", "high", "high"), ("tf32-mixed", "high", "highest")],
)
def test_ways_to_train_differ_in_operands(
    gpu: ModuleType, way: str, first: str, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    step = OneHotEngine.step

    def spied(engine: OneHotEngine, *arguments: Any, **options: Any) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return step(engine, *arguments, **options)

    monkeypatch.setattr(OneHotEngine, "step", spied)
    labels = Addition(2).templates.labels.float()
    stack = MLPStack(8, 6, 400, 2).requires_grad_(False)
    statuses = gpu.train(stack, labels, way)
    assert all(status.converged for status in statuses)
    assert (seen[0], seen[-1], torch.get_float32_matmul_precision()) == (first, last, "highest")
    first_losses = MLPStack(8, 6, 400, 2)(torch.eye(len(labels))).sub(labels).square().mean((1, 2)).tolist()
    for i, status in enumerate(statuses):
        assert gpu.loss_in_float64(stack, i, labels) / first_losses[i] == pytest.approx(status.relative_loss, rel=0.01)


def errors(found: Any) -> list[str]:
    """Return what was recorded as failed anywhere in a section."""
    if not isinstance(found, dict):
        return []
    here = [found[key] for key in ("error", "left_out") if key in found]
    return here + [text for value in found.values() for text in errors(value)]


QUICK = ("machine", "stages", "digests", "layouts", "evaluation", "drawing", "members_at_once", "graphs", "overlap")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ("compiled", "profile"))]
)
def test_sections_run_and_variants_agree_with_the_plain_path(gpu: ModuleType, name: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.run_section(name, out, "cpu", True, time.time() + 600)
    found = json.loads(out.read_text(encoding="utf-8"))["sections"][name]
    only_on_a_gpu = {"graphs": "no CUDA graphs", "drawing": "no CUDA graphs", "machine": "aten::mm.dtype"}
    assert [text for text in errors(found) if only_on_a_gpu.get(name, "-") not in text] == []
    rows = [row for row in nested(found) if "deviation" in row]
    assert bool(rows) == (name in ("layouts", "evaluation", "drawing", "graphs", "overlap", "compiled"))
    for row in rows:
        assert row["deviation"] <= 0.02  # bf16 steps; float32 ones are compared to the digit above
        assert row["seconds"] > 0


def nested(found: Any) -> list[dict[str, Any]]:
    return [found, *(row for value in found.values() for row in nested(value))] if isinstance(found, dict) else []


def test_float32_variants_deviate_by_rounding_only(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.run_section("layouts", out, "cpu", True, time.time() + 600)
    rows = json.loads(out.read_text(encoding="utf-8"))["sections"]["layouts"]["float32"]
    assert len(rows) == 5
    assert all(row["deviation"] < 1e-5 for row in rows.values())


def test_the_headlines_stages_are_beside_their_floors(gpu: ModuleType) -> None:
    rates = {
        "float32": {"training_flops": 1e9, "evaluation_flops": 2e9},
        "bf16": {"training_flops": 4e9},
        "copy": {"bytes_per_second": 1e12},
    }
    bench = gpu.Bench(CPU, True, time.time() + 60, {"machine": rates})
    k, m, n, states = 8, 6, 96, 10
    seconds = {"drawing": 1.0, "evaluation": 1.0, "training, float32": 1.0, "training, bf16-mixed": 1.0}
    found = gpu.beside_floors(bench, seconds, {"float32": 3, "bf16-mixed": 3})
    assert found["evaluation"]["share"] == pytest.approx(2 * states * n * (k + m) / 2e9)
    assert found["training, float32"]["share"] == pytest.approx(10 * 2 * k * m * n / 1e9)
    assert found["training, bf16-mixed"]["share"] == pytest.approx((9 / 4 + 1) * 2 * k * m * n / 1e9)
    assert found["training, float32"]["floors"]["bytes"] == pytest.approx(7 * 4 * n * k / 1e12)
    assert "generator" not in found["drawing"]["floors"]


def test_what_fails_is_recorded_and_the_rest_goes_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def section(bench: Any) -> None:
        bench.attempt("first", lambda: 1)
        bench.attempt("second", lambda: 1 / 0)
        bench.attempt("third", lambda: bench.compare({"plain": lambda: torch.ones(2), "none": broken}, lambda: None))
        bench.deadline = 0
        bench.attempt("fourth", lambda: 4)
        raise MemoryError("all of it")

    def broken() -> Tensor:
        raise torch.OutOfMemoryError("out of memory\nwith details")

    monkeypatch.setitem(gpu.SECTIONS, "machine", (section, 5))
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"sections": {"digests": {"earlier": 1}}}), encoding="utf-8")
    gpu.run_section("machine", out, "cpu", True, time.time() + 600)
    sections = json.loads(out.read_text(encoding="utf-8"))["sections"]
    assert sections["digests"] == {"earlier": 1}
    found = sections["machine"]
    assert found["first"] == 1
    assert found["second"] == {"error": "ZeroDivisionError: division by zero"}
    assert found["third"]["plain"]["times_plain"] == 1
    assert found["third"]["none"] == {"error": "OutOfMemoryError: out of memory"}
    assert found["fourth"] == {"left_out": "no time was left"}
    assert found["error"] == "MemoryError: all of it"


def test_all_sections_end_within_eight_minutes(gpu: ModuleType) -> None:
    assert gpu.SECONDS_MAX + gpu.SECONDS_OF_GRACE < 480


@pytest.mark.slow
def test_the_command_runs_its_sections_and_keeps_the_others(gpu: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(out), "--device", "cpu", "--small", "--sections"]
    out.write_text(json.dumps({"sections": {"machine": {"earlier": 1}}}), encoding="utf-8")
    subprocess.run([*command, "digests"], cwd=ROOT, check=True)
    sections = json.loads(out.read_text(encoding="utf-8"))["sections"]
    assert sections["machine"] == {"earlier": 1}
    assert sections["digests"]["ended"] == "complete"
    # Here, for as long as it takes on a busy machine.
    gpu.run_section("headline", out, "cpu", True, time.time() + 600)
    sections = json.loads(out.read_text(encoding="utf-8"))["sections"]
    for precision in ("32-true", "bf16-mixed"):
        row = sections["headline"][precision]
        assert row["results"]["precision"] == precision
        assert row["wall_seconds"] > row["results"]["training"]["seconds"]["train"]
    # Member 7 in company is the same.
    stack = MLPStack(8, 6, 96, 8)
    summed = hashlib.sha256(stack.hidden[7].detach().numpy().tobytes() + stack.readout[7].detach().numpy().tobytes())
    assert sections["digests"]["8 x 6, width 96, member 7"] == summed.hexdigest()
