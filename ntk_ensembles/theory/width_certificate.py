"""What a decoder is expected to do at a finite width, over all states: an estimate beside `certificate`'s proofs.

A margin is that of infinite width less the bias of the mean, and a score is the margin over the deviation at this width
(docs/theory.md, section 10). Over all states with s matching templates, C_j of which set bit j, the bias is bounded by
the templates that have the most of it. The variance that the width adds hardly depends on the state (it is of order
1/n, for s = 2 as for s = k), but on the bit: it is taken as the largest seen on evaluation and random states. All this
rests on an asymptotic expansion: it is an estimate, not a proof.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.templates import MatchBounds
from ntk_ensembles.theory.certificate import Certificate, members_needed, scopes_of
from ntk_ensembles.theory.decoding import DECODERS, TIE, Decoder, LimitPrediction, margin_table
from ntk_ensembles.theory.finite_width import FiniteWidth, Labels, WidthPrediction, rows_at_equal_distances
from ntk_ensembles.theory.kernels import Layers
from ntk_ensembles.theory.predictor import TemplatePredictor

_RANDOM_STATES = 64
_UNITS = 256

_IS = (
    "This is an estimate, not a proof: the expansion in √(templates/width) to first order, and the variance as seen on "
    "evaluation and random states."
)


def spread_at_width(
    finite: FiniteWidth, matches: Bool[Tensor, "states templates"], *, units: int = _UNITS
) -> Float64[Tensor, "kinds bits"]:
    """Return for each bit the largest variance that the width adds to that of infinite width, on some states.

    Args:
        finite: Theory of the width.
        matches: Templates that match each state; states that fewer than two match do not count.
        units: Number of hidden units to draw, at least 2; 256 by default.

    Returns:
        A row for states in which the bit's next value is 0, and one for 1; where none of the states has that value, the
        largest of any bit.
    """
    matches = matches[matches.sum(1) > 1]
    predictor = finite.predictor
    variance = finite.variance(matches, generator=torch.Generator().manual_seed(0), units=units).variance
    added = variance - predictor.variance(matches.sum(1))[:, None]
    is_one = predictor.templates.set_counts(matches) > 0
    largest = torch.stack([added.masked_fill(is_one != value, -math.inf).amax(0) for value in (False, True)])
    return largest.where(largest > -math.inf, largest.max())


def score_at_width(
    finite: FiniteWidth, bounds: MatchBounds, decoder: Decoder, spread: Float64[Tensor, "kinds bits"]
) -> float:
    """Return the smallest margin in standard deviations over all states and bits at a finite width.

    Args:
        finite: Theory of the width.
        bounds: Bounds of the same templates, over the states in question.
        decoder: One of `DECODERS`.
        spread: Variance that the width adds, as from `spread_at_width`.

    Returns:
        A lower estimate; 0 where the decoder fails or ties, ∞ where nothing ever matches.

    Raises:
        RuntimeError: A search found no state within its time limit.
    """
    most, fewest = bounds.most.bound, bounds.min_matches()
    if fewest is None:
        return math.inf
    low, fan_ins = fewest.bound, finite.predictor.fan_in.tolist()
    scores = [_scores(finite, decoder, most, bit, spread) for bit in range(len(fan_ins))]

    def lowest(bit: int, set_count: int, high: int) -> float:
        possible = scores[bit][low : high + 1, set_count]
        return float(possible.min()) if len(possible) else math.inf

    # The lowest score of each (bit, C_j), and whether the largest s there is exact.
    heap = [
        (lowest(bit, c, min(most, bounds.max_matches_estimate(bit, c))), bit, c, False)
        for bit, fan_in in enumerate(fan_ins)
        for c in range(min(fan_in, most) + 1)
    ]
    heapq.heapify(heap)
    while True:
        score, bit, set_count, exact = heap[0]
        if exact or score in (0.0, math.inf):
            return score
        bound = bounds.max_matches(bit, set_count)
        high = -1 if bound is None else bound.bound
        heapq.heapreplace(heap, (lowest(bit, set_count, high), bit, set_count, True))


def _scores(
    finite: FiniteWidth, decoder: Decoder, most: int, bit: int, spread: Float64[Tensor, "kinds bits"]
) -> Float64[Tensor, "s set_counts"]:
    """Return the smallest score of one bit for every s from 0 on (rows) and every C_j (columns)."""
    predictor = finite.predictor
    templates = len(predictor.templates)
    counts = torch.arange(min(int(predictor.fan_in[bit]), most) + 1)
    fan_in = predictor.fan_in[bit].expand(len(counts))
    margins = margin_table(predictor, decoder, most, counts, fan_in).margins
    num_matches = torch.arange(most + 1)
    sets = predictor.templates.labels[:, bit]
    # A 1-bit is lowered by the templates with the least bias, a 0-bit raised by those with the most.
    moved = finite.moved[:templates, bit]
    w_m, w_u = predictor.weights(num_matches)
    constant = w_u * finite.moved[:, bit].sum()
    setters, others = _cumulated(moved[sets].sort().values), _cumulated(moved[~sets].sort().values)
    highest = _cumulated(moved[~sets].sort(descending=True).values)
    unset = (num_matches[:, None] - counts).clamp(0, len(others) - 1)
    lowest = (w_m - w_u)[:, None] * (setters[counts] + others[unset]) + constant[:, None]
    raised = (w_m - w_u) * highest[num_matches.clamp_max(len(highest) - 1)] + constant
    change = torch.where(counts > 0, lowest, -raised[:, None])
    # A template alone is a training point.
    trained = finite.trained[:templates, bit]
    if most >= 1:
        if bool(sets.any()):
            change[1, 1:2] = trained[sets].min()
        change[1, 0] = -trained[~sets].max() if bool((~sets).any()) else 0.0
    added = spread[(counts > 0).long(), bit]
    variance = (predictor.variance(num_matches)[:, None] + added).clamp_min(torch.finfo(torch.float64).tiny)
    variance[: min(2, len(variance))] = torch.finfo(torch.float64).tiny
    at_width = margins + change
    scores = (at_width / variance.sqrt()).masked_fill(at_width <= TIE, 0.0)
    return scores.masked_fill(margins.isinf(), math.inf)


def _cumulated(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def certify_width(
    task: Task[Any, Any],
    width: int,
    *,
    antisymmetric: bool = False,
    labels: Labels = "plain",
    layers: Layers = "both",
    padding: int = 0,
    decoders: Sequence[Decoder] = DECODERS,
    delta: float = 1e-6,
    evaluation: EvaluationSet | None = None,
    evaluation_seed: int = 0,
    prediction: WidthPrediction | None = None,
) -> dict[str, Any]:
    """Return how many members a task is expected to need at a finite width, as plain values.

    Args:
        task: Task to certify.
        width: n, the hidden units of each member, at least 1.
        antisymmetric: Whether members start at exactly 0; False by default.
        labels: What members are trained on.
        layers: Which layers are trained.
        padding: Number of padding templates, as in `TemplatePredictor`.
        decoders: Decoders to certify.
        delta: Chance δ of any wrong bit that the members needed must stay below, between 0 and 1.
        evaluation: Evaluation states to count members for; by default 1000 are sampled.
        evaluation_seed: Seed, as for `certify_task`.
        prediction: What this width predicts of these evaluation states, where that is known already; by default it is
            computed.

    Raises:
        ValueError: An argument is outside its range.
        RuntimeError: A search found no state within its time limit.
    """
    predictor = TemplatePredictor(task.templates, padding, layers=layers, antisymmetric=antisymmetric)
    finite = FiniteWidth(predictor, width, corrected=labels == "corrected")
    if evaluation is None:
        evaluation = EvaluationSet.sample(task, 1000, evaluation_seed)
    if prediction is None:
        prediction = WidthPrediction(LimitPrediction(task, evaluation, predictor), finite)
    scopes = scopes_of(task, evaluation_seed)
    spread = spread_at_width(finite, states_of_all_densities(task, evaluation))
    rows: dict[str, Any] = {}
    for decoder in decoders:
        certificates = {}
        for name, bounds in scopes.items():
            score = score_at_width(finite, bounds, decoder, spread)
            certificates[name] = Certificate(decoder, bounds.most, None, None, False, score, task.layout.bits)
        rows[decoder] = {
            "score": {
                name: found.score if math.isfinite(found.score) else None for name, found in certificates.items()
            },
            "members": members_needed(certificates, prediction, delta),
        }
    return {
        "width": width,
        "init": "antisymmetric" if antisymmetric else "gaussian",
        "labels": labels,
        "movement": finite.movement,
        "trusted": finite.trusted,
        "trusted_from": finite.trusted_from,
        "decoders": rows,
        "is": _IS,
    }


def states_of_all_densities(task: Task[Any, Any], evaluation: EvaluationSet) -> Bool[Tensor, "states templates"]:
    """Return the templates that match a sample of evaluation states and of random states, sparse to dense.

    Args:
        task: The task.
        evaluation: Its evaluation states.
    """
    generator = torch.Generator().manual_seed(0)
    density = torch.rand(_RANDOM_STATES, 1, generator=generator)
    states = torch.rand(_RANDOM_STATES, task.layout.bits, generator=generator) < density
    seen = evaluation.matches[rows_at_equal_distances(len(evaluation), 4 * _RANDOM_STATES)]
    return torch.cat([seen, task.templates.matches(states)])
