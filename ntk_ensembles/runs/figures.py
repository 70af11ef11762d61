"""Figures of runs: of one, and of several side by side.

A `Chart` is one panel, small enough to be read on a telephone. Measured values are points, what is predicted for
infinite width is dashed, and for the members' own width solid.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs.bits import BitFailures, OutputHistogram, StandardisedDeviations
from ntk_ensembles.runs.convergence import ConvergenceRow
from ntk_ensembles.runs.reproduce import BitsRow
from ntk_ensembles.theory import DECODERS, Decoder, ExactMatchBand

# Okabe and Ito's palette without its yellow, which white paper swallows; the first two differ in lightness too.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_COLOURS: dict[Decoder, str] = dict(zip(DECODERS, _PALETTE, strict=False))
_SIZE, _DPI = (4.6, 4.2), 200
_DIGITS_ON_AN_AXIS = 42
"""Digits that fit beside each other between the first and the last value of a chart's horizontal axis."""
"""Inches of a chart, so that ten points are ten on a telephone, and dots to the inch of its PNG."""


@dataclass(frozen=True)
class Chart:
    """One panel, drawn when it is saved.

    Attributes:
        name: Name of its files, without an ending.
        title: Few words above it.
        caption: What it shows and how to read it, in sentences.
        draw: Function that draws it on axes.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], object]

    def figure(self, title: str) -> Figure:
        """Return it as a figure of its own, with a legend below.

        Args:
            title: Text above it.
        """
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        self.draw(axes)
        axes.set_title("\n".join(textwrap.wrap(plain(title), 50)), fontsize="medium")
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            long = max(map(len, labels)) > 24
            figure.legend(handles, labels, loc="outside lower center", ncols=1 if long else 2, fontsize="small")
        return figure

    def save(self, directory: Path) -> bytes:
        """Write it as PNG and SVG, and return the SVG.

        Args:
            directory: Where to write the files.

        Raises:
            SaveError: They cannot be written.
        """
        return save_figure(self.figure(self.title), directory, self.name)


def save_figure(figure: Figure, directory: Path, name: str) -> bytes:
    """Write a figure as PNG and SVG, and return the SVG.

    Args:
        figure: The figure.
        directory: Where to write the files.
        name: Name of the files, without an ending.

    Raises:
        SaveError: They cannot be written.
    """
    # Text as outlines, since the reader's fonts have other widths; and the same bytes for the same numbers.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        svg = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    png = directory / f"{name}.png"
    write_atomically(png, lambda part: figure.savefig(part, dpi=_DPI, format="png"), follow=False)
    write_atomically(directory / f"{name}.svg", lambda part: part.write_bytes(svg.getvalue()), follow=False)
    return svg.getvalue()


def plain(text: str) -> str:
    """Return text that Matplotlib takes for text and not for a formula.

    Args:
        text: Text to be drawn.
    """
    return text.replace("$", r"\$")


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
    figure.suptitle(plain(title), fontsize="medium")
    return figure


def convergence_charts(
    rows: Sequence[ConvergenceRow], bands: dict[Decoder, ExactMatchBand], prefix: str
) -> list[Chart]:
    """Return the panels of `convergence_figure` as charts.

    Args:
        rows: Convergence rows of one run, at least one.
        bands: Bands of each decoder at the same N.
        prefix: Beginning of the charts' names.
    """
    return [
        Chart(
            f"{prefix}exact-match",
            "Exact match against members",
            "Share of evaluation states whose every bit is decoded right, averaged over all disjoint groups of N "
            "members. The band holds 90% of single ensembles of infinitely wide members.",
            lambda axes: _draw_exact_match(axes, rows, bands),
        ),
        Chart(
            f"{prefix}deviation",
            "Deviation from the NTK mean",
            "Root mean square over states, bits and groups. A straight line of slope -1/2 is averaging alone; where it "
            "levels off stands the finite width's own bias, which more members do not remove.",
            lambda axes: _draw_deviation(axes, rows),
        ),
    ]


def _draw_exact_match(axes: Axes, rows: Sequence[ConvergenceRow], bands: Mapping[Decoder, ExactMatchBand]) -> None:
    sizes = [row["members"] for row in rows]
    for decoder in DECODERS:
        colour = _COLOURS[decoder]
        band = bands[decoder]
        low, high = band.quantiles[:, 0].tolist(), band.quantiles[:, -1].tolist()
        axes.fill_between(sizes, low, high, color=colour, alpha=0.18, linewidth=0)
        label = f"{decoder}, infinite width with its 90% band"
        axes.plot(sizes, band.mean.tolist(), "--", color=colour, linewidth=1, label=label)
        _draw_theory(axes, sizes, _at_width(rows, decoder), "-", colour, f"{decoder}, this width")
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


def _at_width(rows: Sequence[ConvergenceRow], decoder: Decoder) -> list[float | None]:
    """Return the exact match that the members' own width predicts for each row, if it does."""
    found = [row["finite_width_exact_match"] for row in rows]
    return [values[decoder] if values else None for values in found]


