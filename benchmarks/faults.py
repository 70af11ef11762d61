"""Try to break the package: bad command lines, damaged run directories, and kill -9 at random moments.

    python benchmarks/faults.py --commands 500 --mutations 250 --kills 50

- Every **command line** has something that cannot be used, or nearly: values, files, pipes, links, a user's task
  that fails, an environment that no launcher sets. It must end within its time with exit status 0, 1 or 2, with no
  traceback, with one line if it is 2, and must leave no directory behind then.
- Every **mutation** is a run directory with a damaged or forged file (also with the right checksum), on which four
  commands are tried. The same holds for them; besides, what they report is either refused or unchanged, unless a
  checksum was forged, and nothing that the directory names is ever executed.
- Every **kill** ends the processes of a run at a random moment: alone, two processes of ``--devices 2``, or one worker
  of torchrun. The same command is then given again, and what it ends with is compared with an undisturbed run.

The first two run in this process, and the runs that are killed alone are forked from it, so that thousands of trials
need one import of PyTorch. Prints what was tried and what was bad; the exit status is 1 if anything was.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ntk_ensembles.cli.main import main as ntk_ensembles
from ntk_ensembles.runs.store import digest

ROOT = Path(__file__).parents[1]
SECONDS = 60
"""Time that one command may take; on an idle machine none takes a tenth of it."""

SMALL = ["--task", "addition", "--bits", "2", "--width", "64", "--evaluation-states", "20", "--tolerance", "1e-2"]
OWN_TASK = (ROOT / "examples" / "rule110.py").read_text(encoding="utf-8")


class Outcome:
    """What a command has ended with, and what is bad about it."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str] | None = None) -> None:
        out, err = io.StringIO(), io.StringIO()
        before = dict(os.environ)
        os.environ.update(environment or {})
        faulthandler.dump_traceback_later(SECONDS + 30, exit=True, file=sys.__stderr__)
        signal.signal(signal.SIGALRM, _late)
        signal.alarm(SECONDS)
        self.crash = ""
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                self.status: Any = ntk_ensembles(list(arguments))
        except SystemExit as end:
            self.status = 0 if end.code is None else end.code
        except BaseException:
            self.status, self.crash = None, traceback.format_exc()
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
            os.environ.clear()
            os.environ.update(before)
        self.out, self.err = out.getvalue(), err.getvalue()

    @property
    def complaint(self) -> str | None:
        """What is bad about it, or None."""
        if self.crash:
            return self.crash
        if self.status not in (0, 1, 2):
            return f"exit status {self.status!r}"
        if "Traceback" in self.out + self.err:
            return self.err + self.out
        if self.status == 2 and (len(self.err.splitlines()) != 1 or len(self.err) > 4000) and "usage:" not in self.err:
            return f"{len(self.err.splitlines())} lines, {len(self.err)} characters: {self.err[:500]}"
        return None


def _late(signum: int, frame: object) -> None:
    raise TimeoutError(f"still running after {SECONDS} s")


class Report:
    """Counts of what was tried and what was bad."""

    def __init__(self) -> None:
        self.tried: dict[str, int] = {}
        self.bad = 0

    def count(self, kind: str, what: str, complaint: str | None, of: int) -> None:
        """Count a trial, and print it if it was bad."""
        self.tried[kind] = self.tried.get(kind, 0) + 1
        if complaint is not None:
            self.bad += 1
            print(f"BAD {kind}: {what}\n    {complaint.strip()}", flush=True)
        if self.tried[kind] % 50 == 0 or self.tried[kind] == of:
            print(f"{kind}: {self.tried[kind]} of {of} tried, {self.bad} bad so far", flush=True)


# Command lines.

NUMBERS = ["-1", "0", "1e3", "1.5", "9" * 25, "nan", "inf", "", "x", "0x10", "7_", " 7", "--", "\u0663", "true", "[1]"]
NUMBERS += ["null", "1e999", "\x00", "9" * 5000, "\udcff"]
WORDS = ["", "x", "Gaussian", "none", "null", "--help", "[bold]", "[/x]", "\x1b[31m", "a" * 5000, "\u2264", "\udcff"]


