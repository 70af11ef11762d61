"""Ensembles taken from run directories: their mean against plain networks, their executions against integers."""

import dataclasses
import itertools
import random
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from ntk_ensembles import SBN, Addition, Ensemble, EvaluationSet, MLPStack, Permutation, RunOptions, TwoLayerMLP, train
from ntk_ensembles.runs import MemberResults, Run, RunStore, StoreError, merge_runs
from ntk_ensembles.tasks import Program
from ntk_ensembles.theory import NTKExecutor, rollout

QUIET = Console(quiet=True)
OPTIONS = RunOptions(width=600, ensemble=8, evaluation_states=60, tolerance=1e-6, cohort=3)


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("added") / "run"
    train(Addition(3), dataclasses.replace(OPTIONS, out=str(directory)), console=QUIET)
    return directory


@pytest.fixture
def without_weights(added: Path, tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(added, tmp_path / "copy"))
    shutil.rmtree(directory / "weights")
    return directory


def states_of(task: Addition, count: int = 100) -> torch.Tensor:
    return EvaluationSet.sample(task, count, 3).states


def outputs_of(ensemble: Ensemble, states: torch.Tensor) -> dict[int, torch.Tensor]:
    task = ensemble.task
    inputs = task.templates.encode(task.templates.matches(states)).float()
    return dict(zip(ensemble.indices, ensemble.members(inputs), strict=True))


def test_the_mean_is_that_of_plain_networks(added: Path) -> None:
    ensemble = Ensemble.load(added)
    task = Addition(3)
    states = states_of(task)
    inputs = task.templates.encode(task.templates.matches(states)).float()
    store = Run.open(added).store
    outputs = []
    for path in store.weight_files():
        weights = store.load_weights(path)
        for hidden, readout in zip(weights["hidden"], weights["readout"], strict=True):
            network = TwoLayerMLP(len(task.templates), task.layout.bits, 600)
            network.load_state_dict({"hidden": hidden, "readout": readout})
            outputs.append(network(inputs).detach().double())
    assert len(outputs) == len(ensemble) == 8
    # float32 sums of 600 terms.
    torch.testing.assert_close(ensemble.predict(states), torch.stack(outputs).mean(0), rtol=0, atol=1e-6)


def test_retrained_members_are_the_kept_ones_to_the_bit(added: Path, without_weights: Path) -> None:
    states = states_of(Addition(3))
    kept, found = outputs_of(Ensemble.load(added), states), outputs_of(Ensemble.load(without_weights), states)
    assert sorted(kept) == sorted(found) == list(range(8))
    assert all(torch.equal(kept[index], found[index]) for index in kept)


def test_partly_kept_weights_and_the_first_few_members(added: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(added, tmp_path / "copy"))
    sorted((directory / "weights").iterdir())[1].unlink()
    states = states_of(Addition(3))
    torch.testing.assert_close(Ensemble.load(directory).predict(states), Ensemble.load(added).predict(states))
    few = Ensemble.load(directory, members=2)
    assert few.indices == (0, 1)
    for wrong in (0, 9):
        with pytest.raises(StoreError, match="expected 1 to 8"):
            Ensemble.load(directory, members=wrong)


def test_damaged_weights_are_refused(added: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(added, tmp_path / "copy"))
    path = sorted((directory / "weights").iterdir())[0]
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="checksum"):
        Ensemble.load(directory)


def test_it_adds(added: Path) -> None:
    pairs = list(itertools.product(range(8), range(8)))
    assert Ensemble.load(added).execute(pairs) == [p + q for p, q in pairs]
    assert Ensemble.load(added).execute([]) == []


def test_a_step_tells_margins_and_agreement(added: Path) -> None:
    task = Addition(3)
    ensemble = Ensemble.load(added)
    evaluation = EvaluationSet.sample(task, 100, 5)
    zero = torch.zeros(1, task.layout.bits, dtype=torch.bool)
    step = ensemble.step(torch.cat([evaluation.states, zero]))
    assert torch.equal(step.batch[:-1], evaluation.next_states)
    assert step.agreed.all()
    assert step.margins[-1] == torch.inf
    # The limit's margins, give or take the spread of eight members of width 600.
    limit = rollout(NTKExecutor(task.templates), evaluation.states, 1)
    assert (step.margins > 0).all()
    some = limit.margins.isfinite()
    margins = torch.from_numpy(step.margins)
    assert torch.equal(margins[:-1].isfinite(), some)
    assert float((margins[:-1] - limit.margins)[some].abs().max()) < 0.1
    one = Ensemble.load(added, members=1).step(evaluation.states, "sign")
    wrong = (one.batch != evaluation.next_states).any(1)
    assert wrong.any()
    assert torch.equal(torch.from_numpy(one.agreed), ~wrong)
    assert torch.equal(torch.from_numpy(one.margins) < 0, wrong)


def test_it_permutes(tmp_path: Path) -> None:
    task = Permutation(5, permutation=[2, 0, 1, 4, 3])
    train(task, dataclasses.replace(OPTIONS, out=str(tmp_path / "run")), console=QUIET)
    words = list(range(32))
    assert Ensemble.load(tmp_path / "run").execute(words) == [task.reference(word) for word in words]


def test_it_runs_programs_of_the_computer(tmp_path: Path) -> None:
    task = SBN(4, 3)
    options = dataclasses.replace(OPTIONS, width=2048, ensemble=16, out=str(tmp_path / "run"))
    train(task, options, console=QUIET)
    generator = random.Random(1)
    programs = []
    for _ in range(30):
        memory = tuple(generator.randrange(-4, 4) for _ in range(4))
        state = dataclasses.replace(task.machine.load([0]), memory=memory, pc=generator.randrange(4))
        programs.append(Program(state, 5, "random"))
    assert Ensemble.load(tmp_path / "run").execute(programs) == [task.reference(program) for program in programs]


