"""A trained ensemble, taken from its run directory: predict, execute, judge again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ntk_ensembles.ensemble import Members, choose_cohort
from ntk_ensembles.ensemble.cohort_training import free_memory
from ntk_ensembles.tasks import Task
from ntk_ensembles.templates import SparseMatcher
from ntk_ensembles.theory import Decoder, Rollout, Step, TensorStepper, rollout
from ntk_ensembles.theory.executor import decoded_step
from ntk_ensembles.training import Run, StoreError

_STATES_AT_ONCE = 1024
_MEMORY_SHARE = 0.5
"""Of the memory that is free when the ensemble is loaded, so much is taken by members at most."""


@dataclass(frozen=True)
class _Part:
    """Members that are brought into memory together.

    Attributes:
        indices: which.
        make: brings them.
    """

    indices: tuple[int, ...]
    make: Callable[[], Members]


class Ensemble(TensorStepper):
    """The mean over a run's converged members.

    Members come from kept weights or, where these were not kept, are redrawn and retrained from their seeds, to the
    same bits on the same machine. They stay in memory if they fit a budget; otherwise every prediction
    brings them again, cohort by cohort, with the same result.

    Attributes:
        origin: the run.
        members: the indices of the members whose mean this is.
    """

    def __init__(self, origin: Run, parts: Sequence[_Part], memory: int) -> None:
        self.origin = origin
        self.members = tuple(sorted(index for part in parts for index in part.indices))
        self._parts = parts
        self._predictor = origin.theory.predictor
        # A matrix product waits for all cores; where other programs run, that outlasts a step of a few states.
        self._lists = SparseMatcher(origin.task.templates)
        fits = len(self.members) * origin.recipe.member_bytes <= memory
        self._resident = [part.make() for part in parts] if fits else None

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        members: int | None = None,
        device: torch.device | str | None = None,
        memory: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Ensemble:
        """The ensemble of a run directory.

        Args:
            directory: of a run, finished or not.
            members: only the first so many converged members.
            device: where to predict; by default on the type that trained the members, or on the CPU if there is none.
            memory: bytes that members may take in order to stay; by default half of what is free.
            progress: told how many members have just been brought into memory.

        Raises:
            StoreError: no such run, a damaged one, one without converged members, or fewer than ``members``; or
                members to be retrained that another type of device has trained.
            ValueError: a GPU that is not there, or not even one member to be retrained fits.
        """
        run = Run.open(Path(directory))
        return cls.of(run, converged_members(run, members), device=device, memory=memory, progress=progress)

    @classmethod
    def of(
        cls,
        run: Run,
        members: Sequence[int],
        *,
        device: torch.device | str | None = None,
        memory: int | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Ensemble:
        """The ensemble of members of an open run.

        Args:
            run: whose they are.
            members: their indices, at least one; such as `converged_members`.
            device: as for `load`.
            memory: as for `load`.
            progress: as for `load`.

        Raises:
            StoreError: damaged weights, or members to be retrained that another type of device has trained.
            ValueError: as for `load`.
        """
        place = _place(run, device)
        parts = list(_kept(run, members, place, progress))
        retrained = without_weights(run, members)
        if retrained:
            if place.type != run.device.type:
                raise StoreError(
                    f"{run.store.directory}: {len(retrained)} members have no kept weights and were trained on "
                    f"{run.device.type}; on {place.type} they would be other ones"
                )
            size = choose_cohort(run.recipe, _STATES_AT_ONCE, len(retrained), place)
            parts += [
                _retraining(run, tuple(retrained[start : start + size]), place, progress)
                for start in range(0, len(retrained), size)
            ]
        return cls(run, parts, int(_MEMORY_SHARE * free_memory(place)) if memory is None else memory)

    @property
    def task(self) -> Task[Any, Any]:
        """What was learned."""
        return self.origin.task

    def member_predictions(
        self, states: Bool[Tensor, "states bits"]
    ) -> Iterator[tuple[tuple[int, ...], slice, Float[Tensor, "members some bits"]]]:
        """Every member's outputs, some members and some states at a time.

        Yields:
            Which members, which states, and their outputs, as a tensor of the CPU.

        Raises:
            ValueError: states of another number of bits.
        """
        bits = self.task.layout.bits
        if states.shape[1] != bits:
            raise ValueError(f"states of {states.shape[1]} bits: the task has {bits}")
        for indices, cohorts in self._in_memory():
            for start in range(0, len(states), _STATES_AT_ONCE):
                rows = slice(start, start + _STATES_AT_ONCE)
                matches = torch.from_numpy(self._lists.matches(states[rows].numpy()))
                inputs = self.task.templates.encode(matches)
                yield indices, rows, Members.predict_together(cohorts, inputs).cpu()

    def _in_memory(self) -> Iterator[tuple[tuple[int, ...], list[Members]]]:
        """All members at once if they stay in memory, otherwise a cohort after the other."""
        if self._resident is not None:
            yield tuple(index for part in self._parts for index in part.indices), self._resident
            return
        for part in self._parts:
            yield part.indices, [part.make()]

    def predict(self, states: Bool[Tensor, "states bits"]) -> Float64[Tensor, "states bits"]:
        """The mean over members of the outputs.

        Raises:
            ValueError: states of another number of bits.
        """
        total = torch.zeros(states.shape, dtype=torch.float64)
        for _, rows, outputs in self.member_predictions(states):
            # One after the other, so that the sum does not depend on which members came together.
            for output in outputs:
                total[rows] += output
        return total / len(self.members)

    def step(self, batch: Bool[Tensor, "states bits"], decoder: Decoder = "midpoint") -> Step[Tensor]:
        """Predict, decode and compare one micro-step of every state.

        Args:
            batch: States to predict from.
            decoder: How the mean is turned into bits.

        Raises:
            ValueError: The decoder is unknown, or states have another number of bits.
        """
        mean = self.predict(batch)
        num_matches, set_counts = map(torch.from_numpy, self._lists.match_and_count(batch.numpy()))
        return decoded_step(batch, mean, decoder, self._predictor, num_matches, set_counts)

    def rollout(self, states: Bool[Tensor, "states bits"], micro_steps: int, decoder: Decoder = "midpoint") -> Rollout:
        """Run a closed loop: each decoded mean is the next state.

        Raises:
            ValueError: ``micro_steps`` is negative, the decoder is unknown, or states have another number of bits.
        """
        return rollout(_Decoding(self, decoder), states, micro_steps)

    def execute(self, inputs: Sequence[Any], decoder: Decoder = "midpoint") -> list[Any]:
        """The ensemble's outputs for inputs of the task, such as pairs of numbers for addition.

        Raises:
            ValueError: an input that does not fit the task, or an unknown decoder.
        """
        if not inputs:
            return []
        states = torch.stack([self.task.initial_state(value) for value in inputs])
        micro_steps = [self.task.num_micro_steps(value) for value in inputs]
        results: list[Any] = [None] * len(inputs)
        for steps in sorted(set(micro_steps)):
            rows = [row for row, own in enumerate(micro_steps) if own == steps]
            finals = self.rollout(states[rows], steps, decoder).states
            for row, final in zip(rows, finals, strict=True):
                results[row] = self.task.result(final)
        return results


class _Decoding(TensorStepper):
    """An ensemble with a decoder."""

    def __init__(self, ensemble: Ensemble, decoder: Decoder) -> None:
        self._ensemble, self._decoder = ensemble, decoder

    def step(self, batch: Bool[Tensor, "states bits"]) -> Step[Tensor]:
        """Predict, decode and compare one micro-step of every state."""
        return self._ensemble.step(batch, self._decoder)


def converged_members(run: Run, count: int | None = None) -> list[int]:
    """The indices of a run's converged members, or of the first ``count`` of them.

    Raises:
        StoreError: there are none, or fewer than so many.
    """
    records = run.records()
    found: list[int] = records.indices[records.converged].tolist()
    if count is not None and not 1 <= count <= len(found):
        raise StoreError(f"{run.store.directory}: {count} members: expected 1 to {len(found)}, as many have converged")
    if not found:
        raise StoreError(f"{run.store.directory}: has no converged member")
    return found[:count]


def without_weights(run: Run, members: Iterable[int]) -> list[int]:
    """Those of a run's members whose weights it has not kept, so that they have to be trained again."""
    kept = {index for path in run.store.weight_files() for index in run.store.members_of(path)}
    return [index for index in members if index not in kept]