def place(folder: Path) -> dict[str, list[str]]:
    """Make files and other things that options may name, and return their paths by kind."""
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "folder").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    (folder / "file").write_text("mine")
    paths = [str(folder / name) for name in ("pipe", "loop", "dangling", "folder", "full", "file", "file/below")]
    paths += ["/dev/null", "/proc/1/mem", "/", "", "\x00", "a" * 300, "x/" * 3000]
    anchors = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for this, last in zip("bcdefghij", "abcdefghi", strict=True):
        anchors += f"{this}: &{this} [{', '.join([f'*{last}'] * 9)}]\n"
    configs = {
        "anchors": anchors,
        "self": "a: &a [*a]\n",
        "deep": "[" * 20000,
        "tag": "task: !!python/object/apply:os.system ['touch executed']\n",
        "unknown": "task: addition\nwidht: 3\n",
        "types": "task: addition\nwidth: [1]\nensemble: {a: 1}\ntolerance: x\n",
        "nulls": "task: addition\nwidth: null\n",
        "list": "[1, 2]",
        "text": "addition",
        "empty": "",
        "number": "task: 7\n",
        "keys": "1: 2\n",
        "float": "task: addition\nwidth: 64.0\n",
        "large": "a: " + "b" * 100000,
    }
    for name, content in configs.items():
        (folder / f"{name}.yaml").write_text(content)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    tasks = {
        "raises": OWN_TASK.replace('check_range("cells", cells, 3, 1024)', "raise KeyError('cells')"),
        "exits": "import sys\nsys.exit(0)\n",
        "syntax": "def (\n",
        "template": OWN_TASK.replace("(1, 1, 0), ", ""),
        "reference": OWN_TASK.replace("full = (1 << self.cells) - 1\n", "raise OSError(28, 'no space')\n", 1),
        "fields": OWN_TASK.replace('{"ring": task_input[0]}', '{"rung": task_input[0]}'),
        "none": OWN_TASK.replace('return {"ring": task_input[0]}', "return None"),
        "attribute": OWN_TASK.replace("self.generations = generations", "pass"),
        "nothing": OWN_TASK.replace("yield Template.rule", "Template.rule"),
        "layout": OWN_TASK.replace("StateLayout(ring=cells)", "None"),
        "name": OWN_TASK.replace('name = "rule110"', 'name = "../../[/x]"').replace("(1, 1, 0), ", ""),
        "options": OWN_TASK.replace("self.cells = cells", "self.cells = {cells}"),
        "rules": OWN_TASK.replace("for cell in range(self.cells)", "for cell in self.nowhere"),
    }
    for name, content in tasks.items():
        (folder / f"{name}.py").write_text(content)
    programs = {"label": "a" * 5_000_000 + ": 1 2 3", "bad": "1 2 ?? ;;; :", "numbers": "9" * 5000, "nothing": ""}
    for name, content in programs.items():
        (folder / f"{name}.asm").write_text(content)
    lines = ['{"memory": []}', "[1]", "{", '{"memory": [1e999]}', "[" * 100000, '{"memory": [1], "pc": 99}', "\x00"]
    for number, line in enumerate(lines):
        (folder / f"{number}.jsonl").write_text(line + "\n")
    names = {kind: [str(path) for path in sorted(folder.glob(f"*.{kind}"))] for kind in ("yaml", "asm", "jsonl")}
    classes = [f"{path}:Rule110" for path in sorted(folder.glob("*.py"))]
    return {**names, "paths": paths, "tasks": classes}


ENVIRONMENTS: list[dict[str, str]] = [
    {"TORCHELASTIC_RUN_ID": "x"},
    {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "RANK": "1"},
    {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "0"},
    {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "x"},
    {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "x"},
    {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "2"},
    {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "-1"},
    {"SLURM_NTASKS": "2"},
    {"LOCAL_WORLD_SIZE": "0", "RANK": "1", "LOCAL_RANK": "x", "WORLD_SIZE": "3"},
]


