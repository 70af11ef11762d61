"""Resumed, grown, merged, interrupted and spread-out runs end with the numbers of one run; damage is refused."""

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ntk_ensembles.cli.main import main
from ntk_ensembles.cli.train import train_command
from ntk_ensembles.runs import Run, RunStore, StoreError
from ntk_ensembles.runs import store as store_of_runs
from ntk_ensembles.training import stream

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[2]
SMALL = ["--task", "addition", "--bits", "3", "--width", "256", "--evaluation-states", "40", "--tolerance", "1e-4"]


def numbers(directory: Path) -> dict[str, Any]:
    """Everything in results.json that does not tell of time or of the machine."""
    results: dict[str, Any] = json.loads((directory / "results.json").read_text())
    results["training"].pop("seconds")
    results["training"].pop("peak_memory_bytes")
    results["environment"].pop("cpu_threads")
    return results


def run(directory: Path, *arguments: str) -> dict[str, Any]:
    assert train_command([*SMALL, *arguments, "--out", str(directory)]) == 0
    return numbers(directory)


def resume(directory: Path, *arguments: str) -> dict[str, Any]:
    assert train_command(["--resume", str(directory), *arguments]) == 0
    return numbers(directory)


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    capsys.readouterr()
    assert main(arguments) == status
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six members in cohorts of two, never interrupted."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    run(directory, "--ensemble", "6", "--cohort", "2")
    return directory


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def shard(directory: Path, position: int = 1) -> Path:
    return sorted((directory / "checkpoints").glob("members-*"))[position]


def test_a_run_without_some_cohorts_is_completed(whole: Path, copy: Path) -> None:
    shard(copy).unlink()
    (copy / "results.json").unlink()
    assert resume(copy, "--cohort", "1") == numbers(whole)


def test_a_finished_run_has_nothing_to_train(whole: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.glob("checkpoints/*")}
    assert resume(copy) == numbers(whole)
    assert {path: path.stat().st_mtime_ns for path in copy.glob("checkpoints/*")} == before


