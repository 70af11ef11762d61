"""What TensorBoard reads of a run: charts for every N, against the stored members and `results.json`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.data_ingester import DEFAULT_TENSOR_SIZE_GUIDANCE
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from ntk_ensembles import Addition, RunOptions, train
from ntk_ensembles.runs import Run, dashboard, merge_runs
from ntk_ensembles.theory import DECODERS, certify_task

QUIET = Console(quiet=True)
OPTIONS = RunOptions(width=512, ensemble=9, cohort=4, evaluation_states=60, tolerance=1e-4)


def trained(out: Path, **options: Any) -> Path:
    extras = {name: options.pop(name) for name in ("logger", "callbacks") if name in options}
    assert train(Addition(3), dataclasses.replace(OPTIONS, out=str(out), **options), console=QUIET, **extras)
    return out


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    trained(folder / "narrow", width=256)
    trained(folder / "wide")
    trained(folder / "antisymmetric", init="antisymmetric")
    return folder


def read(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    events = read(directory)
    points = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    # Not one step twice, and none before an earlier one: no curve runs back.
    assert all([p.step for p in own] == sorted({p.step for p in own}) for own in points.values())
    return {tag: {point.step: point.value for point in own} for tag, own in points.items()}


def backend(logdir: Path) -> base_plugin.TBContext:
    multiplexer = EventMultiplexer(tensor_size_guidance=DEFAULT_TENSOR_SIZE_GUIDANCE)
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(logdir))
    return base_plugin.TBContext(logdir=str(logdir), data_provider=provider, plugin_name_to_instance={})


def test_a_run_is_one_entry(logdir: Path) -> None:
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    assert sorted(multiplexer.Runs()) == ["antisymmetric", "narrow", "wide"]


@pytest.mark.parametrize("name", ["narrow", "wide", "antisymmetric"])
def test_every_number_of_members_has_a_point(name: str, logdir: Path) -> None:
    """Measured: from the stored deviations, state by state. Predicted: as in `results.json` at N = 1, 2, 4, 8, 9."""
    run, charts = Run.open(logdir / name), scalars(logdir / name)
    limit, deviations = run.experiment.limit, run.member_results().deviations.double()
    for n in range(1, 10):
        mean = limit.mean + deviations[:n].mean(0)
        for decoder in DECODERS:
            right = (mean > limit.thresholds[decoder]) == limit.evaluation.next_states
            assert charts[f"exact match/{decoder}"][n] == pytest.approx(float(right.all(1).double().mean()))
            assert charts[f"bit accuracy/{decoder}"][n] == pytest.approx(float(right.double().mean()))
        assert charts["RMS deviation/measured"][n] == pytest.approx(float((mean - limit.mean).square().mean().sqrt()))
    rows = json.loads((logdir / name / "results.json").read_text())["convergence"]
    for row in rows:
        n = row["members"]
        for prefix, kind in (("predicted_", "infinite width"), ("finite_width_", "this width")):
            for decoder in DECODERS:
                for key in ("exact_match", "bit_accuracy"):
                    chart = charts[f"{key.replace('_', ' ')}/{decoder}, {kind}"]
                    assert sorted(chart) == list(range(1, 10))
                    assert chart[n] == pytest.approx(row[f"{prefix}{key}"][decoder], abs=1e-6)
            assert charts[f"RMS deviation/{kind}"][n] == pytest.approx(row[f"{prefix}rms_deviation"])
    assert charts["exact match/sign"][9] == pytest.approx(rows[-1]["exact_match"]["sign"])


@pytest.mark.parametrize("cohort", [1, 3, 13])
def test_large_ensembles_have_fewer_points(cohort: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every N up to 4, every second up to 8, every fourth up to 16, and the last; whatever the cohorts were."""
    monkeypatch.setattr(dashboard, "_EVERY_N_MAX", 4)
    monkeypatch.setattr(dashboard, "_SECONDS_BETWEEN_WRITES", 0.0)
    run = Run.open(trained(tmp_path / "run", ensemble=13, cohort=cohort, width=128))
    deviations = run.member_results().deviations.double()
    found = scalars(run.directory)["RMS deviation/measured"]
    assert found == {
        n: pytest.approx(float(deviations[:n].mean(0).square().mean().sqrt())) for n in (1, 2, 3, 4, 6, 8, 12, 13)
    }
    histograms = read(run.directory).Histograms("standardised deviations/infinite width")
    totals = [sum(event.histogram_value.bucket) for event in histograms]
    assert [event.step for event in histograms] == [1, 2, 4, 8, 13]
    assert totals == pytest.approx([n * totals[0] for n in (1, 2, 4, 8, 13)])