def command_lines(generator: random.Random, run: Path, folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Yield command lines with something wrong, and their environments, for ever."""
    names = place(folder)
    out = str(folder / "out")
    bad: dict[str, list[str]] = {
        "numbers": NUMBERS,
        "words": WORDS,
        "paths": names["paths"],
        "config": [*names["yaml"], *names["paths"]],
        "task": [*names["tasks"], *WORDS, "file.py:Class", f"{folder}/nowhere.py:X", f"{folder}/raises.py:", ":"],
        "programs": [*names["asm"], *names["paths"], *WORDS],
        "batch": [*names["jsonl"], *(path for path in names["paths"] if not path.endswith("pipe"))],
        "runs": [*names["paths"], str(run)],
        "devices": ["-1", "0", "x", "5000", "1.5"],
        "out": [path for path in names["paths"] if path not in ("/", "/dev/null", "")],
    }
    shared = {"--evaluation-states": "numbers", "--evaluation-seed": "numbers"}
    train = {f"--{name}": "numbers" for name in ("width", "ensemble", "seed", "tolerance", "steps", "cohort", "bits")}
    train |= {"--padding": "numbers", "--layers": "words"}
    train |= {
        f"--{name}": "words"
        for name in ("init", "loss", "precision", "accelerator", "engine", "keep-weights", "keep-deviations")
    }
    train |= {"--first-member": "numbers", "--config": "config", "--task": "task", "--resume": "runs", "--out": "out"}
    train |= {**shared, "--devices": "devices", "--nonsense": "words", "--cells": "numbers"}
    certify = {
        "--task": "task",
        "--delta": "numbers",
        "--bits": "numbers",
        "--padding": "numbers",
        "--layers": "words",
        "--config": "config",
    }
    kinds: list[tuple[list[str], dict[str, str]]] = [
        (["train", *SMALL, "--ensemble", "1", "--out", out], train),
        (["train", "--task", "addition", "--width", "64", "--ensemble", "1", "--out", out], train),
        (["train", "--resume", str(run)], train),
        (["certify", "--task", "addition", "--bits", "3"], certify),
        (["validate", "--task", "addition", "--max-bits", "2"], {"--max-bits": "numbers", "--task": "task"}),
        (["evaluate", str(run)], {**shared, "--members": "numbers", "--decode": "words", "--task": "task"}),
        (["evaluate"], {"": "runs", "--members": "numbers"}),
        (["merge", str(run), "--out", out], {"": "runs", "--out": "out"}),
        (["run", "gcd"], {"--backend": "runs", "--cells": "numbers", "--word-bits": "numbers", "--set": "words"}),
        (["run"], {"": "programs", "--members": "numbers", "--max-instructions": "numbers", "--delay": "numbers"}),
        (["run"], {"--batch": "batch"}),
        ([], {"": "words"}),
    ]
    while True:
        base, options = generator.choice(kinds)
        arguments, environment = list(base), {}
        for _ in range(generator.choice((1, 1, 1, 2, 3))):
            name = generator.choice(list(options))
            value = generator.choice(bad[options[name]])
            if not name:
                arguments.insert(len(arguments[:1]), value)
            else:
                arguments += [name] if generator.random() < 0.05 else [name, value]
        if generator.random() < 0.1 and arguments[:1] == ["train"]:
            environment = generator.choice(ENVIRONMENTS)
        yield arguments, environment


def try_command_lines(count: int, generator: random.Random, run: Path, folder: Path, report: Report) -> None:
    folder.mkdir()
    out = folder / "out"
    os.chdir(folder)
    for arguments, environment in command_lines(generator, run, folder):
        if report.tried.get("command lines", 0) == count:
            return
        outcome = Outcome(arguments, environment)
        complaint = outcome.complaint
        if complaint is None and outcome.status == 2 and out.exists():
            complaint = f"leaves {sorted(path.name for path in out.iterdir())}: {outcome.err}"
        if complaint is None and (folder / "executed").exists():
            complaint = "a file was executed"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        shown = [argument[:60] for argument in arguments]
        report.count("command lines", f"{shown} {environment or ''}", complaint, count)


# Run directories.

Mutation = Callable[[Path, random.Random], bool]
"""Damages a run directory; returns whether a checksum was forged, so that numbers may change."""


def any_file(run: Path, generator: random.Random) -> Path:
    return generator.choice(
        sorted(path for path in run.rglob("*") if path.is_file() and "tensorboard" not in str(path))
    )


def cut(run: Path, generator: random.Random) -> bool:
    path = any_file(run, generator)
    content = path.read_bytes()
    path.write_bytes(content[: generator.randrange(len(content) + 1)])
    return False


def flip(run: Path, generator: random.Random) -> bool:
    path = any_file(run, generator)
    content = bytearray(path.read_bytes())
    for _ in range(generator.choice((1, 8))):
        if content:
            content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    # Of two texts, one may be another valid one: of the seconds in results.json, say, which nothing reads.
    return False


def zero(run: Path, generator: random.Random) -> bool:
    path = any_file(run, generator)
    path.write_bytes(bytes(path.stat().st_size))
    return False


def swap(run: Path, generator: random.Random) -> bool:
    path, other = any_file(run, generator), any_file(run, generator)
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)
    return False


def replace(run: Path, generator: random.Random) -> bool:
    """Another kind of thing in the place of a file or a folder."""
    path = generator.choice([*run.iterdir(), any_file(run, generator), run / ".lock"])
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    kind = generator.choice(("nothing", "folder", "file", "pipe", "loop", "dangling", "null", "zero", "pickle"))
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.parent / "nowhere")
    elif kind in ("null", "zero"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Execute()))
    return False


class Execute:
    """Pickle that leaves a mark when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


VALUES: list[Any] = [None, True, -1, 0, 1.5, 10**30, "8", "x", [], [0], {}, {"a": 1}, "[/x]", "\x1b[2J", "x" * 50000]


def manifest(run: Path, generator: random.Random) -> bool:
    path = run / "manifest.json"
    values = json.loads(path.read_text())
    name = generator.choice(list(values))
    kind = generator.choice(("value", "value", "value", "gone", "infinity", "deep", "large"))
    if kind == "gone":
        del values[name]
    else:
        values[name] = generator.choice(VALUES) if kind == "value" else "MARK"
    words = {"infinity": "Infinity", "deep": "[" * 100000, "large": '"' + "x" * 2000000 + '"', "value": "", "gone": ""}
    path.write_text(json.dumps(values).replace('"MARK"', words[kind]))
    return False


def config(run: Path, generator: random.Random) -> bool:
    path = run / "config.yaml"
    lines = path.read_text().splitlines()
    at = generator.randrange(len(lines))
    name = lines[at].partition(":")[0]
    value = generator.choice([json.dumps(generator.choice(VALUES)), "1e-06", "1024.0", "&a [*a]", "!!python/x y", "["])
    lines[at] = generator.choice((f"{name}: {value}", f"{name}: {value}", "", f"{lines[at]}\nmore: 1", "  - x"))
    if generator.random() < 0.2:
        lines[0] = f"task: {run / 'evil.py'}:Rule110"
    path.write_text("\n".join(lines))
    # ensemble, first_member and keep_weights are not in the fingerprint: a run may be asked to go on differently.
    return True


def forge(run: Path, generator: random.Random) -> bool:
    """Put in a tensor of another type, shape or range, with the right checksum."""
    path = generator.choice(sorted(run.rglob("*.safetensors")))
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    name = generator.choice(sorted(tensors))
    tensor = tensors[name]
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t[:-1],
        lambda t: t[:0],
        lambda t: torch.cat([t, t]),
        lambda t: t[None],
        lambda t: t.reshape(-1),
        lambda t: t.to(torch.int64),
        lambda t: t.to(torch.int32),
        lambda t: t.to(torch.float64),
        lambda t: t.to(torch.float16),
        lambda t: t.to(torch.bool),
        lambda t: torch.full_like(t, 1 if t.dtype == torch.bool else -1),
        lambda t: (
            torch.full_like(t, 1 if t.dtype == torch.bool else torch.iinfo(t.dtype).max)
            if not t.is_floating_point()
            else torch.full_like(t, torch.nan)
        ),
        lambda t: torch.zeros_like(t),
        lambda t: t.view(torch.uint8).bitwise_or(2).view(t.dtype) if t.dtype == torch.bool else t + 1,
    ]
    if generator.random() < 0.1:
        del tensors[name]
    else:
        tensors[name] = generator.choice(changes)(tensor).contiguous()
    if "fields" in metadata and generator.random() < 0.4:
        key = generator.choice(("fields", "groups"))
        forged = [
            [],
            [["self", 9]],
            [["a", 0]],
            [["a", 10**9]],
            [["a", 2**63]],
            [[1, 2]],
            "x",
            {"a": 1},
            [["p", 2]] * 9,
        ]
        metadata[key] = generator.choice([*map(json.dumps, forged), "", "[" * 100000, "[Infinity]"])
    texts = {key: text for key, text in metadata.items() if key in ("fields", "groups")}
    save_file(tensors, path, {**metadata, "sha256": digest(tensors, texts)})
    return True


