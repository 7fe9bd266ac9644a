"""TensorBoard: event files in the run folder, written without torch."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from preceptor.trackers.sink import TrackedRun, table_of

_STRING = 7  # DT_STRING


class TensorBoardSink:
    tracker_id: str | None = None
    last_step: int | None = None

    def __init__(self, run: TrackedRun) -> None:
        folder = run.folder / "tensorboard"
        self.where = f"tensorboard --logdir {folder}"
        self._writer = EventFileWriter(str(folder))
        if run.next_step > 0:  # what a killed process wrote beyond this step is dropped by TensorBoard
            self._add(run.next_step, session_log=SessionLog(status=SessionLog.START))
        self._text(0, "config", "\n".join(f"    {key}: {value}" for key, value in run.config.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=Summary(value=found))

    def samples(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        columns, rows = table_of(lines)
        parts = [
            "\n".join(f"**{name}**\n\n{_quoted(cell)}\n" for name, cell in zip(columns, row, strict=True))
            for row in rows
        ]
        self._text(step, "samples", "\n---\n".join(parts))

    def attach(self, files: Sequence[Path]) -> None:
        """TensorBoard takes no files; it shows where they are."""
        self._text(0, "files", "\n".join(f"    {file}" for file in files))

    def close(self, finished: bool) -> None:
        self._writer.close()

    def _text(self, step: int, tag: str, text: str) -> None:
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=_STRING, string_val=[text.encode()], tensor_shape=shape)
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=metadata, tensor=tensor)
        self._add(step, summary=Summary(value=[value]))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(Event(step=step, wall_time=time.time(), **content))


def _quoted(text: str) -> str:
    """As Markdown shows it letter for letter."""
    return "\n".join(f"    {line}" for line in text.splitlines())
