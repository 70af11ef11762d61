"""From ensemble means to bits, and how often finite ensembles get them right (DESIGN §3).

A decoder is a threshold per state and bit; an output above it is read as 1. Its *margin* is the
mean's distance to the threshold, positive where the infinite ensemble decodes right. The mean of N
members deviates by a Gaussian of standard deviation σ/√N, so a bit fails with probability Φ(−margin·√N/σ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from ntk_ensembles.theory.predictor import TemplatePredictor

Decoder = Literal["midpoint", "sign"]
"""``midpoint``: halfway between the means of a bit that no matched template sets and one that a single
matched template sets. ``sign``: above zero (the paper's)."""

DECODERS: tuple[Decoder, ...] = get_args(Decoder)
"""All decoders, the default first."""

SIGN_THRESHOLD = 1e-10
"""Zero, as the paper's code writes it: keeps a 0 that rounding made positive a 0."""

TIE = 1e-9
"""A margin no larger than this is a tie: the mean is 0 but for rounding and `SIGN_THRESHOLD`."""

_CERTAIN_THRESHOLD = 0.5


def thresholds(
    decoder: Decoder, predictor: TemplatePredictor, matched: Int[Tensor, " states"]
) -> Float64[Tensor, "states bits"]:
    """The output above which a bit is read as 1.

    Midpoint: τ_j = w_u·F_j + (w_m − w_u)/2. Since mean_j − w_u·F_j = (w_m − w_u)·C_j, the margin is at least
    (a − c)/(2(d − c)) on either side, for every template set. Sign: `SIGN_THRESHOLD`. Where s = 0 the output
    is exactly 0 and so is the true next state; the threshold there is 1/2 for either decoder, which
    decodes the same and marks these bits as certain rather than as ties.

    Args:
        decoder: one of `DECODERS`.
        predictor: the weights and fan-ins.
        matched: s, how many templates match each state.

    Raises:
        ValueError: an unknown decoder.
    """
    if decoder == "midpoint":
        matched_weight, unmatched_weight = predictor.weights(matched)
        result = unmatched_weight[:, None] * predictor.fan_in + (matched_weight - unmatched_weight)[:, None] / 2
    elif decoder == "sign":
        result = torch.full((len(matched), len(predictor.fan_in)), SIGN_THRESHOLD, dtype=torch.float64)
    else:
        raise ValueError(f"decoder {decoder!r}: expected one of {', '.join(DECODERS)}")
    return result.masked_fill(matched[:, None] == 0, _CERTAIN_THRESHOLD)


def decode(
    outputs: Float[Tensor, "*batch states bits"], thresholds: Float64[Tensor, "states bits"]
) -> Bool[Tensor, "*batch states bits"]:
    """The bits that outputs stand for: 1 above the threshold, 0 at or below it.

    Args:
        outputs: of the network or of an ensemble's mean, any float dtype and device.
        thresholds: of the same states, from `thresholds`.
    """
    return outputs > thresholds.to(outputs.device)


def margins(
    mean: Float64[Tensor, "states bits"],
    thresholds: Float64[Tensor, "states bits"],
    successors: Bool[Tensor, "states bits"],
) -> Float64[Tensor, "states bits"]:
    """The mean's distance to the threshold, positive on the side of the true bit.

    Args:
        mean: of the infinite ensemble, from `TemplatePredictor.predict`.
        thresholds: of the same states, from `thresholds`.
        successors: the true next states.
    """
    distance = mean - thresholds
    return distance.where(successors, -distance)


def _scores(margins: Tensor, variance: Tensor, members: int) -> Tensor:
    """The margin in standard deviations of the mean of ``members``; ±∞ where nothing varies."""
    if members < 1:
        raise ValueError(f"{members} members: expected at least 1")
    deviation = (variance / members).sqrt()[:, None]
    # At a tie the limit's σ = 0 (s = 1) is that of exact interpolation by infinite width; a real network
    # misses by a little, to either side alike. Dividing 0 by 0 would give nan there.
    return (margins / deviation).masked_fill(margins.abs() <= TIE, 0.0)


def bit_error_probability(
    margins: Float64[Tensor, "states bits"], variance: Float64[Tensor, " states"], members: int
) -> Float64[Tensor, "states bits"]:
    """The chance Φ(−margin·√N/σ) that an ensemble of infinitely wide members decodes a bit wrongly.

    Where σ = 0 it is 0 or 1 by the margin's sign. A margin of at most `TIE` counts as a coin flip, 1/2, even
    where σ = 0: only the sign rule has such, at bits whose mean is exactly 0 (nothing writes them, or
    s = 1), and there a finite ensemble falls to either side (DESIGN §3). The zero state is no tie: a
    network without biases outputs exactly 0, and `thresholds` leaves a wide margin.

    Args:
        margins: from `margins`.
        variance: of one member, from `TemplatePredictor.predict`.
        members: N, at least 1.

    Returns:
        The probabilities, with full relative accuracy in the tail down to about 1e-300.

    Raises:
        ValueError: no members.
    """
    # erfc keeps the tail's relative accuracy, which 1 − Φ(z) loses beyond 8 standard deviations.
    tails: Tensor = torch.special.erfc(_scores(margins, variance, members) * 0.5**0.5)
    return tails / 2


def log_exact_match_probability(
    margins: Float64[Tensor, "states bits"], variance: Float64[Tensor, " states"], members: int
) -> Float64[Tensor, " states"]:
    """The logarithm of the chance that all bits of a state are decoded right: Σ_j log(1 − error_j).

    Its negative is accurate however small, so ``-torch.expm1(...)`` is the chance of any error where the
    probability itself rounds to 1. Errors are those of `bit_error_probability`, ties included.

    Args:
        margins: from `margins`.
        variance: of one member, from `TemplatePredictor.predict`.
        members: N, at least 1.

    Raises:
        ValueError: no members.
    """
    logs: Tensor = torch.special.log_ndtr(_scores(margins, variance, members))
    return logs.sum(1)


def exact_match_probability(
    margins: Float64[Tensor, "states bits"], variance: Float64[Tensor, " states"], members: int
) -> Float64[Tensor, " states"]:
    """The chance that all bits of a state are decoded right: Π_j (1 − error_j), for bits are independent.

    Args:
        margins: from `margins`.
        variance: of one member, from `TemplatePredictor.predict`.
        members: N, at least 1.

    Raises:
        ValueError: no members.
    """
    return log_exact_match_probability(margins, variance, members).exp()


@dataclass(frozen=True)
class ExactMatchBand:
    """How the exact-match rate on fixed evaluation states varies over ensembles of N members."""

    members: tuple[int, ...]
    """N of each row."""

    mean: Float64[Tensor, " sizes"]
    """The expected rate over all evaluation states: exact, not drawn."""

    levels: tuple[float, ...]
    """The probability that each column of ``quantiles`` belongs to."""

    quantiles: Float64[Tensor, "sizes levels"]
    """The rate that an ensemble stays below with that probability."""


def exact_match_band(
    predictor: TemplatePredictor,
    matches: Bool[Tensor, "states templates"],
    successors: Bool[Tensor, "states bits"],
    decoder: Decoder,
    members: Sequence[int],
    *,
    generator: torch.Generator,
    draws: int = 200,
    levels: Sequence[float] = (0.05, 0.95),
    states_max: int = 2048,
) -> ExactMatchBand:
    """The Monte-Carlo band of the share of states decoded right, for single ensembles of N members.

    States share their members, so they fail together and the band is wider than that of independent
    states. Each draw is one joint Gaussian deviation over all states for every bit; it serves every N,
    scaled by 1/√N. Ties count as coins, as in `bit_error_probability`.

    Args:
        predictor: the theory.
        matches: of the evaluation states.
        successors: their true next states.
        decoder: one of `DECODERS`.
        members: the N wanted.
        generator: a CPU generator; all randomness comes from it.
        draws: ensembles drawn.
        levels: the quantiles wanted.
        states_max: of more states than this a random subset of that size is drawn, once; their band is at most
            0.5/√states_max (a standard deviation) wider than that of all. The covariance's square root costs
            states³ time, and each draw states²·bits.

    Returns:
        The exact mean over all states, and quantiles over the draws. Deviations are drawn in float32, from
        a covariance with a little jitter: 3e-5 of the largest σ in all, which matters only to margins that
        close to the deviation.

    Raises:
        ValueError: no states, draws or members, or an unknown decoder.
    """
    if draws < 1 or not len(matches):
        raise ValueError(f"{draws} draws on {len(matches)} states: expected at least 1 of each")
    gaussian = predictor.predict(matches)
    distances = margins(gaussian.mean, thresholds(decoder, predictor, matches.sum(1)), successors)
    mean = torch.stack([exact_match_probability(distances, gaussian.variance, n).mean() for n in members])
    if len(matches) > states_max:
        chosen = torch.randperm(len(matches), generator=generator)[:states_max]
        matches, successors, distances = matches[chosen], successors[chosen], distances[chosen]

    covariance = predictor.covariance(matches)
    # Repeated or dependent states make it singular; a jitter of √1e-9 of the largest σ mends that.
    jitter = 1e-9 * covariance.diagonal().max().clamp_min(torch.finfo(covariance.dtype).tiny ** 0.5)
    root = torch.linalg.cholesky(covariance + jitter * torch.eye(len(matches), dtype=covariance.dtype)).to(
        torch.float32
    )
    fixed = predictor.variance(matches.sum(1)) == 0
    # The square root leaves rounding where nothing varies.
    root[fixed] = 0
    ties = distances.abs() <= TIE
    distances = distances.masked_fill(ties, 0.0).to(torch.float32)
    coins = ties & fixed[:, None]
    # A deviation helps a 1-bit when it is up and a 0-bit when it is down.
    sides = successors.to(torch.float32) * 2 - 1
    rates = torch.empty(len(members), draws, dtype=torch.float64)
    for draw in range(draws):
        deviations = sides * (root @ torch.randn(root.shape[1], sides.shape[1], generator=generator))
        deviations[coins] = torch.randn(int(coins.sum()), generator=generator)
        for row, n in enumerate(members):
            rates[row, draw] = (distances + deviations / n**0.5 > 0).all(1).to(torch.float64).mean()
    quantiles = torch.quantile(rates, torch.tensor(tuple(levels), dtype=torch.float64), dim=1).T
    return ExactMatchBand(tuple(members), mean, tuple(levels), quantiles)
