"""The closed loop against predictor, thresholds and decoder state by state, and against plain arithmetic."""

from __future__ import annotations

import copy
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntk_ensembles.tasks import (
    SBN,
    Addition,
    Machine,
    MachineState,
    Multiplication,
    Program,
    StateLayout,
    Task,
    Template,
    TemplateSet,
)
from ntk_ensembles.templates.matching import pack
from ntk_ensembles.theory import (
    DECODERS,
    Decoder,
    Step,
    TemplatePredictor,
    TensorStepper,
    decode,
    margins,
    thresholds,
)
from ntk_ensembles.theory.executor import NTKExecutor, rollout

TOLERANCE = 2e-12
"""Margins are looked up by classes that agree to 12 decimals."""


def random_templates(seed: int, bits: int, count: int) -> TemplateSet:
    """Conditions and outputs repeat, so that bits are set by several templates and fan-ins are large."""
    draw = random.Random(seed)
    rules = []
    for _ in range(count):
        chosen = draw.sample(range(bits), draw.randint(1, min(bits, 3)))
        ones = draw.randint(1, len(chosen))
        outputs = draw.sample(range(bits), draw.randint(0, bits))
        rules += [Template.rule("random", ones=chosen[:ones], zeros=chosen[ones:], sets=outputs)] * draw.randint(1, 4)
    return TemplateSet(StateLayout(x=bits), rules)


