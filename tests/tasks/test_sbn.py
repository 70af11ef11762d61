"""The SBN templates against the interpreter: whole states, instruction by instruction."""

from __future__ import annotations

import itertools
import random

import jaxtyping
import pytest
import torch
from jaxtyping import Bool
from torch import Tensor

from ntk_ensembles.tasks import SBN, Branch, Machine, MachineState, Program


def pack_states(task: SBN, states: list[MachineState]) -> Bool[Tensor, "states bits"]:
    """All states at once, by positions in the layout alone (`SBN.fields` has its own test)."""
    packed = torch.zeros(len(states), task.layout.bits, dtype=torch.bool)
    words = torch.tensor([state.memory for state in states])
    for cell in range(task.cells):
        packed[:, list(task.layout[f"memory{cell}"])] = (
            words[:, cell, None] >> torch.arange(task.word_bits) & 1
        ).bool()
    pcs = torch.tensor([state.pc for state in states])
    packed[:, list(task.layout["pc"])] = (pcs[:, None] >> torch.arange(task.address_bits) & 1).bool()
    packed[:, task.layout["fetch"][0]] = torch.tensor([not state.halted for state in states])
    return packed


def check_lockstep(task: SBN, states: list[MachineState], instructions: int) -> list[MachineState]:
    """Compares every bit of the state after each instruction; returns the final states."""
    packed = task.pack(states)
    for _ in range(instructions):
        for _ in range(task.micro_steps_per_instruction):
            packed = task.templates.micro_step(packed)
        states = [task.machine.step(state) for state in states]
        wrong = (packed != task.pack(states)).any(1).nonzero().flatten().tolist()
        assert not wrong, states[wrong[0]]
    return states


