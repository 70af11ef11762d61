"""The paper's ensemble experiment again: members that ensembles need to permute k bits, against the published ones.

Members are added to an ensemble one by one, as the published experiment did. What counts is the first N at which the
mean of N members decodes a share of inputs right. Members needed on average, which the rest of this package speaks of,
are more: an exact match that wavers about the target reaches it for the first time earlier.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from ntk_ensembles.ensemble import DescentOptions, Recipe, choose_cohort, predict, train_members
from ntk_ensembles.ensemble.network import WIDTH_MAX
from ntk_ensembles.errors import OptionError, check_range, check_seed
from ntk_ensembles.files import read_bytes, write_atomically
from ntk_ensembles.runs.plan import smallest_reaching
from ntk_ensembles.runs.results import environment
from ntk_ensembles.runs.run import prepare_directory
from ntk_ensembles.tasks import EvaluationSet, Permutation
from ntk_ensembles.theory import (
    Decoder,
    FiniteWidth,
    Layers,
    LimitPrediction,
    Prediction,
    TemplatePredictor,
    WidthPrediction,
    decode,
    deviation_root,
)

TARGETS = (0.9, 0.999)
"""Shares of inputs that are to be decoded right."""

BITS_MAX, MEMBERS_MAX = 64, 1 << 14
"""Bits of a word at most, and members of an ensemble."""

RESULTS = "reproduction.json"
"""Name of the file of results."""

_ONES, _INPUTS = 2, 1000
"""Ones of an input, and inputs that an ensemble is scored on, as published: drawn at random, repeats included."""

_MEMBERS_AT_ONCE = 32
_SEQUENCES_DRAWN, _OUTPUTS_DRAWN = (16, 200), 100_000
"""Sequences that are drawn from theory, least and most, and outputs that a member of each has together."""
_RESULTS_BYTES_MAX = 1 << 26


@dataclass(frozen=True)
class ReproduceOptions:
    """Options of a reproduction."""

    width: int = 4096
    """Hidden units n of each member."""

    sequences: int = 6
    """Ensembles to grow, of disjoint members, for each number of bits, 1 to 1000."""

    members_max: int = 4096
    """Members at which an ensemble is given up, 1 to 16384."""

    seed: int = 0
    """Seed of the members and of the inputs, 0 to 2^63 - 1."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            OptionError: An option is outside its range.
        """
        check_range("width", self.width, 1, WIDTH_MAX)
        check_range("sequences", self.sequences, 1, 1000)
        check_range("members_max", self.members_max, 1, MEMBERS_MAX)
        check_seed("seed", self.seed)


class Passings(TypedDict):
    """Members at which ensembles first reach a target: of each trained one, and of each drawn from theory.

    None stands for more than were tried. ``average`` is the smallest N that reaches the target on average.
    """

    measured: list[int | None]
    infinite_width: list[int | None]
    infinite_width_average: int | None
    at_width: list[int | None] | None
    at_width_average: int | None


class WayRow(TypedDict):
    """One way to train and decode: ``passings`` by target, as "0.9"."""

    layers: Layers
    decoder: Decoder
    passings: dict[str, Passings]


class BitsRow(TypedDict):
    """Everything about one number of bits."""

    bits: int
    states: int
    ways: list[WayRow]
    members_trained: int
    seconds: float


WAYS: tuple[tuple[Layers, tuple[Decoder, ...]], ...] = (("readout", ("sign",)), ("both", ("sign", "midpoint")))
"""Layers that are trained and the decoders of these members; the published experiment's in effect first."""


def published_passings() -> dict[int, dict[float, int | None]]:
    """Return, for each number of bits, the published N at which each target was first reached; None where none was."""
    file = resources.files("ntk_ensembles.runs") / "published" / "permutation_ensembles.csv"
    found: dict[int, dict[float, int | None]] = {}
    for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
        passed = found.setdefault(int(row["k"]), dict.fromkeys(TARGETS))
        for target in TARGETS:
            members, before = int(row["members"]), passed[target]
            if float(row["exact_match"]) >= target and (before is None or members < before):
                passed[target] = members
    return found


