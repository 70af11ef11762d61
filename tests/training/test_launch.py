"""Which process this is, from the variables of torchrun and srun, written out as they set them."""

import os
import signal
import socket
import threading
import time

import pytest
import torch

from ntk_ensembles.training.launch import Launch, StoppedError, share_cores, stop_signals

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "7a1c",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29511",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[7-8]",
}


def test_a_process_on_its_own() -> None:
    assert Launch.detect({}) == Launch(0, 1, 0, 1, None, name=None)


def test_torchrun() -> None:
    launch = Launch.detect(TORCHRUN)
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == (3, 4, 1, 2)
    assert launch.address == ("node1", 29511)
    assert launch.attempt != Launch.detect({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}).attempt
    # The same for every worker, and when the agent starts them again.
    assert launch.name is not None
    assert launch.name == Launch.detect({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).name


def test_srun() -> None:
    launch = Launch.detect(SRUN)
    assert (launch.rank, launch.world, launch.local_rank, launch.local_world) == (2, 4, 0, 2)
    assert launch.address is not None
    assert launch.address[0] == "node7"
    assert launch.name == "slurm-1234"
    # All processes of a job meet at one port, and those of another job at another.
    assert launch.address == Launch.detect({**SRUN, "SLURM_PROCID": "0"}).address
    assert launch.address != Launch.detect({**SRUN, "SLURM_JOB_ID": "1235"}).address


def test_a_batch_script_is_one_process_of_its_job() -> None:
    """Without srun, SLURM's variables describe the job's size, and nobody starts further processes."""
    alone = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert Launch.detect(alone) == Launch(name="slurm-1234")
    array = {**alone, "SLURM_ARRAY_JOB_ID": "1230", "SLURM_ARRAY_TASK_ID": "5"}
    assert Launch.detect(array).name == "slurm-1230_5"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RANK": "4"}, "RANK='4': expected an integer from 0 to 3"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected an integer of at least 1"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=''"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE='0': expected an integer from 1 to 4"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
    ],
)
def test_broken_variables_are_refused(changes: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Launch.detect({**TORCHRUN, **changes})


def test_a_process_on_its_own_agrees_with_itself_and_waits_for_nobody() -> None:
    meeting = Launch().meet()
    meeting.tell("plan")
    meeting.wait()
    assert not torch.distributed.is_initialized()


def test_processes_agree_and_wait_for_each_other() -> None:
    """Three processes as threads, which meet at a store of the first one's."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = found.getsockname()
    log: list[object] = []

    def follow(rank: int) -> None:
        meeting = Launch(rank, 3, address=address).meet()
        log.append(meeting.hear())
        meeting.wait()
        log.append("went on")

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    meeting = Launch(0, 3, address=address).meet()
    meeting.tell({"members": [1, 2]})
    deadline = time.monotonic() + 30
    while len(log) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    # Time enough to go on, for who did not wait.
    time.sleep(0.2)
    assert log == [{"members": [1, 2]}] * 2
    meeting.wait()
    for thread in threads:
        thread.join(timeout=10)
    assert log[2:] == ["went on"] * 2


@pytest.mark.parametrize(("signum", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_signals_stop_and_their_handlers_come_back(signum: signal.Signals, word: str) -> None:
    before = signal.getsignal(signum)

    def wait_for_it() -> None:
        with stop_signals():
            os.kill(os.getpid(), signum)
            signal.pause()

    with pytest.raises(StoppedError, match=word) as caught:
        wait_for_it()
    assert caught.value.signum == signum
    assert signal.getsignal(signum) is before


def test_other_threads_leave_signals_alone() -> None:
    seen: list[object] = []

    def look() -> None:
        with stop_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [before]


def test_processes_share_the_cores() -> None:
    before = torch.get_num_threads()
    try:
        share_cores(1)
        whole = torch.get_num_threads()
        assert whole == len(os.sched_getaffinity(0))
        share_cores(1000)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
