"""Command lines as `parse_task` and `Parser` read them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from ntk_ensembles.cli.main import error_text, main
from ntk_ensembles.cli.parsing import DecoderOptions, EvaluationOptions, OutputOptions, Parser, parse_task
from ntk_ensembles.runs import Experiment, RunOptions
from ntk_ensembles.tasks import Addition, Permutation


@dataclass(frozen=True)
class Options(OutputOptions, EvaluationOptions):
    """Options of a tool."""

    rate: float = 0.5
    """A rate, in 100% of cases."""

    engine: Literal["general", "fast"] | None = None
    """An engine."""

    max_steps: int | None = 9
    """Steps."""

    out: str | None = None
    """A file."""


def parsed(*arguments: str) -> tuple[Any, Options, dict[str, Any]]:
    return parse_task(arguments, "tool", "Does it.", Options)


def message(arguments: Sequence[str]) -> str:
    with pytest.raises((ValueError, argparse.ArgumentError)) as caught:
        parsed(*arguments)
    error = caught.value
    return error_text(error) if isinstance(error, ValueError) else str(error)


def test_task_options_and_values() -> None:
    task, options, values = parsed("--task", "addition", "--bits", "3", "--evaluation-states=7", "--json")
    assert isinstance(task, Addition)
    assert task.bits == 3
    assert options == Options(json=True, evaluation_states=7)
    assert next(iter(values)) == "task"
    assert values == {
        "task": "addition",
        "bits": 3,
        "evaluation_states": 7,
        "evaluation_seed": 0,
        "json": True,
        "rate": 0.5,
        "engine": None,
        "max_steps": 9,
        "out": None,
    }


def test_dashes_and_underscores_are_the_same() -> None:
    for flag in ("--evaluation-states", "--evaluation_states"):
        assert parsed("--task", "addition", flag, "9")[1].evaluation_states == 9


def test_help_has_dashes_defaults_and_the_text_of_bases(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--task", "addition", "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    assert "--evaluation-states INT Distinct states of true trajectories" in words
    assert "(default: 1000)" in words
    assert "A rate, in 100% of cases." in words
    assert "--engine {general,fast}" in words
    assert "--evaluation_states" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "--task: expected one of permutation, addition, multiplication, sbn, file.py:Class"),
        (("--bits", "3"), "--task: expected one of permutation"),
        (("--task",), "argument --task: expected one argument"),
        (("--task", "additon"), "did you mean addition?"),
        (("--bit", "3"), "unrecognized arguments: --bit 3; did you mean --bits?"),
        (("--evaluation_stats", "3"), "did you mean --evaluation-states?"),
        # An abbreviation is no flag.
        (("--evaluation-st", "3"), "unrecognized arguments: --evaluation-st 3; did you mean --evaluation-states?"),
        (("stray",), "unrecognized arguments: stray"),
        (("--bits", "0"), "--bits 0: expected an integer from 1 to 512"),
        (("--bits", "many"), "--bits many: expected an integer"),
        (("--bits", "3.0"), "--bits 3.0: expected an integer"),
        (("--rate", "half"), "--rate half: expected a number"),
        (("--engine", "genral"), "--engine genral: expected one of general, fast; did you mean general?"),
        (("--engine", "xyz"), "--engine xyz: expected one of general, fast"),
        (("--evaluation-states", "0"), "--evaluation-states 0: expected an integer from 1 to 1000000"),
        (("--json=1",), "argument --json: ignored explicit argument '1'"),
    ],
)
def test_what_is_wrong_is_said(arguments: tuple[str, ...], expected: str) -> None:
    needs_task = arguments and "--task" not in arguments and expected[:6] != "--task"
    said = message(["--task", "addition", *arguments] if needs_task else arguments)
    assert expected.casefold() in said.casefold()
    if "did you mean" not in expected:
        assert "did you mean" not in said


def config(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_file_of_options(tmp_path: Path) -> None:
    path = config(tmp_path, "task: addition\nbits: 3\nrate: 1e-06\nevaluation_states: 4\nmax_steps: null\njson: true\n")
    task, options, _ = parsed("--config", path)
    assert task.bits == 3
    assert options == Options(json=True, evaluation_states=4, rate=1e-6, max_steps=None)
    assert parsed("--config", path, "--bits", "5")[0].bits == 5
    other = tmp_path / "other.yaml"
    other.write_text("task: permutation\nbits: 4\n")
    assert parsed("--config", path, "--config", str(other))[0].bits == 4
    assert parsed("--config", path, "--config", str(other))[2]["task"] == "permutation"
    assert parsed("--config", str(other), "--config", path, "--task", "multiplication")[2]["task"] == "multiplication"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bits: null", "--bits none: expected an integer"),
        ("bits: true", "--bits True: expected an integer"),
        ("bits: 3.0", "--bits 3.0: expected an integer"),
        ("bits: [3]", "--bits [3]: expected an integer"),
        ("rate: soon", "--rate soon: expected a number"),
        ("json: maybe", "--json maybe: expected true or false"),
        ("engine: fst", "did you mean fast?"),
        ("bitz: 3", "x.yaml: there is no option bitz; did you mean bits?"),
        ("evaluation-states: 3", "no option evaluation-states; did you mean evaluation_states?"),
        ("task: 5", "--task 5: expected one of"),
        ("task: null", "--task None: expected one of"),
    ],
)
def test_values_in_a_file(text: str, expected: str, tmp_path: Path) -> None:
    said = message(["--config", config(tmp_path, f"task: addition\n{text}\n" if "task" not in text else text)])
    assert expected.casefold() in said.casefold()


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "--config", "nope.yaml"]) == 2
    assert capsys.readouterr().err == "ntk-ensembles certify: error: nope.yaml: there is no such file\n"
    assert message(["--task", "addition", "--config", str(tmp_path)]).endswith("is no file")


USERS_TASK = """
import sys
from ntk_ensembles import Addition

