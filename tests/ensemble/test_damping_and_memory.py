"""Restarts halve the step of either loss, and no more is remembered than is promised."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ntk_ensembles.ensemble import Descent, DescentOptions, Loss, MemberStatus, MLPStack
from ntk_ensembles.ensemble import descent as descent_module
from ntk_ensembles.theory import ntk

EYE = torch.eye(6, dtype=torch.float64)
LABELS = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Diverging:
    """Outputs are 0 until a step is taken, and then no numbers; drawing a member again brings its zeros back."""

    def __init__(self, members: int) -> None:
        self.values = torch.zeros(members, 3, 6, dtype=torch.float64)
        self.cotangents: list[Tensor] = []

    def outputs(self, *, coarse: bool = False) -> Tensor:
        return self.values.clone()

    def step(self, cotangents: Tensor, *, coarse: bool = False) -> Tensor:
        self.cotangents.append(cotangents.clone())
        self.values[:] = math.nan
        return self.outputs()


class Redrawn(MLPStack):
    """A stack that puts the engine's member back too."""

    engine: Diverging | None = None

    def redraw(self, position: int) -> None:
        super().redraw(position)
        if self.engine is not None:
            self.engine.values[position] = 0


@pytest.mark.parametrize("loss", ["whitened", "mse"])
def test_every_restart_has_half_the_step_of_the_one_before(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step from the same outputs, five times: 1, 1/2, 1/4, 1/8 and 1/16 of the first cotangent."""
    engine, stack = Diverging(1), Redrawn(6, 3, 4, 1, dtype=torch.float64)
    stack.engine = engine
    monkeypatch.setattr(descent_module, "make_engine", lambda *arguments, **options: engine)
    descent = Descent(stack, DescentOptions(loss, steps_max=50))
    descent.bind(EYE, LABELS)
    while descent.running:
        descent.step()
    (status,) = descent.statuses
    assert (status.converged, status.restarts, status.steps) == (False, 4, 5)
    first = engine.cotangents[0]
    assert float(first.abs().max()) > 0
    for restart, cotangents in enumerate(engine.cotangents):
        torch.testing.assert_close(cotangents, first / 2**restart, rtol=1e-12, atol=0)


@pytest.mark.parametrize("together", [1, 100])
def test_six_steps_are_remembered_and_no_more(together: int) -> None:
    stack = MLPStack(6, 3, 3, 2, dtype=torch.float64)
    descent = Descent(stack, DescentOptions(tolerance=1e-12, steps_max=20), together=together)
    descent.bind(EYE, LABELS)
    for step in range(1, 11):
        descent.step()
        state: Any = descent.state_dict()
        for training in state["trainings"]:
            for remembered in training["history"].values():
                assert len(remembered) == min(step, 6)


def test_a_stopped_member_whose_numbers_are_none_disturbs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three members together, of which the middle one ends as not a number: the others are what they are alone."""

    class Spoilt(MLPStack):
        def redraw(self, position: int) -> None:
            super().redraw(position)
            if self.indices[position] == 1:
                with torch.no_grad():
                    self.hidden[position] = math.nan

    options = DescentOptions(tolerance=1e-8, steps_max=40)

    def trained(members: list[int]) -> tuple[MLPStack, Descent]:
        stack = Spoilt(6, 3, 200, members, dtype=torch.float64)
        descent = Descent(stack, options, together=100)
        descent.bind(EYE, LABELS)
        while descent.running:
            descent.step()
        return stack, descent

    together, descent = trained([0, 1, 2])
    assert [status.converged for status in descent.statuses] == [True, False, True]
    assert descent.statuses[1].restarts == 4
    for position in (0, 2):
        alone, other = trained([position])
        assert other.statuses[0].steps == descent.statuses[position].steps
        torch.testing.assert_close(alone.hidden[0], together.hidden[position], rtol=0, atol=1e-10)
        torch.testing.assert_close(alone.readout[0], together.readout[position], rtol=0, atol=1e-10)


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_a_descent_that_has_diverged_goes_on_with_its_damping(stop_after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between a divergence and the restart, and after some restarts: every step is the uninterrupted one's."""

    def descended(interrupted: bool) -> tuple[list[Tensor], MemberStatus]:
        engine, stack = Diverging(1), Redrawn(6, 3, 4, 1, dtype=torch.float64)
        stack.engine = engine
        monkeypatch.setattr(descent_module, "make_engine", lambda *arguments, **options: engine)
        descent = Descent(stack)
        descent.bind(EYE, LABELS)
        for _ in range(stop_after):
            descent.step()
        if interrupted:
            state = descent.state_dict()
            descent = Descent(stack)
            descent.load_state_dict(state)
            descent.bind(EYE, LABELS)
        while descent.running:
            descent.step()
        return engine.cotangents, descent.statuses[0]

    (expected, status), (found, resumed) = descended(False), descended(True)
    assert (resumed.restarts, resumed.steps) == (status.restarts, status.steps) == (4, 5)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_saved_state_does_not_change_when_its_descent_or_another_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after a divergence halves the damping and forgets what was remembered of the member."""
    engine, stack = Diverging(2), Redrawn(6, 3, 4, 2, dtype=torch.float64)
    stack.engine = engine
    monkeypatch.setattr(descent_module, "make_engine", lambda *arguments, **options: engine)
    saving = Descent(stack, together=2)
    saving.bind(EYE, LABELS)
    saving.step()
    state = saving.state_dict()
    saved = copy.deepcopy(state)
    saving.step()
    loading = Descent(stack, together=2)
    loading.load_state_dict(state)
    engine.values[:] = math.nan
    loading.bind(EYE, LABELS)
    loading.step()
    assert loading.statuses[0].restarts == 1
    assert [part["damping"].tolist() for part in state["trainings"]] == [[[[1.0]], [[1.0]]]]
    for now, then in zip(state["trainings"], saved["trainings"], strict=True):
        for name, values in then["history"].items():
            assert float(then["history"]["cotangents"][0].abs().min()) > 0
            for value, before in zip(now["history"][name], values, strict=True):
                assert torch.equal(value.nan_to_num(7.0), before.nan_to_num(7.0))
    assert state["statuses"] == saved["statuses"]


def test_a_step_is_measured_in_bfloat16_only_while_all_of_a_batch_are_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """One member has half of its loss left throughout; the other passes a hundredth in the second step."""
    shares = [[0.5, 0.5], [0.5, 1e-3], [0.5, 1e-4], [1e-9, 1e-9]]
    asked: list[bool] = []

    class Scripted:
        def __init__(self) -> None:
            self.values = torch.zeros(2, 3, 6, dtype=torch.float64)

        def outputs(self, *, coarse: bool = False) -> Tensor:
            return self.values.clone()

        def step(self, cotangents: Tensor, *, coarse: bool = False) -> Tensor:
            left = torch.tensor(shares[len(asked)], dtype=torch.float64).sqrt()
            asked.append(coarse)
            self.values = LABELS.T * (1 - left[:, None, None])
            return self.outputs()

    monkeypatch.setattr(descent_module, "make_engine", lambda *arguments, **options: Scripted())
    descent = Descent(MLPStack(6, 3, 4, 2, dtype=torch.float64), bfloat16=True, together=2)
    descent.bind(EYE, LABELS)
    while descent.running:
        descent.step()
    assert asked == [True, True, False, False]


@pytest.mark.parametrize("together", [1, 2])
def test_members_that_diverge_are_drawn_again_each_by_itself(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch that a member is in: the second and the third of four diverge once, as their first step."""
    drawn: list[int] = []

    class Watched(MLPStack):
        def redraw(self, position: int) -> None:
            super().redraw(position)
            drawn.append(position)

    class OnceTooFar:
        def __init__(self, first: int) -> None:
            self.values = torch.zeros(together, 3, 6, dtype=torch.float64)
            self.far = [1 <= first + row <= 2 for row in range(together)]

        def outputs(self, *, coarse: bool = False) -> Tensor:
            return self.values.clone()

        def step(self, cotangents: Tensor, *, coarse: bool = False) -> Tensor:
            self.values = LABELS.T.expand(together, -1, -1) * torch.tensor(
                [[[1e6 if far else 1.0]] for far in self.far]
            )
            self.far = [False] * together
            return self.outputs()

    made = iter(range(0, 4, together))
    monkeypatch.setattr(descent_module, "make_engine", lambda *arguments, **options: OnceTooFar(next(made)))
    stack = Watched(6, 3, 4, 4, dtype=torch.float64)
    drawn.clear()
    descent = Descent(stack, together=together)
    descent.bind(EYE, LABELS)
    while descent.running:
        descent.step()
    assert sorted(drawn) == [1, 2]
    assert [status.restarts for status in descent.statuses] == [0, 1, 1, 0]


def test_a_finished_descent_that_is_loaded_begins_anew_with_other_data_and_keeps_no_steps() -> None:
    stack = MLPStack(6, 3, 100, 2, dtype=torch.float64)
    descent = Descent(stack)
    descent.bind(EYE, LABELS)
    while descent.running:
        descent.step()
    descent.release()
    state = descent.state_dict()
    assert state["trainings"] == []
    for labels, begins in ((LABELS, False), (1 - LABELS, True)):
        loaded = Descent(stack)
        loaded.load_state_dict(copy.deepcopy(state))
        loaded.bind(EYE, labels)
        assert loaded.running == begins


class Scripted:
    """Outputs that leave these shares of the first squared error, one after the other, whatever the cotangents are."""

    def __init__(self, shares: list[float]) -> None:
        self.targets = LABELS.T[None]
        self.shares = [1.0, *shares]
        self.at = 0

    def outputs(self, *, coarse: bool = False) -> Tensor:
        return self.targets * (1 - math.sqrt(self.shares[self.at]))

    def step(self, cotangents: Tensor, *, coarse: bool = False) -> Tensor:
        self.at += 1
        return self.outputs()


@pytest.mark.parametrize(
    ("shares", "restarts", "converged"),
    [
        # Plain gradient descent may rise a good deal and come down again.
        ([5000.0, 1e-8], 0, True),
        ([1e5, 1.0, 1e-8], 1, True),
        ([math.inf, 1.0, 1e-8], 1, True),
        # To the tolerance itself, and not beyond it.
        ([0.5, 1.0e-6 * (1 - 1e-9)], 0, True),
        ([0.5, 1.9e-6, 1.1e-6, 0.9e-6], 0, True),
    ],
)
def test_when_a_member_has_diverged_and_when_it_has_converged(
    shares: list[float], restarts: int, converged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Scripted(shares)
    monkeypatch.setattr(descent_module, "make_engine", lambda *arguments, **options: engine)
    descent = Descent(MLPStack(6, 3, 4, 1, dtype=torch.float64), DescentOptions(tolerance=1e-6, steps_max=50))
    descent.bind(EYE, LABELS)
    while descent.running:
        descent.step()
    (status,) = descent.statuses
    assert (status.restarts, status.converged, status.steps) == (restarts, converged, len(shares))


def test_a_member_that_has_nothing_to_learn_has_learned_it() -> None:
    """Labels of 0 and members that start at exactly 0: no first loss to compare with."""
    assert MemberStatus(losses=[0.0]).relative_loss == 0
    assert MemberStatus().relative_loss == 1
    descent = Descent(MLPStack(6, 3, 2, 2, init="antisymmetric", dtype=torch.float64))
    descent.bind(EYE, torch.zeros(6, 3, dtype=torch.float64))
    assert not descent.running
    assert [(status.converged, status.steps) for status in descent.statuses] == [(True, 0)] * 2


def test_other_inputs_with_the_same_labels_are_other_data() -> None:
    stack = MLPStack(6, 3, 400, 2, dtype=torch.float64)
    descent = Descent(stack)
    descent.bind(EYE, LABELS)
    while descent.running:
        descent.step()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(6, 6, dtype=torch.float64, generator=generator) for _ in range(2)]
    for other in inputs:
        descent.bind(other, LABELS)
        assert descent.running
        while descent.running:
            descent.step()
        outputs = stack(other).detach()
        assert float((outputs - LABELS).square().mean()) < 1e-4
    descent.bind(inputs[1], LABELS)
    assert not descent.running


def test_a_step_calls_the_closure_first_as_every_optimizer_does() -> None:
    stack = MLPStack(6, 3, 400, 1, dtype=torch.float64)
    descent = Descent(stack)
    descent.bind(EYE, LABELS)
    before = stack.hidden.detach().clone()
    seen: list[bool] = []

    def closure() -> str:
        seen.append(torch.equal(stack.hidden, before))
        return "loss"

    assert descent.step(closure) == "loss"
    assert seen == [True]
    assert not torch.equal(stack.hidden, before)
    assert descent.step() is None


class Linear:
    """f = A·θ of each output, with A·Aᵀ = Θ^½·M·Θ^½: what the whitened loss sees is M alone."""

    def __init__(self, eigenvalues: list[float]) -> None:
        values, vectors = torch.linalg.eigh(ntk(EYE, EYE))
        generator = torch.Generator().manual_seed(0)
        axes = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))[0]
        self.jacobian = vectors * values.sqrt() @ vectors.T @ axes * torch.tensor(eigenvalues).double().sqrt()
        self.theta = torch.zeros(1, 3, 6, dtype=torch.float64)

    def outputs(self, *, coarse: bool = False) -> Tensor:
        outputs: Tensor = self.theta @ self.jacobian.T
        return outputs

    def step(self, cotangents: Tensor, *, coarse: bool = False) -> Tensor:
        self.theta = self.theta - cotangents @ self.jacobian
        return self.outputs()


@pytest.mark.parametrize(
    "eigenvalues", [[1.0] * 6, [0.5, 1.5] * 3, [0.4, 0.9, 1.7] * 2, [0.3, 0.6, 1.0, 1.4, 1.9, 1.0]]
)
def test_a_linear_model_needs_a_step_for_each_eigenvalue_and_one_more(
    eigenvalues: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GMRES does: after a change along each, the combination of them leaves nothing but rounding."""
    engine = Linear(eigenvalues)
    monkeypatch.setattr(descent_module, "make_engine", lambda *arguments, **options: engine)
    descent = Descent(MLPStack(6, 3, 4, 1, dtype=torch.float64), DescentOptions(tolerance=1e-15, steps_max=40))
    descent.bind(EYE, LABELS)
    while descent.running:
        descent.step()
    (status,) = descent.statuses
    assert status.converged
    different = len(set(eigenvalues))
    assert status.steps <= different + 1
    # No method could do with fewer steps; 1 itself is the size of a step, which needs none before.
    assert status.steps >= different
