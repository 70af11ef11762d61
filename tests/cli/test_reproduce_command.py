"""`ntk-ensembles reproduce` as a user runs it, at a tiny size."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ntk_ensembles.cli.main import main

TINY = ["--width", "64", "--sequences", "2", "--members-max", "8"]


def test_results_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    assert main(["reproduce", "--bits", "3,2", *TINY, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"Results and figure in {out}" in printed
    assert "99.9%" in printed
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "members-needed.png",
        "members-needed.svg",
        "reproduction.json",
    ]
    results = json.loads((out / "reproduction.json").read_text(encoding="utf-8"))
    assert results["options"] == {"width": 64, "sequences": 2, "members_max": 8, "seed": 0}
    assert [row["bits"] for row in results["rows"]] == [2, 3]
    ways = [(way["layers"], way["decoder"]) for way in results["rows"][1]["ways"]]
    assert ways == [("readout", "sign"), ("both", "sign"), ("both", "midpoint")]
    for way in results["rows"][1]["ways"]:
        assert set(way["passings"]) == {"0.9", "0.999"}
        assert len(way["passings"]["0.9"]["measured"]) == 2
    assert ElementTree.parse(out / "members-needed.svg").getroot().tag.endswith("svg")
    assert (out / "members-needed.png").read_bytes().startswith(b"\x89PNG")


def test_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    command = ["reproduce", *TINY, "--out", str(out), "--bits"]
    assert main([*command, "2"]) == 0
    first = json.loads((out / "reproduction.json").read_text(encoding="utf-8"))["rows"]
    assert main([*command, "2,3"]) == 0
    both = json.loads((out / "reproduction.json").read_text(encoding="utf-8"))["rows"]
    # With the seconds that it took, so it was not computed again.
    assert both[:1] == first
    capsys.readouterr()
    assert main(["reproduce", *TINY, "--seed", "1", "--bits", "2", "--out", str(out)]) == 2
    assert "expected the same options, or a new directory" in capsys.readouterr().err
    assert json.loads((out / "reproduction.json").read_text(encoding="utf-8"))["rows"] == both
    (out / "reproduction.json").write_text('{"rows": 3', encoding="utf-8")
    assert main([*command, "2"]) == 2
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "1"], "--bits 1: expected an integer from 2 to 64"),
        (["--bits", "5,65"], "--bits 65: expected an integer from 2 to 64"),
        (["--width", "0"], "--width 0: expected an integer from 1 to"),
        (["--sequences", "0"], "--sequences 0: expected an integer from 1 to 1000"),
        (["--members-max", "many"], "--members-max many: expected an integer"),
        (["--bits", "two"], "--bits two: expected integers separated by commas"),
        (["--sequence", "2"], "--sequence"),
    ],
)
def test_bad_options(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_directory_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["reproduce", *TINY, "--bits", "2", "--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
