"""Writes the values of metrics.jsonl to a TensorBoard event file, which is complete after every record.

Records are written one by one: torch's SummaryWriter, which accelerate's TensorBoardTracker uses, has a thread to wait
for at the end and puts the host name into the file name, and that tracker refuses the nested tables of a recipe.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any


class TensorBoardTracker:
    """The event file of one run, or of one part of a run that was resumed."""

    def __init__(self, folder: Path, start_step: int, config: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        num_parts = len(list(folder.glob("events.out.tfevents.*")))
        # TensorBoard reads the files of a folder in the order of their names
        name = f"events.out.tfevents.{int(time.time()):010d}.{num_parts:04d}.qlora_dpo"
        self.writer: Any = RecordWriter((folder / name).open("xb"))
        self._write(Event(file_version="brain.Event:2"))
        # TensorBoard hides what an interrupted part or an earlier attempt wrote from this step on
        first = start_step + 1 if start_step else 0
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        if not start_step:
            self._write(
                Event(step=0, summary=_text_summary("recipe", json.dumps(config, indent=2, ensure_ascii=False)))
            )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers of an optimizer step as scalars."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def log_samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the answers to held-out prompts as texts, one tag per row."""
        from tensorboard.compat.proto.event_pb2 import Event

        for record in records:
            turns = [*record["prompt"], {"role": "assistant", "content": record["answer"]}]
            text = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
            self._write(Event(step=step, summary=_text_summary(f"samples/row {record['row']}", text)))

    def finish(self, exit_code: int) -> None:
        """Close the file; TensorBoard does not show whether a run failed."""
        self.writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self.writer.write(event.SerializeToString())
        self.writer.flush()


def _text_summary(tag: str, text: str) -> Any:
    """A summary for TensorBoard's text page, indented so that it is not rendered as Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    tensor = TensorProto(dtype=DT_STRING, string_val=[indent(text, "    ").encode()])
    plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary(value=[Summary.Value(tag=tag, metadata=plugin, tensor=tensor)])
