"""Reports: what one run, or several side by side, have shown, as pictures and one self-contained HTML page.

Every number follows from the members and the options in the run directories; only times and versions are taken from
``results.json``. Nothing is trained, and nothing in a directory is executed or trusted to be HTML.
"""

from __future__ import annotations

import base64
import html
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ntk_ensembles.console import Paragraph, Part, TextTable
from ntk_ensembles.errors import OptionError
from ntk_ensembles.files import read_bytes, write_atomically
from ntk_ensembles.runs.bits import (
    BitFailures,
    Deviations,
    bit_failures,
    members_needed,
    output_histogram,
    standardised_deviations,
)
from ntk_ensembles.runs.certificate import count, describe_certificate
from ntk_ensembles.runs.convergence import group_rows
from ntk_ensembles.runs.figures import (
    Chart,
    Curve,
    MembersNeeded,
    comparison_charts,
    convergence_charts,
    failures_chart,
    needed_charts,
    output_chart,
    seconds_chart,
    standardised_chart,
    width_chart,
)
from ntk_ensembles.runs.plan import MEMBERS_MAX, smallest_reaching
from ntk_ensembles.runs.results import Results, exact_from, in_short, percent, results_of, training_in_words
from ntk_ensembles.runs.run import Run, TaskOrClass, prepare_directory
from ntk_ensembles.runs.store import STAGES, MemberResults, StoreError
from ntk_ensembles.theory import DECODERS, Decoder, Prediction, certify_task, certify_width

TARGETS = (0.9, 0.999)
"""Exact match of which the members needed are reported."""

_PAGE = "index.html"
_GENERATOR = '<meta name="generator" content="ntk-ensembles report">'
_BITS_SHOWN, _GROUPS_SHOWN = 15, 4
_RESULTS_BYTES_MAX = 1 << 24
_PHASES = dict(zip(STAGES, ("draw", "train", "evaluate"), strict=True))


