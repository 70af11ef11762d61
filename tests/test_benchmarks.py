"""Benchmarks run, compare what is alike, and what pages quote of them is what the committed results have."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ntk_ensembles import Addition, EvaluationSet, LimitPrediction, Multiplication

ROOT = Path(__file__).parents[1]


def benchmark(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module(name)


tables = benchmark("tables")
PAGES: dict[str, str] = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in tables.PAGES}


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "<!-- table" in text])
def test_pages_have_the_tables_of_the_results(page: str) -> None:
    assert PAGES[page] == tables.filled(PAGES[page]), "run python benchmarks/tables.py"


def test_every_table_stands_once_and_is_closed() -> None:
    text = "".join(PAGES.values())
    begun = re.findall(r"<!-- table: ([\w-]+) -->\n\|", text)
    assert sorted(begun) == sorted(tables.TABLES)
    assert text.count("<!-- end of table -->") == len(begun) == text.count("<!-- table:")


def test_a_number_by_hand_or_of_older_results_is_seen() -> None:
    text = PAGES["README.md"]
    place = re.search(r"<!-- table: neural-tangents -->\n(.*?)<!-- end", text, re.DOTALL)
    assert place is not None
    # The first row: what the results have, by hand.
    row = json.loads((ROOT / "benchmarks/results/neural-tangents.json").read_text(encoding="utf-8"))["tasks"][0]
    cells = place[1].splitlines()[2].split(" | ")
    assert float(cells[1]) == pytest.approx(row["peer_single"], rel=0.05)
    assert float(cells[4].replace(",", "")) == pytest.approx(row["run"], rel=0.05)
    stale = text.replace(f" {cells[4]} |", " 7 |")
    assert stale != text
    assert tables.filled(stale) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(104656143.4, 2, "100,000,000"), (23.29, 2, "23"), (0.0064034, 2, "0.0064"), (9.96, 2, "10"), (12.5, 3, "12.5")],
)
def test_numbers_are_rounded(value: float, digits: int, text: str) -> None:
    assert tables.rounded(value, digits) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.066, "66 ms"), (1.5, "1.5 s"), (119, "120 s"), (600, "10 min"), (36000, "10 h")]
)
def test_durations_have_units(seconds: float, text: str) -> None:
    assert tables.duration(seconds) == text


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "benchmarks").glob("*.py"))])
def test_benchmarks_import(name: str) -> None:
    """What a benchmark takes from the package and from its neighbours exists."""
    assert benchmark(name).__doc__


def test_rivals_begin_with_the_same_function_and_reach_the_same_error() -> None:
    rivals = benchmark("rivals")
    contest = rivals.Contest(rivals.Case(Addition(2), 1024, 2, 1), torch.device("cpu"))
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    begin = contest.initial(inputs)
    assert torch.allclose(contest.published_network()(inputs), begin[0], atol=1e-5)
    weights = {"hidden": contest.initial.hidden[1], "readout": contest.initial.readout[1]}
    assert torch.allclose(contest.plain(weights, inputs), begin[1], atol=1e-5)
    assert torch.allclose(contest.one_hot(weights, contest.inputs), contest.initial(contest.inputs)[1], atol=1e-5)

    labels = Addition(2).templates.labels.float()
    first = (contest.initial(contest.inputs) - labels).square().sum((1, 2))
    ends = []
    for training in (
        contest.descent(),
        contest.first_order(contest.plain, 4.0),
        contest.first_order(contest.one_hot, 4.0),
    ):
        last = (training.stack(contest.inputs) - labels).square().sum((1, 2))
        assert training.reached
        assert (last / first).tolist() == pytest.approx(training.relative_errors, rel=0.05)
        assert (last <= 1e-6 * first).all()
        ends.append(training.stack(inputs))
    assert torch.allclose(ends[1], ends[2], atol=1e-3)
    # Another path to the same error is not quite the same function at this width.
    assert (ends[0] - ends[1]).square().mean() < 0.01 * (ends[0] - begin).square().mean()


def test_a_rival_that_does_not_arrive_is_known() -> None:
    rivals = benchmark("rivals")
    contest = rivals.Contest(rivals.Case(Addition(2), 256, 1, 1), torch.device("cpu"))
    slow = contest.first_order(contest.plain, 1e-3, steps_max=5)
    assert not slow.reached
    assert slow.steps == 5
    assert not contest.first_order(contest.plain, 100.0).reached


def test_members_needed_are_the_fewest() -> None:
    study = benchmark("members_needed")
    task = Multiplication(2)
    evaluation = EvaluationSet.sample(task, 100, 0)
    limit = LimitPrediction(task, evaluation)
    needed = study.reached(limit, "midpoint")["0.999"]
    assert limit.exact_match(needed, "midpoint") >= 0.999 > limit.exact_match(needed - 1, "midpoint")
    row = study.study(task)
    padded = study.padded_sign(task, evaluation, row["padding"])
    assert padded.exact_match(1 << 40, "sign") == pytest.approx(1)
    assert row["infinite_width"]["sign, padded"]["0.999"] > needed
    for found in row["at_width"]:
        assert abs(found["measured"]["0.999"] - found["predicted"]["0.999"]) <= 1
