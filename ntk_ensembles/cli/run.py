"""`ntk-ensembles run`: programs of the one-instruction computer, on the NTK limit or on trained networks."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ntk_ensembles.cli.main import command, suggestion
from ntk_ensembles.cli.parsing import OutputOptions, Parser, check_file
from ntk_ensembles.computer import (
    Assembly,
    ProgramBatch,
    ProgramResult,
    cells_for,
    find_program,
    load_program,
    program_names,
)
from ntk_ensembles.computer.display import (
    DPI,
    Watch,
    memory_table,
    trace_figure,
    write_trace,
    write_trace_events,
)
from ntk_ensembles.console import Progress, console
from ntk_ensembles.errors import OptionError, check_range
from ntk_ensembles.files import write_atomically
from ntk_ensembles.runs import Ensemble, Run, converged_members
from ntk_ensembles.tasks import SBN, Branch, Machine, Program, load_task_class
from ntk_ensembles.tasks.machine import CELLS_MAX, CELLS_MIN
from ntk_ensembles.theory import NTKExecutor, Stepper

_DESCRIPTION = (
    "Execute programs of the one-instruction computer, micro-step by micro-step, on the NTK limit or on a trained "
    "ensemble, and compare every bit with the interpreter. The quickest look: gcd --watch. Exit status 0 if every "
    "program has halted without a wrong bit, 1 if not, 2 for bad input."
)
_INSTRUCTIONS_MAX = 1_000_000_000
_SECONDS_BETWEEN_UPDATES = 0.2


@dataclass(frozen=True)
class ExecutionOptions(OutputOptions):
    """Options of an execution: the machine, the backend, and what is shown."""

    backend: str = "ntk"
    """interpreter; ntk, the mean of the infinitely wide ensemble; or the directory of a run of train.py --task sbn."""

    task: str | None = None
    """The run's own task as file.py:Class, where it is a user's subclass of SBN: the file is executed."""

    cells: int | None = None
    """Memory cells, a power of two, 4 to 256. By default the run's, or as few as hold the programs."""

    word_bits: int | None = None
    """Bits of a cell, 2 to 16. By default the run's, or 8."""

    branch: Branch | None = None
    """Branch if the result is negative (SBN), or negative or zero (SUBLEQ). By default the run's, or negative."""

    members: int | None = None
    """Number of members of the run to take, from the first. By default all that converged."""

    max_instructions: int = 10_000
    """Instructions after which a program that has not halted is stopped, 1 to 1000000000."""

    batch: str | None = None
    """File of JSON lines with memory, pc, max_instructions, to execute side by side; - for standard input. The
    results are JSON lines, as those of several PROGRAMs are."""

    watch: bool = False
    """Show memory, pc and the current instruction after each instruction."""

    delay: float = 0.2
    """With --watch in a terminal: seconds to wait after each instruction, 0 to 60."""

    trace: str | None = None
    """File for the state after every micro-step, as JSON lines."""

    figure: str | None = None
    """File for a picture (PNG) of the state over time with the decision margin."""

    tensorboard: str | None = None
    """Directory for the same picture and all margins, as TensorBoard events."""

    def __post_init__(self) -> None:
        """Check the options, one by one and against each other.

        Raises:
            ValueError: An option cannot be used; the message names it.
        """
        check_range("max_instructions", self.max_instructions, 1, _INSTRUCTIONS_MAX)
        if not 0 <= self.delay <= 60:
            raise OptionError("delay", self.delay, "seconds from 0 to 60")
        if self.trained and not Path(self.backend).is_dir():
            near = suggestion(self.backend, ("interpreter", "ntk"))
            raise OptionError("backend", self.backend, f"interpreter, ntk, or the directory of a run{near}")
        for option in ("members", "task"):
            if getattr(self, option) is not None and not self.trained:
                raise ValueError(f"--{option}: expected the directory of a run as --backend")
        if self.records and self.backend == "interpreter":
            raise ValueError(f"--{self.records[0]}: the interpreter has no micro-steps; expected another --backend")
        if self.figure is not None and not self.figure.endswith(".png"):
            raise OptionError("figure", self.figure, "a name that ends in .png")
        for argument, name in (("trace", self.trace), ("figure", self.figure)):
            check_file(argument, name)
        if self.tensorboard is not None and Path(self.tensorboard).exists() and not Path(self.tensorboard).is_dir():
            raise OptionError("tensorboard", self.tensorboard, "a directory, not a file")

    @property
    def trained(self) -> bool:
        """Whether the backend is a trained ensemble."""
        return self.backend not in ("interpreter", "ntk")

    @property
    def records(self) -> list[str]:
        """Names of the options that were given and need the whole trace."""
        return [name for name in ("trace", "figure", "tensorboard") if getattr(self, name) is not None]