@dataclass(frozen=True, eq=False)
class _Reported:
    """A run that is reported.

    Attributes:
        run: The run.
        label: Words that tell it from the others; its width where it is alone.
        members: Its members so far, at least one.
        results: The results that follow from them.
        recorded: What ``results.json`` says, where it is of as many members; otherwise nothing.
        certificate: Its certificate, or why there is none, in words.
    """

    run: Run
    label: str
    members: MemberResults
    results: Results
    recorded: Mapping[str, Any]
    certificate: dict[str, Any] | str

    @cached_property
    def deviations(self) -> Deviations | None:
        """Deviations of the converged members; None where none has, or the run does not keep those of each."""
        members, experiment = self.members, self.run.experiment
        if members.deviations is None or not bool(members.converged.any()):
            return None
        kept = members.deviations if bool(members.converged.all()) else members.deviations[members.converged]
        return Deviations(experiment.limit, experiment.at_width, kept, members.indices[members.converged])

    @cached_property
    def needed(self) -> dict[float, dict[Decoder, MembersNeeded]]:
        """Members that reach each of `TARGETS` by each decoder."""
        experiment, rows = self.run.experiment, self.results["convergence"]

        def predicted(prediction: Prediction | None, decoder: Decoder, exact: float) -> int | None:
            return smallest_reaching(prediction, decoder, exact, MEMBERS_MAX) if prediction else None

        return {
            exact: {
                decoder: MembersNeeded(
                    members_needed(rows, self.deviations, decoder, exact),
                    predicted(experiment.limit, decoder, exact),
                    predicted(experiment.at_width, decoder, exact),
                )
                for decoder in DECODERS
            }
            for exact in TARGETS
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Time of each phase, as far as it is known."""
        own = self.results["training"]["seconds"]
        found = {words: own[name] for name, words in _PHASES.items()}
        if self.recorded:
            seconds = self.recorded["training"]["seconds"]
            found["start-up"] = seconds["startup"]
            rest = seconds["total"] - sum(found.values())
            if rest >= 0:
                found["saving and the rest"] = rest
        return found


def write_report(
    directories: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    task: TaskOrClass | None = None,
    members: int | None = None,
    certificates: bool = True,
    on_progress: Callable[[str], object] = lambda what: None,
) -> Path:
    """Write the figures and the page of one run, or of several side by side.

    Args:
        directories: Directories of the runs, at least one, finished or not.
        out: Directory to write: new, empty, or of an earlier report. By default ``report`` in the directory of a single
            run, and for several a fresh one under ``runs/``.
        task: Task, or its class, where the runs are of a user's own; only certificates need it.
        members: N of the distributions and of the failures. By default all members, and for failures the largest N
            that has any.
        certificates: Whether to compute certificates, which can take minutes where a task is large.
        on_progress: Called with what is being done now, in words.

    Returns:
        Path of the page.

    Raises:
        StoreError: A directory is no run, is damaged, or has no finished member.
        OptionError: ``members`` is more than one of the runs has.
        ValueError: The same run twice, or a directory that cannot be written.
        SaveError: A file cannot be written.
    """
    paths = [Path(directory) for directory in directories]
    places = [path.resolve() for path in paths]
    for place, path in zip(places, paths, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{path}: is named twice; expected different runs")
    runs = [Run.open(path, task) for path in paths]
    found = [_finished(run, members) for run in runs]
    if out is None and len(runs) > 1:
        folder, _ = prepare_directory(None, "report")
    else:
        folder = _prepared(paths[0] / "report" if out is None else Path(out))
    reported: list[_Reported] = []
    known: dict[str, dict[str, Any] | str] = {}
    for run, label, results in zip(runs, _labels(runs), found, strict=True):
        on_progress(f"comparing with theory: {label}")
        computed = results_of(run.experiment, results, run.device)
        certificate: dict[str, Any] | str = "Certificates were not asked for."
        if certificates:
            on_progress(f"searching all states for the worst ones: {run.experiment.task!r}")
            certificate = _certify(run, known)
        reported.append(_Reported(run, label, results, computed, _recorded(run, results), certificate))
    on_progress("drawing")
    page = _Page(folder)
    alone = len(reported) == 1
    if alone:
        title = f"{runs[0].experiment.task!r}, {reported[0].label}"
    else:
        title = f"{len(reported)} runs side by side"
        _compare(page, reported)
    for number, one in enumerate(reported, 1):
        _describe(page, one, "" if alone else f"{number}-", members)
    text = page.text(title)
    write_atomically(folder / _PAGE, lambda part: part.write_text(text, encoding="utf-8"), follow=False)
    return folder / _PAGE


def _finished(run: Run, members: int | None) -> MemberResults:
    """Return the members of a run, at least one of which is there, and as many as are wanted have converged."""
    results = run.member_results()
    if not len(results):
        raise StoreError(f"{run.directory}: has no finished member yet")
    indices = results.indices[results.converged]
    if members is not None and not 1 <= members <= len(indices):
        expected = f"an integer from 1 to {len(indices)}, as many members have converged in {run.directory}"
        raise OptionError("members", members, expected)
    if members is not None and not group_rows(indices, members):
        expected = f"an N of which {run.directory} has a group: N consecutive members, from a multiple of N on, all of "
        raise OptionError("members", members, f"{expected}them converged")
    return results


def _prepared(folder: Path) -> Path:
    """Make the directory of a report, which has nothing else than an earlier report."""
    page = folder / _PAGE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = page.is_file() and _GENERATOR.encode() in read_bytes(page, 1 << 28)[:1000]
        if not ours and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ValueError(f"{folder}: is not empty; expected a new or an empty directory, or an earlier report")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({(error.strerror or str(error)).lower()})") from None
    return folder


def _recorded(run: Run, members: MemberResults) -> Mapping[str, Any]:
    """Return what ``results.json`` says, if it is of as many members and has what is used of it."""
    try:
        found = json.loads(read_bytes(run.directory / "results.json", _RESULTS_BYTES_MAX))
        seconds = found["training"]["seconds"]
        whole = all(type(seconds[name]) in (int, float) and 0 <= seconds[name] < 1e9 for name in ("startup", "total"))
        if found["members"] == len(members) and whole and isinstance(found["environment"], dict):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {}


def _certify(run: Run, known: dict[str, dict[str, Any] | str]) -> dict[str, Any] | str:
    """Return a run's certificate, or why there is none; what is the same for several runs is computed once."""
    experiment, options = run.experiment, run.experiment.options
    shared: dict[str, Any] = {name: getattr(options, name) for name in ("layers", "padding", "evaluation_seed")}
    same = ("task", "task_options", "templates", "evaluation_digest", "layers", "padding")
    key = json.dumps([run.store.manifest[name] for name in same])
    try:
        if key not in known:
            known[key] = certify_task(experiment.task, evaluation=experiment.evaluation, **shared)
        found = known[key]
        if isinstance(found, str) or experiment.without_finite_width:
            return found
        at_width = certify_width(
            experiment.task,
            options.width,
            antisymmetric=options.init == "antisymmetric",
            labels=options.labels,
            evaluation=experiment.evaluation,
            prediction=experiment.at_width,
            **shared,
        )
        return {**found, "at_width": at_width}
    except (ValueError, RuntimeError) as error:
        known[key] = f"There is none: {error}."
        return known[key]


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return for each run the options in which it differs from another, by name."""
    described = [run.experiment.named_options | {"task": run.experiment.task.name} for run in runs]
    names = dict.fromkeys(name for options in described for name in options)
    differing = [name for name in names if len({repr(options.get(name)) for options in described}) > 1]
    return [{name: options[name] for name in differing if name in options} for options in described]


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return words for each run that tell it from the others."""
    if len(runs) == 1:
        return [f"width {runs[0].experiment.options.width:,}"]
    labels = [
        ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in options.items())
        for options in _differences(runs)
    ]
    return [
        label if labels.count(label) == 1 else f"{label} ({run.directory.name})".strip()
        for label, run in zip(labels, runs, strict=True)
    ]


