"""The run directory on disk: what is in it, written atomically and checked when it is read.

- ``manifest.json``: the run's fingerprint, that is everything that a member's numbers depend on.
- ``config.yaml``: the options, for ``--config`` and ``--resume``.
- ``checkpoints/members-A-B.safetensors``: the `MemberResults` of a cohort; A and B are its first and last member.
- ``weights/members-A-B.safetensors``: their weights, where they are kept: the `state_dict` of an `MLPStack`.

Files hold tensors and text only, so reading one never executes anything from it. Each carries the digest of
the fingerprint and a checksum of its content: a file of another run, a truncated or a changed one is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import filelock
import torch
from jaxtyping import Bool, Float, Float16, Float64, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ntk_ensembles.ensemble import MemberStatus, Recipe
from ntk_ensembles.files import write_atomically
from ntk_ensembles.tasks import EvaluationSet, Task
from ntk_ensembles.templates import TemplateSet

_MANIFEST = "manifest.json"

FORMAT = 2
"""Version of everything in the directory. Directories of another version are refused."""

STAGES = ("init", "train", "evaluate")
"""Timed stages of a cohort: the columns of `MemberResults.seconds`."""


class StoreError(ValueError):
    """A run directory, or a file in it, that cannot be used; the message says which and what to do."""


@dataclass(frozen=True, eq=False)
class MemberResults:
    """Results of a set of trained members; statistics for any ensemble size N follow from them without retraining.

    Deviations are kept in float16, 2 bytes for each member, state and bit (200 MB for 512 members, 1000 states
    of 200 bits); their rounding is at most 2⁻¹¹ of themselves.

    Attributes:
        indices: Indices of the members, each once.
        converged: Whether training reached its tolerance; the other members are never averaged in.
        steps: Steps taken.
        relative_loss: Last squared training error over the first.
        loss_counts: Number of ``losses`` that belong to each member.
        losses: Squared training error before each step and after the last, member after member.
        deviations: Outputs minus the NTK mean.
        seconds: Wall time of each of `STAGES`, a row for each cohort.
    """

    indices: Int64[Tensor, " members"]
    converged: Bool[Tensor, " members"]
    steps: Int64[Tensor, " members"]
    relative_loss: Float64[Tensor, " members"]
    loss_counts: Int64[Tensor, " members"]
    losses: Float64[Tensor, " losses"]
    deviations: Float16[Tensor, "members states bits"]
    seconds: Float64[Tensor, "cohorts stages"]

    def __len__(self) -> int:
        """Return the number of members."""
        return len(self.indices)

    @classmethod
    def from_cohort(
        cls,
        indices: Sequence[int],
        statuses: Sequence[MemberStatus],
        deviations: Float[Tensor, "members states bits"],
        seconds: Sequence[float],
    ) -> MemberResults:
        """Return the results of a cohort just trained.

        Args:
            indices: Indices of its members.
            statuses: How their training ended.
            deviations: Their outputs minus the NTK mean.
            seconds: Wall time of each of `STAGES`.
        """
        return cls(
            torch.tensor(indices, dtype=torch.int64),
            torch.tensor([status.converged for status in statuses], dtype=torch.bool),
            torch.tensor([status.steps for status in statuses], dtype=torch.int64),
            torch.tensor([status.relative_loss for status in statuses], dtype=torch.float64),
            torch.tensor([len(status.losses) for status in statuses], dtype=torch.int64),
            torch.tensor([loss for status in statuses for loss in status.losses], dtype=torch.float64),
            deviations.to(torch.float16),
            torch.tensor([seconds], dtype=torch.float64),
        )

    @classmethod
    def empty(cls, states: int, bits: int) -> MemberResults:
        """Return the results of no members.

        Args:
            states: Number of evaluation states.
            bits: Bits of a state.
        """
        none = cls.from_cohort([], [], torch.empty(0, states, bits), [0.0] * len(STAGES))
        return dataclasses.replace(none, seconds=none.seconds[:0])

    @classmethod
    def concatenate(cls, parts: Iterable[MemberResults]) -> MemberResults:
        """Return the results of the members of several parts, in the order of their indices.

        Raises:
            ValueError: No parts, or a member that is in two of them.
        """
        listed = list(parts)
        if not listed:
            raise ValueError("no results to put together")
        columns = {name: torch.cat([getattr(part, name) for part in listed]) for name in COLUMNS}
        order = columns["indices"].argsort()
        indices = columns["indices"][order]
        if (twice := indices[1:][indices[1:] == indices[:-1]]).numel():
            raise ValueError(f"member {int(twice[0])} is there twice")
        losses = torch.split(columns["losses"], columns["loss_counts"].tolist())
        columns["losses"] = torch.cat([losses[i] for i in order.tolist()]) if len(order) else columns["losses"]
        for name in ("indices", "converged", "steps", "relative_loss", "loss_counts"):
            columns[name] = columns[name][order]
        if not torch.equal(order, torch.arange(len(order))):
            columns["deviations"] = columns["deviations"][order]
        return cls(**columns)


COLUMNS = tuple(column.name for column in fields(MemberResults))
"""Names of the tensors in a file of `MemberResults`."""


def fingerprint(
    task: Task[Any, Any], recipe: Recipe, evaluation: EvaluationSet, states: int, seed: int, device_type: str
) -> dict[str, Any]:
    """Return everything that the numbers of a member depend on, in plain values, by the names of the options.

    Args:
        task: What is learned.
        recipe: How members are made.
        evaluation: States that they are evaluated on.
        states: Number of these that was asked for.
        seed: Seed of their draw.
        device_type: Kind of device that trains the members, "cpu" or "cuda".
    """
    return {
        "format": FORMAT,
        "task": task.name,
        "task_options": task.options,
        "templates": _digest_templates(task.templates),
        "width": recipe.width,
        "init": recipe.init,
        "loss": recipe.descent.loss,
        "precision": recipe.precision,
        "engine": recipe.descent.engine,
        "seed": recipe.seed,
        "tolerance": recipe.descent.tolerance,
        "steps": recipe.descent.steps_max,
        "evaluation_states": states,
        "evaluation_seed": seed,
        "evaluation_digest": digest({"states": evaluation.states, "matches": evaluation.matches}),
        "device": device_type,
    }


def first_difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """Return the first thing in which two fingerprints differ, in words; None if they are equal."""
    for name in [*here, *(name for name in there if name not in here)]:
        ours, theirs = here.get(name), there.get(name)
        if ours == theirs:
            continue
        if name == "task_options" and isinstance(ours, dict) and isinstance(theirs, dict):
            return first_difference(ours, theirs)
        if name in ("templates", "evaluation_digest"):
            what = "templates" if name == "templates" else "evaluation states"
            return f"the task's {what} are not the same (has its code changed?)"
        if name == "device":
            return f"members are trained on {ours} here and on {theirs} there"
        return f"{name} is {ours} here and {theirs} there"
    return None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors' names, types, shapes and contents."""
    summed = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        summed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            summed.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return summed.hexdigest()


