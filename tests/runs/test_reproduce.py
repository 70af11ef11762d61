"""The published experiment again: its numbers, the counting of members, and what is trained, counted by hand."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import ntk_ensembles
from ntk_ensembles import EvaluationSet, LimitPrediction, Permutation, TemplatePredictor
from ntk_ensembles.ensemble import Recipe, predict, train_members
from ntk_ensembles.errors import OptionError
from ntk_ensembles.runs.figures import median_passing
from ntk_ensembles.runs.reproduce import TARGETS, ReproduceOptions, first_passings, published_passings, study
from ntk_ensembles.theory import deviation_root

PUBLISHED = Path(ntk_ensembles.__file__).parent / "runs" / "published" / "permutation_ensembles.csv"


def test_published_members() -> None:
    """As the paper's figure shows them."""
    found = published_passings()
    assert sorted(found) == list(range(2, 31))
    assert {k: found[k][0.999] for k in (10, 20, 30)} == {10: 129, 20: 254, 30: 318}
    assert {k: found[k][0.9] for k in (2, 3, 4, 10, 20, 30)} == {2: 1, 3: 2, 4: 10, 10: 69, 20: 117, 30: 175}
    assert [k for k in found if found[k][0.999] is None] == [k for k in range(6, 31) if k % 5]


def test_published_experiments_are_one_run() -> None:
    """The second is the first, continued."""
    curves: dict[tuple[str, str], dict[str, str]] = {}
    for row in csv.DictReader(PUBLISHED.read_text(encoding="utf-8").splitlines()):
        curves.setdefault((row["experiment"], row["k"]), {})[row["members"]] = row["exact_match"]
    common = sorted(int(k) for experiment, k in curves if experiment == "2")
    assert common == [2, 5, 10, 15, 20, 25, 30]
    for k in map(str, common):
        assert curves["1", k].items() <= curves["2", k].items()
    assert all(round(1000 * float(share), 9).is_integer() for curve in curves.values() for share in curve.values())


@pytest.mark.parametrize("members_max", [1, 40, 100])
def test_first_passings_by_hand(members_max: int) -> None:
    sequences, states, bits = 5, 4, 3
    rng = np.random.default_rng(3)
    next_states = rng.random((states, bits)) < 0.5
    mean = np.where(next_states, 0.25, -0.25) + 0.1
    members = (mean + rng.normal(size=(sequences, 100, states, bits))).astype(np.float32)
    counts = rng.multinomial(1000, [0.05, 0.05, 0.2, 0.7], size=sequences)
    thresholds = {"sign": np.zeros((states, bits)), "midpoint": np.full((states, bits), 0.1)}
    asked: list[list[int]] = [[] for _ in range(sequences)]

    def outputs(wanted: list[int], places: range) -> torch.Tensor:
        for sequence in wanted:
            asked[sequence] += places
        return torch.from_numpy(members[wanted][:, list(places)])

    found = first_passings(
        outputs,
        {decoder: torch.from_numpy(values) for decoder, values in thresholds.items()},  # type: ignore[misc]
        torch.from_numpy(next_states),
        torch.from_numpy(counts),
        members_max,
    )
    expected = {
        decoder: {
            target: [_first(members[s], counts[s], limits, next_states, target, members_max) for s in range(5)]
            for target in TARGETS
        }
        for decoder, limits in thresholds.items()
    }
    assert found == expected
    # The case has all kinds of answers, and a target that states of small weight do not decide.
    if members_max == 100:
        values = [value for by_target in expected.values() for firsts in by_target.values() for value in firsts]
        assert len(set(values)) > 8
        assert expected["midpoint"][0.9] != expected["midpoint"][0.999]
    for sequence, places in enumerate(asked):
        assert places == list(range(len(places)))
        last = [firsts[sequence] for by_target in expected.values() for firsts in by_target.values()]
        needed = members_max if None in last else max(value or 0 for value in last)
        assert needed <= len(places) <= min(members_max, needed + 32)


def _first(
    members: np.ndarray, counts: np.ndarray, limits: np.ndarray, next_states: np.ndarray, target: float, most: int
) -> int | None:
    for number in range(1, most + 1):
        mean = members[:number].astype(np.float64).mean(0)
        right = [((mean[state] > limits[state]) == next_states[state]).all() for state in range(len(counts))]
        if sum(int(count) for count, good in zip(counts, right, strict=True) if good) >= target * counts.sum():
            return number
    return None