def _value(value: object) -> str:
    return f"{value:,}" if type(value) is int else str(value)


def _compare(page: _Page, reported: Sequence[_Reported]) -> None:
    """Add what several runs show side by side."""
    page.heading("Side by side")
    rows = []
    for one in reported:
        results = one.results
        deviation = [f"{row['rms_deviation']:.3g}" for row in results["convergence"]] or ["-"]
        rows.append(
            [
                one.label,
                repr(one.run.experiment.task),
                str(one.run.directory),
                f"{results['width']:,}",
                f"{results['init']}, {results['labels']} labels",
                f"{results['members']:,} of {results['members_planned']:,}",
                count(exact_from(results["convergence"])),
                deviation[-1],
            ]
        )
    headings = ("run", "task", "directory", "width n", "members are", "members", "exact from N", "RMS deviation")
    page.add([TextTable("Runs; the deviation is that of all members", headings, rows, words=(0, 1, 2))])
    converged = [one for one in reported if one.results["convergence"]]
    charts = comparison_charts([Curve(one.label, one.results["convergence"]) for one in converged]) if converged else []
    charts += [*_width_charts(converged), *_size_charts(converged)]
    page.charts([*charts, seconds_chart([(one.label, one.seconds) for one in reported])])


def _width_charts(reported: Sequence[_Reported]) -> list[Chart]:
    """Return the chart of runs of one task and kind that differ in width, if there are any."""
    groups = []
    for kind, runs in _grouped(reported, lambda one: _kind(one, whole=True)):
        chosen = sorted(runs, key=lambda one: one.results["width"])
        if len({one.results["width"] for one in chosen}) > 1:
            label = f"{chosen[0].run.experiment.task!r}, {', '.join(kind[1:])}"
            points = [
                (one.results["width"], one.results["convergence"], one.results["finite_width"]["bias_rms"])
                for one in chosen
            ]
            groups.append((label, points))
    return [width_chart(groups)] if groups else []


