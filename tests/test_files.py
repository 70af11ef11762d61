"""Files are whole or not there, and devices stay devices."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from ntk_ensembles.files import SaveError, options_text, read_options, write_atomically


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
    """Neither while the file is written nor when it is moved: who has opened the old one goes on to read it."""
    place = tmp_path / "deep" / "results.json"
    write_atomically(place, lambda part: part.write_text("first"))

    def slowly(part: Path) -> None:
        part.write_text("sec")
        assert place.read_text() == "first"
        part.write_text("second")
        assert place.read_text() == "first"

    with place.open() as reader:
        assert reader.read(2) == "fi"
        before = place.stat().st_ino
        write_atomically(place, slowly)
        assert reader.read() == "rst"
        # A file of its own, moved there as a whole, and not the old one written over.
        assert place.stat().st_ino != before
        reader.seek(0)
        assert reader.read() == "first"
    assert place.read_text() == "second"


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power failure could leave an empty file where a whole one was."""
    place = tmp_path / "results.json"
    write_atomically(place, lambda part: part.write_text("first"))
    synced: list[tuple[bytes, str]] = []
    sync = os.fsync

    def watched(handle: int) -> None:
        sync(handle)
        synced.append((os.pread(handle, 100, 0), place.read_text()))

    monkeypatch.setattr(os, "fsync", watched)
    write_atomically(place, lambda part: part.write_text("second"))
    assert synced == [(b"second", "first")]
    assert place.read_text() == "second"


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    """As a file that is simply opened for writing, and not as the private one that it was at first."""
    place = tmp_path / "results.json"
    write_atomically(place, lambda part: part.write_text("text"))
    assert place.stat().st_mode & 0o777 == 0o644


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


def test_options_are_plain_values_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "task: addition\ntolerance: 1e-06\nother: 1.5E+3\nevaluation_states: 3\nout: 1e\nflag: true\nlist: [1, a]\n"
    )
    assert read_options(path) == {
        "task": "addition",
        "tolerance": 1e-6,
        "other": 1500.0,
        "evaluation_states": 3,
        "out": "1e",
        "flag": True,
        "list": [1, "a"],
    }


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (LAUGHS, "has YAML anchors, aliases or tags"),
        ("a: &a [*a]", "has YAML anchors, aliases or tags"),
        ("a: !!python/object/apply:os.system [exit]", "has YAML anchors, aliases or tags"),
        ("a: " + "[" * 20_000 + "]" * 20_000, "is nested too deeply"),
        ("a: " + "[" * 20_000, "is nested too deeply"),
        ("# " + "x" * 2_000_000, "is larger than 64 KiB"),
        (bytes(range(256)), "can't decode"),
        ("a: b: c", "mapping values are not allowed"),
        ("a: 2001-99-99", "month must be in"),
        ("", "expected options by name"),
        ("- a", "expected options by name"),
        ("1: a", "expected options by name"),
    ],
)
def test_odd_files_of_options_are_refused_at_once(content: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started_at = time.monotonic()
    with pytest.raises(ValueError, match=r"x\.yaml: cannot be used: ") as error:
        read_options(path)
    assert says in str(error.value)
    assert time.monotonic() - started_at < 5


def test_what_is_no_file_of_options(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("pipe", "is no file"), (".", "is no file"), ("nope.yaml", "there is no such file")):
        with pytest.raises(ValueError, match=says):
            read_options(tmp_path / name)


def test_options_are_read_back_as_they_were(tmp_path: Path) -> None:
    values = {
        "a": "1e-6",
        "b": 1e-6,
        "c": 1e300,
        "d": "1.5",
        "e": [1, 2],
        "f": None,
        "g": True,
        "h": "true",
        "i": "=",
        "j": "\u2264",
    }
    path = tmp_path / "options.yaml"
    path.write_text(options_text(values), encoding="utf-8")
    found = read_options(path)
    assert found == values
    assert [type(value) for value in found.values()] == [type(value) for value in values.values()]


def test_a_file_takes_the_place_of_a_link_that_is_not_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("mine")
    link.symlink_to(target)
    write_atomically(link, lambda part: part.write_text("text"), follow=False)
    assert not link.is_symlink()
    assert (target.read_text(), link.read_text()) == ("mine", "text")
    os.mkfifo(tmp_path / "pipe")
    write_atomically(tmp_path / "pipe", lambda part: part.write_text("text"), follow=False)
    assert (tmp_path / "pipe").read_text() == "text"
