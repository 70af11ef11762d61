"""Training with `torch.func`, for any training inputs: the readable path, and the oracle for `identity`.

Members have an axis of their own; `vmap` runs the network's definition over it, `vjp` pulls cotangents
back through it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from ntk_ensembles.ensemble.network import Cohort, TwoLayerMLP

_STATES_AT_ONCE = 1024


class FunctionalModel:
    """A cohort as a function of its weights (a `Trainable`).

    Args:
        cohort: the initial weights; they are copied, and `restart` draws them anew.
        inputs: X, one training input a row, on the cohort's device.
        low_precision: pull cotangents back in bfloat16 under autocast; weights and outputs keep the
            cohort's dtype.

    Attributes:
        weights: the members' current weights, by parameter name, members first.
    """

    def __init__(
        self, cohort: Cohort, inputs: Float[Tensor, "templates features"], *, low_precision: bool = False
    ) -> None:
        features, bits = cohort.hidden.shape[2], cohort.readout.shape[2]
        # Only the definition is used; its own parameters would be memory for nothing.
        with torch.device("meta"):
            self._network = TwoLayerMLP(features, bits, cohort.width)
        self._cohort = cohort
        self._inputs = inputs
        self._low_precision = low_precision
        self.weights = cohort.state()

    def _call(self, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        outputs: Tensor = functional_call(self._network, weights, (inputs,))
        return outputs

    def outputs(self) -> Float[Tensor, "members bits templates"]:
        """f(X)ᵀ of every member."""
        return self.predict(self._inputs).mT

    def step(self, cotangents: Float[Tensor, "members bits templates"]) -> Float[Tensor, "members bits templates"]:
        """Change every member's weights by −Jᵀ·cotangent and return the new outputs."""

        def pull(weights: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
            pullback = vjp(lambda w: self._call(w, self._inputs), weights)[1]
            (gradients,) = pullback(cotangent)
            return {name: weights[name] - gradients[name] for name in weights}

        device = cotangents.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._low_precision):
            like = torch.bfloat16 if self._low_precision else cotangents.dtype
            self.weights = vmap(pull)(self.weights, cotangents.mT.to(like))
        return self.outputs()

    def restart(self, position: int) -> None:
        """Set one member back to its initial weights."""
        member = self._cohort.member(position)
        member.redraw(0)
        for name, value in member.state().items():
            self.weights[name][position] = value[0]

    def predict(self, inputs: Float[Tensor, "inputs features"]) -> Float[Tensor, "members inputs bits"]:
        """f(x) of every member at any inputs."""
        parts = [
            vmap(self._call, in_dims=(0, None))(self.weights, part) for part in torch.split(inputs, _STATES_AT_ONCE)
        ]
        return torch.cat(parts, 1)