class Broken(Addition):
    def __init__(self, bits: int = 3) -> None:
        {body}

class Late(Addition):
    def __init__(self, *, bits: 'Missing' = 3) -> None:
        super().__init__(bits)
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("sys.exit(0)", "fails with SystemExit: 0"),
        ("raise KeyError('x')", "fails with KeyError: 'x'"),
        ("raise ValueError('too small')", "too small"),
    ],
)
def test_a_users_task_that_fails(body: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(USERS_TASK.format(body=body))
    assert expected in message(["--task", f"{path}:Broken"])
    assert "fails with NameError" in message(["--task", f"{path}:Late"])


def test_arguments_that_a_reader_does_not_know_are_left_to_jsonargparse() -> None:
    @dataclass(frozen=True)
    class Lists:
        """Options."""

        sizes: list[float]
        """Sizes."""

        verbose: bool = True
        """Whether to talk."""

    parser = Parser("tool")
    parser.add_options(Lists)
    assert parser.parse(["--sizes", "[1, 2]", "--verbose", "false"]) == {"sizes": [1.0, 2.0], "verbose": False}
    with pytest.raises(argparse.ArgumentError, match="sizes"):
        parser.parse(["--verbose", "true"])


def test_defaults_can_be_replaced() -> None:
    parser = Parser("tool")
    parser.add_options(EvaluationOptions, evaluation_states=None)
    assert parser.parse([]) == {"evaluation_states": None, "evaluation_seed": 0}
    assert parser.parse(["--evaluation-states", "8"])["evaluation_states"] == 8


def test_decoders() -> None:
    assert DecoderOptions().decoders == ("midpoint", "sign")
    assert DecoderOptions("sign").decoders == ("sign",)


def test_output(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (True, False):
        options = OutputOptions(as_json)
        options.messages.print("message")
        options.show({"x": 1}, lambda out: out.print("x is 1"))
    captured = capsys.readouterr()
    assert captured.out == '{"x": 1}\nmessage\nx is 1\n'
    assert captured.err == "message\n"


@pytest.mark.parametrize("options", [{}, {"permutation_seed": None}, {"bits": 3, "ones": 1, "permutation": [2, 0, 1]}])
def test_the_command_line_that_is_printed_trains_the_same(options: dict[str, Any]) -> None:
    task = Permutation(**options)
    words = shlex.split(Experiment(task, RunOptions(width=64, ensemble=3)).command_line)
    assert words[:2] == ["ntk-ensembles", "train"]
    again, found, _ = parse_task(words[2:], "train", "", RunOptions)
    assert again.targets == task.targets
    assert again.options == task.options
    assert found == RunOptions(width=64, ensemble=3)


def test_lists_of_integers_and_nothing(tmp_path: Path) -> None:
    def permutation(*arguments: str) -> Permutation:
        found: Permutation = parsed("--task", "permutation", "--bits", "3", *arguments)[0]
        return found

    assert permutation("--permutation", "2,0,1").targets == (2, 0, 1)
    assert permutation("--config", config(tmp_path, "permutation: [2, 0, 1]\n")).targets == (2, 0, 1)
    assert permutation("--permutation-seed", "none").targets == (0, 1, 2)
    for text in ("2,0,x", "[2,0,1]", "1.0,0,2", ""):
        assert message(["--task", "permutation", "--permutation", text]).endswith(
            "expected integers separated by commas"
        )
    for yaml in ("permutation: 5", "permutation: [2, 0, a]", "permutation: [2, 0, true]"):
        said = message(["--task", "permutation", "--config", config(tmp_path, yaml + "\n")])
        assert said.startswith("--permutation ")
        assert said.endswith("expected integers separated by commas")
    # Any text is a name of a file.
    assert parsed("--task", "addition", "--out", "none")[1].out == "none"
