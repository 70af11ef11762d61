"""A user's own task: any fault in it is one clear error, from every command."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ntk_ensembles.cli.main import main
from ntk_ensembles.tasks import EvaluationSet, TaskError, load_task_class

RULE110 = (Path(__file__).parents[2] / "examples" / "rule110.py").read_text(encoding="utf-8")


def own_task(directory: Path, old: str, new: str) -> str:
    assert old in RULE110
    path = directory / f"own{len(list(directory.iterdir()))}.py"
    path.write_text(RULE110.replace(old, new), encoding="utf-8")
    return f"{path}:Rule110"


def test_a_template_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = own_task(tmp_path, "ALIVE = [(1, 1, 0), ", "ALIVE = [")
    for command in ("certify", "validate"):
        status = main([command, "--task", spec, "--cells", "5", "--generations", "1"])
        assert status == (2 if command == "certify" else 1)
        printed = capsys.readouterr()
        text = " ".join((printed.err if command == "certify" else printed.out).split())
        assert "the output is " in text
        assert "from micro-step 1 on: set by none of group 'alive after 101', 'alive after 011'" in text
        assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return task_input[1]", "return task_input[2]", "num_micro_steps of input (16, 1) fails with IndexError"),
        ("return task_input[1]", "return -1", "num_micro_steps of input (16, 1) fails with ValueError: -1 micro-steps"),
        ("return task_input[1]", "return 1.5", "num_micro_steps of input (16, 1) fails with TypeError: 'float'"),
        (
            "generations: int = 32)",
            "generations: int = 32, rule: int = 110)",
            "has to keep its argument rule as an attribute",
        ),
        ('return fields["ring"]', 'return fields["rings"]', "read_output fails with KeyError: 'rings'"),
        ('{"ring": task_input[0]}', '{"ring": 99}', "initial_fields of input (16, 1) fails with ValueError: ring=99"),
        ("sets=[ring[cell]]", "sets=[ring[cells]]", "make_templates fails with NameError"),
        ("yield 1 << (self.cells - 1), ", "yield 1 // 0, ", "inputs fails with ZeroDivisionError"),
        ("self.layout = StateLayout(ring=cells)", "self.layout = StateLayout(ring=cells / 0)", "ZeroDivisionError"),
        ("ALIVE = [", "ALIVE = 1 // 0 + [", "ZeroDivisionError"),
    ],
)
def test_code_that_fails(old: str, new: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = own_task(tmp_path, old, new)
    for command in ("certify", "validate"):
        assert main([command, "--task", spec, "--cells", "5", "--generations", "1"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_where_it_fails_is_named(tmp_path: Path) -> None:
    spec = own_task(tmp_path, "return task_input[1]", "return task_input[2]")
    task = load_task_class(spec)(5, 1)  # type: ignore[call-arg]
    with pytest.raises(TaskError) as error:
        EvaluationSet.sample(task, 10, 0)
    line = RULE110.splitlines().index("        return task_input[1]") + 1
    assert str(error.value).endswith(f"own0.py, line {line})")


def test_a_right_task_is_validated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first inputs, as it does not list them; and all of them once it does."""
    spec = own_task(tmp_path, "ALIVE = [", "ALIVE = [")
    assert main(["validate", "--task", spec, "--cells", "6", "--generations", "3", "--inputs", "50"]) == 0
    assert "Not all inputs were run" in capsys.readouterr().out
    listed = (
        "    def all_inputs(self):\n        return [(ring, self.generations) for ring in range(1 << self.cells)]\n\n"
    )
    spec = own_task(tmp_path, "    # What it is evaluated on", f"{listed}    # What it is evaluated on")
    assert main(["validate", "--task", spec, "--cells", "6", "--generations", "3"]) == 0
    assert "Not all inputs were run" not in capsys.readouterr().out


def test_options_that_it_does_not_have() -> None:
    found = load_task_class("addition")
    with pytest.raises(ValueError, match="bit=3: expected an option of task 'addition': bits"):
        found.from_options({"bit": 3})
    assert next(found.from_options({"bits": 3}).inputs(random.Random(0))) == (0, 0)
