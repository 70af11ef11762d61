"""Assembler and disassembler: what the convention says, errors at the right place, random text, round trips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntk_ensembles.computer import AssemblyError, assemble, disassemble
from ntk_ensembles.tasks import parse_image


def words(text: str) -> list[int]:
    return list(assemble(text, cells=64).words)


def test_instructions_and_their_defaults() -> None:
    assert words("7 8 9") == [7, 8, 9]
    assert words("7 8") == [7, 8, 3]
    assert words("7") == [7, 7, 3]
    assert words("7; 8 9\n 1 2 0") == [7, 7, 3, 8, 9, 6, 1, 2, 0]
    assert words("\n ; ;\n# nothing\n\t7 # 8 9; 3\n") == [7, 7, 3]
    assert words("1,2,3") == [1, 2, 3]
    assert words("") == []


def test_labels_stand_for_the_address_of_the_next_word() -> None:
    program = assemble("start: x y; z:\n  w: x start\nx: . 5 y:6\nend:", cells=16)
    assert list(program.words) == [6, 7, 3, 6, 0, 6, 5, 6]
    assert program.labels == {"start": 0, "z": 3, "w": 3, "x": 6, "y": 7, "end": 8}


def test_a_label_may_stand_at_any_word_and_several_at_one() -> None:
    program = assemble("p:1 q: r:2 s:3; . t:4 u:", cells=16)
    assert list(program.words) == [1, 2, 3, 4]
    assert program.labels == {"p": 0, "q": 1, "r": 1, "s": 2, "t": 3, "u": 4}


def test_the_next_cell() -> None:
    assert words("? ? ?") == [1, 2, 3]
    assert words(". ? ? ?+2 ?-1") == [1, 2, 5, 3]
    # b is a's value, not a's text.
    assert words("?") == [1, 1, 3]


def test_expressions() -> None:
    assert words("x+1 x-1 x; x: . 0") == [4, 2, 3, 0]
    assert words(". 10-2-3 10-(2-3) -(1+2) --4 -x +x 1+2-3+x; x:") == [5, 11, -3, 4, -7, 7, 7]
    assert words(". ( 1 + ( 2 - 3 ) )") == [0]


def test_a_sign_after_white_space_and_before_none_begins_a_word() -> None:
    assert words("5 6 -1") == [5, 6, -1]
    assert words("5 6-1") == [5, 5, 3]
    assert words("5 6 - 1") == [5, 5, 3]
    assert words("5 6- 1") == [5, 5, 3]
    assert words("5 6 (-1)") == [5, 6, -1]
    assert words(". 5 -x +x; x:") == [5, -3, 3]


def test_the_hello_world_of_the_convention() -> None:
    # Its output instruction writes to address -1, of which this machine has none; a label makes it a mere word.
    text = """
    # Output the character pointed to by p.
    a a; p Z; Z a; Z; a:0 out:(-1);
    # Increment p.
    m1 p;
    # Check if p < E.
    a a; E Z; Z a; Z; p a (-1);
    Z Z 0;
    p:H Z:0 m1:-1
    . H: 72 101 E:E
    """
    # Assembled by hand, an instruction or a data line each.
    expected = [[12, 12, 3], [36, 37, 6], [37, 12, 9], [37, 37, 12], [0, -1, 15], [38, 36, 18], [12, 12, 21]]
    expected += [[41, 37, 24], [37, 12, 27], [37, 37, 30], [36, 12, -1], [37, 37, 0], [39, 0, -1], [72, 101, 41]]
    assert words(text) == [value for line in expected for value in line]


def test_places() -> None:
    program = assemble("  a: 7 b-1\nb: . 3", cells=16)
    assert [(p.line, p.column, p.text) for p in program.spans] == [
        (1, 6, "7"),
        (1, 8, "b-1"),
        (1, 6, "7"),
        (2, 6, "3"),
    ]


def test_by_default_the_machine_has_what_the_program_names() -> None:
    assert assemble("1 2").cells == 4
    assert assemble("1 2; . 5").cells == 4
    assert assemble("1 2; . 5 6").cells == 8
    assert assemble("1 20").cells == 32
    assert assemble(". 1 20").cells == 4
    # The next instruction after the last cell is at 0.
    assert list(assemble(". 0; 1 2").words) == [0, 1, 2, 0]
    assert list(assemble(". 0; 1 2", cells=8).words) == [0, 1, 2, 4]


ERRORS = {
    # source: line, column, offending text, part of the reason
    "x $": (1, 3, "$", "unexpected character '$'"),
    "1 2\n\t§": (2, 2, "§", "unexpected character"),
    "1 2 3 4": (1, 7, "4", "fourth operand"),
    "1 2 nowhere": (1, 5, "nowhere", "'nowhere' is not defined"),
    "loop: 1 2 lop": (1, 11, "lop", "is it 'loop'?"),
    "x: . 1\ny: . 2; x: . 3": (2, 9, "x", "stands in line 1 already"),
    "1 2 x:": (1, 5, "x", "no word follows the label"),
    "x: .": (1, 4, ".", "no data words"),
    "1 . 2": (1, 3, ".", "must begin its statement"),
    "1 (2": (1, 3, "(", "never closed"),
    "1 (2 3)": (1, 3, "(", "never closed"),
    "1 2)": (1, 4, ")", "white space"),
    "1 ) 2": (1, 3, ")", "found ')'"),
    "1 2+": (1, 5, "", "the line ends"),
    "1 2+; 3": (1, 5, ";", "found ';'"),
    "12x": (1, 3, "x", "white space"),
    ": 1": (1, 1, ":", "found ':'"),
    ". 256": (1, 3, "256", "does not fit words of 8 bits: expected -128 to 255"),
    ". 200-400": (1, 3, "200-400", "'200-400' is -200, which does not fit words of 8 bits"),
    "16 1": (1, 1, "16", "no address in 16 cells: expected 0 to 15"),
    "1 -1": (1, 3, "-1", "no address in 16 cells: expected 0 to 15; there is no input"),
    "1 2 16": (1, 5, "16", "cannot be branched to in 16 cells: expected 0 to 15"),
    "1 2\n" * 5 + "3 4": (6, 3, "4", "word 17 of a program for 16 cells"),
    "9" * 21: (1, 1, "9" * 21, "21 digits"),
}


@pytest.mark.parametrize("source", ERRORS)
def test_errors_say_where_and_what(source: str) -> None:
    line, column, text, reason = ERRORS[source]
    with pytest.raises(AssemblyError) as caught:
        assemble(source, cells=16, name="prog.asm")
    error = caught.value
    assert (error.span.line, error.span.column, error.span.text) == (line, column, text)
    assert str(error).startswith(f"prog.asm:{line}:{column}: ")
    assert reason in str(error)
    assert "\n" not in str(error)
    shown, carets = error.__notes__[0].split("\n")
    assert shown.removeprefix("    ") == source.split("\n")[line - 1]
    assert carets.index("^") == 4 + column - 1
    assert carets.count("^") == max(1, len(text))


def test_words_that_would_read_as_negative_addresses() -> None:
    # With 8 bits, 200 is -56: fine as an operand's address, but a branch there would halt.
    assert assemble("200 200 -1", cells=256).words == (200, 200, -1)
    with pytest.raises(
        AssemblyError, match="200 cannot be branched to in 256 cells, in words of 8 bits: expected 0 to 127"
    ):
        assemble("1 2 200", cells=256)
    assert assemble("1 2 200", cells=256, word_bits=9).words == (1, 2, 200)


ALPHABET = "ab:;.?#()+-01 9\n\t,x_\r\u00e9\x00"


@given(st.text(ALPHABET, max_size=60) | st.text(max_size=30))
def test_random_text_is_a_program_or_an_assembly_error(text: str) -> None:
    try:
        program = assemble(text)
    except AssemblyError:
        return
    assert all(-128 <= value <= 255 for value in program.words)
    assert len(program.words) <= program.cells
    assert len(program.spans) == len(program.words)
    again = disassemble(program.words, cells=program.cells, labels=program.labels)
    assert assemble(again, cells=program.cells).words == program.words


def test_deep_nesting() -> None:
    deep = 3_000
    assert words(". " + "(" * deep + "7" + ")" * deep) == [7]
    assert words(". " + "-" * deep + "7") == [7]
    with pytest.raises(AssemblyError):
        words(". " + "(" * deep)


@given(
    st.integers(2, 6).flatmap(lambda bits: st.tuples(st.just(1 << bits), st.integers(bits, 10))),
    st.data(),
)
def test_disassembly_assembles_to_the_same_image(machine: tuple[int, int], data: st.DataObject) -> None:
    cells, word = machine
    value = st.integers(-(1 << (word - 1)), (1 << word) - 1)
    # Values that are addresses are rare among wide words.
    image = data.draw(st.lists(value | st.integers(0, min(cells, 1 << word) - 1), max_size=cells))
    text = disassemble(image, cells=cells, word_bits=word)
    assert list(assemble(text, cells=cells, word_bits=word).words) == image
    # Where every operand is left out or written, line for line.
    assert len(text.splitlines()) == -(-len(image) // 3)


@pytest.mark.parametrize(
    ("image", "first"),
    [
        ([1, 2, 3], "1 2"),
        ([1, 1, 3], "1"),
        ([1, 2, 0], "1 2 0"),
        ([1, 2, -5], "1 2 -5"),
        ([1, -2, 0], ". 1 -2 0"),
        ([0, 0, 0], ". 0 0 0"),
        ([1, 2], ". 1 2"),
        ([1], ". 1"),
    ],
)
def test_disassembly_shows_instructions(image: list[int], first: str) -> None:
    assert disassemble(image).split("#")[0].strip() == first


def test_disassembly_with_labels() -> None:
    text = "loop: x y loop; y x;  x: . -5 y: 7"
    program = assemble(text)
    again = disassemble(program.words, labels=program.labels)
    assert [line.split("#")[0].strip() for line in again.splitlines()] == ["loop:x y loop", "y x", ". x:-5 y:7"]
    assert assemble(again).labels == program.labels


def test_disassembly_refuses_what_no_machine_holds() -> None:
    with pytest.raises(ValueError, match="17 words does not fit 16 cells"):
        disassemble([0] * 17, cells=16)
    with pytest.raises(ValueError, match=r"word 256 \(cell 1\) does not fit 8 bits"):
        disassemble([0, 256])


def test_an_image_in_threes_is_assembly_too() -> None:
    text = "9 11 3\n11 10 6\n2 8 -1\n"
    assert list(assemble(text).words) == parse_image(text)


def test_addresses_by_label() -> None:
    program = assemble("1 2; x: . 5 6 7", cells=8)
    assert [program.address(text) for text in ("x", "x+2", "x-3", "7", "0")] == [3, 5, 0, 7, 0]
    for bad, reason in (
        ("y", "the labels are x"),
        ("x+9", "address 12 is outside"),
        ("x-4", "outside"),
        ("x*2", "expected"),
    ):
        with pytest.raises(ValueError, match=reason):
            program.address(bad)
