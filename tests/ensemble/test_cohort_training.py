"""Cohorts: independent of their size, and sized by the memory there is."""

from typing import Any

import pytest
import torch

from ntk_ensembles.ensemble import (
    Engine,
    Init,
    Members,
    Recipe,
    TrainedCohort,
    TwoLayerMLP,
    choose_cohort,
    train_cohort,
)
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import LimitPrediction

CPU = torch.device("cpu")
TASK = Addition(3)
THEORY = LimitPrediction(TASK, EvaluationSet.sample(TASK, 200, 0))


def recipe(width: int = 1100, engine: Engine = "identity", init: Init = "gaussian") -> Recipe:
    return Recipe(TASK.templates.labels.float(), width, init, seed=5, engine=engine)


def test_predictions_are_the_same_to_the_bit_in_every_cohort() -> None:
    together = train_cohort(recipe(), range(5), THEORY.inputs, CPU)
    threads = torch.get_num_threads()
    for indices in ([3], [4, 3], [0, 1, 3]):
        alone = train_cohort(recipe(), indices, THEORY.inputs, CPU)
        assert torch.equal(alone.predictions[indices.index(3)], together.predictions[3])
        assert alone.statuses[indices.index(3)] == together.statuses[3]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("states", [0, 1, 7, 50])
def test_few_states_are_predicted_to_the_same_bit_in_every_cohort(states: int) -> None:
    """Members, and blocks of hidden units, that are computed at once for a few states do not mix."""
    inputs = torch.cat([THEORY.inputs[:states], torch.zeros(1, len(TASK.templates), dtype=torch.float64)])
    trained = train_cohort(recipe(2100), range(5), inputs, CPU, keep_weights=True)
    weights = trained.weights
    assert weights is not None
    for member in range(5):
        own = {name: value[member : member + 1] for name, value in weights.items()}
        alone = Members.restore(recipe(2100), [member], own, CPU)
        assert torch.equal(alone.predict(inputs)[0], trained.predictions[member])
        network = TwoLayerMLP(len(TASK.templates), TASK.layout.bits, 2100).double()
        network.load_state_dict({name: value[0] for name, value in own.items()})
        # float32 sums of 2100 terms.
        torch.testing.assert_close(trained.predictions[member].double(), network(inputs), rtol=0, atol=2e-6)


def test_engines_agree_to_rounding() -> None:
    fast = train_cohort(recipe(), range(3), THEORY.inputs, CPU)
    general = train_cohort(recipe(engine="functional"), range(3), THEORY.inputs, CPU)
    # float32 sums of about a thousand terms, through four steps.
    torch.testing.assert_close(fast.predictions, general.predictions, rtol=0, atol=2e-5)


def test_the_cohort_is_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    each = recipe(1 << 16).member_bytes
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort_training.free_memory", lambda device: 100 * each)
    assert 1 <= choose_cohort(recipe(1 << 16), 1, 512, CPU) <= 64
    assert choose_cohort(recipe(1 << 16), 1, 3, CPU) <= 3
    assert choose_cohort(recipe(1 << 16), 1, 512, CPU, wanted=7) == 7
    with pytest.raises(ValueError, match=r"--cohort 400: needs .* GiB .*; expected at most \d+"):
        choose_cohort(recipe(1 << 16), 1, 512, CPU, wanted=400)
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort_training.free_memory", lambda device: each // 2)
    with pytest.raises(ValueError, match="--width 65536: one member needs"):
        choose_cohort(recipe(1 << 16), 1, 512, CPU)


def test_trained_members_have_the_theorys_mean_and_variance() -> None:
    """64 wide members: deviations from the NTK mean have the predicted size, and average out."""
    cohort = train_cohort(recipe(8192), range(64), THEORY.inputs, CPU)
    deviations = cohort.predictions.double() - THEORY.mean
    varying = THEORY.variance > 0
    scores = deviations[:, varying] / THEORY.variance[varying].sqrt()[:, None]
    # States are correlated, so the standard error is that of about 9 bits × a few independent directions,
    # 64 members each; the finite width adds about 2%.
    assert scores.square().mean().sqrt() == pytest.approx(1, abs=0.06)
    assert scores.mean(0).square().mean().sqrt() == pytest.approx(1 / 8, abs=0.04)


@pytest.mark.parametrize("changes", [{}, {"engine": "functional"}, {"init": "antisymmetric"}])
def test_members_restored_from_kept_weights_predict_the_same_to_the_bit(changes: dict[str, Any]) -> None:
    trained = train_cohort(recipe(**changes), range(3), THEORY.inputs, CPU, keep_weights=True)
    assert trained.weights is not None
    restored = Members.restore(recipe(**changes), range(3), trained.weights, CPU)
    assert torch.equal(restored.predict(THEORY.inputs), trained.predictions)
    with pytest.raises(ValueError, match="weights 'hidden' have shape"):
        Members.restore(recipe(128, **changes), range(3), trained.weights, CPU)


def test_joined_parts_are_one_cohort() -> None:
    whole = train_cohort(recipe(), range(4), THEORY.inputs, CPU, keep_weights=True)
    parts = [train_cohort(recipe(), part, THEORY.inputs, CPU, keep_weights=True) for part in ((0, 1), (2, 3))]
    joined = TrainedCohort.join(parts)
    assert joined.indices == whole.indices
    assert torch.equal(joined.predictions, whole.predictions)
    assert joined.weights is not None
    assert whole.weights is not None
    assert all(torch.equal(joined.weights[name], whole.weights[name]) for name in whole.weights)
