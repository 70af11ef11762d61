"""The run directory on disk: what is in it, written atomically and checked when it is read.

- ``manifest.json``: the run's fingerprint, that is everything that a member's numbers depend on. It is written last:
  with it the directory is a run.
- ``task.safetensors``: state, templates and evaluation states of the task.
- ``config.yaml``: the options, for ``--config`` and ``--resume``.
- ``checkpoints/members-A-B.safetensors``: the `MemberResults` of members A to B. With the deviations of each they are
  a cohort. Otherwise they are an aligned group (`groups`) with the sum of its deviations; the files of two such groups
  that make up a larger one are joined.
- ``weights/members-A-B.safetensors``: weights of a cohort, where they are kept: the `state_dict` of an `MLPStack`.

Files hold tensors and text only, so reading one never executes anything from it. Each carries the digest of
the fingerprint and a checksum of its content: a file of another run, a truncated or a changed one is refused. Nothing
in it is trusted beyond that: types, shapes and ranges are checked before any of it is used (docs/checkpoints.md).
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
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

from ntk_ensembles.ensemble import MemberStatus
from ntk_ensembles.ensemble.network import MEMBER_MAX
from ntk_ensembles.files import read_bytes, write_atomically
from ntk_ensembles.runs.groups import OUTCOMES, Block, Measure, Outcomes, blocks_of, joined, sibling_of
from ntk_ensembles.templates import TemplateSet
from ntk_ensembles.theory import DECODERS

_MANIFEST, _TASK, _CONFIG = "manifest.json", "task.safetensors", "config.yaml"
_FOLDERS = ("checkpoints", "weights", "figures")
_BEGINNING = ".beginning"
"""File that marks a directory as this package's own while it is not yet a run."""
_MANIFEST_BYTES_MAX = 1 << 20
_ECHO_MAX = 100
"""Characters of a foreign value in a message."""
_HALF_WRITTEN = (
    r"\.tmp\w{6}|\.((members-.*|task)\.safetensors|config\.yaml|(manifest|results)\.json|.*\.png|\.beginning"
    r"|events\.out\.tfevents\..*)\.\w+"
)
"""Names of files that were being written: of `write_atomically`, and of what safetensors makes beside them."""

FORMAT = 5
"""Version of everything in the directory. Directories of another version are refused."""

STAGES = ("init", "train", "evaluate")
"""Timed stages of a cohort: the columns of `MemberResults.seconds`."""


class StoreError(ValueError):
    """A run directory, or a file in it, that cannot be used; the message says which and what to do."""