def test_a_logarithmic_chart_passes_through_every_number_of_members(logdir: Path) -> None:
    charts = scalars(logdir / "wide")
    for decoder in DECODERS:
        linear, chart = charts[f"exact match/{decoder}"], charts[f"exact match by 100 log2 N/{decoder}"]
        assert sorted(chart) == list(range(round(100 * math.log2(9)) + 1))
        assert all(chart[round(100 * math.log2(n))] == pytest.approx(linear[n]) for n in range(1, 10))
        assert chart[50] == pytest.approx((linear[1] + linear[2]) / 2)
    deviation = charts["log10 RMS deviation by 100 log2 N/infinite width"]
    # Averaging alone: half the deviation from four times the members.
    assert deviation[200] - deviation[0] == pytest.approx(math.log10(0.5), abs=1e-6)


def test_exact_from_is_one_more_than_the_last_number_that_failed(logdir: Path) -> None:
    charts = scalars(logdir / "narrow")
    for decoder in DECODERS:
        failed = [n for n, share in charts[f"exact match/{decoder}"].items() if share < 1]
        assert charts[f"exact from N on/{decoder}"][9] == max(failed, default=0) + 1


def test_custom_scalars_show_what_is_there(logdir: Path) -> None:
    """TensorBoard's own plugin returns the layout; a tag that no run has would be an empty chart."""
    plugin = CustomScalarsPlugin(backend(logdir))
    layout = json.loads(plugin.layout_impl(RequestContext(), ""))
    charts = [chart for category in layout["category"] for chart in category["chart"]]
    assert len({chart["title"] for chart in charts}) == len(charts) == 9
    for name in ("narrow", "wide", "antisymmetric"):
        tags = scalars(logdir / name)
        for chart in charts:
            (pattern,) = chart["multiline"]["tag"]
            found = [tag for tag in tags if re.match(pattern, tag)]
            # An antisymmetric network has no deviation at infinite width, and zero has no logarithm.
            assert len(found) == 3 - (name == "antisymmetric" and chart["title"].startswith("log10 of the RMS"))


def test_hparams_compare_the_runs(logdir: Path) -> None:
    context, request = backend_context.Context(backend(logdir)), RequestContext()
    content = context.hparams_metadata(request, "")
    hparams = context.hparams_from_data_provider(request, "", 0)
    experiment = context.experiment_from_metadata(request, "", True, content, hparams)
    assert {info.name for info in experiment.hparam_infos} == {"task", "width", "ensemble", "init", "labels"}
    listed = list_session_groups.Handler(
        request,
        context,
        "",
        api_pb2.ListSessionGroupsRequest(
            start_index=0,
            slice_size=9,
            allowed_statuses=[api_pb2.STATUS_SUCCESS],
            col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
        ),
    ).run()
    assert get_experiment.Handler(request, context, "", api_pb2.GetExperimentRequest()).run().metric_infos
    found = {}
    for group in listed.session_groups:
        values = {metric.name.tag: metric.value for metric in group.metric_values}
        found[group.sessions[0].name] = group.hparams["width"].number_value, group.hparams["init"].string_value
        last = json.loads((logdir / group.sessions[0].name / "results.json").read_text())["convergence"][-1]
        assert values["exact match/sign"] == pytest.approx(last["exact_match"]["sign"])
        assert values["RMS deviation/measured"] == pytest.approx(last["rms_deviation"], rel=1e-5)
    assert found == {
        "narrow": (256, "gaussian"),
        "wide": (512, "gaussian"),
        "antisymmetric": (512, "antisymmetric"),
    }


