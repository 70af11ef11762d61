"""Run directories are data: complete without the task's Python, begun in one step, and trusted in nothing."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

import ntk_ensembles.files
from ntk_ensembles import Addition, Ensemble, EvaluationSet, RunOptions, train
from ntk_ensembles.cli.main import main
from ntk_ensembles.events import EventFile
from ntk_ensembles.files import SaveError
from ntk_ensembles.runs import RecordedTask, Run, RunStore, StoreError, figures, merge_runs
from ntk_ensembles.runs.store import digest, lock
from ntk_ensembles.tasks import TaskError, load_task_class

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
OPTIONS = RunOptions(width=64, ensemble=4, evaluation_states=20, tolerance=1e-2, cohort=2)
RULE110 = (ROOT / "examples" / "rule110.py").read_text(encoding="utf-8")


def train_into(out: Path, **changes: Any) -> Path:
    train(Addition(2), dataclasses.replace(OPTIONS, out=str(out), **changes), console=QUIET)
    return out


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_into(tmp_path_factory.mktemp("added") / "run")


@pytest.fixture
def copy(added: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(added, tmp_path / "copy"))


def user_task(folder: Path) -> str:
    """A user's own task, in a file of its own."""
    folder.mkdir()
    path = folder / "mine.py"
    path.write_text(RULE110)
    return f"{path}:Rule110"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a user's own task, copied without the task's file."""
    folder = tmp_path_factory.mktemp("foreign")
    task = load_task_class(user_task(folder / "user"))(cells=5, generations=4)
    train(task, dataclasses.replace(OPTIONS, out=str(folder / "origin")), console=QUIET)
    shutil.move(folder / "origin", folder / "run")
    return folder / "run"


def numbers(directory: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((directory / "results.json").read_text())
    for name in ("seconds", "peak_memory_bytes"):
        results["training"].pop(name)
    return results


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    capsys.readouterr()
    assert main(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Self-contained.


@pytest.mark.slow
def test_a_run_is_usable_without_its_tasks_file_and_executes_none(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(foreign, tmp_path / "run"))
    # The file that the run names is there again, and is another.
    named = Path(json.loads(json.dumps((directory / "config.yaml").read_text())).split(": ")[1].split(".py")[0] + ".py")
    mark = tmp_path / "executed"
    named.write_text(f"open({str(mark)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    try:
        assert main(["evaluate", "run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["convergence"] == numbers(foreign)["convergence"]
        assert main(["train", "--resume", "run", "--ensemble", "6"]) == 0
        assert main(["train", "--resume", "run", "--devices", "2", "--ensemble", "8"]) == 0
        assert main(["run", "gcd", "--backend", "run"]) == 2
        line = complaint(capsys, ["evaluate", "run", "--evaluation-seed", "5"])
        assert "not trusted to name: name it yourself (--task FILE:CLASS" in line
        ensemble = Ensemble.load("run")
    finally:
        named.unlink()
    assert not mark.exists()
    assert isinstance(ensemble.task, RecordedTask)
    assert len(ensemble) == 8
    states = ensemble.run.experiment.evaluation.states
    assert ensemble.predict(states).shape == (20, 5)
    with pytest.raises(TaskError, match="in Python task="):
        ensemble.execute([(1, 2)])


def test_the_task_that_is_named_again_gives_the_run_its_meaning(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path(shutil.copytree(foreign, tmp_path / "run"))
    spec = user_task(tmp_path / "user")
    cls = load_task_class(spec)
    for given in (cls, cls(cells=5, generations=4)):
        ensemble = Ensemble.load(directory, task=given)
        assert isinstance(ensemble.task, cls)
        assert ensemble.task.options == {"cells": 5, "generations": 4}
    other = ["--evaluation-states", "25", "--evaluation-seed", "5"]
    assert main(["evaluate", str(directory), *other, "--task", spec]) == 0
    assert main(["train", "--resume", str(directory), "--task", spec, "--ensemble", "5"]) == 0
    with pytest.raises(StoreError, match="is not a run of this task, cells is 6 here and 5 there"):
        Ensemble.load(directory, task=cls(cells=6, generations=4))
    with pytest.raises(StoreError, match="is not a run of this task, task is addition here and rule110 there"):
        Ensemble.load(directory, task=Addition)
    changed = tmp_path / "user" / "changed.py"
    changed.write_text(RULE110.replace("(1, 1, 0), ", "").replace('"""Return the last generation:', 'r"""Return:'))
    with pytest.raises(StoreError, match="the task's templates are not the same"):
        Ensemble.load(directory, task=load_task_class(f"{changed}:Rule110"))
    capsys.readouterr()
    line = complaint(capsys, ["train", "--resume", str(directory), "--task", "addition"])
    assert "--task is addition here and" in line


def test_recorded_data_are_the_tasks(added: Path) -> None:
    with safe_open(added / "task.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fields = json.loads(file.metadata()["fields"])
    task = Addition(2)
    assert fields == [[name, len(task.layout[name])] for name in task.layout]
    labels = torch.zeros(len(task.templates), task.layout.bits, dtype=torch.bool)
    labels[tuple(tensors["sets"].T)] = True
    assert torch.equal(labels, task.templates.labels)
    sampled, run = EvaluationSet.sample(task, 20, 0), Run.open(added)
    assert run.experiment.recorded is not None
    assert torch.equal(run.experiment.recorded.states, sampled.states)
    assert [t.tolist() for t in run.experiment.recorded.trajectories] == [t.tolist() for t in sampled.trajectories]
    assert isinstance(run.experiment.task, Addition)


# Begun or not begun.


def fail_at(patch: pytest.MonkeyPatch, call: int) -> None:
    """Let the disk be full at the ``call``-th file that is written."""
    calls, fsync = [0], os.fsync

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] >= call:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    patch.setattr(ntk_ensembles.files.os, "fsync", full)


@pytest.mark.slow
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_at_any_file_leaves_what_the_same_command_goes_on_with(
    exists: bool, added: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--task", "addition", "--bits", "2", "--width", "64", "--evaluation-states", "20"]
    arguments += ["--tolerance", "1e-2", "--cohort", "2", "--ensemble", "4"]
    for call in range(1, 40):
        out = tmp_path / str(call)
        if exists:
            out.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, call)
            capsys.readouterr()
            status = main([*arguments, "--out", str(out)])
            printed = capsys.readouterr()
        begun = RunStore.has_begun(out)
        if status:
            # One line, the machine's failure, and no half of a beginning.
            assert status == 1
            assert len(printed.err.splitlines()) == 1
            assert begun or (not out.exists() if not exists else {path.name for path in out.iterdir()} <= {".lock"})
        else:
            assert "warning" in printed.out or call > 10
        assert main([*arguments, "--out", str(out)]) == 0
        assert numbers(out) == numbers(added)
        assert {path.name for path in out.rglob(".*")} <= {".lock"}
        # Once a run has begun it is the same whether its directory was there before.
        if begun if exists else not status and "warning" not in printed.out:
            break
    assert call > (2 if exists else 10)


@pytest.mark.slow
def test_a_kill_at_any_file_leaves_what_the_same_command_goes_on_with(added: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, out=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    for call in range(1, 12):
        shutil.rmtree(tmp_path / "run")
        child = os.fork()
        if not child:
            calls = [0]

            def dies(descriptor: int, calls: list[int] = calls, call: int = call) -> None:
                calls[0] += 1
                if calls[0] == call:
                    os._exit(9)

            ntk_ensembles.files.os.fsync = dies
            try:
                train(Addition(2), options, console=QUIET)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 9, call
        train(Addition(2), options, console=QUIET)
        assert numbers(tmp_path / "run") == numbers(added)
        assert {path.name for path in (tmp_path / "run").rglob(".*")} <= {".lock"}


def test_foreign_files_are_neither_taken_for_a_beginning_nor_swept(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    (tmp_path / ".gitlab-ci.yml").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        train_into(tmp_path)
    (tmp_path / "config.yaml").unlink()
    train_into(tmp_path)
    train_into(tmp_path)
    assert (tmp_path / ".gitlab-ci.yml").read_text() == "mine"


def test_wrong_templates_are_refused_before_there_is_a_directory(tmp_path: Path) -> None:
    class Wrong(Addition):
        def reference(self, task_input: Any) -> int:
            return 0

    with pytest.raises(TaskError, match="are wrong"):
        train(Wrong(2), dataclasses.replace(OPTIONS, out=str(tmp_path / "run")), console=QUIET)

    class Odd(Addition):
        options = {"bits": {2}}

    class Clash(Addition):
        options = {"bits": 2, "width": 3}

    class Loud(Addition):
        name = "two\nlines"

    for task, says in ((Odd(2), "JSON"), (Clash(2), "options width belong to every run"), (Loud(2), "name cannot be")):
        with pytest.raises(ValueError, match=says):
            train(task, dataclasses.replace(OPTIONS, out=str(tmp_path / "run")), console=QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("how", ["folder", "dangling", "full", "width"])
def test_a_failed_merge_leaves_nothing(
    how: str, added: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = train_into(tmp_path / "part", first_member=4, ensemble=2)
    weights = sorted((part / "weights").iterdir())[0]
    if how in ("folder", "dangling"):
        weights.unlink()
        weights.mkdir() if how == "folder" else weights.symlink_to("nowhere")
    elif how == "width":
        config = part / "config.yaml"
        config.write_text(config.read_text().replace("width: 64", "width: 64.0"))
    else:
        fail_at(monkeypatch, 5)
    with pytest.raises((ValueError, ntk_ensembles.files.SaveError)):
        merge_runs([added, part], str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_what_kills_leave_is_swept(copy: Path) -> None:
    for folder in (".", "checkpoints", "weights"):
        (copy / folder / ".tmpAbC123").write_text("half")
        (copy / folder / ".members-000000-000001.safetensors.ab12cd34").write_text("half")
    (copy / ".beginning").touch()
    train_into(copy)
    assert {path.name for path in copy.rglob(".*")} <= {".lock"}


def test_a_file_in_the_place_of_checkpoints_costs_no_weights(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").write_text("x")
    before = sorted((copy / "weights").iterdir())
    with pytest.raises(StoreError, match="checkpoints: is no folder"):
        train_into(copy)
    assert sorted((copy / "weights").iterdir()) == before


# Results first.


def test_pictures_that_fail_cost_a_warning(
    added: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_fonts(*arguments: Any) -> None:
        raise RuntimeError("no fonts")

    def full(event_file: EventFile) -> None:
        raise SaveError("events: no space left on device")

    monkeypatch.setattr(figures, "convergence_charts", without_fonts)
    monkeypatch.setattr(EventFile, "write", full)
    out = tmp_path / "run"
    shutil.copytree(added, out)
    (out / "results.json").unlink()
    assert main(["train", "--resume", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "the figures cannot be drawn (RuntimeError: no fonts)" in printed
    assert "events: no space left on device" in printed.split("warning:")[-1]
    assert numbers(out) == numbers(added)


# Trusted in nothing.

NO_RUN = ("manifest.json", "dangling")


@pytest.mark.parametrize("name", ["manifest.json", "config.yaml", "task.safetensors", "checkpoints/a", "weights/a"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "dangling", "zero"])
def test_only_regular_files_are_read_and_nothing_waits(name: str, kind: str, copy: Path) -> None:
    path = copy / name
    if name.endswith("/a"):
        path = sorted(path.parent.iterdir())[0]
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"loop": path, "dangling": copy / "nowhere", "zero": Path("/dev/zero")}[kind])
    with pytest.raises(StoreError, match="is no run directory" if (name, kind) == NO_RUN else path.name):
        Ensemble.load(copy)


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_lock_that_is_no_file_is_refused(kind: str, copy: Path) -> None:
    path, target = copy / ".lock", copy.parent / "precious"
    path.unlink(missing_ok=True)
    target.write_text("mine")
    {"pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(target), "folder": path.mkdir}[kind]()
    with pytest.raises(StoreError, match=r"\.lock: is no file"), lock(copy):
        pass
    assert target.read_text() == "mine"


def test_links_in_a_directory_lead_no_writing_elsewhere(copy: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("results.json", "config.yaml"):
        (precious / name).write_text((copy / name).read_text())
        (copy / name).unlink()
        (copy / name).symlink_to(precious / name)
    (precious / "results.json").write_text("mine")
    events = max(copy.glob("events.out.tfevents.*"))
    events.rename(precious / "events")
    events.symlink_to(precious / "events")
    shutil.rmtree(copy / "figures")
    (precious / "mine").touch()
    (copy / "figures").symlink_to(precious)
    os.mkfifo(copy / "pipe")
    train_into(copy, ensemble=5)
    assert (precious / "results.json").read_text() == "mine"
    assert "ensemble: 4" in (precious / "config.yaml").read_text()
    assert (precious / "events").stat().st_size > 0
    assert (precious / "mine").exists()


def test_results_in_the_place_of_which_a_pipe_stands_are_written(copy: Path, added: Path) -> None:
    (copy / "results.json").unlink()
    os.mkfifo(copy / "results.json")
    train_into(copy)
    assert numbers(copy) == numbers(added)


@pytest.mark.parametrize(
    "content",
    [
        '{"format": Infinity}',
        '{"format": 1e999}',
        '{"format": true}',
        '{"format": 5.0}',
        '{"format": 5}',
        '{"format": "5"}',
        "[" * 100_000,
        '{"format":' + "[" * 100_000,
        "3",
        '"' + "x" * 2_000_000 + '"',
    ],
    ids=lambda content: content[:16],
)
def test_a_manifest_that_is_none(content: str, copy: Path) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json: is damaged"):
        Run.open(copy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task", 7),
        ("task", "x" * 1000),
        ("task", "\x1b[2J"),
        ("task_options", [1]),
        ("task_options", {"bits": 3}),
        ("device", "tpu"),
        ("width", True),
        ("seed", False),
        ("templates", None),
    ],
)
def test_a_manifest_with_a_forged_value(name: str, value: object, copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(StoreError, match="is damaged|belongs to another run"):
        Run.open(copy)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", "1e-06 x"),
        ("tolerance", "true"),
        ("tolerance", ".nan"),
        ("width", "null"),
        ("width", "64.0"),
        ("ensemble", "'8'"),
        ("ensemble", "4.0"),
        ("seed", "[0]"),
        ("init", "[x]"),
        ("init", "{a: 1}"),
        ("keep_weights", "true"),
        ("first_member", "-1"),
        ("bits", "3"),
        ("more", "1"),
    ],
)
def test_options_of_a_wrong_kind(name: str, value: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(f"{name}:")]
    path.write_text("\n".join([*lines, f"{name}: {value}"]))
    for arguments in (["evaluate", str(copy)], ["train", "--resume", str(copy)], ["merge", str(copy), str(copy)]):
        assert "config.yaml" in complaint(capsys, arguments)


def test_numbers_without_a_point_are_numbers(copy: Path, added: Path) -> None:
    path = copy / "config.yaml"
    assert "tolerance: 0.01\n" in path.read_text()
    path.write_text(path.read_text().replace("tolerance: 0.01", "tolerance: 1e-2"))
    assert Run.open(copy).experiment.options == Run.open(added).experiment.options


@pytest.mark.parametrize(
    "content",
    [
        "a: &a [x, x]\nb: [*a, *a]\n",
        "a: &a [*a]\n",
        "[" * 20_000,
        "task: !!python/object/apply:os.system ['touch executed']\n",
        "a: " + "b" * 100_000,
    ],
    ids=["anchors", "self", "deep", "tag", "large"],
)
def test_yaml_that_is_more_than_options(
    content: str, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(copy)
    (copy / "config.yaml").write_text(content)
    assert "config.yaml: is damaged" in complaint(capsys, ["evaluate", str(copy)])
    assert not (copy / "executed").exists()


def forge(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Change tensors and give them the right checksum."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    change(tensors, metadata)
    texts = {name: text for name, text in metadata.items() if name in ("fields", "groups")}
    save_file(tensors, path, {**metadata, "sha256": digest(tensors, texts)})


Change = Callable[[torch.Tensor], torch.Tensor]
FORGED: list[tuple[str, str, Change]] = [
    ("checkpoints", "converged", lambda t: t.to(torch.int64)),
    ("checkpoints", "converged", lambda t: t.to(torch.uint8).mul(2).view(torch.bool)),
    ("checkpoints", "indices", lambda t: t.to(torch.float64)),
    ("checkpoints", "indices", lambda t: t * 0),
    ("checkpoints", "indices", lambda t: t - 5),
    ("checkpoints", "deviations", lambda t: t[:, :-1]),
    ("checkpoints", "deviations", lambda t: t.to(torch.float32)),
    ("checkpoints", "deviations", lambda t: t * torch.nan),
    ("checkpoints", "loss_counts", lambda t: t + 1),
    ("checkpoints", "loss_counts", lambda t: t - 100),
    ("checkpoints", "losses", lambda t: t[:1]),
    ("checkpoints", "relative_loss", lambda t: t * torch.nan),
    ("checkpoints", "seconds", lambda t: t[:, :2]),
    ("checkpoints", "seconds", lambda t: t * torch.inf),
    ("checkpoints", "steps", lambda t: -t),
    ("weights", "hidden", lambda t: t[:, :-1]),
    ("weights", "hidden", lambda t: t.to(torch.int32)),
    ("weights", "readout", lambda t: t[:-1]),
    ("task", "ones", lambda t: t + 1000),
    ("task", "ones", lambda t: t[:1]),
    ("task", "sets", lambda t: -t),
    ("task", "states", lambda t: t[:, :-1]),
    ("task", "states", lambda t: t[:0]),
    ("task", "trajectory_states", lambda t: t + 10**6),
    ("task", "trajectory_states", lambda t: t.flip(0)),
    ("task", "trajectory_lengths", lambda t: t * 0),
    ("task", "trajectory_lengths", lambda t: t - 2**62),
]


@pytest.mark.parametrize(("where", "name", "change"), FORGED, ids=lambda value: value if isinstance(value, str) else "")
def test_tensors_of_a_wrong_kind_with_the_right_checksum(where: str, name: str, change: Change, copy: Path) -> None:
    path = copy / "task.safetensors" if where == "task" else sorted((copy / where).iterdir())[0]
    forge(path, lambda tensors, texts: tensors.update({name: change(tensors[name]).contiguous()}))
    with pytest.raises(StoreError, match=path.name):
        Ensemble.load(copy)


@pytest.mark.parametrize("where", ["task", "checkpoints", "weights"])
def test_tensors_that_are_missing(where: str, copy: Path) -> None:
    path = copy / "task.safetensors" if where == "task" else sorted((copy / where).iterdir())[0]
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    for name in names:
        shutil.copy(path, copy / "kept")
        forge(path, lambda tensors, texts, name=name: tensors.pop(name))  # type: ignore[misc]
        with pytest.raises(StoreError, match=name):
            Ensemble.load(copy)
        shutil.move(copy / "kept", path)


@pytest.mark.parametrize("key", ["fields", "groups"])
@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[1]", '[["self", 6]]', '[["a", 0]]', '[["a", 10000000000]]', '[["a", 1e3]]', "[" * 100_000],
    ids=lambda text: text[:12],
)
def test_texts_of_a_wrong_kind(key: str, text: str, copy: Path) -> None:
    forge(copy / "task.safetensors", lambda tensors, texts: texts.update({key: text}))
    with pytest.raises(StoreError, match=r"task\.safetensors"):
        Run.open(copy)


def test_a_tasks_name_leads_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(Addition):
        name = "../../away [/x]"

    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    train(Away(2), OPTIONS, console=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(list((tmp_path / "a" / "b" / "runs").iterdir())) == 1
