"""Which process this is among those that torchrun or srun started, as their variables tell it."""

from __future__ import annotations

import os
import signal
import threading
from datetime import datetime
from typing import Any

import psutil
import pytest
import torch

from ntk_ensembles.training.launch import Launch, StoppedError, share_cores, stop_signals

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "6",
    "RANK": "4",
    "LOCAL_WORLD_SIZE": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29501",
}
SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "node[7-8]",
    "SLURM_NTASKS": "5",
    "SLURM_NTASKS_PER_NODE": "3",
}


@pytest.fixture
def srun(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    return dict(SRUN)


def test_a_process_on_its_own() -> None:
    assert Launch.detect({}) == Launch(0, 1, 0, 1, None, None)


def test_torchrun_on_two_machines() -> None:
    """Six processes, three on each: what is shared on a machine is shared by three."""
    found = Launch.detect(TORCHRUN)
    started = datetime.fromtimestamp(psutil.Process(os.getppid()).create_time())
    assert found == Launch(4, 6, 1, 3, ("node7", 29501), f"{started:%Y%m%d-%H%M%S}")
    assert Launch.detect(TORCHRUN) == found


def test_srun_on_two_machines(srun: dict[str, str]) -> None:
    """Five processes on two machines: at most three on one."""
    found = Launch.detect(srun)
    assert (found.rank, found.world, found.local_rank, found.local_world) == (3, 5, 0, 3)
    assert found.name == "slurm-123"
    assert found.address is not None
    assert found.address[0] == "node7"
    assert 10_000 <= found.address[1] < 65536


def test_the_script_of_a_job_is_one_process_however_many_tasks_the_job_has() -> None:
    environ = {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "5", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert Launch.detect(environ) == Launch(name="slurm-123")
    assert Launch.detect({**environ, "SLURM_STEP_NUM_TASKS": "1"}) == Launch(name="slurm-123")


def test_jobs_of_an_array_have_names_of_their_own() -> None:
    """SLURM gives each a job id too, which is another when the job is queued again."""
    environ = {"SLURM_JOB_ID": "127", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "7"}
    assert Launch.detect(environ).name == "slurm-120_7"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected an integer of at least 1"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many'"),
        ({"RANK": "6"}, "RANK='6': expected an integer from 0 to 5"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": ""}, "RANK=''"),
        ({"LOCAL_WORLD_SIZE": "7"}, "LOCAL_WORLD_SIZE='7': expected an integer from 1 to 6"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0'"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK='3': expected an integer from 0 to 2"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT='0': expected an integer from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
    ],
)
def test_variables_that_cannot_be_are_named(changes: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=f"environment variable {says}"):
        Launch.detect({**TORCHRUN, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"SLURM_PROCID": "5"}, "SLURM_PROCID='5'"), ({"SLURM_STEP_NUM_TASKS": "0"}, "_NUM_TASKS='0'")],
)
def test_variables_of_srun_that_cannot_be_are_named(changes: dict[str, str], says: str, srun: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=says):
        Launch.detect({**srun, **changes})


def test_a_process_on_its_own_agrees_with_itself_and_waits_for_nobody() -> None:
    launch = Launch()
    with launch.meeting():
        assert launch.agree("plan") == "plan"
        launch.wait()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_what_goes_on_and_its_handler_comes_back(signum: signal.Signals) -> None:
    seen: list[int] = []

    def own(number: int, frame: Any) -> None:
        seen.append(number)

    before = signal.signal(signum, own)
    try:
        with pytest.raises(StoppedError) as stopped, stop_signals():
            signal.raise_signal(signum)
        assert stopped.value.signum == signum
        assert str(stopped.value) == ("interrupted" if signum == signal.SIGINT else "terminated")
        assert signal.getsignal(signum) is own
        signal.raise_signal(signum)
        assert seen == [signum]
    finally:
        signal.signal(signum, before)


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    found: list[Any] = []

    def work() -> None:
        with stop_signals():
            found.extend(signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == before


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)), raising=False)
    try:
        for processes, each in ((1, 7), (2, 3), (3, 2), (7, 1), (50, 1)):
            share_cores(processes)
            assert torch.get_num_threads() == each
    finally:
        torch.set_num_threads(threads)
