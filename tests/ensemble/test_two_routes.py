"""Every fast path of training and prediction against the rule written out in float64 with autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ntk_ensembles import SBN, Addition, Permutation
from ntk_ensembles.ensemble import Descent, DescentOptions, Init, Loss, MLPStack, predict, products
from ntk_ensembles.theory import ntk

WIDTH = 2048
TASKS = {"addition": Addition(3), "permutation": Permutation(6), "sbn": SBN(4, 2)}


def plain(labels: Tensor, init: Init, loss: Loss, steps: int, states: Tensor) -> Tensor:
    """Return member 1's outputs after so many steps, (states, bits): docs/theory.md, (29) and (32)."""
    count, bits = labels.shape
    drawn = MLPStack(count, bits, WIDTH, [1], init=init)
    weights = [value[0].detach().double().requires_grad_() for value in (drawn.hidden, drawn.readout)]
    kernel = ntk(torch.eye(count, dtype=torch.float64), torch.eye(count, dtype=torch.float64))
    whitened, eigenvalues = torch.linalg.inv(kernel), torch.linalg.eigvalsh(kernel)
    root = torch.linalg.cholesky(whitened)

    def outputs(inputs: Tensor) -> Tensor:
        return weights[1] @ torch.relu(weights[0] @ inputs.T / math.sqrt(count)) / math.sqrt(WIDTH)

    memory: list[tuple[Tensor, Tensor]] = []
    for _ in range(steps):
        found = outputs(torch.eye(count, dtype=torch.float64))
        residuals = found.detach() - labels.double().T
        best, cotangent = residuals, torch.zeros_like(residuals)
        if memory:
            columns = torch.stack([(change @ root).flatten() for _, change in memory], 1)
            omega = torch.linalg.lstsq(columns, -(residuals @ root).flatten()[:, None]).solution[:, 0]
            best = residuals + sum(w * change for w, (_, change) in zip(omega, memory, strict=True))
            cotangent = sum((w * past for w, (past, _) in zip(omega, memory, strict=True)), cotangent)
        step = best @ whitened if loss == "whitened" else best * (2 / (eigenvalues[0] + eigenvalues[-1]))
        cotangent = cotangent + step
        gradients = torch.autograd.grad(found, weights, cotangent)
        with torch.no_grad():
            for value, gradient in zip(weights, gradients, strict=True):
                value -= gradient
            change = outputs(torch.eye(count, dtype=torch.float64)) - labels.double().T - residuals
        memory = [*memory, (cotangent, change)][-6:]
    return outputs(states).detach().T


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("init", ["gaussian", "antisymmetric"])
@pytest.mark.parametrize("loss", ["whitened", "mse"])
@pytest.mark.parametrize(
    ("way", "tolerance"),
    [
        # float64 differs by the ridge of the extrapolation alone. float32: 6e-8 a number, times the steps. bfloat16:
        # 4e-3 a number, which each step corrects in the one before, down to the stop at 1e-6 of the first loss:
        # 1e-3 of outputs of size 0.1 to 1, amplified where a state is far from every template.
        ({"dtype": torch.float64}, 1e-7),
        ({}, 5e-6),
        ({"together": 100}, 5e-6),
        ({"onednn": True}, 5e-6),
        ({"engine": "functional"}, 5e-6),
        ({"bfloat16": True}, 5e-3),
        ({"bfloat16": True, "together": 100}, 5e-3),
        ({"bfloat16": True, "engine": "functional"}, 5e-3),
    ],
)
def test_trained_members_predict_as_the_written_out_rule_says(
    name: str, init: Init, loss: Loss, way: dict[str, Any], tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS[name]
    templates = task.templates
    labels = templates.labels.float()
    if "onednn" in way:
        if not torch.backends.mkldnn.is_available():
            pytest.skip("PyTorch is without oneDNN here")
        monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    stack = MLPStack(*labels.shape, WIDTH, [0, 1], init=init, dtype=way.get("dtype", torch.float32))
    options = DescentOptions(loss, 1e-6, 400, way.get("engine", "auto"))
    descent = Descent(stack, options, bfloat16=way.get("bfloat16", False), together=way.get("together"))
    descent.bind(torch.eye(len(labels)), labels)
    while descent.running:
        descent.step()
    assert descent.statuses[1].converged
    generator = torch.Generator().manual_seed(0)
    matches = torch.rand(20, len(labels), generator=generator) < 0.2
    matches[:, 0] = True
    states = templates.encode(matches).double()
    expected = plain(labels, init, loss, descent.statuses[1].steps, states)
    found = predict(stack, states)[1]
    assert float((found.double() - expected).abs().max()) < tolerance