def leave(run: Path, generator: random.Random) -> bool:
    """Leave what a killed session may leave, and more."""
    folder = run / generator.choice((".", "checkpoints", "weights", "figures"))
    names = [".tmpAbC123", ".members-000000-000001.safetensors.abcd1234", ".manifest.json.x", "members-000009-000009"]
    names += ["members-000007-000008.safetensors", ".beginning", "notes.txt", ".lock"]
    (folder / generator.choice(names)).write_bytes(generator.randbytes(generator.choice((0, 100))))
    return False


MUTATIONS: list[Mutation] = [cut, flip, zero, swap, replace, replace, manifest, config, forge, forge, leave]


def rows_of(outcome: Outcome) -> Any:
    return json.loads(outcome.out)["convergence"] if outcome.status == 0 else None


def try_mutations(count: int, generator: random.Random, runs: Sequence[Path], folder: Path, report: Report) -> None:
    folder.mkdir()
    os.chdir(folder)
    other = ["--evaluation-states", "25", "--evaluation-seed", "4"]
    expected = {
        run: [rows_of(Outcome(["evaluate", str(run), "--json", *more])) for more in ([], other)] for run in runs
    }
    for _ in range(count):
        run, mutate = generator.choice(runs[:2]), generator.choice(MUTATIONS)
        copy = folder / "copy"
        shutil.copytree(run, copy)
        (copy / "evil.py").write_text(OWN_TASK.partition("\n\ndef ")[0] + "\nopen('executed', 'w')\n")
        seed = generator.random()
        forged = mutate(copy, random.Random(seed))
        commands = [["evaluate", str(copy), "--json", *more] for more in ([], other)]
        commands += [["run", "gcd", "--backend", str(copy)]]
        commands += [
            ["merge", str(copy), str(runs[2]), "--out", str(folder / "merged")],
            ["train", "--resume", str(copy)],
        ]
        for at, arguments in enumerate(commands):
            outcome = Outcome(arguments)
            complaint = outcome.complaint
            if complaint is None and at < 2 and outcome.status == 0 and not forged:
                rows = rows_of(outcome)
                complaint = None if rows == expected[run][at] else "other numbers without a word"
            if complaint is None and outcome.status == 2 and (folder / "merged").exists():
                complaint = f"a failed merge leaves its directory: {outcome.err}"
            if complaint is None and (folder / "executed").exists():
                complaint = "something that the directory holds was executed"
                (folder / "executed").unlink()
            shutil.rmtree(folder / "merged", ignore_errors=True)
            if complaint is not None:
                break
        report.count("mutations", f"{mutate.__name__} {seed} of {run.name}, {arguments}", complaint, count)
        shutil.rmtree(copy)