def first_passings(
    outputs: Callable[[list[int], range], Float[Tensor, "sequences members states bits"]],
    thresholds: Mapping[Decoder, Float64[Tensor, "states bits"]],
    next_states: Bool[Tensor, "states bits"],
    counts: Int[Tensor, "sequences states"],
    members_max: int,
) -> dict[Decoder, dict[float, list[int | None]]]:
    """Return, for each decoder and target, the first N at which each sequence of members reaches it; None if never.

    Args:
        outputs: Function from the sequences that are wanted and the places of members in them, from 0, to their
            outputs. It is called for consecutive members, and for a sequence until it has reached everything.
        thresholds: Thresholds of the decoders to consider.
        next_states: True next states.
        counts: How often each state is among the inputs that a sequence is scored on.
        members_max: Number of members at which to give up.
    """
    sequences = len(counts)
    found: dict[Decoder, dict[float, list[int | None]]] = {
        decoder: {target: [None] * sequences for target in TARGETS} for decoder in thresholds
    }
    wanted = counts.sum(1)
    sums = torch.zeros(sequences, *next_states.shape)
    going = list(range(sequences))
    limits_of = {decoder: limits.to(sums.dtype) for decoder, limits in thresholds.items()}
    # The first few often suffice.
    start, size = 0, 1
    while going and start < members_max:
        places = range(start, min(start + size, members_max))
        totals = sums[going][:, None] + outputs(going, places).cumsum(1)
        sums[going] = totals[:, -1]
        means = totals / (torch.tensor(places) + 1)[:, None, None]
        missing = set()
        for decoder, limits in limits_of.items():
            if all(firsts[sequence] is not None for firsts in found[decoder].values() for sequence in going):
                continue
            right = (decode(means, limits) == next_states).all(3)
            correct = (right * counts[going][:, None]).sum(2)
            for target, firsts in found[decoder].items():
                reached = correct >= (target * wanted[going])[:, None] - 1e-9
                for row, sequence in enumerate(going):
                    if firsts[sequence] is None and bool(reached[row].any()):
                        firsts[sequence] = start + int(reached[row].int().argmax()) + 1
                    if firsts[sequence] is None:
                        missing.add(sequence)
        going = sorted(missing)
        start, size = places.stop, min(2 * size, _MEMBERS_AT_ONCE)
    return found


