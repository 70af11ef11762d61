"""Files that are written whole or not at all, and files that are read without trusting them."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

_OPTIONS_BYTES_MAX, _OPTIONS_DEPTH_MAX = 1 << 16, 20


class SaveError(Exception):
    """A file cannot be written; what was there before is intact."""


def write_atomically(path: Path, write: Callable[[Path], object], *, follow: bool = True) -> None:
    """Write a file beside its place and move it there, so that a reader sees all of it or nothing.

    Args:
        path: Place of the file.
        write: Function that writes it to the path that it is given.
        follow: Whether a link is followed, and a device or a pipe (``/dev/stdout``) written to. Pass False for a
            directory that somebody else may have made: there, the file takes the place of any of them.

    Raises:
        SaveError: The disk is full or the place cannot be written; what was there before is intact.
    """
    part: Path | None = None
    try:
        if follow and path.exists() and not path.is_file():
            write(path)
            return
        # What a link points to is what has to stay whole.
        place = path.resolve() if follow else path
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        os.close(handle)
        part = Path(name)
        write(part)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.chmod(0o644)
        part.replace(place)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise SaveError(f"{path}: cannot be written ({_reason(error)}); what was saved before is intact") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Return why a file cannot be read or written, in the system's words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    # What safetensors raises has the number only in its text.
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])).lower() if number else str(error)


def read_bytes(path: Path, bytes_max: int) -> bytes:
    """Return the content of a regular file, without waiting for a pipe or a device that stands in its place.

    Args:
        path: Path of the file; links are followed.
        bytes_max: Size that the file may have.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The file cannot be read.
        ValueError: The path leads to something else than a regular file, or to a larger one.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("is no file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(bytes_max + 1)
    finally:
        os.close(descriptor)
    if len(content) > bytes_max:
        raise ValueError(f"is larger than {bytes_max // 1024} KiB")
    return content


def read_options(path: Path) -> dict[str, Any]:
    """Read a YAML file of options by their Python names.

    A file that is large, deeply nested, or has aliases or tags is refused before anything is built from it: a few
    hundred bytes of aliases can take gigabytes.

    Args:
        path: File to read.

    Raises:
        ValueError: There is no such file, or it holds no options.
    """
    try:
        text = read_bytes(path, _OPTIONS_BYTES_MAX).decode("utf-8")
        if refusal := _refusal(yaml.parse(text, Loader=_OptionsLoader)):
            raise ValueError(refusal)
        options = yaml.load(text, Loader=_OptionsLoader)
        if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
            raise ValueError("expected options by name, such as 'width: 1024'")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({_reason(error)})") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be used: {error}") from None
    return options


def options_text(options: Mapping[str, Any]) -> str:
    """Return options as the YAML that `read_options` reads to the same values.

    Args:
        options: Plain values by name, as JSON has them.
    """
    return yaml.dump(dict(options), Dumper=_OptionsDumper, sort_keys=False)


class _OptionsLoader(yaml.SafeLoader):
    """Loader of plain values that reads ``1e-6`` as a number; to YAML 1.1 it is text without a point."""


class _OptionsDumper(yaml.SafeDumper):
    """Dumper that puts in quotes what `_OptionsLoader` would read as a number."""


for _kind in (_OptionsLoader, _OptionsDumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _refusal(events: Iterable[yaml.Event]) -> str | None:
    """Return what a YAML document has that no file of options needs, or None."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _OPTIONS_DEPTH_MAX:
            return "is nested too deeply"
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            return "has YAML anchors, aliases or tags; expected plain values"
    return None
