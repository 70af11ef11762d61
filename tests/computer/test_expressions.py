"""Sums and signs in operands, against Python's own arithmetic."""

from __future__ import annotations

import random

import pytest

from ntk_ensembles.computer import assemble


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("-(1-(2-3))", -2),
        ("-(-(-(5)))", -5),
        ("1-(2-(3-(4-5)))", 1 - (2 - (3 - (4 - 5)))),
        ("-(2+(3+4))", -9),
        ("--(1-2)", -1),
    ],
)
def test_a_sign_before_a_parenthesis_reaches_all_that_is_in_it(expression: str, value: int) -> None:
    assert assemble(f". {expression}", cells=64).words == (value,)


def random_sum(generator: random.Random, depth: int) -> str:
    if not depth or generator.random() < 0.2:
        return str(generator.randrange(10))
    terms = [random_sum(generator, depth - 1) for _ in range(generator.randint(1, 3))]
    signs = [generator.choice("+-") for _ in terms]
    text = "".join(sign + term for sign, term in zip(signs, terms, strict=True))
    return f"{generator.choice(['', '-', '+'])}({text})"


def test_random_sums_are_pythons() -> None:
    generator = random.Random(0)
    for _ in range(400):
        text = random_sum(generator, 4)
        assert assemble(f". {text}", cells=64, word_bits=16).words == (eval(text),)  # noqa: S307


def test_labels_under_signs() -> None:
    """x stands at 3 and y at 5."""
    source = ". -(x-y) y-(x-(y-x)) -(-(x))\nx: . 0 0\ny: . 0"
    words = assemble(source, cells=64).words
    assert words[:3] == (-(3 - 5), 5 - (3 - (5 - 3)), 3)
