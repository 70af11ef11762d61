"""`ntk-ensembles run` on trained networks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ntk_ensembles import SBN, Addition, RunOptions, train
from ntk_ensembles.cli.run import run_command
from ntk_ensembles.computer import find_program
from ntk_ensembles.tasks import Machine, MachineState

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """8 cells of 4 bits; no weights are kept, so that members have to be made again."""
    out = str(tmp_path_factory.mktemp("small") / "run")
    options = RunOptions(
        width=4096, ensemble=6, init="antisymmetric", evaluation_states=20, keep_weights="none", out=out
    )
    train(SBN(8, 4, "nonpositive"), options)
    return out


@pytest.fixture(scope="module")
def library_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """16 cells of 8 bits, for programs of the library; from kept weights."""
    out = str(tmp_path_factory.mktemp("library") / "run")
    options = RunOptions(
        width=8192, ensemble=3, init="antisymmetric", evaluation_states=20, keep_weights="all", out=out
    )
    train(SBN(16, 8), options)
    return out


def test_random_memories_in_closed_loop(small_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = Machine(8, 4, "nonpositive")
    generator = random.Random(11)
    memories = [[generator.randrange(-8, 8) for _ in range(8)] for _ in range(40)]
    path = tmp_path / "cases.jsonl"
    path.write_text("\n".join(json.dumps({"memory": memory, "max_instructions": 6}) for memory in memories))
    run_command(["--backend", small_run, "--batch", str(path)])
    captured = capsys.readouterr()
    assert "the mean of 6 trained networks of width 4,096" in captured.err
    for memory, line in zip(memories, captured.out.splitlines(), strict=True):
        state, executed = machine.run(MachineState(tuple(memory), 0, halted=False), 6)
        result = json.loads(line)
        assert (result["memory"], result["pc"], result["halted"]) == (list(state.memory), state.pc, state.halted)
        assert (result["instructions"], result["agreed"]) == (executed, True)
        assert 0 < result["smallest_margin"] < 0.2


PROGRAMS = [
    # name, inputs, result, its value
    ("maximum", {"x": -60, "y": 63}, "maximum", 63),
    ("negate", {"x": -127}, "y", 127),
    ("add", {"x": 100, "y": 29}, "sum", 129 - 256),
    ("square_root", {"x": 3}, "root", 1),
]


def test_the_librarys_programs(library_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, places = [], []
    for name, inputs, label, _ in PROGRAMS:
        program = find_program(name, "negative").assemble()
        words = list(program.words)
        for place, value in inputs.items():
            words[program.address(place)] = value
        lines.append(json.dumps({"memory": words}))
        places.append(program.address(label))
    path = tmp_path / "library.jsonl"
    path.write_text("\n".join(lines))
    assert run_command(["--backend", library_run, "--batch", str(path)]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # Far from the edge, lest another processor's rounding should matter.
    assert min(result["smallest_margin"] for result in results) > 0.001
    found = [result["memory"] for result in results]
    assert [memory[place] for memory, place in zip(found, places, strict=True)] == [value for *_, value in PROGRAMS]


def test_a_single_network_is_not_enough_and_says_so(library_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["maximum", "--backend", library_run, "--members", "1", "--set", "x=-60", "y=63"]
    assert run_command([*arguments, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["agreed"] is False
    assert result["smallest_margin"] < 0
    assert run_command([*arguments, "--max-instructions", "50"]) == 1
    assert "a micro-step did NOT agree with the interpreter; smallest decision margin -0." in capsys.readouterr().out


def test_fewer_members(small_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "negate.dec"
    path.write_text("6 7 3  2 5 -1  5 0")
    figure = tmp_path / "f.png"
    assert run_command([str(path), "--backend", small_run, "--members", "4", "--figure", str(figure)]) == 0
    printed = capsys.readouterr().out
    assert "on the mean of 4 trained networks" in printed
    assert "8 cells of 4 bits, branch if negative or zero" in printed
    assert "every micro-step agreed with the interpreter" in printed
    assert figure.is_file()


@pytest.fixture(scope="module")
def addition_run(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("addition") / "run")
    train(Addition(2), RunOptions(width=256, ensemble=1, evaluation_states=10, tolerance=1e-3, out=out))
    return out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cells", "16"], "--cells 16: the ensemble of RUN was trained for 8"),
        (["--word-bits", "8"], "--word-bits 8: the ensemble of RUN was trained for 4"),
        (["--branch", "negative"], "--branch negative: the ensemble of RUN was trained for nonpositive"),
        (["--members", "7"], "--backend RUN: 7 members: expected 1 to 6"),
        (["--set", "8=1"], "address 8 is outside the machine's 8 cells"),
    ],
)
def test_what_a_run_cannot_do(
    arguments: list[str], expected: str, small_run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.dec"
    path.write_text("6 7 3  2 5 -1  5 0")
    assert run_command([str(path), "--backend", small_run, *arguments]) == 2
    assert expected.replace("RUN", small_run) in capsys.readouterr().err


def test_a_program_larger_than_the_trained_machine(small_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["negate", "--backend", small_run]) == 2
    assert "negate.asm" in capsys.readouterr().err


def test_a_run_of_another_task(addition_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["negate", "--backend", addition_run]) == 2
    assert "is a run of task addition; expected one of sbn" in capsys.readouterr().err
