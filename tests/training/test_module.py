"""The module does what Lightning's manual says, on tasks and on any X and Y."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

from ntk_ensembles import Addition, EnsembleModule, TaskData
from ntk_ensembles.ensemble import predict
from ntk_ensembles.theory import decode, posterior

Trainers = Callable[..., L.Trainer]

DATA = TaskData(Addition(3), evaluation_states=120)


def module(width: int = 512, members: Any = 4, **changes: Any) -> EnsembleModule:
    return EnsembleModule(DATA.in_features, DATA.out_features, width, members, **changes)


def test_fit_ends_when_every_member_has_converged(trainer: Trainers) -> None:
    ensemble, fitting = module(), trainer(max_epochs=100)
    fitting.fit(ensemble, DATA)
    steps = max(status.steps for status in ensemble.statuses)
    assert all(status.converged for status in ensemble.statuses)
    assert fitting.global_step == steps < 20
    outputs = predict(ensemble.stack, torch.eye(DATA.in_features))
    torch.testing.assert_close(outputs, DATA.task.templates.labels.float().expand_as(outputs), rtol=0, atol=5e-3)
    metrics = fitting.callback_metrics
    assert float(metrics["train/running"]) == 0
    assert float(metrics["train/relative_loss_max"]) <= 1e-6
    # A validation after every epoch, that is, after every step.
    assert 0 < float(metrics["val/exact_match/midpoint"]) <= 1


def test_max_steps_are_steps_of_descent(trainer: Trainers) -> None:
    ensemble, fitting = module(), trainer(max_steps=2)
    fitting.fit(ensemble, DATA)
    assert fitting.global_step == 2
    assert [status.steps for status in ensemble.statuses] == [2] * 4
    assert all(status.running for status in ensemble.statuses)


def test_a_stopped_fit_goes_on_to_the_same_bits(tmp_path: Path, trainer: Trainers) -> None:
    whole = module()
    trainer(max_epochs=100).fit(whole, DATA)
    half, fitting = module(), trainer(max_steps=2)
    fitting.fit(half, DATA)
    fitting.save_checkpoint(tmp_path / "half.ckpt")
    rest, going_on = module(), trainer(max_epochs=100)
    going_on.fit(rest, DATA, ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(rest.stack.hidden, whole.stack.hidden)
    assert torch.equal(rest.stack.readout, whole.stack.readout)
    assert rest.statuses == whole.statuses
    assert going_on.global_step == max(status.steps for status in whole.statuses)
    # The same module can go on without a checkpoint.
    trainer(max_epochs=100).fit(half, DATA)
    assert torch.equal(half.stack.hidden, whole.stack.hidden)


def test_checkpoints_load_without_executing_anything(tmp_path: Path, trainer: Trainers) -> None:
    ensemble = module(members=[7, 2])
    fitting = trainer(max_epochs=100)
    fitting.fit(ensemble, DATA)
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    torch.load(tmp_path / "end.ckpt", weights_only=True)
    again = EnsembleModule.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert torch.equal(again.stack.hidden, ensemble.stack.hidden)
    assert again.stack.indices == (7, 2)
    assert again.statuses == ensemble.statuses
    trainer(max_epochs=100).fit(again, DATA)  # nothing is left to train
    assert torch.equal(again.stack.hidden, ensemble.stack.hidden)


def test_callbacks_and_loggers_see_what_they_are_promised(tmp_path: Path, trainer: Trainers) -> None:
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/exact_match/midpoint", mode="max", save_last=True)
    early = EarlyStopping("val/rms_deviation", patience=3)
    logger = CSVLogger(tmp_path)
    fitting = trainer(max_epochs=20, callbacks=[best, early], logger=logger, enable_checkpointing=True)
    ensemble = module(members=16)
    fitting.fit(ensemble, DATA)
    assert best.best_model_score is not None
    assert Path(best.best_model_path).is_file()
    assert Path(best.last_model_path).is_file()
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    for name in ("train/loss_max", "train/loss_median", "val/exact_match/midpoint", "val/predicted_rms_deviation"):
        assert name in header


def test_early_stopping_on_a_training_metric(trainer: Trainers) -> None:
    early = EarlyStopping("train/loss_max", stopping_threshold=1e-2, patience=100)
    fitting = trainer(max_epochs=20, callbacks=[early])
    ensemble = module()
    fitting.fit(ensemble, DATA)
    assert fitting.global_step == 1
    assert not any(status.converged for status in ensemble.statuses)


def test_measured_and_predicted_stand_side_by_side(trainer: Trainers) -> None:
    """`test` against the definitions, written out."""
    ensemble, fitting = module(members=8), trainer(max_epochs=100)
    fitting.fit(ensemble, DATA)
    (found,) = fitting.test(ensemble, DATA, verbose=False)
    (outputs,) = fitting.predict(ensemble, DATA)  # type: ignore[misc]
    assert isinstance(outputs, torch.Tensor)
    assert outputs.shape == (8, len(DATA.limit.evaluation), DATA.out_features)
    limit = DATA.limit
    mean = outputs.double().mean(0)
    for decoder in ("midpoint", "sign"):
        right = decode(mean, limit.thresholds[decoder]) == limit.evaluation.next_states
        assert found[f"test/exact_match/{decoder}"] == pytest.approx(float(right.all(1).double().mean()), abs=1e-6)
        assert found[f"test/bit_accuracy/{decoder}"] == pytest.approx(float(right.double().mean()), abs=1e-6)
        assert found[f"test/predicted_exact_match/{decoder}"] == pytest.approx(limit.exact_match(8, decoder), abs=1e-6)
        assert found[f"test/predicted_bit_accuracy/{decoder}"] == pytest.approx(
            limit.bit_accuracy(8, decoder), abs=1e-6
        )
    rms = float((mean - limit.mean).square().mean().sqrt())
    assert found["test/rms_deviation"] == pytest.approx(rms, rel=1e-5)
    assert found["test/predicted_rms_deviation"] == pytest.approx(limit.rms_deviation(8), rel=1e-5)
    (validated,) = fitting.validate(ensemble, DATA, verbose=False)
    assert validated["val/exact_match/sign"] == found["test/exact_match/sign"]


def test_antisymmetric_members_are_predicted_not_to_vary(trainer: Trainers) -> None:
    ensemble, fitting = module(init="antisymmetric"), trainer(max_epochs=100)
    fitting.fit(ensemble, DATA)
    (found,) = fitting.test(ensemble, DATA, verbose=False)
    assert found["test/predicted_rms_deviation"] == 0
    assert found["test/predicted_exact_match/midpoint"] == 1


def test_members_that_were_given_up_are_not_averaged_in(trainer: Trainers) -> None:
    """With two steps allowed, no member converges; with one of them marked as given up, the mean leaves it out."""
    ensemble, fitting = module(members=3), trainer(max_epochs=100)
    fitting.fit(ensemble, DATA)
    ensemble.statuses[1].converged = False
    with torch.no_grad():
        ensemble.stack.readout[1] = torch.nan
    (found,) = fitting.test(ensemble, DATA, verbose=False)
    outputs = predict(ensemble.stack, DATA.limit.inputs)[[0, 2]].double().mean(0)
    assert found["test/rms_deviation"] == pytest.approx(
        float((outputs - DATA.limit.mean).square().mean() ** 0.5), rel=1e-5
    )
    assert found["test/predicted_rms_deviation"] == pytest.approx(DATA.limit.rms_deviation(2), rel=1e-5)


@pytest.mark.parametrize("engine", ["auto", "functional"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("64-true", torch.float64)])
def test_the_trainers_precision_does_what_it_says(
    precision: Any, dtype: torch.dtype, engine: Any, trainer: Trainers
) -> None:
    full, ensemble = module(width=2048, engine=engine), module(width=2048, engine=engine)
    trainer(max_steps=1).fit(full, DATA)
    trainer(max_steps=1, precision=precision).fit(ensemble, DATA)
    assert ensemble.stack.hidden.dtype == dtype
    exact, initial = full.stack.hidden.detach(), module(width=2048).stack.hidden.detach()
    difference = float((ensemble.stack.hidden.detach() - exact).norm() / (exact - initial).norm())
    # bfloat16 rounds to 8 bits; float64 differs by the rounding of float32.
    low, high = (1e-4, 1e-2) if precision == "bf16-mixed" else (1e-9, 1e-5)
    assert low < difference < high
    trainer(max_epochs=30, precision=precision).fit(ensemble, DATA)
    assert all(status.converged for status in ensemble.statuses)


def test_what_cannot_be_trained_is_refused(trainer: Trainers) -> None:
    with pytest.raises(ValueError, match=r"Trainer\(precision='bf16-true'\): expected one of 32-true"):
        trainer(precision="bf16-true", max_epochs=1).fit(module(), DATA)
    rows = TensorDataset(torch.eye(DATA.in_features), DATA.task.templates.labels.float())
    with pytest.raises(ValueError, match="2 training batches: expected one that holds all of X and Y"):
        trainer(max_epochs=1).fit(module(), DataLoader(rows, batch_size=6))


def test_another_optimizer_descends_the_plain_squared_error(trainer: Trainers) -> None:
    """One step of SGD is one step of size lr down the gradient of ½·Σ(f(X) − Y)², by autograd."""
    ensemble = module(optimizer=functools.partial(torch.optim.SGD, lr=0.5), loss="mse")
    networks = [ensemble.member(i) for i in range(4)]
    fitting = trainer(max_epochs=1)
    fitting.fit(ensemble, DATA)
    labels = DATA.task.templates.labels.float()
    for i, network in enumerate(networks):
        ((network(torch.eye(DATA.in_features)) - labels).square().sum() / 2).backward()
        assert network.hidden.grad is not None
        expected = network.hidden.detach() - 0.5 * network.hidden.grad
        torch.testing.assert_close(ensemble.stack.hidden[i].detach(), expected, rtol=0, atol=1e-6)
    assert fitting.global_step == 1
    assert "val/exact_match/midpoint" in fitting.callback_metrics


def test_another_optimizer_takes_minibatches_and_the_whitened_loss_does_not(trainer: Trainers) -> None:
    rows = TensorDataset(torch.eye(DATA.in_features), DATA.task.templates.labels.float())
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    ensemble, fitting = module(optimizer=adam, loss="mse"), trainer(max_epochs=5)
    fitting.fit(ensemble, DataLoader(rows, batch_size=6))
    assert fitting.global_step == 10
    with pytest.raises(ValueError, match="2 training batches"):
        trainer(max_epochs=1).fit(module(optimizer=adam), DataLoader(rows, batch_size=6))


def test_the_whitened_loss_with_another_optimizer_is_descents_first_step(trainer: Trainers) -> None:
    ensemble = module(width=1024, optimizer=functools.partial(torch.optim.SGD, lr=1.0))
    own = module(width=1024)
    trainer(max_steps=1).fit(ensemble, DATA)
    trainer(max_steps=1).fit(own, DATA)
    torch.testing.assert_close(ensemble.stack.hidden, own.stack.hidden, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def arbitrary(trainer: Trainers) -> tuple[EnsembleModule, torch.Tensor, torch.Tensor, torch.Tensor]:
    """256 members on random X and Y; labels of norm 1, as the finite width's bias grows with their square."""
    generator = torch.Generator().manual_seed(0)
    x, y, new = (normalize(torch.randn(rows, 10, generator=generator)) for rows in (20, 20, 50))
    y = y[:, :3]
    ensemble = EnsembleModule(10, 3, width=16384, members=256, seed=1)
    trainer(max_epochs=20).fit(ensemble, DataLoader(TensorDataset(x, y), batch_size=20))
    return ensemble, x, y, new


