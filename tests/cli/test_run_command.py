"""`ntk-ensembles run` as a user runs it."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntk_ensembles.cli.main import main
from ntk_ensembles.cli.run import run_command
from ntk_ensembles.computer import library_programs
from ntk_ensembles.tasks import Branch, Machine, MachineState

KEYS = ["memory", "pc", "halted", "instructions", "micro_steps", "agreed", "smallest_margin", "seconds"]
PROGRAM = """
# y <- -x
loop:  x y; zero end end:-1
x: . 42
y: . 0
zero: . 0
"""
LOOP = ". 6 7 0 0 0 0 0 -1"


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, object]:
    assert run_command([*arguments, "--json"]) == status
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    result: dict[str, object] = json.loads(printed)
    assert list(result) == KEYS
    return result


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "prog.asm"
    path.write_text(PROGRAM)
    return str(path)


def test_one_object_for_one_program(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_json(capsys, program)
    assert result["memory"] == [6, 7, 3, 8, 5, -1, 42, -42, 0, 0, 0, 0, 0, 0, 0, 0]
    assert (result["pc"], result["halted"], result["instructions"], result["micro_steps"]) == (15, True, 2, 22)
    assert result["agreed"] is True
    assert 0 < result["smallest_margin"] < 0.1  # type: ignore[operator]
    assert result["seconds"] > 0  # type: ignore[operator]
    interpreted = run_json(capsys, program, "--backend", "interpreter")
    assert (interpreted["agreed"], interpreted["smallest_margin"]) == (None, None)
    for key in KEYS[:5]:
        assert interpreted[key] == result[key]


def test_the_machine_can_be_chosen(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run_json(capsys, program, "--cells", "32")["memory"]) == 32  # type: ignore[arg-type]
    wide = run_json(capsys, program, "--word-bits", "12", "--set", "x=2000")
    assert wide["memory"][7] == -2000  # type: ignore[index]
    assert wide["micro_steps"] == 2 * 15


def test_the_branch_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 0 - 0: SUBLEQ halts at once, SBN goes on.
    path = tmp_path / "zero.dec"
    path.write_text("6 7 -1  6 7 -1  0 0")
    one = run_json(capsys, str(path), "--branch", "nonpositive")
    assert (one["halted"], one["instructions"]) == (True, 1)
    other = run_json(capsys, str(path), "--max-instructions", "2", status=1)
    assert (other["halted"], other["instructions"], other["pc"]) == (False, 2, 6)


@pytest.mark.parametrize(
    "settings",
    [
        ["--set", "x=-3", "y=1"],
        ["--set", "x=-3", "--set", "y=1"],
        ["--set=x=253", "--set", "x+1=1"],
        ["--set", "6=-3", "7=1"],
    ],
)
def test_words_can_be_set(settings: list[str], program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_json(capsys, program, *settings)["memory"][6:8] == [-3, 4]  # type: ignore[index]


def test_a_program_after_set_is_told_where_to_stand(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--set", "x=-3", program]) == 2
    assert "expected a PROGRAM before --set" in capsys.readouterr().err


def test_a_program_that_does_not_halt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "loop.asm"
    path.write_text(LOOP)
    result = run_json(capsys, str(path), "--max-instructions", "30", status=1)
    assert (result["halted"], result["agreed"], result["instructions"], result["pc"]) == (False, True, 30, 0)
    assert run_command([str(path), "--max-instructions", "30"]) == 1
    assert "not halted; stopped by --max-instructions at pc 0 after 30 instructions" in capsys.readouterr().out


def test_a_library_program_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["gcd", "--set", "x=84", "y=36"]) == 0
    printed = capsys.readouterr().out
    assert "gcd on the NTK limit (1,658 templates, 337 bits): 32 cells of 8 bits, branch if negative" in printed
    assert "gcd = 12 (the greatest common divisor" in printed
    assert re.search(r"y,gcd +12\b", printed)
    assert re.search(r"halted at pc 31 after \d+ instructions, \d+ micro-steps, \d+\.\d\d s", printed)
    assert re.search(r"every micro-step agreed with the interpreter; smallest decision margin 0\.0\d+", printed)
    assert run_command(["sort", "--backend", "interpreter"]) == 0
    printed = capsys.readouterr().out
    assert "data = -50 -7 0 23 23 41 (in ascending order)" in printed
    assert "agreed" not in printed


def test_a_full_disk_costs_the_file_and_not_the_result(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    assert run_command([program, "--json", "--trace", str(tmp_path / "full")]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["memory"]
    assert captured.err.endswith("full: cannot be written (no space left on device); what was saved before is intact\n")


def test_changed_labels_of_other_programs(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([program]) == 0
    assert "changed: y = -42\n" in capsys.readouterr().out


def test_several_programs_are_json_lines_in_order(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["gcd", program, "add"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [list(line) for line in lines] == [KEYS] * 3
    # All on the machine that holds the largest.
    assert [len(line["memory"]) for line in lines] == [32] * 3
    assert (lines[0]["memory"][28], lines[1]["memory"][7], lines[2]["memory"][10]) == (7, -42, 87)
    assert "3 programs on the NTK limit" in captured.err
    assert "3 halted, 3 without a wrong bit" in captured.err


@pytest.mark.parametrize("branch", ["negative", "nonpositive"])
@pytest.mark.parametrize("backend", ["ntk", "interpreter"])
def test_a_batch(
    backend: str, branch: Branch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(8, 6, branch)
    generator = random.Random(7)
    cases = [
        {
            "memory": [machine.wrap(generator.getrandbits(6)) for _ in range(generator.choice([5, 8]))],
            "pc": generator.randrange(8),
            "max_instructions": generator.randint(1, 12),
        }
        for _ in range(60)
    ]
    del cases[3]["pc"], cases[4]["max_instructions"]
    text = "\n\n".join(json.dumps(case) for case in cases)
    arguments = ["--backend", backend, "--branch", branch, "--word-bits", "6", "--max-instructions", "3"]
    path = tmp_path / "cases.jsonl"
    path.write_text(text)
    statuses = [run_command([*arguments, "--batch", str(path)])]
    lines = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    statuses.append(run_command([*arguments, "--batch", "-"]))
    again = capsys.readouterr().out.splitlines()
    for case, line, same in zip(cases, lines, again, strict=True):
        memory = machine.load(case["memory"]).memory  # type: ignore[arg-type]
        start = MachineState(memory, case.get("pc", 0), halted=False)  # type: ignore[arg-type]
        state, executed = machine.run(start, case.get("max_instructions", 3))  # type: ignore[arg-type]
        result = json.loads(line)
        assert list(result) == KEYS
        assert (result["memory"], result["pc"], result["halted"]) == (list(state.memory), state.pc, state.halted)
        assert (result["instructions"], result["micro_steps"]) == (executed, executed * 9)
        assert result["agreed"] is (True if backend == "ntk" else None)
        assert result["memory"] == json.loads(same)["memory"]
    everything_halted = all(json.loads(line)["halted"] for line in lines)
    assert statuses == [0 if everything_halted else 1] * 2


def test_watching_in_a_pipe_is_a_line_an_instruction(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([program, "--watch", "--delay", "60"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" +1  pc   0  x y 3 +y = 0 - 42 = -42 +to 3  smallest margin 0\.\d+", lines[1])
    assert re.fullmatch(r" +2  pc   3  zero end -1 +end = -1 - 0 = -1 +halts  smallest margin 0\.\d+", lines[2])
    # Beside JSON it goes to standard error.
    assert run_command([program, "--watch", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["halted"]
    assert "y = 0 - 42 = -42" in captured.err


def test_watching_in_a_terminal(program: str) -> None:
    leader, follower = pty.openpty()
    arguments = ["run", program, "--watch", "--delay", "0"]
    code = f"import sys; from ntk_ensembles.cli.main import main; sys.exit(main({arguments}))"
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=environment) as running:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 1 << 16)
            except OSError:  # its end, on Linux
                break
            if not part:
                break
            shown += part
        assert running.wait(timeout=60) == 0
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "instruction 1, micro-step 11" in text
    assert "instruction 2, micro-step 22" in text
    assert "pc   0  x y 3" in text
    assert "every micro-step agreed" in text
    # It is redrawn in place: the cursor goes up.
    assert b"\x1b[1A" in shown


def test_what_is_kept(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, figure, events = tmp_path / "t.jsonl", tmp_path / "f.png", tmp_path / "events"
    kept = ["--trace", str(trace), "--figure", str(figure), "--tensorboard", str(events)]
    result = run_json(capsys, program, *kept)
    head, *lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert head["labels"] == {"loop": 0, "end": 5, "x": 6, "y": 7, "zero": 8}
    assert len(lines) == 23
    assert lines[-1]["memory"] == result["memory"]
    assert min(line["margin"] for line in lines[1:]) == result["smallest_margin"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    found = EventAccumulator(str(events))
    found.Reload()
    assert [event.step for event in found.Scalars("execution/margin")] == list(range(1, 23))
    assert found.Images("execution/state")


def write_bad_files(tmp_path: Path) -> None:
    (tmp_path / "wrong.asm").write_text("1 2\n3 nowhere\n")
    (tmp_path / "wide.dec").write_text("1 2 999\n")
    (tmp_path / "long.dec").write_text("0 " * 40)
    (tmp_path / "endless.dec").write_text("0 " * 300)
    lines = {
        "json": "{",
        "list": "[1, 2]",
        "no_memory": '{"pc": 1}',
        "unknown": '{"memory": [1], "steps": 4}',
        "words": '{"memory": [1, 2.5]}',
        "bools": '{"memory": [1, true]}',
        "empty": '{"memory": []}',
        "pc": '{"memory": [1], "pc": 9}',
        "limit": '{"memory": [1], "max_instructions": -1}',
        "range": '{"memory": [1]}\n{"memory": [1, 400]}',
        "nothing": "\n",
    }
    for name, line in lines.items():
        (tmp_path / f"{name}.jsonl").write_text(line)


def bad(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    def batch(name: str) -> list[str]:
        return ["--batch", str(tmp_path / f"{name}.jsonl")]

    return {
        "no program": ([], "expected a PROGRAM"),
        "unknown program": (["cube"], "cube: no such file, and no program of the library (add, "),
        "assembly": ([str(tmp_path / "wrong.asm")], "wrong.asm:2:3: label 'nowhere' is not defined"),
        "wide word": ([str(tmp_path / "wide.dec")], "wide.dec: word 999 (cell 2) does not fit 8 bits"),
        "small machine": ([str(tmp_path / "long.dec"), "--cells", "32"], "a program of 40 words does not fit 32 cells"),
        "no machine": ([str(tmp_path / "endless.dec")], "the program needs 512 cells; a machine has at most 256"),
        "library": (["gcd", "--cells", "16"], "gcd.negative.asm:12:11: 'minus' is word 17 of a program for 16 cells"),
        "exact": (["sort", "--cells", "128"], "sort runs in exactly 64 cells"),
        "rule": (["sort", "--branch", "nonpositive"], "the library has sort for --branch negative alone"),
        "branch": (["gcd", "--branch", "zero"], "branch"),
        "cells": (["gcd", "--cells", "12"], "--cells 12: expected a power of two"),
        "no cells": (["gcd", "--cells", "0"], "--cells 0: expected an integer from 4 to 256"),
        "no word": (["gcd", "--word-bits", "0"], "--word-bits 0: expected an integer from 2 to 16"),
        "word": (["gcd", "--word-bits", "1"], "--word-bits 1: expected an integer from 2 to 16"),
        "short word": (
            ["gcd", "--cells", "32", "--word-bits", "4"],
            "--word-bits 4: expected at least 5: a word must hold an address",
        ),
        "instructions": (["gcd", "--max-instructions", "0"], "--max-instructions 0: expected an integer from 1"),
        "backend": (["gcd", "--backend", "gpu"], "--backend gpu: expected interpreter, ntk, or the directory of a run"),
        "no run": (["gcd", "--backend", str(tmp_path)], "--backend"),
        "label": (["gcd", "--set", "z=1"], "gcd: --set z=1: no label 'z': the labels are loop, "),
        "address": (["gcd", "--set", "99=1"], "address 99 is outside the machine's 32 cells"),
        "value": (["gcd", "--set", "x=300"], "--set x=300: word 300 does not fit 8 bits: expected -128 to 255"),
        "no value": (["gcd", "--set", "x"], "--set x: expected LABEL=VALUE"),
        "delay": (["gcd", "--watch", "--delay", "-1"], "--delay -1.0: expected seconds from 0 to 60"),
        "trace": (["gcd", "--trace", str(tmp_path / "none" / "t")], "expected a file, in a directory that exists"),
        "figure": (["gcd", "--figure", "f.pdf"], "--figure f.pdf: expected a name that ends in .png"),
        "interpreter": (
            ["gcd", "--trace", "t", "--backend", "interpreter"],
            "--trace: the interpreter has no micro-steps",
        ),
        "two watched": (["gcd", "add", "--watch"], "--watch shows one program"),
        "batch and program": (["gcd", *batch("range")], "--batch has programs of its own"),
        "no batch": (batch("none"), "cannot be read: no such file"),
        "json": (batch("json"), "json.jsonl:1: no JSON"),
        "list": (batch("list"), "expected an object with memory"),
        "no memory": (batch("no_memory"), "expected an object with memory"),
        "unknown key": (batch("unknown"), "expected an object with memory"),
        "fraction": (batch("words"), "memory: expected a list of integers"),
        "bool": (batch("bools"), "memory: expected a list of integers"),
        "empty": (batch("empty"), "memory: expected a list of integers, at least one"),
        "pc": (batch("pc"), "pc.jsonl:1: pc 9: expected an address from 0 to 3"),
        "limit": (batch("limit"), "max_instructions -1: expected an integer from 0"),
        "range": (batch("range"), "range.jsonl:2: word 400 (cell 1) does not fit 8 bits"),
        "no lines": (batch("nothing"), "has no lines"),
    }


@pytest.mark.parametrize("case", bad(Path()))
def test_bad_input_is_one_line_and_status_2(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bad_files(tmp_path)
    arguments, expected = bad(tmp_path)[case]
    assert run_command(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command(["--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in {program.name for program in library_programs()}:
        assert name in printed
    for words in (
        "--backend",
        "--max-instructions",
        "LABEL=VALUE",
        "A program of the library, or a file",
        "Exit status",
    ):
        assert words in printed


def test_it_is_a_subcommand(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", program, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["halted"]
    assert main(["run", program, "--set", "x"]) == 2
    assert capsys.readouterr().err.startswith("ntk-ensembles run: error: ")


def test_a_reader_that_has_seen_enough() -> None:
    script = "from ntk_ensembles.cli.main import main; import sys; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "run", "gcd", "--backend", "interpreter", "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ended.returncode == 1
    assert ended.stderr == ""
