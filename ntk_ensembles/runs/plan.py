"""Which ensembles reach a target, before any training: widths and members by theory, time by a short measurement."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ntk_ensembles.ensemble import DescentOptions, Init, Recipe, choose_cohort, predict, train_members
from ntk_ensembles.ensemble.cohort import COHORT_MAX
from ntk_ensembles.ensemble.network import cpu_workers, one_thread
from ntk_ensembles.runs.options import RunOptions, train_command_line
from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.theory import (
    LABELS,
    Certificate,
    Decoder,
    FiniteWidth,
    Labels,
    Layers,
    LimitPrediction,
    Prediction,
    TemplatePredictor,
    WidthPrediction,
)
from ntk_ensembles.theory.certificate import scopes_of
from ntk_ensembles.theory.width_certificate import score_at_width, spread_at_width, states_of_all_densities

WIDTHS = tuple(1 << exponent for exponent in range(8, 18))
"""Widths that are considered."""

MEMBERS_MAX = 1 << 14
"""Ensembles of more members are not planned."""

_STATES, _UNITS = 250, 128
_WEIGHTS_MEASURED = 1 << 22
"""Weights of the members whose time is measured."""

_INITS: tuple[Init, ...] = ("gaussian", "antisymmetric")


@dataclass(frozen=True)
class Choice:
    """One ensemble that reaches the target, and what it costs.

    Attributes:
        width: n, the hidden units of each member.
        members: N, the smallest number of members that reach the target.
        decoder: How their mean is decoded.
        labels: What members are trained on.
        init: How weights are drawn.
        steps: Steps of training that are expected of each member.
        multiply_adds: Multiply-adds of all members' training and evaluation.
        memory_bytes: Memory that the members take that are trained together.
        seconds: Estimated time on this machine to draw, train and evaluate all members.
        command: Command that runs it.
    """

    width: int
    members: int
    decoder: Decoder
    labels: Labels
    init: Init
    steps: int
    multiply_adds: int
    memory_bytes: int
    seconds: float
    command: str


@dataclass(frozen=True)
class Calibration:
    """What members of one width took on this machine.

    Attributes:
        width: Their width.
        fixed_seconds: Time to draw and to evaluate a round of members: one on every core, or one on a GPU.
        step_seconds: Time of one step of a round.
        decades: Decimal orders of magnitude by which a step lowers the squared training error.
        workers: Members of a round.
    """

    width: int
    fixed_seconds: float
    step_seconds: float
    decades: float
    workers: int

    def steps(self, width: int, tolerance: float) -> int:
        """Return the steps that members of a width are expected to take.

        A step leaves a share of order √(k/n) of the residuals, so its decades grow with the logarithm of the width.

        Args:
            width: Their width.
            tolerance: Share of the first squared error at which they have converged.
        """
        decades = max(self.decades + math.log10(width / self.width), 0.1)
        return max(1, math.ceil(-math.log10(tolerance) / decades - 0.1))

    def seconds(self, width: int, members: int, steps: int) -> float:
        """Return the time that members take: their rounds, each proportional to the width.

        Args:
            width: Their width.
            members: Their number.
            steps: Steps of each.
        """
        rounds = math.ceil(members / self.workers)
        return rounds * width / self.width * (self.fixed_seconds + steps * self.step_seconds)


def calibrate(predictor: TemplatePredictor, width: int, device: torch.device, evaluation: EvaluationSet) -> Calibration:
    """Measure how long a few members of one width take on this machine.

    Args:
        predictor: Theory of what they learn.
        width: The smallest width of interest, at which training converges. Time is measured at a width that keeps this
            machine busy, for below that it hardly depends on it; steps at this one, where they are more.
        device: Where to compute.
        evaluation: States to evaluate them on.
    """
    workers = cpu_workers() if device.type == "cpu" else 1
    smallest = _recipe(predictor, width)
    busy = 1 << round(math.log2(_WEIGHTS_MEASURED / sum(smallest.labels.shape)))
    recipe = _recipe(predictor, min(max(width, busy), max(WIDTHS)))
    inputs = predictor.encode(evaluation.matches).to(torch.float32)
    # The first call of everything is slower than the rest of a run.
    first = train_members(smallest, range(2 * workers), device)[1]
    lowest = sum(math.log10(max(status.relative_loss, 1e-30)) for status in first)
    decades = -lowest / sum(status.steps for status in first)
    started = time.perf_counter()
    stack, statuses = train_members(recipe, range(2 * workers), device)
    trained = time.perf_counter()
    predict(stack, inputs).cpu()
    evaluated = time.perf_counter()
    recipe.make_stack(range(2 * workers), device)
    drawn = time.perf_counter() - evaluated
    steps = sum(status.steps for status in statuses) / len(statuses)
    return Calibration(
        recipe.width,
        (drawn + evaluated - trained) / 2,
        max(trained - started - drawn, 0.0) / 2 / steps,
        decades + math.log10(recipe.width / width),
        workers,
    )


def plan(
    task: Task[Any, Any],
    exact: float,
    *,
    decoders: Sequence[Decoder],
    all_states: bool = False,
    layers: Layers = "both",
    padding: int = 0,
    evaluation_states: int = 1000,
    evaluation_seed: int = 0,
    widths: Sequence[int] = WIDTHS,
    device: torch.device | None = None,
) -> tuple[list[Choice], Calibration]:
    """Return the ensembles that are expected to reach a target, the quickest first.

    Args:
        task: What is learned.
        exact: Share of evaluation states to be decoded right, on average over ensembles; or, for all states, the
            chance that not one of them is wrong. Between 0 and 1.
        decoders: Decoders to consider.
        all_states: Whether the target is for all 2^m states rather than for evaluation states.
        layers: Which layers are trained; one of `LAYERS`.
        padding: Number of padding templates, as in `TemplatePredictor`.
        evaluation_states: Number of evaluation states that a run would have.
        evaluation_seed: Seed of the evaluation states.
        widths: Widths to consider; those at which theory is not valid are left out.
        device: Where to train; by default the CPU.

    Returns:
        The choices, one for each width, decoder, labels and initialisation with which the target is reached, and the
        measurement that their times come from.

    Raises:
        ValueError: The templates contradict the task's reference.
        RuntimeError: A search found no state within its time limit.
    """
    device = device or torch.device("cpu")
    with one_thread():
        evaluation = EvaluationSet.sample(task, evaluation_states, evaluation_seed)
    bounds = scopes_of(task, evaluation_seed)["all_states"] if all_states else None
    sample = states_of_all_densities(task, evaluation)
    found: list[tuple[int, int, Decoder, Labels, Init]] = []
    valid: set[int] = set()
    predictors = {
        init: TemplatePredictor(task.templates, padding, layers=layers, antisymmetric=init == "antisymmetric")
        for init in _INITS
    }
    for init, predictor in predictors.items():
        limit = LimitPrediction(task, evaluation, predictor)
        for labels in LABELS if layers == "both" else LABELS[:1]:
            wanted = dict.fromkeys(decoders, MEMBERS_MAX)
            for width in sorted(widths):
                # Labels that cannot be corrected are those of a width that is far too small.
                if not FiniteWidth(predictor, width).trusted:
                    continue
                valid.add(width)
                finite = FiniteWidth(predictor, width, corrected=labels == "corrected")
                for decoder, members in _members(limit, finite, exact, wanted, bounds, sample).items():
                    found.append((width, members, decoder, labels, init))
                    # A larger width with as many members would only cost more.
                    wanted[decoder] = members - 1
    measured = calibrate(predictors["gaussian"], min(valid, default=max(widths)), device, evaluation)
    # What a command would take by itself is left out of it.
    asked = {
        "layers": layers,
        "padding": padding,
        "evaluation_states": evaluation_states,
        "evaluation_seed": evaluation_seed,
    }
    defaults = RunOptions()
    options = {name: value for name, value in asked.items() if value != getattr(defaults, name)}
    choices = [_choice(task, predictors[each[-1]], evaluation, options, measured, device, *each) for each in found]
    return sorted(choices, key=lambda choice: choice.seconds), measured


def _members(
    limit: LimitPrediction,
    finite: FiniteWidth,
    exact: float,
    at_most: dict[Decoder, int],
    bounds: Any,
    sample: torch.Tensor,
) -> dict[Decoder, int]:
    """Return, for each decoder that reaches the target at one width, the fewest members that do."""
    found: dict[Decoder, int] = {}
    if bounds is None:
        prediction = WidthPrediction(limit, finite, units=_UNITS, states_max=_STATES)
        for decoder, most in at_most.items():
            members = smallest_reaching(prediction, decoder, exact, most)
            if members is not None:
                found[decoder] = members
        return found
    spread = spread_at_width(finite, sample, units=_UNITS)
    bits = finite.predictor.templates.layout.bits
    matched = bounds.max_matches()
    for decoder, most in at_most.items():
        score = score_at_width(finite, bounds, decoder, spread)
        certificate = Certificate(decoder, matched, None, None, False, score, bits)
        members = certificate.members(1 - exact, bits * math.log(2))
        if members is not None and members <= most:
            found[decoder] = members
    return found


def smallest_reaching(prediction: Prediction, decoder: Decoder, exact: float, most: int) -> int | None:
    """Return the smallest N whose expected exact match reaches a target; None if not even ``most`` members do.

    Args:
        prediction: What is predicted of ensembles.
        decoder: How their mean is decoded.
        exact: The target.
        most: Largest N to consider.
    """
    if most < 1 or prediction.exact_match(most, decoder) < exact:
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if prediction.exact_match(middle, decoder) >= exact else (middle, high)
    return high


def _recipe(predictor: TemplatePredictor, width: int, init: Init = "gaussian") -> Recipe:
    descent = DescentOptions(layers=predictor.kernel.layers)
    return Recipe(predictor.labels.to(torch.float32), width, init, descent=descent)


def _choice(
    task: Task[Any, Any],
    predictor: TemplatePredictor,
    evaluation: EvaluationSet,
    others: dict[str, Any],
    measured: Calibration,
    device: torch.device,
    width: int,
    members: int,
    decoder: Decoder,
    labels: Labels,
    init: Init,
) -> Choice:
    recipe = _recipe(predictor, width, init)
    steps = measured.steps(width, recipe.descent.tolerance)
    templates, bits = recipe.labels.shape
    # Outputs, and per step one product more for each layer; evaluation sums the columns that a state selects.
    products = 3 if recipe.descent.layers == "both" else 2
    training = (products * steps + 1) * width * templates * bits
    evaluated = width * (int(evaluation.matches.sum()) + len(evaluation) * bits)
    try:
        cohort = choose_cohort(recipe, len(evaluation), members, device)
    except ValueError:
        # Not one fits; it is planned all the same, for another machine.
        cohort = min(members, COHORT_MAX)
    return Choice(
        width,
        members,
        decoder,
        labels,
        init,
        steps,
        members * (training + evaluated),
        cohort * recipe.training_bytes,
        measured.seconds(width, members, steps),
        train_command_line(
            task,
            {"width": width, "ensemble": members, "labels": labels, "init": init, **others},
        ),
    )
