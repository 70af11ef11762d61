"""Limits of the variables of torchrun and srun, machines of unequal load, and shares of cores."""

from __future__ import annotations

import os

import pytest
import torch

from ntk_ensembles.training.launch import Launch, share_cores

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
    "SLURM_STEP_NODELIST": "node[7-8]",
    # The job's, which is larger than this step of it.
    "SLURM_NTASKS": "7",
}


def test_a_machine_is_shared_by_its_own_processes_and_not_by_all() -> None:
    """Six of torchrun, three on each machine; five of srun on two machines, three at most on one."""
    assert Launch.detect(TORCHRUN).local_world == 3
    assert (Launch.detect(SRUN).world, Launch.detect(SRUN).local_world) == (5, 3)


def test_a_step_of_one_task_is_a_process_on_its_own() -> None:
    assert Launch.detect({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) == Launch(name="slurm-123")


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("WORLD_SIZE", ["5", "6", "100"], ["0", "many", "-6", ""]),
        ("RANK", ["0", "5"], ["6", "-1", ""]),
        ("LOCAL_WORLD_SIZE", ["2", "6"], ["0", "7"]),
        ("LOCAL_RANK", ["0", "2"], ["3"]),
        ("MASTER_PORT", ["1", "65535"], ["0", "65536"]),
    ],
)
def test_variables_are_allowed_up_to_their_limits(name: str, allowed: list[str], refused: list[str]) -> None:
    for value in allowed:
        Launch.detect({**TORCHRUN, name: value})
    for value in refused:
        with pytest.raises(ValueError, match=f"environment variable {name}='{value}': expected an integer"):
            Launch.detect({**TORCHRUN, name: value})


@pytest.mark.parametrize(("processes", "each"), [(1, 7), (2, 3), (3, 2), (7, 1), (50, 1)])
def test_processes_of_a_machine_share_its_cores(processes: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(7)), raising=False)
    try:
        share_cores(processes)
        assert torch.get_num_threads() == each
    finally:
        torch.set_num_threads(threads)