def test_too_little_memory_brings_members_again_for_every_prediction(added: Path) -> None:
    states = states_of(Addition(3))
    expected = Ensemble.load(added).predict(states)
    brought: list[int] = []
    ensemble = Ensemble.load(added, memory_bytes=1000, on_progress=brought.append)
    assert brought == []
    # More states than are predicted at a time: still once each.
    found = ensemble.predict(states.repeat(40, 1))
    torch.testing.assert_close(found, expected.repeat(40, 1), rtol=0, atol=1e-6)
    assert sum(brought) == 8


def test_a_states_prediction_does_not_depend_on_the_others(added: Path) -> None:
    states = states_of(Addition(3))
    ensemble = Ensemble.load(added)
    alone = torch.cat([ensemble.predict(state[None]) for state in states])
    # Products of other shapes add up 600 float32 terms in another order.
    torch.testing.assert_close(ensemble.predict(states), alone, rtol=0, atol=1e-6)
    assert ensemble.predict(states[:0]).shape == (0, states.shape[1])
    assert ensemble.rollout(states[:0], 3).states.shape == (0, states.shape[1])


def test_what_does_not_fit_the_task_is_refused(added: Path) -> None:
    ensemble = Ensemble.load(added)
    with pytest.raises(ValueError, match="states of 8 bits: the task has 9"):
        ensemble.step(torch.zeros(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not fit 3 bits"):
        ensemble.execute([(1, 2), (8, 0)])
    with pytest.raises(ValueError, match="expected at least 0"):
        ensemble.rollout(states_of(Addition(3)), -1)


def test_a_run_of_a_cpu_can_be_used_where_there_is_a_gpu(added: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Ensemble.load(added).execute([(5, 6)]) == [11]


def as_if_of_a_gpu(run: Path, out: Path, cohorts: slice = slice(None)) -> Path:
    """A copy of some of a run's cohorts that says that a GPU has trained them."""
    origin = Run.open(run)
    out.mkdir()
    store = RunStore(out, {**origin.store.manifest, "device": "cuda"})
    with store.beginning():
        shutil.copy(run / "config.yaml", out)
        store.save_task(*origin.store.load_task())
    paths = origin.store.weight_files()
    for path in paths[cohorts]:
        results = MemberResults(**load_file(run / "checkpoints" / path.name))
        weights = origin.store.load_weights(path)
        store.save(results, {name: weights[name] for name in ("hidden", "readout")})
    return out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_run_of_a_gpu_can_be_used_without_one_while_weights_are_kept(added: Path, tmp_path: Path) -> None:
    directory = as_if_of_a_gpu(added, tmp_path / "moved")
    states = states_of(Addition(3))
    assert torch.equal(Ensemble.load(directory).predict(states), Ensemble.load(added).predict(states))
    with pytest.raises(ValueError, match="device='cuda': expected cpu, as PyTorch sees no GPU here"):
        Ensemble.load(directory, device="cuda")
    sorted((directory / "weights").iterdir())[0].unlink()
    with pytest.raises(StoreError, match="3 members have no kept weights and were trained on cuda; on cpu they would"):
        Ensemble.load(directory)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_runs_of_gpus_are_merged_without_one(added: Path, tmp_path: Path) -> None:
    parts = [as_if_of_a_gpu(added, tmp_path / str(start), slice(start, start + 1)) for start in (0, 1)]
    merge_runs(parts, str(tmp_path / "merged"))
    assert Run.open(tmp_path / "merged").device.type == "cuda"
    assert Ensemble.load(tmp_path / "merged").indices == (0, 1, 2, 3, 4, 5)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no run directory"):
        Ensemble.load(tmp_path)


def test_a_loaded_ensemble_is_an_object_like_any_other(added: Path) -> None:
    ensemble = Ensemble.load(added)
    x = ensemble.task.encode([(3, 5), (7, 1), (0, 0)])
    assert len(ensemble) == 8
    assert repr(ensemble) == f"Ensemble(Addition(bits=3), members=8, width=600, run={str(added)!r})"
    outputs = ensemble.members(x)
    assert outputs.shape == (8, 3, 9)
    torch.testing.assert_close(ensemble.member(3)(x).detach(), outputs[3], rtol=0, atol=1e-6)
    torch.testing.assert_close(ensemble(x), outputs.double().mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(ensemble(x), ensemble.predict(states_of_inputs(ensemble.task)), rtol=0, atol=1e-12)
    state = ensemble.state_dict()
    stack = MLPStack(12, 9, 600, ensemble.indices, draw=False)
    stack.load_state_dict(state)
    torch.testing.assert_close(stack(x).detach(), outputs, rtol=0, atol=1e-6)
    for position in (-1, 8):
        with pytest.raises(ValueError, match="expected an integer from 0 to 7"):
            ensemble.member(position)


def states_of_inputs(task: Addition) -> torch.Tensor:
    return torch.stack([task.initial_state(pair) for pair in [(3, 5), (7, 1), (0, 0)]])


def test_a_member_trains_on_in_plain_pytorch(added: Path) -> None:
    ensemble = Ensemble.load(added)
    x, target = torch.eye(12), torch.ones(12, 9)
    network = ensemble.member(2)
    before = float((network(x) - target).square().mean().detach())
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        ((network(x) - target).square().sum() / 2).backward()
        optimizer.step()
    assert float((network(x) - target).square().mean().detach()) < before / 2
    # The ensemble's own member has not moved.
    assert float((ensemble.members(x)[2] - ensemble.task.templates.labels.float()).abs().max()) < 0.01
