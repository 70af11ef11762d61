"""Permutation: one micro-step moves every bit, for any permutation and any input."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from ntk_ensembles.tasks import EvaluationSet, Permutation


def one_step(task: Permutation, values: list[int]) -> list[int]:
    states = torch.stack([task.initial_state(value) for value in values])
    return [task.result(state) for state in task.templates.micro_step(states)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_every_word(bits: int, seed: int | None) -> None:
    task = Permutation(bits, permutation_seed=seed)
    values = list(range(1 << bits))
    digits = [format(value, f"0{bits}b")[::-1] for value in values]
    expected = []
    for word in digits:
        moved = [""] * bits
        for i, digit in enumerate(word):
            moved[task.targets[i]] = digit
        expected.append(int("".join(moved)[::-1], 2))
    assert one_step(task, values) == expected
    assert [task.reference(value) for value in values] == expected
    assert len(task.templates) == task.layout.bits == bits


def test_long_words() -> None:
    task = Permutation(1000)
    values = list(itertools.islice(task.inputs(random.Random(0)), 30))
    assert one_step(task, values) == [task.reference(value) for value in values]


def test_no_seed_is_the_identity_and_seeds_differ() -> None:
    assert Permutation(9, permutation_seed=None).targets == tuple(range(9))
    assert sorted(Permutation(9).targets) == list(range(9))
    assert Permutation(9).targets != Permutation(9, permutation_seed=1).targets


def test_explicit_permutation() -> None:
    task = Permutation(3, permutation=[2, 0, 1])
    # Bit 0 goes to 2, bit 1 to 0, bit 2 to 1.
    assert one_step(task, [0b001, 0b010, 0b100]) == [0b100, 0b001, 0b010]
    assert task.options == {"bits": 3, "ones": None, "permutation_seed": 0, "permutation": [2, 0, 1]}
    assert Permutation(3).options["permutation"] is None
    assert Permutation.from_options(task.options).targets == (2, 0, 1)
    with pytest.raises(ValueError, match="each of 0 to 2 once"):
        Permutation(3, permutation=[0, 2, 2])


@pytest.mark.parametrize(("bits", "ones"), [(1, 0), (1, 1), (6, 2), (5, 0), (5, 5), (30, 2), (30, 28)])
def test_inputs_with_given_ones_are_enumerated_once_each(bits: int, ones: int) -> None:
    values = list(Permutation(bits, ones).inputs(random.Random(0)))
    assert len(values) == len(set(values)) == math.comb(bits, ones)
    assert all(value.bit_count() == ones for value in values)


def test_inputs_of_short_words_are_enumerated_once_each() -> None:
    assert sorted(Permutation(10).inputs(random.Random(0))) == list(range(1024))


@pytest.mark.parametrize("ones", [None, 7, 30])
def test_inputs_of_long_words_go_on(ones: int | None) -> None:
    values = list(itertools.islice(Permutation(60, ones).inputs(random.Random(0)), 200))
    assert all(0 <= value < 1 << 60 and (ones is None or value.bit_count() == ones) for value in values)
    assert len(set(values)) == 200


@pytest.mark.parametrize(
    ("bits", "ones", "message"),
    [(0, None, "bits=0: expected an integer from 1 to 4096"), (4097, None, "bits=4097"), (5, 6, "ones=6.* 0 to 5")],
)
def test_bad_options(bits: int, ones: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Permutation(bits, ones)


def test_a_negative_seed_is_not_taken_for_the_positive_one() -> None:
    with pytest.raises(ValueError, match="permutation_seed=-4: expected an integer from 0 to"):
        Permutation(5, permutation_seed=-4)
    with pytest.raises(ValueError, match="seed=-4: expected an integer from 0 to"):
        EvaluationSet.sample(Permutation(5), 10, -4)
