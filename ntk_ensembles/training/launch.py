"""Processes of a run: which one this is, what they agree on at the start, and how they are stopped.

Members are independent, and every process saves its own in the run directory: that is the exchange. torchrun and
srun start processes by themselves; `train` starts some for ``devices``.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import FrameType
from typing import Any

import psutil
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, and documented

from ntk_ensembles.ensemble.network import allowed_cores

_MEETING_TIMEOUT = timedelta(minutes=5)
_SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class Launch:
    """Place of this process among those that torchrun or srun started.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
        local_rank: Number of this process on its machine.
        local_world: Number of processes on this machine.
        address: Host and port at which the processes meet; None for a process on its own.
        has_store: Whether a store of `torch.distributed` is open there already.
        attempt: Text that is another one each time the same processes are started again.
        name: Name that stays the same when the same job starts its processes again; None without one.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    address: tuple[str, int] | None = None
    has_store: bool = False
    attempt: str = "0"
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
            # The agent outlives the workers that it starts again.
            started = datetime.fromtimestamp(psutil.Process(os.getppid()).create_time())
            return cls(
                rank,
                world,
                local_rank,
                local_world,
                (environ.get("MASTER_ADDR", "127.0.0.1"), _number(environ, "MASTER_PORT", 1, 65535)),
                environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
                f"{started:%Y%m%d-%H%M%S}",
            )
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
        return cls(rank, world, local_rank, -(-world // nodes), (host, port), name=name)

    def meet(self) -> Meeting:
        """Connect to the other processes.

        Raises:
            ValueError: The address does not answer within five minutes.
        """
        if self.address is None:
            return Meeting(self, None)
        host, port = self.address
        try:
            # torchrun's agent has a store already; otherwise the first process opens one.
            store = TCPStore(host, port, is_master=self.rank == 0 and not self.has_store, timeout=_MEETING_TIMEOUT)
        except (RuntimeError, DistError) as error:
            raise ValueError(f"the processes of the run cannot meet at {host}:{port} ({error})") from error
        # The agent's store outlives workers that are started again.
        return Meeting(self, PrefixStore(f"ntk_ensembles/{self.attempt}", store))


class Meeting:
    """What the processes of a run agree on before each goes its own way.

    A store of `torch.distributed`, without a process group: Lightning and torchmetrics would take that for one training
    that has to be synchronised.

    Args:
        launch: Place of this process among them.
        store: The store; None for a process on its own.
    """

    def __init__(self, launch: Launch, store: Any) -> None:
        self._launch = launch
        self._store = store

    def tell(self, value: Any) -> None:
        """Tell the other processes a plain value; for the first process."""
        if self._store is not None:
            self._store.set("value", json.dumps(value))

    def hear(self) -> Any:
        """Return what the first process tells; for the others.

        Raises:
            ValueError: It tells nothing within five minutes.
        """
        return json.loads(self._get("value"))

    def wait(self) -> None:
        """Wait until every process has come here.

        Raises:
            ValueError: Not all have come within five minutes.
        """
        if self._store is not None:
            self._store.set(f"ready/{self._launch.rank}", "")
            for rank in range(self._launch.world):
                self._get(f"ready/{rank}")

    def _get(self, key: str) -> bytes:
        assert self._store is not None
        deadline = time.monotonic() + _MEETING_TIMEOUT.total_seconds()
        # A call that waits hears no signal, so it waits for a short time only.
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                raise ValueError(f"the {self._launch.world} processes of the run have not all come together")
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        value: bytes = self._store.get(key)
        return value


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
    """Limit this process to its share of the machine's cores.

    Args:
        processes: Number of the run's processes on this machine.
    """
    torch.set_num_threads(max(1, allowed_cores() // processes))