def test_trained_ensembles_by_hand() -> None:
    """Two bits have one input; midpoint decodes it wrongly in some small members."""
    options = ReproduceOptions(width=256, sequences=100, members_max=5, seed=5)
    task = Permutation(2, ones=2)
    limit = LimitPrediction(task, EvaluationSet.sample(task, 1, 0), TemplatePredictor(task.templates))
    recipe = Recipe(limit.predictor.labels.float(), 256, seed=5)
    stack, _ = train_members(recipe, range(100 * 5), torch.device("cpu"))
    # Member s, s + 100, s + 200, … are those of sequence s.
    outputs = predict(stack, limit.inputs).double().view(5, 100, 2)
    means = outputs.cumsum(0) / torch.arange(1, 6)[:, None, None]
    right = (means > limit.thresholds["midpoint"][0]).all(2)
    expected = [int(right[:, sequence].int().argmax()) + 1 for sequence in range(100)]
    assert max(expected) > 1
    found = {(way["layers"], way["decoder"]): way["passings"] for way in study(2, options)["ways"]}
    assert found["both", "midpoint"]["0.9"]["measured"] == expected
    assert found["both", "midpoint"]["0.999"]["measured"] == expected


def test_members_that_do_not_converge_are_not_averaged() -> None:
    with pytest.raises(OptionError, match="expected a width at which all members converge"):
        study(2, ReproduceOptions(width=16, sequences=8, members_max=1, seed=5))


@pytest.mark.slow
def test_study_of_ten_bits() -> None:
    """The published numbers are the readout's, not those of both layers; theory.md's counts are the averages."""
    row = study(10, ReproduceOptions(width=1024, sequences=2, members_max=500))
    assert row["states"] == math.comb(10, 2)
    found = {(way["layers"], way["decoder"]): way["passings"] for way in row["ways"]}
    published = {"0.9": 69, "0.999": 129}
    for target, members in published.items():
        readout = [value for value in found["readout", "sign"][target]["infinite_width"] if value]
        both = [value or 500 for value in found["both", "sign"][target]["infinite_width"]]
        assert len(readout) == 200
        assert min(readout) < members < max(readout)
        assert members < np.quantile(both, 0.02)
        midpoint = found["both", "midpoint"][target]["infinite_width"]
        assert np.median(midpoint) == 1
        assert max(midpoint) <= 2
    averages = {key: passings["0.999"]["infinite_width_average"] for key, passings in found.items()}
    # Of states and bits that are equally hard, which (28) takes them for, it is 156 and 901.
    assert averages["readout", "sign"] == pytest.approx(156, abs=1)
    assert averages["both", "sign"] == pytest.approx(901, abs=2)
    # Fluctuations reach a target before the average does.
    assert (median_passing(found["readout", "sign"]["0.999"]["infinite_width"]) or 0) < 156


def test_root_of_the_covariance() -> None:
    task = Permutation(6, ones=2)
    predictor = TemplatePredictor(task.templates, layers="readout")
    matches = EvaluationSet.sample(task, 15, 0).matches
    root = deviation_root(predictor, matches).double()
    assert torch.allclose(root @ root.T, predictor.covariance(matches), atol=1e-6)


def test_small_width_has_no_prediction() -> None:
    row = study(10, ReproduceOptions(width=24, sequences=1, members_max=4))
    assert all(passings["at_width"] is None for way in row["ways"] for passings in way["passings"].values())


def test_median_counts_what_was_not_reached() -> None:
    assert median_passing([5, None, 7]) == 7
    assert median_passing([5, 8]) == 6.5
    assert median_passing([None, 5, None]) is None


@pytest.mark.parametrize(
    ("name", "value"), [("width", 0), ("sequences", 0), ("members_max", 1 << 15), ("seed", -1), ("sequences", 1001)]
)
def test_options_outside_their_range(name: str, value: int) -> None:
    with pytest.raises(OptionError) as caught:
        ReproduceOptions(**{name: value})
    assert caught.value.argument == name
