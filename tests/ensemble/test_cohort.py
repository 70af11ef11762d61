"""Cohorts: sized by the memory there is, and members with the theory's mean and variance."""

import pytest
import torch

from ntk_ensembles.ensemble import (
    Descent,
    DescentOptions,
    Init,
    MLPStack,
    Recipe,
    choose_cohort,
    predict,
    train_members,
)
from ntk_ensembles.tasks import Addition, EvaluationSet
from ntk_ensembles.theory import LimitPrediction

CPU = torch.device("cpu")
TASK = Addition(3)
LIMIT = LimitPrediction(TASK, EvaluationSet.sample(TASK, 200, 0))


def recipe(width: int = 1100, **changes: object) -> Recipe:
    return Recipe(TASK.templates.labels.float(), width, seed=5, **changes)  # type: ignore[arg-type]


def test_engines_agree_to_rounding() -> None:
    fast, _ = train_members(recipe(), range(3), CPU)
    general, _ = train_members(recipe(descent=DescentOptions(engine="functional")), range(3), CPU)
    # float32 sums of about a thousand terms, through four steps.
    torch.testing.assert_close(predict(fast, LIMIT.inputs), predict(general, LIMIT.inputs), rtol=0, atol=2e-5)


def test_the_cohort_is_what_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    each = recipe(1 << 16).training_bytes
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort.free_memory_bytes", lambda device: 100 * each)
    assert 1 <= choose_cohort(recipe(1 << 16), 1, 512, CPU) <= 64
    assert choose_cohort(recipe(1 << 16), 1, 3, CPU) <= 3
    assert choose_cohort(recipe(1 << 16), 1, 512, CPU, wanted=7) == 7
    # A CPU's processes share its memory.
    with pytest.raises(ValueError, match=r"cohort=70: expected an integer from 1 to (49|50)"):
        choose_cohort(recipe(1 << 16), 1, 512, CPU, wanted=70, processes=2)
    with pytest.raises(ValueError, match=r"cohort=400: expected an integer from 1 to \d+"):
        choose_cohort(recipe(1 << 16), 1, 512, CPU, wanted=400)
    monkeypatch.setattr("ntk_ensembles.ensemble.cohort.free_memory_bytes", lambda device: each // 2)
    with pytest.raises(ValueError, match="width=65536: expected a smaller width .one member needs"):
        choose_cohort(recipe(1 << 16), 1, 512, CPU)


def test_trained_members_have_the_theorys_mean_and_variance() -> None:
    """64 wide members: deviations from the NTK mean have the predicted size, and average out."""
    stack, _ = train_members(recipe(8192), range(64), CPU)
    deviations = predict(stack, LIMIT.inputs).double() - LIMIT.mean
    varying = LIMIT.variance > 0
    scores = deviations[:, varying] / LIMIT.variance[varying].sqrt()[:, None]
    # States are correlated, so the standard error is that of about 9 bits × a few independent directions,
    # 64 members each; the finite width adds about 2%.
    assert scores.square().mean().sqrt() == pytest.approx(1, abs=0.06)
    assert scores.mean(0).square().mean().sqrt() == pytest.approx(1 / 8, abs=0.04)


def test_wrong_words_are_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match="precision='bf16': expected one of 32-true, bf16-mixed, 64-true"):
        recipe(precision="bf16")
    with pytest.raises(ValueError, match="init='zeros': expected one of gaussian, antisymmetric"):
        recipe(init="zeros")


@pytest.mark.parametrize("init", ["gaussian", "antisymmetric"])
def test_members_are_those_of_the_recipes_seed_and_init_trained_in_its_precision(init: Init) -> None:
    templates, bits = TASK.templates.labels.shape
    drawn = MLPStack(templates, bits, 64, [2, 5], seed=5, init=init)
    made = recipe(64, init=init).make_stack([2, 5], CPU)
    assert torch.equal(made.hidden, drawn.hidden)
    assert torch.equal(made.readout, drawn.readout)
    low, full = (train_members(recipe(64, init=init, precision=p), [2, 5], CPU)[0] for p in ("bf16-mixed", "32-true"))
    descent = Descent(drawn, bfloat16=True)
    descent.bind(torch.eye(templates), TASK.templates.labels.float())
    while descent.running:
        descent.step()
    assert torch.equal(low.hidden, drawn.hidden)
    assert not torch.equal(low.hidden, full.hidden)
    # Trained members are for use: predictions record no gradients.
    assert not any(parameter.requires_grad for parameter in low.parameters())


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("64-true", torch.float64)])
def test_precision_does_what_it_says(precision: str, dtype: torch.dtype) -> None:
    stack, statuses = train_members(recipe(precision=precision), [0], CPU)
    assert stack.hidden.dtype == dtype
    assert statuses[0].converged
