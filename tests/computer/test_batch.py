"""Batches on the NTK limit against the interpreter, what counts as agreeing, and histories."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool
from test_library import MEANING, draw_inputs
from torch import Tensor

from ntk_ensembles.computer import ProgramBatch, execute_programs, find_program, library_programs
from ntk_ensembles.computer.display import trace_figure, write_trace
from ntk_ensembles.tasks import SBN, Branch, Machine, MachineState, Program
from ntk_ensembles.theory.executor import NTKExecutor, Step, TensorStepper

BOTH: tuple[Branch, ...] = ("negative", "nonpositive")


@cache
def ntk(cells: int, word: int, branch: Branch) -> tuple[SBN, NTKExecutor]:
    task = SBN(cells, word, branch)
    return task, NTKExecutor(task.templates)


def random_programs(machine: Machine, count: int, seed: int, instructions: int) -> list[Program]:
    generator = random.Random(seed)
    memories = [
        [machine.wrap(generator.getrandbits(machine.word_bits)) for _ in range(machine.cells)] for _ in range(count)
    ]
    return [
        Program(MachineState(tuple(memory), generator.randrange(machine.cells), halted=False), instructions, f"{i}")
        for i, memory in enumerate(memories)
    ]


MACHINES = [(4, 2), (4, 5), (8, 3), (8, 4), (16, 4), (16, 8)]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MACHINES), st.booleans(), st.integers(0, 2**32), st.integers(1, 40))
def test_the_ntk_limit_follows_the_interpreter_step_for_step(
    size: tuple[int, int], zero_too: bool, seed: int, count: int
) -> None:
    branch = BOTH[zero_too]
    task, executor = ntk(*size, branch)
    machine = Machine(*size, branch)
    programs = random_programs(machine, count, seed, 6)
    batch = ProgramBatch(task, programs, executor)
    states = [program.state for program in programs]
    for executed in range(1, 7):
        running = [not state.halted for state in states]
        batch.advance()
        states = [machine.step(state) for state in states]
        for index, state in enumerate(states):
            execution = batch.result(index)
            assert execution.state == state
            assert execution.agreed
            assert execution.smallest_margin is not None
            assert execution.smallest_margin > 0
            if running[index]:
                assert execution.instructions == executed
                assert execution.micro_steps == executed * (size[1] + 3)
    assert batch.unfinished == []


@pytest.mark.parametrize("branch", BOTH)
@pytest.mark.parametrize(("cells", "word", "count"), [(32, 8, 100), (64, 8, 20), (64, 16, 4)])
def test_larger_machines(cells: int, word: int, count: int, branch: Branch) -> None:
    task, executor = ntk(cells, word, branch)
    machine = Machine(cells, word, branch)
    programs = random_programs(machine, count, cells, 20)
    for program, execution in zip(programs, execute_programs(task, programs, executor), strict=True):
        state, executed = machine.run(program.state, 20)
        assert (execution.state, execution.instructions, execution.agreed) == (state, executed, True)


@pytest.mark.parametrize(
    ("cells", "branch"), sorted({(p.cells, branch) for p in library_programs() for branch in p.branches})
)
def test_the_library_on_the_ntk_limit(cells: int, branch: Branch) -> None:
    task, executor = ntk(cells, 8, branch)
    jobs = []
    for program in library_programs():
        if program.cells != cells or branch not in program.branches:
            continue
        assembly = program.assemble()
        inputs = draw_inputs(program, 8, 12, seed=2)
        for values in random.Random(0).sample(inputs, 2 if cells == 64 else 4):
            words = list(assembly.words)
            for field, value in zip(program.inputs, values, strict=True):
                start = assembly.address(field.label)
                words[start : start + field.count] = value
            jobs.append((program, assembly, values, Program(task.machine.load(words), 1200, program.name)))
    executions = execute_programs(task, [job for *_, job in jobs], executor)
    for (program, assembly, values, _), execution in zip(jobs, executions, strict=True):
        assert execution.agreed
        assert execution.smallest_margin is not None
        assert execution.smallest_margin > 0
        assert execution.succeeded
        for field, expected in zip(program.results, MEANING[program.name](*values), strict=True):
            start = assembly.address(field.label)
            found = execution.state.memory[start : start + field.count]
            assert list(found) == [task.machine.wrap(value) for value in expected], (program.file, values)


def test_packed_states_are_those_of_the_task() -> None:
    for branch in BOTH:
        task, _ = ntk(8, 5, branch)
        states = [program.state for program in random_programs(task.machine, 30, 1, 1)]
        states += [MachineState(state.memory, state.pc, halted=True) for state in states]
        for state, packed in zip(states, task.pack(states), strict=True):
            assert torch.equal(task.initial_state(Program(state, 1, "")), packed)


class Scripted(TensorStepper):
    """The OR-machine, with one bit flipped after one micro-step, which it may admit or not."""

    def __init__(self, task: SBN, at: int, bit: int | None, *, admits: bool) -> None:
        self._task = task
        self._at = at
        self._bit = bit
        self._admits = admits
        self._calls = 0

    def step(self, batch: Bool[Tensor, "states bits"]) -> Step[Tensor]:
        self._calls += 1
        next_states = self._task.templates.micro_step(batch)
        agreed = np.ones(len(batch), np.bool_)
        if self._calls == self._at:
            agreed[:] = not self._admits
            if self._bit is not None:
                next_states[:, self._bit] ^= True
        margin = float(self._calls)
        margins = np.full(len(batch), margin)
        return Step(next_states, margins, agreed, (next_states != batch).any(1).numpy())


def halting(task: SBN, instructions: int = 50) -> Program:
    return Program(task.machine.load(find_program("negate", "negative").assemble().words), instructions, "negate")


def test_a_wrong_bit_is_fed_back_and_found() -> None:
    task = SBN(16, 8)
    program = halting(task)
    x = task.layout["memory9"]
    right = execute_programs(task, [program], Scripted(task, 0, None, admits=False))[0]
    assert (right.agreed, right.succeeded, right.smallest_margin) == (True, True, 1.0)
    # During the first instruction x, 42, becomes 43; the program then negates that.
    wrong = execute_programs(task, [program], Scripted(task, 3, x[0], admits=False))[0]
    assert wrong.state.halted
    assert wrong.state.memory[9:11] == (43, -43)
    assert (wrong.agreed, wrong.succeeded) == (False, False)
    # The same bit flipped twice would end right; that a micro-step was wrong is remembered.
    admitted = execute_programs(task, [program], Scripted(task, 3, None, admits=True))[0]
    assert admitted.state == right.state
    assert (admitted.agreed, admitted.succeeded) == (False, False)


def test_what_is_left_in_a_register_counts() -> None:
    # After the last instruction's write nothing may be set but memory and pc.
    task = SBN(16, 8)
    borrow = task.layout["borrow"][0]
    execution = execute_programs(
        task, [halting(task)], Scripted(task, 3 * task.micro_steps_per_instruction, borrow, admits=False)
    )[0]
    assert execution.state == task.machine.run(halting(task).state, 50)[0]
    assert execution.agreed is False


def test_programs_leave_when_they_halt_or_reach_their_limit() -> None:
    task, executor = ntk(16, 8, "negative")
    loop = task.machine.load([9, 10, 0, 0, 0, 0, 0, 0, 0, 0, -1])
    halted = MachineState(loop.memory, 3, halted=True)
    programs = [halting(task), halting(task, 2), Program(loop, 7, "loop"), Program(loop, 0, "none")]
    programs.append(Program(halted, 5, "halted"))
    for backend in (None, executor):
        found = execute_programs(task, programs, backend)
        assert [execution.instructions for execution in found] == [3, 2, 7, 0, 0]
        assert [execution.state.halted for execution in found] == [True, False, False, False, True]
        assert [execution.micro_steps for execution in found] == [33, 22, 77, 0, 0]
        assert found[4].state == halted
        assert [execution.succeeded for execution in found] == [True, False, False, False, True]
        assert found[3].smallest_margin is None
    assert all(execution.agreed is None for execution in execute_programs(task, programs))


def test_alone_or_in_a_batch() -> None:
    task, executor = ntk(16, 8, "nonpositive")
    programs = random_programs(task.machine, 70, 5, 8)
    together = execute_programs(task, programs, executor)
    for program, execution in list(zip(programs, together, strict=True))[::7]:
        alone = execute_programs(task, [program], executor)[0]
        assert (alone.state, alone.instructions) == (execution.state, execution.instructions)
        assert alone.smallest_margin == pytest.approx(execution.smallest_margin, abs=1e-11)


def test_wrong_requests() -> None:
    task, _ = ntk(16, 8, "negative")
    with pytest.raises(ValueError, match="a memory of 8 cells; the machine has 16"):
        ProgramBatch(task, [Program(Machine(8, 8).load([1]), 1, "small")])
    with pytest.raises(ValueError, match="no micro-steps to trace"):
        ProgramBatch(task, [halting(task)], trace=True)
    with pytest.raises(ValueError, match="no trace was kept"):
        ProgramBatch(task, [halting(task)]).trace(0)
    assert execute_programs(task, []) == []


@pytest.mark.parametrize("branch", BOTH)
def test_a_history_is_the_or_machines_trajectory(branch: Branch, tmp_path: Path) -> None:
    task, executor = ntk(16, 8, branch)
    programs = [halting(task), *random_programs(task.machine, 3, 0, 5)]
    batch = ProgramBatch(task, programs, executor, trace=True)
    while batch.unfinished:
        batch.advance()
    for index, program in enumerate(programs):
        execution, trace = batch.result(index), batch.trace(index)
        assert len(trace.states) == execution.micro_steps + 1
        assert torch.equal(trace.states[0], task.pack([program.state])[0])
        assert torch.equal(trace.states[1:], task.templates.micro_step(trace.states[:-1]))
        assert float(trace.margins.min()) == execution.smallest_margin
        assert trace.agreed.all()
        path = tmp_path / f"{index}.jsonl"
        write_trace(path, task, trace, {"x": 9})
        head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert head == {"cells": 16, "word_bits": 8, "branch": branch, "labels": {"x": 9}}
        assert [line["micro_step"] for line in lines] == list(range(execution.micro_steps + 1))
        assert lines[0]["memory"] == list(program.state.memory)
        assert lines[-1]["memory"] == list(execution.state.memory)
        assert (lines[0]["margin"], lines[0]["agreed"], lines[0]["instruction"]) == (None, None, 0)
        assert [line["margin"] for line in lines[1:]] == trace.margins.tolist()
        phases = ["fetch", "read", *(f"subtract[{i}]" for i in range(8)), "write"]
        assert [line["phase"] for line in lines[:11]] == phases
        assert [line["instruction"] for line in lines[1:]] == [
            k + 1 for k in range(execution.instructions) for _ in range(11)
        ]
        assert lines[-1]["phase"] == ("halted" if execution.state.halted else "fetch")
        assert lines[-1]["pc"] == execution.state.pc
        # WRITE selects the cell that the instruction's second word names.
        assert lines[10]["select"] == [program.state.memory[(program.state.pc + 1) % 16] % 16]


def test_the_figure_shows_every_set_bit() -> None:
    task, executor = ntk(16, 8, "negative")
    batch = ProgramBatch(task, [halting(task)], executor, trace=True)
    while batch.unfinished:
        batch.advance()
    trace = batch.trace(0)
    figure = trace_figure(task, trace, {"x": 9, "also": 9}, "a title")
    raster, margin = figure.axes[:2]
    pixels = raster.images[0].get_array()
    assert pixels is not None
    assert pixels.shape == (task.layout.bits, 34, 3)
    assert int((pixels.min(axis=2) < 230).sum()) == int(trace.states.sum())
    assert "cell 9" in [tick.get_text() for tick in raster.get_yticklabels()]
    assert "x, also" in [tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels()]
    assert margin.lines[0].get_ydata() == pytest.approx(trace.margins.numpy())


def test_a_long_history_shares_columns() -> None:
    task, executor = ntk(8, 4, "negative")
    # The last cell stays -1, so that the machine goes to 0 for ever.
    program = Program(task.machine.load([6, 7, 0, 0, 0, 0, 0, -1]), 200, "loop")
    batch = ProgramBatch(task, [program], executor, trace=True)
    while batch.unfinished:
        batch.advance()
    trace = batch.trace(0)
    assert len(trace.states) > 1200
    pixels = trace_figure(task, trace, {}, "long").axes[0].images[0].get_array()
    assert pixels is not None
    assert pixels.shape[1] == -(-len(trace.states) // 2)
    ink = (pixels.min(axis=2) < 230).sum(axis=0)
    assert int(ink[0]) == int((trace.states[0] | trace.states[1]).sum())


def test_a_figure_of_wrong_bits_marks_them() -> None:
    task = SBN(16, 8)
    executor = Scripted(task, 3, task.layout["memory9"][0], admits=True)
    batch = ProgramBatch(task, [halting(task)], executor, trace=True)
    while batch.unfinished:
        batch.advance()
    (margin,) = [axes for axes in trace_figure(task, batch.trace(0), {}, "wrong").axes if axes.get_legend()]
    assert [line.get_xdata().tolist() for line in margin.lines if line.get_label() == "a wrong bit"] == [[3]]  # type: ignore[union-attr]