@dataclass(frozen=True, eq=False)
class MemberResults:
    """Results of a set of trained members; statistics follow from them without retraining.

    With deviations, those of ensembles of any size N follow. They are kept in float16, 2 bytes for each member, state
    and bit (200 MB for 512 members, 1000 states of 200 bits); their rounding is at most 2⁻¹¹ of themselves. Without
    them, those of N = 1, 2, 4, … and of all members follow from sums over aligned groups, to the same digits.

    Attributes:
        indices: Indices of the members, each once.
        converged: Whether training reached its tolerance; the other members are never averaged in.
        steps: Steps taken.
        relative_loss: Last squared training error over the first.
        loss_counts: Number of ``losses`` that belong to each member.
        losses: Squared training error before each step and after the last, member after member.
        seconds: Wall time of each of `STAGES`, a row for each cohort.
        deviations: Outputs minus the NTK mean; None where they have not been kept, or not of every member.
        blocks: The members as sums over aligned groups; empty where deviations are there.
    """

    indices: Int64[Tensor, " members"]
    converged: Bool[Tensor, " members"]
    steps: Int64[Tensor, " members"]
    relative_loss: Float64[Tensor, " members"]
    loss_counts: Int64[Tensor, " members"]
    losses: Float64[Tensor, " losses"]
    seconds: Float64[Tensor, "cohorts stages"]
    deviations: Float16[Tensor, "members states bits"] | None = None
    blocks: tuple[Block, ...] = ()

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
            torch.tensor([seconds], dtype=torch.float64),
            deviations.to(torch.float16),
        )

    def summed(self, measure: Measure) -> MemberResults:
        """Return the same with sums over aligned groups in place of deviations.

        Args:
            measure: What decodes the means of groups.
        """
        if self.deviations is None:
            return self
        blocks = blocks_of(measure, self.indices, self.converged, self.deviations)
        return dataclasses.replace(self, deviations=None, blocks=tuple(blocks))

    def statuses(self) -> MemberResults:
        """Return the same without deviations and sums: how training went."""
        return dataclasses.replace(self, deviations=None, blocks=())

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

        There are deviations if every part has them. Sums are not joined.

        Raises:
            ValueError: No parts, or a member that is in two of them.
        """
        # Most often in order then, and nothing has to be moved.
        listed = sorted(parts, key=lambda part: part.indices[:1].tolist())
        if not listed:
            raise ValueError("no results to put together")
        columns = {name: torch.cat([getattr(part, name) for part in listed]) for name in STATUS_COLUMNS}
        order = columns["indices"].argsort()
        indices = columns["indices"][order]
        if (twice := indices[1:][indices[1:] == indices[:-1]]).numel():
            raise ValueError(f"member {int(twice[0])} is there twice")
        deviations = [part.deviations for part in listed if part.deviations is not None]
        kept = torch.cat(deviations) if len(deviations) == len(listed) else None
        if not torch.equal(order, torch.arange(len(order))):
            losses = torch.split(columns["losses"], columns["loss_counts"].tolist())
            columns["losses"] = torch.cat([losses[i] for i in order.tolist()])
            for name in ("indices", "converged", "steps", "relative_loss", "loss_counts"):
                columns[name] = columns[name][order]
            kept = None if kept is None else kept[order]
        return cls(**columns, deviations=kept, blocks=tuple(block for part in listed for block in part.blocks))


STATUS_COLUMNS = tuple(column.name for column in fields(MemberResults))[:-2]
"""Names of the tensors of `MemberResults` that say how training went."""

Schema = Mapping[str, str]
"""Type and axes of every tensor of a file. An axis is a number, or a name that is the same number everywhere."""

_STATUS_SCHEMA: Schema = {
    "indices": "I64 members",
    "converged": "BOOL members",
    "steps": "I64 members",
    "relative_loss": "F64 members",
    "loss_counts": "I64 members",
    "losses": "F64 losses",
    "seconds": f"F64 cohorts {len(STAGES)}",
}
_DEVIATIONS_SCHEMA: Schema = {**_STATUS_SCHEMA, "deviations": "F16 members states bits"}
_SUMS_SCHEMA: Schema = {
    **_STATUS_SCHEMA,
    "sums": "I64 states bits",
    "states_right": f"I64 groups {len(DECODERS)}",
    "bits_right": f"I64 groups {len(DECODERS)}",
    "executions_right": f"I64 groups {len(DECODERS)}",
    "mean_square": "F64 groups",
}
_TASK_SCHEMA: Schema = {
    "ones": "I64 ones 2",
    "zeros": "I64 zeros 2",
    "sets": "I64 sets 2",
    "states": "BOOL states bits",
    "trajectory_states": "I64 steps",
    "trajectory_lengths": "I64 trajectories",
}


def first_difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """Return the first thing in which two fingerprints differ, in words; None if they are equal."""
    for name in [*here, *(name for name in there if name not in here)]:
        ours, theirs = here.get(name), there.get(name)
        # As JSON, in which neither true nor 1.0 is 1.
        if json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True):
            continue
        if name == "task_options" and isinstance(ours, dict) and isinstance(theirs, dict):
            return first_difference(ours, theirs)
        if name in ("templates", "evaluation_digest"):
            what = "templates" if name == "templates" else "evaluation states"
            return f"the task's {what} are not the same (has its code changed?)"
        if name == "device":
            return f"members are trained on {ours} here and on {theirs} there"
        return f"{_echo(name)} is {_echo(ours)} here and {_echo(theirs)} there"
    return None


def _echo(value: object) -> str:
    text = str(value)
    return text if len(text) <= _ECHO_MAX else f"{text[:_ECHO_MAX]}…"


def digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of tensors' names, types, shapes and contents, and of the texts beside them, if any."""
    summed = hashlib.sha256("".join(f"{name} {text}\n" for name, text in sorted((texts or {}).items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        summed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            summed.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return summed.hexdigest()


def digest_templates(templates: TemplateSet) -> str:
    """Return the SHA-256 of what templates require and set, whatever they are called."""
    rules = [[sorted(rule.ones), sorted(rule.zeros), sorted(rule.sets)] for rule in templates.templates]
    return hashlib.sha256(json.dumps([templates.layout.bits, rules]).encode()).hexdigest()


class RunStore:
    """The directory of one run.

    Attributes:
        directory: Its path.
        manifest: The run's fingerprint.

    Raises:
        ValueError: The fingerprint has values that JSON cannot hold.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.directory = directory
        # As JSON gives it back: tuples become lists.
        self.manifest: dict[str, Any] = json.loads(plain(manifest))
        self._run = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def has_begun(directory: Path) -> bool:
        """Check whether a directory holds a run."""
        return (directory / _MANIFEST).exists()

    @staticmethod
    def is_free(directory: Path) -> bool:
        """Check whether a directory can become a run: it is empty, or holds what a killed beginning has left."""
        left = (_TASK, _CONFIG, *_FOLDERS, "results.json") if (directory / _BEGINNING).exists() else ()
        return all(path.name.startswith(".") or path.name in left for path in directory.iterdir())

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Make a free directory a run when the block has ended; until then it is none, and nothing is left if it fails.

        The caller must hold the lock.

        Raises:
            StoreError: Another process has begun a run there meanwhile.
            SaveError: The directory cannot be written.
        """
        if self.has_begun(self.directory) or not self.is_free(self.directory):
            raise StoreError(f"{self.directory}: another process has written there meanwhile")
        marker = self.directory / _BEGINNING
        write_atomically(marker, Path.touch, follow=False)
        try:
            self._clear()
            yield
            self.write_text(_MANIFEST, json.dumps(self.manifest, indent=2) + "\n")
        except BaseException:
            # A signal may come between the last step and its end.
            if not self.has_begun(self.directory):
                self._clear()
                marker.unlink(missing_ok=True)
            raise
        marker.unlink(missing_ok=True)

    def _clear(self) -> None:
        """Delete what a beginning writes."""
        for name in (_TASK, _CONFIG, "results.json"):
            (self.directory / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(self.directory / name, ignore_errors=True)
        self._sweep_half_written()

    @classmethod
    def open(cls, directory: Path) -> RunStore:
        """Return the store of a run that was begun.

        Raises:
            StoreError: There is no run, or one that this version cannot read.
        """
        path = directory / _MANIFEST
        try:
            manifest = json.loads(read_bytes(path, _MANIFEST_BYTES_MAX), parse_constant=_refuse_constant)
            version = manifest["format"]
            if type(version) is not int:
                raise ValueError("the format is no number")
            if version == FORMAT:
                check_manifest(manifest)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreError(f"{directory}: is no run directory (it has no {_MANIFEST})") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StoreError(f"{path}: is damaged ({error}); the run cannot be used without it") from None
        if version != FORMAT:
            raise StoreError(f"{path}: was written by another version (format {version}, this one reads {FORMAT})")
        return cls(directory, manifest)

    def save_task(self, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
        """Write a task as data, as `to_data` returns it.

        Raises:
            SaveError: The directory cannot be written.
        """
        self._save(self.directory / _TASK, tensors, texts)

    def load_task(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the task as data, for `from_data`.

        Raises:
            StoreError: It is not there, damaged, or another run's.
        """
        return self._load(self.directory / _TASK, _TASK_SCHEMA, {})

    def save(self, results: MemberResults, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a cohort: its weights, if any, and then its results, with which it counts as finished.

        Args:
            results: The members' results.
            weights: Their weights, as from `MLPStack.state_dict`; None to keep none.

        Raises:
            SaveError: The disk is full, or the directory cannot be written; earlier cohorts are intact.
        """
        name = _name_of(int(results.indices[0]), len(results))
        if weights is not None:
            self._save(self.directory / "weights" / name, {"indices": results.indices, **weights})
        tensors = {column: getattr(results, column) for column in STATUS_COLUMNS}
        if results.deviations is not None:
            tensors["deviations"] = results.deviations
        else:
            (block,) = results.blocks
            tensors |= {"sums": block.sums} | {column: getattr(block.outcomes, column) for column in OUTCOMES}
        self._save(self.directory / "checkpoints" / name, tensors)

    def join(self, first: int, members: int, measure: Measure) -> None:
        """Join the file of an aligned group that was just saved with those of its neighbours, as far as they are there.

        Processes may do so side by side: they would write the same, and a file that has gone was joined by another.

        Args:
            first: First member of the group.
            members: Number of its members.
            measure: What decodes the means of groups.

        Raises:
            SaveError: The disk is full, or the directory cannot be written; what was finished is intact.
            StoreError: A damaged file.
        """
        while True:
            other = sibling_of(first, members)[0]
            paths = [self.directory / "checkpoints" / _name_of(index, members) for index in sorted((first, other))]
            if not all(path.exists() for path in paths):
                return
            try:
                if not all(self._has(path, "sums") for path in paths):
                    return
                parts = [self.load_file(path, *measure.limit.mean.shape) for path in paths]
            except StoreError:
                if all(path.exists() for path in paths):
                    raise
                return
            both = MemberResults.concatenate(parts)
            self.save(dataclasses.replace(both, blocks=tuple(joined(measure, both.blocks))))
            for path in paths:
                path.unlink(missing_ok=True)
            first, members = min(first, other), 2 * members

    def join_all(self, measure: Measure) -> None:
        """Join the files of all aligned groups that make up larger ones, as `join` does.

        Args:
            measure: What decodes the means of groups.

        Raises:
            SaveError: The disk is full, or the directory cannot be written; what was finished is intact.
            StoreError: A damaged file.
        """
        for path in self.result_files():
            members = _members_named(path)
            # Those that have been joined meanwhile are not there.
            self.join(members[0], len(members), measure)

    def files(self) -> list[Path]:
        """Return the files of finished members: weights first, then the results with which they count."""
        return [*self.weight_files(), *self.result_files()]

    def _files(self, folder: str) -> list[Path]:
        path = self.directory / folder
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path}: is no folder; the run cannot be used without it")
        return sorted(path.glob("members-*.safetensors"))

    def result_files(self) -> list[Path]:
        """Return the files of finished members' results, but those that have been joined and were not yet deleted."""
        files = self._files("checkpoints")
        named = _Named(files)
        return [path for path in files if not named.cover(path, properly=True)]

    def finished(self) -> set[int]:
        """Return the indices of all finished members, without reading their results.

        Raises:
            StoreError: A damaged file.
        """
        return {index for path in self.result_files() for index in self.members_of(path)}

    @property
    def has_deviations(self) -> bool:
        """Whether the deviations of every finished member are kept, as far as names of tensors say.

        Raises:
            StoreError: A damaged file.
        """
        return not any(self._has(path, "sums") for path in self.result_files())

    def parts(self, states: int, bits: int) -> Iterator[MemberResults]:
        """Yield the results of every finished member, file by file.

        Args:
            states: Number of evaluation states.
            bits: Bits of a state.

        Raises:
            StoreError: A file that is damaged, of another run or of another version; nothing is guessed.
        """
        for path in self.result_files():
            yield self.load_file(path, states, bits)

    def together(self, parts: Iterable[MemberResults]) -> MemberResults:
        """Return the results of several files, as from `parts`, in the order of the members' indices.

        Raises:
            StoreError: Two of them have a member in common.
        """
        try:
            return MemberResults.concatenate(parts)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"{self.directory}/checkpoints: {error}; move one of the files away") from None

    def _has(self, path: Path, name: str) -> bool:
        with _opened(path, {}, {}) as file:
            return name in file.keys()  # noqa: SIM118 (a file is no dictionary)

    def load_file(self, path: Path, states: int, bits: int) -> MemberResults:
        """Return the results in one of `result_files`, once they are as this run has written them.

        Args:
            path: The file.
            states: Number of evaluation states.
            bits: Bits of a state.

        Raises:
            StoreError: The file is damaged, of another run or of another version.
        """
        sizes, has_sums = {"states": states, "bits": bits}, self._has(path, "sums")
        tensors, _ = self._load(path, _SUMS_SCHEMA if has_sums else _DEVIATIONS_SCHEMA, sizes)
        columns: dict[str, Any] = {name: tensors[name] for name in STATUS_COLUMNS}
        results = MemberResults(**columns, deviations=tensors.get("deviations"))
        fault = _fault_of(path, results)
        if fault is None and has_sums:
            outcomes = Outcomes(*(tensors[name] for name in OUTCOMES))
            block = Block(int(results.indices[0]), results.converged, tensors["sums"], outcomes)
            results, fault = dataclasses.replace(results, blocks=(block,)), _fault_of_block(block)
        if fault:
            raise StoreError(f"{path}: is damaged ({fault}); {_remedy(path)}")
        return results

    def weight_files(self) -> list[Path]:
        """Return the files of finished cohorts' kept weights."""
        named = _Named(self.result_files())
        return [path for path in self._files("weights") if named.cover(path)]

    def sweep(self) -> None:
        """Delete the incomplete files of a session that was killed. The caller must hold the lock.

        Raises:
            StoreError: The directory is damaged; nothing has been deleted.
        """
        used = {*self.files()}
        for path in (*self._files("weights"), *self._files("checkpoints")):
            if path not in used and path.is_file():
                path.unlink(missing_ok=True)
        (self.directory / _BEGINNING).unlink(missing_ok=True)
        self._sweep_half_written()

    def _sweep_half_written(self) -> None:
        for folder in (".", *_FOLDERS):
            for path in (self.directory / folder).glob(".*"):
                if re.fullmatch(_HALF_WRITTEN, path.name) and path.is_file():
                    path.unlink(missing_ok=True)

    def members_of(self, path: Path) -> list[int]:
        """Return the indices of the members in a file, without reading the rest of it.

        Raises:
            StoreError: It is damaged.
        """
        with _opened(path, {"indices": "I64 members"}, {}) as file:
            indices = file.get_tensor("indices")
        if fault := _fault_of_indices(path, indices):
            raise StoreError(f"{path}: is damaged ({fault}); {_remedy(path)}")
        members: list[int] = indices.tolist()
        return members

    def load_weights(self, path: Path, **sizes: int) -> dict[str, Tensor]:
        """Return ``indices``, and ``hidden`` and ``readout`` as in `MLPStack`, of a file of weights.

        Args:
            path: File to read.
            **sizes: Width, templates and bits that the members must have; by default whatever they have.

        Raises:
            StoreError: The file is damaged, of another run or of another version.
        """
        kind = "F64" if self.manifest["precision"] == "64-true" else "F32"
        shapes = {"hidden": "members width templates", "readout": "members bits width"}
        schema = {"indices": "I64 members", **{name: f"{kind} {axes}" for name, axes in shapes.items()}}
        return self._load(path, schema, sizes)[0]

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the directory.

        Raises:
            SaveError: It cannot be written.
        """
        write_atomically(self.directory / name, lambda part: part.write_text(text, encoding="utf-8"), follow=False)

    def _save(self, path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> None:
        held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"format": str(FORMAT), "run": self._run, "sha256": digest(held, texts), **(texts or {})}
        write_atomically(path, lambda part: save_file(held, part, metadata), follow=False)

    def _load(self, path: Path, schema: Schema, sizes: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors of a schema and the texts beside them, once everything is as this run has written it."""
        with _opened(path, schema, sizes) as file:
            metadata = file.metadata() or {}
            if metadata.get("run") != self._run:
                raise StoreError(f"{path}: belongs to another run; {_remedy(path)}")
            tensors = {name: file.get_tensor(name) for name in schema}
        texts = {name: text for name, text in metadata.items() if name not in ("format", "run", "sha256")}
        if metadata.get("sha256") != digest(tensors, texts):
            raise StoreError(f"{path}: its checksum is wrong, so it has changed since it was written; {_remedy(path)}")
        return tensors, texts


def plain(values: Mapping[str, Any]) -> str:
    """Return values as JSON.

    Raises:
        ValueError: There is one that JSON cannot hold.
    """
    try:
        return json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"options are kept as JSON, which cannot hold one of {_echo(values)}: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Check what is used of a manifest before it is compared with the run's options and data.

    Raises:
        ValueError: It cannot be a run's.
    """
    plain(manifest)
    name, options = manifest["task"], manifest["task_options"]
    if not (isinstance(name, str) and 0 < len(name) <= _ECHO_MAX and name.isprintable()):
        raise ValueError(f"the task's name cannot be used: expected up to {_ECHO_MAX} printable characters")
    if not isinstance(options, dict):
        raise ValueError("the task's options have no names")
    if manifest["device"] not in ("cpu", "cuda"):
        raise ValueError("the device is none of cpu, cuda")


@contextmanager
def _opened(path: Path, schema: Schema, sizes: Mapping[str, int]) -> Iterator[Any]:
    """Open a file of tensors whose types and shapes are those of a schema; it may have others beside them.

    Args:
        path: File to open.
        schema: Types and axes.
        sizes: Axes whose numbers are known.

    Raises:
        StoreError: The file is damaged, or of another version.
    """
    try:
        if not path.is_file():
            raise ValueError("is no file" if path.exists() else "is not there")
        with safe_open(path, framework="pt") as file:
            version = (file.metadata() or {}).get("format", "")
            if version.isdecimal() and version != str(FORMAT):
                raise StoreError(
                    f"{path}: was written by another version (format {version[:9]}, this one reads {FORMAT})"
                )
            found = dict(sizes)
            for name, expected in schema.items():
                tensor = file.get_slice(name)
                kind, *axes = expected.split()
                shape = tensor.get_shape()
                wanted = [
                    int(axis) if axis.isdecimal() else found.get(axis, size)
                    for axis, size in zip(axes, shape, strict=False)
                ]
                if tensor.get_dtype() != kind or len(shape) != len(axes) or shape != wanted:
                    raise ValueError(f"{name} is {tensor.get_dtype()} {shape}, expected {expected}")
                found |= zip(axes, shape, strict=True)
            yield file
    except StoreError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(f"{path}: is damaged ({error}); {_remedy(path)}") from None


def _fault_of_indices(path: Path, indices: Tensor) -> str | None:
    """Return what is wrong with the indices of the members in a file, or None."""
    if not len(indices):
        return "has no members"
    first, last = int(indices[0]), int(indices[-1])
    if not torch.equal(indices, first + torch.arange(len(indices))) or first < 0 or last > MEMBER_MAX:
        return f"its members are not consecutive ones from 0 to {MEMBER_MAX}"
    if path.name != _name_of(first, len(indices)):
        return f"its members are {first} to {last}"
    return None


def _fault_of(path: Path, results: MemberResults) -> str | None:
    """Return what is wrong with results of the right types and shapes, or None."""
    if fault := _fault_of_indices(path, results.indices):
        return fault
    counts, kept = results.loss_counts, results.converged
    if int(kept.view(torch.uint8).max()) > 1:
        return "converged is neither true nor false"
    if bool((results.steps < 0).any()) or not bool((results.seconds >= 0).all() & results.seconds.isfinite().all()):
        return "steps or seconds are below 0 or no numbers"
    if (
        bool((counts < 0).any())
        or bool((counts > len(results.losses)).any())
        or int(counts.sum()) != len(results.losses)
    ):
        return "its loss_counts do not add up to its losses"
    numbers = results.relative_loss[kept].isfinite().all()
    if results.deviations is not None:
        numbers &= results.deviations[kept].isfinite().all()
    if not bool(numbers):
        return "members that have converged have losses or deviations that are no numbers"
    return None


def _fault_of_block(block: Block) -> str | None:
    """Return what is wrong with a block's sums, or None."""
    members, outcomes, numbers = len(block), block.outcomes, block.sums.numel()
    if members & (members - 1) or block.first % members:
        return "its members are no aligned group"
    if len(outcomes) != 2 * members - 1:
        return f"has outcomes of {len(outcomes)} groups, expected {2 * members - 1}"
    counts = torch.cat([getattr(outcomes, name) for name in OUTCOMES[:-1]])
    if int(counts.min()) < 0 or int(counts.max()) > numbers or bool((outcomes.states_right > len(block.sums)).any()):
        return "its counts lie outside what can be right"
    if not bool((outcomes.mean_square >= 0).all() & outcomes.mean_square.isfinite().all()):
        return "its mean squares are below 0 or no numbers"
    # A member's deviations are numbers of 16 bits.
    if max(int(block.sums.max()), -int(block.sums.min())) > members << 40:
        return "its sums are larger than those of as many members can be"
    return None


def _name_of(first: int, members: int) -> str:
    return f"members-{first:06d}-{first + members - 1:06d}.safetensors"


def _members_named(path: Path) -> range:
    """Return the members that the name of a file says it holds, none if it is no such name."""
    found = re.fullmatch(r"members-(\d{6,10})-(\d{6,10})\.safetensors", path.name)
    return range(int(found[1]), int(found[2]) + 1) if found else range(0)


class _Named:
    """Ranges of members that names of files say they hold.

    Args:
        files: The files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        ranges = sorted((held for held in map(_members_named, files) if held), key=lambda held: (held[0], -len(held)))
        self._keys = [(held[0], -len(held)) for held in ranges]
        self._ends = list(itertools.accumulate((held[-1] for held in ranges), max))

    def cover(self, path: Path, *, properly: bool = False) -> bool:
        """Check whether one of them holds all members of a file; ``properly``: and more."""
        members = _members_named(path)
        if not members:
            return False
        find = bisect.bisect_left if properly else bisect.bisect_right
        before = find(self._keys, (members[0], -len(members)))
        return before > 0 and self._ends[before - 1] >= members[-1]


def _remedy(path: Path) -> str:
    if path.name == _TASK:
        return "the run cannot be used without it"
    when = "when their weights are wanted" if path.parent.name == "weights" else "on --resume"
    return f"move it away, and its members are trained again {when}"


@contextmanager
def lock(directory: Path, name: str = ".lock") -> Iterator[None]:
    """Keep other processes out of a directory, or out of their part of it, while this one writes there.

    Args:
        directory: The directory, which exists.
        name: Name of the file that is locked.

    Raises:
        StoreError: Another process is writing there, or the directory cannot be locked.
    """
    held = filelock.FileLock(_lock_path(directory, name), timeout=0)
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

    Raises:
        StoreError: The directory cannot be locked.
    """
    path = _lock_path(directory, name)
    with filelock.FileLock(path).acquire(poll_interval=0.1):
        path.unlink(missing_ok=True)


def _lock_path(directory: Path, name: str) -> Path:
    """Return the path of a lock, unless what stands there cannot be one."""
    path = directory / name
    # A link could lead to any file, and a pipe would have to be waited for.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise StoreError(f"{path}: is no file; move it away")
    return path
