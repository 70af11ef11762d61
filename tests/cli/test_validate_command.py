"""`ntk-ensembles validate` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from ntk_ensembles.cli import validate
from ntk_ensembles.cli.main import main
from ntk_ensembles.tasks import SBN, TASKS, Addition, Template
from ntk_ensembles.theory import validation


def validated(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["validate", *arguments, "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("task", ["permutation", "addition", "multiplication"])
def test_every_length(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = validated(capsys, "--task", task, "--max-bits", "5")
    assert found["task"]["task"] == task
    assert found["task"]["max_bits"] == 5
    assert "bits" not in found["task"]
    assert found["failures"] == 0
    assert [row["bits"] for row in found["rows"]] == [1, 2, 3, 4, 5]
    operands = 1 if task == "permutation" else 2
    for row in found["rows"]:
        assert row["inputs"] == 2 ** (operands * row["bits"])
        assert row["inputs"] <= row["micro_steps"]
        assert row["distinct_exact"] is True
        midpoint, sign = row["tallies"]["midpoint"], row["tallies"]["sign"]
        assert midpoint["padding"] == midpoint["ties"] == 0
        assert midpoint["smallest_margin"] > 0.05
        assert sign["first_failure"] is None
        # Bits that the sign rule leaves on its threshold are told, not hidden.
        assert (sign["ties"] > 0) == (sign["smallest_margin"] < 1e-9)
    assert found["rows"][-1]["tallies"]["sign"]["ties"] > 0


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--task", "multiplication", "--max-bits", "4"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    # 64 inputs of 3 bits; sign is made exact by padding.
    for words in (
        "3 64 691 549 17,019 midpoint 0",
        "sign + 49",
        "Nothing fails",
        "at random",
        "distinct states times bits",
    ):
        assert words in printed


def test_estimates_are_marked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is estimated, where there is no room to count all states."""
    monkeypatch.setattr(validation, "CAPACITY", 512)
    assert main(["validate", "--task", "multiplication", "--max-bits", "4", "--decode", "midpoint"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 16 116 94 2,068 midpoint 0" in printed
    assert "4 256 4,653 ≈ " in printed
    assert "Numbers with ≈ are estimates" in printed


@pytest.mark.parametrize("layers", ["both", "readout"])
def test_layers_and_padding(layers: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "multiplication", "--bits", "2", "--decode", "sign", "--layers", layers]
    asked = validated(capsys, *arguments, "--padding", "77")["rows"][0]["tallies"]["sign"]
    assert (asked["padding"], asked["failures"]) == (77, 0)
    own = validated(capsys, *arguments)["rows"][0]["tallies"]["sign"]
    assert (own["padding"] < 77, own["failures"]) == (True, 0)
    # 0-bits lose margin to padding, 1-bits gain.
    assert own["smallest_margin_ones"] < asked["smallest_margin_ones"]
    midpoint = validated(capsys, "--task", "addition", "--bits", "2", "--layers", layers, "--decode", "midpoint")
    assert midpoint["rows"][0]["tallies"]["midpoint"]["padding"] == 0
    assert main(["validate", *arguments, "--padding", "77"]) == 0
    assert "+ n: with n padding templates." in capsys.readouterr().out


def test_one_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    found = validated(capsys, "--task", "addition", "--max-bits", "2", "--decode", "sign")
    assert [list(row["tallies"]) for row in found["rows"]] == [["sign"], ["sign"]]


def test_the_computer(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--task", "sbn", "--cells", "4", "--word-bits", "4", "--branch", "nonpositive", "--instructions", "100"]
    found = validated(capsys, *flags, "--seed", "3")
    (row,) = found["rows"]
    assert row["instructions"] >= 100
    assert found["task"] == {
        "task": "sbn",
        "cells": 4,
        "word_bits": 4,
        "branch": "nonpositive",
        "instructions": 100,
        "seed": 3,
        "layers": "both",
    }
    assert found["failures"] == 0
    assert SBN(4, 4, "nonpositive").micro_steps_per_instruction * row["instructions"] <= row["micro_steps"]
    assert main(["validate", *flags]) == 0
    assert "of them halted" in " ".join(capsys.readouterr().out.split())


class LosesCarries(Addition):
    """The carry out of the lowest bit goes nowhere."""

    def make_templates(self) -> Iterator[Template]:
        return (rule for rule in super().make_templates() if rule.ones != {self.layout["carry"][0]} or self.bits == 1)


def test_failures_are_told_and_exit_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(TASKS, "addition", LosesCarries)
    arguments = ["--task", "addition", "--max-bits", "2", "--decode", "midpoint"]
    found = validated(capsys, *arguments, status=1)
    # Both summands odd: four of sixteen.
    assert found["failures"] == 4
    assert main(["validate", *arguments]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "2 bits, midpoint: 4 inputs fail; the first: input (1, 1), the output is 0, should be 2; bit p[1] is wrongly 0"
        in printed
    )
    assert "Nothing fails" not in printed


class Crowded(Addition):
    """A hundred templates more set the lowest bit in a state that is never reached, and pull its mean down."""

    def make_templates(self) -> Iterator[Template]:
        yield from super().make_templates()
        for _ in range(100):
            yield Template.rule("never", ones=range(self.layout.bits), sets=[self.layout["p"][0]])


def test_the_sign_rule_with_its_padding_and_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TASKS, "addition", Crowded)
    arguments = ["--task", "addition", "--max-bits", "4"]
    padded = validated(capsys, *arguments)["rows"][3]["tallies"]["sign"]
    assert padded["padding"] > 40
    assert padded["smallest_margin_ones"] > 0
    monkeypatch.setattr(validate, "sign_padding", lambda predictor, extremes: 0)
    found = validated(capsys, *arguments, status=1)
    tallies = found["rows"][3]["tallies"]
    assert tallies["midpoint"]["failures"] == 0
    assert tallies["sign"]["failures"] > 0
    assert tallies["sign"]["smallest_margin"] < 0
    assert "bit p[0] is decoded 0, should be 1" in tallies["sign"]["first_failure"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--task: expected one of permutation, addition, multiplication, sbn"),
        (["--task", "division"], "--task division: expected one of permutation, addition, multiplication, sbn"),
        (["--task", "addition", "--max-bits", "0"], "--max-bits 0: expected an integer from 1 to 12"),
        (["--task", "addition", "--max-bits", "13"], "--max-bits 13: expected an integer from 1 to 12"),
        (["--task", "addition", "--max-bits", "ten"], "--max-bits ten: expected an integer"),
        (["--task", "addition", "--decode", "coin"], "--decode coin: expected one of midpoint, sign, both"),
        (["--task", "addition", "--cells", "4"], "nrecognized arguments: --cells 4"),
        (["--task", "sbn", "--max-bits", "4"], "--max-bits 4: expected a task other than sbn"),
        (["--task", "sbn", "--inputs", "4"], "--inputs 4: expected a task other than sbn"),
        (["--task", "sbn", "--cells", "12"], "--cells 12: expected a power of two"),
        (
            ["--task", "sbn", "--cells", "64", "--word-bits", "5"],
            "--word-bits 5: expected at least 6: a word must hold an address",
        ),
        (["--task", "sbn", "--instructions", "0"], "--instructions 0: expected an integer from 1 to"),
        (["--task", "sbn", "--seed", "-1"], "--seed -1: expected an integer from 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], ["every input", "--decode", "Exit status 0"]),
        (["--task", "multiplication", "--help"], ["--max-bits", "Length L of each factor"]),
        (["--task", "sbn", "--help"], ["--instructions", "random memories", "--branch"]),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["validate", *arguments])
        assert stop.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        for word in words:
            assert word in printed
