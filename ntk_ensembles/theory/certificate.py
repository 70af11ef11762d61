"""What a decoder can promise before any training: exactness, margins and members for all states (DESIGN §3).

A prediction depends on a state and bit only through (s, C_j, F_j), so the states that matter are extremes:
for each bit and each C_j the most and the fewest templates that can match. `certify` finds the worst of
them exactly, with a state that attains it; from its margin follow the members that suffice.

It speaks of infinitely wide members trained to convergence. Their number is finite where a number of
members is given, their width never: a finite width n shifts the mean by O(√(k/n)) (docs/theory.md, section 10),
which is not covered.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float64
from scipy.special import log_ndtr, ndtri_exp
from torch import Tensor

from ntk_ensembles.errors import OptionError
from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.templates.bounds import Bound, MatchBounds, exclusive_bits
from ntk_ensembles.theory.decoding import (
    DECODERS,
    TIE,
    Decoder,
    decode,
    log_exact_match_probability,
    margins,
    thresholds,
)
from ntk_ensembles.theory.kernels import NTK_DIAGONAL, ORTHOGONAL, ntk_profile
from ntk_ensembles.theory.predictor import TemplatePredictor

_ROUNDING = 1e-13
"""Margins that differ by less are the same one, reached by other sums."""

_COVERS = (
    "This covers the mean of infinitely wide members trained to convergence, and, where members are counted, the "
    "Gaussian spread of infinitely wide members around it. It does not cover what a finite width adds (a shift of the "
    "mean of order 1/width), members that have not converged, or rounding: train.py measures those."
)
_INPUTS_SEEN = 1000


@dataclass(frozen=True)
class WorstCase:
    """A state and one of its bits.

    Attributes:
        margin: of the infinite ensemble there; negative where it decodes the bit wrongly.
        bit: its position.
        num_matches: s, how many templates match the state.
        set_count: C_j, how many of these set the bit.
        fan_in: F_j, how many templates set the bit at all.
        state: the state.
    """

    margin: float
    bit: int
    num_matches: int
    set_count: int
    fan_in: int
    state: Bool[Tensor, " bits"]


@dataclass(frozen=True)
class Certificate:
    """What one decoder promises for a set of states.

    Attributes:
        decoder: which.
        num_matches: the most templates that match one of the states.
        ones: where a bit that must be decoded 1 has the smallest margin; None if no template sets any bit.
        zeros: where a bit that must be decoded 0 has; None if every state sets every bit.
        proven: whether the two are the worst there are; a search that ran out of time leaves it open.
        score: no margin is smaller than so many standard deviations of one member; 0 where the decoder fails or
            where a margin is a tie (`TIE`).
        bits: m.
    """

    decoder: Decoder
    num_matches: Bound
    ones: WorstCase | None
    zeros: WorstCase | None
    proven: bool
    score: float
    bits: int

    @property
    def margin(self) -> float:
        """The smallest margin found, over bits of either kind."""
        return min((critical.margin for critical in (self.ones, self.zeros) if critical), default=math.inf)

    @property
    def exact(self) -> bool | None:
        """Whether the infinite ensemble decodes every bit of every state right; None where that is open."""
        if self.margin <= 0:
            return False
        return True if self.proven else None

    @property
    def tie(self) -> bool:
        """Whether a finite ensemble decodes some bit by a coin: its infinite mean stands on the threshold."""
        return abs(self.margin) <= TIE or (self.zeros is not None and abs(self.zeros.margin) <= TIE)

    def members(self, delta: float, log_states: float = 0.0) -> int | None:
        """Members that suffice for so many states to be all right with probability at least 1 − δ.

        Union bound over the states' bits, each with the worst score: exp(log_states)·m·Φ(−score·√N) ≤ δ.

        Args:
            delta: δ, between 0 and 1.
            log_states: natural logarithm of the number of states; 0 for any one given state.

        Returns:
            The smallest such N; None where no number suffices (`score` is 0).

        Raises:
            ValueError: δ outside its range.
        """
        if not 0 < delta < 1:
            raise OptionError("delta", delta, "a number between 0 and 1")
        if self.score == 0:
            return None
        log_tail = math.log(delta) - log_states - math.log(self.bits)
        found = max(1, math.ceil((float(ndtri_exp(log_tail)) / self.score) ** 2))
        # The last digit of the inverse may be off by one member.
        while found > 1 and log_ndtr(-self.score * math.sqrt(found - 1)) <= log_tail:
            found -= 1
        while log_ndtr(-self.score * math.sqrt(found)) > log_tail:
            found += 1
        return found


def certify(predictor: TemplatePredictor, extremes: MatchBounds, decoder: Decoder) -> Certificate:
    """The worst margins of a decoder over a set of states, with states that attain them.

    Branch and bound over (bit, C_j): each has a range of s, at first that of all states; the pair whose range
    allows the smallest margin has its range made exact, until the smallest is attained.

    Args:
        predictor: the theory, padding included.
        extremes: of the same templates, over the states in question.
        decoder: one of `DECODERS`.

    Raises:
        ValueError: an unknown decoder.
    """
    most, fewest = extremes.max_matches(), extremes.min_matches()
    assert most is not None
    if fewest is None:
        # Nothing ever matches: every next state is zero, and decoded so with certainty.
        return Certificate(decoder, most, None, None, True, math.inf, predictor.templates.layout.bits)
    search = _Search(predictor, decoder, most.bound)
    for extreme in (most, fewest):
        search.note(extreme.state)
    pairs = [_Pair(kind, column, fewest.bound, most.bound) for column, kind in enumerate(search.kinds)]
    ones, ones_proven = search.worst([pair for pair in pairs if pair.kind.set_count], extremes, True)
    zeros, zeros_proven = search.worst([pair for pair in pairs if not pair.kind.set_count], extremes, False)
    return Certificate(
        decoder,
        most,
        ones,
        zeros,
        ones_proven and zeros_proven,
        search.score(pairs),
        predictor.templates.layout.bits,
    )


@dataclass(frozen=True)
class _Kind:
    """What a prediction depends on besides s."""

    bit: int
    set_count: int


@dataclass
class _Pair:
    """A bit and a C_j with the range of s still possible there; empty where no state has them."""

    kind: _Kind
    column: int
    low: int
    high: int
    attained: dict[str, int] = field(default_factory=dict)
    bounded: bool = False
    """Whether the quick upper bound has been tried."""


class _Search:
    """The margins for every s and every (bit, C_j), and the worst ones attained so far."""

    def __init__(self, predictor: TemplatePredictor, decoder: Decoder, most: int) -> None:
        self._predictor, self._decoder = predictor, decoder
        fan_in = predictor.fan_in.tolist()
        # Between C_j = 1 and F_j every count is possible, as far as is known here.
        self.kinds = [_Kind(bit, c) for bit, total in enumerate(fan_in) for c in range(min(total, most) + 1)]
        bits = torch.tensor([kind.bit for kind in self.kinds])
        num_matches = torch.arange(most + 1)
        set_count = torch.tensor([kind.set_count for kind in self.kinds])
        mean = predictor.mean(num_matches, set_count.expand(len(num_matches), -1), predictor.fan_in[bits])
        levels = thresholds(decoder, predictor, num_matches)[:, bits]
        self._margins: Float64[Tensor, "num_matches kinds"] = margins(mean, levels, (set_count > 0).expand_as(mean))
        # s < C_j cannot be.
        self._margins[num_matches[:, None] < set_count] = math.inf
        self._deviations = predictor.variance(num_matches).sqrt()
        self._best: dict[bool, WorstCase] = {}

    def note(self, state: Bool[Tensor, " bits"]) -> None:
        """Take up the margins of one state."""
        predictor = self._predictor
        matches = predictor.templates.matches(state[None])
        counts, num_matches = predictor.templates.set_counts(matches), matches.sum(1)
        if num_matches == 0:
            return
        mean = predictor.mean(num_matches, counts, predictor.fan_in)
        row = margins(mean, thresholds(self._decoder, predictor, num_matches), counts > 0)[0]
        for ones in (True, False):
            candidates = torch.nonzero((counts[0] > 0) == ones).flatten()
            if not len(candidates):
                continue
            bit = int(candidates[row[candidates].argmin()])
            if ones not in self._best or row[bit] < self._best[ones].margin:
                self._best[ones] = WorstCase(
                    float(row[bit]), bit, int(num_matches), int(counts[0, bit]), int(predictor.fan_in[bit]), state
                )

    def worst(self, pairs: list[_Pair], extremes: MatchBounds, ones: bool) -> tuple[WorstCase | None, bool]:
        """The smallest margin over these pairs, and whether it is proven to be."""
        open_pairs = [(self._lowest(pair), pair) for pair in pairs]
        while open_pairs:
            position = min(range(len(open_pairs)), key=lambda i: open_pairs[i][0][0])
            (lower, at), pair = open_pairs[position]
            best = self._best.get(ones)
            if best is not None and lower >= best.margin - _ROUNDING:
                return best, True
            end = "high" if at == pair.high else "low"
            if end in pair.attained:
                # Exact at this end, or out of time there.
                return best, pair.attained[end] == at
            kind = pair.kind
            if end == "high" and not pair.bounded:
                pair.bounded = True
                pair.high = min(pair.high, extremes.max_matches_estimate(kind.bit, kind.set_count))
            else:
                extreme = (extremes.max_matches if end == "high" else extremes.min_matches)(kind.bit, kind.set_count)
                if extreme is None:
                    pair.low, pair.high = 1, 0
                else:
                    self.note(extreme.state)
                    setattr(pair, end, extreme.bound)
                    pair.attained[end] = extreme.attained
            if pair.low <= pair.high:
                open_pairs[position] = (self._lowest(pair), pair)
            else:
                # No such state but, perhaps, one that nothing matches.
                del open_pairs[position]
        return self._best.get(ones), True

    def _lowest(self, pair: _Pair) -> tuple[float, int]:
        """The smallest margin in the pair's range, and the s of it; of equal ones the largest s."""
        column = self._margins[pair.low : pair.high + 1, pair.column]
        lowest = column.min()
        return float(lowest), pair.low + int(torch.nonzero(column == lowest).max())

    def score(self, pairs: Iterable[_Pair]) -> float:
        """The smallest margin in standard deviations over all pairs' ranges; 0 at failures and ties."""
        allowed = torch.zeros_like(self._margins, dtype=torch.bool)
        for pair in pairs:
            allowed[pair.low : pair.high + 1, pair.column] = True
        scores = (self._margins / self._deviations[:, None]).masked_fill(self._margins <= TIE, 0.0)
        return float(scores[allowed].min()) if allowed.any() else math.inf