@dataclass(frozen=True)
class _Backend:
    """Backend that programs are executed on; the interpreter alone where ``executor`` is None."""

    executor: Stepper[Any] | None
    description: str


@command("ntk-ensembles run")
def run_command(arguments: list[str], prog: str) -> int:
    """Execute programs; the exit status is 0 if all halted without a wrong bit, else 1."""
    values = _parser(prog).parse(arguments)
    # Without a default, which jsonargparse 4.46 does not allow here.
    names, settings = values.pop("program") or [], values.pop("set")
    options = ExecutionOptions(**values)
    _check_together(options, names, settings)
    run = _open_run(options) if options.trained else None
    labels: Mapping[str, int] = {}
    if options.batch is None:
        task, programs, labels = _load_programs(options, names, settings, run)
    else:
        task, programs = _load_lines(options, run)
    backend = _open_backend(options, task, run)
    if options.batch is not None or len(programs) > 1:
        return _run_many(task, backend, programs)
    return _run_one(task, backend, programs[0], labels, options)


def _parser(prog: str) -> Parser:
    parser = Parser(prog, _DESCRIPTION, epilog=f"Programs of the library: {', '.join(program_names())}.")
    parser.add_argument(
        "program",
        nargs="*",
        help="A program of the library, or a file: assembly (.asm), or decimal words (.dec, .sq). Several are run side "
        "by side and print JSON lines.",
    )
    parser.add_argument(
        "--set",
        metavar="LABEL=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="Put a word into memory before the start, at a label, label+1 or an address. Takes several; a PROGRAM "
        "comes before.",
    )
    parser.add_options(ExecutionOptions)
    return parser


def _check_together(options: ExecutionOptions, names: Sequence[str], settings: Sequence[str]) -> None:
    if options.batch is not None and (names or settings):
        raise ValueError("--batch has programs of its own; expected neither PROGRAM nor --set beside it")
    if options.batch is None and not names:
        where = " before --set" if settings else ""
        raise ValueError(f"expected a PROGRAM{where}, a file or a name of the library, or --batch FILE")
    alone = [*options.records, *(["watch"] if options.watch else [])]
    if alone and (options.batch is not None or len(names) > 1):
        raise ValueError(f"--{alone[0]} shows one program; expected a single PROGRAM")


def _machine(options: ExecutionOptions, run: Run | None, cells: int) -> SBN:
    """Return the run's machine, or the one that was asked for, by default with as many cells as are needed."""
    if run is not None:
        return _trained_machine(options, run)
    if options.cells is None and cells > CELLS_MAX:
        raise ValueError(f"the program needs {cells} cells; a machine has at most {CELLS_MAX}")
    asked = {name: getattr(options, name) for name in ("cells", "word_bits", "branch")}
    return SBN(**{"cells": cells} | {name: value for name, value in asked.items() if value is not None})


def _trained_machine(options: ExecutionOptions, run: Run) -> SBN:
    task = run.experiment.task
    if not isinstance(task, SBN):
        raise ValueError(f"--backend {options.backend}: is a run of task {task.name}; expected one of sbn")
    for name in ("cells", "word_bits", "branch"):
        asked, trained = getattr(options, name), getattr(task, name)
        if asked not in (None, trained):
            raise ValueError(
                f"--{name.replace('_', '-')} {asked}: the ensemble of {options.backend} was trained for {trained}"
            )
    return task


def _open_run(options: ExecutionOptions) -> Run:
    try:
        return Run.open(options.backend, None if options.task is None else load_task_class(options.task))
    except ValueError as error:
        raise ValueError(f"--backend {error}") from None


def _load(name: str, branch: Branch, word_bits: int, cells: int | None = None) -> Assembly:
    """Load a program, and name a similar one of the library where there is none of that name."""
    try:
        return load_program(name, branch=branch, cells=cells, word_bits=word_bits)
    except ValueError as error:
        hint = "" if name in program_names() or Path(name).exists() else suggestion(name, program_names())
        raise ValueError(f"{error}{hint}") from error


def _open_backend(options: ExecutionOptions, task: SBN, run: Run | None) -> _Backend:
    if options.backend == "interpreter":
        return _Backend(None, "the interpreter")
    if run is None:
        size = f"{len(task.templates):,} templates, {task.layout.bits:,} bits"
        return _Backend(NTKExecutor(task.templates), f"the NTK limit ({size})")
    try:
        members = converged_members(run, options.members)
        total = len(members)
        with Progress("members", total, console(stderr=True), describe=lambda done: f"{done:.0f}/{total}") as progress:
            ensemble = Ensemble.from_run(run, members, on_progress=progress.advance)
    except ValueError as error:
        raise ValueError(f"--backend {error}") from None
    width = ensemble.run.experiment.options.width
    return _Backend(ensemble, f"the mean of {len(ensemble)} trained networks of width {width:,}")


