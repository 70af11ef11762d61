"""`train`: streams an ensemble through `EnsembleModule`, cohort by cohort, into a run directory."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import shlex
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy
from rich.console import Console
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from ntk_ensembles.console import Progress
from ntk_ensembles.ensemble import choose_cohort
from ntk_ensembles.errors import OptionError
from ntk_ensembles.files import SaveError
from ntk_ensembles.runs import (
    Dashboard,
    Experiment,
    MemberResults,
    Results,
    Run,
    RunOptions,
    begin_or_resume,
    results_of,
)
from ntk_ensembles.runs.groups import aligned_blocks, rounded_deviations
from ntk_ensembles.runs.store import lock, wait_for_lock
from ntk_ensembles.tasks import Task
from ntk_ensembles.training.data import evaluation_batches, template_batch
from ntk_ensembles.training.launch import Launch, StoppedError, share_cores, stop_signals
from ntk_ensembles.training.logger import DashboardLogger
from ntk_ensembles.training.module import EnsembleModule

_RESTARTS = 3
"""Times that processes of ``devices`` are started again when one of them has died."""

_SECONDS_BETWEEN_LOOKS = 0.2
_SHARE_OF_TRAINING = 0.8
"""Share of a cohort's bar that its training takes; its draw comes before and its evaluation after."""

OnProgress = Callable[[float, str], None]
"""Called with the share of a cohort that is done and a remark."""


class Interrupted(KeyboardInterrupt):  # noqa: N818 (like the interrupt that it is)
    """A run that has ended early; what it had finished is kept.

    Attributes:
        exit_status: Exit status that says why: 130 after Ctrl-C, 143 after SIGTERM, 1 if a process died.
    """

    def __init__(self, reason: str, exit_status: int, directory: Path, finished: int, planned: int) -> None:
        super().__init__(
            f"{reason}; {finished} of {planned} members are finished and kept. "
            f"Resume with --resume {shlex.quote(str(directory))}"
        )
        self.exit_status = exit_status


def train(
    task: Task[Any, Any],
    options: RunOptions,
    *,
    console: Console | None = None,
    trainer: Callable[..., Trainer] = Trainer,
    logger: Logger | Literal[False] = False,
    callbacks: Sequence[Callback] = (),
    started_at: float | None = None,
) -> Results | None:
    """Train and evaluate an ensemble, or resume one, show progress, and write a run directory.

    For each cohort of members it makes an `EnsembleModule` and a `Trainer`, calls `fit` and `predict`, saves the
    members' results, and drops the weights. Under torchrun and srun each process does so with its own members.

    Args:
        task: What to learn.
        options: How, and where to write it.
        console: Where to show progress and the final table; by default standard output.
        trainer: What makes a trainer from the keyword arguments of Lightning's `Trainer`, such as a
            ``functools.partial`` of it.
        logger: Lightning logger that gets the options, the charts against the number of members and every cohort's
            training losses too. The run's directory has its dashboard in any case.
        callbacks: Lightning callbacks for every cohort's trainer.
        started_at: When the user began to wait, as from `time.time`; by default now.

    Returns:
        The content of ``results.json``; None in processes other than the first.

    Raises:
        ValueError: An option that this machine, this task or the run to resume cannot satisfy; nothing has
            been computed or written. `StoreError` is one.
        SaveError: The disk is full or cannot be written.
        MemoryError: Not even one member fits.
        Interrupted: Ctrl-C, SIGTERM, or a process that died; finished cohorts are kept and the results so far written.
    """
    called_at = time.time()
    started_at = called_at if started_at is None else started_at
    launch = Launch.detect()
    console = console or Console()
    if launch.world > 1 and options.devices > 1:
        raise OptionError("devices", options.devices, f"1, as {launch.world} processes were started already")
    if launch.name is not None and options.out is None and options.resume is None:
        # Processes that are started again find their directory again.
        options = dataclasses.replace(options, out=f"runs/{task.name}-{launch.name}")
    extras = _Extras(trainer, logger, tuple(callbacks))
    if options.devices > 1 and extras != _Extras():
        raise OptionError("devices", options.devices, "1 with a trainer, logger or callbacks; or use torchrun")
    if launch.world > 1:
        share_cores(launch.local_world)
    if launch.rank:
        _follow(launch, extras)
        return None
    return _lead(Experiment(task, options), launch, console, extras, started_at, called_at)