def test_any_inputs_and_labels_reach_the_posterior(arbitrary: Any) -> None:
    """Mean and variance of 256 members at n/k = 819, within four standard errors of theory."""
    ensemble, x, y, new = arbitrary
    assert all(status.converged for status in ensemble.statuses)
    limit = posterior(x.double(), y.double(), new.double())
    outputs = predict(ensemble.stack, new).double()
    variance = limit.covariance.diagonal()[:, None]
    errors = (outputs.mean(0) - limit.mean) / (variance / 256).sqrt()
    assert float(errors.abs().max()) < 4.5  # 150 of them: four standard errors are passed by one in a hundred runs
    assert float(errors.square().mean().sqrt()) < 2
    # The variance's standard error at 256 members is √(2/255); outputs are independent, inputs are not.
    ratio = (outputs.var(0) / variance).mean(1)
    assert float((ratio - 1).abs().max()) < 4 * (2 / 255) ** 0.5


def test_validation_on_plain_batches_logs_the_ensembles_error(arbitrary: Any, trainer: Trainers) -> None:
    ensemble, x, y, _ = arbitrary
    (found,) = trainer().validate(ensemble, DataLoader(TensorDataset(x, y), batch_size=20), verbose=False)
    assert found["val/loss"] == pytest.approx(float((predict(ensemble.stack, x).mean(0) - y).square().mean()), rel=1e-3)
    assert found["val/loss"] < 1e-6


def test_a_member_trains_on_in_plain_pytorch(arbitrary: Any) -> None:
    ensemble, x, _, new = arbitrary
    network = ensemble.member(3)
    torch.testing.assert_close(network(new), ensemble(new)[3])
    before = ensemble.stack.hidden[3].detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    first = float(network(x).square().mean().detach())
    for _ in range(3):
        optimizer.zero_grad()
        loss = network(x).square().sum() / 2
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first * x.shape[0] * 3 / 2
    assert torch.equal(ensemble.stack.hidden[3], before)