def _digest_templates(templates: TemplateSet) -> str:
    rules = [[sorted(rule.ones), sorted(rule.zeros), sorted(rule.sets)] for rule in templates.templates]
    return hashlib.sha256(json.dumps([templates.layout.bits, rules]).encode()).hexdigest()


class RunStore:
    """The directory of one run.

    Attributes:
        directory: Its path.
        manifest: The run's fingerprint.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        # As JSON gives it back: tuples become lists.
        self.manifest: dict[str, Any] = json.loads(json.dumps(manifest))
        self._run = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        """Write the manifest, with which the run counts as begun.

        Raises:
            SaveError: It cannot be written.
        """
        self.write_text(_MANIFEST, json.dumps(self.manifest, indent=2) + "\n")

    @staticmethod
    def has_begun(directory: Path) -> bool:
        """Check whether a directory holds a run."""
        return (directory / _MANIFEST).exists()

    @classmethod
    def open(cls, directory: Path) -> RunStore:
        """Return the store of a run that was begun.

        Raises:
            StoreError: There is no run, or one that this version cannot read.
        """
        path = directory / _MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version = int(manifest["format"])
        except FileNotFoundError:
            raise StoreError(f"{directory}: is no run directory (it has no {_MANIFEST})") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: is damaged ({error}); the run cannot be used without it") from None
        if version != FORMAT:
            raise StoreError(f"{path}: was written by another version (format {version}, this one reads {FORMAT})")
        return cls(directory, manifest)

    def save(self, results: MemberResults, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a cohort: its weights, if any, and then its results, with which it counts as finished.

        Args:
            results: The members' results.
            weights: Their weights, as from `MLPStack.state_dict`; None to keep none.

        Raises:
            SaveError: The disk is full, or the directory cannot be written; earlier cohorts are intact.
        """
        columns = {name: getattr(results, name) for name in COLUMNS}
        if weights is not None:
            self._save("weights", {"indices": results.indices, **weights})
        self._save("checkpoints", columns)

    def files(self) -> list[Path]:
        """Return the files of finished cohorts: weights first, then the results with which they count."""
        return [*self.weight_files(), *self._files("checkpoints")]

    def _files(self, folder: str) -> list[Path]:
        return sorted((self.directory / folder).glob("members-*.safetensors"))

    def finished(self) -> set[int]:
        """Return the indices of all finished members, without reading their results.

        Raises:
            StoreError: A damaged file.
        """
        return {index for path in self._files("checkpoints") for index in self.members_of(path)}

    def load(self, states: int, bits: int) -> MemberResults:
        """Return the results of every finished member, in the order of their indices.

        Args:
            states: Number of evaluation states.
            bits: Bits of a state.

        Raises:
            StoreError: A file that is damaged, of another run or of another version, or two with a member in
                common; nothing is guessed.
        """
        found = [MemberResults.empty(states, bits)]
        for path in self._files("checkpoints"):
            tensors = self._load(path)
            try:
                found.append(MemberResults(**{name: tensors[name] for name in COLUMNS}))
            except KeyError as error:
                raise StoreError(f"{path}: has no {error}; {_remedy(path)}") from None
        try:
            return MemberResults.concatenate(found)
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"{self.directory}/checkpoints: {error}; move one of the files away") from None

    def weight_files(self) -> list[Path]:
        """Return the files of finished cohorts' kept weights."""
        finished = {path.name for path in self._files("checkpoints")}
        return [path for path in self._files("weights") if path.name in finished]

    def sweep(self) -> None:
        """Delete the incomplete files of a session that was killed. The caller must hold the lock."""
        finished = {path.name for path in self._files("checkpoints")}
        left = [path for path in self._files("weights") if path.name not in finished]
        for folder in (".", "checkpoints", "weights", "figures"):
            left += (path for path in (self.directory / folder).glob(".*.*") if path.is_file())
        for path in left:
            path.unlink(missing_ok=True)

    def members_of(self, path: Path) -> list[int]:
        """Return the indices of the members in a file, without reading the rest of it.

        Raises:
            StoreError: It is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                indices: list[int] = file.get_tensor("indices").tolist()
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: is damaged ({error}); {_remedy(path)}") from None
        return indices

    def load_weights(self, path: Path) -> dict[str, Tensor]:
        """Return ``indices``, and ``hidden`` and ``readout`` as in `MLPStack`, of a file of weights.

        Raises:
            StoreError: The file is damaged, of another run or of another version.
        """
        return self._load(path)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the directory.

        Raises:
            SaveError: It cannot be written.
        """
        write_atomically(self.directory / name, lambda part: part.write_text(text, encoding="utf-8"))

    def _save(self, folder: str, tensors: dict[str, Tensor]) -> None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"format": str(FORMAT), "run": self._run, "sha256": digest(tensors)}
        first, last = int(tensors["indices"][0]), int(tensors["indices"][-1])
        path = self.directory / folder / f"members-{first:06d}-{last:06d}.safetensors"
        write_atomically(path, lambda part: save_file(tensors, part, metadata))

    def _load(self, path: Path) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: is damaged ({error}); {_remedy(path)}") from None
        version = metadata.get("format", "")
        if version.isdecimal() and int(version) != FORMAT:
            raise StoreError(f"{path}: was written by another version (format {version}, this one reads {FORMAT})")
        if metadata.get("run") != self._run:
            raise StoreError(f"{path}: belongs to another run; {_remedy(path)}")
        if metadata.get("sha256") != digest(tensors):
            raise StoreError(f"{path}: its checksum is wrong, so it has changed since it was written; {_remedy(path)}")
        return tensors


def _remedy(path: Path) -> str:
    when = "when their weights are wanted" if path.parent.name == "weights" else "on --resume"
    return f"move it away, and its members are trained again {when}"


@contextmanager
def lock(directory: Path, name: str = ".lock") -> Iterator[None]:
    """Keep other processes out of a directory, or out of their part of it, while this one writes there.

    Args:
        directory: The directory, which exists.
        name: Name of the file that is locked.

    Raises:
        StoreError: Another process is writing there.
    """
    held = filelock.FileLock(directory / name, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        raise StoreError(f"{directory}: another process is writing there; wait for it, or end it") from None
    try:
        yield
    finally:
        held.release()


def wait_for_lock(directory: Path, name: str) -> None:
    """Wait until the process that holds a `lock` has released it or has died, and remove its file.

    Args:
        directory: The directory.
        name: Name of the file that is locked.
    """
    with filelock.FileLock(directory / name, poll_interval=0.1):
        (directory / name).unlink(missing_ok=True)