def test_a_grown_run_trains_only_the_new_members(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "grown", "--ensemble", "4", "--cohort", "3")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown").glob("checkpoints/*")}
    assert resume(tmp_path / "grown", "--ensemble", "6") == numbers(whole)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown").glob("checkpoints/*")}
    assert before.items() < after.items()
    # The grown size is the run's own from now on: a member that is lost is trained again without being asked for.
    shard(tmp_path / "grown", -1).unlink()
    again = resume(tmp_path / "grown")
    assert (again["members"], again["members_planned"]) == (6, 6)
    assert again == numbers(whole)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--width", "128"], "width is 128 here and 256 there"),
        (["--seed", "9"], "seed is 9 here and 0 there"),
        (["--bits", "4"], "bits is 4 here and 3 there"),
        (["--evaluation-states", "41"], "evaluation_states is 41 here and 40 there"),
        (["--evaluation-seed", "2"], "evaluation_seed is 2 here and 0 there"),
        (["--init", "antisymmetric"], "init is antisymmetric here and gaussian there"),
        (["--steps", "49"], "steps is 49 here and 50 there"),
        (["--engine", "functional"], "engine is functional here and auto there"),
        (["--precision", "64-true"], "precision is 64-true here and 32-true there"),
        (["--loss", "mse"], "loss is mse here and whitened there"),
        (["--tolerance", "1e-5"], "tolerance is 1e-05 here and 0.0001 there"),
        (["--task", "sbn"], "--task is sbn here and addition there"),
        (["--ensemble", "5"], "ensemble is 5 here and 6 there"),
        (["--first-member", "3"], "first_member is 3 here and 0 there"),
    ],
)
def test_a_run_is_not_resumed_as_another(
    copy: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert says in complaint(capsys, ["train", "--resume", str(copy), *arguments])
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_no_run_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no run directory" in complaint(capsys, ["train", "--resume", str(tmp_path / "nowhere")])
    assert "is no run directory" in complaint(capsys, ["train", "--resume", str(tmp_path)])


def test_parts_are_merged_into_what_one_run_gives(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", "--ensemble", "2")
    run(tmp_path / "b", "--ensemble", "4", "--first-member", "2", "--cohort", "3")
    assert main(["merge", str(tmp_path / "b"), str(tmp_path / "a"), "--out", str(tmp_path / "c")]) == 0
    assert numbers(tmp_path / "c") == numbers(whole)
    # It is a run like any other: it can grow.
    assert resume(tmp_path / "c", "--ensemble", "7")["members"] == 7


def test_a_gap_between_merged_parts_is_filled_by_resuming(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", "--ensemble", "2")
    run(tmp_path / "b", "--ensemble", "2", "--first-member", "4")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    assert (numbers(tmp_path / "c")["members"], numbers(tmp_path / "c")["members_planned"]) == (4, 6)
    assert resume(tmp_path / "c") == numbers(whole)


def test_what_cannot_be_merged(whole: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "merged")]
    assert "member 0 is in" in complaint(capsys, ["merge", str(whole), str(copy), *out])
    run(tmp_path / "seed", "--ensemble", "1", "--first-member", "6", "--seed", "1")
    assert "seed is 1 here and 0 there" in complaint(capsys, ["merge", str(whole), str(tmp_path / "seed"), *out])
    assert "expected at least 2" in complaint(capsys, ["merge", str(whole), *out])
    assert not (tmp_path / "merged").exists()


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit-flipped":
        content[-5] ^= 16
        path.write_bytes(content)
    elif how == "foreign":
        save_file({"x": torch.zeros(3)}, path)
    else:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        # Whole and with the checksum of its content, but of another version or of another run.
        changes = {"format": "99"} if how == "future" else {"run": "0" * len(metadata["run"])}
        save_file(tensors, path, {**metadata, **changes})


@pytest.mark.parametrize("how", ["truncated", "empty", "bit-flipped", "foreign", "of another run", "future"])
def test_a_damaged_checkpoint_is_refused_and_can_be_trained_again(
    how: str, whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shard(copy)
    damage(path, how)
    line = complaint(capsys, ["train", "--resume", str(copy)])
    assert str(path) in line
    assert ("another version" if how == "future" else "its members are trained again on --resume") in line
    assert ("belongs to another run" in line) == (how == "of another run")
    assert str(path) in complaint(capsys, ["merge", str(whole), str(copy)])
    path.unlink()
    assert resume(copy) == numbers(whole)


@pytest.mark.parametrize("seed", range(12))
def test_no_flipped_bit_goes_unnoticed(seed: int, whole: Path, copy: Path) -> None:
    path = shard(copy)
    content = bytearray(path.read_bytes())
    position = random.Random(seed).randrange(8 * len(content))
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)
    run = Run.open(copy)
    try:
        found = run.member_results()
    except StoreError:
        return
    # A bit of the header's padding, say: then nothing that was read is different.
    expected = Run.open(whole).member_results()
    assert all(torch.equal(vars(found)[name], vars(expected)[name]) for name in vars(found))


def test_a_damaged_or_future_manifest_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 99}))
    assert "another version" in complaint(capsys, ["train", "--resume", str(copy)])
    path.write_text(path.read_text()[:50])
    assert "is damaged" in complaint(capsys, ["train", "--resume", str(copy)])


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"task: addition\nbits: 3\n", b"\xff\xfe\x00"])
def test_a_damaged_config_is_refused(copy: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "config.yaml").write_bytes(content)
    line = complaint(capsys, ["train", "--resume", str(copy)])
    assert str(copy / "config.yaml") in line
    assert "is damaged" in line
    assert "config.yaml: is damaged" in complaint(capsys, ["evaluate", str(copy)])


def test_a_directory_in_use_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with store_of_runs.lock(copy):
        assert "another process is writing there" in complaint(capsys, ["train", "--resume", str(copy)])


def test_out_of_memory_halves_the_cohort_and_changes_no_number(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_cohort = stream._train_cohort

    def with_room_for_one(experiment: Any, cohort: list[int], *rest: Any) -> Any:
        if len(cohort) > 1:
            raise torch.OutOfMemoryError
        return train_cohort(experiment, cohort, *rest)

    monkeypatch.setattr(stream, "_train_cohort", with_room_for_one)
    assert run(tmp_path / "run", "--ensemble", "6", "--cohort", "6") == numbers(whole)
    printed = capsys.readouterr().out
    assert "out of memory with 6 members at once; continuing with 3" in printed
    assert "out of memory with 3 members at once; continuing with 1" in printed


def test_one_member_that_does_not_fit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_room(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(stream, "_train_cohort", without_room)
    arguments = ["train", *SMALL, "--ensemble", "2", "--out", str(tmp_path / "run")]
    assert "one member of width 256 does not fit" in complaint(capsys, arguments, status=1)


def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved: list[Path] = []
    save = store_of_runs.save_file

    def until_full(tensors: Any, path: Path, metadata: Any) -> None:
        if len(saved) == 3:  # the task, and the weights and results of a cohort
            path.write_bytes(b"half a file")
            raise SafetensorError("Error while serializing: I/O error: some words (os error 28)")
        save(tensors, path, metadata)
        saved.append(path)

    monkeypatch.setattr(store_of_runs, "save_file", until_full)
    arguments = [*SMALL, "--ensemble", "6", "--cohort", "2", "--out", str(tmp_path / "run")]
    line = complaint(capsys, ["train", *arguments], status=1)
    assert "cannot be written (no space left on device)" in line
    assert "members-000002-000003.safetensors" in line
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "members-000000-000001.safetensors"
    ]
    assert resume(tmp_path / "run") == numbers(whole)


@dataclasses.dataclass
class Started:
    """A process that trains, begun as a fork of this one: it has imported what takes a process of its own seconds."""

    pid: int
    errors: Path

    def wait(self) -> tuple[int, str]:
        """Return the exit status, negative for a signal, and what was written to standard error."""
        deadline = time.monotonic() + 180
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(ended[1]), self.errors.read_text()


def start(directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> Started:
    """Start ``train.py`` in a directory."""
    errors = directory / f".errors-{time.monotonic_ns()}"
    pid = os.fork()
    if pid:
        return Started(pid, errors)
    try:
        sys.stdout, sys.stderr = open(os.devnull, "w"), errors.open("w", buffering=1)  # noqa: SIM115, PTH123
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        # Tests that run in the background of a shell ignore Ctrl-C, and so would their children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update({"OMP_NUM_THREADS": "1", **(environment or {})})
        os.chdir(directory)
        status = train_command(arguments)
        sys.stderr.flush()
        os._exit(status)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def wait_for(directory: Path, shards: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(directory.glob("checkpoints/members-*"))) < shards:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_runs_are_resumed_to_the_same_numbers(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(tmp_path, *SMALL, "--ensemble", "100000", "--cohort", "2", "--out", str(out))
    wait_for(out, 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # The run is cut back to what an uninterrupted one of six has.
    for path in sorted(out.glob("checkpoints/members-*"))[2:]:
        path.unlink()
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("ensemble: 100000", "ensemble: 6"))
    assert resume(out) == numbers(whole)


def test_ctrl_c_writes_the_results_so_far_and_says_how_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(tmp_path, *SMALL, "--ensemble", "100000", "--cohort", "2", "--out", str(out))
    wait_for(out, 2)
    os.kill(process.pid, signal.SIGINT)
    status, errors = process.wait()
    assert status == 130, errors
    results = numbers(out)
    finished = results["members"]
    assert f"interrupted; {finished} of 100000 members are finished and kept. Resume with --resume {out}" in errors
    assert Run.open(out).member_results().converged.all()
    assert results["members"] == 2 * len(list(out.glob("checkpoints/members-*")))
    assert results["members_planned"] == 100000


def test_several_processes_give_the_numbers_of_one(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(tmp_path, *SMALL, "--ensemble", "6", "--cohort", "1", "--devices", "3", "--out", str(out))
    status, errors = process.wait()
    assert status == 0, errors
    assert numbers(out) == numbers(whole)


def children(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_a_process_that_dies_is_replaced(whole: Path, tmp_path: Path) -> None:
    """kill -9 of one of two processes: the run ends by itself with the undisturbed numbers."""
    out = tmp_path / "run"
    process = start(tmp_path, *SMALL, "--ensemble", "6", "--cohort", "1", "--devices", "2", "--out", str(out))
    wait_for(out, 1)
    workers = [child for child in children(process.pid) if "spawn_main" in command_line(child)]
    os.kill(workers[0], signal.SIGKILL)
    status, errors = process.wait()
    assert status == 0, errors
    assert numbers(out) == numbers(whole)


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(tmp_path, *SMALL, "--ensemble", "100000", "--cohort", "1", "--devices", "2", "--out", str(out))
    wait_for(out, 2)
    workers = [child for child in children(process.pid) if "spawn_main" in command_line(child)]
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def test_sigterm_keeps_what_is_finished_and_says_how_to_resume(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(tmp_path, *SMALL, "--ensemble", "100000", "--cohort", "2", "--out", str(out))
    wait_for(out, 3)
    os.kill(process.pid, signal.SIGTERM)
    status, errors = process.wait()
    assert status == 143, errors
    (line,) = errors.splitlines()
    assert line.endswith(f"Resume with --resume {out}")
    assert line.startswith("train.py: terminated; ")
    assert numbers(out)["members"] == 2 * len(list(out.glob("checkpoints/members-*")))


def test_starting_again_with_the_same_options_resumes(
    whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a scheduler does that starts the same command line again."""
    shard(copy).unlink()
    assert run(copy, "--ensemble", "6") == numbers(whole)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    line = complaint(capsys, ["train", *SMALL, "--ensemble", "6", "--seed", "5", "--out", str(copy)])
    assert "cannot be resumed, seed is 5 here and 0 there" in line
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_slurm_jobs_signal_writes_no_checkpoint_and_mixes_no_members(whole: Path, tmp_path: Path) -> None:
    """SIGUSR1, with which SLURM announces the end of a job, made Lightning save itself in the current directory."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_JOB_NAME": "job", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    process = start(tmp_path, *SMALL, "--ensemble", "100000", "--cohort", "2", environment=slurm)
    directory = tmp_path / "runs" / "addition-slurm-7"
    wait_for(directory, 2)
    os.kill(process.pid, signal.SIGUSR1)  # by default the end of a process that does not listen
    assert process.wait()[0] == -signal.SIGUSR1
    assert not list(tmp_path.rglob("*.ckpt"))
    assert {path.name for path in tmp_path.iterdir()} == {"runs", process.errors.name}
    # The job is started again, with fewer members: it finds its directory and takes what is there.
    for path in sorted(directory.glob("checkpoints/members-*"))[2:]:
        path.unlink()
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("ensemble: 100000", "ensemble: 6"))
    status, errors = start(tmp_path, *SMALL, "--ensemble", "6", "--cohort", "2", environment=slurm).wait()
    assert status == 0, errors
    assert numbers(directory) == numbers(whole)


def torchrun(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launcher, "--max-restarts", "3", str(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=directory,
    )


def as_under_torchrun(directory: Path, *arguments: str) -> list[tuple[int, str]]:
    """Train in two processes that find the variables which torchrun sets; return how each ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        start(directory, *arguments, environment={**variables, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]
    return [process.wait() for process in processes]


def test_torchrun_gives_the_numbers_of_one_process_also_when_a_worker_dies(whole: Path, tmp_path: Path) -> None:
    process = torchrun(tmp_path, *SMALL, "--ensemble", "6", "--cohort", "1")
    deadline = time.monotonic() + 120
    while not (shards := list(tmp_path.glob("runs/*/checkpoints/members-*"))):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = [child for child in children(process.pid) if "train.py" in command_line(child)]
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    # The same directory, which its processes have found again by themselves.
    (directory,) = (tmp_path / "runs").iterdir()
    assert shards[0].parents[1] == directory
    assert numbers(directory) == numbers(whole)


