"""Processes of a run: which one this is, and what they agree on at the start and at the end.

Members are independent, and every process saves its own in the run directory: that is the exchange. torchrun and
srun start processes by themselves; `train` starts some for ``devices``.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import FrameType
from typing import Any

import psutil
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch import distributed

_START_TIMEOUT = timedelta(minutes=5)
_END_TIMEOUT = timedelta(days=365)


@dataclass(frozen=True)
class Launch:
    """Place of this process among those that torchrun or srun started.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        local_rank: Number of this process on its machine.
        local_world: Number of processes on this machine.
        address: Host and port at which the processes meet; None for a process on its own.
        name: Name that stays the same when the same job starts its processes again; None without one.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: tuple[str, int] | None = None
    name: str | None = None

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> Launch:
        """Return the place of this process, read from the environment.

        Args:
            environ: Environment variables; by default this process's.

        Raises:
            ValueError: Variables of torchrun or srun that are incomplete, or no numbers in range.
        """
        environ = os.environ if environ is None else environ
        if "TORCHELASTIC_RUN_ID" in environ:
            world = _number(environ, "WORLD_SIZE", 1)
            rank = _number(environ, "RANK", 0, world - 1)
            local_world = _number(environ, "LOCAL_WORLD_SIZE", 1, world)
            local_rank = _number(environ, "LOCAL_RANK", 0, local_world - 1)
            address = (environ.get("MASTER_ADDR", "127.0.0.1"), _number(environ, "MASTER_PORT", 1, 65535))
            # The agent outlives the workers that it starts again.
            started = datetime.fromtimestamp(psutil.Process(os.getppid()).create_time())
            return cls(rank, world, local_rank, local_world, address, f"{started:%Y%m%d-%H%M%S}")
        name = f"slurm-{environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environ else None
        if name is not None and (array := environ.get("SLURM_ARRAY_TASK_ID")):
            name = f"slurm-{environ.get('SLURM_ARRAY_JOB_ID', environ['SLURM_JOB_ID'])}_{array}"
        # Only srun starts processes; a batch script has the variables of its job too, but is one process.
        if _number({"SLURM_STEP_NUM_TASKS": "1", **environ}, "SLURM_STEP_NUM_TASKS", 1) == 1:
            return cls(name=name)
        world = _number(environ, "SLURM_STEP_NUM_TASKS", 1)
        rank, local_rank = _number(environ, "SLURM_PROCID", 0, world - 1), _number(environ, "SLURM_LOCALID", 0)
        nodes = _number({"SLURM_STEP_NUM_NODES": "1", **environ}, "SLURM_STEP_NUM_NODES", 1, world)
        host = SLURMEnvironment.resolve_root_node_address(environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
        # Jobs that share a machine meet at different ports.
        port = 10_000 + sum(map(ord, environ.get("SLURM_JOB_ID", ""))) * 97 % 20_000
        return cls(rank, world, local_rank, -(-world // nodes), (host, port), name)

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Connect the processes for `agree` and `wait`, which do nothing for a process on its own.

        Raises:
            ValueError: Not all processes came within five minutes.
        """
        if self.world == 1:
            yield
            return
        assert self.address is not None
        host, port = self.address
        try:
            distributed.init_process_group(
                "gloo",
                init_method=f"tcp://{host}:{port}",
                rank=self.rank,
                world_size=self.world,
                timeout=_START_TIMEOUT,
            )
        except (RuntimeError, distributed.DistError) as error:
            raise ValueError(f"{self.world} processes were announced, but not all have come ({error})") from None
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def agree(self, value: Any) -> Any:
        """Return the first process's value, in every process.

        Args:
            value: What the first process passes; the others' is ignored.

        Raises:
            PeerLostError: Another process has ended.
        """
        if self.world == 1:
            return value
        values = [value]
        try:
            distributed.broadcast_object_list(values, src=0)
        except RuntimeError as error:
            raise PeerLostError from error
        return values[0]

    def wait(self) -> None:
        """Wait until every process has come here.

        Raises:
            PeerLostError: Another process has ended before.
        """
        if self.world == 1:
            return
        try:
            distributed.monitored_barrier(timeout=_END_TIMEOUT)
        except RuntimeError as error:
            raise PeerLostError from error


class PeerLostError(Exception):
    """Another process of the run has ended before its work was done."""

    def __init__(self) -> None:
        super().__init__("another process of the run has ended")


def _number(environ: Mapping[str, str], name: str, low: int, high: int | None = None) -> int:
    text = environ.get(name, "")
    if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
        expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"environment variable {name}={text!r}: expected {expected}, as torchrun and srun set it")
    return int(text)


class StoppedError(BaseException):
    """A signal that asks the program to end: Ctrl-C, or SIGTERM as schedulers send it.

    It comes in the middle of anything, so that no ``except Exception`` on the way may take it for its own.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__("interrupted" if signum == signal.SIGINT else "terminated")
        self.signum = signum


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into `StoppedError` meanwhile; outside the main thread this does nothing."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise StoppedError(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            # None: a handler that was not set by Python and cannot be set again.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)


def share_cores(processes: int) -> None:
    """Leave this process its share of the machine's cores.

    Args:
        processes: Number of the run's processes on this machine.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, allowed // processes))
