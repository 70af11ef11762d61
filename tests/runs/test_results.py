"""The final table says what the results say."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ntk_ensembles.runs.results import exact_from, print_report


def row(members: int, midpoint: float) -> dict[str, Any]:
    both = {"midpoint": midpoint, "sign": 0.00001}
    return {
        "members": members,
        "exact_match": both,
        "predicted_exact_match": {"midpoint": 0.999999, "sign": 0.0},
        "execution_match": None,
        "rms_deviation": 0.5,
        "predicted_rms_deviation": 0.25,
    }


@pytest.mark.parametrize(
    ("shares", "expected"),
    [([1, 1, 1], 1), ([0.5, 1, 1], 2), ([1, 0.9, 1], 4), ([1, 1, 0.9], None), ([], None)],
)
def test_exact_from(shares: list[float], expected: int | None) -> None:
    assert exact_from([row(1 << i, share) for i, share in enumerate(shares)]) == expected


def test_it_never_rounds_to_all_or_none_and_names_failures() -> None:
    seconds = {"init": 1.0, "train": 2.0, "evaluate": 3.0, "startup": 0.5, "total": 6.0}
    training = {"not_converged": [3, 5], "seconds": seconds, "steps_max": 50}
    training |= {"relative_loss_max": None, "peak_memory_bytes": 1 << 30}
    text = StringIO()
    results = {"members": 8, "convergence": [row(1, 0.5), row(2, 1.0)], "training": training}
    print_report(results, Path("here"), Console(file=text, width=120))
    printed = " ".join(text.getvalue().split())
    assert "50% (<100%)" in printed
    assert ">0% (0%)" in printed
    assert "exact by midpoint from N = 2 on" in printed
    assert "2 of 8 members did not converge" in printed
    assert "3, 5" in printed
    assert "not finite" in printed
    assert "peak memory 1.00 GiB" in printed