def _place(run: Run, device: torch.device | str | None) -> torch.device:
    """Where to predict."""
    available = torch.cuda.is_available()
    if device is None:
        return run.device if available else torch.device("cpu")
    place = torch.device(device)
    if place.type == "cuda" and not available:
        raise ValueError(f"device {device}: PyTorch sees no GPU here; expected cpu")
    return place


def _kept(run: Run, wanted: Iterable[int], device: torch.device, progress: Callable[[int], None]) -> Iterator[_Part]:
    """The members whose weights are in the run directory."""
    left = set(wanted)
    for path in run.store.weight_files():
        indices = run.store.members_of(path)
        rows = [row for row, index in enumerate(indices) if index in left]
        if rows:
            found = tuple(indices[row] for row in rows)
            left.difference_update(found)
            yield _restoring(run, path, rows, found, device, progress)


def _restoring(
    run: Run,
    path: Path,
    rows: list[int],
    indices: tuple[int, ...],
    device: torch.device,
    progress: Callable[[int], None],
) -> _Part:
    def make() -> Members:
        weights = run.store.load_weights(path)
        chosen = {name: weights[name][rows] for name in ("hidden", "readout")}
        members = Members.restore(run.recipe, indices, chosen, device)
        progress(len(indices))
        return members

    return _Part(indices, make)


def _retraining(run: Run, indices: tuple[int, ...], device: torch.device, progress: Callable[[int], None]) -> _Part:
    def make() -> Members:
        members = Members.train(run.recipe, indices, device)
        progress(len(indices))
        return members

    return _Part(indices, make)
