"""Files are whole or not there, and devices stay devices."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ntk_ensembles.files import SaveError, write_atomically


def test_what_fails_halfway_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "results.json"
    write_atomically(place, lambda part: part.write_text("first"))

    def halfway(part: Path) -> None:
        part.write_text("sec")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match=r"results\.json: cannot be written \(no space left on device\)"):
        write_atomically(place, halfway)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert place.read_text() == "first"


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "results.json"
    write_atomically(place, lambda part: part.write_text("first"))

    def slowly(part: Path) -> None:
        part.write_text("sec")
        assert place.read_text() == "first"
        part.write_text("second")

    write_atomically(place, slowly)
    assert place.read_text() == "second"


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_atomically(pipe, lambda part: part.write_text("line\n"))
    reader.join(timeout=10)
    assert read == ["line\n"]
    assert pipe.is_fifo()


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, lambda part: part.write_text("text"))
    assert link.is_symlink()
    assert target.read_text() == "text"

    def halfway(part: Path) -> None:
        part.write_text("te")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError):
        write_atomically(link, halfway)
    assert target.read_text() == "text"


def test_a_full_device_is_said(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(SaveError, match="no space left on device"):
        write_atomically(full, lambda part: part.write_text("text"))
