"""What a run shows of itself while it goes on and when it has ended: charts for TensorBoard and loggers, and figures.

Everything is a function of the members that have finished, in the order of their indices. So a run that was resumed,
spread over processes or merged ends with the charts of one that was not. Where only sums of deviations are kept, a
session has those of the members that it has trained itself: charts against N have the points that follow from these,
and beyond them at the end those of the rows of results.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from ntk_ensembles.console import TextTable
from ntk_ensembles.ensemble.network import one_thread
from ntk_ensembles.events import EventFile
from ntk_ensembles.files import SaveError, write_atomically
from ntk_ensembles.runs.bits import StandardisedDeviations, bit_variance
from ntk_ensembles.runs.certificate import describe_in_short
from ntk_ensembles.runs.convergence import ConvergenceRow, ensemble_sizes
from ntk_ensembles.runs.options import Experiment
from ntk_ensembles.runs.results import Results, print_report, print_training
from ntk_ensembles.runs.run import Run
from ntk_ensembles.runs.store import MemberResults
from ntk_ensembles.theory import (
    DECODERS,
    TIE,
    Decoder,
    ExactMatchBand,
    Prediction,
    bit_error_probability,
    decode,
    margins,
)

_SECONDS_BETWEEN_WRITES = 5.0
_SHARE_OF_TIME = 0.03
"""Most of a session's time that writing between cohorts may take."""

_STEPS_AN_OCTAVE = 100
"""Points of a logarithmic chart from N to 2N. TensorBoard smooths over a few points, which would bend N = 1, 2, 4."""

_POINTS_A_STEP = 10
"""Points from one step of training to the next, for the same reason: three or four steps are all there are."""

_POINTS_MAX = 1000
"""Points that TensorBoard keeps of a chart."""

_EVERY_N_MAX = 1024
"""Largest ensemble up to which every N has a point. From there on every second one has, from twice as many every
fourth, and so on: a point takes a thousandth of a second, and TensorBoard shows no more of them."""

_CERTAIN_SCORE = 9.0
"""Margin in standard deviations from which a bit is never wrong: its chance is 1e-19."""

_BINS = 100

_KINDS = {"": "", "predicted_": ", infinite width", "finite_width_": ", this width"}
"""What the names of one kind of value begin with in rows of results, and how they end on charts."""

_FINAL_METRICS = (
    "RMS deviation/measured",
    *(f"{name}/{d}" for name in ("exact from N on", "exact match", "bit accuracy") for d in DECODERS),
)
"""Charts whose last values tell how a run has ended; TensorBoard shows the first five at first."""

_WIDTHS = "(, (infinite|this) width)?$"
_CHARTS = {
    f"Convergence against {_STEPS_AN_OCTAVE} log2 N": {
        **{
            f"exact match, {decoder} (log2 N)": f"exact match by {_STEPS_AN_OCTAVE} log2 N/{decoder}{_WIDTHS}"
            for decoder in DECODERS
        },
        "log10 of the RMS deviation (log2 N)": f"log10 RMS deviation by {_STEPS_AN_OCTAVE} log2 N/.*",
    },
    "Convergence against N": {
        **{
            f"{name}, {decoder}": f"{name}/{decoder}{_WIDTHS}"
            for name in ("exact match", "bit accuracy")
            for decoder in DECODERS
        },
        "RMS deviation from the NTK mean": "RMS deviation/.*",
    },
    "Training": {
        f"log10 of the relative loss by {_POINTS_A_STEP} step": f"log10 training loss by {_POINTS_A_STEP} step/.*"
    },
}
"""Patterns of the series in each chart of the Custom Scalars tab. The same for every run, as TensorBoard adds those of
all runs up: a series that a run does not have is left out by itself."""


@runtime_checkable
class MetricLogger(Protocol):
    """What a dashboard needs of a Lightning logger."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take the values of metrics at a step."""

    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Take the run's options."""

    def save(self) -> None:
        """Write what was taken."""


