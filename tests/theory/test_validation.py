"""Exhaustive validations against brute force, and against tasks and decoders that are wrong on purpose."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ntk_ensembles.tasks import SBN, Addition, Multiplication, Permutation, Task, TaskError, Template
from ntk_ensembles.theory import DECODERS, Decoder, TemplatePredictor, decode, margins, thresholds
from ntk_ensembles.theory.executor import NTKExecutor
from ntk_ensembles.theory.validation import TaskReport, validate_task


def values_of(task: Task[Any, Any]) -> list[Any]:
    words = range(1 << task.options["bits"])
    return list(words) if isinstance(task, Permutation) else list(itertools.product(words, words))


def validated(task: Task[Any, Any], executors: list[NTKExecutor], **options: Any) -> TaskReport:
    inputs = task.all_inputs()
    assert inputs is not None
    return validate_task(task, executors, inputs=inputs, **options)


def brute_force(task: Task[Any, Any], decoder: Decoder, padding: int) -> dict[str, Any]:
    """One input after the other, by plain unions of templates and the dense predictor."""
    predictor = TemplatePredictor(task.templates, padding)
    seen: set[tuple[bool, ...]] = set()
    steps, failed, smallest, ties = 0, [], {True: math.inf, False: math.inf}, 0
    for value in values_of(task):
        state = task.initial_state(value)[None]
        right = True
        for _ in range(task.num_micro_steps(value)):
            steps += 1
            seen.add(tuple(state[0].tolist()))
            matches = task.templates.matches(state)
            matched = matches.sum(1)
            mean, levels = predictor.predict(matches).mean, thresholds(decoder, predictor, matched)
            on = {
                bit
                for rule in task.templates.templates
                if all(state[0, i] for i in rule.ones) and not any(state[0, i] for i in rule.zeros)
                for bit in rule.sets
            }
            union = torch.tensor([[bit in on for bit in range(task.layout.bits)]])
            right &= torch.equal(decode(mean, levels), union)
            if matched:
                distances = margins(mean, levels, union)[0]
                for kind in (True, False):
                    smallest[kind] = min([smallest[kind], *distances[union[0] == kind].tolist()])
                ties += bool((distances.abs() <= 1e-9).any())
            if torch.equal(union, state):
                break
            state = union
        if not right or task.result(state[0]) != task.reference(value):
            failed.append(value)
    return {"steps": steps, "seen": len(seen), "failed": failed, "smallest": smallest, "ties": ties}


@pytest.mark.parametrize(
    "task",
    [Permutation(1), Permutation(5), Addition(1), Addition(2), Addition(3), Multiplication(1), Multiplication(2)],
    ids=repr,
)
@pytest.mark.parametrize("padding", [0, 30])
def test_counts_are_those_of_brute_force(task: Task[Any, Any], padding: int) -> None:
    executors = [NTKExecutor(task.templates, decoder, padding=padding) for decoder in DECODERS]
    told: list[int] = []
    report = validated(task, executors, on_progress=told.append)
    assert sum(told) == report.inputs == len(values_of(task))
    for decoder, tally in zip(DECODERS, report.tallies, strict=True):
        expected = brute_force(task, decoder, padding)
        assert (report.micro_steps, report.distinct_states, report.distinct_exact) == (
            expected["steps"],
            expected["seen"],
            True,
        )
        assert report.predictions == expected["seen"] * task.layout.bits
        assert (tally.failures, tally.ties) == (len(expected["failed"]), expected["ties"])
        assert (tally.first_failure is None) == (tally.failures == 0)
        assert tally.smallest_one == pytest.approx(expected["smallest"][True], abs=2e-12)
        assert tally.smallest_zero == pytest.approx(expected["smallest"][False], abs=2e-12)


class Crowded(Addition):
    """A hundred templates more set the lowest bit in a state that is never reached, and pull its mean down."""

    def make_templates(self) -> Iterator[Template]:
        yield from super().make_templates()
        for _ in range(100):
            yield Template.rule("never", ones=range(self.layout.bits), sets=[self.layout["p"][0]])


def test_a_decoder_that_is_wrong() -> None:
    task = Crowded(4)
    # The one that is wrong comes first: the other must not notice.
    executors = [NTKExecutor(task.templates, decoder) for decoder in ("sign", "midpoint")]
    report = validated(task, executors)
    sign, midpoint = report.tallies
    expected = brute_force(task, "sign", 0)
    # In the order of numbers the second summand is the slow one.
    first = min(expected["failed"], key=lambda value: (value[1], value[0]))
    assert midpoint == validated(task, executors[1:]).tallies[0]
    assert midpoint.failures == 0
    assert sign.failures == len(expected["failed"])
    assert 0 < sign.failures < report.inputs
    assert sign.smallest_one == pytest.approx(expected["smallest"][True], abs=2e-12)
    assert sign.smallest_one < 0 < midpoint.smallest_one
    assert sign.first_failure is not None
    assert sign.first_failure.startswith(f"input {first}, micro-step ")
    assert sign.first_failure.endswith("bit p[0] is decoded 0, should be 1")


def test_the_last_output_of_a_slow_input() -> None:
    """The longest carry needs every micro-step that the task allows, and is in the reference's place then."""
    task = Addition(3)
    executor = NTKExecutor(task.templates)
    micro_steps = validated(task, [executor]).micro_steps
    report = validated(ShortOfTime(3), [executor])
    assert report.micro_steps < micro_steps
    assert report.tallies[0].failures > 0