def _load_programs(
    options: ExecutionOptions, names: Sequence[str], settings: Sequence[str], run: Run | None
) -> tuple[SBN, list[Program], Mapping[str, int]]:
    """Load programs of the library and of files, and choose a machine; return the labels of the first of them too."""
    task = _machine(options, run, CELLS_MIN)
    if options.cells is None and run is None:
        loaded = [_load(name, task.branch, task.word_bits) for name in names]
        task = _machine(options, run, max(assembly.cells for assembly in loaded))
    programs = []
    assemblies = [_load(name, task.branch, task.word_bits, task.cells) for name in names]
    for name, assembly in zip(names, assemblies, strict=True):
        try:
            state = task.machine.load(assembly.words)
            state = replace(state, memory=_put(settings, assembly, state.memory, task.machine))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        programs.append(Program(state, options.max_instructions, name))
    return task, programs, assemblies[0].labels


def _put(settings: Sequence[str], assembly: Assembly, memory: Sequence[int], machine: Machine) -> tuple[int, ...]:
    """Return the memory after every ``--set``."""
    words = list(memory)
    for setting in settings:
        place, _, value = setting.partition("=")
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", value):
            raise ValueError(f"--set {setting}: expected LABEL=VALUE with a decimal integer")
        try:
            machine.check_word(int(value))
            words[assembly.address(place)] = machine.wrap(int(value))
        except ValueError as error:
            raise ValueError(f"--set {setting}: {error}") from None
    return tuple(words)


def _load_lines(options: ExecutionOptions, run: Run | None) -> tuple[SBN, list[Program]]:
    """Load the programs of a file of JSON lines, and choose a machine for them."""
    assert options.batch is not None
    try:
        text = sys.stdin.read() if options.batch == "-" else Path(options.batch).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"--batch {options.batch}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--batch {options.batch}: cannot be read: it is no text") from None
    lines = {number: line for number, line in enumerate(text.splitlines(), start=1) if line.strip()}
    if not lines:
        raise ValueError(f"--batch {options.batch}: has no lines")
    parsed = []
    for number, line in lines.items():
        try:
            parsed.append((f"{options.batch}:{number}", _parse_line(line, options.max_instructions)))
        except ValueError as error:
            raise ValueError(f"{options.batch}:{number}: {error}") from None
    task = _machine(options, run, cells_for(max(len(memory) for _, (memory, _, _) in parsed)))
    programs = []
    for label, (memory, pc, instructions) in parsed:
        try:
            state = replace(task.machine.load(memory), pc=pc)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        if pc >= task.cells:
            raise ValueError(f"{label}: pc {pc}: expected an address from 0 to {task.cells - 1}")
        programs.append(Program(state, instructions, label))
    return task, programs


def _parse_line(text: str, max_instructions: int) -> tuple[list[int], int, int]:
    """Return the memory, the pc and the limit of instructions of one line."""
    try:
        line = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None
    if not isinstance(line, dict) or "memory" not in line or not line.keys() <= {"memory", "pc", "max_instructions"}:
        raise ValueError("expected an object with memory and, if wanted, pc and max_instructions")
    memory = line["memory"]
    if not isinstance(memory, list) or not memory or not all(type(value) is int for value in memory):
        raise ValueError("memory: expected a list of integers, at least one")
    limits = {"pc": (0, 0, CELLS_MAX - 1), "max_instructions": (max_instructions, 0, _INSTRUCTIONS_MAX)}
    for name, (default, low, high) in limits.items():
        value = line.setdefault(name, default)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{name} {value!r}: expected an integer from {low} to {high}")
    return memory, line["pc"], line["max_instructions"]


def _record(result: ProgramResult) -> dict[str, Any]:
    record = asdict(result)
    return {**record.pop("state"), **record}


def _advance(batch: ProgramBatch, limit: int) -> None:
    """Execute a batch to its end and show how far it is."""
    executed, updated_at = 0, time.monotonic()
    with Progress(
        "instruction", None, console(stderr=True), describe=lambda done: f"{done:,.0f} of at most {limit:,}"
    ) as progress:
        while batch.unfinished:
            batch.advance()
            executed += 1
            # Showing it takes longer than an instruction of the interpreter.
            if time.monotonic() - updated_at >= _SECONDS_BETWEEN_UPDATES:
                updated_at = time.monotonic()
                progress.update(executed, f"{len(batch) - len(batch.unfinished)}/{len(batch)} programs ended")


