"""Exhaustive validations against brute force, and against tasks and decoders that are wrong on purpose."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ntk_ensembles.tasks import Addition, Multiplication, Permutation, Task, Template
from ntk_ensembles.theory import DECODERS, Decoder, TemplatePredictor, decode, margins, thresholds
from ntk_ensembles.theory.execution import NTKExecutor
from ntk_ensembles.validation import Inputs, validate_inputs


def values_of(task: Task[Any, Any]) -> list[Any]:
    words = range(1 << task.options["bits"])
    return list(words) if isinstance(task, Permutation) else list(itertools.product(words, words))


def inputs_of(task: Task[Any, Any]) -> Inputs:
    if isinstance(task, Permutation):
        return Inputs.of_permutation(task)
    return Inputs.of_addition(task) if isinstance(task, Addition) else Inputs.of_multiplication(task)  # type: ignore[arg-type]


def brute_force(task: Task[Any, Any], decoder: Decoder, padding: int) -> dict[str, Any]:
    """One input after the other, by plain unions of templates and the dense predictor."""
    predictor = TemplatePredictor(task.templates, padding)
    seen: set[tuple[bool, ...]] = set()
    steps, failed, smallest, ties = 0, [], {True: math.inf, False: math.inf}, 0
    for value in values_of(task):
        state = task.layout.pack(task.fields(value))[None]
        right = True
        for _ in range(task.micro_steps(value)):
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
        if not right or task.output(task.layout.unpack(state[0])) != task.reference(value):
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
    report = validate_inputs(inputs_of(task), executors, told.append)
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

    def rules(self) -> Iterator[Template]:
        yield from super().rules()
        for _ in range(100):
            yield Template.rule("never", ones=range(self.layout.bits), sets=[self.layout["p"][0]])


def test_a_decoder_that_is_wrong() -> None:
    task = Crowded(4)
    # The one that is wrong comes first: the other must not notice.
    executors = [NTKExecutor(task.templates, decoder) for decoder in ("sign", "midpoint")]
    report = validate_inputs(inputs_of(task), executors)
    sign, midpoint = report.tallies
    expected = brute_force(task, "sign", 0)
    # In the order of numbers the second summand is the slow one.
    first = min(expected["failed"], key=lambda value: (value[1], value[0]))
    assert midpoint == validate_inputs(inputs_of(task), executors[1:]).tallies[0]
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
    micro_steps = validate_inputs(inputs_of(task), [executor]).micro_steps
    short = Inputs.of_addition(ShortOfTime(3))
    report = validate_inputs(short, [executor])
    assert report.micro_steps < micro_steps
    assert report.tallies[0].failures > 0


class ShortOfTime(Addition):
    def micro_steps(self, value: tuple[int, int]) -> int:
        return 3


class LosesCarries(Addition):
    """The carry out of bit 1 goes nowhere."""

    def rules(self) -> Iterator[Template]:
        lost = self.layout["carry"][1]
        for rule in super().rules():
            if rule.group != "move carry" or rule.ones != {lost}:
                yield rule


def test_templates_that_are_wrong() -> None:
    """Every decoder does what they say, and the sum is wrong."""
    task = LosesCarries(3)
    report = validate_inputs(inputs_of(task), [NTKExecutor(task.templates, decoder) for decoder in DECODERS])
    wrong = [(p, q) for q in range(8) for p in range(8) if (p & 3) + (q & 3) > 3]
    for tally in report.tallies:
        assert tally.failures == len(wrong)
        p, q = wrong[0]
        assert tally.first_failure == f"input {wrong[0]}, the output is {p + q - 4}, should be {p + q}"


class OtherStart(Addition):
    """Begins with a carry, which arrays know nothing of."""

    def fields(self, value: tuple[int, int]) -> dict[str, int]:
        return {"p": value[0], "q": value[1], "carry": 1}


class OtherSum(Addition):
    def reference(self, value: tuple[int, int]) -> int:
        return value[0] + value[1] + (value == (3, 3))


@pytest.mark.parametrize("task", [OtherStart(2), OtherSum(2)], ids=lambda task: type(task).__name__)
def test_arrays_and_integers_must_mean_the_same(task: Addition) -> None:
    with pytest.raises(RuntimeError, match="on arrays task 'addition' means something else for"):
        validate_inputs(Inputs.of_addition(task), [NTKExecutor(task.templates)])
