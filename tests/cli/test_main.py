"""What all commands have in common: names, versions, the words of errors, and exit statuses."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from ntk_ensembles.cli.main import COMMANDS, Command, command, load_command, main
from ntk_ensembles.cli.train import train_command
from ntk_ensembles.errors import OptionError
from ntk_ensembles.files import SaveError

ROOT = Path(__file__).parents[2]


def raising(error: BaseException) -> Command:
    @command("tool")
    def body(arguments: list[str], prog: str) -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            OptionError("evaluation_states", 0, "an integer from 1"),
            2,
            "--evaluation-states 0: expected an integer from 1",
        ),
        (OptionError("bits", None, "an integer"), 2, "--bits none: expected an integer"),
        (OptionError("out", "", "a directory"), 2, "--out '': expected a directory"),
        (ValueError("no such thing"), 2, "no such thing"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.yaml"),
            2,
            "x.yaml: no such file or directory",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "x: no space left on device"),
        (SaveError("x: cannot be written"), 1, "x: cannot be written"),
        (MemoryError(), 1, "out of memory"),
    ],
)
def test_errors_are_one_line_and_a_status(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raising(error)([]) == status
    assert capsys.readouterr().err == f"tool: error: {line}\n"


def test_an_interrupt_says_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt("5 members are kept"))([]) == 130
    assert raising(KeyboardInterrupt())([], "other") == 130
    assert capsys.readouterr().err == "tool: 5 members are kept\nother: interrupted\n"


@pytest.mark.parametrize(
    "error",
    [
        OptionError("label", "x" * 5_000_000, "a label"),
        OptionError("label", "x y " * 1_000_000, "a label"),
        ValueError("no label " + "x" * 5_000_000),
        ValueError("no label " + "x y\n" * 1_000_000 + "\x1b[2J"),
    ],
)
def test_what_a_user_wrote_is_not_echoed_at_length(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(error)([]) == 2
    printed = capsys.readouterr().err
    assert len(printed) < 2100
    assert printed.count("\n") == 1
    assert "\x1b" not in printed
    assert "label" in printed


def test_an_unexpected_error_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())([])


def test_sigterm_ends_as_ctrl_c_does_with_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    @command("tool")
    def body(arguments: list[str], prog: str) -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            # One more while the work is saved has no effect.
            signal.raise_signal(signal.SIGTERM)
            raise KeyboardInterrupt("5 members are kept") from None
        return 0

    assert body([]) == 143
    assert capsys.readouterr().err == "tool: 5 members are kept\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert raising(KeyboardInterrupt())([]) == 130


def test_a_handler_of_somebody_else_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:

        @command("tool")
        def body(arguments: list[str], prog: str) -> int:
            signal.raise_signal(signal.SIGTERM)
            return 0

        assert body([]) == 0
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


ASCII_SCRIPT = """
import sys
from ntk_ensembles.cli.main import command
from ntk_ensembles.console import console

@command("tool")
def body(arguments, prog):
    console().print("loss \\u2264 1")
    print("loss \\u2264 2")
    return 0

sys.exit(body([]))
"""


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "ascii"},
        # Here Python opens the streams for "surrogateescape".
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_ascii_output_replaces_what_it_cannot_show(settings: dict[str, str]) -> None:
    environment = {**os.environ, **settings}
    ended = subprocess.run([sys.executable, "-c", ASCII_SCRIPT], capture_output=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == b"loss ? 1\nloss ? 2\n"


def test_every_subcommand_is_there_and_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    overview = capsys.readouterr().out
    for name, text in COMMANDS.items():
        assert f"  {name} " in overview
        assert text in " ".join(overview.split())
        assert isinstance(getattr(importlib.import_module(f"ntk_ensembles.cli.{name}"), f"{name}_command"), Command)
    for status in ("0 done", "1 a negative result", "2 bad input", "130 interrupted", "143 ended by SIGTERM"):
        assert status in " ".join(overview.split())
    assert main([]) == 2
    assert capsys.readouterr().err == overview


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "did you mean train?"),
        ("valdiate", "did you mean validate?"),
        ("--verison", "did you mean --version?"),
    ],
)
def test_an_unknown_subcommand_suggests_the_nearest(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word, "--task", "addition"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ntk-ensembles: error: {word}: expected one of train, evaluate, ")
    assert line.endswith(hint)


def test_a_word_like_none_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qqqq"]) == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "prog"),
    [
        (lambda: main(["--version"]), "ntk-ensembles"),
        (lambda: main(["certify", "--version"]), "ntk-ensembles certify"),
        (lambda: main(["evaluate", "--version"]), "ntk-ensembles evaluate"),
        (lambda: train_command(["--version"]), "train.py"),
        (lambda: train_command(["--task", "addition", "--version"]), "train.py"),
    ],
)
def test_versions(call: Callable[[], int], prog: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"{prog} {metadata.version('ntk-ensembles')}\n"


def test_a_terminal_is_told_that_a_command_is_starting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_command("merge")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_command("merge")
    shown, erased, end = capsys.readouterr().err.split("\r")
    assert shown.isprintable()
    assert (erased, end) == (" " * len(shown), "")