def members_for_states(
    predictor: TemplatePredictor,
    decoder: Decoder,
    matches: Bool[Tensor, "states templates"],
    next_states: Bool[Tensor, "states bits"],
    delta: float,
) -> int | None:
    """The smallest N for which given states are all decoded right with probability at least 1 − δ.

    Each state's chance of any wrong bit is exact (bits are independent); over states, which share their
    members, they are added up (union bound).

    Args:
        predictor: the theory.
        decoder: one of `DECODERS`.
        matches: which templates match each state.
        next_states: the true next states.
        delta: δ, between 0 and 1.

    Returns:
        None where no number suffices: the infinite mean itself decodes a bit wrongly, or stands on its threshold.
    """
    gaussian = predictor.predict(matches)
    distances = margins(gaussian.mean, thresholds(decoder, predictor, matches.sum(1)), next_states)
    if float(distances.min()) <= TIE:
        return None

    def suffices(members: int) -> bool:
        failures = -torch.expm1(log_exact_match_probability(distances, gaussian.variance, members))
        return float(failures.sum()) <= delta

    high = 1
    while not suffices(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def sign_padding(predictor: TemplatePredictor, extremes: MatchBounds) -> int:
    """Zero-label templates that make the sign rule right on all states in question (the paper's padding).

    A 1-bit's mean is w_m·C + w_u·(F − C) = (w_m − w_u)·C + w_u·F. With DESIGN §2's weights it is positive if
    and only if k > F·(s − (d − c)/(a − c))/C − (d − c)/c, which grows with s. 0-bits have means of at most 0.

    Args:
        predictor: the theory without padding.
        extremes: of the same templates, over the states in question.

    Returns:
        The smallest number; an upper bound of it where a search ran out of time.
    """
    most = extremes.max_matches()
    assert most is not None
    size = len(predictor.templates)
    bounds = {
        (bit, set_count): _templates_needed(most.bound, set_count, total)
        for bit, total in enumerate(predictor.fan_in.tolist())
        for set_count in range(1, min(total, most.bound) + 1)
    }
    needed, critical = 0.0, (0, 0, 0)
    for (bit, set_count), bound in sorted(bounds.items(), key=lambda item: -item[1]):
        if bound <= max(needed, size - 1):
            break
        extreme = extremes.max_matches(bit, set_count)
        if extreme is None:
            continue
        exact = _templates_needed(extreme.bound, set_count, int(predictor.fan_in[bit]))
        if exact > needed:
            needed, critical = exact, (bit, set_count, extreme.bound)
    bit, set_count, num_matches = critical
    padding = max(0, math.floor(needed) + 1 - size)
    # Rounding, and a threshold a little above 0: the rule itself has the last word.
    while num_matches and not _reads_one(TemplatePredictor(predictor.templates, padding), bit, set_count, num_matches):
        padding += 1
    return padding


def _templates_needed(num_matches: int, set_count: int, fan_in: int) -> float:
    """The k above which the mean of a bit with C = ``set_count`` ≥ 1 is positive."""
    gap = NTK_DIAGONAL - ORTHOGONAL
    excess = float(ntk_profile(torch.tensor(num_matches**-0.5, dtype=torch.float64))) - ORTHOGONAL
    return fan_in * (num_matches - gap / excess) / set_count - gap / ORTHOGONAL


def _reads_one(predictor: TemplatePredictor, bit: int, set_count: int, num_matches: int) -> bool:
    """Whether the sign rule decodes a bit with these counts as 1."""
    state = torch.tensor([num_matches])
    mean = predictor.mean(state, torch.tensor([[set_count]]), predictor.fan_in[bit : bit + 1])
    return bool(decode(mean, thresholds("sign", predictor, state)[:, bit : bit + 1]))


def certify_task(
    task: Task[Any, Any],
    *,
    decoders: Sequence[Decoder] = DECODERS,
    delta: float = 1e-6,
    evaluation_states: int = 1000,
    evaluation_seed: int = 0,
) -> dict[str, Any]:
    """Return what a task's templates promise, as plain values: the object that ``ntk-ensembles certify --json`` prints.

    Args:
        task: Task to certify.
        decoders: Decoders to certify.
        delta: Chance δ of any wrong bit that the members needed must stay below, between 0 and 1.
        evaluation_states: Number of evaluation states to sample beside the proofs, at least 1.
        evaluation_seed: Seed of the evaluation states.

    Raises:
        ValueError: An argument is outside its range.
        TaskError: The templates do not lead to the task's reference.
        RuntimeError: The solver failed.
    """
    templates = task.templates
    predictor = TemplatePredictor(templates)
    evaluation = EvaluationSet.sample(task, evaluation_states, evaluation_seed)
    seen = evaluation.matches.sum(1)
    start, start_names = _start_bits(task, evaluation_seed)
    scopes = {
        "all_states": MatchBounds(templates),
        "reachable": MatchBounds(templates, exclusive_bits(templates, start)),
    }
    extremes = {name: scope.max_matches() for name, scope in scopes.items()}
    rows: dict[str, Any] = {}
    for decoder in decoders:
        certificates = {name: certify(predictor, scope, decoder) for name, scope in scopes.items()}
        rows[decoder] = {name: _describe(task, certificate) for name, certificate in certificates.items()}
        rows[decoder]["members"] = {
            "one_state": certificates["all_states"].members(delta),
            "one_reachable_state": certificates["reachable"].members(delta),
            "evaluation_states": members_for_states(
                predictor, decoder, evaluation.matches, evaluation.next_states, delta
            ),
            "all_states": certificates["all_states"].members(delta, task.layout.bits * math.log(2)),
        }
        if decoder == "sign":
            rows[decoder]["padding"] = {name: sign_padding(predictor, scope) for name, scope in scopes.items()}
    return {
        "task": {"name": task.name, **task.options},
        "templates": len(templates),
        "state_bits": task.layout.bits,
        "delta": delta,
        "matched": {
            **{name: _describe_extreme(extreme) for name, extreme in extremes.items()},
            "sampled": {"states": len(evaluation), "min": int(seen.min()), "max": int(seen.max())},
            "reachable_from": start_names,
        },
        "fan_in": {
            "min": int(templates.fan_in.min()),
            "max": int(templates.fan_in.max()),
            "max_bit": task.layout.bit_name(int(templates.fan_in.argmax())),
        },
        "decoders": rows,
        "covers": _COVERS,
    }


def _start_bits(task: Task[Any, Any], seed: int) -> tuple[Bool[Tensor, " bits"], list[str]]:
    """In each field the bits between the lowest and the highest that the first inputs set; and their names."""
    used: dict[str, int] = {}
    for value in itertools.islice(task.inputs(random.Random(seed)), _INPUTS_SEEN):
        for name, content in task.initial_fields(value).items():
            used[name] = used.get(name, 0) | content
    start = torch.zeros(task.layout.bits, dtype=torch.bool)
    names = []
    for name in task.layout:
        content, bits = used.get(name, 0), task.layout[name]
        if content:
            low, high = (content & -content).bit_length() - 1, content.bit_length() - 1
            start[bits[low] : bits[high] + 1] = True
            whole = (low, high) == (0, len(bits) - 1)
            names.append(name if whole else f"{name}[{low}]" if low == high else f"{name}[{low}:{high + 1}]")
    return start, names


def _describe_extreme(extreme: Bound | None) -> dict[str, Any]:
    assert extreme is not None
    return {"max": extreme.bound, "max_attained": extreme.attained}


def _describe(task: Task[Any, Any], certificate: Certificate) -> dict[str, Any]:
    return {
        "exact": certificate.exact,
        "coin_flips": certificate.tie,
        "margin": certificate.margin if math.isfinite(certificate.margin) else None,
        "worst_one": _describe_critical(task, certificate.ones),
        "worst_zero": _describe_critical(task, certificate.zeros),
    }


def _describe_critical(task: Task[Any, Any], critical: WorstCase | None) -> dict[str, Any] | None:
    """A state and bit in words: which bit, what sets it, and the state's fields that are not 0."""
    if critical is None:
        return None
    templates = task.templates.templates
    groups = Counter(template.group for template in templates if critical.bit in template.sets)
    return {
        "margin": critical.margin,
        "bit": task.layout.bit_name(critical.bit),
        "matched": critical.num_matches,
        "set_by": critical.set_count,
        "fan_in": critical.fan_in,
        "groups": dict(groups.most_common()),
        "state": {name: value for name, value in task.layout.unpack(critical.state).items() if value},
    }