def _size_charts(reported: Sequence[_Reported]) -> list[Chart]:
    """Return charts of the members needed, for each set of runs of one task that differ in its size."""
    charts: list[Chart] = []
    for kind, runs in _grouped(reported, lambda one: _kind(one, whole=False)):
        differing = {name for options in _differences([one.run for one in runs]) for name in options}
        own = sorted(differing & runs[0].run.experiment.task.options.keys())
        if not own:
            continue
        axis, sizes = f"templates of {kind[0]}, k", [one.results["templates"] for one in runs]
        values: list[Any] = [one.run.experiment.task.options.get(own[0]) for one in runs]
        if len(own) == 1 and all(type(value) is int for value in values):
            axis, sizes = f"{own[0].replace('_', ' ')} of {kind[0]}", values
        order = sorted(range(len(runs)), key=lambda i: sizes[i])
        needed = {
            exact: {decoder: [runs[i].needed[exact][decoder] for i in order] for decoder in DECODERS}
            for exact in TARGETS
        }
        name = f"needed-{len(charts) // len(TARGETS) + 1}"
        charts += needed_charts(axis, [sizes[i] for i in order], needed, name)
    return charts


def _kind(one: _Reported, *, whole: bool) -> tuple[str, ...]:
    """Return what runs have to have in common to share a chart, the task's options too if ``whole``."""
    results, task = one.results, one.run.experiment.task
    labels = f"{results['labels']} labels"
    return (repr(task) if whole else task.name, results["init"], labels, f"{results['loss']} loss")


def _grouped(
    reported: Sequence[_Reported], key: Callable[[_Reported], tuple[str, ...]]
) -> list[tuple[tuple[str, ...], list[_Reported]]]:
    ordered = sorted(reported, key=key)
    return [(kind, list(runs)) for kind, runs in itertools.groupby(ordered, key=key)]


def _describe(page: _Page, one: _Reported, prefix: str, members: int | None) -> None:
    """Add what one run shows.

    Args:
        page: Page to add to.
        one: The run.
        prefix: Beginning of the names of its files; empty where it is alone.
        members: N of the distributions and failures, if one was asked for.
    """
    experiment, results = one.run.experiment, one.results
    rows = results["convergence"]
    level = 3 if prefix else 2
    if prefix:
        page.heading(f"Run {prefix[:-1]}: {one.label}")
    page.add(_state_of(one))
    if rows:
        page.heading("Convergence", level)
        bands = {decoder: experiment.limit.band([row["members"] for row in rows], decoder) for decoder in DECODERS}
        page.charts(convergence_charts(rows, bands, prefix))
        page.add([*_convergence_tables(one), _needed_table(one)])
    if one.deviations is not None:
        _distributions(page, one, prefix, members, level)
        _failures(page, one, prefix, members, level)
    elif rows:
        page.heading("Single bits", level)
        text = "The run keeps sums over groups of members, not each member's deviations: outputs about the thresholds, "
        text += "standardised deviations and failures bit by bit do not follow from them."
        page.add([Paragraph(text, "note")])
    page.heading("Certificate", level)
    if isinstance(one.certificate, str):
        page.add([Paragraph(one.certificate, "note")])
    else:
        page.add(describe_certificate(one.certificate, repr(experiment.task)))
    page.heading("Time", level)
    if not prefix:
        page.charts([seconds_chart([("", one.seconds)])])
    page.add(_time(one))
    page.heading("Options, versions, command", level)
    page.code(one.run.experiment.command_line)
    page.add(_options(one))


def _state_of(one: _Reported) -> list[Part]:
    """Return what the run is, and what of it is missing."""
    experiment, results = one.run.experiment, one.results
    rows, failed = results["convergence"], results["training"]["not_converged"]
    parts: list[Part] = [
        Paragraph(
            f"{experiment.task!r}: {results['templates']:,} templates, states of {results['state_bits']:,} bits, "
            f"{results['members']:,} members of width {results['width']:,} ({results['init']}, {results['labels']} "
            f"labels), {results['evaluation_states']:,} evaluation states. Directory: {one.run.directory}"
        )
    ]
    if results["members"] < results["members_planned"]:
        text = f"Incomplete: {results['members']:,} of {results['members_planned']:,} planned members are finished. "
        parts.append(Paragraph(f"{text}Everything below is of these.", "warning"))
    if failed:
        text = f"{len(failed)} of {results['members']} members did not converge and are left out: {in_short(failed)}."
        parts.append(Paragraph(text, "warning"))
    if not one.recorded:
        text = "There is no results.json of these members: start-up, total time, machine and versions are not known."
        parts.append(Paragraph(text, "warning"))
    if omitted := results["finite_width"]["omitted"]:
        parts.append(Paragraph(f"No theory at width {results['width']:,}: {omitted}.", "note"))
    if not rows:
        parts.append(Paragraph("No member has converged, so there is nothing to compare with theory.", "warning"))
    elif exact := exact_from(rows):
        parts.append(Paragraph(f"All states are exact by midpoint from N = {exact:,} on, in every group of members."))
    else:
        parts.append(Paragraph("Not all states are exact by midpoint, whatever N."))
    return parts


