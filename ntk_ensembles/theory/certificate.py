"""What a decoder promises before any training: exactness, margins and members (docs/theory.md, section 9).

A prediction depends on a state and bit only through (s, C_j, F_j), so the states that matter are those at the bounds:
for each bit and each C_j the largest and the smallest number of templates that can match. `certify` finds the worst of
them exactly, with a state that attains it; from its margin follow the members that suffice.

Certificates are about infinitely wide members trained to convergence. Their number is finite where a number of members
is given, their width never: a finite width n shifts the mean by O(√(k/n)) (docs/theory.md, section 10), which is not
covered.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from ntk_ensembles.errors import check_fraction
from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.tasks.evaluation import checked_inputs
from ntk_ensembles.templates import Bound, MatchBounds, exclusive_bits
from ntk_ensembles.theory.decoding import (
    DECODERS,
    TIE,
    Decoder,
    LimitPrediction,
    Prediction,
    decode_mean,
    log_exact_match_probability,
    margin_table,
)
from ntk_ensembles.theory.kernels import ORTHOGONAL, Layers, TrainingKernel
from ntk_ensembles.theory.predictor import TemplatePredictor

_ROUNDING = 1e-13
"""Margins that differ by less are the same one, reached by other sums."""

_COVERS = (
    "This covers the mean of infinitely wide members trained to convergence, and, where members are counted, the "
    "Gaussian spread of infinitely wide members around it. It does not cover what a finite width adds (with both "
    "layers trained a shift of the mean of order √(templates/width), and some spread), members that have not "
    "converged, or rounding: train.py measures those."
)

_INPUTS_SEEN = 1000
"""Number of inputs that show in which bits trajectories begin."""


@dataclass(frozen=True)
class WorstCase:
    """The state and bit with the smallest margin.

    Attributes:
        margin: Margin of the infinite ensemble there; negative where it decodes the bit wrongly.
        bit: Position of the bit.
        num_matches: Number of templates s that match the state.
        set_count: Number C_j of these that set the bit.
        fan_in: Number F_j of templates that set the bit at all.
        state: The state.
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
        decoder: The decoder.
        max_matches: Largest number of templates that match one of the states.
        ones: The state and bit with the smallest margin among bits whose correct value is 1; None if no template sets
            any bit.
        zeros: The same among bits whose correct value is 0; None if every state sets every bit.
        proven: Whether the two are the worst there are; a search that ran out of time leaves it open.
        score: Lower bound on margin/σ over all states and bits, where σ is one member's standard deviation; 0 if the
            decoder fails or ties (`TIE`) anywhere.
        bits: Number of bits m of a state.
    """

    decoder: Decoder
    max_matches: Bound
    ones: WorstCase | None
    zeros: WorstCase | None
    proven: bool
    score: float
    bits: int

    @property
    def margin(self) -> float:
        """Smallest margin found, over bits of either kind."""
        return min((worst.margin for worst in (self.ones, self.zeros) if worst), default=math.inf)

    @property
    def exact(self) -> bool | None:
        """Whether the infinite ensemble decodes every bit of every state right; None where that is open."""
        if self.margin <= 0:
            return False
        return True if self.proven else None

    @property
    def tie(self) -> bool:
        """Whether a finite ensemble decodes some bit at random: its infinite mean lies on the threshold."""
        return abs(self.margin) <= TIE or (self.zeros is not None and abs(self.zeros.margin) <= TIE)

    def members(self, delta: float, log_states: float = 0.0) -> int | None:
        """Return the number of members that suffice for states to be all right with probability at least 1 − δ.

        This is the union bound over the states' bits, each with the worst score: exp(log_states)·m·Φ(−score·√N) ≤ δ
        (docs/theory.md, equation (34)).

        Args:
            delta: Chance δ of any wrong bit, between 0 and 1.
            log_states: Natural logarithm of the number of states; 0 for any one given state.

        Returns:
            The smallest such N; None where no number suffices (`score` is 0).

        Raises:
            OptionError: δ is outside its range.
        """
        check_fraction("delta", delta)
        if self.score == 0:
            return None
        log_tail = math.log(delta) - log_states - math.log(self.bits)

        def suffices(members: int) -> bool:
            score = torch.tensor(-self.score * math.sqrt(members), dtype=torch.float64)
            return float(torch.special.log_ndtr(score)) <= log_tail

        return _smallest_number(suffices)


def certify(predictor: TemplatePredictor, bounds: MatchBounds, decoder: Decoder) -> Certificate:
    """Find the worst margins of a decoder over a set of states, with states that attain them.

    Branch and bound over (bit, C_j): each has a range of s, at first that of all states. The one whose range allows the
    smallest margin has its range made exact, until the smallest margin is attained.

    Args:
        predictor: Theory, padding included.
        bounds: Bounds of the same templates, over the states in question.
        decoder: One of `DECODERS`.

    Raises:
        OptionError: The decoder is unknown.
        RuntimeError: A search found no state within its time limit.
    """
    most, fewest = bounds.most, bounds.min_matches()
    bits = predictor.templates.layout.bits
    if fewest is None:
        # Nothing ever matches: every next state is zero, and decoded so with certainty.
        return Certificate(decoder, most, None, None, True, math.inf, bits)
    search = _Search(predictor, decoder, bounds, (fewest, most))
    ones, ones_proven = search.smallest_margin(ones=True)
    zeros, zeros_proven = search.smallest_margin(ones=False)
    return Certificate(decoder, most, ones, zeros, ones_proven and zeros_proven, search.score(), bits)


@dataclass(frozen=True)
class _Range:
    """A bit and a C_j with the range of s that is still possible there.

    Attributes:
        bit: Position of the bit.
        set_count: C_j.
        low: Smallest s.
        high: Largest s.
        estimated: Whether ``high`` takes the quick estimate into account.
        low_attained: Number of matches of the state found for ``low``; None before the search.
        high_attained: The same for ``high``.
    """

    bit: int
    set_count: int
    low: int
    high: int
    estimated: bool = False
    low_attained: int | None = None
    high_attained: int | None = None


class _Search:
    """The margins for every s and every (bit, C_j), and the worst ones attained so far."""

    def __init__(
        self, predictor: TemplatePredictor, decoder: Decoder, bounds: MatchBounds, extent: tuple[Bound, Bound]
    ) -> None:
        self._predictor, self._decoder, self._bounds = predictor, decoder, bounds
        low, high = (bound.bound for bound in extent)
        # As far as is known here, every C_j up to F_j is possible.
        self._ranges = {
            column: _Range(bit, set_count, low, high)
            for column, (bit, set_count) in enumerate(
                (bit, c) for bit, fan_in in enumerate(predictor.fan_in.tolist()) for c in range(min(fan_in, high) + 1)
            )
        }
        set_counts = torch.tensor([one.set_count for one in self._ranges.values()])
        fan_in = predictor.fan_in[torch.tensor([one.bit for one in self._ranges.values()])]
        self._margins: Float64[Tensor, "s columns"] = margin_table(predictor, decoder, high, set_counts, fan_in).margins
        self._deviations = predictor.variance(torch.arange(high + 1)).sqrt()
        self._best: dict[bool, WorstCase] = {}
        for bound in extent:
            self._evaluate_state(bound.state)

    def _evaluate_state(self, state: Bool[Tensor, " bits"]) -> None:
        """Take the margins of one state into account."""
        predictor = self._predictor
        matches = predictor.templates.matches(state[None])
        set_counts, num_matches = predictor.templates.set_counts(matches), matches.sum(1)
        if num_matches == 0:
            return
        mean = predictor.mean(num_matches, set_counts, predictor.fan_in)
        row = decode_mean(mean, self._decoder, predictor, num_matches, set_counts > 0)[1][0]
        for ones in (True, False):
            candidates = torch.nonzero((set_counts[0] > 0) == ones).flatten()
            if not len(candidates):
                continue
            bit = int(candidates[row[candidates].argmin()])
            if ones not in self._best or row[bit] < self._best[ones].margin:
                self._best[ones] = WorstCase(
                    float(row[bit]), bit, int(num_matches), int(set_counts[0, bit]), int(predictor.fan_in[bit]), state
                )

    def smallest_margin(self, *, ones: bool) -> tuple[WorstCase | None, bool]:
        """Return the smallest margin of 1-bits or of 0-bits, and whether it is proven to be."""
        heap = [(*self._lowest(c, one), c) for c, one in self._ranges.items() if ones == (one.set_count > 0)]
        heapq.heapify(heap)
        while heap:
            lower, at, column = heapq.heappop(heap)
            best = self._best.get(ones)
            if best is not None and lower >= best.margin - _ROUNDING:
                return best, True
            at, one = -at, self._ranges[column]
            attained = one.high_attained if at == one.high else one.low_attained
            if attained is not None:
                # Exact at this end, or out of time there.
                return best, attained == at
            tighter = self._tighten(one, at)
            if tighter is None or tighter.low > tighter.high:
                # No such state but, perhaps, one that nothing matches.
                del self._ranges[column]
            else:
                self._ranges[column] = tighter
                heapq.heappush(heap, (*self._lowest(column, tighter), column))
        return self._best.get(ones), True

    def _tighten(self, one: _Range, at: int) -> _Range | None:
        """Return a range with a better bound at one of its ends; None if no state is in it."""
        bit, set_count = one.bit, one.set_count
        if at == one.high and not one.estimated:
            estimate = self._bounds.max_matches_estimate(bit, set_count)
            return replace(one, high=min(one.high, estimate), estimated=True)
        bound = (self._bounds.max_matches if at == one.high else self._bounds.min_matches)(bit, set_count)
        if bound is None:
            return None
        self._evaluate_state(bound.state)
        if at == one.high:
            return replace(one, high=bound.bound, high_attained=bound.attained)
        return replace(one, low=bound.bound, low_attained=bound.attained)

    def _lowest(self, column: int, one: _Range) -> tuple[float, int]:
        """Return the smallest margin in a range, and the negative of its s; of equal ones the largest s."""
        margins = self._margins[one.low : one.high + 1, column]
        lowest = margins.min()
        return float(lowest), -(one.low + int(torch.nonzero(margins == lowest).max()))

    def score(self) -> float:
        """Return the smallest margin in standard deviations over all ranges; 0 at failures and ties."""
        allowed = torch.zeros_like(self._margins, dtype=torch.bool)
        for column, one in self._ranges.items():
            allowed[one.low : one.high + 1, column] = True
        scores = (self._margins / self._deviations[:, None]).masked_fill(self._margins <= TIE, 0.0)
        return float(scores[allowed].min())


def members_for_states(prediction: Prediction, decoder: Decoder, delta: float) -> int | None:
    """Return the smallest N for which given states are all decoded right with probability at least 1 − δ.

    Each state's chance of any wrong bit is exact (bits are independent); over states, which share their members, they
    are added up (union bound).

    Args:
        prediction: What is predicted of the states.
        decoder: One of `DECODERS`.
        delta: Chance δ of any wrong bit, between 0 and 1.

    Returns:
        None where no number suffices: a mean is on the wrong side of its threshold, or lies on it.
    """
    margins = prediction.margins[decoder]
    if float(margins.min()) <= TIE:
        return None

    def suffices(members: int) -> bool:
        failures = -torch.expm1(log_exact_match_probability(margins, prediction.variance, members))
        return float(failures.sum()) <= delta

    return _smallest_number(suffices)


def _smallest_number(suffices: Callable[[int], bool]) -> int:
    """Return the smallest positive number that suffices, where all larger ones do too."""
    high = 1
    while not suffices(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def sign_padding(predictor: TemplatePredictor, bounds: MatchBounds) -> int:
    """Return the number of padding templates that make the sign decoder right on all states in question.

    A 1-bit's mean is positive if k is large enough (docs/theory.md, equation (27)), the larger the larger s is. 0-bits
    have means of at most 0.

    Args:
        predictor: Theory of the templates; its own padding is not counted.
        bounds: Bounds of the same templates, over the states in question.

    Returns:
        The smallest number of padding templates in all; an upper bound of it where a search ran out of time.

    Raises:
        RuntimeError: A search found no state within its time limit.
    """
    size, most = len(predictor.templates), bounds.most.bound
    needed_at_most = {
        (bit, set_count): _templates_needed(predictor.kernel, most, set_count, fan_in)
        for bit, fan_in in enumerate(predictor.fan_in.tolist())
        for set_count in range(1, min(fan_in, most) + 1)
    }
    needed, critical = 0.0, (0, 0, 0)
    for (bit, set_count), at_most in sorted(needed_at_most.items(), key=lambda item: -item[1]):
        if at_most <= max(needed, size - 1):
            break
        bound = bounds.max_matches(bit, set_count)
        if bound is None:
            continue
        exact = _templates_needed(predictor.kernel, bound.bound, set_count, int(predictor.fan_in[bit]))
        if exact > needed:
            needed, critical = exact, (bit, set_count, bound.bound)
    bit, set_count, num_matches = critical
    padding = max(0, math.floor(needed) + 1 - size)
    # Rounding, and a threshold a little above 0: the decoder itself has the last word.
    while num_matches:
        padded = TemplatePredictor(predictor.templates, padding, layers=predictor.kernel.layers)
        if _reads_one(padded, bit, set_count, num_matches):
            break
        padding += 1
    return padding


def _templates_needed(kernel: TrainingKernel, num_matches: int, set_count: int, fan_in: int) -> float:
    """Return the k above which the mean of a bit with C_j ≥ 1 is positive: docs/theory.md, equation (27)."""
    gap = kernel.gap
    excess = float(kernel.profile(torch.tensor(num_matches**-0.5, dtype=torch.float64))) - ORTHOGONAL
    return fan_in * (num_matches - gap / excess) / set_count - gap / ORTHOGONAL


def _reads_one(predictor: TemplatePredictor, bit: int, set_count: int, num_matches: int) -> bool:
    """Return whether the sign decoder decodes a bit with these counts as 1."""
    table = margin_table(predictor, "sign", num_matches, torch.tensor([set_count]), predictor.fan_in[bit : bit + 1])
    return bool(table.decoded[num_matches, 0])


def certify_task(
    task: Task[Any, Any],
    *,
    layers: Layers = "both",
    padding: int = 0,
    decoders: Sequence[Decoder] = DECODERS,
    delta: float = 1e-6,
    evaluation: EvaluationSet | None = None,
    evaluation_seed: int = 0,
) -> dict[str, Any]:
    """Return what a task's templates promise, as plain values: the object that ``ntk-ensembles certify --json`` prints.

    Args:
        task: Task to certify.
        layers: Which layers are trained.
        padding: Number of padding templates, as in `TemplatePredictor`.
        decoders: Decoders to certify.
        delta: Chance δ of any wrong bit that the members needed must stay below, between 0 and 1.
        evaluation: Evaluation states to count members for beside the proofs; by default 1000 are sampled.
        evaluation_seed: Seed of the inputs that evaluation states and the bits of starting states come from.

    Raises:
        ValueError: An argument is outside its range.
        TaskError: The templates do not lead to the task's reference.
        RuntimeError: A search found no state within its time limit.
    """
    templates = task.templates
    predictor = TemplatePredictor(templates, padding, layers=layers)
    if evaluation is None:
        evaluation = EvaluationSet.sample(task, 1000, evaluation_seed)
    seen = evaluation.matches.sum(1)
    start_names = _start_bits(task, evaluation_seed)[1]
    scopes = scopes_of(task, evaluation_seed)
    limit = LimitPrediction(task, evaluation, predictor)
    rows: dict[str, Any] = {}
    for decoder in decoders:
        certificates = {name: certify(predictor, scope, decoder) for name, scope in scopes.items()}
        rows[decoder] = {name: _describe(task, certificate) for name, certificate in certificates.items()}
        rows[decoder]["members"] = members_needed(certificates, limit, delta)
        if decoder == "sign":
            rows[decoder]["padding"] = {name: sign_padding(predictor, scope) for name, scope in scopes.items()}
    return {
        "task": {"name": task.name, **task.options},
        "templates": len(templates),
        "padding": padding,
        "layers": layers,
        "state_bits": task.layout.bits,
        "delta": delta,
        "num_matches": {
            **{name: {"max": s.most.bound, "max_attained": s.most.attained} for name, s in scopes.items()},
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


def members_needed(
    certificates: Mapping[str, Certificate], prediction: Prediction, delta: float
) -> dict[str, int | None]:
    """Return how many members suffice for what is to be right with probability at least 1 − δ.

    Args:
        certificates: Certificates of one decoder, by the names of `scopes_of`.
        prediction: What is predicted of the evaluation states.
        delta: Chance δ of any wrong bit, between 0 and 1.
    """
    every = certificates["all_states"]
    return {
        "one_state": every.members(delta),
        "one_reachable_state": certificates["reachable"].members(delta),
        "evaluation_states": members_for_states(prediction, every.decoder, delta),
        "all_states": every.members(delta, every.bits * math.log(2)),
    }


def scopes_of(task: Task[Any, Any], seed: int = 0) -> dict[str, MatchBounds]:
    """Return bounds of a task's templates over ``all_states`` and over the ``reachable`` ones.

    Args:
        task: The task.
        seed: Seed of the inputs that show in which bits trajectories begin.
    """
    templates, start = task.templates, _start_bits(task, seed)[0]
    return {
        "all_states": MatchBounds(templates),
        "reachable": MatchBounds(templates, exclusive_bits(templates, start)),
    }


def _start_bits(task: Task[Any, Any], seed: int) -> tuple[Bool[Tensor, " bits"], list[str]]:
    """Return, in each field, the bits between the lowest and the highest that the first inputs set; and their names."""
    used: dict[str, int] = {}
    for task_input in itertools.islice(checked_inputs(task, seed), _INPUTS_SEEN):
        for name, content in task.initial_fields(task_input).items():
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


def _describe(task: Task[Any, Any], certificate: Certificate) -> dict[str, Any]:
    return {
        "exact": certificate.exact,
        "tie": certificate.tie,
        "margin": certificate.margin if math.isfinite(certificate.margin) else None,
        "worst_one": _describe_worst_case(task, certificate.ones),
        "worst_zero": _describe_worst_case(task, certificate.zeros),
    }


def _describe_worst_case(task: Task[Any, Any], worst: WorstCase | None) -> dict[str, Any] | None:
    """Return a state and bit in words: which bit, what sets it, and the state's fields that are not 0."""
    if worst is None:
        return None
    templates = task.templates
    groups = Counter(templates.templates[index].group for index in templates.setters[worst.bit])
    return {
        "margin": worst.margin,
        "bit": task.layout.bit_name(worst.bit),
        "num_matches": worst.num_matches,
        "set_count": worst.set_count,
        "fan_in": worst.fan_in,
        "groups": dict(groups.most_common()),
        "state": {name: value for name, value in task.layout.unpack(worst.state).items() if value},
    }
