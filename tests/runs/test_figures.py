"""Figures as they are drawn: what is written on them can be read."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ntk_ensembles.runs.figures import convergence_charts, convergence_figure
from ntk_ensembles.theory import DECODERS, ExactMatchBand


def row(members: int) -> Any:
    """Return a row without predictions."""
    shares = dict.fromkeys(DECODERS, 0.5)
    measured = {"exact_match": shares, "exact_match_spread": dict.fromkeys(DECODERS), "bit_accuracy": shares}
    predicted = {
        f"{kind}_{key}": None for kind in ("predicted", "finite_width") for key in ("exact_match", "bit_accuracy")
    }
    rms = {"predicted_rms_deviation": None, "finite_width_rms_deviation": None, "rms_deviation": 0.1}
    return {"members": members, "execution_match": None, **measured, **predicted, **rms}


@pytest.mark.parametrize("octaves", [0, 1, 3, 9, 10, 11, 13, 16, 20])
@pytest.mark.parametrize("last", ["a power of two", 1.1, 1.5, 1.53, 1.9])
def test_numbers_of_members_do_not_touch(octaves: int, last: Any) -> None:
    sizes = [2**j for j in range(octaves + 1)]
    sizes += [] if isinstance(last, str) else [round(sizes[-1] * last)]
    rows = [row(n) for n in sorted(set(sizes))]
    half = torch.full((len(rows),), 0.5, dtype=torch.float64)
    band = ExactMatchBand(tuple(r["members"] for r in rows), half, (0.05, 0.95), half[:, None].expand(-1, 2))
    bands = dict.fromkeys(DECODERS, band)
    figures = [convergence_figure(rows, bands, ""), *(c.figure("") for c in convergence_charts(rows, bands, ""))]
    for figure in figures:
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        for axes in figure.axes:
            labels = [label for label in axes.get_xticklabels() if label.get_text()]
            assert labels[0].get_text() == f"{max(sizes):,}"
            boxes = sorted((label.get_window_extent(renderer) for label in labels), key=lambda box: box.x0)
            assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
