"""What only a GPU can show: both engines, precisions, resume, running out of memory, and members of one identity.

Everything else of these paths runs on a CPU too, chosen by a parameter (`Descent(together=100)`).
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from rich.console import Console

from ntk_ensembles import Addition, Ensemble, EnsembleModule, MLPStack, RunOptions, TaskData, train
from ntk_ensembles.ensemble import Descent, DescentOptions, FunctionalEngine, OneHotEngine, make_engine, predict
from ntk_ensembles.training import stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
QUIET = Console(quiet=True)
LABELS = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)).round()


def stack_of(members: Any = 4, width: int = 2048, **changes: Any) -> MLPStack:
    return MLPStack(40, 30, width, members, device="cuda", **changes).requires_grad_(False)


@pytest.mark.parametrize("choice", ["auto", "functional"])
def test_one_step_is_autograds_gradient_in_double_precision(choice: Any) -> None:
    stack = stack_of(dtype=torch.float64)
    eye = torch.eye(40, device="cuda", dtype=torch.float64)
    cotangents = torch.randn(4, 30, 40, device="cuda", dtype=torch.float64)
    twin = MLPStack(40, 30, 2048, 4, device="cuda", dtype=torch.float64)
    (twin(eye).mT * cotangents).sum().backward()
    engine = make_engine(stack.hidden, stack.readout, eye, choice)
    assert isinstance(engine, OneHotEngine if choice == "auto" else FunctionalEngine)
    engine.step(cotangents)
    for name in ("hidden", "readout"):
        parameter = twin.get_parameter(name)
        assert parameter.grad is not None
        expected = parameter.detach() - parameter.grad
        torch.testing.assert_close(stack.get_parameter(name), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("choice", ["auto", "functional"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_members_converge_and_predict_as_forward_does(choice: Any, bfloat16: bool) -> None:
    stack = stack_of()
    descent = Descent(stack, DescentOptions(engine=choice), bfloat16=bfloat16)
    descent.bind(torch.eye(40), LABELS)
    while descent.running:
        descent.step()
    assert all(status.converged for status in descent.statuses)
    inputs = torch.rand(300, 40) * (torch.rand(300, 40) < 0.2)
    # TF32 is off by default; float32 sums of 2,048 terms.
    torch.testing.assert_close(predict(stack, inputs), stack(inputs.cuda()), rtol=0, atol=1e-4)


def test_a_member_does_not_depend_on_its_stack() -> None:
    together, alone = stack_of(range(6)), stack_of([4])
    assert torch.equal(together.hidden[4], alone.hidden[0])
    first, second = (Descent(stack) for stack in (together, alone))
    for descent in (first, second):
        descent.bind(torch.eye(40), LABELS)
        while descent.running:
            descent.step()
    # Products of another batch size may round in another order.
    torch.testing.assert_close(together.hidden[4], alone.hidden[0], rtol=0, atol=1e-4)


def test_a_members_draw_has_one_digest_on_every_model_of_gpu() -> None:
    """Compare what this prints between machines: large tensors are drawn in pieces that every GPU fills alike."""
    stack = stack_of([0], 65_536)
    digest = hashlib.sha256(stack.hidden.cpu().numpy().tobytes()).hexdigest()
    print(f"{torch.cuda.get_device_name()}: {digest}")
    pieces = torch.cat([stack.hidden.flatten()[:65_536], stack.hidden.flatten()[65_536:131_072]]).double()
    assert abs(float(pieces.mean())) < 5 / 131_072**0.5
    assert not torch.equal(pieces[:65_536], pieces[65_536:])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_the_trainer_trains_there(precision: Any, tmp_path: Path) -> None:
    data = TaskData(Addition(5), evaluation_states=200)
    trainer = L.Trainer(
        accelerator="gpu", devices=1, precision=precision, max_epochs=50, logger=False, enable_checkpointing=False
    )
    with trainer.init_module():
        module = EnsembleModule(data.in_features, data.out_features, 2048, 8)
    assert module.stack.hidden.device.type == "cuda"
    trainer.fit(module, data)
    assert all(status.converged for status in module.statuses)
    (found,) = trainer.test(module, data, verbose=False)
    assert found["test/exact_match/midpoint"] == 1


def test_a_stopped_fit_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    data = TaskData(Addition(5), evaluation_states=50)

    def module() -> EnsembleModule:
        return EnsembleModule(data.in_features, data.out_features, 1024, 4)

    def trainer(**changes: Any) -> L.Trainer:
        settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return L.Trainer(accelerator="gpu", devices=1, **settings, **changes)

    whole, half, rest = module(), module(), module()
    trainer(max_epochs=50).fit(whole, data)
    fitting = trainer(max_steps=2)
    fitting.fit(half, data)
    fitting.save_checkpoint(tmp_path / "half.ckpt")
    trainer(max_epochs=50).fit(rest, data, ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(rest.stack.hidden, whole.stack.hidden)


def test_runs_resume_and_load_there(tmp_path: Path) -> None:
    options = RunOptions(width=1024, ensemble=12, cohort=4, evaluation_states=100, accelerator="gpu")
    first = train(Addition(5), dataclasses.replace(options, out=str(tmp_path / "whole")), console=QUIET)
    assert first is not None
    assert first["environment"]["device_type"] == "cuda"
    part = dataclasses.replace(options, ensemble=8, out=str(tmp_path / "part"))
    train(Addition(5), part, console=QUIET)
    second = train(Addition(5), dataclasses.replace(options, out=str(tmp_path / "part")), console=QUIET)
    assert second is not None
    assert first["convergence"] == second["convergence"]
    assert Ensemble.load(tmp_path / "whole").execute([(9, 14), (31, 31)]) == [23, 62]


def test_out_of_memory_halves_the_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real allocation that fails: a cohort of as many members as fill the card twice."""
    monkeypatch.setattr(stream, "choose_cohort", lambda *arguments, **options: 1 << 20)
    total = torch.cuda.get_device_properties(0).total_memory
    width = 1 << 16
    each = width * (20 + 15) * 4
    members = 2 * total // each
    lines: list[str] = []

    class Lines(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            lines.extend(map(str, objects))

    options = RunOptions(
        width=width, ensemble=int(members), evaluation_states=10, accelerator="gpu", keep_weights="none"
    )
    results = train(Addition(5), dataclasses.replace(options, out=str(tmp_path / "run")), console=Lines(quiet=True))
    assert results is not None
    assert results["members"] == members
    assert any("out of memory" in line for line in lines)