def _run_many(task: SBN, backend: _Backend, programs: Sequence[Program]) -> int:
    """Execute programs side by side; print a JSON line for each, in order, and a summary to standard error."""
    shown = console(stderr=True)
    started_at = time.perf_counter()
    batch = ProgramBatch(task, programs, backend.executor)
    _advance(batch, max(program.instructions for program in programs))
    results = [batch.result(index) for index in range(len(batch))]
    for result in results:
        print(json.dumps(_record(result), allow_nan=False))
    halted = sum(result.state.halted for result in results)
    summary = f"{len(programs)} programs on {backend.description}: {halted} halted"
    if backend.executor is not None:
        summary += f", {sum(bool(result.agreed) for result in results)} without a wrong bit"
    micro_steps = sum(result.micro_steps for result in results)
    elapsed = time.perf_counter() - started_at
    shown.print(Text(f"{summary}; {micro_steps:,} micro-steps in {elapsed:.2f} s"), soft_wrap=True)
    return 0 if all(result.succeeded for result in results) else 1


def _run_one(
    task: SBN, backend: _Backend, program: Program, labels: Mapping[str, int], options: ExecutionOptions
) -> int:
    """Execute one program and show it as it was asked for."""
    rule = "negative" if task.branch == "negative" else "negative or zero"
    title = f"{program.label} on {backend.description}: {task.cells} cells of {task.word_bits} bits, branch if {rule}"
    batch = ProgramBatch(task, [program], backend.executor, trace=bool(options.records))
    if options.watch:
        with Watch(options.messages, task.machine, labels, title, options.delay) as watch:
            while batch.unfinished:
                before = batch.result(0)
                batch.advance()
                watch.show(before, batch.result(0))
    else:
        _advance(batch, program.instructions)
    result = batch.result(0)
    try:
        if options.records:
            _write_records(batch, labels, options, title)
    finally:
        # The results are printed even if a file cannot be written.
        if options.json:
            print(json.dumps(_record(result), allow_nan=False))
        else:
            _report(result, program, labels, task, title, console())
    return 0 if result.succeeded else 1


def _write_records(batch: ProgramBatch, labels: Mapping[str, int], options: ExecutionOptions, title: str) -> None:
    """Write the trace of a batch of one program in every form that was asked for."""
    task, trace = batch.task, batch.trace(0)
    if options.trace is not None:
        write_trace(Path(options.trace), task, trace, labels)
    if options.figure is not None:
        figure = trace_figure(task, trace, labels, title)
        write_atomically(Path(options.figure), lambda part: figure.savefig(part, dpi=DPI, format="png"))
    if options.tensorboard is not None:
        write_trace_events(Path(options.tensorboard), task, trace, labels, title)


def _report(
    result: ProgramResult, program: Program, labels: Mapping[str, int], task: SBN, title: str, shown: Console
) -> None:
    """Print the result of a program for people."""
    state, start = result.state, program.state.memory
    changed = {address: "bold" for address, word in enumerate(state.memory) if word != start[address]}
    ended = f"{'halted' if state.halted else 'not halted; stopped by --max-instructions'} at pc {state.pc}"
    count = f"{result.instructions:,} instructions, {result.micro_steps:,} micro-steps"
    lines = [*_results(program, labels, task, state.memory), f"{ended} after {count}, {result.seconds:.2f} s"]
    shown.print(Text(title, style="bold"), soft_wrap=True)
    shown.print(memory_table(state.memory, labels, shown.width, changed))
    for line in lines:
        shown.print(Text(line), soft_wrap=True)
    if result.agreed is None:
        return
    verdict = "every micro-step agreed" if result.agreed else "a micro-step did NOT agree"
    margin = "" if result.smallest_margin is None else f"; smallest decision margin {result.smallest_margin:.4f}"
    style = "green" if result.agreed else "bold red"
    shown.print(Text(f"{verdict} with the interpreter{margin}", style=style), soft_wrap=True)


def _results(program: Program, labels: Mapping[str, int], task: SBN, memory: Sequence[int]) -> Iterator[str]:
    """Yield the results that a library program declares, or the labelled words that another one has changed."""
    if program.label in program_names():
        for field in find_program(program.label, task.branch).results:
            start = labels[field.label]
            values = " ".join(str(word) for word in memory[start : start + field.count])
            yield f"{field.label} = {values} ({field.text})"
        return
    before = program.state.memory
    changed = [
        f"{label} = {memory[at]}" for label, at in labels.items() if at < len(memory) and memory[at] != before[at]
    ]
    if changed:
        yield f"changed: {', '.join(changed)}"
