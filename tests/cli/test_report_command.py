"""`ntk-ensembles report` as a user runs it: the page is read as a browser reads it, and its numbers counted again."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from ntk_ensembles.cli.main import main
from ntk_ensembles.cli.train import train_command
from ntk_ensembles.runs import Run, figures, report

SMALL = ["--task", "addition", "--ensemble", "12", "--tolerance", "1e-4", "--evaluation-states", "60", "--cohort", "4"]
FIGURES = {
    "exact-match",
    "deviation",
    "outputs-midpoint-1",
    "outputs-midpoint-12",
    "outputs-sign-1",
    "outputs-sign-12",
    "standardised-infinite",
    "standardised-finite",
    "failures",
    "time",
}


def run_of(directory: Path, *arguments: str) -> Path:
    assert train_command([*SMALL, *arguments, "--out", str(directory)]) == 0
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("trained") / "run", "--bits", "3", "--width", "256")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wider run of the same task, and one of a larger task."""
    folder = tmp_path_factory.mktemp("others")
    return (
        run_of(folder / "wide", "--bits", "3", "--width", "512"),
        run_of(folder / "large", "--bits", "4", "--width", "256"),
    )


class Page(HTMLParser):
    """What a browser sees: the tags with their attributes, text, and tables by their captions."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "caption":
            self.captions.append("")
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.words.append(data)
        if "caption" in self._open:
            self.captions[-1] += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return "\n".join(self.words)

    def table(self, begins: str) -> list[dict[str, str]]:
        """Rows of the table whose caption begins so, by the headings of the columns."""
        (place,) = [i for i, caption in enumerate(self.captions) if caption.startswith(begins)]
        headings, *rows = self.tables[place]
        return [dict(zip(headings, row, strict=True)) for row in rows]


def page_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Page, Path]:
    capsys.readouterr()
    assert main(["report", *arguments]) == 0
    found = re.fullmatch(r"Report in (.*/index\.html)\n", capsys.readouterr().out)
    assert found
    path = Path(found[1])
    return Page(path), path.parent


@pytest.fixture(scope="module")
def reported(trained: Path) -> tuple[Page, Path]:
    assert main(["report", str(trained)]) == 0
    return Page(trained / "report" / "index.html"), trained / "report"


def leave_blank(patch: pytest.MonkeyPatch, *beginnings: str) -> None:
    """Draw no charts whose names begin so: that is most of the time that a report takes."""
    drawn = figures.Chart.figure

    def figure(chart: figures.Chart, title: str) -> Figure:
        return Figure(figsize=(1, 1)) if chart.name.startswith(beginnings) else drawn(chart, title)

    patch.setattr(figures.Chart, "figure", figure)


def number(cell: str) -> float:
    """The number in a cell; one that is rounded to 100% is less."""
    cell = cell.replace(",", "")
    return float(cell.strip("<>%")) / 100 if cell.endswith("%") else float(cell)


def test_the_page_is_self_contained(reported: tuple[Page, Path]) -> None:
    page, folder = reported
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#x").startswith("#")
        assert "href" not in attributes or (attributes["href"] or "")[1:] in anchors
        assert (attributes.get("src") or "data:").startswith("data:image/svg+xml;base64,") or "src" not in attributes
    style = re.search(r"<style>(.*?)</style>", (folder / "index.html").read_text(), re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_every_figure_is_there_in_both_formats_and_in_the_page(reported: tuple[Page, Path]) -> None:
    page, folder = reported
    assert {path.name for path in folder.iterdir()} == {"index.html"} | {
        f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")
    }
    inline = [
        base64.b64decode((attributes["src"] or "").partition(",")[2]) for tag, attributes in page.tags if tag == "img"
    ]
    assert sorted(inline) == sorted((folder / f"{name}.svg").read_bytes() for name in FIGURES)
    for svg in inline:
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        for element in root.iter():
            assert element.tag.rpartition("}")[2] not in ("script", "image", "foreignObject")
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_numbers_are_those_of_the_run(reported: tuple[Page, Path], trained: Path) -> None:
    page, _ = reported
    results = json.loads((trained / "results.json").read_text())
    for decoder in ("midpoint", "sign"):
        rows = page.table(f"Exact match by {decoder}")
        assert [int(row["N"]) for row in rows] == [row["members"] for row in results["convergence"]]
        for shown, row in zip(rows, results["convergence"], strict=True):
            # Two digits behind the point of a percentage.
            assert number(shown["measured"]) == pytest.approx(row["exact_match"][decoder], abs=1e-4)
            assert number(shown["infinite width"]) == pytest.approx(row["predicted_exact_match"][decoder], abs=1e-4)
            assert number(shown["this width"]) == pytest.approx(row["finite_width_exact_match"][decoder], abs=1e-4)
            assert number(shown["bits right"]) == pytest.approx(row["bit_accuracy"][decoder], abs=1e-4)
            assert number(shown["executions right"]) == pytest.approx(row["execution_match"][decoder], abs=1e-4)
            assert (shown["measured"] == "100%") == (row["exact_match"][decoder] == 1)
    for shown, row in zip(page.table("RMS deviation"), results["convergence"], strict=True):
        assert number(shown["measured"]) == pytest.approx(row["rms_deviation"], rel=1e-3)
        assert number(shown["infinite width"]) == pytest.approx(row["predicted_rms_deviation"], rel=1e-3)
        assert number(shown["this width"]) == pytest.approx(row["finite_width_rms_deviation"], rel=1e-3)
    seconds, measured = (
        {row["phase"]: number(row["seconds"]) for row in page.table("Seconds")},
        results["training"]["seconds"],
    )
    for words, name in {"draw": "init", "train": "train", "evaluate": "evaluate", "start-up": "startup"}.items():
        assert seconds[words] == pytest.approx(measured[name], abs=0.051)
    assert seconds["total of the last session"] == pytest.approx(measured["total"], abs=0.051)
    environment = {row["what"]: row["value"] for row in page.table("Where members were trained")}
    assert environment["versions: torch"] == results["environment"]["versions"]["torch"]
    assert environment["device"] == results["environment"]["device"]
    options = {row["option"]: row["value"] for row in page.table("Options")}
    assert options["width"] == "256"
    assert options["bits"] == "3"
    assert "ntk-ensembles train --task addition --bits 3 --width 256 --ensemble 12" in page.text


def test_the_certificate_is_that_of_certify(reported: tuple[Page, Path], capsys: pytest.CaptureFixture[str]) -> None:
    page, _ = reported
    capsys.readouterr()
    assert main(["certify", "--task", "addition", "--bits", "3", "--evaluation-states", "60", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["decoders"]["midpoint"]
    (shown,) = [row for row in page.table("members that suffice") if row["decoder"] == "midpoint"]
    assert int(shown["all 2^m states"]) == found["members"]["all_states"]
    assert int(shown["the 60 sampled"]) == found["members"]["evaluation_states"]
    worst = page.table("worst case")[0]
    assert number(worst["margin of 1-bits"]) == pytest.approx(found["all_states"]["worst_one"]["margin"], rel=1e-3)


def deviations_of(directory: Path) -> np.ndarray:
    parts = [load_file(path) for path in sorted(directory.glob("checkpoints/*.safetensors"))]
    order = np.argsort(np.concatenate([part["indices"] for part in parts]))
    deviations = np.concatenate([part["deviations"] for part in parts])[order]
    return deviations[np.concatenate([part["converged"] for part in parts])[order]].astype(np.float64)


def means_of(deviations: np.ndarray, members: int) -> np.ndarray:
    groups = len(deviations) // members
    return deviations[: groups * members].reshape(groups, members, *deviations.shape[1:]).mean(1)


def test_failures_are_those_that_plain_numpy_counts(reported: tuple[Page, Path], trained: Path) -> None:
    page, _ = reported
    experiment = Run.open(trained).experiment
    limit, task = experiment.limit, experiment.task
    states = limit.evaluation.states
    true = np.array(
        [
            [any(bit in t.sets and t.matches(state) for t in task.templates.templates) for bit in range(9)]
            for state in states
        ]
    )
    matching = np.array([sum(t.matches(state) for t in task.templates.templates) for state in states])
    deviations = deviations_of(trained)
    checked = 0
    for decoder in ("midpoint", "sign"):
        (caption,) = [c for c in page.captions if re.match(rf"{decoder}, N = \d+: \d+ of 9 bits", c)]
        members, failing = (int(found) for found in re.findall(r"\d+", caption)[:2])
        outputs = limit.mean.numpy() + means_of(deviations, members)
        wrong = (outputs > limit.thresholds[decoder].numpy()) != true
        # The largest N with a failure.
        assert (
            members == 12
            or not ((limit.mean.numpy() + means_of(deviations, 12) > limit.thresholds[decoder].numpy()) != true).any()
        )
        rows = page.table(f"{decoder}, N = {members}:")
        assert {row["bit"] for row in rows} == {task.layout.bit_name(bit) for bit in range(9) if wrong[:, :, bit].any()}
        assert len(rows) == failing
        assert f"{wrong[:, :, 0].size} readings" in caption
        for row in rows:
            bit = next(bit for bit in range(9) if task.layout.bit_name(bit) == row["bit"])
            missed, invented = wrong[:, true[:, bit], bit], wrong[:, ~true[:, bit], bit]
            assert int(row["1 read as 0"]) == missed.sum()
            assert int(row["0 read as 1"]) == invented.sum()
            assert number(row["measured"]) == pytest.approx(wrong[:, :, bit].mean(), rel=1e-2)
            seen = matching[wrong[:, :, bit].any(0)]
            assert row["s"] == (f"{seen.min()} to {seen.max()}" if seen.min() < seen.max() else f"{seen.min()}")
            able = [template for template in task.templates.templates if bit in template.sets]
            if missed.any():
                failures = {state: int(wrong[:, state, bit].sum()) for state in range(len(states)) if true[state, bit]}
                counts: dict[str, int] = {}
                for template in able:
                    count = sum(n for state, n in failures.items() if n and template.matches(states[state]))
                    counts[template.group] = counts.get(template.group, 0) + count
                for group, count in counts.items():
                    assert not count or f"{group} {count}" in row["templates"]
            if invented.any():
                assert (f"none of {len(able)} matched" if able else "no template sets it") in row["templates"]
            checked += 1
    assert checked > 5


def test_predicted_failures_are_the_tail_of_a_gaussian(reported: tuple[Page, Path], trained: Path) -> None:
    from scipy.stats import norm

    page, _ = reported
    limit = Run.open(trained).experiment.limit
    (caption,) = [c for c in page.captions if re.match(r"midpoint, N = \d+: ", c)]
    members = int(re.findall(r"\d+", caption)[0])
    sides = np.where(limit.evaluation.next_states.numpy(), 1, -1)
    margin = sides * (limit.mean - limit.thresholds["midpoint"]).numpy()
    spread = np.sqrt(limit.variance.numpy() / members)[:, None]
    with np.errstate(divide="ignore"):
        expected = norm.cdf(-margin / spread).mean(0)
    for row in page.table(f"midpoint, N = {members}:"):
        bit = next(bit for bit in range(9) if limit.task.layout.bit_name(bit) == row["bit"])
        assert number(row["infinite width"]) == pytest.approx(expected[bit], rel=1e-2)


def test_standardised_deviations_and_members_needed(reported: tuple[Page, Path], trained: Path) -> None:
    page, _ = reported
    experiment = Run.open(trained).experiment
    deviations, at_width, limit = deviations_of(trained), experiment.at_width, experiment.limit
    assert at_width is not None
    varies = limit.variance.numpy() > 1e-12
    for row in page.table("Deviations over what is predicted"):
        infinite = row["by the theory of"] == "infinite width"
        members = int(row["N"])
        bias = 0.0 if infinite else at_width.bias.numpy()
        variance = limit.variance.numpy()[:, None] * np.ones(9) if infinite else at_width.variance.numpy()
        scores = ((means_of(deviations, members) - bias)[:, varies] / np.sqrt(variance[varies] / members)).ravel()
        scores = scores[np.isfinite(scores)]
        assert number(row["mean (theory: 0)"]) == pytest.approx(scores.mean(), abs=2e-3)
        assert number(row["standard deviation (theory: 1)"]) == pytest.approx(scores.std(), abs=2e-3)

    def exact(members: int, decoder: str) -> float:
        outputs = limit.mean.numpy() + means_of(deviations, members)
        decoded = outputs > limit.thresholds[decoder].numpy()  # type: ignore[index]
        return float((decoded == limit.evaluation.next_states.numpy()).all(2).mean())

    for row in page.table("Members needed"):
        target, decoder = number(row["exact match"]), row["decoder"]
        if row["measured"] == "none":
            assert exact(12, decoder) < target
        else:
            found = int(row["measured"])
            assert exact(found, decoder) >= target
            assert found == 1 or exact(found - 1, decoder) < target
            assert all(exact(size, decoder) >= target for size in (1, 2, 4, 8, 12) if size >= found)
        if row["infinite width"] != "none":
            needed = int(row["infinite width"])
            assert limit.exact_match(needed, decoder) >= target  # type: ignore[arg-type]
            assert needed == 1 or limit.exact_match(needed - 1, decoder) < target  # type: ignore[arg-type]


def test_a_run_of_sums_is_reported_without_what_needs_single_members(
    reported: tuple[Page, Path], tmp_path: Path
) -> None:
    sums = run_of(tmp_path / "sums", "--bits", "3", "--width", "256", "--keep-deviations", "sums")
    assert main(["report", str(sums), "--no-certificate"]) == 0
    page, each = Page(sums / "report" / "index.html"), reported[0]
    assert {path.stem for path in (sums / "report").glob("*.svg")} == {"exact-match", "deviation", "time"}
    for title in ("Exact match by midpoint", "Exact match by sign", "RMS deviation from the NTK mean"):
        assert page.table(title) == each.table(title)
    assert any("measured to the next power of two" in caption for caption in page.captions)
    assert "keeps sums over groups of members" in page.text


def test_runs_side_by_side(
    trained: Path,
    others: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    leave_blank(monkeypatch, "1-", "2-", "3-")  # those of one run are drawn above
    page, folder = page_of(capsys, str(trained), *map(str, others), "--no-certificate")
    assert folder.parent == Path("runs")
    names = {path.stem for path in folder.glob("*.svg")}
    compared = {
        "exact-match-midpoint",
        "exact-match-sign",
        "deviation",
        "width",
        "time",
        "needed-1-90",
        "needed-1-99.9",
    }
    each = {f"{i}-{name}" for i in (1, 2, 3) for name in FIGURES - {"time", "failures"}}
    assert compared | each <= names
    rows = page.table("Runs")
    assert [row["run"] for row in rows] == ["bits 3, width 256", "bits 3, width 512", "bits 4, width 256"]
    assert [row["directory"] for row in rows] == [str(trained), *map(str, others)]
    for row, directory in zip(rows, (trained, *others), strict=True):
        last = json.loads((directory / "results.json").read_text())["convergence"][-1]
        assert number(row["RMS deviation"]) == pytest.approx(last["rms_deviation"], rel=1e-2)


def test_the_number_of_members_and_another_directory(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(trained), "--no-certificate", "--members", "2", "--out", str(tmp_path / "out")]
    page, folder = page_of(capsys, *arguments)
    assert folder == tmp_path / "out"
    assert (folder / "outputs-midpoint-2.png").exists()
    assert page.table("sign, N = 2:")
    # Again in the place of the first, with the same bytes.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    page_of(capsys, *arguments)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("undrawn")
def test_what_is_incomplete_is_said(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    next((copy / "checkpoints").glob("members-000008-*")).unlink()
    page, _ = page_of(capsys, str(copy), "--no-certificate")
    assert "Incomplete: 8 of 12 planned members are finished." in page.text
    assert "There is no results.json of these members" in page.text
    assert [row["N"] for row in page.table("Exact match by sign")] == ["1", "2", "4", "8"]
    assert {row["phase"] for row in page.table("Seconds")} == {"draw", "train", "evaluate"}


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "content", ["[]", "{", '{"members": 12}', '{"members": 12, "training": {"seconds": {"startup": "x", "total": 1}}}']
)
def test_a_damaged_results_file_is_not_used(
    content: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    (copy / "results.json").write_text(content)
    page, _ = page_of(capsys, str(copy), "--no-certificate")
    assert "There is no results.json of these members" in page.text


def test_a_run_without_each_members_deviations(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report._Reported, "deviations", None)
    page, folder = page_of(capsys, str(trained), "--no-certificate", "--out", str(tmp_path / "out"))
    assert "keeps sums over groups of members" in page.text
    assert {path.stem for path in folder.glob("*.png")} == {"exact-match", "deviation", "time"}
    assert page.table("Exact match by midpoint")


def test_no_member_has_converged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--bits", "3", "--width", "64", "--steps", "1", "--tolerance", "1e-9", "--out", str(tmp_path / "run")]
    assert train_command([*SMALL, *arguments]) == 1
    page, folder = page_of(capsys, str(tmp_path / "run"), "--no-certificate")
    assert "No member has converged" in page.text
    assert "12 of 12 members did not converge" in page.text
    assert {path.stem for path in folder.glob("*.png")} == {"time"}


HOSTILE = '''
from ntk_ensembles.tasks import StateLayout, Task, Template

class Shift(Task[int, int]):
    """Moves bits up.

    Args:
        bits: Bits of a number.
    """

    name = "<script>alert('$x_{$')</script>"

    def __init__(self, bits: int = 3) -> None:
        super().__init__()
        self.bits = bits
        self.layout = StateLayout(**{"<b>&": bits})

    def make_templates(self):
        bits = range(self.bits)
        return [Template.rule("<img src=x>", ones=[i], sets=[(i + 1) % self.bits]) for i in bits]

    def inputs(self, generator):
        yield from range(1, 1 << self.bits)

    def initial_fields(self, task_input):
        return {"<b>&": task_input}

    def read_output(self, fields):
        return fields["<b>&"]

    def reference(self, task_input):
        return (task_input << 1 | task_input >> (self.bits - 1)) & ((1 << self.bits) - 1)

    def num_micro_steps(self, task_input):
        return 1
'''


def test_everything_is_escaped_and_no_task_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "task.py"
    path.write_text(HOSTILE)
    directories = []
    for bits in ("3", "4"):
        directories.append(str(tmp_path / f"<i>{bits}"))
        arguments = ["--task", f"{path}:Shift", "--bits", bits, "--width", "64", "--out", directories[-1]]
        assert train_command([*arguments, "--ensemble", "6", "--tolerance", "1e-3"]) == 0
    spec = f"{path}:Shift"
    with monkeypatch.context() as patch:
        leave_blank(patch, "")
        page, _ = page_of(capsys, directories[0], "--task", spec, "--out", str(tmp_path / "named"))
    assert "worst case of the infinitely wide ensemble" in page.captions
    path.unlink()
    leave_blank(monkeypatch, "2-")  # the words of the first run's are the same
    page, folder = page_of(capsys, *directories, "--out", str(tmp_path / "out"))
    assert "There is none: what inputs and outputs of task" in page.text
    text = (folder / "index.html").read_text()
    assert "<script" not in text
    assert "<img src=x" not in text
    assert "<b>" not in text
    assert "<i>" not in text
    assert "<script>alert('$x_{$')</script>" in page.text
    assert any(
        "<b>&[" in row["bit"]
        for caption in page.captions
        if caption.startswith("sign, N")
        for row in page.table(caption[:20])[:1]
    )
    assert {path.stem for path in folder.glob("needed-1-*.svg")} == {"needed-1-90", "needed-1-99.9"}


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["report", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_bad_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("report")))
    assert "is no run directory" in complaint(capsys, str(copy), str(tmp_path))
    link = tmp_path / "link"
    link.symlink_to(copy)
    assert "is named twice" in complaint(capsys, str(copy), str(link))
    assert "--members 13: expected an integer from 1 to 12" in complaint(capsys, str(copy), "--members", "13")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("my page")
    assert "is not empty" in complaint(capsys, str(copy), "--out", str(tmp_path / "mine"))
    (tmp_path / "file").touch()
    assert "cannot be written" in complaint(capsys, str(copy), "--out", str(tmp_path / "file"))
    shutil.rmtree(copy / "checkpoints")
    assert "has no finished member yet" in complaint(capsys, str(copy))
    assert "required" in complaint(capsys)
    assert not (copy / "report").exists()
    assert (tmp_path / "mine" / "index.html").read_text() == "my page"


def test_without_lightning(trained: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom matplotlib.figure import Figure\nfrom ntk_ensembles.cli.main import main\n"
        "from ntk_ensembles.runs import figures\n"
        "figures.Chart.figure = lambda chart, title: Figure(figsize=(1, 1))\n"  # drawn in this process
        f"assert main(['report', {str(trained)!r}, '--no-certificate', '--out', {str(tmp_path / 'out')!r}]) == 0\n"
        "assert 'lightning' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