class Dashboard:
    """The charts and figures of one run.

    Charts against N are of the mean of the first N members, in the order of their indices, without those that did not
    converge, as soon as all members before have finished. Every N up to 1,024 has a point, every second one up to
    2,048, every fourth up to 4,096 and so on, and the last. Where only sums of deviations are kept, these are the N up
    to the first member of another process or of an earlier session. Beyond them there are at the end the rows of
    results, of N = 2^j and of all members, which are means over groups. Histograms are of the former alone.

    Args:
        run: The run.
        loggers: Loggers that get the options and the charts against N too.

    Attributes:
        directory: Directory of the run.
        events: What TensorBoard is shown; written now and then, and at the end.
    """

    def __init__(self, run: Run, loggers: Sequence[MetricLogger] = ()) -> None:
        self.events = EventFile(run.directory)
        self.directory = run.directory
        self._run = run
        self._experiment = run.experiment
        self._loggers = loggers
        self._curves: _Curves | None = None
        self._losses: list[list[float]] = []
        self._next = run.experiment.planned.start
        self._members_of: dict[str, list[int]] = {}
        self._all_bands: dict[Decoder, ExactMatchBand] = {}
        self._write_at = time.monotonic() + _SECONDS_BETWEEN_WRITES
        self._failed: Exception | None = None

    def cohort_done(self, members: MemberResults) -> None:
        """Show members that have just been finished, once all members before them have.

        Args:
            members: Results of a cohort, which is saved.
        """
        try:
            if int(members.indices[0]) == self._next:
                self._take(members)
        except Exception as error:
            self._failed = error
        self.catch_up()

    def catch_up(self) -> None:
        """Show what other processes or an earlier session have finished, if it is time to write again."""
        if self._failed or time.monotonic() < self._write_at:
            return
        started_at = time.monotonic()
        try:
            self._take_stored()
            # When all are there the end follows, and shows them.
            if self._curves and self._curves.members and self._next < self._experiment.planned.stop:
                self._picture(self._curves.rows)
                self._write(finished=False)
        except SaveError:
            # The disk may have room again at the end, which says so if not.
            pass
        except Exception as error:
            self._failed = error
        took = time.monotonic() - started_at
        self._write_at = time.monotonic() + max(_SECONDS_BETWEEN_WRITES, took / _SHARE_OF_TIME)

    def conclude(self, members: MemberResults, results: Results, console: Console, started_at: float) -> None:
        """Print results that have been written, finish the dashboard, and write what all of it has taken.

        Args:
            members: All members so far; without deviations where only their sums are kept.
            results: The results that follow from them.
            console: Console to print on.
            started_at: When the user began to wait, as from `time.time`.
        """
        print_report(results, console)
        failures = self.finish(members, results)
        try:
            self._run.write_results(results, started_at)
        except SaveError as error:
            failures.append(str(error))
        print_training(results, self.directory, console)
        for line in failures:
            console.print(f"warning: {line}", style="yellow", highlight=False, markup=False, soft_wrap=True)

    def finish(self, members: MemberResults, results: Results) -> list[str]:
        """Show all members and write everything; whatever becomes of it, the results are there.

        Args:
            members: All members so far; without deviations where only their sums are kept.
            results: The results that follow from them.

        Returns:
            What could not be written, a line for each.
        """
        failures = []
        rows = results["convergence"]
        steps: tuple[Callable[[], None], ...] = (lambda: self._draw(rows), lambda: self._chart(members, rows))
        for draw in steps:
            try:
                draw()
            except SaveError as error:
                failures.append(str(error))
            except Exception as error:
                # Whatever a library makes of a machine without fonts, say: a picture is not worth a run.
                failures.append(f"{self.directory}: the figures cannot be drawn ({type(error).__name__}: {error})")
        return failures

    def _draw(self, rows: Sequence[ConvergenceRow]) -> None:
        # A figure without rows would be empty.
        if not rows:
            return
        self._picture(rows)
        # Matplotlib takes a while to import.
        from ntk_ensembles.runs.figures import convergence_figure

        figure = convergence_figure(rows, self._bands(rows), self._title(rows))
        path = self.directory / "figures" / "convergence.png"
        write_atomically(path, lambda part: figure.savefig(part, dpi=150, format="png"), follow=False)

    def _chart(self, members: MemberResults, rows: Sequence[ConvergenceRow]) -> None:
        if self._failed:
            raise self._failed
        self._take(members, past_gaps=True)
        assert self._curves is not None
        for values in self._curves.add_last():
            self._log(values)
        if members.deviations is None:
            for row in rows:
                if row["members"] > self._curves.members:
                    self._log(self._curves.add_row(row))
        self._write(finished=True)

    def _take_stored(self) -> None:
        """Take the members that follow the last one from files, where these have their deviations."""
        if not self._experiment.keeps_deviations:
            return
        files = self._run.store.result_files()
        for path in files:
            if path.name not in self._members_of:
                self._members_of[path.name] = self._run.store.members_of(path)
        owners = {index: path for path in files for index in self._members_of[path.name]}
        while self._next in owners:
            members = self._run.store.load_file(owners[self._next], *self._experiment.limit.mean.shape)
            if members.deviations is None:
                break
            self._take(members)

    @one_thread()
    def _take(self, members: MemberResults, *, past_gaps: bool = False) -> None:
        """Add members to the charts, in order; past one that is not finished only if nothing more will come."""
        if self._curves is None:
            self._curves = _Curves(self._experiment, self.events)
            for logger in self._loggers:
                logger.log_hyperparams(_hyperparameters(self._experiment))
        losses = torch.split(members.losses, members.loss_counts.tolist())
        rows = []
        for row, index in enumerate(members.indices.tolist()):
            if index < self._next:
                continue
            if index > self._next and not past_gaps:
                break
            self._next = index + 1
            self._losses.append(losses[row].tolist())
            if members.converged[row]:
                rows.append(row)
        if members.deviations is not None:
            for values in self._curves.add(members.deviations[rows]):
                self._log(values)

    def _log(self, values: dict[str, float]) -> None:
        assert self._curves is not None
        for logger in self._loggers:
            logger.log_metrics(values, self._curves.members)

    def _write(self, *, finished: bool) -> None:
        assert self._curves is not None
        summary = _summaries()
        if finished:
            self._curves.add_histograms()
        for step, values in _loss_points(self._losses):
            self.events.add_scalars(values, step)
        layout = {
            category: {title: ["Multiline", [pattern]] for title, pattern in charts.items()}
            for category, charts in _CHARTS.items()
        }
        self.events.add_summary(summary.custom_scalars(layout))
        for name, text in self._texts.items():
            content = summary.text(name, text)
            # Without the ending that the function adds to the name.
            content.value[0].tag = name
            self.events.add_summary(content)
        kind, begun, ended = summary.hparams(_hyperparameters(self._experiment), dict.fromkeys(_FINAL_METRICS, 0.0))
        for part in (kind, begun, ended) if finished else (kind, begun):
            self.events.add_summary(part)
        self.events.write()
        for logger in self._loggers:
            logger.save()

    @cached_property
    def _texts(self) -> dict[str, str]:
        """Options, certificate and command, in Markdown; the certificate is a search, too slow to repeat."""
        experiment = self._experiment
        options = [[name, str(value)] for name, value in experiment.named_options.items()]
        return {
            "options": _markdown(TextTable("", ("option", "value"), options)),
            "certificate": _markdown(describe_in_short(experiment.predictor)),
            "command": f"    {experiment.command_line}",
        }

    def _picture(self, rows: Sequence[ConvergenceRow]) -> None:
        """Put the figure's panels, of the members so far, in the place of earlier ones."""
        from ntk_ensembles.runs.figures import convergence_charts

        for chart in convergence_charts(rows, self._bands(rows), ""):
            self.events.add_figure(f"convergence/{chart.name}", chart.figure(self._title(rows)), dpi=200)

    def _bands(self, rows: Sequence[ConvergenceRow]) -> dict[Decoder, ExactMatchBand]:
        """Return the bands at the rows' N; they cost the most of a figure, so those of all N are drawn once."""
        sizes = [row["members"] for row in rows]
        if not self._all_bands or not set(sizes) <= set(self._all_bands[DECODERS[0]].members):
            every = sorted({*ensemble_sizes(len(self._experiment.planned)), *sizes})
            with one_thread():
                self._all_bands = {decoder: self._experiment.limit.band(every, decoder) for decoder in DECODERS}
        at = [self._all_bands[DECODERS[0]].members.index(size) for size in sizes]
        return {
            decoder: dataclasses.replace(band, members=tuple(sizes), mean=band.mean[at], quantiles=band.quantiles[at])
            for decoder, band in self._all_bands.items()
        }

    def _title(self, rows: Sequence[ConvergenceRow]) -> str:
        task, options = self._experiment.task, self._experiment.options
        title = f"{task!r}: {len(task.templates)} templates, "
        title += f"{options.padding} of padding, " if options.padding else ""
        title += f"width {options.width}, "
        title += "readout trained, " if options.layers == "readout" else ""
        title += "corrected labels, " if options.labels == "corrected" else ""
        return f"{title}{options.init}, {rows[-1]['members']} members"


