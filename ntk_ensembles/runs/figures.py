"""Figures of a run."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ntk_ensembles.runs.convergence import ConvergenceRow
from ntk_ensembles.theory import DECODERS, Decoder, ExactMatchBand

# The first two of Okabe and Ito's palette that differ in lightness too.
_COLOURS: dict[Decoder, str] = {"midpoint": "#0072B2", "sign": "#D55E00"}


def convergence_figure(rows: Sequence[ConvergenceRow], bands: dict[Decoder, ExactMatchBand], title: str) -> Figure:
    """Return a figure of exact match and deviation against the number of members, measured over theory.

    Args:
        rows: Convergence rows of one run, at least one. Infinite width is dashed, the members' own width solid.
        bands: Bands of each decoder at the same N.
        title: Text above both panels.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    exact, deviation = figure.subplots(1, 2)
    _draw_exact_match(exact, rows, bands)
    _draw_deviation(deviation, rows)
    exact.legend(fontsize="small", loc="best")
    deviation.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure


def convergence_panels(
    rows: Sequence[ConvergenceRow], bands: dict[Decoder, ExactMatchBand], title: str
) -> dict[str, Figure]:
    """Return the panels of `convergence_figure` as figures of their own, by name, to be read in a narrow column.

    Args:
        rows: Convergence rows of one run, at least one.
        bands: Bands of each decoder at the same N.
        title: Text above each.
    """
    panels = {}
    for name in ("exact match", "RMS deviation"):
        figure = panels[name] = Figure(figsize=(5, 5.2), layout="constrained")
        axes = figure.subplots()
        if name == "exact match":
            _draw_exact_match(axes, rows, bands)
        else:
            _draw_deviation(axes, rows)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize="small")
        figure.suptitle("\n".join(textwrap.wrap(title, 50)), fontsize="medium")
    return panels


def _draw_exact_match(axes: Axes, rows: Sequence[ConvergenceRow], bands: Mapping[Decoder, ExactMatchBand]) -> None:
    sizes = [row["members"] for row in rows]
    for decoder in DECODERS:
        colour = _COLOURS[decoder]
        band = bands[decoder]
        low, high = band.quantiles[:, 0].tolist(), band.quantiles[:, -1].tolist()
        axes.fill_between(sizes, low, high, color=colour, alpha=0.18, linewidth=0)
        label = f"{decoder}, infinite width with its 90% band"
        axes.plot(sizes, band.mean.tolist(), "--", color=colour, linewidth=1, label=label)
        at_width = [row["finite_width_exact_match"] for row in rows]
        if all(at_width):
            shares = [values[decoder] for values in at_width if values]
            axes.plot(sizes, shares, color=colour, linewidth=1, label=f"{decoder}, this width")
        axes.errorbar(
            sizes,
            [row["exact_match"][decoder] for row in rows],
            [row["exact_match_spread"][decoder] or 0 for row in rows],
            color=colour,
            fmt="o",
            markersize=4,
            capsize=2,
            label=f"{decoder}, measured (bars: spread over groups)",
        )
    axes.set(ylim=(-0.03, 1.03), ylabel="states decoded exactly")
    _members_axis(axes, sizes)


def _draw_deviation(axes: Axes, rows: Sequence[ConvergenceRow]) -> None:
    sizes = [row["members"] for row in rows]
    predicted = [row["predicted_rms_deviation"] for row in rows]
    label = "measured (theory at infinite width: 0)"
    if any(predicted):
        axes.plot(sizes, predicted, "--", color="black", linewidth=1, label="theory, infinite width")
        label = "measured"
    finite = [row["finite_width_rms_deviation"] for row in rows]
    if None not in finite:
        axes.plot(sizes, [value or 0.0 for value in finite], color="black", linewidth=1, label="theory, this width")
    axes.plot(sizes, [row["rms_deviation"] for row in rows], "o", color="black", markersize=4, label=label)
    axes.set(yscale="log", ylabel="RMS deviation from the NTK mean")
    _members_axis(axes, sizes)


def _members_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("members of the ensemble, N")
    axes.grid(alpha=0.3)