def study(bits: int, options: ReproduceOptions, on_progress: Callable[[str], object] = lambda what: None) -> BitsRow:
    """Return the members needed to permute words of some length, measured and predicted.

    Args:
        bits: Number of bits k of a word, 2 to 64.
        options: Options of the reproduction.
        on_progress: Called with what is being done now, in words.

    Raises:
        OptionError: The width is too small for training to converge, or too large for the memory.
    """
    started = time.perf_counter()
    task = Permutation(bits, ones=_ONES)
    evaluation = EvaluationSet.sample(task, math.comb(bits, _ONES), options.seed)
    counts = _drawn_inputs(len(evaluation), options.sequences, options.seed)
    least, most = _SEQUENCES_DRAWN
    drawn = min(max(_OUTPUTS_DRAWN // evaluation.next_states.numel(), least), most)
    counts_drawn = _drawn_inputs(len(evaluation), drawn, options.seed + 1)
    ways: list[WayRow] = []
    trained = 0
    for layers, decoders in WAYS:
        limit = LimitPrediction(task, evaluation, TemplatePredictor(task.templates, layers=layers))
        limits = {decoder: limit.thresholds[decoder] for decoder in decoders}
        finite = FiniteWidth(limit.predictor, options.width)
        at_width = WidthPrediction(limit, finite, states_max=len(evaluation)) if finite.trusted else None

        def theory(
            prediction: Prediction, limit: LimitPrediction = limit, limits: dict[Decoder, Tensor] = limits
        ) -> dict[Decoder, dict[float, list[int | None]]]:
            members = _drawn_members(limit, prediction, options.seed)
            return first_passings(members, limits, evaluation.next_states, counts_drawn, options.members_max)

        on_progress(f"k = {bits}, {layers}: drawing from theory")
        infinite = theory(limit)
        of_width = None if at_width is None else theory(at_width)
        members = _TrainedMembers(limit, options, on_progress)
        measured = first_passings(members, limits, evaluation.next_states, counts, options.members_max)
        trained += members.trained
        for decoder in decoders:
            passings: dict[str, Passings] = {}
            for target in TARGETS:
                passings[f"{target:g}"] = {
                    "measured": measured[decoder][target],
                    "infinite_width": infinite[decoder][target],
                    "infinite_width_average": smallest_reaching(limit, decoder, target, MEMBERS_MAX),
                    "at_width": None if of_width is None else of_width[decoder][target],
                    "at_width_average": (
                        None if at_width is None else smallest_reaching(at_width, decoder, target, MEMBERS_MAX)
                    ),
                }
            ways.append({"layers": layers, "decoder": decoder, "passings": passings})
    return {
        "bits": bits,
        "states": len(evaluation),
        "ways": ways,
        "members_trained": trained,
        "seconds": time.perf_counter() - started,
    }


def _drawn_inputs(states: int, sequences: int, seed: int) -> Int[Tensor, "sequences states"]:
    """Return how often each state is among the inputs of each sequence."""
    drawn = torch.randint(states, (sequences, _INPUTS), generator=torch.Generator().manual_seed(seed))
    return torch.zeros(sequences, states, dtype=torch.int64).scatter_add_(1, drawn, torch.ones_like(drawn))


def _drawn_members(
    limit: LimitPrediction, prediction: Prediction, seed: int
) -> Callable[[list[int], range], Float[Tensor, "sequences members states bits"]]:
    """Return members with the mean and the variance of a prediction, and with infinite width's correlations."""
    root = deviation_root(limit.predictor, limit.evaluation.matches)
    variance = prediction.variance if prediction.variance.ndim == 2 else prediction.variance[:, None]
    scale = (variance / limit.variance[:, None]).sqrt().to(torch.float32)
    mean = prediction.mean.to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    bits = mean.shape[1]

    def members(sequences: list[int], places: range) -> Tensor:
        normal = torch.randn(len(root), len(sequences) * len(places) * bits, generator=generator)
        deviations = (root @ normal).view(len(root), len(sequences), len(places), bits).permute(1, 2, 0, 3)
        return mean + scale * deviations

    return members


class _TrainedMembers:
    """Sequences of trained members: that at place p of sequence s has the index p·(number of sequences) + s.

    Args:
        limit: What they learn, and their evaluation states.
        options: Options of the reproduction.
        on_progress: Called with how many members there are, in words.

    Attributes:
        trained: Number of members that were trained.
    """

    def __init__(self, limit: LimitPrediction, options: ReproduceOptions, on_progress: Callable[[str], object]) -> None:
        predictor = limit.predictor
        descent = DescentOptions(layers=predictor.kernel.layers)
        labels = predictor.labels.to(torch.float32)
        self._recipe = Recipe(labels, options.width, seed=options.seed, descent=descent)
        self._inputs = limit.inputs.to(torch.float32)
        self._options = options
        self._on_progress = on_progress
        self._device = torch.device("cpu")
        self._cohort = choose_cohort(self._recipe, len(self._inputs), 1 << 20, self._device)
        self.trained = 0

    def __call__(self, sequences: list[int], places: range) -> Float[Tensor, "sequences members states bits"]:
        """Train members and return their outputs."""
        bits, layers = self._recipe.labels.shape[1], self._recipe.descent.layers
        self._on_progress(f"k = {bits}, {layers}: {places.start:,} members in each of {len(sequences)} ensembles")
        indices = [place * self._options.sequences + sequence for sequence in sequences for place in places]
        parts = []
        for start in range(0, len(indices), self._cohort):
            stack, statuses = train_members(self._recipe, indices[start : start + self._cohort], self._device)
            if not all(status.converged for status in statuses):
                expected = "a width at which all members converge"
                raise OptionError("width", self._options.width, expected)
            parts.append(predict(stack, self._inputs))
        self.trained += len(indices)
        outputs = torch.cat(parts)
        return outputs.view(len(sequences), len(places), *outputs.shape[1:])


def reproduce(
    bits: Sequence[int],
    options: ReproduceOptions,
    out: str | Path | None = None,
    on_progress: Callable[[int, str], object] = lambda done, what: None,
) -> tuple[Path, dict[str, Any]]:
    """Study several numbers of bits, and write results and the figure after each.

    Args:
        bits: Numbers of bits k, each from 2 to 64, in any order.
        options: Options of the reproduction.
        out: Directory to write: new, empty, or of an earlier reproduction with the same options, whose results are
            kept. By default a fresh one under ``runs/``.
        on_progress: Called with how many numbers of bits are done and what is being done now, in words.

    Returns:
        The directory and the content of its file of results.

    Raises:
        OptionError: A number of bits is outside its range, or the width cannot be used.
        ValueError: The directory cannot be used.
        SaveError: A file cannot be written.
    """
    if not bits:
        raise OptionError("bits", list(bits), f"at least one integer from 2 to {BITS_MAX}")
    for number in bits:
        check_range("bits", number, _ONES, BITS_MAX)
    directory, rows = _begun(out, options)
    # Matplotlib takes a while to import.
    from ntk_ensembles.runs.figures import reproduction_figure, save_figure

    known = {row["bits"] for row in rows}
    results: dict[str, Any] = {}
    # The cheap ones first; what is known already is drawn again all the same.
    for position, number in enumerate(sorted(set(bits))):
        if number not in known:
            rows.append(study(number, options, functools.partial(on_progress, position)))
        rows.sort(key=lambda row: row["bits"])
        results = {
            "options": asdict(options),
            "inputs": _INPUTS,
            "rows": rows,
            "environment": environment(torch.device("cpu"), "float32"),
        }
        text = json.dumps(results, allow_nan=False) + "\n"
        write_atomically(directory / RESULTS, functools.partial(Path.write_text, data=text, encoding="utf-8"))
        on_progress(position + 1, f"k = {number} is done")
    save_figure(reproduction_figure(rows, published_passings(), options.width), directory, "members-needed")
    return directory, results


def _begun(out: str | Path | None, options: ReproduceOptions) -> tuple[Path, list[BitsRow]]:
    """Return the directory, made if it is new, and the rows that it has already."""
    path = None if out is None else Path(out)
    if path is None or not (path / RESULTS).exists():
        return prepare_directory(None if out is None else str(out), "reproduce")[0], []
    try:
        earlier = json.loads(read_bytes(path / RESULTS, _RESULTS_BYTES_MAX))
        rows: list[BitsRow] = earlier["rows"]
        same = earlier["options"] == asdict(options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / RESULTS}: is damaged ({error}); expected a reproduction's results") from error
    if not same:
        raise ValueError(f"--out {out}: has results with other options; expected the same options, or a new directory")
    return path, rows
