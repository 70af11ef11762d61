"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


class SaveError(Exception):
    """A file cannot be written; what was there before is intact."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there, so that a reader sees all of it or nothing.

    A link is followed; a device or a pipe (``/dev/stdout``) is not replaced by a file but written to.

    Raises:
        SaveError: the disk is full or the place cannot be written; what was there before is intact.
    """
    part: Path | None = None
    try:
        if path.exists() and not path.is_file():
            write(path)
            return
        # What a link points to is what has to stay whole.
        place = path.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
        os.close(handle)
        part = Path(name)
        write(part)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        part.chmod(0o644)
        part.replace(place)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{path}: cannot be written ({_reason(error)}); what was saved before is intact") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Why a file cannot be written, in the system's words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    # What safetensors raises has the number only in its text.
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number[1])).lower() if number else str(error)