# Kills.

MEMBERS = 60
KILLED = ["--task", "addition", "--bits", "4", "--width", "2048", "--evaluation-states", "100"]
KILLED += ["--ensemble", str(MEMBERS)]


def numbers(directory: Path) -> dict[str, Any]:
    """Everything in results.json that does not tell of time or of the machine."""
    results: dict[str, Any] = json.loads((directory / "results.json").read_text())
    results["training"].pop("seconds")
    results["training"].pop("peak_memory_bytes")
    results["environment"].pop("cpu_threads")
    return results


def fork(arguments: list[str]) -> int:
    """Start a command in a process of its own group, with everything imported."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        status = ntk_ensembles(arguments)
    finally:
        os._exit(status)


def ended(child: int, seconds: float) -> int | None:
    """Wait for a process; return its exit status, or None if it is still running after that time."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def kill_forked(
    directory: Path, cohort: int, devices: int, kills: int, generator: random.Random, longest: float
) -> int:
    """Start a run and kill it, again and again, always with the same command; then let it end."""
    arguments = ["train", *KILLED, "--cohort", str(cohort), "--devices", str(devices), "--out", str(directory)]
    done = 0
    for _ in range(kills):
        child = fork(arguments)
        if ended(child, generator.uniform(0, longest)) is None:
            os.killpg(child, signal.SIGKILL)
            done += 1
            os.waitpid(child, 0)
    child = fork(arguments)
    status = ended(child, 4 * SECONDS)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"the same command ends with {status} after {done} kills")
    return done