def _convergence_tables(one: _Reported) -> list[Part]:
    rows = one.results["convergence"]
    tables: list[Part] = []
    for decoder in DECODERS:
        cells = []
        for row in rows:
            at_width, executions = row["finite_width_exact_match"], row["execution_match"]
            cells.append(
                [
                    f"{row['members']:,}",
                    percent(row["exact_match"][decoder]),
                    percent(row["predicted_exact_match"][decoder]),
                    percent(at_width[decoder]) if at_width else "-",
                    percent(row["bit_accuracy"][decoder]),
                    percent(executions[decoder]) if executions else "-",
                ]
            )
        headings = ("N", "measured", "infinite width", "this width", "bits right", "executions right")
        tables.append(TextTable(f"Exact match by {decoder}: measured and predicted", headings, cells, words=()))
    deviations = [
        [
            f"{row['members']:,}",
            f"{row['rms_deviation']:.3e}",
            f"{row['predicted_rms_deviation']:.3e}",
            _scientific(row["finite_width_rms_deviation"]),
        ]
        for row in rows
    ]
    title = "RMS deviation from the NTK mean"
    tables.append(TextTable(title, ("N", "measured", "infinite width", "this width"), deviations, words=()))
    return tables


def _needed_table(one: _Reported) -> TextTable:
    rows = [
        [decoder, percent(exact), count(found.measured), count(found.infinite), count(found.at_width)]
        for exact, by_decoder in one.needed.items()
        for decoder, found in by_decoder.items()
    ]
    title = "Members needed: the smallest N from which on the mean over groups stays above the target"
    if one.deviations is None:
        title += " (measured to the next power of two)"
    return TextTable(title, ("decoder", "exact match", "measured", "infinite width", "this width"), rows)


def _distributions(page: _Page, one: _Reported, prefix: str, members: int | None, level: int) -> None:
    """Add charts of outputs about their thresholds, and of standardised deviations."""
    deviations = one.deviations
    assert deviations is not None
    sizes = sorted({1, len(deviations.indices) if members is None else members})
    page.heading("Margins", level)
    page.charts(
        output_chart(output_histogram(deviations, size, decoder), decoder, size, prefix)
        for decoder in DECODERS
        for size in sizes
    )
    page.heading("Standardised deviations", level)
    rows, charts = [], []
    for whose, prediction, name in (
        ("infinite width", deviations.limit, "infinite"),
        (f"width {one.results['width']:,}", deviations.at_width, "finite"),
    ):
        measured = [standardised_deviations(deviations, prediction, size) for size in sizes] if prediction else []
        if found := [each for each in measured if each]:
            charts.append(standardised_chart(found, whose, f"{prefix}standardised-{name}"))
            rows += [[whose, f"{each.members:,}", f"{each.mean:.3f}", f"{each.deviation:.3f}"] for each in found]
    page.charts(charts)
    if rows:
        headings = ("by the theory of", "N", "mean (theory: 0)", "standard deviation (theory: 1)")
        page.add([TextTable("Deviations over what is predicted", headings, rows)])
    else:
        page.add([Paragraph("Nothing is predicted to vary, so there is nothing to standardise by.", "note")])


