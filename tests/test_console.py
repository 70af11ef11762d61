"""Consoles and the progress display, in a pipe and in a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from ntk_ensembles import console as console_module
from ntk_ensembles.console import Progress, console


class Clock:
    """A clock that stands until it is set."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_module, "time", clock)
    return clock


def pipe() -> Console:
    return Console(file=io.StringIO(), width=120)


def terminal() -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)


def lines(shown: Console) -> list[str]:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue().splitlines()


def test_consoles_are_wide_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    console().print("x" * 100)
    console(stderr=True).print("y" * 100)
    captured = capsys.readouterr()
    assert captured.out == "x" * 100 + "\n"
    assert captured.err == "y" * 100 + "\n"


def test_a_line_every_twenty_seconds_in_a_pipe(clock: Clock) -> None:
    shown = pipe()
    with Progress("members", 64, shown, describe=lambda done: f"{done}/64") as progress:
        for done in range(1, 33):
            clock.now += 5
            progress.update(done, "[loss] small")
    assert lines(shown)[0] == "members 4/64, 20 s, 300 s left, [loss] small"
    # One each 20 s, the last of which says how it ended.
    assert len(lines(shown)) == 8
    assert lines(shown)[-1] == "members 32/64, 160 s, 160 s left, [loss] small"


def test_short_work_is_silent_unless_a_last_line_is_wanted(clock: Clock) -> None:
    shown = pipe()
    with Progress("states", 10, shown) as progress:
        clock.now += 3
        progress.update(10)
    assert lines(shown) == []
    with Progress("states", 10, shown, last_line=True) as progress:
        clock.now += 3
        progress.update(10)
    assert lines(shown) == ["states 100%, 3 s, 0 s left"]
    with Progress("states", 10, shown, last_line=True):
        pass
    assert len(lines(shown)) == 1


def test_the_last_line_comes_once(clock: Clock) -> None:
    shown = pipe()
    with Progress("members", 2, shown, last_line=True) as progress:
        clock.now += 23
        progress.update(2)
    assert lines(shown) == ["members 100%, 23 s, 0 s left"]


def test_what_was_done_before_does_not_count_as_speed(clock: Clock) -> None:
    shown = pipe()
    with Progress("members", 100, shown, completed=80) as progress:
        clock.now += 20
        progress.update(90)
    assert lines(shown)[0] == "members 90%, 20 s, 20 s left"


def test_work_without_a_known_end(clock: Clock) -> None:
    shown = pipe()
    with Progress("instruction", None, shown, describe=lambda done: f"{done:,}") as progress:
        clock.now += 30
        progress.update(1234)
    assert lines(shown)[0] == "instruction 1,234, 30 s"


def test_amounts_add_up_and_a_note_stays(clock: Clock) -> None:
    shown = pipe()
    with Progress("work", 4, shown) as progress:
        progress.advance(note="first half")
        clock.now += 20
        progress.advance(1)
        assert progress.completed == 2
    assert lines(shown)[0] == "work 50%, 20 s, 20 s left, first half"


def test_a_bar_in_a_terminal_that_ends_whatever_happens(clock: Clock) -> None:
    shown = terminal()

    def interrupted() -> None:
        with Progress("members", 64, shown, describe=lambda done: f"{done}/64") as progress:
            progress.update(12, "[loss] small")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = "".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in lines(shown))
    assert re.search(r"members .*12/64 .*left .*\[loss\] small", text)
    # The cursor is there again.
    assert isinstance(shown.file, io.StringIO)
    assert shown.file.getvalue().rfind("\x1b[?25h") > shown.file.getvalue().rfind("\x1b[?25l")


@pytest.mark.parametrize(("total", "bars"), [(10, 40), (40, 10)])
def test_the_bar_is_as_long_as_the_work_that_is_done(total: int, bars: int, clock: Clock) -> None:
    shown = terminal()
    with Progress("work", total, shown) as progress:
        progress.update(10)
    last = [line for line in lines(shown) if "work" in line][-1]
    assert last.count("━") == bars
