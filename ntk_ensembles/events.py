"""TensorBoard's event files, written whole: TensorBoard's own writer has a thread that fails out of reach."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from ntk_ensembles.files import write_atomically


class EventFile:
    """One file of events, in place of those of an earlier session, and written when it is closed.

    Args:
        folder: Folder of the file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._content = io.BytesIO()
        self._records: Any = RecordWriter(self._content)
        self._write(file_version="brain.Event:2")

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add one point of a chart.

        Args:
            tag: Name of the chart.
            value: Height of the point.
            step: Place of the point.
        """
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def add_figure(self, tag: str, figure: Figure) -> None:
        """Add a picture.

        Args:
            tag: Name of the picture.
            figure: What it shows.
        """
        content = io.BytesIO()
        figure.savefig(content, dpi=100, format="png")
        width, height = (int(100 * inches) for inches in figure.get_size_inches())
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=content.getvalue())
        self._write(summary=Summary(value=[Summary.Value(tag=tag, image=image)]))

    def close(self) -> None:
        """Write the file.

        Raises:
            SaveError: It cannot be written.
        """
        earlier = list(self._folder.glob("*events.out.tfevents.*"))
        # TensorBoard takes any file with this in its name, and reads files of one folder in the order of their names.
        path = self._folder / f"events.out.tfevents.{time.time_ns()}"
        write_atomically(path, lambda part: part.write_bytes(self._content.getvalue()), follow=False)
        for file in earlier:
            file.unlink(missing_ok=True)

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