def _failures(page: _Page, one: _Reported, prefix: str, members: int | None, level: int) -> None:
    """Add which bits are read wrongly, at the largest N at which any is, or at the N that was asked for."""
    assert one.deviations is not None
    rows = one.results["convergence"]
    page.heading("Failures bit by bit", level)
    found: dict[Decoder, tuple[int, list[BitFailures]]] = {}
    for decoder in DECODERS:
        failing = [row["members"] for row in rows if row["bit_accuracy"][decoder] < 1]
        if size := members or max(failing, default=0):
            bits = bit_failures(one.deviations, size, decoder)
            if any(bit.measured for bit in bits):
                found[decoder] = (size, bits)
    if found:
        page.charts([failures_chart(found, prefix)])
    for decoder in DECODERS:
        if decoder in found:
            page.add(_failures_table(decoder, *found[decoder]))
        else:
            where = f"N = {members:,}" if members else "any N"
            page.add([Paragraph(f"{decoder}: no bit was read wrongly at {where}.")])


def _failures_table(decoder: Decoder, members: int, bits: Sequence[BitFailures]) -> list[Part]:
    failing = sorted((bit for bit in bits if bit.measured), key=lambda bit: -bit.measured)
    rows = []
    for bit in failing[:_BITS_SHOWN]:
        assert bit.num_matches is not None
        low, high = bit.num_matches
        words = []
        if bit.missed:
            words.append(f"set by {_groups_in_words(bit.setting)}")
        if bit.invented:
            able = sum(bit.silent.values())
            words.append(f"none of {able} matched: {_groups_in_words(bit.silent)}" if able else "no template sets it")
        rows.append(
            [
                bit.name,
                f"{bit.missed:,}",
                f"{bit.invented:,}",
                f"{bit.measured:.3g}",
                f"{bit.predicted:.3g}",
                "-" if bit.at_width is None else f"{bit.at_width:.3g}",
                str(low) if low == high else f"{low} to {high}",
                "; ".join(words),
            ]
        )
    readings = bits[0].readings
    title = (
        f"{decoder}, N = {members:,}: {len(failing)} of {len(bits)} bits were read wrongly, of {readings:,} readings "
        "each (states times groups of members)"
    )
    headings = ("bit", "1 read as 0", "0 read as 1", "measured", "infinite width", "this width", "s", "templates")
    text = (
        "A bit has a line if it was ever read wrongly. Templates: those that set a 1 that was read as 0, with the "
        "number of such readings, and those that can set a 0 that was read as 1, none of which matched. The rates are "
        "shares of all readings, measured and predicted; s is the number of templates that match the failing states."
    )
    parts: list[Part] = [TextTable(title, headings, rows, words=(0, 7)), Paragraph(text, "note")]
    if others := failing[_BITS_SHOWN:]:
        wrong = sum(bit.missed + bit.invented for bit in others)
        parts.append(Paragraph(f"{len(others)} more bits were read wrongly {wrong:,} times together.", "note"))
    return parts


def _groups_in_words(groups: Mapping[str, int]) -> str:
    shown = [f"{name} {number:,}" for name, number in itertools.islice(groups.items(), _GROUPS_SHOWN)]
    return ", ".join(shown) + (", …" if len(groups) > _GROUPS_SHOWN else "")


def _time(one: _Reported) -> list[Part]:
    recorded = one.recorded
    rows = [[name, f"{value:.1f}"] for name, value in one.seconds.items()]
    if recorded:
        rows.append(["total of the last session", f"{recorded['training']['seconds']['total']:.1f}"])
    parts: list[Part] = [TextTable("Seconds", ("phase", "seconds"), rows)]
    if recorded and "saving and the rest" not in one.seconds:
        text = "The phases are of several sessions or of processes side by side: together they exceed the last session."
        parts.append(Paragraph(text, "note"))
    return [*parts, Paragraph(f"{training_in_words(one.results['training'])}.")]


