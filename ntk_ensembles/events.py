"""TensorBoard's event files, written whole: TensorBoard's own writer fails in a thread, where nobody can catch it."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntk_ensembles.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIX = ".ntk-ensembles"
"""Ends the names of these files, so that no other writer's are deleted."""


class EventFile:
    """What TensorBoard shows of one run: collected in memory, and written to one file as often as wanted.

    What is added under the tag and step of something earlier takes its place. So a curve that changes, or that is begun
    again, is never drawn twice. TensorBoard is imported when the file is written.

    Args:
        folder: Folder of the file; TensorBoard names the run by it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._points: dict[tuple[str, int], tuple[float, Any]] = {}

    def add_scalar(self, tag: str, value: float, global_step: int = 0) -> None:
        """Add one point of a chart.

        Args:
            tag: Name of the chart; those that share what stands before a "/" are shown together.
            value: Height of the point.
            global_step: Place of the point.
        """
        self.add_scalars({tag: value}, global_step)

    def add_scalars(self, values: Mapping[str, float], global_step: int = 0) -> None:
        """Add one point to each of several charts.

        Args:
            values: Heights of the points, by the names of the charts.
            global_step: Place of the points.
        """
        self._add(values, global_step)

    def add_figure(self, tag: str, figure: Figure, global_step: int = 0, dpi: int = 100) -> None:
        """Add a picture.

        Args:
            tag: Name of the picture.
            figure: What it shows.
            global_step: Place of the picture among those of its name.
            dpi: Pixels per inch.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        content = io.BytesIO()
        figure.savefig(content, dpi=dpi, format="png")
        png = content.getvalue()
        width, height = struct.unpack(">II", png[16:24])
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        self.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), global_step)

    def add_summary(self, summary: Any, global_step: int = 0) -> None:
        """Add anything else.

        Args:
            summary: What a function of `torch.utils.tensorboard.summary` returns.
            global_step: Place of it among those of its name.
        """
        self._add({value.tag: value for value in summary.value}, global_step)

    def write(self) -> None:
        """Write the file, in place of an earlier one.

        Raises:
            SaveError: It cannot be written; the earlier one is intact.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        content = io.BytesIO()
        records: Any = RecordWriter(content)
        now = time.time()
        # A TensorBoard that has read the earlier file forgets it at the start of a session.
        start = SessionLog(status=SessionLog.START)
        events = [Event(wall_time=now, file_version="brain.Event:2"), Event(wall_time=now, session_log=start)]
        # What was added together is one event: there are many, and each costs time.
        together: dict[tuple[int, float], list[Any]] = {}
        for (tag, step), (added_at, value) in self._points.items():
            shown = value if isinstance(value, Summary.Value) else Summary.Value(tag=tag, simple_value=value)
            together.setdefault((step, added_at), []).append(shown)
        for (step, added_at), values in sorted(together.items(), key=lambda item: item[0]):
            events.append(Event(wall_time=added_at, step=step, summary=Summary(value=values)))
        for event in events:
            records.write(event.SerializeToString())
        earlier = sorted(self._folder.glob(f"events.out.tfevents.*{_SUFFIX}"))
        # TensorBoard takes any file with this in its name, and reads files of one folder in the order of their names.
        path = self._folder / f"events.out.tfevents.{time.time_ns()}{_SUFFIX}"
        write_atomically(path, lambda part: part.write_bytes(content.getvalue()), follow=False)
        for file in earlier[:-1]:
            file.unlink(missing_ok=True)
        for file in earlier[-1:]:
            # A TensorBoard without its fast loader goes on to the next file only from one that is there.
            write_atomically(file, Path.touch, follow=False)

    def _add(self, content: Mapping[str, Any], step: int) -> None:
        now = time.time()
        self._points.update({(tag, step): (now, value) for tag, value in content.items()})
