"""Records of members: joined, gathered, and kept by Lightning's own checkpoints."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer

from ntk_ensembles.ensemble import MemberStatus, TrainedCohort
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import LimitPrediction
from ntk_ensembles.training import EnsembleModule, MemberRecords, Records

STATES, BITS = 2, 3


def records(indices: list[int]) -> Records:
    """Every value tells which member it belongs to; member i has i % 3 + 1 losses."""
    statuses = [MemberStatus(i % 2 == 0, i, i / 7, 0, [i + step / 8 for step in range(i % 3 + 1)]) for i in indices]
    predictions = torch.tensor([float(i) for i in indices])[:, None, None].expand(-1, STATES, BITS)
    cohort = TrainedCohort(tuple(indices), statuses, predictions, {"init": 1.0, "train": 2.0, "evaluate": 3.0})
    return Records.of(cohort, predictions.to(torch.float16))


def check(joined: Records, indices: list[int]) -> None:
    assert joined.indices.tolist() == sorted(indices)
    losses = torch.split(joined.losses, joined.loss_counts.tolist())
    for row, i in enumerate(sorted(indices)):
        assert bool(joined.converged[row]) == (i % 2 == 0)
        assert int(joined.steps[row]) == i
        assert float(joined.relative_loss[row]) == i / 7
        assert losses[row].tolist() == [i + step / 8 for step in range(i % 3 + 1)]
        assert (joined.deviations[row] == i).all()


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(9)), st.lists(st.integers(1, 8), max_size=3))
def test_joined_members_stand_in_order_each_with_its_own(order: list[int], cuts: list[int]) -> None:
    bounds = [0, *sorted(cuts), 9]
    parts = [order[low:high] for low, high in zip(bounds, bounds[1:], strict=False) if low < high]
    check(Records.join([records(part) for part in parts]), order)
    metric = MemberRecords(STATES, BITS)
    for part in parts:
        metric.update(records(part))
    check(metric.gathered(), order)


def test_one_member_and_one_state_keep_their_axes() -> None:
    metric = MemberRecords(1, 1)
    assert len(metric.gathered()) == 0
    metric.update(Records.none(1, 1))
    single = records([4])
    one = Records(**{**vars(single), "deviations": single.deviations[:, :1, :1]})
    metric.update(one)
    assert metric.gathered().deviations.shape == (1, 1, 1)
    assert metric.gathered().indices.tolist() == [4]
    metric.reset()
    assert len(metric.gathered()) == 0


def test_a_member_that_is_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="member 3 is there twice"):
        Records.join([records([1, 3]), records([2, 3])])


def test_a_lightning_checkpoint_holds_the_members(tmp_path: Path) -> None:
    task = Addition(2)
    theory = LimitPrediction(task, EvaluationSet.sample(task, 20, 0))
    module = EnsembleModule("addition", {"bits": 2}, {"width": 128, "evaluation_states": 20}, theory=theory)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        barebones=False,
    )
    trainer.strategy.connect(module)
    module.training_step([0, 1, 2])
    path = tmp_path / "module.ckpt"
    trainer.save_checkpoint(path)
    loaded = EnsembleModule.load_from_checkpoint(path, weights_only=True)
    assert torch.equal(loaded.theory.mean, theory.mean)
    assert loaded.recipe.width == 128
    before, after = module.records.gathered(), loaded.records.gathered()
    assert after.indices.tolist() == [0, 1, 2]
    assert torch.equal(before.deviations, after.deviations)