def _options(one: _Reported) -> list[Part]:
    values = [[name, str(value)] for name, value in one.run.experiment.named_options.items()]
    parts: list[Part] = [TextTable("Options", ("option", "value"), values, words=(0, 1))]
    rows = [[name, value] for name, value in _flat(one.recorded.get("environment", {}))]
    if rows:
        parts.append(TextTable("Where members were trained", ("what", "value"), rows, words=(0, 1)))
    return parts


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return the values of nested objects as text, by names with what they are nested in."""
    found = []
    for name, value in values.items():
        words = f"{before}{name.replace('_', ' ')}"
        found += _flat(value, f"{words}: ") if isinstance(value, dict) else [(words, str(value))]
    return found


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"


_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 3rem; background: #fff; color: #222; line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; overflow-wrap: anywhere; }
h3 { font-size: 1.1rem; margin-top: 1.8rem; }
p { max-width: 46rem; overflow-wrap: anywhere; }
nav ul { padding-left: 1.2rem; columns: 18rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem 1.5rem; }
figure { margin: 0; max-width: 36rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: 0.9rem; color: #444; }
.table { display: inline-block; vertical-align: top; max-width: 100%; overflow-x: auto; margin: 0.6rem 2.5rem 0.6rem 0;
}
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.3rem; }
caption span { display: block; position: sticky; left: 0; max-width: calc(100vw - 2.5rem); }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #888; font-weight: 600; }
.name { text-align: left; max-width: 26rem; }
td { white-space: nowrap; }
td.name { white-space: normal; overflow-wrap: break-word; }
td.name:last-child { min-width: 14rem; }
@media (max-width: 40rem) { th, td { padding: 0.2rem 0.4rem; } .table { margin-right: 0; } }
.warning { border-left: 4px solid #D55E00; padding: 0.3rem 0.8rem; background: #fdf1ea; }
.note { color: #555; }
pre { background: #f4f4f4; padding: 0.7rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


class _Page:
    """A page in the making; text is escaped, and pictures are written beside it and into it.

    Args:
        folder: Directory that pictures are written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._body: list[str] = []
        self._contents: list[str] = []

    def heading(self, text: str, level: int = 2) -> None:
        """Begin a section; those of level 2 are in the list of contents."""
        anchor = f"section-{len(self._body)}"
        self._body.append(f'<h{level} id="{anchor}">{html.escape(text)}</h{level}>')
        if level == 2:
            self._contents.append(f'<li><a href="#{anchor}">{html.escape(text)}</a></li>')

    def add(self, parts: Iterable[Part]) -> None:
        """Add paragraphs and tables."""
        for part in parts:
            if isinstance(part, Paragraph):
                self._body.append(f'<p class="{part.kind}">{html.escape(part.text)}</p>')
            else:
                self._body.append(_table(part))

    def code(self, text: str) -> None:
        """Add a command line."""
        self._body.append(f"<pre><code>{html.escape(text)}</code></pre>")

    def charts(self, charts: Iterable[Chart]) -> None:
        """Draw charts, and add them side by side as far as there is room."""
        listed = list(charts)
        captions = [chart.caption for chart in listed]
        shared = [caption for caption in dict.fromkeys(captions) if captions.count(caption) > 1]
        self.add(Paragraph(caption, "note") for caption in shared)
        figures = [self._figure(chart, "" if chart.caption in shared else chart.caption) for chart in listed]
        if figures:
            self._body.append(f'<div class="charts">{"".join(figures)}</div>')

    def _figure(self, chart: Chart, caption: str) -> str:
        data = base64.b64encode(chart.save(self._folder)).decode("ascii")
        words = html.escape(f"{chart.title}. {chart.caption}")
        return (
            f'<figure id="{html.escape(chart.name)}"><img alt="{words}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def text(self, title: str) -> str:
        """Return the whole page."""
        contents = f"<nav><ul>{''.join(self._contents)}</ul></nav>"
        return (
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_GENERATOR}\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{html.escape(title)}</h1>\n{contents}\n" + "\n".join(self._body) + "\n</body>\n</html>\n"
        )


def _table(table: TextTable) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="name"' if place in table.words else "" for place in range(len(cells))]
        inner = "".join(f"<{tag}{kind}>{html.escape(text)}</{tag}>" for kind, text in zip(kinds, cells, strict=True))
        return f"<tr>{inner}</tr>"

    body = "".join(row(cells, "td") for cells in table.rows)
    caption = f"<caption><span>{html.escape(table.title)}</span></caption>"
    head = f"<thead>{row(table.headings, 'th')}</thead>"
    return f'<div class="table"><table>{caption}{head}<tbody>{body}</tbody></table></div>'
