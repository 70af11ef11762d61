"""The library's programs against Python, on the interpreter; finding and loading programs."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from ntk_ensembles.computer import LibraryProgram, find_program, library_programs, load_program
from ntk_ensembles.tasks import Branch, Machine

BOTH: tuple[Branch, ...] = ("negative", "nonpositive")


def fibonacci(n: int) -> int:
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


MEANING: dict[str, Callable[..., list[list[int]]]] = {
    # name: what each result holds, given what each input holds
    "add": lambda x, y: [[x[0] + y[0]]],
    "divide": lambda x, y: [[x[0] // y[0]], [x[0] % y[0]]],
    "factorial": lambda n: [[math.factorial(n[0])]],
    "fibonacci": lambda n: [[fibonacci(n[0])]],
    "gcd": lambda x, y: [[math.gcd(x[0], y[0])]],
    "maximum": lambda x, y: [[max(x[0], y[0])]],
    "multiply": lambda x, y: [[x[0] * y[0]]],
    "negate": lambda x: [[-x[0]]],
    "sieve": lambda: [[k if all(k % d for d in range(2, k)) else 0 for k in range(2, 31)]],
    "sort": lambda data: [sorted(data)],
    "square_root": lambda x: [[math.isqrt(x[0])]],
}
VARIANTS = [(program.name, branch) for program in library_programs() for branch in program.branches]


def draw_inputs(program: LibraryProgram, word: int, count: int, seed: int) -> list[list[list[int]]]:
    """Inputs in range: all combinations of a few edge values, then random ones."""
    generator = random.Random(seed)
    bounds = [field.bounds(word) for field in program.inputs]
    if program.name == "factorial":
        bounds = [(0, 12)]  # its time grows with the square
    counts = [field.count for field in program.inputs]
    edges = [{low, low + 1, high - 1, high} | ({0, 1} if low <= 0 <= high else set()) for low, high in bounds]
    if all(size == 1 for size in counts):
        found = [[[value] for value in values] for values in itertools.product(*edges)]
    else:
        found = [[[low] * size for (low, _), size in zip(bounds, counts, strict=True)]]
        found += [[list(range(size, 0, -1)) for size in counts]]
    while len(found) < count:
        found.append(
            [
                [generator.randint(low, high) for _ in range(size)]
                for (low, high), size in zip(bounds, counts, strict=True)
            ]
        )
    return found


def check(program: LibraryProgram, branch: Branch, word: int, inputs: list[list[list[int]]]) -> None:
    assembly = program.assemble(word_bits=word)
    machine = Machine(program.cells, word, branch)
    for values in inputs:
        words = list(assembly.words)
        for field, value in zip(program.inputs, values, strict=True):
            start = assembly.address(field.label)
            words[start : start + field.count] = value
        state, _ = machine.run(machine.load(words), 100_000)
        assert state.halted, values
        for field, expected in zip(program.results, MEANING[program.name](*values), strict=True):
            start = assembly.address(field.label)
            assert [machine.wrap(v) for v in expected] == list(state.memory[start : start + field.count]), values


def test_the_library_is_complete() -> None:
    assert {name for name, _ in VARIANTS} == set(MEANING)
    assert {name for name, branch in VARIANTS if branch == "negative"} == set(MEANING)
    assert {name for name, branch in VARIANTS if branch == "nonpositive"} >= set(MEANING) - {"sort"}


@pytest.mark.parametrize(("name", "branch"), VARIANTS)
def test_program_on_edge_and_random_inputs(name: str, branch: Branch) -> None:
    program = find_program(name, branch)
    check(program, branch, 8, draw_inputs(program, 8, 40, seed=0))


@pytest.mark.parametrize(
    ("name", "values"),
    [("add", [[20000], [9000]]), ("multiply", [[181], [-181]]), ("divide", [[30000], [123]]), ("gcd", [[1071], [462]])]
    + [("square_root", [[32767]]), ("fibonacci", [[23]]), ("factorial", [[7]]), ("maximum", [[-9000], [7000]])]
    + [("sort", [[5000, -1, 300, 299, -9000, 0]]), ("sieve", []), ("negate", [[-32767]])],
)
def test_programs_in_words_of_16_bits(name: str, values: list[list[int]]) -> None:
    for branch in BOTH:
        if (name, branch) in VARIANTS:
            check(find_program(name, branch), branch, 16, [values])


@pytest.mark.parametrize("name", [name for name in MEANING if name not in ("sort", "sieve")])
def test_programs_in_a_larger_machine(name: str) -> None:
    program = find_program(name, "negative")
    assert program.assemble(cells=128).words == program.assemble().words


def test_programs_that_need_exactly_their_cells_say_so() -> None:
    for name in ("sort", "sieve"):
        program = find_program(name, "negative")
        assert len(program.assemble(cells=64).words) == 64
        with pytest.raises(ValueError, match=f"{name} runs in exactly 64 cells"):
            program.assemble(cells=128)


def test_what_the_library_says_of_a_program() -> None:
    program = find_program("sort", "negative")
    assert program.summary == "Sorts six cells in ascending order, by operands that move through them."
    assert [(f.label, f.count, f.bounds(8), f.bounds(16)) for f in program.inputs] == [
        ("data", 6, (-64, 63), (-16384, 16383))
    ]
    assert [(f.label, f.count, f.text) for f in program.results] == [("data", 6, "in ascending order")]
    assert [f.bounds(8) for f in find_program("fibonacci", "nonpositive").inputs] == [(0, 126)]
    assert [f.bounds(8) for f in find_program("multiply", "negative").inputs] == [(-128, 127)] * 2
    for program in library_programs():
        assert program.summary.endswith(".")
        assert program.assemble().cells == program.cells


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"no program 'cube' in the library: expected one of add, divide, "):
        find_program("cube", "negative")
    with pytest.raises(ValueError, match="the library has sort for --branch negative alone"):
        find_program("sort", "nonpositive")


IMAGE = "9 11 3\n11, 10, 6\n2 8 -1 29 58"
SOURCE = "x y\ny: . 1 x: 2\n"


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("a.dec", IMAGE, [9, 11, 3, 11, 10, 6, 2, 8, -1, 29, 58]),
        ("a.sq", IMAGE, [9, 11, 3, 11, 10, 6, 2, 8, -1, 29, 58]),
        ("a.txt", "1 2", [1, 2]),
        ("a.asm", "1 2", [1, 2, 3]),
        ("a.asm", SOURCE, [4, 3, 3, 1, 2]),
        ("a.sq", SOURCE, [4, 3, 3, 1, 2]),
        ("a", "\ufeff" + SOURCE, [4, 3, 3, 1, 2]),
    ],
)
def test_files_by_ending_and_content(file: str, text: str, words: list[int], tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_text(text, encoding="utf-8")
    assert list(load_program(str(path)).words) == words


def test_a_raw_image_has_the_cells_that_hold_it(tmp_path: Path) -> None:
    path = tmp_path / "a.dec"
    path.write_text("99 " * 17)
    assert load_program(str(path)).cells == 32
    assert load_program(str(path), cells=64).cells == 64


def test_a_library_name_is_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gcd").write_text("1 2 3")
    assert len(load_program("gcd").words) == 32
    assert list(load_program("./gcd").words) == [1, 2, 3]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("none.asm", None, "no such file, and no program of the library (add, "),
        ("bad.dec", b"1 2 x", "word 3 of the image (line 1) is 'x'"),
        ("bad.sq", b"1 2\n3 $", "bad.sq:2:3: unexpected character '$'"),
        ("empty.dec", b" \n", "has no words"),
        ("empty.asm", b"# nothing", "has no words"),
        ("binary.dec", b"\xff\xfe\x00", "cannot be read: it is no text"),
        ("long.dec", b"0 " * (1 << 19) + b"0", "is larger than 1024 KiB; expected a program"),
    ],
)
def test_files_that_are_no_programs(file: str, content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_program(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        load_program(str(tmp_path))


def test_every_file_states_its_inputs_and_results() -> None:
    for program in library_programs():
        labels = program.assemble().labels
        assert program.results
        for field in (*program.inputs, *program.results):
            assert field.label in labels, program.file
        commented = [line for line in program.source.splitlines() if re.match(r"#\s*(input|result)", line)]
        assert len(commented) == len(program.inputs) + len(program.results), program.file
        assert set(program.branches) <= {cast(Branch, branch) for branch in BOTH}
