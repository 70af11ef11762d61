"""What docs/sbn.md shows is what works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from ntk_ensembles.cli.run import ExecutionOptions, run_command
from ntk_ensembles.computer import ProgramResult, assemble, library_programs
from ntk_ensembles.tasks import Machine

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "sbn.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", DOCUMENT, re.DOTALL)


def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith("ntk-ensembles run")]
    assert len(commands) >= 4
    for command in commands:
        assert run_command(command.split()[2:]) == 0, command
    assert (tmp_path / "gcd.png").is_file()
    assert "gcd = 12" in capsys.readouterr().out


def test_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [block for language, block in BLOCKS if language == "python"]
    exec(block, {})
    assert "y:gcd:" in capsys.readouterr().out


def test_the_json_line_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = [block for language, block in BLOCKS if language == "json"]
    path = tmp_path / "batch.jsonl"
    path.write_text(line)
    assert run_command(["--batch", str(path)]) == 0
    result = json.loads(capsys.readouterr().out)
    listed = re.findall(r"^\| (`.*?) \|", DOCUMENT[DOCUMENT.index("| key |") :], re.MULTILINE)[:6]
    assert [key.strip("`") for keys in listed for key in keys.split(", ")] == list(result)
    assert set(result) - {"memory", "pc", "halted"} <= set(ProgramResult.__dataclass_fields__)


def test_the_assembly_adds() -> None:
    (source,) = [block for language, block in BLOCKS if not language and "minus" in block]
    program = assemble(source)
    machine = Machine(program.cells)
    state, _ = machine.run(machine.load(program.words), 100)
    assert state.halted
    assert state.memory[program.address("y")] == 29 + 58


def test_the_library_table_is_complete() -> None:
    rows = re.findall(r"^\| `(\w+)` \|([^|\n]*)\|([^|\n]*)\| (\w+) \|([^|\n]*)\|$", DOCUMENT, re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted({program.name for program in library_programs()})
    for name, inputs, results, rules, cells in rows:
        variants = [program for program in library_programs() if program.name == name]
        branches = [branch for program in variants for branch in program.branches]
        assert rules == ("both" if len(branches) == 2 else branches[0])
        assert {str(program.cells) for program in variants} == set(re.findall(r"\d+", cells))
        assert all(("exactly" in cells) == program.exact for program in variants)
        for field in variants[0].inputs:
            assert re.search(rf"\b{field.label}\b", inputs), name
            assert field.text in inputs, name
        assert all(re.search(rf"\b{field.label}\b", results) for field in variants[0].results if field.count == 1), name


def test_every_option_is_explained() -> None:
    for option in ExecutionOptions.__dataclass_fields__:
        assert f"--{option.replace('_', '-')}" in DOCUMENT


def test_files_that_it_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", DOCUMENT) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