def test_histograms_hold_every_output(logdir: Path) -> None:
    run, events = Run.open(logdir / "wide"), read(logdir / "wide")
    limit, members = run.experiment.limit, run.member_results()
    shown = {event.step: event for event in events.Histograms("standardised deviations/infinite width")}
    assert sorted(shown) == [1, 2, 4, 8, 9]
    varying = int((limit.variance > 0).sum()) * limit.mean.shape[1]
    scores = members.deviations.double() / limit.variance.sqrt()[:, None]
    for n, event in shown.items():
        value = event.histogram_value
        assert value.num == n * varying
        inside = float(((scores[:n] > -1) & (scores[:n] <= 1) & (limit.variance > 0)[:, None]).sum())
        between = [count for limit, count in zip(value.bucket_limit, value.bucket, strict=True) if -0.95 < limit < 1.05]
        assert sum(between) == pytest.approx(inside, rel=1e-2)
    normal = events.Histograms("standardised deviations/N(0, 1)")[-1].histogram_value
    share = sum(c for limit, c in zip(normal.bucket_limit, normal.bucket, strict=True) if limit <= 1e-9) / normal.num
    assert share == pytest.approx(0.5, abs=1e-3)
    ones = limit.evaluation.next_states[limit.evaluation.matches.any(1)]
    for decoder in DECODERS:
        for bit, count in ((1, ones.sum()), (0, (~ones).sum())):
            last = events.Histograms(f"margins, {decoder}/{bit}-bits")[-1]
            assert (last.step, last.histogram_value.num) == (9, int(count))


def test_texts_and_pictures(logdir: Path) -> None:
    events = read(logdir / "narrow")
    tags = ("options", "certificate", "command")
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags}
    assert "| width | 256 |" in texts["options"]
    assert "| midpoint | yes |" in texts["certificate"]
    # The sign decoder has ties here: exact in the limit, and no number of members suffices.
    certificate = certify_task(Addition(3))["decoders"]
    for decoder, verdict in (("midpoint", "yes"), ("sign", "yes, without a margin")):
        (line,) = [line for line in texts["certificate"].splitlines() if line.startswith(f"| {decoder} |")]
        cells, found = [cell.strip() for cell in line.split("|")[2:6]], certificate[decoder]
        assert cells[0] == verdict
        assert found["all_states"]["exact"]
        assert float(cells[1].removesuffix(" (*)")) == pytest.approx(found["all_states"]["margin"], rel=1e-3, abs=1e-9)
        expected = [found["members"][scope] for scope in ("one_state", "all_states")]
        assert cells[2:] == ["none" if n is None else f"{n:,}" for n in expected]
    assert texts["command"].split()[:4] == ["ntk-ensembles", "train", "--task", "addition"]
    assert "--width 256" in texts["command"]
    for tag in ("convergence/exact-match", "convergence/deviation"):
        (image,) = events.Images(tag)
        width, height = Image.open(io.BytesIO(image.encoded_image_string)).size
        assert (width, height) == (image.width, image.height)
        assert min(width, height) >= 700


def test_a_resumed_and_a_merged_run_have_the_charts_of_an_uninterrupted_one(logdir: Path, tmp_path: Path) -> None:
    resumed = trained(tmp_path / "resumed", ensemble=5)
    train(Addition(3), dataclasses.replace(OPTIONS, resume=str(resumed)), console=QUIET)
    parts = [trained(tmp_path / "a", ensemble=4), trained(tmp_path / "b", first_member=4, ensemble=5)]
    merged, results = merge_runs(parts, str(tmp_path / "merged"))
    assert dashboard.Dashboard(merged).finish(merged.member_results(), results) == []
    expected = scalars(logdir / "wide")
    assert scalars(resumed) == scalars(merged.directory) == expected


