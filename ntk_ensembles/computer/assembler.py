"""Assembler and disassembler in the common SUBLEQ convention.

    program      statements, ended by ``;`` or a new line; ``#`` begins a comment
    statement    an instruction ``a b c``, or data words after a ``.``
    word         an expression, with any number of ``label:`` before it
    expression   sums and differences of numbers, labels and ``?``, with parentheses

An instruction's c defaults to the next instruction and its b to a. ``?`` is the address of the cell after
the one that it stands in. Words are separated by white space or commas; a sign after white space and
before none begins a new word (``a b -1``), any other sign is an operator (``a b-1``, ``a b - 1``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ntk_ensembles.tasks.machine import CELLS_MIN, Machine

_TOKEN = re.compile(
    r"(?P<space>[ \t\r\f\v,]+)|(?P<comment>#.*)|(?P<number>[0-9]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)"
    r"|(?P<sign>[-+?().:;])"
)
_ADDRESS = re.compile(r"(?P<number>[0-9]{1,9})|(?P<label>[A-Za-z_][A-Za-z0-9_]*)(?P<offset>[-+][0-9]{1,9})?")
_DIGITS_MAX = 20
_NOTE_MAX = 200
"""Characters of a source line that is still shown with an error."""

_Role = Literal["a", "b", "c", "data"]
_OPERANDS: tuple[_Role, _Role, _Role] = ("a", "b", "c")


@dataclass(frozen=True)
class SourceSpan:
    """Line and column, from 1, and text of a part of the source."""

    line: int
    column: int
    text: str


class AssemblyError(ValueError):
    """Source that is no program for the machine: where, what stands there, and what is wrong with it.

    The message is one line, ``name:line:column: reason``. The source line with carets below it is attached as
    a note, which tracebacks show.

    Attributes:
        span: Part at fault; its text is empty at the end of a line.
    """

    def __init__(self, name: str, span: SourceSpan, reason: str, source_line: str) -> None:
        super().__init__(f"{name}:{span.line}:{span.column}: {reason}")
        self.span = span
        if len(source_line) <= _NOTE_MAX:
            # Tabs stay tabs, so that the carets stand below the text.
            indent = re.sub(r"[^\t]", " ", source_line[: span.column - 1])
            self.add_note(f"    {source_line}\n    {indent}{'^' * max(1, len(span.text))}")


@dataclass(frozen=True)
class Assembly:
    """A program in words.

    Attributes:
        words: Words from cell 0 on, as written: signed, or up to 2^w − 1 for two's complement.
        labels: Address that each label stands for.
        spans: Span of each word; that of an operand left out is its instruction's. Empty for a raw image.
        cells: Number of cells of the machine that it was assembled for; if none was named, the smallest power of two,
            at least 4, that has every word, and every address among the operands.
    """

    words: tuple[int, ...]
    labels: Mapping[str, int]
    spans: tuple[SourceSpan, ...]
    cells: int

    def address(self, expression: str) -> int:
        """Return the address that ``label``, ``label+1``, ``label-1`` or a number means.

        Raises:
            ValueError: It is none of these, the label is unknown, or the address outside the machine.
        """
        match = _ADDRESS.fullmatch(expression)
        if match is None:
            raise ValueError(f"{expression!r}: expected a label, label+1, label-1 or an address")
        if match["label"] is None:
            address = int(match["number"])
        elif match["label"] in self.labels:
            address = self.labels[match["label"]] + int(match["offset"] or 0)
        else:
            known = f"the labels are {', '.join(self.labels)}" if self.labels else "the program has no labels"
            raise ValueError(f"no label {match['label']!r}: {known}")
        if not 0 <= address < self.cells:
            raise ValueError(f"{expression}: address {address} is outside the machine's {self.cells} cells")
        return address


def cells_for(words: int) -> int:
    """Return the number of cells of the smallest machine that holds ``words``: a power of two, at least 4."""
    return max(CELLS_MIN, 1 << max(words - 1, 0).bit_length())


def names_of(labels: Mapping[str, int]) -> dict[int, list[str]]:
    """Return the labels of each address that has any.

    Args:
        labels: Addresses by label, as in `Assembly.labels`.
    """
    names: dict[int, list[str]] = {}
    for label, address in labels.items():
        names.setdefault(address, []).append(label)
    return names


def assemble(text: str, *, cells: int | None = None, word_bits: int = 8, name: str = "<source>") -> Assembly:
    """Assemble a program.

    Operands a and b must be addresses of the machine, and c too, or negative to halt. An operand with a label
    of its own (``x:0``) is data, or an address that the program changes, and may be any word.

    Args:
        text: Source.
        cells: Number of cells of the machine; by default as few as `Assembly.cells` says.
        word_bits: Number of bits w of a cell.
        name: Name of the source, for messages.

    Raises:
        AssemblyError: The source is no program for this machine.
    """
    return _Assembler(text, name).assemble(cells, word_bits)


def disassemble(
    words: Sequence[int], *, cells: int | None = None, word_bits: int = 8, labels: Mapping[str, int] | None = None
) -> str:
    """Return source that assembles to exactly these words, three a line, with the address in a comment.

    Three words that cannot be an instruction of the machine, three zeros, and a rest of one or two words become
    data. What is data in truth may look like an instruction: an image does not tell.

    Args:
        words: Words of an image.
        cells: Number of cells of the machine; by default as few as hold the words. `assemble` must be given the same.
        word_bits: Number of bits w of a cell.
        labels: Names to show for addresses, as in `Assembly.labels`.

    Raises:
        ValueError: There are more words than cells, or a word does not fit.
    """
    cells = cells_for(len(words)) if cells is None else cells
    if len(words) > cells:
        raise ValueError(f"an image of {len(words)} words does not fit {cells} cells")
    machine = Machine(word_bits=word_bits)
    for address, value in enumerate(words):
        machine.check_word(value, address)
    names = names_of(labels or {})
    # A label behind the last word names the cell after it.
    definitions = ["".join(f"{label}:" for label in names.get(address, [])) for address in range(len(words) + 1)]
    lines = []
    for start in range(0, len(words), 3):
        triple = words[start : start + 3]
        shown = [str(value) for value in triple]
        instruction = len(triple) == 3 and any(triple) and _fits(triple, cells, word_bits)
        if instruction:
            shown = [names[value][0] if 0 <= value <= len(words) and value in names else str(value) for value in triple]
            # What the assembler supplies is left out, unless it has a label to show.
            if triple[2] == start + 3 < cells and not definitions[start + 2]:
                shown.pop()
                if triple[0] == triple[1] and not definitions[start + 1]:
                    shown.pop()
        body = " ".join(definitions[start + offset] + text for offset, text in enumerate(shown))
        lines.append(f"{body if instruction else '. ' + body:<24}# {start}")
    if definitions[-1]:
        lines.append(definitions[-1])
    return "".join(f"{line}\n" for line in lines)


def _bounds(role: _Role, cells: int, word_bits: int) -> tuple[int, int]:
    """Return the least and the greatest value of a word in its role."""
    if role == "data":
        return -(1 << (word_bits - 1)), (1 << word_bits) - 1
    if role == "c":
        return -(1 << (word_bits - 1)), min(cells, 1 << (word_bits - 1)) - 1
    return 0, min(cells, 1 << word_bits) - 1


def _fits(triple: Sequence[int], cells: int, word_bits: int) -> bool:
    bounds = (_bounds(role, cells, word_bits) for role in _OPERANDS)
    return all(low <= value <= high for value, (low, high) in zip(triple, bounds, strict=True))


@dataclass(frozen=True)
class _Token:
    kind: str
    """``number``, ``name``, ``end`` (of a statement), or the sign itself."""

    span: SourceSpan
    spaced: bool
    """Whether white space, or the line's beginning, stands before it."""


