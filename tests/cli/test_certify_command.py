"""`ntk-ensembles certify`, and tasks from a user's own file, as a user runs them."""

import json
import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ntk_ensembles.cli.main import main
from ntk_ensembles.cli.train import train_command
from ntk_ensembles.tasks import Addition, EvaluationSet, load_task_class
from ntk_ensembles.theory import certify_width

ROOT = Path(__file__).parents[2]
RULE110 = f"{ROOT}/examples/rule110.py:Rule110"
SMALL = ["--evaluation-states", "50"]


def certificate(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict:  # type: ignore[type-arg]
    assert main(["certify", *arguments, *SMALL, "--json"]) == status
    printed = capsys.readouterr().out
    found: dict = json.loads(printed)  # type: ignore[type-arg]
    return found


def test_addition(capsys: pytest.CaptureFixture[str]) -> None:
    found = certificate(capsys, "--task", "addition", "--bits", "3")
    assert (found["templates"], found["state_bits"]) == (12, 9)
    # Each of three positions adds or carries, and each of three carries moves or stays.
    assert found["num_matches"]["all_states"] == {"max": 6, "max_attained": 6}
    assert found["num_matches"]["sampled"]["max"] <= found["num_matches"]["reachable"]["max"] <= 6
    midpoint = found["decoders"]["midpoint"]
    assert midpoint["all_states"]["exact"] is True
    counts = midpoint["members"]
    assert 1 <= counts["one_reachable_state"] <= counts["one_state"] < counts["all_states"]
    looser = certificate(capsys, "--task", "addition", "--bits", "3", "--delta", "0.1")
    assert looser["decoders"]["midpoint"]["members"]["all_states"] < counts["all_states"]


def test_the_sign_rule_that_cannot_be_exact_names_bit_group_and_padding(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["certify", "--task", "multiplication", "--bits", "3", "--decode", "sign", *SMALL]
    assert main(arguments) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "sign fails at bit shift[0]" in printed
    assert "of group 'skip addition'" in printed
    assert "sign is exact with --padding " in printed
    found = certificate(capsys, "--task", "multiplication", "--bits", "3", "--decode", "sign", status=1)
    sign = found["decoders"]["sign"]
    assert sign["all_states"]["exact"] is False
    assert sign["padding"]["all_states"] >= sign["padding"]["reachable"] >= 0
    assert "midpoint" not in found["decoders"]


@pytest.mark.parametrize("layers", ["both", "readout"])
def test_the_padding_that_is_asked_for_is_enough(layers: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "multiplication", "--bits", "3", "--decode", "sign", "--layers", layers]
    needed = certificate(capsys, *arguments, status=1)["decoders"]["sign"]["padding"]["all_states"]
    assert needed > 0
    found = certificate(capsys, *arguments, "--padding", str(needed))
    assert (found["templates"], found["padding"], found["layers"]) == (51, needed, layers)
    assert found["decoders"]["sign"]["all_states"]["exact"] is True
    certificate(capsys, *arguments, "--padding", str(needed - 1), status=1)
    assert main(["certify", *arguments, "--padding", str(needed), *SMALL]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"k = 51 templates and {needed} of padding" in printed
    assert ("the readout alone trained" in printed) == (layers == "readout")
    assert "sign is exact with" not in printed


def test_corrected_labels_of_the_readout_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--task", "addition", "--bits", "3", "--width", "500", "--layers", "readout"]
    assert main(["certify", *arguments, "--labels", "corrected"]) == 2
    assert "--labels corrected: expected plain where the readout alone is trained" in capsys.readouterr().err


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "--task", "sbn", "--cells", "4", "--word-bits", "3", *SMALL]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("proven", "seen on 50 sampled states", "union bound", "does not cover what a finite width adds"):
        assert words in printed


def test_a_width_is_estimated_beside_the_proofs(capsys: pytest.CaptureFixture[str]) -> None:
    addition = ["--task", "addition", "--bits", "3"]
    found = certificate(capsys, *addition, "--width", "400", "--init", "antisymmetric", "--labels", "corrected")
    task = Addition(bits=3)
    evaluation = EvaluationSet.sample(task, 50, 0)
    expected = certify_width(task, 400, antisymmetric=True, labels="corrected", evaluation=evaluation)
    assert found["at_width"] == expected
    assert "at_width" not in certificate(capsys, *addition)
    assert main(["certify", *addition, *SMALL, "--width", "20"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "estimated at width 20 (gaussian, plain labels)",
        "not a proof",
        "The width is too small: below width",
    ):
        assert words in printed
    assert main(["certify", *addition, "--width", "0"]) == 2
    assert "--width 0: expected" in capsys.readouterr().err


def test_evaluation_states_are_sampled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    inputs = Addition.inputs

    def counted(task: Addition, generator: random.Random) -> Iterator[tuple[int, int]]:
        asked.append(1)
        return inputs(task, generator)

    monkeypatch.setattr(Addition, "inputs", counted)
    for width in ([], ["--width", "400"]):
        asked.clear()
        assert main(["certify", "--task", "addition", "--bits", "3", *SMALL, *width, "--decode", "midpoint"]) == 0
        # Beside them, the inputs that show in which bits trajectories begin: for their names, and for the bounds.
        assert len(asked) == 3 + bool(width)


def test_a_users_own_task(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = certificate(capsys, "--task", RULE110, "--cells", "6", "--generations", "4")
    assert found["task"] == {"name": "rule110", "cells": 6, "generations": 4}
    assert (found["templates"], found["fan_in"]["max"]) == (30, 5)
    small = ["--width", "1024", "--ensemble", "16", "--evaluation-states", "20", "--tolerance", "1e-4"]
    assert train_command(["--task", RULE110, "--cells", "6", *small, "--out", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"]["name"] == "rule110"
    picture = tmp_path / "rule110.png"
    command = ["rule110.py", str(tmp_path / "run"), "--generations", "12", "--out", str(picture)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(f"{ROOT}/examples/rule110.py", run_name="__main__")
    assert "generation 12 is exactly Rule 110's" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rule_110_is_rule_110() -> None:
    """Against the rule's number: bit 4·left + 2·cell + right of 110 is the next cell."""
    task = load_task_class(RULE110)(cells=7, generations=3)
    for start in range(1 << 7):
        ring = [start >> cell & 1 for cell in range(7)]
        for _ in range(3):
            ring = [110 >> (4 * ring[i - 1] + 2 * ring[i] + ring[(i + 1) % 7]) & 1 for i in range(7)]
        assert task.reference((start, 3)) == sum(value << cell for cell, value in enumerate(ring))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("subtraction", "expected one of permutation, addition, multiplication, sbn"),
        ("nowhere.py:Task", "there is no file nowhere.py"),
        (f"{ROOT}/examples/rule110.py:Rule30", "expected a class Rule30"),
        (f"{ROOT}/train.py:sys", "expected a class sys"),
    ],
)
def test_a_task_that_is_not_there(word: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "--task", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_file_that_fails_and_a_clash_of_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    clash = tmp_path / "clash.py"
    text = (ROOT / "examples" / "rule110.py").read_text(encoding="utf-8")
    clash.write_text(text.replace("generations: int = 32", "delta: int = 32").replace("generations", "delta"))
    for word, says in ((f"{broken}:Task", "ZeroDivisionError"), (f"{clash}:Rule110", "options delta")):
        assert main(["certify", "--task", word]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_delta_out_of_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "--task", "addition", "--delta", "2"]) == 2
    assert "--delta 2.0: expected a number between 0 and 1" in capsys.readouterr().err