class _Curves:
    """Charts of the mean of the first N members, and histograms at N = 1, 2, 4, ….

    Args:
        experiment: What was trained, and on what it was evaluated.
        events: Where to add the points.

    Attributes:
        members: The last N.
        rows: Rows of a figure: of N = 1, 2, 4, … and of the last.
    """

    def __init__(self, experiment: Experiment, events: EventFile) -> None:
        self.members = 0
        self._before = 0
        self._added = 0
        self._limit = experiment.limit
        self._events = events
        self._total = torch.zeros_like(self._limit.mean)
        self._exact_from = dict.fromkeys(DECODERS, 1)
        self.rows: list[ConvergenceRow] = []
        self._logarithmic: dict[str, float] = {}
        self._predictions: dict[str, Prediction] = {"predicted_": experiment.limit}
        # Infinite width sees all states, the members' own some of them.
        self._states: dict[str, slice | Tensor] = {"predicted_": slice(None)}
        if experiment.at_width is not None:
            self._predictions["finite_width_"] = experiment.at_width
            self._states["finite_width_"] = experiment.at_width.rows
        self._rates = {
            (prefix, decoder): _Rates(prediction, decoder)
            for prefix, prediction in self._predictions.items()
            for decoder in DECODERS
        }
        self._standardised = {prefix: StandardisedDeviations(known) for prefix, known in self._predictions.items()}

    def add(self, deviations: Float[Tensor, "members states bits"]) -> Iterator[dict[str, float]]:
        """Add members, and yield the values of each N that has a point by the names of the charts.

        Args:
            deviations: Their outputs minus the NTK mean.
        """
        while len(deviations):
            spacing = 1 << (self._added // _EVERY_N_MAX).bit_length()
            some, deviations = deviations.tensor_split([spacing - self._added % spacing])
            self._added += len(some)
            self._total += some.sum(0, dtype=self._total.dtype)
            for prefix, found in self._standardised.items():
                found.add(some[:, self._states[prefix]])
            if self._added % spacing == 0:
                yield self.add_row(self._row())
                if self._added.bit_count() == 1:
                    self.add_histograms()

    def add_last(self) -> Iterator[dict[str, float]]:
        """Yield the values of the last N, if it has no point yet."""
        if self._added > self.members:
            yield self.add_row(self._row())

    def add_row(self, row: ConvergenceRow) -> dict[str, float]:
        """Add a point for a larger N than the last, and return its values by the names of the charts.

        Args:
            row: Means over groups of N members.
        """
        self._before, self.members = self.members, row["members"]
        self.rows = [known for known in self.rows if known["members"].bit_count() == 1] + [row]
        values = self._values_of(row)
        for decoder in DECODERS:
            if values[f"exact match/{decoder}"] < 1:
                self._exact_from[decoder] = self.members + 1
            elif self._exact_from[decoder] > self._before:
                # Of the N between nothing is known.
                self._exact_from[decoder] = self.members
            values[f"exact from N on/{decoder}"] = float(self._exact_from[decoder])
        self._events.add_scalars(values, self.members)
        self._add_logarithmic(values)
        return values

    def _row(self) -> ConvergenceRow:
        """Return the row of `convergence_rows` for the first N members, which are one group."""
        deviation = self._total / self._added
        mean = self._limit.mean + deviation
        right = [decode(mean, self._limit.thresholds[d]) == self._limit.evaluation.next_states for d in DECODERS]
        row: Any = {
            "members": self._added,
            "exact_match": {d: float(found.all(1).double().mean()) for d, found in zip(DECODERS, right, strict=True)},
            "exact_match_spread": dict.fromkeys(DECODERS),
            "execution_match": None,
            "bit_accuracy": {d: float(found.double().mean()) for d, found in zip(DECODERS, right, strict=True)},
            "rms_deviation": float(deviation.square().mean().sqrt()),
            "finite_width_exact_match": None,
            "finite_width_bit_accuracy": None,
            "finite_width_rms_deviation": None,
        }
        for prefix, prediction in self._predictions.items():
            rates = {decoder: self._rates[prefix, decoder](self._added) for decoder in DECODERS}
            row[f"{prefix}exact_match"] = {decoder: exact for decoder, (exact, _) in rates.items()}
            row[f"{prefix}bit_accuracy"] = {decoder: bits for decoder, (_, bits) in rates.items()}
            row[f"{prefix}rms_deviation"] = prediction.rms_deviation(self._added)
        return row  # type: ignore[no-any-return]

    @staticmethod
    def _values_of(row: ConvergenceRow) -> dict[str, float]:
        """Return the values of a row by the names of the charts."""
        known: Mapping[str, Any] = row
        values: dict[str, float] = {}
        for prefix, suffix in _KINDS.items():
            if known[f"{prefix}rms_deviation"] is not None:
                for decoder in DECODERS:
                    values[f"exact match/{decoder}{suffix}"] = known[f"{prefix}exact_match"][decoder]
                    values[f"bit accuracy/{decoder}{suffix}"] = known[f"{prefix}bit_accuracy"][decoder]
                values[f"RMS deviation/{suffix[2:] or 'measured'}"] = known[f"{prefix}rms_deviation"]
        return values

    def _add_logarithmic(self, values: Mapping[str, float]) -> None:
        """Draw lines from the last N to this one over log2 N, with a point at every hundredth."""
        chosen = {}
        for tag, value in values.items():
            group, _, name = tag.partition("/")
            if group == "exact match":
                chosen[f"{group} by {_STEPS_AN_OCTAVE} log2 N/{name}"] = value
            elif group == "RMS deviation" and value > 0:
                chosen[f"log10 {group} by {_STEPS_AN_OCTAVE} log2 N/{name}"] = math.log10(value)
        end = round(_STEPS_AN_OCTAVE * math.log2(self.members))
        start = round(_STEPS_AN_OCTAVE * math.log2(self._before)) if self._logarithmic else end - 1
        for step in range(start + 1, end + 1) if end > start else [end]:
            share = (step - start) / max(end - start, 1)
            points = {
                tag: value if share == 1 else share * value + (1 - share) * self._logarithmic.get(tag, value)
                for tag, value in chosen.items()
            }
            self._events.add_scalars(points, step)
        self._logarithmic = chosen

    def add_histograms(self) -> None:
        """Add the histograms of the members whose deviations were added, if there are any."""
        if not self._added:
            return
        mean = self._limit.mean + self._total / self._added
        true = self._limit.evaluation.next_states
        # The zero state is decoded apart, with a margin of its own.
        seen = (self._limit.evaluation.matches.any(1)[:, None]).expand_as(true)
        for decoder in DECODERS:
            margin = margins(mean, self._limit.thresholds[decoder], true)
            widest = float(margin[seen].abs().max()) if bool(seen.any()) else 1.0
            for bit in (1, 0):
                chosen = margin[seen & (true == bool(bit))]
                counts = torch.histc(chosen, _BINS, -widest, widest)
                edges = torch.linspace(-widest, widest, _BINS + 1, dtype=torch.float64)
                self._add_histogram(f"margins, {decoder}/{bit}-bits", counts, edges)
        for prefix, found in self._standardised.items():
            self._add_histogram(f"standardised deviations/{_KINDS[prefix][2:]}", found.counts, found.edges)
            normal = torch.special.ndtr(found.edges).diff() * found.counts.sum()
            self._add_histogram("standardised deviations/N(0, 1)", normal, found.edges)

    def _add_histogram(self, tag: str, counts: Tensor, edges: Tensor) -> None:
        filled = counts.nonzero().flatten()
        if not len(filled):
            return
        first, last = int(filled[0]), int(filled[-1]) + 1
        middles, counts = (edges[first:last] + edges[first + 1 : last + 1]) / 2, counts[first:last]
        histogram = _summaries().histogram_raw(
            tag,
            min=float(edges[first]),
            max=float(edges[last]),
            num=float(counts.sum()),
            sum=float((counts * middles).sum()),
            sum_squares=float((counts * middles.square()).sum()),
            bucket_limits=edges[first + 1 : last + 1].tolist(),
            bucket_counts=counts.tolist(),
        )
        self._events.add_summary(histogram, self._added)


class _Rates:
    """Exact match and bit accuracy that are predicted of N members, at the cost of the bits that can be wrong.

    Args:
        prediction: What is predicted.
        decoder: How the mean is decoded.
    """

    def __init__(self, prediction: Prediction, decoder: Decoder) -> None:
        margin = prediction.margins[decoder]
        states, bits = margin.shape
        variance = bit_variance(prediction).reshape(-1)
        flat = margin.reshape(-1)
        scores = (flat / variance.sqrt()).masked_fill(flat.abs() <= TIE, 0.0)
        self._scores, order = scores.sort()
        self._margins, self._variance = flat[order, None], variance[order]
        self._owners = order // bits
        self._states, self._bits = states, bits

    def __call__(self, members: int) -> tuple[float, float]:
        """Return both for ensembles of ``members`` members."""
        count = int(torch.searchsorted(self._scores, _CERTAIN_SCORE / members**0.5))
        errors = bit_error_probability(self._margins[:count], self._variance[:count], members)[:, 0]
        logs = torch.zeros(self._states, dtype=torch.float64).index_add_(0, self._owners[:count], torch.log1p(-errors))
        return float(logs.exp().mean()), 1 - float(errors.sum()) / (self._states * self._bits)


def _summaries() -> Any:
    """Return PyTorch's functions that make what TensorBoard shows; they take a while to import."""
    from torch.utils.tensorboard import summary

    return summary


def _loss_points(losses: Sequence[Sequence[float]]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the logarithms of the worst, the median and the best member's relative loss, by tenths of a step.

    Members that have stopped keep their last loss. What is not finite is left out.
    """
    steps = max(map(len, losses), default=0)
    table = torch.full((len(losses), steps), torch.nan, dtype=torch.float64)
    for row, own in enumerate(losses):
        if own and own[0] > 0:
            relative = torch.tensor(own, dtype=torch.float64) / own[0]
            table[row] = relative[-1]
            table[row, : len(own)] = relative
    table = table.where((table > 0) & table.isfinite(), torch.nan).log10()
    lines = {
        "worst": table.nan_to_num(-torch.inf).amax(0),
        "median": table.nanmedian(0).values,
        "best": table.nan_to_num(torch.inf).amin(0),
    }
    last = _POINTS_A_STEP * (steps - 1)
    stride = max(1, last // _POINTS_MAX)
    for point in sorted({*range(0, last + 1, stride), last}) if steps else ():
        step, share = divmod(point, _POINTS_A_STEP)
        after = min(step + 1, steps - 1)
        values = {}
        for name, line in lines.items():
            value = float(line[step] + (line[after] - line[step]) * share / _POINTS_A_STEP)
            if math.isfinite(value):
                values[f"log10 training loss by {_POINTS_A_STEP} step/{name}"] = value
        yield point, values


def _hyperparameters(experiment: Experiment) -> dict[str, Any]:
    """Return what runs are compared by: the same five for every task, as TensorBoard shows no more at first."""
    saved = experiment.options.saved
    return {"task": repr(experiment.task), **{name: saved[name] for name in ("width", "ensemble", "init", "labels")}}


def _markdown(table: TextTable) -> str:
    """Return a table in Markdown, below its title."""
    lines = [table.headings, ["---"] * len(table.headings), *table.rows]
    return f"{table.title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