@dataclasses.dataclass(frozen=True)
class _Extras:
    """What a user adds to every cohort's trainer."""

    trainer: Callable[..., Trainer] = Trainer
    logger: Logger | Literal[False] = False
    callbacks: tuple[Callback, ...] = ()
    dashboard: Dashboard | None = None
    """Where the run is shown; only in the process that leads it."""

    @property
    def loggers(self) -> list[Logger]:
        """Loggers of every cohort's trainer, the user's first."""
        own = [self.logger] if self.logger else []
        return own if self.dashboard is None else [*own, DashboardLogger(self.dashboard)]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the processes of a run agree on: its directory, and the members of each process's cohorts."""

    directory: str
    cohorts: list[list[list[int]]]

    @classmethod
    def make(cls, run: Run, missing: Sequence[int], size: int, processes: int) -> _Plan:
        """Deal cohorts of at most ``size`` members out to the processes."""
        size = max(1, min(size, -(-len(missing) // processes)))
        cohorts = _cohorts(run, missing, size)
        return cls(str(run.directory), [cohorts[rank::processes] for rank in range(processes)])


def _lead(
    experiment: Experiment,
    launch: Launch,
    console: Console,
    extras: _Extras,
    started_at: float,
    called_at: float,
) -> Results:
    """Begin or resume the run, train this process's share, and write the results when all members are finished."""
    options = experiment.options
    with ExitStack() as stack:
        meeting, plan = launch.meet(), None
        try:
            processes = launch.world * options.devices
            size = choose_cohort(
                experiment.recipe,
                options.evaluation_states,
                options.ensemble,
                experiment.device,
                options.cohort,
                processes=launch.local_world * options.devices,
            )
            run = stack.enter_context(begin_or_resume(experiment))
            missing = run.missing()
            plan = _Plan.make(run, missing, size, processes)
        finally:
            meeting.tell(plan and dataclasses.astuple(plan))
        meeting.wait()
        _announce(run, missing, size, processes, console)
        dashboard = Dashboard(run, [extras.logger] if extras.logger else [])
        extras = dataclasses.replace(extras, dashboard=dashboard)
        reason, status = _train_missing(run, plan, launch, console, extras)
        with console.status("working out the statistics …"):
            results = run.member_results()
            if len(results):
                found = results_of(run.experiment, results, run.device, called_at - started_at)
                run.write_results(found, started_at)
                dashboard.conclude(results, found, console, started_at)
        if reason is not None:
            raise Interrupted(reason, status, run.directory, len(results), options.ensemble)
        return found


def _train_missing(run: Run, plan: _Plan, launch: Launch, console: Console, extras: _Extras) -> tuple[str | None, int]:
    """Train the missing members, here or in other processes, with one progress display.

    Returns:
        Why it ended early, and the exit status that says so; None and 0 if it did not.
    """
    members = len(run.experiment.planned)
    finished = members - sum(len(cohort) for share in plan.cohorts for cohort in share)
    shown = Progress(
        "members",
        members,
        console,
        describe=lambda completed: f"{int(completed)}/{members}",
        completed=finished,
        last_line=True,
    )
    if finished == members and launch.world == 1:
        return None, 0
    try:
        with stop_signals(), shown:
            if launch.world > 1 or run.experiment.options.devices == 1:
                # Of other processes nothing is known but that they have as many members.
                each = len(plan.cohorts)
                _train_cohorts(
                    run,
                    plan.cohorts[0],
                    launch.local_rank,
                    lambda done, note: shown.advance(done * each, note),
                    console.print,
                    extras,
                )
                for rank in range(1, launch.world):
                    # Held until that process has finished its members, or has died.
                    wait_for_lock(run.directory, _lock_of(rank))
            else:
                _train_in_processes(run, plan, console, shown, extras.dashboard)
            missing = run.missing()
            shown.advance(members - len(missing) - shown.completed)
    except StoppedError as stopped:
        return str(stopped), 128 + stopped.signum
    return ("a process has died", 1) if missing else (None, 0)


def _follow(launch: Launch, extras: _Extras) -> None:
    """Train this process's share of what the first process has planned."""
    with ExitStack() as stack:
        meeting = launch.meet()
        told = meeting.hear()
        if told is None:
            # The first process says why.
            raise SystemExit(2)
        plan = _Plan(*told)
        stack.enter_context(lock(Path(plan.directory), _lock_of(launch.rank)))
        meeting.wait()
        try:
            with stop_signals():
                run, cohorts = Run.open(plan.directory), plan.cohorts[launch.rank]
                _train_cohorts(run, cohorts, launch.local_rank, lambda done, note: None, lambda line: None, extras)
        except StoppedError as stopped:
            raise SystemExit(128 + stopped.signum) from None


def _lock_of(rank: int) -> str:
    """Return the name of the lock that a process other than the first holds while it trains."""
    return f".lock-{rank}"


def _train_in_processes(run: Run, plan: _Plan, console: Console, shown: Progress, dashboard: Dashboard | None) -> None:
    """Train the planned members in processes of this machine, and start those again that die."""
    for attempt in range(_RESTARTS + 1):
        queue: SimpleQueue[Any] = multiprocessing.get_context("spawn").SimpleQueue()
        context = start_processes(  # type: ignore[no-untyped-call]
            _work, (plan, queue), nprocs=len(plan.cohorts), join=False, start_method="spawn"
        )
        assert context is not None
        try:
            while not context.join(timeout=_SECONDS_BETWEEN_LOOKS):
                _drain(queue, console, shown)
                if dashboard is not None:
                    dashboard.catch_up()
            _drain(queue, console, shown)
            return
        except ProcessExitedException as died:
            _drain(queue, console, shown)
            if attempt == _RESTARTS:
                return
            cause = f"signal {died.signal_name}" if died.signal_name else f"exit status {died.exit_code}"
            console.print(f"a process has died ({cause}); starting its members again", highlight=False)
        finally:
            for process in context.processes:
                process.kill()
                process.join()
            run.store.sweep()
        missing = run.missing()
        shown.update(len(run.experiment.planned) - len(missing))
        size = max(len(cohort) for share in plan.cohorts for cohort in share)
        plan = _Plan.make(run, missing, size, len(plan.cohorts))


def _drain(queue: SimpleQueue[Any], console: Console, shown: Progress) -> None:
    """Show what the processes have reported, and raise what went wrong in one of them."""
    while not queue.empty():
        kind, *content = queue.get()
        if kind == "progress":
            shown.advance(*content)
        elif kind == "message":
            console.print(*content)
        else:
            raise {"SaveError": SaveError, "MemoryError": MemoryError}.get(content[0], ValueError)(content[1])


def _work(rank: int, plan: _Plan, queue: SimpleQueue[Any]) -> None:
    """Train one process's share; runs in that process."""
    # The first process decides what Ctrl-C means. If it dies, this one gets SIGINT from the system and has to end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    share_cores(len(plan.cohorts))
    try:
        _train_cohorts(
            Run.open(plan.directory),
            plan.cohorts[rank],
            rank,
            lambda done, note: queue.put(("progress", done, note)),
            lambda line: queue.put(("message", line)),
            _Extras(),
        )
    except (SaveError, MemoryError, ValueError) as error:
        queue.put(("error", type(error).__name__, str(error)))


def _train_cohorts(
    run: Run,
    cohorts: Sequence[Sequence[int]],
    local_rank: int,
    on_progress: OnProgress,
    say: Callable[[str], None],
    extras: _Extras,
) -> None:
    """Train cohorts one after the other and save each.

    Args:
        run: The run that they belong to.
        cohorts: Indices of the members of each.
        local_rank: Number of this process on its machine, which chooses a GPU.
        on_progress: Called with the number of members done since the last call, in parts of a member too.
        say: Called with a line for the user.
        extras: What a user adds to the trainers.
    """
    waiting = [list(cohort) for cohort in reversed(cohorts)]
    with _quiet_lightning():
        while waiting:
            cohort = waiting.pop()
            shown = 0.0

            def advance(share: float, note: str, size: int = len(cohort)) -> None:
                nonlocal shown
                on_progress(share * size - shown, note)
                shown = share * size

            try:
                results, weights = _train_cohort(run.experiment, cohort, local_rank, advance, extras)
            except (MemoryError, torch.OutOfMemoryError):
                # Handled below: until this handler ends, the exception holds the tensors of the attempt.
                pass
            else:
                run.save(results, weights if run.experiment.keeps_weights else None)
                del weights
                if extras.dashboard is not None:
                    extras.dashboard.cohort_done(results)
                advance(1.0, _summary(results))
                continue
            on_progress(-shown, "")
            width, device = run.experiment.options.width, run.experiment.device
            if len(cohort) == 1:
                raise MemoryError(
                    f"one member of width {width} does not fit the memory of {device}; use a smaller width"
                )
            if device.type == "cuda":
                torch.cuda.empty_cache()
            # Members do not depend on how many are trained together; what did not fit will not fit next time.
            half = len(cohort) // 2
            say(f"out of memory with {len(cohort)} members at once; continuing with {half}")
            waiting = [part for larger in [*waiting, cohort] for part in reversed(_cohorts(run, larger, half))]


def _cohorts(run: Run, members: Sequence[int], size: int) -> list[list[int]]:
    """Return members, ascending, in cohorts of at most ``size`` consecutive ones, which are aligned for sums."""
    if not run.experiment.keeps_deviations:
        return aligned_blocks(members, size)
    cohorts: list[list[int]] = []
    for index in members:
        if cohorts and len(cohorts[-1]) < size and cohorts[-1][-1] == index - 1:
            cohorts[-1].append(index)
        else:
            cohorts.append([index])
    return cohorts


def _train_cohort(
    experiment: Experiment, cohort: Sequence[int], local_rank: int, advance: OnProgress, extras: _Extras
) -> tuple[MemberResults, dict[str, torch.Tensor]]:
    """Draw, train and evaluate members through Lightning; return their results and their weights."""
    recipe, limit = experiment.recipe, experiment.limit
    on_gpu = experiment.device.type == "cuda"
    gpu = local_rank % torch.cuda.device_count() if on_gpu else 0
    progress = _CohortProgress(recipe.descent.tolerance, advance)
    arguments: dict[str, Any] = {
        "strategy": _StayOnDevice(torch.device("cuda", gpu) if on_gpu else "cpu"),
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": [gpu] if on_gpu else 1,
        # Without Lightning's own view of torchrun and SLURM: each process is alone with its members, and nothing
        # but the run directory is resumed from.
        "plugins": [LightningEnvironment()],
        "precision": recipe.precision,
        "max_epochs": -1,
        "logger": extras.loggers,
        "callbacks": [progress, *extras.callbacks],
        "log_every_n_steps": 1,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in extras.callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    advance(0.0, "drawing weights")
    times = [time.perf_counter()]
    trainer = extras.trainer(**arguments)
    templates, bits = recipe.labels.shape
    with trainer.init_module():
        module = EnsembleModule(
            templates,
            bits,
            recipe.width,
            cohort,
            seed=recipe.seed,
            init=recipe.init,
            loss=recipe.descent.loss,
            tolerance=recipe.descent.tolerance,
            steps_max=recipe.descent.steps_max,
            engine=recipe.descent.engine,
            layers=recipe.descent.layers,
        )
    times.append(time.perf_counter())
    trainer.fit(module, template_batch(recipe.labels))
    times.append(time.perf_counter())
    advance(_SHARE_OF_TRAINING, "evaluating")
    outputs: Any = trainer.predict(module, evaluation_batches(limit))
    means = torch.split(limit.mean, [batch.shape[1] for batch in outputs])
    parts = [rounded_deviations(batch, mean) for batch, mean in zip(outputs, means, strict=True)]
    deviations = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    times.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(times)]
    results = MemberResults.from_cohort(cohort, module.statuses, deviations, seconds)
    weights = {name: parameter.data for name, parameter in module.stack.named_parameters()}
    # Module and trainer refer to each other, so they last until the garbage collector comes by. Their weights and
    # outputs must not.
    outputs.clear()
    for parameter in module.stack.parameters():
        parameter.data = parameter.data.new_empty(0)
    return results, weights


def _summary(results: MemberResults) -> str:
    """Return how the training of a cohort went, in a few words."""
    note = f"relative loss ≤ {float(results.relative_loss.max()):.1e} in {int(results.steps.max())} steps"
    if failed := int((~results.converged).sum()):
        note = f"{failed} did not converge; {note}"
    return note


class _StayOnDevice(SingleDeviceStrategy):
    """One device, on which members stay after `fit`: they predict there next, and are dropped then."""

    def teardown(self) -> None:
        """Free everything but the members."""
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


class _CohortProgress(Callback):
    """Share of a cohort's training that is done, guessed from how far the loss has fallen.

    Args:
        tolerance: Relative loss at which a member has converged.
        advance: Called with the share of the cohort's work that is done and a remark.
    """

    def __init__(self, tolerance: float, advance: OnProgress) -> None:
        self._tolerance = tolerance
        self._advance = advance

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report one step."""
        assert isinstance(pl_module, EnsembleModule)
        worst = max(status.relative_loss for status in pl_module.statuses)
        share = 0.0
        if 0 < worst < 1:
            share = min(math.log(worst) / math.log(self._tolerance), 1.0)
        self._advance(_SHARE_OF_TRAINING * share, f"step {trainer.global_step}, relative loss ≤ {worst:.1e}")


def _announce(run: Run, missing: Sequence[int], size: int, processes: int, console: Console) -> None:
    """Print what is going to be trained."""
    experiment = run.experiment
    options, task = experiment.options, experiment.task
    size = min(size, max(-(-len(missing) // processes), 1))
    weights = _in_words(experiment.weights_bytes)
    kept = f"kept ({weights})" if experiment.keeps_weights else f"not kept (they would take {weights})"
    text = (
        f"{task!r}: {len(task.templates)} templates, {task.layout.bits} bits. {options.ensemble} members of width "
        f"{options.width} on {experiment.device.type}, {size} at a time"
    )
    if processes > 1:
        text += f" in each of {processes} processes"
    text += f", evaluated on {len(experiment.evaluation)} states. Weights are {kept}."
    if not experiment.keeps_deviations:
        text += " Deviations are kept as sums over groups of members "
        text += f"(of each member they would take {_in_words(experiment.deviations_bytes)})."
    if finished := options.ensemble - len(missing):
        text += f" {finished} members are finished already."
    console.print(text, highlight=False, markup=False)


def _in_words(amount: int) -> str:
    return f"{amount / 2**30:.1f} GiB" if amount >= 1 << 27 else f"{amount / 2**20:.1f} MiB"


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning from remarking on what is meant: many short fits without workers, loggers or bars."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            # The data are a few tensors in memory.
            r".*does not have many workers.*",
            r".*You defined a `validation_step` but have no `val_dataloader`.*",
            r".*GPU available but not used.*",
            # Lightning 2.6 on torch 2.13; its own to mend.
            r".*isinstance.treespec, LeafSpec.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            logger.setLevel(level)