def _draw_deviation(axes: Axes, rows: Sequence[ConvergenceRow]) -> None:
    sizes = [row["members"] for row in rows]
    # On a logarithmic axis there is no 0.
    infinite = [row["predicted_rms_deviation"] or None for row in rows]
    label = "measured" if any(infinite) else "measured (theory at infinite width: 0)"
    _draw_theory(axes, sizes, infinite, "--", "black", "theory, infinite width")
    _draw_theory(axes, sizes, [row["finite_width_rms_deviation"] for row in rows], "-", "black", "theory, this width")
    axes.plot(sizes, [row["rms_deviation"] for row in rows], "o", color="black", markersize=4, label=label)
    _deviations_axis(axes)
    _members_axis(axes, sizes)


def _draw_theory(
    axes: Axes, places: Sequence[int], values: Sequence[float | None], style: str, colour: str, label: str | None = None
) -> None:
    """Draw a line of predictions with gaps where there is none; where there is none at all, no line."""
    known = [math.nan if value is None else value for value in values]
    if not all(map(math.isnan, known)):
        axes.plot(places, known, style, color=colour, linewidth=1, label=label)


def _members_axis(axes: Axes, sizes: Sequence[int]) -> None:
    _powers_axis(axes, sizes)
    axes.set_xlabel("members of the ensemble, N")