@dataclass(frozen=True)
class _Word:
    """A cell to fill: a constant and signed labels, summed."""

    span: SourceSpan
    role: _Role
    constant: int
    labels: tuple[tuple[int, SourceSpan], ...] = ()
    is_next: bool = False
    """It is the address of the next cell, which at the end of memory is 0."""


class _Assembler:
    """One source: all words and labels are read, then the labels' values are put in."""

    def __init__(self, text: str, name: str) -> None:
        self._name = name
        self._lines = [line.rstrip("\r") for line in text.removeprefix("\ufeff").split("\n")]
        self._tokens = list(self._scan())
        self._position = 0
        self._words: list[_Word] = []
        self._labels: dict[str, tuple[int, SourceSpan]] = {}

    def assemble(self, cells: int | None, word_bits: int) -> Assembly:
        while self._position < len(self._tokens):
            self._statement()
        if cells is not None and len(self._words) > cells:
            span = self._words[cells].span
            raise self._error(span, f"{span.text!r} is word {cells + 1} of a program for {cells} cells")
        values = [self._value(item) for item in self._words]
        for item, value in zip(self._words, values, strict=True):
            self._check(item, value, "data", _bounds("data", 0, word_bits), f"words of {word_bits} bits")
        if cells is None:
            operands = [item.role != "data" and not item.is_next for item in self._words]
            named = [value + 1 for value, is_operand in zip(values, operands, strict=True) if is_operand]
            cells = cells_for(max([len(values), *named]))
        for address, (item, value) in enumerate(zip(self._words, values, strict=True)):
            if item.is_next and value == cells:
                values[address] = value = 0
            what = f"{cells} cells" if cells <= 1 << (word_bits - 1) else f"{cells} cells, in words of {word_bits} bits"
            self._check(item, value, item.role, _bounds(item.role, cells, word_bits), what)
        labels = {label: address for label, (address, _) in self._labels.items()}
        return Assembly(tuple(values), labels, tuple(item.span for item in self._words), cells)

    def _check(self, item: _Word, value: int, role: _Role, bounds: tuple[int, int], what: str) -> None:
        low, high = bounds
        if low <= value <= high:
            return
        shown = str(value) if item.span.text == str(value) else f"{item.span.text!r} is {value}, which"
        if role == "data":
            raise self._error(item.span, f"{shown} does not fit {what}: expected {low} to {high}")
        if role == "c":
            reason = f"{shown} cannot be branched to in {what}: expected 0 to {high}, or a negative number to halt"
            raise self._error(item.span, reason)
        hint = "; there is no input and no output" if value == -1 else ""
        raise self._error(item.span, f"{shown} is no address in {what}: expected 0 to {high}{hint}")

    def _error(self, span: SourceSpan, reason: str) -> AssemblyError:
        return AssemblyError(self._name, span, reason, self._lines[span.line - 1])

    def _scan(self) -> Iterator[_Token]:
        for number, line in enumerate(self._lines, start=1):
            column, spaced = 0, True
            while column < len(line):
                match = _TOKEN.match(line, column)
                if match is None:
                    raise self._error(
                        SourceSpan(number, column + 1, line[column]), f"unexpected character {line[column]!r}"
                    )
                span = SourceSpan(number, column + 1, match[0])
                if match.lastgroup in ("number", "name"):
                    yield _Token(match.lastgroup, span, spaced)
                elif match.lastgroup == "sign":
                    yield _Token("end" if match[0] == ";" else match[0], span, spaced)
                spaced = match.lastgroup == "space"
                column = match.end()
            yield _Token("end", SourceSpan(number, len(line) + 1, ""), True)

    def _peek(self, ahead: int = 0) -> _Token:
        # The last token ends a statement.
        return self._tokens[min(self._position + ahead, len(self._tokens) - 1)]

    def _take(self) -> _Token:
        self._position += 1
        return self._tokens[self._position - 1]

    def _statement(self) -> None:
        label = self._take_labels()
        if self._peek().kind == ".":
            self._data()
        else:
            self._instruction(label)
        self._take()

    def _take_labels(self) -> SourceSpan | None:
        """Define the labels that stand here, as the address of the next word; return the span of the last."""
        span = None
        while self._peek().kind == "name" and self._peek(1).kind == ":":
            span = self._take().span
            self._take()
            if span.text in self._labels:
                line = self._labels[span.text][1].line
                raise self._error(span, f"label {span.text!r} stands in line {line} already")
            self._labels[span.text] = (len(self._words), span)
        return span

    def _data(self) -> None:
        dot = self._take().span
        start = len(self._words)
        while self._peek().kind != "end":
            self._take_labels()
            if self._peek().kind != "end":
                self._words.append(self._expression("data"))
        if len(self._words) == start:
            raise self._error(dot, "no data words follow the '.'")

    def _instruction(self, label: SourceSpan | None) -> None:
        start = len(self._words)
        while self._peek().kind != "end":
            label = self._take_labels() or label
            count = len(self._words) - start
            if self._peek().kind == "end":
                assert label is not None
                raise self._error(label, f"no word follows the label {label.text!r}")
            if count == len(_OPERANDS):
                span = self._peek().span
                raise self._error(span, f"{span.text!r} is a fourth operand; data words follow a '.'")
            self._words.append(self._expression("data" if label else _OPERANDS[count]))
            label = None
        if len(self._words) == start:
            return
        first = self._words[start]
        if len(self._words) == start + 1:
            self._words.append(replace(first, role="b" if first.role == "a" else first.role))
        if len(self._words) == start + 2:
            self._words.append(_Word(first.span, "c", start + 3, is_next=True))

    def _expression(self, role: _Role) -> _Word:
        """Take a sum from left to right; the factor of every open parenthesis is kept on a stack."""
        first = last = self._peek()
        constant = 0
        labels: list[tuple[int, SourceSpan]] = []
        factor, factors = 1, [1]
        opened: list[SourceSpan] = []
        wants_term = True
        while True:
            token = self._peek()
            if wants_term:
                if token.kind == "-":
                    factor = -factor
                elif token.kind == "(":
                    factors.append(factors[-1] * factor)
                    opened.append(token.span)
                    factor = 1
                elif token.kind == "name":
                    labels.append((factors[-1] * factor, token.span))
                    wants_term = False
                elif token.kind in ("number", "?"):
                    term = self._number(token.span) if token.kind == "number" else len(self._words) + 1
                    constant += factors[-1] * factor * term
                    wants_term = False
                elif token.kind != "+":
                    raise self._unexpected(token)
            elif token.kind in ("+", "-") and (opened or not token.spaced or self._peek(1).spaced):
                factor = 1 if token.kind == "+" else -1
                wants_term = True
            elif token.kind == ")" and opened:
                opened.pop()
                factors.pop()
            else:
                break
            last = self._take()
        if opened:
            raise self._error(opened[-1], "'(' is never closed")
        if not token.spaced and token.kind != "end":
            raise self._error(token.span, f"expected white space before {token.span.text!r}")
        line = self._lines[first.span.line - 1]
        text = line[first.span.column - 1 : last.span.column - 1 + len(last.span.text)]
        span = SourceSpan(first.span.line, first.span.column, text)
        return _Word(span, role, constant, tuple(labels), is_next=text == "?")

    def _unexpected(self, token: _Token) -> AssemblyError:
        if token.kind == ".":
            return self._error(token.span, "a '.' must begin its statement")
        found = f"found {token.span.text!r}" if token.span.text else "the line ends"
        return self._error(token.span, f"expected a number, a label or '?', but {found}")

    def _number(self, span: SourceSpan) -> int:
        if len(span.text) > _DIGITS_MAX:
            raise self._error(span, f"a number of {len(span.text)} digits: expected at most {_DIGITS_MAX}")
        return int(span.text)

    def _value(self, item: _Word) -> int:
        total = item.constant
        for factor, span in item.labels:
            if span.text not in self._labels:
                near = difflib.get_close_matches(span.text, self._labels, n=1)
                hint = f"; is it {near[0]!r}?" if near else ""
                raise self._error(span, f"label {span.text!r} is not defined{hint}")
            total += factor * self._labels[span.text][0]
        return total
