"""A trained ensemble, loaded from its run directory: predict, execute, evaluate on other states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float16, Float64
from torch import Tensor
from torch.nn import functional

from ntk_ensembles.ensemble import MLPStack, TwoLayerMLP, choose_cohort, predict, train_members
from ntk_ensembles.ensemble.cohort import free_memory_bytes
from ntk_ensembles.errors import OptionError, check_range
from ntk_ensembles.runs.groups import Block, Measure, blocks_of, joined, rounded_deviations
from ntk_ensembles.runs.run import Run, TaskOrClass
from ntk_ensembles.runs.store import StoreError
from ntk_ensembles.tasks import Task
from ntk_ensembles.tasks.evaluation import num_micro_steps
from ntk_ensembles.templates import SparseMatcher
from ntk_ensembles.theory import Decoder, LimitPrediction, Rollout, Step, TensorStepper, rollout
from ntk_ensembles.theory.executor import decoded_step

_STATES_AT_ONCE = 1024
_MEMORY_SHARE = 0.5
"""Share of the free memory that members may take in order to stay in it."""

OnProgress = Callable[[int], None]
"""Called with the number of members that have just been brought into memory."""


class Ensemble(TensorStepper):
    """The converged members of a run, and their mean.

    Members come from kept weights or, where these were not kept, are drawn and trained again from their seeds, to the
    same bits on the same machine. They stay in memory if they fit a budget; otherwise every prediction
    brings them again, cohort by cohort, with the same result.

    Make it with `load` or `from_run`.

    Attributes:
        run: The run that trained the members.
        indices: Indices of the members in the run, ascending.
    """

    def __init__(self, run: Run, source: _MemberSource, memory_bytes: int | None = None) -> None:
        self.run = run
        self.indices = tuple(sorted(source.indices))
        self._source = source
        # For a few states faster than a matrix product, which waits for all cores.
        self._matcher = SparseMatcher(run.experiment.task.templates)
        self._predictor = run.experiment.predictor
        if memory_bytes is None:
            memory_bytes = int(_MEMORY_SHARE * free_memory_bytes(source.device))
        fits = len(self) * run.experiment.recipe.weight_bytes <= memory_bytes
        self._resident = list(source.stacks()) if fits else None

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        task: TaskOrClass | None = None,
        members: int | None = None,
        device: torch.device | str | None = None,
        memory_bytes: int | None = None,
        on_progress: OnProgress = lambda count: None,
    ) -> Ensemble:
        """Load the ensemble of a run directory.

        Args:
            directory: Directory of a run, finished or not.
            task: Task, or its class, that says what inputs and outputs mean, for `execute` on a run of a user's own
                task; predictions at states do without. No directory is trusted to name Python to be executed.
            members: Number of converged members to take, from the first; by default all.
            device: Where to predict; by default on the type that trained the members, or on the CPU if there is none.
            memory_bytes: Memory that members may take in order to stay in it; by default half of what is free.
            on_progress: Called with the number of members that have just been brought into memory.

        Raises:
            StoreError: No such run, a damaged one, one of another task, one without converged members, or fewer than
                ``members``; or members to be trained again that another type of device has trained.
            OptionError: A GPU that is not there, or not even one member to be trained again fits.
        """
        run = Run.open(directory, task)
        chosen = converged_members(run, members)
        return cls.from_run(run, chosen, device=device, memory_bytes=memory_bytes, on_progress=on_progress)

    @classmethod
    def from_run(
        cls,
        run: Run,
        members: Sequence[int],
        *,
        device: torch.device | str | None = None,
        memory_bytes: int | None = None,
        on_progress: OnProgress = lambda count: None,
    ) -> Ensemble:
        """Load members of an open run.

        Args:
            run: The run that trained the members.
            members: Indices of the members, at least one; see `converged_members`.
            device: As in `load`.
            memory_bytes: As in `load`.
            on_progress: As in `load`.

        Raises:
            StoreError: Damaged weights, or members to be trained again that another type of device has trained.
            OptionError: A GPU that is not there, or not even one member to be trained again fits.
        """
        return cls(run, _MemberSource(run, members, _resolve_device(run, device), on_progress), memory_bytes)

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self.indices)

    def __repr__(self) -> str:
        options = self.run.experiment.options
        return f"Ensemble({self.task!r}, members={len(self)}, width={options.width}, run={str(self.run.directory)!r})"

    @property
    def task(self) -> Task[Any, Any]:
        """What was learned; a `RecordedTask` without meaning where the run was trained from a user's own."""
        return self.run.experiment.task

    def member(self, position: int) -> TwoLayerMLP:
        """Return a copy of one trained member as a network of its own, which can be trained on.

        Args:
            position: Which member, 0 to ``len(self) − 1``, in the order of `indices`.

        Raises:
            OptionError: No such position.
        """
        check_range("position", position, 0, len(self) - 1)
        index = self.indices[position]
        for stack in self._stacks():
            if index in stack.indices:
                network = stack.member(stack.indices.index(index))
                return network.requires_grad_(True)
        raise AssertionError(f"member {index} has no source")

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of all members, as of an `MLPStack`: ``hidden`` and ``readout``, members first."""
        parts = [(index, stack, i) for stack in self._stacks() for i, index in enumerate(stack.indices)]
        parts.sort(key=lambda part: part[0])
        return {
            name: torch.stack([getattr(stack, name)[i].detach() for _, stack, i in parts]).contiguous()
            for name in ("hidden", "readout")
        }

    def members(self, x: Float[Tensor, "inputs templates"]) -> Float[Tensor, "members inputs bits"]:
        """Return every member's outputs, in the order of `indices`.

        Args:
            x: Encoded inputs, such as from ``task.encode``; columns of padding templates may be left out.
        """
        x = self._padded(x)
        outputs: dict[int, Tensor] = {}
        for stack in self._stacks():
            outputs.update(zip(stack.indices, predict(stack, x).cpu(), strict=True))
        return torch.stack([outputs[index] for index in self.indices])

    def __call__(self, x: Float[Tensor, "inputs templates"]) -> Float64[Tensor, "inputs bits"]:
        """Return the mean over members of the outputs.

        Args:
            x: Encoded inputs, such as from ``task.encode``; columns of padding templates may be left out.
        """
        return self._mean([self._padded(x)])

    def predict(self, states: Bool[Tensor, "states bits"]) -> Float64[Tensor, "states bits"]:
        """Return the mean over members of the outputs at states.

        Raises:
            ValueError: States of another number of bits.
        """
        if states.shape[1] != self.task.layout.bits:
            raise ValueError(f"states of {states.shape[1]} bits: the task has {self.task.layout.bits}")
        return self._mean([self._encode(part) for part in torch.split(states, _STATES_AT_ONCE)])

    def deviations(self, limit: LimitPrediction) -> Float16[Tensor, "members states bits"]:
        """Return every member's outputs minus the NTK mean, on other evaluation states than the run's own.

        Args:
            limit: The evaluation states and what infinite width predicts of them.
        """
        position = {index: i for i, index in enumerate(self.indices)}
        deviations = torch.empty(len(self), *limit.mean.shape, dtype=torch.float16)
        for indices, part in self._deviations(limit):
            deviations[[position[index] for index in indices]] = part
        return deviations

    def blocks(self, measure: Measure) -> list[Block]:
        """Return the members as sums over aligned groups on other evaluation states, some members at a time.

        Args:
            measure: What decodes the means of groups on these states.
        """
        found: list[Block] = []
        for indices, part in self._deviations(measure.limit):
            converged = torch.ones(len(indices), dtype=torch.bool)
            found = joined(measure, [*found, *blocks_of(measure, torch.tensor(indices), converged, part)])
        return found

    def _deviations(self, limit: LimitPrediction) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Yield indices and deviations of members that are in memory together."""
        inputs = limit.inputs.to(torch.float32)
        for stack in self._stacks():
            batches = zip(torch.split(inputs, _STATES_AT_ONCE), torch.split(limit.mean, _STATES_AT_ONCE), strict=True)
            parts = [rounded_deviations(predict(stack, x), mean) for x, mean in batches]
            yield stack.indices, torch.cat(parts, 1)

    def step(self, batch: Bool[Tensor, "states bits"], decoder: Decoder = "midpoint") -> Step[Tensor]:
        """Predict, decode and compare one micro-step of every state.

        Args:
            batch: States to predict from.
            decoder: How the mean is decoded.

        Raises:
            ValueError: An unknown decoder, or states of another number of bits.
        """
        mean = self.predict(batch)
        num_matches, set_counts = map(torch.from_numpy, self._matcher.match_and_count(batch.numpy()))
        return decoded_step(batch, mean, decoder, self._predictor, num_matches, set_counts)

    def rollout(self, states: Bool[Tensor, "states bits"], micro_steps: int, decoder: Decoder = "midpoint") -> Rollout:
        """Run a closed loop: each decoded mean is the next state.

        Args:
            states: States to start from.
            micro_steps: Number of micro-steps, at least 0.
            decoder: How the mean is decoded.

        Raises:
            ValueError: An unknown decoder, states of another number of bits, or ``micro_steps`` is negative.
        """
        return rollout(_Decoding(self, decoder), states, micro_steps)

    def execute(self, inputs: Sequence[Any], decoder: Decoder = "midpoint") -> list[Any]:
        """Return the ensemble's outputs for inputs of the task, such as pairs of numbers for addition.

        Raises:
            ValueError: An input that does not fit the task, or an unknown decoder.
            TaskError: The task is a user's own, and `load` was not given it.
        """
        if not inputs:
            return []
        states = torch.stack([self.task.initial_state(task_input) for task_input in inputs])
        micro_steps = [num_micro_steps(self.task, task_input) for task_input in inputs]
        results: list[Any] = [None] * len(inputs)
        for steps in sorted(set(micro_steps)):
            rows = [row for row, own in enumerate(micro_steps) if own == steps]
            finals = self.rollout(states[rows], steps, decoder).states
            for row, final in zip(rows, finals, strict=True):
                results[row] = self.task.result(final)
        return results

    def _mean(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the mean over members at encoded inputs that come in several parts."""
        totals = [torch.zeros(len(x), self.task.layout.bits, dtype=torch.float64) for x in parts]
        for stack in self._stacks():
            for total, x in zip(totals, parts, strict=True):
                # One after the other, so that the sum does not depend on which members came together.
                for output in predict(stack, x).cpu():
                    total += output
        return torch.cat(totals) / len(self)

    def _encode(self, states: Tensor) -> Tensor:
        matches = torch.from_numpy(self._matcher.matches(states.numpy()))
        return self._predictor.encode(matches).to(torch.float32)

    def _padded(self, x: Tensor) -> Tensor:
        missing = self._predictor.padding if x.shape[-1] == len(self.task.templates) else 0
        return functional.pad(x, (0, missing))

    def _stacks(self) -> Iterable[MLPStack]:
        """Return all members, which stay in memory, or bring them again, cohort by cohort."""
        return self._source.stacks() if self._resident is None else self._resident


class _Decoding(TensorStepper):
    """An ensemble with a decoder."""

    def __init__(self, ensemble: Ensemble, decoder: Decoder) -> None:
        self._ensemble, self._decoder = ensemble, decoder

    def step(self, batch: Bool[Tensor, "states bits"]) -> Step[Tensor]:
        """Predict, decode and compare one micro-step of every state."""
        return self._ensemble.step(batch, self._decoder)


class _MemberSource:
    """Members of a run: read where their weights were kept, drawn and trained again where they were not.

    Args:
        run: The run.
        members: Indices of the members, at least one.
        device: Where they are brought.
        on_progress: Called with the number of members that have just been brought.
    """

    def __init__(self, run: Run, members: Sequence[int], device: torch.device, on_progress: OnProgress) -> None:
        self.indices = list(members)
        self.device = device
        self._run = run
        self._on_progress = on_progress
        self._retrained = without_weights(run, members)
        if self._retrained and device.type != run.device.type:
            raise StoreError(
                f"{run.directory}: {len(self._retrained)} members have no kept weights and were trained on "
                f"{run.device.type}; on {device.type} they would be other ones"
            )
        recipe = run.experiment.recipe
        self._cohort = choose_cohort(recipe, _STATES_AT_ONCE, len(self._retrained), device) if self._retrained else 0

    def stacks(self) -> Iterator[MLPStack]:
        """Bring all members, some at a time."""
        left = set(self.indices)
        for path in self._run.store.weight_files():
            indices = self._run.store.members_of(path)
            rows = [row for row, index in enumerate(indices) if index in left]
            if rows:
                chosen = [indices[row] for row in rows]
                left.difference_update(chosen)
                yield self._brought(self._restore(path, rows, chosen))
        for start in range(0, len(self._retrained), self._cohort or 1):
            cohort = self._retrained[start : start + self._cohort]
            stack, _ = train_members(self._run.experiment.recipe, cohort, self.device)
            yield self._brought(stack)

    def _restore(self, path: Path, rows: list[int], indices: list[int]) -> MLPStack:
        stack = self._run.experiment.recipe.make_stack(indices, self.device, draw=False)
        width, templates, bits = *stack.hidden.shape[1:], stack.readout.shape[1]
        weights = self._run.store.load_weights(path, width=width, templates=templates, bits=bits)
        stack.load_state_dict({name: weights[name][rows] for name in ("hidden", "readout")})
        return stack.requires_grad_(False)

    def _brought(self, stack: MLPStack) -> MLPStack:
        if self.device.type == "cpu":
            # Stored by columns, so that the few that a state selects are contiguous.
            stack.hidden.data = stack.hidden.data.mT.contiguous().mT
        self._on_progress(len(stack))
        return stack


def converged_members(run: Run, count: int | None = None) -> list[int]:
    """Return the indices of a run's converged members.

    Args:
        run: The run.
        count: How many of them to return, from the first; by default all.

    Raises:
        StoreError: There are none, or fewer than ``count``.
    """
    results = run.statuses()
    found: list[int] = results.indices[results.converged].tolist()
    if count is not None and not 1 <= count <= len(found):
        raise StoreError(f"{run.directory}: {count} members: expected 1 to {len(found)}, as many have converged")
    if not found:
        raise StoreError(f"{run.directory}: has no converged member")
    return found[:count]


def without_weights(run: Run, members: Iterable[int]) -> list[int]:
    """Return those of a run's members whose weights were not kept, so that they have to be trained again."""
    kept = {index for path in run.store.weight_files() for index in run.store.members_of(path)}
    return [index for index in members if index not in kept]


def _resolve_device(run: Run, device: torch.device | str | None) -> torch.device:
    available = torch.cuda.is_available()
    if device is None:
        return run.device if available else torch.device("cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and not available:
        raise OptionError("device", str(device), "cpu, as PyTorch sees no GPU here")
    return chosen