class ShortOfTime(Addition):
    def num_micro_steps(self, task_input: tuple[int, int]) -> int:
        return 3


class LosesCarries(Addition):
    """The carry out of bit 1 goes nowhere."""

    def make_templates(self) -> Iterator[Template]:
        lost = self.layout["carry"][1]
        for rule in super().make_templates():
            if rule.group != "move carry" or rule.ones != {lost}:
                yield rule


def test_templates_that_are_wrong() -> None:
    """Every decoder does what they say, and the sum is wrong."""
    task = LosesCarries(3)
    report = validated(task, [NTKExecutor(task.templates, decoder) for decoder in DECODERS])
    wrong = [(p, q) for q in range(8) for p in range(8) if (p & 3) + (q & 3) > 3]
    for tally in report.tallies:
        assert tally.failures == len(wrong)
        p, q = wrong[0]
        assert tally.first_failure is not None
        assert tally.first_failure.startswith(
            f"input {wrong[0]}, the output is {p + q - 4}, should be {p + q}; bit p[2]"
        )
        assert tally.first_failure.endswith("is wrongly 0 from micro-step 1 on: set by none of group 'sum'")


class OtherStart(Addition):
    """Begins with a carry, but on arrays without it."""

    def initial_fields(self, task_input: tuple[Any, Any]) -> dict[str, Any]:
        return {**super().initial_fields(task_input), "carry": int(isinstance(task_input[0], int))}


class OtherSum(Addition):
    def reference(self, task_input: tuple[Any, Any]) -> Any:
        return task_input[0] + task_input[1] + int(isinstance(task_input[0], int) and task_input == (3, 3))


class NoArrays(Addition):
    """Says that it takes arrays, and does not."""

    def reference(self, task_input: tuple[Any, Any]) -> Any:
        return task_input[0] + task_input[1] if task_input[0] else task_input[1]


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (OtherStart(2), "initial_fields on arrays disagrees with initial_fields on integers for input (0, 0)"),
        (OtherSum(2), "reference on arrays disagrees with reference on integers for input (3, 3)"),
        (NoArrays(2), "one of its methods on arrays fails with ValueError: The truth value of an array"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_and_integers_must_mean_the_same(task: Addition, says: str) -> None:
    with pytest.raises(TaskError) as error:
        validated(task, [NTKExecutor(task.templates)])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


class Crossing(Addition):
    """Takes another number of micro-steps for each length of the first summand."""

    def num_micro_steps(self, task_input: tuple[Any, Any]) -> Any:
        return 2 * self.bits + (task_input[0] > 2)


@pytest.mark.parametrize("kind", [Addition, Crossing])
def test_integers_and_arrays_give_the_same_report(kind: type[Addition]) -> None:
    class Same(kind):  # type: ignore[misc,valid-type]
        takes_arrays = False

    fast, slow = kind(3), Same(3)
    reports = [validated(task, [NTKExecutor(task.templates, "sign")]) for task in (fast, slow)]
    assert replace(reports[0], seconds=0.0) == replace(reports[1], seconds=0.0)


def test_programs_as_inputs() -> None:
    """Inputs that are no integers, and as many as were taken."""
    task = SBN(8, 4)
    programs = list(itertools.islice(task.inputs(random.Random(0)), 40))
    report = validate_task(task, [NTKExecutor(task.templates)], inputs=programs)
    assert report.inputs == 40
    assert report.tallies[0].failures == 0
    assert report.micro_steps <= sum(task.num_micro_steps(program) for program in programs)