def test_a_run_of_sums_has_the_charts_that_a_session_sees_and_the_rows_of_the_rest(
    logdir: Path, tmp_path: Path
) -> None:
    """From one session as with deviations. Resumed after five members, or merged: the rows of N = 1, 2, 4, 8, 9."""
    whole = scalars(logdir / "wide")
    assert scalars(trained(tmp_path / "one", keep_deviations="sums")) == whole
    resumed = trained(tmp_path / "resumed", ensemble=5, keep_deviations="sums")
    more = dataclasses.replace(OPTIONS, resume=str(resumed), keep_deviations="sums")
    assert train(Addition(3), more, console=QUIET)
    parts = [
        trained(tmp_path / "a", ensemble=4, keep_deviations="sums"),
        trained(tmp_path / "b", first_member=4, ensemble=5, keep_deviations="sums"),
    ]
    merged, results = merge_runs(parts, str(tmp_path / "merged"))
    assert dashboard.Dashboard(merged).finish(merged.member_results(), results) == []
    rows = json.loads((logdir / "wide" / "results.json").read_text())["convergence"]
    assert [row["members"] for row in rows] == [1, 2, 4, 8, 9]
    for directory in (resumed, merged.directory):
        found = scalars(directory)
        assert found.keys() == whole.keys()
        for tag, points in found.items():
            if "training loss" in tag:
                assert points == whole[tag]
            elif " by " not in tag:
                assert sorted(points) == [1, 2, 4, 8, 9]
        for row in rows:
            n = row["members"]
            assert found["RMS deviation/measured"][n] == pytest.approx(row["rms_deviation"])
            for decoder in DECODERS:
                for key, tag in (("exact_match", "exact match"), ("bit_accuracy", "bit accuracy")):
                    assert found[f"{tag}/{decoder}"][n] == pytest.approx(row[key][decoder])
                chart = found[f"exact match by 100 log2 N/{decoder}"]
                assert sorted(chart) == list(range(round(100 * math.log2(9)) + 1))
                assert chart[round(100 * math.log2(n))] == pytest.approx(row["exact_match"][decoder])
        for decoder in DECODERS:
            exact = [row["members"] for row in rows if row["exact_match"][decoder] < 1]
            # The next row, as nothing is known of the N between; after the last, one more.
            later = [row["members"] for row in rows if row["members"] > max(exact, default=0)]
            assert found[f"exact from N on/{decoder}"][9] == (later[0] if later else 10)
        assert not read(directory).Tags()["histograms"]


def test_a_session_of_sums_goes_on_with_rows_where_its_members_end(tmp_path: Path) -> None:
    """Members 0 to 3 of this session, then four of another: points at 1, 2, 3, 4, and at 8."""
    run = Run.open(trained(tmp_path / "run", ensemble=8, keep_deviations="sums"))
    first = Run.open(trained(tmp_path / "first", ensemble=4)).member_results()
    board = dashboard.Dashboard(run)
    board.cohort_done(first)
    results = json.loads((run.directory / "results.json").read_text())
    assert board.finish(run.member_results(), results) == []
    found = scalars(run.directory)
    assert sorted(found["RMS deviation/measured"]) == [1, 2, 3, 4, 8]
    assert found["RMS deviation/measured"][8] == pytest.approx(results["convergence"][-1]["rms_deviation"])
    (shown, *_, last) = read(run.directory).Histograms("standardised deviations/infinite width")
    assert (shown.step, last.step) == (1, 4)