def test_processes_with_nothing_left_to_do_end_together(whole: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "results.json").unlink()
    for status, errors in as_under_torchrun(tmp_path, "--resume", str(copy)):
        assert status == 0, errors
    assert numbers(copy) == numbers(whole)


def test_bad_input_under_torchrun_is_reported(tmp_path: Path) -> None:
    for status, errors in as_under_torchrun(tmp_path, *SMALL, "--ensemble", "2", "--devices", "2"):
        assert status == 2
        assert "--devices 2: expected 1, as 2 processes were started already" in errors


def test_what_a_killed_session_left_half_done_is_not_taken_for_finished(whole: Path, copy: Path) -> None:
    """Killed between a cohort's weights and its records, and in the middle of a file."""
    path = shard(copy)
    (copy / "checkpoints" / f".{path.name}.abc").write_bytes(path.read_bytes()[:100])
    path.unlink()
    orphan = copy / "weights" / path.name
    store = RunStore.open(copy)
    assert orphan.is_file()
    assert orphan not in store.weight_files()
    assert resume(copy, "--cohort", "1") == numbers(whole)
    assert sorted(i for file in store.weight_files() for i in store.members_of(file)) == [0, 1, 2, 3, 4, 5]
    assert not orphan.exists()
    assert not list(copy.glob("*/.*.*"))


def test_a_session_killed_before_it_had_begun_can_be_repeated(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert run(tmp_path / "run", "--ensemble", "6") == numbers(whole)