def random_states(task: SBN, count: int, seed: int) -> list[MachineState]:
    generator = random.Random(seed)
    return [
        MachineState(
            tuple(task.machine.wrap(generator.getrandbits(task.word_bits)) for _ in range(task.cells)),
            generator.randrange(task.cells),
            halted=False,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("branch", ["negative", "nonpositive"])
@pytest.mark.parametrize(
    ("cells", "word", "memories", "instructions"),
    [(4, 2, 200, 20), (4, 9, 50, 20), (8, 3, 200, 20), (8, 5, 200, 20), (16, 4, 200, 20), (16, 8, 200, 20)]
    + [(32, 5, 50, 10), (32, 8, 50, 10), (64, 16, 10, 3)]
    + [pytest.param(16, 8, 2000, 20, marks=pytest.mark.slow)],
)
def test_random_memories(cells: int, word: int, memories: int, instructions: int, branch: Branch) -> None:
    task = SBN(cells, word, branch)
    finals = check_lockstep(task, random_states(task, memories, seed=cells * word), instructions)
    if memories >= 200:
        assert {state.halted for state in finals} == {True, False}


def test_every_memory_of_the_smallest_machine() -> None:
    branches: tuple[Branch, ...] = ("negative", "nonpositive")
    for branch in branches:
        task = SBN(4, 2, branch)
        memories = itertools.product(range(-2, 2), repeat=4)
        states = [MachineState(memory, pc, halted=False) for memory in memories for pc in range(4)]
        check_lockstep(task, states, 2)


@pytest.mark.parametrize("branch", ["negative", "nonpositive"])
def test_every_difference_of_two_words(branch: Branch) -> None:
    task = SBN(8, 4, branch)
    pairs = itertools.product(range(-8, 8), repeat=2)
    states = [MachineState((3, 4, 6, x, y, 0, 0, 0), 0, halted=False) for x, y in pairs]
    for (x, y), state in zip(itertools.product(range(-8, 8), repeat=2), check_lockstep(task, states, 1), strict=True):
        result = (y - x + 8) % 16 - 8
        assert state.memory[4] == result
        assert state.pc == (6 if result < 0 or (result == 0 and branch == "nonpositive") else 3)


@pytest.mark.parametrize("branch", ["negative", "nonpositive"])
def test_a_program_that_rewrites_itself(branch: Branch) -> None:
    # The loop's first operand walks through the cells, as in the shipped program, here for ever.
    task = SBN(16, 8, branch)
    check_lockstep(task, [task.machine.load([-5, 9, 3, 8, 0, 0, 1, 2, -1, 0, 1, 2, 3, 4, 5, 6])], 60)


def test_a_halted_state_is_a_fixed_point() -> None:
    task = SBN(8, 5)
    halted = MachineState((1, -2, 3, -4, 5, -6, 7, -8), 5, halted=True)
    packed = task.pack([halted])
    assert torch.equal(task.templates.micro_step(packed), packed)
    assert task.result(packed[0]) == halted


def test_fields_and_output_are_inverse() -> None:
    task = SBN(8, 5, "nonpositive")
    states = random_states(task, 50, seed=0)
    states += [MachineState(state.memory, state.pc, halted=True) for state in states]
    for state, row in zip(states, task.pack(states), strict=True):
        fields = task.initial_fields(Program(state, 1, "test"))
        assert torch.equal(task.layout.pack(fields), row)
        assert task.result(row) == state


def test_nothing_is_left_over_between_instructions() -> None:
    task = SBN(8, 4, "nonpositive")
    packed = task.pack(random_states(task, 200, seed=0))
    for _ in range(task.micro_steps_per_instruction):
        packed = task.templates.micro_step(packed)
    for state in packed:
        fields = task.layout.unpack(state)
        used = {name for name, value in fields.items() if value}
        assert used <= {f"memory{cell}" for cell in range(8)} | {"pc", "fetch"}


@pytest.mark.parametrize(("cells", "ceiling_templates", "ceiling_bits"), [(16, 831, 197), (32, 1669, 345)])
@pytest.mark.parametrize("branch", ["negative", "nonpositive"])
def test_counts(cells: int, ceiling_templates: int, ceiling_bits: int, branch: Branch) -> None:
    task = SBN(cells, 8, branch)
    assert len(task.templates) <= ceiling_templates
    assert task.layout.bits <= ceiling_bits
    assert task.micro_steps_per_instruction == 11


def test_default_counts() -> None:
    task = SBN()
    assert (len(task.templates), task.layout.bits) == (805, 189)


def labels(task: SBN, count: int) -> list[str]:
    return [program.label for program in itertools.islice(task.inputs(random.Random(0)), count)]


def test_inputs_mix_programs_and_random_memories() -> None:
    names = [label for label in labels(SBN(), 60) if label != "random memory"]
    assert names == ["add", "copy", "minus_absolute", "multiply", "negate", "negated_sum"]
    assert labels(SBN(branch="nonpositive"), 5) == ["add", *["random memory"] * 3, "copy"]
    assert set(labels(SBN(word_bits=7), 60)) == {"random memory"}
    assert set(labels(SBN(cells=8), 60)) == {"random memory", "negate"}


@pytest.mark.parametrize("cells", [16, 32])
@pytest.mark.parametrize("branch", ["negative", "nonpositive"])
def test_shipped_programs_halt(cells: int, branch: Branch) -> None:
    task = SBN(cells, branch=branch)
    programs = [p for p in itertools.islice(task.inputs(random.Random(0)), 60) if p.label != "random memory"]
    for program in programs:
        assert task.reference(program).halted
        check_lockstep(task, [program.state], program.instructions)


def test_random_memories_run_for_the_given_instructions() -> None:
    task = SBN(instructions=9, word_bits=7)
    program = next(task.inputs(random.Random(0)))
    assert program.instructions == 9
    assert task.num_micro_steps(program) == 9 * 10
    assert task.reference(program) == Machine(16, 7).run(program.state, 9)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": 2}, "cells=2: expected an integer from 4 to 256"),
        ({"cells": 12}, "cells=12: expected a power of two"),
        ({"cells": 512}, "cells=512"),
        ({"word_bits": 1}, "word_bits=1"),
        ({"word_bits": 17}, "word_bits=17"),
        ({"cells": 64, "word_bits": 5}, "word_bits=5: expected at least 6: .* 64 cells"),
        ({"instructions": 0}, "instructions=0"),
        ({"branch": "zero"}, "'zero'"),
    ],
)
def test_bad_options(options: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' type checker would refuse an unknown rule first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        SBN(**options)  # type: ignore[arg-type]