def kill_workers(directory: Path, cohort: int, kills: int, generator: random.Random) -> int:
    """Kill one worker of torchrun, again and again, which starts all of them again; then let it end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", str(kills + 1), str(ROOT / "train.py")]
    process = subprocess.Popen(
        [*launcher, *KILLED, "--cohort", str(cohort), "--out", str(directory)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    done, seen = 0, set[int]()
    try:
        while done < kills and process.poll() is None:
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
            workers = [int(line) for line in found.stdout.split() if int(line) not in seen and is_worker(int(line))]
            if len(workers) < 2:
                time.sleep(0.05)
                continue
            seen.update(workers)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(0, 10))
            with contextlib.suppress(ProcessLookupError):
                os.kill(generator.choice(workers), signal.SIGKILL)
                done += process.poll() is None
        _, complaint = process.communicate(timeout=4 * SECONDS)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        raise RuntimeError(f"torchrun ends with {process.returncode} after {done} kills: {complaint.decode()[-2000:]}")
    return done


def is_worker(process: int) -> bool:
    try:
        return "train.py" in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False


def try_kills(count: int, generator: random.Random, folder: Path, report: Report) -> None:
    folder.mkdir()
    undisturbed = folder / "undisturbed"
    started_at = time.monotonic()
    child = fork(["train", *KILLED, "--cohort", "2", "--out", str(undisturbed)])
    if ended(child, 4 * SECONDS) != 0:
        raise RuntimeError("the undisturbed run failed")
    longest, expected = time.monotonic() - started_at, numbers(undisturbed)
    kinds = ("alone", "alone", "alone", "--devices 2", "torchrun")
    trial = kills = 0
    while kills < count:
        kind, directory, cohort = kinds[trial % len(kinds)], folder / f"trial-{trial}", generator.randint(1, 5)
        trial, done, wanted = trial + 1, 0, min(5, count - kills)
        complaint = None
        try:
            if kind == "torchrun":
                done = kill_workers(directory, cohort, wanted, generator)
            else:
                devices = 1 if kind == "alone" else 2
                seconds = longest if devices == 1 else 10.0
                done = kill_forked(directory, cohort, devices, wanted, generator, seconds)
            if numbers(directory) != expected:
                complaint = "the numbers are not those of the undisturbed run"
            left = [path.name for path in directory.rglob(".*") if not path.name.startswith(".lock")]
            complaint = complaint or (f"leaves {left}" if left else None)
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            complaint = str(error)
        kills += done
        for _ in range(done - 1):
            report.count("kills", "", None, count)
        report.count("kills", f"{kind}, cohorts of {cohort}, {done} kills, {directory.name}", complaint, count)
        print(f"    {kind}: {done} kills", flush=True)
        if not done and complaint is None:
            longest *= 0.8


def trained(arguments: Sequence[str]) -> None:
    outcome = Outcome(["train", *arguments])
    if outcome.status != 0:
        raise SystemExit(f"{arguments}: {outcome.err} {outcome.crash}")


def main() -> None:
    """Try everything, and print what was bad."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=500, help="bad command lines to try")
    parser.add_argument("--mutations", type=int, default=250, help="mutations of run directories to try")
    parser.add_argument("--kills", type=int, default=50, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    options = parser.parse_args()
    report = Report()
    # One thread: none may be running where processes are forked.
    torch.set_num_threads(1)
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.kills:
            try_kills(options.kills, random.Random(options.seed), folder / "kills", report)
        part = [*SMALL, "--cohort", "2"]
        runs = [folder / kind for kind in ("addition", "sbn", "part")]
        sbn = ["--task", "sbn", "--cells", "4", "--word-bits", "2", "--width", "512", "--evaluation-states", "20"]
        trained([*part, "--ensemble", "4", "--out", str(runs[0])])
        trained([*sbn, "--tolerance", "1e-2", "--cohort", "2", "--ensemble", "4", "--out", str(runs[1])])
        trained([*part, "--ensemble", "2", "--first-member", "4", "--out", str(runs[2])])
        if options.commands:
            try_command_lines(options.commands, random.Random(options.seed), runs[0], folder / "commands", report)
        if options.mutations:
            try_mutations(options.mutations, random.Random(options.seed), runs, folder / "mutations", report)
        os.chdir(ROOT)
    print(f"tried {report.tried}, bad {report.bad}, in {time.monotonic() - started_at:.0f} s")
    sys.exit(report.bad > 0)


if __name__ == "__main__":
    main()
