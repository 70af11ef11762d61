"""From ensemble means to bits, and how often finite ensembles get them right (docs/theory.md, section 7).

A decoder is a threshold for each state and bit; an output above it is read as 1. Its *margin* is the signed distance of
the mean from the threshold, positive where the infinite ensemble decodes right. The mean of N members deviates by a
Gaussian of standard deviation σ/√N, so a bit fails with probability Φ(−margin·√N/σ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from ntk_ensembles.errors import check_choice
from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.theory.predictor import TemplatePredictor

Decoder = Literal["midpoint", "sign"]
"""How a mean is turned into a bit. ``midpoint``: threshold halfway between the means of a bit that no matching template
sets and of one that a single matching template sets. ``sign``: threshold zero (the paper's)."""

DECODERS: tuple[Decoder, ...] = get_args(Decoder)
"""All decoders, the default first."""

SIGN_THRESHOLD = 1e-10
"""Zero, as the paper's code writes it: a mean of 0 that rounding made positive is still read as 0."""

TIE = 1e-9
"""Largest margin, of either sign, that is a tie: the mean is 0 but for rounding and `SIGN_THRESHOLD`."""

Variance: TypeAlias = Float64[Tensor, " states"] | Float64[Tensor, "states bits"]
"""Variance of one member: the same for every bit of a state at infinite width, not at a finite one."""


def thresholds(
    decoder: Decoder,
    predictor: TemplatePredictor,
    num_matches: Int[Tensor, " states"],
    fan_in: Int[Tensor, " bits"] | None = None,
) -> Float64[Tensor, "states bits"]:
    """Return the output above which a bit is read as 1.

    Midpoint: τ_j = w_u·F_j + (w_m − w_u)/2. Since mean_j − w_u·F_j = (w_m − w_u)·C_j, the margin is at least
    (a − c)/(2(d − c)) on either side, for every template set. Sign: `SIGN_THRESHOLD`. Where s = 0 the output
    is exactly 0 and so is the true next state; the threshold there is 1/2 for either decoder, which decodes the
    same and makes these bits certain instead of ties.

    Args:
        decoder: One of `DECODERS`.
        predictor: Source of the weights.
        num_matches: Number of templates s that match each state.
        fan_in: Fan-in F_j of each bit; by default the predictor's.

    Raises:
        OptionError: The decoder is unknown.
    """
    check_choice("decoder", decoder, DECODERS)
    fan_in = predictor.fan_in if fan_in is None else fan_in
    if decoder == "sign":
        result = torch.full((len(num_matches), len(fan_in)), SIGN_THRESHOLD, dtype=torch.float64)
    else:
        matched_weight, unmatched_weight = predictor.weights(num_matches)
        result = unmatched_weight[:, None] * fan_in + (matched_weight - unmatched_weight)[:, None] / 2
    return result.masked_fill(num_matches[:, None] == 0, 0.5)


def decode(
    outputs: Float[Tensor, "*batch states bits"], thresholds: Float[Tensor, "states bits"]
) -> Bool[Tensor, "*batch states bits"]:
    """Decode outputs to bits: 1 above the threshold, 0 at or below it.

    Args:
        outputs: Outputs of a network or of an ensemble's mean, any float dtype and device.
        thresholds: Thresholds of the same states, from `thresholds`, any float dtype.
    """
    return outputs > thresholds.to(outputs.device)


def margins(
    mean: Float64[Tensor, "states bits"],
    thresholds: Float64[Tensor, "states bits"],
    next_states: Bool[Tensor, "states bits"],
) -> Float64[Tensor, "states bits"]:
    """Return the signed distance of the mean from the threshold, positive on the side of the true bit.

    Args:
        mean: Mean output of an ensemble, such as that of `TemplatePredictor.predict`.
        thresholds: Thresholds of the same states, from `thresholds`.
        next_states: True next states.
    """
    distance = mean - thresholds
    return distance.where(next_states, -distance)


def decode_mean(
    mean: Float64[Tensor, "states bits"],
    decoder: Decoder,
    predictor: TemplatePredictor,
    num_matches: Int[Tensor, " states"],
    next_states: Bool[Tensor, "states bits"],
) -> tuple[Bool[Tensor, "states bits"], Float64[Tensor, "states bits"]]:
    """Decode a mean and return its bits and margins.

    Args:
        mean: Mean output of an ensemble.
        decoder: One of `DECODERS`.
        predictor: Source of the weights and fan-ins.
        num_matches: Number of templates s that match each state.
        next_states: True next states.

    Raises:
        OptionError: The decoder is unknown.
    """
    limits = thresholds(decoder, predictor, num_matches)
    return decode(mean, limits), margins(mean, limits, next_states)


class MarginTable(NamedTuple):
    """What the infinite ensemble predicts for every s from 0 on (rows) and some pairs of C_j and F_j (columns)."""

    means: Float64[Tensor, "s columns"]
    """Mean outputs."""

    decoded: Bool[Tensor, "s columns"]
    """Decoded bits; in rows s < C_j, which cannot be, the true ones."""

    margins: Float64[Tensor, "s columns"]
    """Margins; ∞ for s = 0 and in rows s < C_j."""


def margin_table(
    predictor: TemplatePredictor,
    decoder: Decoder,
    num_matches_max: int,
    set_counts: Int[Tensor, " columns"],
    fan_in: Int[Tensor, " columns"],
) -> MarginTable:
    """Tabulate means, decoded bits and margins: predictions depend on nothing but s, C_j and F_j.

    Args:
        predictor: Theory, padding included.
        decoder: One of `DECODERS`.
        num_matches_max: Largest s.
        set_counts: C_j of each column.
        fan_in: F_j of each column.

    Raises:
        OptionError: The decoder is unknown.
    """
    num_matches = torch.arange(num_matches_max + 1)
    means = predictor.mean(num_matches, set_counts.expand(len(num_matches), -1), fan_in)
    limits = thresholds(decoder, predictor, num_matches, fan_in)
    true = (set_counts > 0).expand_as(means)
    impossible = num_matches[:, None] < set_counts
    return MarginTable(
        means,
        decode(means, limits).where(~impossible, true),
        margins(means, limits, true).masked_fill(impossible | (num_matches == 0)[:, None], torch.inf),
    )


def _scores(margins: Tensor, variance: Tensor, members: int) -> Tensor:
    """Return margins in standard deviations of the mean of ``members``; ±∞ where nothing varies."""
    if members < 1:
        raise ValueError(f"{members} members: expected at least 1")
    deviation = (variance / members).sqrt()
    if variance.ndim == 1:
        deviation = deviation[:, None]
    # At a tie the limit's σ = 0 (s = 1) is that of exact interpolation by infinite width; a real network
    # misses by a little, to either side alike. Dividing 0 by 0 would give nan there.
    return (margins / deviation).masked_fill(margins.abs() <= TIE, 0.0)


def bit_error_probability(
    margins: Float64[Tensor, "states bits"], variance: Variance, members: int
) -> Float64[Tensor, "states bits"]:
    """Return the chance Φ(−margin·√N/σ) that an ensemble of infinitely wide members decodes a bit wrongly.

    Where σ = 0 it is 0 or 1 by the margin's sign. A margin of at most `TIE` is a tie, decoded at
    random: 1/2, even where σ = 0. Only the sign decoder has ties, at bits whose mean is exactly 0 (no template sets
    them, or s = 1), and there a finite ensemble falls to either side. The zero state is no tie: a network without
    biases outputs exactly 0, and `thresholds` leaves a wide margin.

    Args:
        margins: Margins from `margins`.
        variance: Variance of one member, of a state as from `TemplatePredictor.predict`, or of each bit.
        members: Number of members N, at least 1.

    Returns:
        The probabilities, with full relative accuracy in the tail down to about 1e-300.

    Raises:
        ValueError: There are no members.
    """
    # erfc keeps the tail's relative accuracy, which 1 − Φ(z) loses beyond 8 standard deviations.
    tails: Tensor = torch.special.erfc(_scores(margins, variance, members) * 0.5**0.5)
    return tails / 2


def log_exact_match_probability(
    margins: Float64[Tensor, "states bits"], variance: Variance, members: int
) -> Float64[Tensor, " states"]:
    """Return the logarithm of the chance that all bits of a state are decoded right: Σ_j log(1 − error_j).

    Its negative is accurate however small, so ``-torch.expm1(...)`` is the chance of any error where the
    probability itself rounds to 1. Arguments, ties and errors are those of `bit_error_probability`.
    """
    logs: Tensor = torch.special.log_ndtr(_scores(margins, variance, members))
    return logs.sum(1)


def exact_match_probability(
    margins: Float64[Tensor, "states bits"], variance: Variance, members: int
) -> Float64[Tensor, " states"]:
    """Return the chance that all bits of a state are decoded right: Π_j (1 − error_j), for bits are independent.

    Arguments, ties and errors are those of `bit_error_probability`.
    """
    return log_exact_match_probability(margins, variance, members).exp()


@dataclass(frozen=True)
class ExactMatchBand:
    """Spread of the exact-match rate on fixed evaluation states over ensembles of N members."""

    members: tuple[int, ...]
    """Number of members N of each row."""

    mean: Float64[Tensor, " sizes"]
    """Expected rate over all evaluation states: exact, not drawn."""

    levels: tuple[float, ...]
    """Probability of each column of ``quantiles``."""

    quantiles: Float64[Tensor, "sizes levels"]
    """Entry (i, j) is the exact-match rate that an ensemble of ``members[i]`` members falls below with probability
    ``levels[j]``."""


def deviation_root(
    predictor: TemplatePredictor, matches: Bool[Tensor, "states templates"]
) -> Float32[Tensor, "states states"]:
    """Return a root R of the covariance between states: R·z, for a standard normal z, is a member's deviation at a bit.

    Args:
        predictor: Theory of the ensemble.
        matches: Templates that match each state.

    Returns:
        The root, of the covariance with a little jitter: 3e-5 of the largest σ in all.
    """
    covariance = predictor.covariance(matches)
    # Repeated or dependent states make it singular; a jitter of √1e-9 of the largest σ mends that.
    jitter = 1e-9 * covariance.diagonal().max().clamp_min(torch.finfo(covariance.dtype).tiny ** 0.5)
    jittered = covariance + jitter * torch.eye(len(matches), dtype=covariance.dtype)
    root: Tensor = torch.linalg.cholesky(jittered).to(torch.float32)
    # The square root leaves rounding where nothing varies.
    root[predictor.variance(matches.sum(1)) == 0] = 0
    return root


def exact_match_band(
    predictor: TemplatePredictor,
    matches: Bool[Tensor, "states templates"],
    next_states: Bool[Tensor, "states bits"],
    decoder: Decoder,
    members: Sequence[int],
    *,
    generator: torch.Generator,
    draws: int = 100,
    levels: Sequence[float] = (0.05, 0.95),
    states_max: int = 1024,
) -> ExactMatchBand:
    """Return the Monte Carlo band of the share of states decoded right, for single ensembles of N members.

    States share their members, so they fail together and the band is wider than that of independent
    states. Each draw is one joint Gaussian deviation over all states for every bit; it serves every N,
    scaled by 1/√N. Ties are decoded at random, as in `bit_error_probability`.

    Args:
        predictor: Theory of the ensemble.
        matches: Templates that match each evaluation state.
        next_states: True next states.
        decoder: One of `DECODERS`.
        members: Numbers of members N.
        generator: Source of all randomness, on the CPU.
        draws: Number of ensembles to draw, at least 1.
        levels: Probabilities of the quantiles, from 0 to 1.
        states_max: Largest number of states to draw for. Of more, a random subset of that size is drawn, once; its band
            is at most 0.5/√states_max (a standard deviation) wider than that of all. The covariance's square root
            costs states³ time, and each draw states²·bits.

    Returns:
        The exact mean over all states, and quantiles over the draws. Deviations are drawn in float32, with the
        jitter of `deviation_root`, which matters only to margins that close to the deviation.

    Raises:
        ValueError: There are no states, draws or members, or the decoder is unknown (`OptionError`).
    """
    if draws < 1 or not len(matches):
        raise ValueError(f"{draws} draws on {len(matches)} states: expected at least 1 of each")
    gaussian = predictor.predict(matches)
    _, margin = decode_mean(gaussian.mean, decoder, predictor, matches.sum(1), next_states)
    mean = torch.stack([exact_match_probability(margin, gaussian.variance, n).mean() for n in members])
    if len(matches) > states_max:
        chosen = torch.randperm(len(matches), generator=generator)[:states_max]
        matches, next_states, margin = matches[chosen], next_states[chosen], margin[chosen]

    root = deviation_root(predictor, matches)
    fixed = predictor.variance(matches.sum(1)) == 0
    # Where nothing varies, a tie is decoded at random all the same.
    random_bits = (margin.abs() <= TIE) & fixed[:, None]
    margin = margin.to(torch.float32)
    # A deviation helps a 1-bit when it is up and a 0-bit when it is down.
    sides = next_states.to(torch.float32) * 2 - 1
    rates = torch.empty(len(members), draws, dtype=torch.float64)
    for draw in range(draws):
        deviations = sides * (root @ torch.randn(root.shape[1], sides.shape[1], generator=generator))
        deviations[random_bits] = torch.randn(int(random_bits.sum()), generator=generator)
        for row, n in enumerate(members):
            rates[row, draw] = (margin + deviations / n**0.5 > 0).all(1).to(torch.float64).mean()
    quantiles = torch.quantile(rates, torch.tensor(tuple(levels), dtype=torch.float64), dim=1).T
    return ExactMatchBand(tuple(members), mean, tuple(levels), quantiles)


class Prediction:
    """What is predicted of the mean of N members on some states: Gaussian outputs, decoded.

    Args:
        mean: Mean output of infinitely many members.
        variance: Variance of one member.
        thresholds: Thresholds of each decoder.
        next_states: True next states.
        bias: How far ``mean`` is from the NTK mean; 0 by default.

    Attributes:
        mean: As given.
        variance: As given.
        thresholds: As given.
        bias: As given.
        margins: Margins of each decoder.
    """

    def __init__(
        self,
        mean: Float64[Tensor, "states bits"],
        variance: Variance,
        thresholds: dict[Decoder, Float64[Tensor, "states bits"]],
        next_states: Bool[Tensor, "states bits"],
        bias: Float64[Tensor, "states bits"] | None = None,
    ) -> None:
        self.mean, self.variance, self.thresholds = mean, variance, thresholds
        self.bias = torch.zeros_like(mean) if bias is None else bias
        self.margins: dict[Decoder, Float64[Tensor, "states bits"]] = {
            decoder: margins(mean, limits, next_states) for decoder, limits in thresholds.items()
        }

    def exact_match(self, members: int, decoder: Decoder) -> float:
        """Return the expected share of states that ensembles of ``members`` members decode right."""
        return float(exact_match_probability(self.margins[decoder], self.variance, members).mean())

    def bit_accuracy(self, members: int, decoder: Decoder) -> float:
        """Return the expected share of bits that ensembles of ``members`` members decode right."""
        return 1 - float(bit_error_probability(self.margins[decoder], self.variance, members).mean())

    def rms_deviation(self, members: int) -> float:
        """Return the expected root mean square deviation of the mean of ``members`` from the NTK mean."""
        return float((self.bias.square().mean() + self.variance.mean() / members).sqrt())


class LimitPrediction(Prediction):
    """The infinite-width limit on a task's evaluation states: mean, variance, thresholds and margins.

    Args:
        task: Task that is learned.
        evaluation: Its evaluation states.
        predictor: Theory of the ensemble, of the task's templates; by default that of Gaussian members of which both
            layers are trained, without padding.

    Attributes:
        task: As given.
        evaluation: As given.
        predictor: As given.
    """

    def __init__(
        self, task: Task[Any, Any], evaluation: EvaluationSet, predictor: TemplatePredictor | None = None
    ) -> None:
        self.task = task
        self.evaluation = evaluation
        self.predictor = TemplatePredictor(task.templates) if predictor is None else predictor
        gaussian = self.predictor.predict(evaluation.matches)
        num_matches = evaluation.matches.sum(1)
        limits = {decoder: thresholds(decoder, self.predictor, num_matches) for decoder in DECODERS}
        super().__init__(gaussian.mean, gaussian.variance, limits, evaluation.next_states)

    @cached_property
    def inputs(self) -> Float64[Tensor, "states size"]:
        """The encoded evaluation states."""
        return self.predictor.encode(self.evaluation.matches)

    def decode(self, deviation: Float[Tensor, "states bits"], decoder: Decoder) -> Bool[Tensor, "states bits"]:
        """Decode an ensemble whose mean deviates from the limit's by ``deviation``."""
        return decode(self.mean + deviation, self.thresholds[decoder])

    def band(self, members: Sequence[int], decoder: Decoder) -> ExactMatchBand:
        """Return the 90% Monte Carlo band of the exact-match rate, one row per ensemble size in ``members``.

        The seed is fixed, so repeated calls return the same band.
        """
        matches, next_states = self.evaluation.matches, self.evaluation.next_states
        generator = torch.Generator().manual_seed(0)
        return exact_match_band(self.predictor, matches, next_states, decoder, members, generator=generator)
