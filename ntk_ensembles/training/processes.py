"""Several processes, by Lightning's strategy for them: each trains members of its own (DESIGN §4).

Processes exchange the plan at the start and the records at the end; there are no gradients to reduce, so the
module is not wrapped. `torchrun` and SLURM start processes as Lightning supports it; otherwise the first
process starts the others, as Lightning does, and ends the run when one of them dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning_utilities.core.rank_zero import rank_zero_only

_SECONDS_BETWEEN_LOOKS = 0.5


class MembersStrategy(DDPStrategy):
    """DDP's processes and collectives, without its gradient traffic."""

    strategy_name = "members"

    def configure_ddp(self) -> None:
        """Nothing: there are no parameters to keep in step."""

    def on_exception(self, exception: BaseException) -> None:
        """From now on the end of other processes is no news."""
        super().on_exception(exception)
        if isinstance(self._launcher, MembersLauncher):
            self._launcher.ending.set()

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = MembersLauncher(self.cluster_environment, self.num_processes, self.num_nodes)


class MembersLauncher(_SubprocessScriptLauncher):
    """Lightning's, but when a process dies the first one is interrupted and can say so, instead of being killed."""

    died: int | None = None
    """The exit status of the process that died first."""

    ending: threading.Event
    """Set when the other processes end because this one does."""

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other processes, watch them, and do this one's work."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        # Not Ctrl-C's signal, which a program that was started in the background ignores.
        signal.signal(signal.SIGUSR2, signal.default_int_handler)
        self._call_children_scripts()
        self.ending = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _watch(self) -> None:
        while any(child.poll() is None for child in self.procs):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            failed = [child.returncode for child in self.procs if child.poll()]
            if self.ending.is_set():
                # This process is busy with what was finished: no second Ctrl-C for it.
                return
            if failed:
                self.died = failed[0]
                self.end_children()
                os.kill(os.getpid(), signal.SIGUSR2)
                return

    def end_children(self) -> None:
        """End the other processes; a collective that waits for a dead one does not end by itself."""
        self.ending.set()
        for child in self.procs:
            if child.poll() is None:
                child.kill()
        for child in self.procs:
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                continue


def end_with_parent() -> None:
    """End this process when the one that started it is gone, so that it does not write beside a run that goes on."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def process_rank() -> int:
    """0 in the first process of a run, and where there is only one."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def devices_of_launcher() -> int:
    """How many processes a node has, where torchrun or SLURM started this one; otherwise 1."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 1


def nodes_of_launcher() -> int:
    """How many nodes, likewise."""
    if os.environ.get("GROUP_WORLD_SIZE", "").isdecimal():
        return int(os.environ["GROUP_WORLD_SIZE"])
    if os.environ.get("SLURM_NTASKS_PER_NODE") and os.environ.get("SLURM_NNODES", "").isdecimal():
        return int(os.environ["SLURM_NNODES"])
    return 1


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective has failed because another process is gone."""
    text = str(error)
    return isinstance(error, torch.distributed.DistBackendError | torch.distributed.DistNetworkError) or any(
        words in text for words in ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo")
    )
