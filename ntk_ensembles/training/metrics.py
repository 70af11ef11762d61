"""What is measured on evaluation states, as torchmetrics, each beside what infinite width predicts."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, MultilabelExactMatch

from ntk_ensembles.theory import DECODERS, bit_error_probability, decode, exact_match_probability, margins
from ntk_ensembles.training.data import EvaluationBatch


class EvaluationMetrics(MetricCollection):
    """Metrics of an ensemble's mean on evaluation states.

    For each decoder ``exact_match/DECODER``, the share of states all of whose bits are decoded right, and
    ``bit_accuracy/DECODER``, the share of bits; and ``rms_deviation``, the root mean square of the ensemble's mean
    minus the NTK mean. Each has a twin ``predicted_…``, its expected value at infinite width.

    Args:
        prefix: Prefix of the names, such as "val/".
        bits: Bits of a state, m.
    """

    def __init__(self, prefix: str, bits: int) -> None:
        metrics: dict[str, Metric | MetricCollection] = {}
        for decoder in DECODERS:
            metrics[f"exact_match/{decoder}"] = MultilabelExactMatch(bits, validate_args=False)
            metrics[f"predicted_exact_match/{decoder}"] = MeanMetric()
            metrics[f"bit_accuracy/{decoder}"] = BinaryAccuracy(validate_args=False)
            metrics[f"predicted_bit_accuracy/{decoder}"] = MeanMetric()
        metrics["rms_deviation"] = MeanSquaredError(squared=False)
        metrics["predicted_rms_deviation"] = MeanSquaredError(squared=False)
        super().__init__(metrics, prefix=prefix, compute_groups=False)

    def update(  # type: ignore[override]  # torchmetrics' own signature, which mypy takes from ModuleDict
        self, mean: Float[Tensor, "states bits"], batch: EvaluationBatch, members: int, *, antisymmetric: bool
    ) -> None:
        """Count one batch of states.

        Args:
            mean: The ensemble's mean outputs.
            batch: The states and what is known of them.
            members: Number of members in the mean.
            antisymmetric: Whether they started at exactly 0: their variance at infinite width is then 0.
        """
        next_states, variance = batch["next_states"], batch["variance"] * (not antisymmetric)
        for decoder in DECODERS:
            thresholds = batch["thresholds"][decoder]
            decoded = decode(mean.to(thresholds), thresholds).int()
            expected = margins(batch["mean"], thresholds, next_states)
            for name in ("exact_match", "bit_accuracy"):
                self[f"{name}/{decoder}"].update(decoded, next_states.int())
            exact = exact_match_probability(expected, variance, members)
            errors = bit_error_probability(expected, variance, members)
            self[f"predicted_exact_match/{decoder}"].update(exact)
            self[f"predicted_bit_accuracy/{decoder}"].update(1 - errors)
        spread = (variance / members).sqrt()
        self["rms_deviation"].update(mean.to(batch["mean"]), batch["mean"])
        self["predicted_rms_deviation"].update(spread, spread.new_zeros(spread.shape))