def _deviations_axis(axes: Axes) -> None:
    """Make the vertical axis one of deviations, on which every decade has numbers enough to be read."""
    axes.set(yscale="log", ylabel="RMS deviation from the NTK mean")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _powers_axis(axes: Axes, values: Sequence[int]) -> None:
    """Make the horizontal axis one of powers of two, with few enough numbers to be read."""
    axes.set_xscale("log", base=2)
    wanted = sorted(set(values))
    # A last number that is no power of two stands close to the one before.
    room = [n for i, n in enumerate(wanted) if i == len(wanted) - 1 or wanted[-1] >= 1.5 * n]
    step = next(step for step in itertools.count(1) if _have_room(room[::-1][::step], wanted))
    axes.set_xticks(room[::-1][::step], [f"{n:,}" for n in room[::-1][::step]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _have_room(shown: Sequence[int], values: Sequence[int]) -> bool:
    """Return whether numbers, the largest first, do not touch on a logarithmic axis over all values."""
    digits_an_octave = _DIGITS_ON_AN_AXIS / max(math.log2(values[-1] / values[0]), 1)
    return all(
        digits_an_octave * math.log2(large / small) >= (len(f"{large:,}") + len(f"{small:,}")) / 2
        for large, small in itertools.pairwise(shown)
    )


def output_chart(histogram: OutputHistogram, decoder: Decoder, members: int, prefix: str) -> Chart:
    """Return a chart of outputs about their thresholds.

    Args:
        histogram: What to draw.
        decoder: Decoder whose thresholds are meant.
        members: Members N of an ensemble.
        prefix: Beginning of the chart's name.
    """
    return Chart(
        f"{prefix}outputs-{decoder}-{members}",
        f"Outputs about the threshold: {decoder}, N = {members}",
        "Distance of the ensemble's output from the bit's threshold, which is its margin for 1-bits, and minus its "
        "margin for 0-bits: what lies on the wrong side of the line at 0 is read wrongly.",
        lambda axes: _draw_outputs(axes, histogram),
    )


def _draw_outputs(axes: Axes, histogram: OutputHistogram) -> None:
    edges = histogram.edges.tolist()
    middles = ((histogram.edges[1:] + histogram.edges[:-1]) / 2).tolist()
    for value, colour in enumerate(_PALETTE[:2]):
        measured = histogram.measured[value].tolist()
        axes.stairs(measured, edges, fill=True, color=colour, alpha=0.35, label=f"{value}-bits, measured")
        infinite = histogram.infinite[value].tolist()
        axes.plot(middles, infinite, "--", color=colour, linewidth=1.2, label=f"{value}-bits, infinite width")
        if histogram.at_width is not None:
            expected = histogram.at_width[value].tolist()
            axes.plot(middles, expected, color=colour, linewidth=1.2, label=f"{value}-bits, this width")
    axes.axvline(0, color="black", linewidth=1)
    top = max(float(values.max()) for values in histogram.measured)
    axes.set(yscale="log", ylim=(max(top, 1e-3) * 1e-5, max(top, 1e-3) * 3))
    axes.set(xlabel="output minus threshold (units of the labels)", ylabel="density of bits")
    axes.grid(alpha=0.3)


def standardised_chart(found: Sequence[StandardisedDeviations], whose: str, name: str) -> Chart:
    """Return a chart of standardised deviations over the standard normal density.

    Args:
        found: Deviations for several N, at least one.
        whose: Whose mean and spread they are taken from and over, in words.
        name: Name of the chart.
    """
    return Chart(
        name,
        f"Deviations standardised by {whose}",
        "Deviation from the predicted mean over the predicted standard deviation: the closer to the black curve, "
        "N(0, 1), the better the prediction. Bits of one ensemble share its members, so a single large "
        "ensemble need not follow it.",
        functools.partial(_draw_standardised, found=found),
    )


def _draw_standardised(axes: Axes, found: Sequence[StandardisedDeviations]) -> None:
    for one, colour, style in zip(found, _PALETTE, ("-", "--", ":"), strict=False):
        label = f"N = {one.members}: mean {one.mean:.2f}, SD {one.deviation:.2f}"
        axes.stairs(one.density.tolist(), one.edges.tolist(), color=colour, linestyle=style, linewidth=1.5, label=label)
    scores = torch.linspace(-5, 5, 201, dtype=torch.float64)
    normal = torch.exp(-scores.square() / 2) / (2 * torch.pi) ** 0.5
    axes.plot(scores.tolist(), normal.tolist(), color="black", linewidth=1, label="N(0, 1)")
    axes.set(xlabel="deviation in predicted standard deviations", ylabel="density", xlim=(-5, 5))
    axes.grid(alpha=0.3)


def failures_chart(failures: Mapping[Decoder, tuple[int, Sequence[BitFailures]]], prefix: str) -> Chart:
    """Return a chart of every bit's measured failure rate against the predicted one.

    Args:
        failures: N and the failures of every bit, for each decoder.
        prefix: Beginning of the chart's name.
    """
    return Chart(
        f"{prefix}failures",
        "Failure rate of each bit",
        "A point is a bit of the state. On the diagonal the measured rate is the predicted one (of the members' own "
        "width where that is known, otherwise of infinite width). Bits that never failed stand on the lower edge, and "
        "those that are expected to fail less often still on the left one.",
        lambda axes: _draw_failures(axes, failures),
    )


def _draw_failures(axes: Axes, failures: Mapping[Decoder, tuple[int, Sequence[BitFailures]]]) -> None:
    floor = min(1 / bits[0].readings for _, bits in failures.values()) / 2
    for decoder, (members, bits) in failures.items():
        predicted = [max(bit.predicted if bit.at_width is None else bit.at_width, floor) for bit in bits]
        measured = [max(bit.measured, floor) for bit in bits]
        marker = _MARKERS[DECODERS.index(decoder)]
        label = f"{decoder}, N = {members}"
        axes.plot(predicted, measured, marker, color=_COLOURS[decoder], markersize=5, alpha=0.6, label=label)
    axes.plot([floor, 1], [floor, 1], color="black", linewidth=1, label="as predicted")
    axes.set(xscale="log", yscale="log", xlabel="predicted share of wrong readings", ylabel="measured share")
    axes.set(xlim=(floor * 0.7, 1), ylim=(floor * 0.7, 1))
    axes.grid(alpha=0.3)


def seconds_chart(seconds: Sequence[tuple[str, Mapping[str, float]]]) -> Chart:
    """Return a chart of the time that each phase took.

    Args:
        seconds: Label of each run and the seconds of its phases by name.
    """
    return Chart(
        "time",
        "Time by phase",
        "Wall time in seconds. Draw, train and evaluate are summed over cohorts, and over processes that ran side by "
        "side.",
        lambda axes: _draw_seconds(axes, seconds),
    )


def _draw_seconds(axes: Axes, seconds: Sequence[tuple[str, Mapping[str, float]]]) -> None:
    phases = list(dict.fromkeys(phase for _, found in seconds for phase in found))
    places = range(len(seconds))
    left = [0.0] * len(seconds)
    for phase, colour, hatch in zip(phases, _PALETTE, ("", "//", "", "..", "", "xx", ""), strict=False):
        values = [found.get(phase, 0.0) for _, found in seconds]
        axes.barh(places, values, 0.6, left, color=colour, label=phase, hatch=hatch, edgecolor="white", linewidth=0.5)
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(places, [plain(label) for label, _ in seconds])
    axes.invert_yaxis()
    axes.set_xlabel("time (s)")
    if len(seconds) == 1:
        axes.set(ylim=(1, -1), yticks=[])
    axes.grid(axis="x", alpha=0.3)


@dataclass(frozen=True)
class Curve:
    """One run among several in a chart.

    Attributes:
        label: Words that tell it from the others.
        rows: Its convergence rows, at least one.
    """

    label: str
    rows: Sequence[ConvergenceRow]


def comparison_charts(curves: Sequence[Curve]) -> list[Chart]:
    """Return charts of exact match by each decoder, and of the deviation, against N for several runs.

    Args:
        curves: The runs, at least two.
    """
    return [
        Chart(
            f"exact-match-{decoder}" if decoder else "deviation",
            f"Exact match by {decoder}" if decoder else "Deviation from the NTK mean",
            "Points are measured; lines are the theory of each run's width (solid) and of infinite width (dashed).",
            functools.partial(_draw_compared, curves=curves, decoder=decoder),
        )
        for decoder in (*DECODERS, None)
    ]


def _draw_compared(axes: Axes, curves: Sequence[Curve], decoder: Decoder | None) -> None:
    """Draw the exact match of a decoder, or for None the deviation."""
    sizes = sorted({row["members"] for curve in curves for row in curve.rows})
    for i, curve in enumerate(curves):
        colour, marker = _PALETTE[i % len(_PALETTE)], _MARKERS[(i + i // len(_PALETTE)) % len(_MARKERS)]
        # Points that coincide stay visible as rings about each other.
        diameter = max(9 - 2 * i, 4)
        members = [row["members"] for row in curve.rows]
        if decoder is None:
            measured = [row["rms_deviation"] for row in curve.rows]
            infinite: Sequence[float | None] = [row["predicted_rms_deviation"] or None for row in curve.rows]
            finite = [row["finite_width_rms_deviation"] for row in curve.rows]
        else:
            measured = [row["exact_match"][decoder] for row in curve.rows]
            infinite = [row["predicted_exact_match"][decoder] for row in curve.rows]
            finite = _at_width(curve.rows, decoder)
        _draw_theory(axes, members, infinite, "--", colour)
        _draw_theory(axes, members, finite, "-", colour)
        axes.plot(
            members,
            measured,
            marker,
            color=colour,
            markerfacecolor="none",
            markersize=diameter,
            markeredgewidth=1.5,
            label=plain(curve.label),
        )
    _explain_lines(axes)
    if decoder is None:
        _deviations_axis(axes)
    else:
        axes.set(ylim=(-0.03, 1.03), ylabel="states decoded exactly")
    _members_axis(axes, sizes)


def _explain_lines(axes: Axes) -> None:
    """Add to the legend what solid and dashed lines of any colour are."""
    axes.plot([], [], color="grey", linewidth=1, label="theory, its width")
    axes.plot([], [], "--", color="grey", linewidth=1, label="theory, infinite width")


WidthRow: TypeAlias = tuple[int, Sequence[ConvergenceRow], float | None]
"""Width of a run, its convergence rows, and the RMS bias that theory predicts, if it does."""


def width_chart(groups: Sequence[tuple[str, Sequence[WidthRow]]]) -> Chart:
    """Return a chart of the deviation against the width, for runs that differ in nothing else.

    Args:
        groups: A label for each task and kind of members, and its runs, widths ascending.
    """
    return Chart(
        "width",
        "Deviation against width",
        "RMS deviation of single members and of the most members that all the runs have, with the theory of each width "
        "(solid) and of infinite width (dashed). Dotted: the bias of the mean, which is what remains of infinitely "
        "many members.",
        lambda axes: _draw_widths(axes, groups),
    )


def _draw_widths(axes: Axes, groups: Sequence[tuple[str, Sequence[WidthRow]]]) -> None:
    place = 0
    widths = [width for _, runs in groups for width, _, _ in runs]
    for label, runs in groups:
        common = set.intersection(*({row["members"] for row in rows} for _, rows, _ in runs))
        wheres = [width for width, _, _ in runs]
        before = f"{plain(label)}, " if len(groups) > 1 else ""
        for members in sorted({1, max(common)}):
            colour, marker = _PALETTE[place % len(_PALETTE)], _MARKERS[place % len(_MARKERS)]
            place += 1
            chosen = [next(row for row in rows if row["members"] == members) for _, rows, _ in runs]
            _draw_theory(axes, wheres, [row["predicted_rms_deviation"] or None for row in chosen], "--", colour)
            _draw_theory(axes, wheres, [row["finite_width_rms_deviation"] for row in chosen], "-", colour)
            measured = [row["rms_deviation"] for row in chosen]
            axes.plot(wheres, measured, marker, color=colour, markersize=5, label=f"{before}N = {members}")
        biases = [bias or None for _, _, bias in runs]
        _draw_theory(axes, wheres, biases, ":", "black", f"{before}bias (N → ∞), theory")
    _explain_lines(axes)
    _deviations_axis(axes)
    _powers_axis(axes, widths)
    axes.set_xlabel("hidden units of a member, n")


@dataclass(frozen=True)
class MembersNeeded:
    """How many members reach a target in one run; None where none that there are do.

    Attributes:
        measured: Smallest N of the trained ensembles.
        infinite: Smallest N by the theory of infinite width.
        at_width: Smallest N by the theory of the members' own width.
    """

    measured: int | None
    infinite: int | None
    at_width: int | None


def needed_charts(
    axis: str, sizes: Sequence[int], needed: Mapping[float, Mapping[Decoder, Sequence[MembersNeeded]]], name: str
) -> list[Chart]:
    """Return charts of the members needed against the size of the task, one for each target.

    Args:
        axis: What the size is, for the axis.
        sizes: Size of the task of each run, ascending.
        needed: For each share of states to be exact and each decoder, the members needed by each run.
        name: Beginning of the charts' names.
    """
    return [
        Chart(
            f"{name}-{100 * exact:g}",
            f"Members needed for {100 * exact:g}% exact match",
            "Smallest N from which on the exact match stays above the target: measured over groups of members "
            "(filled), predicted for the width of each run (open) and for infinite width (dashed). What no trained "
            "ensemble reached has no filled point.",
            functools.partial(_draw_needed, axis=axis, sizes=sizes, needed=by_decoder),
        )
        for exact, by_decoder in needed.items()
    ]


def _draw_needed(
    axes: Axes, axis: str, sizes: Sequence[int], needed: Mapping[Decoder, Sequence[MembersNeeded]]
) -> None:
    for decoder, found in needed.items():
        colour, marker = _COLOURS[decoder], _MARKERS[DECODERS.index(decoder)]
        for values, words, style, filled in (
            ([one.infinite for one in found], "infinite width", "--", colour),
            ([one.at_width for one in found], "its width", marker, "none"),
            ([one.measured for one in found], "measured", marker, colour),
        ):
            reached = [place for place, value in enumerate(values) if value is not None]
            if reached:
                axes.plot(
                    [sizes[place] for place in reached],
                    [value for value in values if value is not None],
                    style,
                    color=colour,
                    linewidth=1,
                    markerfacecolor=filled,
                    markersize=9 if filled == "none" else 5,
                    label=f"{decoder}, {words}",
                )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), max(1.2 * high, 12))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 2000 else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if len(set(sizes)) <= 8:
        axes.set_xticks(sorted(set(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=plain(axis), ylabel="members needed, N")
    axes.grid(alpha=0.3)


def median_passing(passings: Sequence[int | None]) -> float | None:
    """Return the median of members at which ensembles first reach a target; None if it is more than were tried.

    Args:
        passings: Members of each ensemble, None for more than were tried; at least one.
    """
    found = statistics.median(math.inf if value is None else value for value in passings)
    return None if math.isinf(found) else float(found)


_WAY_LABELS: dict[tuple[str, str], str] = {
    ("readout", "sign"): "sign, readout alone trained",
    ("both", "sign"): "sign, both layers trained",
    ("both", "midpoint"): "midpoint, both layers trained",
}


def reproduction_figure(
    rows: Sequence[BitsRow], published: Mapping[int, Mapping[float, int | None]], width: int
) -> Figure:
    """Return a figure of the members at which ensembles first reach each target, against the bits of a permutation.

    Args:
        rows: What was found for each number of bits, ascending, at least one.
        published: Published members of each target for every number of bits.
        width: Hidden units of the trained members.
    """
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    targets = list(rows[0]["ways"][0]["passings"])
    panels = figure.subplots(1, len(targets), sharey=True, squeeze=False)[0]
    for axes, target in zip(panels, targets, strict=True):
        _draw_passings(axes, rows, published, target, width)
        axes.set_title(f"{100 * float(target):g}% of inputs right for the first time", fontsize="medium")
    panels[0].set(ylabel="members of the ensemble, N", ylim=(0.8, 1.25 * panels[0].get_ylim()[1]))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _draw_passings(
    axes: Axes,
    rows: Sequence[BitsRow],
    published: Mapping[int, Mapping[float, int | None]],
    target: str,
    width: int,
) -> None:
    known = [(bits, value) for bits, found in published.items() if (value := found[float(target)]) is not None]
    places, values = zip(*known, strict=True)
    axes.plot(places, values, "X", color="black", markersize=6, label="published (width 50,000)")
    bits = [row["bits"] for row in rows]
    for i, (key, words) in enumerate(_WAY_LABELS.items()):
        colour, marker = _PALETTE[i], _MARKERS[i]
        ways = [next(way for way in row["ways"] if (way["layers"], way["decoder"]) == key) for row in rows]
        found = [way["passings"][target] for way in ways]
        _draw_theory(axes, bits, [median_passing(one["infinite_width"]) for one in found], "--", colour)
        at_width = [None if one["at_width"] is None else median_passing(one["at_width"]) for one in found]
        _draw_theory(axes, bits, at_width, "-", colour)
        measured = [(place, sorted(filter(None, one["measured"]))) for place, one in zip(bits, found, strict=True)]
        medians = [median_passing(one["measured"]) for one in found]
        drawn = [(place, m, v) for (place, v), m in zip(measured, medians, strict=True) if m is not None]
        axes.errorbar(
            [place for place, _, _ in drawn],
            [middle for _, middle, _ in drawn],
            [[middle - values[0] for _, middle, values in drawn], [values[-1] - middle for _, middle, values in drawn]],
            color=colour,
            fmt=marker,
            markersize=5,
            capsize=3,
            label=words,
        )
    axes.plot([], [], color="grey", linewidth=1, label=f"theory, width {width:,}")
    axes.plot([], [], "--", color="grey", linewidth=1, label="theory, infinite width")
    axes.set(yscale="log", xlabel="bits of the permutation, k")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
