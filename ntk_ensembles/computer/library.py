"""Programs in assembly that come with the package, and program files of a user's.

The comment at the top of a library file says, in a form that is read here, what the program is:

    # What it computes, up to the first empty comment line.
    # cells: 64                      only if it needs exactly this number
    # input x: 0 to max              a label, and the range that the program is right for
    # input data[6]: min/2 to max/2  that many cells from a label on
    # result root: what it is        likewise

``min`` and ``max`` are the least and the greatest word. A rule in the file's name (``gcd.negative.asm``) says that
the program is right only under it.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import get_args

from ntk_ensembles.computer.assembler import Assembly, assemble, cells_for
from ntk_ensembles.tasks.machine import Branch, Machine, parse_image

_FIELD = re.compile(
    r"#[ ]*(?P<kind>input|result)[ ]+(?P<label>[A-Za-z_][A-Za-z0-9_]*)(\[(?P<count>[0-9]+)\])?:[ ]*(?P<text>.*)"
)
_RANGE = re.compile(r"(?P<low>\S+)[ ]+to[ ]+(?P<high>\S+)")
_CELLS = re.compile(r"#[ ]*cells:[ ]*(?P<cells>[0-9]+)")
_IMAGE = re.compile(r"[\s,]*([+-]?[0-9]+([\s,]+|$))*")
_PROGRAM_BYTES_MAX = 1 << 20
_BOUND = re.compile(r"(?P<number>-?[0-9]+)|(?P<name>min|max)(?P<change>/2|-1)?")


@dataclass(frozen=True)
class Field:
    """An input or a result of a library program.

    Attributes:
        label: Label of its first cell.
        count: Number of cells.
        text: Range of an input; meaning of a result.
    """

    label: str
    count: int
    text: str

    def bounds(self, word_bits: int) -> tuple[int, int]:
        """Return the least and the greatest value of an input in words of ``word_bits`` bits."""
        match = _RANGE.fullmatch(self.text)
        if match is None:
            raise ValueError(f"{self.label}: {self.text!r} is no range")
        return _bound(match["low"], word_bits), _bound(match["high"], word_bits)


def _bound(text: str, word_bits: int) -> int:
    match = _BOUND.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no bound of a range")
    if match["number"]:
        return int(match["number"])
    low, high = Machine(word_bits=word_bits).word_range
    value = low if match["name"] == "min" else high
    return value - 1 if match["change"] == "-1" else int(value / 2) if match["change"] else value


@dataclass(frozen=True)
class LibraryProgram:
    """A program that comes with the package.

    Attributes:
        name: Name to run it by.
        branches: Rules under which this source is right.
        summary: What it computes.
        inputs: Inputs that may be set before it runs; the source holds an example.
        results: Results to read when it has halted.
        cells: Number of cells of the smallest machine that holds it.
        exact: Whether it is right in a machine of exactly ``cells`` cells alone.
        source: Assembly.
        file: Name of the source file.
    """

    name: str
    branches: tuple[Branch, ...]
    summary: str
    inputs: tuple[Field, ...]
    results: tuple[Field, ...]
    cells: int
    exact: bool
    source: str
    file: str

    def assemble(self, *, cells: int | None = None, word_bits: int = 8) -> Assembly:
        """Assemble the program for a machine.

        Raises:
            ValueError: There are too few cells, or others than an exact program needs.
            AssemblyError: The machine cannot hold a word.
        """
        if self.exact and cells not in (None, self.cells):
            raise ValueError(f"{self.name} runs in exactly {self.cells} cells, as its addresses count to their end")
        return assemble(self.source, cells=cells, word_bits=word_bits, name=self.file)


@cache
def library_programs() -> tuple[LibraryProgram, ...]:
    """Return all programs that come with the package, by name; one for each rule where the sources differ."""
    folder = resources.files("ntk_ensembles.computer") / "programs"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".asm")), key=lambda file: file.name)
    return tuple(_parse(file.name, file.read_text(encoding="utf-8")) for file in files)


def program_names() -> list[str]:
    """Return the names of the library's programs, ascending."""
    return sorted({program.name for program in library_programs()})


def _parse(file: str, source: str) -> LibraryProgram:
    name, *rule, _ = file.split(".")
    header = list(itertools.takewhile(lambda line: line.startswith("#"), source.splitlines()))
    fields: dict[str, list[Field]] = {"input": [], "result": []}
    exact = None
    for line in header:
        if match := _FIELD.fullmatch(line):
            fields[match["kind"]].append(Field(match["label"], int(match["count"] or 1), match["text"]))
        elif match := _CELLS.fullmatch(line):
            exact = int(match["cells"])
    return LibraryProgram(
        name,
        tuple(branch for branch in get_args(Branch) if not rule or rule == [branch]),
        " ".join(line.removeprefix("#").strip() for line in header[: header.index("#")]),
        tuple(fields["input"]),
        tuple(fields["result"]),
        exact or assemble(source, name=file).cells,
        exact is not None,
        source,
        file,
    )


def find_program(name: str, branch: Branch) -> LibraryProgram:
    """Return the library's program of that name for a branch rule.

    Raises:
        ValueError: The name is unknown, or there is none for that rule.
    """
    named = [program for program in library_programs() if program.name == name]
    if not named:
        raise ValueError(f"no program {name!r} in the library: expected one of {', '.join(program_names())}")
    for program in named:
        if branch in program.branches:
            return program
    rules = ", ".join(rule for program in named for rule in program.branches)
    raise ValueError(f"the library has {name} for --branch {rules} alone")


def load_program(
    program: str, *, branch: Branch = "negative", cells: int | None = None, word_bits: int = 8
) -> Assembly:
    """Return the words of a library program or of a file.

    A file that ends in ``.asm`` is assembly and one that ends in ``.dec`` a raw image; any other is an image if
    it holds nothing but decimal integers, and assembly otherwise.

    Args:
        program: Name in the library, or path of a file; ``./gcd`` is a file where ``gcd`` is a name.
        branch: Branch rule, for library programs.
        cells: Number of cells of the machine; by default as few as hold the program.
        word_bits: Number of bits w of a cell.

    Raises:
        ValueError: There is no such program, the file cannot be read or has no words, or the words do not fit the
            machine (`AssemblyError` in assembly).
    """
    if program in program_names():
        return find_program(program, branch).assemble(cells=cells, word_bits=word_bits)
    path = Path(program)
    try:
        # Not more than this: a device such as /dev/zero has no end.
        with path.open("rb") as file:
            content = file.read(_PROGRAM_BYTES_MAX + 1)
        if len(content) > _PROGRAM_BYTES_MAX:
            raise ValueError(f"{program}: is larger than {_PROGRAM_BYTES_MAX // 1024} KiB; expected a program")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        known = ", ".join(program_names())
        raise ValueError(f"{program}: no such file, and no program of the library ({known})") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is no text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error)).lower()
        raise ValueError(f"{program}: cannot be read: {reason}") from None
    if path.suffix == ".dec" or (path.suffix != ".asm" and _IMAGE.fullmatch(text)):
        try:
            words = parse_image(text)
        except ValueError as error:
            raise ValueError(f"{program}: {error}") from None
        assembly = Assembly(tuple(words), {}, (), cells_for(len(words)) if cells is None else cells)
    else:
        assembly = assemble(text, cells=cells, word_bits=word_bits, name=program)
    if not assembly.words:
        raise ValueError(f"{program}: has no words")
    return assembly
