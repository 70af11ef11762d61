"""The interpreter: hand-computed instructions, images, and the shipped programs against Python."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib import resources
from typing import cast

import jaxtyping
import pytest

from ntk_ensembles.tasks import Branch, Machine, MachineState, parse_image

BOTH: tuple[Branch, ...] = ("negative", "nonpositive")


def after_one(words: list[int], machine: Machine, pc: int = 0) -> MachineState:
    return machine.step(MachineState(machine.load(words).memory, pc, halted=False))


def test_subtracts_and_goes_on() -> None:
    state = after_one([3, 4, 9, 5, 7], Machine(8, 8))
    assert state == MachineState((3, 4, 9, 5, 2, 0, 0, 0), 3, halted=False)


def test_branches_on_a_negative_result() -> None:
    state = after_one([3, 4, 6, 7, 5], Machine(8, 8))
    assert state == MachineState((3, 4, 6, 7, -2, 0, 0, 0), 6, halted=False)


@pytest.mark.parametrize(("branch", "pc"), [("negative", 3), ("nonpositive", 6)])
def test_a_zero_result_tells_the_rules_apart(branch: Branch, pc: int) -> None:
    assert after_one([4, 4, 6, 0, 9], Machine(8, 8, branch)).pc == pc


def test_wraps_in_twos_complement() -> None:
    # -128 - 1 is 127: not negative. 127 - (-1) is -128: negative.
    assert after_one([3, 4, 6, 1, -128], Machine(8, 8)) == MachineState((3, 4, 6, 1, 127, 0, 0, 0), 3, halted=False)
    assert after_one([3, 4, 6, -1, 127], Machine(8, 8)) == MachineState((3, 4, 6, -1, -128, 0, 0, 0), 6, halted=False)
    machine = Machine(4, 3)
    assert [machine.wrap(value) for value in (-5, -4, -1, 0, 3, 4, 7, 8)] == [3, -4, -1, 0, 3, -4, -1, 0]


def test_halts_on_a_branch_to_a_negative_address_and_stays() -> None:
    machine = Machine(8, 8)
    state = after_one([3, 4, -3, 1, 0], machine)
    assert state == MachineState((3, 4, -3, 1, -1, 0, 0, 0), 5, halted=True)
    assert machine.step(state) == state
    assert machine.run(state, 10) == (state, 0)


def test_a_negative_address_without_a_branch_does_not_halt() -> None:
    assert after_one([3, 4, -3, 1, 5], Machine(8, 8)) == MachineState((3, 4, -3, 1, 4, 0, 0, 0), 3, halted=False)


def test_addresses_are_modulo_the_cells() -> None:
    # a = 11 is cell 3, b = -4 is cell 4, c = 22 is cell 6.
    assert after_one([11, -4, 22, 7, 5], Machine(8, 8)) == MachineState((11, -4, 22, 7, -2, 0, 0, 0), 6, halted=False)
    # The instruction at 7 continues in cells 0 and 1, and the next one is at 2.
    assert after_one([4, 5, 0, 0, 1, 0, 0, 5], Machine(8, 8), pc=7).pc == 2


def test_an_instruction_reads_its_words_before_it_writes() -> None:
    # It subtracts 5 from its own c = 1; the branch goes to the old one.
    assert after_one([3, 2, 1, 5], Machine(4, 8)) == MachineState((3, 2, -4, 5), 1, halted=False)
    # It changes its own b; the old b is written.
    assert after_one([3, 1, 2, 5], Machine(4, 8)) == MachineState((3, -4, 2, 5), 2, halted=False)


def test_run_counts_instructions_and_stops() -> None:
    machine = Machine(8, 8)
    loop = machine.load([3, 4, 0, 0, -1])  # mem[4] stays -1: always back to 0
    assert machine.run(loop, 7) == (loop, 7)
    assert machine.run(loop, 0) == (loop, 0)


def test_load_pads_and_takes_unsigned_words() -> None:
    assert Machine(8, 8).load([255, 128, 127, -128]).memory == (-1, -128, 127, -128, 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"word 256 \(cell 1\) does not fit 8 bits: expected -128 to 255"):
        Machine(8, 8).load([0, 256])
    with pytest.raises(ValueError, match="-129"):
        Machine(8, 8).load([-129])
    with pytest.raises(ValueError, match="9 words does not fit 8 cells"):
        Machine(8, 8).load([0] * 9)


@pytest.mark.parametrize("cells", [0, -4, 12])
def test_cells_are_a_power_of_two(cells: int) -> None:
    with pytest.raises(ValueError, match=f"cells={cells}: expected a power of two"):
        Machine(cells)


def test_bad_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' type checker would refuse an unknown rule first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="at least 1"):
        Machine(4, 0)
    with pytest.raises(ValueError, match="'zero': expected one of negative, nonpositive"):
        Machine(branch=cast(Branch, "zero"))


def test_parse_image() -> None:
    assert parse_image("1 2,-3\n, +4\t005,\n") == [1, 2, -3, 4, 5]
    assert parse_image(" \n") == []


@pytest.mark.parametrize("bad", ["0x1f", "1.5", "x:", "1_0", "#", "--1", "٣"])
def test_parse_image_names_the_bad_word(bad: str) -> None:
    with pytest.raises(ValueError, match=r"word 3 of the image \(line 2\)") as error:
        parse_image(f"1 2\n{bad} 4")
    assert repr(bad) in str(error.value)


def wrapped(value: int) -> int:
    return (value + 128) % 256 - 128


Words = list[int]
EDGES = [-128, -127, -100, -2, -1, 0, 1, 3, 64, 90, 127]
EVERY = list(range(-128, 128))
PROGRAMS: dict[str, tuple[tuple[Branch, ...], list[Words], tuple[int, ...], int, Callable[..., int]]] = {
    # file: rules, operands, their cells, the result's cell, the result
    "negate": (BOTH, [EVERY], (6,), 7, lambda x: -x),
    "add": (BOTH, [EDGES, EDGES], (9, 10), 10, lambda x, y: x + y),
    "copy": (BOTH, [EVERY, [0, 5, -128]], (12, 13), 13, lambda x, y: x),
    "minus_absolute": (BOTH, [EVERY], (12,), 14, lambda x: -abs(x)),
    "multiply.negative": (("negative",), [EDGES, [-128, -100, -51, *range(-12, 0)]], (12, 14), 15, lambda x, n: -x * n),
    "multiply.nonpositive": (
        ("nonpositive",),
        [EDGES, [*range(1, 13), 51, 100, 127]],
        (12, 14),
        15,
        lambda x, n: x * n,
    ),
    "negated_sum.negative": (("negative",), [EDGES] * 3, (13, 14, 15), 12, lambda *x: -sum(x)),
    "negated_sum.nonpositive": (("nonpositive",), [EDGES] * 3, (13, 14, 15), 12, lambda *x: -sum(x)),
}
FOLDER = resources.files("ntk_ensembles.tasks") / "programs"


def test_every_shipped_program_is_tested() -> None:
    assert {file.name for file in FOLDER.iterdir() if file.name.endswith(".dec")} == {
        f"{name}.dec" for name in PROGRAMS
    }


@pytest.mark.parametrize("cells", [16, 32])
@pytest.mark.parametrize("name", PROGRAMS)
def test_shipped_program(name: str, cells: int) -> None:
    rules, operands, places, result, meaning = PROGRAMS[name]
    words = parse_image((FOLDER / f"{name}.dec").read_text(encoding="utf-8"))
    for rule in rules:
        machine = Machine(cells, 8, rule)
        for values in itertools.product(*operands):
            for place, value in zip(places, values, strict=True):
                words[place] = value
            state, executed = machine.run(machine.load(words), 1000)
            assert state.halted, values
            assert executed < 1000
            assert state.memory[result] == wrapped(meaning(*values)), values
