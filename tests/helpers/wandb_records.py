"""Reads what wandb wrote offline."""

import json
import struct
from pathlib import Path
from typing import Any


def wandb_records(file: Path) -> list[Any]:
    """The protobuf records of a .wandb file: a LevelDB log of 32 KiB blocks behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, records, parts, offset = file.read_bytes(), [], b"", 7
    assert data[:4] == b":W&B"
    while offset + 7 <= len(data):
        left_in_block = 32768 - offset % 32768
        if left_in_block < 7:
            offset += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def history(records: list[Any]) -> dict[int, dict[str, Any]]:
    """The logged values by step, without wandb's own."""
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.setdefault(items["_step"], {}).update({k: v for k, v in items.items() if not k.startswith("_")})
    return rows