def oracle(templates: TemplateSet, states: Tensor, decoder: Decoder, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded states, each state's margins bit by bit (∞ where nothing matches), and the OR-machine's states."""
    predictor = TemplatePredictor(templates, padding)
    matches = templates.matches(states)
    matched = matches.sum(1)
    mean, levels = predictor.predict(matches).mean, thresholds(decoder, predictor, matched)
    union = templates.set_counts(matches) > 0
    distances = margins(mean, levels, union).masked_fill(matched[:, None] == 0, math.inf)
    return decode(mean, levels), distances, union


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got.isinf(), expected.isinf())
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


cases = st.tuples(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 12))


@given(cases, st.sampled_from([0, 3, 200]))
@settings(max_examples=50, deadline=None)
def test_a_prediction_is_the_predictors(case: tuple[int, int, int], padding: int) -> None:
    """Looked up on bit planes and by lists, for every state, to the last bit."""
    templates = random_templates(*case)
    states = torch.tensor(list(itertools.product([False, True], repeat=templates.layout.bits)))
    expected = TemplatePredictor(templates, padding).predict(templates.matches(states))
    executor = NTKExecutor(templates, padding=padding)
    every = executor.predict(states.repeat(-(-64 // len(states)), 1))
    few = [executor.predict(states[start : start + 8]) for start in range(0, len(states), 8)]
    for field in ("mean", "variance"):
        wanted = getattr(expected, field)
        assert torch.equal(getattr(every, field)[: len(states)], wanted)
        assert torch.equal(torch.cat([getattr(gaussian, field) for gaussian in few]), wanted)


@pytest.mark.parametrize("count", [8, 80])
def test_predictions_and_margins_are_of_the_layers_that_are_trained(count: int) -> None:
    templates = Addition(3).templates
    states = torch.rand(count, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = TemplatePredictor(templates, 2, layers="readout")
    matches = templates.matches(states)
    executor = NTKExecutor(templates, padding=2, layers="readout")
    found, prediction = executor.predict(states), expected.predict(matches)
    assert torch.equal(found.mean, prediction.mean)
    assert torch.equal(found.variance, prediction.variance)
    levels = thresholds("midpoint", expected, matches.sum(1))
    distances = margins(prediction.mean, levels, templates.set_counts(matches) > 0)
    distances = distances.masked_fill(~matches.any(1)[:, None], math.inf)
    assert_close(rollout(executor, states, 1).margins, distances.min(1).values)


def test_predictions_of_more_states_than_are_counted_at_once() -> None:
    task = SBN(cells=4, word_bits=4)
    executor = NTKExecutor(task.templates)
    draw = torch.Generator().manual_seed(0)
    count = executor.matcher.columns * 64 + 5
    states = torch.rand(count, task.layout.bits, generator=draw) < 0.5
    expected = TemplatePredictor(task.templates).predict(task.templates.matches(states))
    found = executor.predict(states)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.variance, expected.variance)


@given(cases, st.sampled_from(["midpoint", "sign"]), st.sampled_from([0, 0, 3, 200]))
@settings(max_examples=100, deadline=None)
def test_a_step_is_prediction_and_decoding(case: tuple[int, int, int], decoder: Decoder, padding: int) -> None:
    """On every state, in a large batch and in small ones, where the decoder fails and where it does not."""
    templates = random_templates(*case)
    states = torch.tensor(list(itertools.product([False, True], repeat=templates.layout.bits)))
    decoded, distances, union = oracle(templates, states, decoder, padding)
    executor = NTKExecutor(templates, decoder, padding=padding)
    every = rollout(executor, states.repeat(-(-64 // len(states)), 1), 1)
    few = [rollout(executor, states[start : start + 8], 1) for start in range(0, len(states), 8)]
    for field, expected in (("states", decoded), ("agreed", (decoded == union).all(1))):
        assert torch.equal(getattr(every, field)[: len(states)], expected)
        assert torch.equal(torch.cat([getattr(step, field) for step in few]), expected)
    assert_close(every.margins[: len(states)], distances.min(1).values)
    assert_close(torch.cat([step.margins for step in few]), distances.min(1).values)
    if decoder == "midpoint":
        assert every.agreed.all()
        assert (every.margins > 0).all()
    # Margins of 1-bits and of 0-bits alone.
    counts = executor.matcher.match_and_count(pack(states))
    for ones in (True, False):
        kind = distances.masked_fill(union != ones, math.inf).min(1).values
        assert_close(torch.from_numpy(executor.plane_margins(counts, ones)[: len(states)]), kind)


@given(cases, st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_a_run_is_repeated_steps(case: tuple[int, int, int], micro_steps: int) -> None:
    """By the sign rule without padding, which is often wrong: the wrong state is what is fed back."""
    templates = random_templates(*case)
    states = torch.tensor(list(itertools.product([False, True], repeat=templates.layout.bits)))
    executor = NTKExecutor(templates, "sign")
    current, smallest = states, torch.full((len(states),), math.inf, dtype=torch.float64)
    agreed = torch.ones(len(states), dtype=torch.bool)
    for _ in range(micro_steps):
        decoded, distances, union = oracle(templates, current, "sign", 0)
        smallest = torch.minimum(smallest, distances.min(1).values)
        agreed &= (decoded == union).all(1)
        current = decoded
    for copies in (1, 40):
        run = rollout(executor, states.repeat(copies, 1)[: 16 if copies == 1 else None], micro_steps)
        count = min(len(states), len(run.states))
        assert torch.equal(run.states[:count], current[:count])
        assert torch.equal(run.agreed[:count], agreed[:count])
        assert_close(run.margins[:count], smallest[:count])


TASKS: list[Task[Any, Any]] = [Addition(6), Multiplication(5), SBN(8, 4), SBN(16, 8, "nonpositive")]


@pytest.mark.parametrize("task", TASKS, ids=repr)
@pytest.mark.parametrize("decoder", DECODERS)
def test_steps_on_the_tasks(task: Task[Any, Any], decoder: Decoder) -> None:
    generator = torch.Generator().manual_seed(1)
    density = torch.linspace(0, 0.98, 400)[:, None]
    states = torch.rand(400, task.layout.bits, generator=generator) < density
    decoded, distances, union = oracle(task.templates, states, decoder, 5)
    executor = NTKExecutor(task.templates, decoder, padding=5)
    step = rollout(executor, states, 1)
    assert torch.equal(step.states, decoded)
    assert torch.equal(step.agreed, (decoded == union).all(1))
    assert_close(step.margins, distances.min(1).values)
    assert step.margins[0] == math.inf
    # Decoding leaves the counts alone, which other decoders may share.
    counts = executor.matcher.match_and_count(pack(states))
    before = copy.deepcopy(counts)
    executor.decode_planes(counts)
    assert np.array_equal(counts.num_matches, before.num_matches)
    for digits, same in zip(counts.set_counts, before.set_counts, strict=True):
        assert np.array_equal(digits, same)


def test_all_sums() -> None:
    """More states than are worked on at once."""
    task = Addition(6)
    pairs = list(itertools.product(range(64), repeat=2)) * 20
    starts = torch.stack([task.layout.pack({"p": p, "q": q}) for p, q in pairs[:4096]]).repeat(20, 1)
    executor = NTKExecutor(task.templates)
    assert len(starts) > 64 * executor.matcher.columns
    run = rollout(executor, starts, task.num_micro_steps((0, 0)))
    weights = 2 ** torch.arange(6)
    totals = run.states[:, :6].long() @ weights + 64 * run.states[:, task.layout["carry"][-1]]
    assert totals.tolist() == [p + q for p, q in pairs]
    assert run.agreed.all()


def test_a_large_machine() -> None:
    """256 cells of 16 bits, a few instructions, against the interpreter."""
    task = SBN(256, 16)
    draw = random.Random(0)
    states = [
        MachineState(tuple(draw.randrange(-(1 << 15), 1 << 15) for _ in range(256)), draw.randrange(256), halted=False)
        for _ in range(70)
    ]
    starts = torch.stack([task.initial_state(Program(state, 1, "")) for state in states])
    machine = Machine(256, 16)
    executor = NTKExecutor(task.templates)
    for count in (3, 70):
        run = rollout(executor, starts[:count], 2 * task.micro_steps_per_instruction)
        assert run.agreed.all()
        assert [task.result(state) for state in run.states] == [machine.run(state, 2)[0] for state in states[:count]]
    # The dense k × m matrices, 100 MB and more here, are not made.
    assert not {"labels", "conditions"} & set(vars(task.templates))


def test_margins_that_are_near_one_another_are_told_apart() -> None:
    """With 20,000 padding templates a 0-bit has a margin of 1e-5 by the sign rule, and this one three times as much."""
    rules = [Template.rule("r", ones=[0], sets=[0]), Template.rule("r", ones=[0], sets=[])]
    templates = TemplateSet(StateLayout(x=2), [*rules, *[Template.rule("r", ones=[1], sets=[1])] * 3])
    states = torch.tensor([[True, False]]).repeat(70, 1)
    w_u = float(TemplatePredictor(templates, 20_000).weights(torch.tensor([2]))[1])
    assert -1e-4 < w_u < -1e-6
    margins_found = rollout(NTKExecutor(templates, "sign", padding=20_000), states, 1).margins
    torch.testing.assert_close(
        margins_found, torch.full((70,), 1e-10 - 3 * w_u, dtype=torch.float64), rtol=1e-9, atol=0
    )


def test_a_loop_is_stopped_by_all_states_together_and_traced_to_its_end() -> None:
    """More states than are worked on at once. Without an end all micro-steps are traced, of states at rest too."""
    task = Addition(1)

    class Three(TensorStepper):
        states_at_once = 3

        def step(self, batch: Tensor) -> Step[Tensor]:
            following = task.templates.micro_step(batch)
            right = np.ones(len(batch), np.bool_)
            return Step(following, np.ones(len(batch)), right, (following != batch).any(1).numpy())

    starts = torch.tensor(list(itertools.product([False, True], repeat=3)))
    first = task.templates.micro_step(starts)
    seen: list[tuple[Tensor, Tensor]] = []

    def second(before: Tensor, after: Tensor) -> bool:
        seen.append((before, after))
        return len(seen) == 2

    stopped = rollout(Three(), starts, 5, stop=second)
    assert torch.equal(seen[0][0], starts)
    assert torch.equal(seen[0][1], first)
    assert torch.equal(seen[1][0], first)
    assert len(seen) == 2
    assert torch.equal(stopped.states, task.templates.micro_step(first))
    traced = rollout(Three(), starts, 5, trace=True).trace
    assert traced is not None
    assert (traced.states.shape, traced.margins.shape) == ((6, 8, 3), (5, 8))
    for _ in range(5):
        starts = task.templates.micro_step(starts)
    assert torch.equal(traced.states[5], starts)


def test_no_states_and_no_micro_steps() -> None:
    executor = NTKExecutor(Addition(3).templates)
    none = torch.zeros(0, 9, dtype=torch.bool)
    assert rollout(executor, none, 1).states.shape == (0, 9)
    some = torch.rand(100, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    run = rollout(executor, some, 0)
    assert torch.equal(run.states, some)
    assert run.agreed.all()
    assert run.margins.isinf().all()


def test_what_is_refused() -> None:
    templates = Addition(3).templates
    with pytest.raises(ValueError, match="states of 8 bits: the templates have 9"):
        rollout(NTKExecutor(templates), torch.zeros(2, 8, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match="states of 10 bits: the templates have 9"):
        rollout(NTKExecutor(templates), torch.zeros(2, 10, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match="-1 micro-steps"):
        rollout(NTKExecutor(templates), torch.zeros(2, 9, dtype=torch.bool), -1)
    with pytest.raises(ValueError, match="padding=-1"):
        NTKExecutor(templates, padding=-1)


def test_inputs_are_left_alone() -> None:
    """Also where nothing happens: the results own their memory."""
    executor = NTKExecutor(Addition(3).templates)
    for count in (1, 100):
        states = torch.zeros(count, 9, dtype=torch.bool)
        run = rollout(executor, states, 1)
        run.states[0, 0] = True
        assert not states.any()
        assert np.array_equal(rollout(executor, states, 1).states.numpy(), states.numpy())
