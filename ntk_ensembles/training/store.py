"""The run directory: what is in it, written atomically and checked when it is read (DESIGN §6).

- ``manifest.json``: the run's identity, that is everything that a member's numbers depend on.
- ``config.yaml``: the options, for ``--config`` and ``--resume``.
- ``checkpoints/members-A-B.safetensors``: the `Records` of a cohort; A and B are its first and last member.
- ``weights/members-A-B.safetensors``: their weights, where they are kept.

Files hold tensors and text only, so reading one never executes anything from it. Each carries the digest of
the identity and a checksum of its content: a file of another run, a truncated or a changed one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ntk_ensembles.ensemble import Recipe
from ntk_ensembles.files import write_atomically
from ntk_ensembles.tasks import EvaluationSet, Task, TemplateSet
from ntk_ensembles.training.records import Records

_MANIFEST = "manifest.json"

FORMAT = 1
"""Of everything in the directory; a later version that cannot read it raises it."""


class StoreError(ValueError):
    """A run directory, or a file in it, cannot be used; the message says which and what to do."""


def identity(
    task: Task[Any, Any], recipe: Recipe, evaluation: EvaluationSet, states: int, seed: int, device: torch.device
) -> dict[str, Any]:
    """Everything that the numbers of a member depend on, in plain values, by the names of the options.

    Args:
        task: the task.
        recipe: how members are made.
        evaluation: the states they are judged on.
        states: how many of these were asked for.
        seed: their seed.
        device: where members are trained; its type counts.
    """
    return {
        "format": FORMAT,
        "task": task.name,
        "task_options": task.options,
        "templates": _digest_templates(task.templates),
        "width": recipe.width,
        "init": recipe.init,
        "loss": recipe.loss,
        "precision": recipe.precision,
        "engine": recipe.engine,
        "seed": recipe.seed,
        "tolerance": recipe.descent.tolerance,
        "steps": recipe.descent.steps_max,
        "evaluation_states": states,
        "evaluation_seed": seed,
        "evaluation_digest": digest({"states": evaluation.states, "matches": evaluation.matches}),
        "device": device.type,
    }


def difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """The first thing in which two identities differ, in words; None if they do not."""
    for name in [*here, *(name for name in there if name not in here)]:
        ours, theirs = here.get(name), there.get(name)
        if ours == theirs:
            continue
        if name == "task_options" and isinstance(ours, dict) and isinstance(theirs, dict):
            return difference(ours, theirs)
        if name in ("templates", "evaluation_digest"):
            what = "templates" if name == "templates" else "evaluation states"
            return f"the task's {what} are not the same (has its code changed?)"
        if name == "device":
            return f"members are trained on {ours} here and on {theirs} there (--accelerator)"
        return f"--{name.replace('_', '-')} is {ours} here and {theirs} there"
    return None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and contents."""
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
        directory: where it is.
        manifest: the run's identity.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        # As JSON gives it back: tuples become lists.
        self.manifest: dict[str, Any] = json.loads(json.dumps(manifest))
        self._run = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        """Write the manifest, with which the run counts as begun.

        Raises:
            StoreError: another run is there.
            SaveError: it cannot be written.
        """
        if (self.directory / _MANIFEST).exists():
            raise StoreError(f"{self.directory}: holds a run already; expected a new or an empty directory")
        self.write_text(_MANIFEST, json.dumps(self.manifest, indent=2) + "\n")

    @classmethod
    def open(cls, directory: Path) -> RunStore:
        """A run that was begun.

        Raises:
            StoreError: no run is there, or one that this version cannot read.
        """
        path = directory / _MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version = int(manifest["format"])
        except FileNotFoundError:
            raise StoreError(f"{directory}: is no run directory (it has no {_MANIFEST})") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: is damaged ({error}); the run cannot be used without it") from None
        if version > FORMAT:
            raise StoreError(f"{path}: was written by a newer version (format {version}, this one reads {FORMAT})")
        return cls(directory, manifest)

    def save(self, records: Records, weights: Mapping[str, Tensor] | None = None) -> None:
        """Keep a cohort: its weights, if any, and then its records, with which it counts as finished.

        Raises:
            SaveError: the disk is full, or the place cannot be written; earlier cohorts are intact.
        """
        columns = {name: getattr(records, name) for name in Records.__dataclass_fields__}
        if weights is not None:
            self._save("weights", {"indices": records.indices, **weights})
        self._save("checkpoints", columns)

    def files(self) -> list[Path]:
        """The files of finished cohorts: weights first, then the records with which they count."""
        return [*self.weight_files(), *self._files("checkpoints")]

    def _files(self, folder: str) -> list[Path]:
        return sorted((self.directory / folder).glob("members-*.safetensors"))

    def load(self) -> list[Records]:
        """The records of every finished cohort.

        Raises:
            StoreError: a file that is damaged, of another run or of a newer version; nothing is guessed.
        """
        found = []
        for path in self._files("checkpoints"):
            tensors = self._load(path)
            try:
                found.append(Records(**{name: tensors[name] for name in Records.__dataclass_fields__}))
            except KeyError as error:
                raise StoreError(f"{path}: has no {error}; {_remedy(path)}") from None
        return found

    def weight_files(self) -> list[Path]:
        """The files of finished cohorts' kept weights."""
        finished = {path.name for path in self._files("checkpoints")}
        return [path for path in self._files("weights") if path.name in finished]

    def sweep(self) -> None:
        """Remove what a session that was killed has left half done; only for the process that holds the lock."""
        finished = {path.name for path in self._files("checkpoints")}
        left = [path for path in self._files("weights") if path.name not in finished]
        for folder in (".", "checkpoints", "weights", "figures"):
            left += (path for path in (self.directory / folder).glob(".*.*") if path.is_file())
        for path in left:
            path.unlink(missing_ok=True)

    def members_of(self, path: Path) -> list[int]:
        """Which members a file is about, without reading the rest of it.

        Raises:
            StoreError: it is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                indices: list[int] = file.get_tensor("indices").tolist()
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: is damaged ({error}); {_remedy(path)}") from None
        return indices

    def load_weights(self, path: Path) -> dict[str, Tensor]:
        """``indices``, ``hidden`` and ``readout`` as in `TwoLayerMLP`, with the members' axis in front.

        Raises:
            StoreError: as for `load`.
        """
        return self._load(path)

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the directory.

        Raises:
            SaveError: it cannot be written.
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
        if version.isdecimal() and int(version) > FORMAT:
            raise StoreError(f"{path}: was written by a newer version (format {version}, this one reads {FORMAT})")
        if metadata.get("run") != self._run:
            raise StoreError(f"{path}: belongs to another run; {_remedy(path)}")
        if metadata.get("sha256") != digest(tensors):
            raise StoreError(f"{path}: its checksum is wrong, so it has changed since it was written; {_remedy(path)}")
        return tensors


def _remedy(path: Path) -> str:
    when = "when their weights are wanted" if path.parent.name == "weights" else "on --resume"
    return f"move it away, and its members are trained again {when}"


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Keep other processes out of a directory while this one writes there.

    Raises:
        StoreError: another process is writing there.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (directory / ".lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"{directory}: another process is writing there; wait for it, or end it") from None
        yield
