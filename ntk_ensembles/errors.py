"""Errors that more than one floor raises: an argument outside its range."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real


class OptionError(ValueError):
    """An argument has a value that cannot be used.

    The message names the argument as Python writes it (``bits=0``). The commands write the same
    error in the words of the command line (``--bits 0``).

    Attributes:
        argument: Name of the argument, as in Python.
        value: What was passed.
        expected: What can be passed, as the end of a sentence ("an integer from 1 to 512").
    """

    def __init__(self, argument: str, value: object, expected: str) -> None:
        super().__init__(f"{argument}={value!r}: expected {expected}")
        self.argument = argument
        self.value = value
        self.expected = expected


def check_range(argument: str, value: int, low: int, high: int) -> None:
    """Check that an integer argument lies in ``low..high``.

    Raises:
        OptionError: It does not, or it is no integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(argument, value, f"an integer from {low} to {high}")


def check_seed(argument: str, value: int) -> None:
    """Check that an argument is a seed, an integer in ``0..2^63 - 1``.

    Python's own generator takes a negative seed for the positive one, so that two seeds would be one.

    Raises:
        OptionError: It is none.
    """
    check_range(argument, value, 0, (1 << 63) - 1)


def check_fraction(argument: str, value: float) -> None:
    """Check that a number argument lies between 0 and 1, both excluded.

    Raises:
        OptionError: It does not, or it is no number.
    """
    if not (isinstance(value, Real) and 0 < value < 1):
        raise OptionError(argument, value, "a number between 0 and 1")


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Check that an argument is one of the words that it can be.

    Raises:
        OptionError: It is none of them.
    """
    if value not in choices:
        raise OptionError(argument, value, f"one of {', '.join(choices)}")