def test_charts_are_written_while_the_run_goes_on(
    logdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, dict[int, float]]] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if list((tmp_path / "run").glob("*tfevents*")):
                seen.append(scalars(tmp_path / "run"))

    monkeypatch.setattr(dashboard, "_SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(dashboard, "_SHARE_OF_TIME", 1e9)
    trained(tmp_path / "run", callbacks=[Look()])
    whole = scalars(logdir / "wide")
    assert [len(charts["exact match/sign"]) for charts in seen] == [4, 8]
    for charts in seen:
        for tag in ("exact match/sign", "RMS deviation/this width"):
            assert charts[tag].items() <= whole[tag].items()
    assert scalars(tmp_path / "run") == whole


def test_the_last_members_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two panels after the first of two cohorts; and at the end again, with the figure of the directory."""
    drawn: list[str] = []
    savefig = Figure.savefig

    def counted(figure: Figure, *arguments: Any, **options: Any) -> None:
        drawn.append(figure.get_suptitle() or figure.axes[0].get_title())
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", counted)
    monkeypatch.setattr(dashboard, "_SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(dashboard, "_SHARE_OF_TIME", 1e9)
    trained(tmp_path / "run", ensemble=8)
    assert [int(title.split()[-2]) for title in drawn] == [4, 4, 8, 8, 8]


def test_members_of_other_processes_follow_when_those_before_them_have_finished(logdir: Path) -> None:
    """A process that leads sees its own cohorts, and finds those of the others in the directory."""
    run = Run.open(logdir / "wide")
    members = run.member_results()
    board = dashboard.Dashboard(run)
    board._write_at = math.inf
    cohorts = [run.store.load_file(path, *run.experiment.limit.mean.shape) for path in run.store.result_files()]
    board.cohort_done(cohorts[1])
    assert board._next == 0
    board._take_stored()
    assert board._next == len(members) == 9


def test_a_users_logger_gets_options_and_charts(logdir: Path, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    trained(tmp_path / "run", logger=logger)
    assert scalars(tmp_path / "run") == scalars(logdir / "wide")
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    chart = {int(row["step"]): float(row["exact match/sign"]) for row in rows if row.get("exact match/sign")}
    assert chart == pytest.approx(scalars(logdir / "wide")["exact match/sign"])
    assert "init: gaussian" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_callbacks_log_beside_the_run(tmp_path: Path) -> None:
    class Mine(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert trainer.logger is not None
            trainer.logger.log_metrics({"mine/logged": 2.0}, step=3)
            trainer.logger.experiment.add_scalar("mine/added", 4.0, 5)  # type: ignore[attr-defined]

    charts = scalars(trained(tmp_path / "run", callbacks=[Mine()]))
    assert charts["mine/logged"] == {3: 2.0}
    assert charts["mine/added"] == {5: 4.0}
    assert not [tag for tag in charts if tag.startswith(("train/", "epoch"))]


def test_a_disk_that_was_full_for_a_while_costs_nothing(
    logdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ntk_ensembles.events import EventFile
    from ntk_ensembles.files import SaveError

    write, failures = EventFile.write, [SaveError("no space left on device")]

    def sometimes(events: EventFile) -> None:
        if failures:
            raise failures.pop()
        write(events)

    monkeypatch.setattr(dashboard, "_SECONDS_BETWEEN_WRITES", 0.0)
    monkeypatch.setattr(EventFile, "write", sometimes)
    trained(tmp_path / "run")
    assert not failures
    assert scalars(tmp_path / "run") == scalars(logdir / "wide")


def test_losses_by_tenths_of_a_step_are_those_of_the_worst_the_median_and_the_best_member() -> None:
    losses = [[4.0, 0.4], [1.0, 0.5, 0.05], [2.0, 0.02, math.inf]]
    points = dict(dashboard._loss_points(losses))
    assert sorted(points) == list(range(21))
    at = {
        name: [10 ** points[step][f"log10 training loss by 10 step/{name}"] for step in (0, 10)]
        for name in ("worst", "median", "best")
    }
    assert at == {"worst": pytest.approx([1, 0.5]), "median": pytest.approx([1, 0.1]), "best": pytest.approx([1, 0.01])}
    # Between two steps a straight line, so a geometric mean.
    assert points[5]["log10 training loss by 10 step/worst"] == pytest.approx(math.log10(0.5) / 2)
    # The member whose loss is infinite is left out of its last step.
    assert points[20]["log10 training loss by 10 step/worst"] == pytest.approx(-1)
    long = dict(dashboard._loss_points([torch.logspace(0, -6, 5001).tolist()]))
    assert len(long) <= 1002
    assert max(long) == 50_000
