"""The manifest beside a file of pairs: which model wrote the answers, and how they were scored and chosen."""

import json
from pathlib import Path
from typing import Any

from qlora_dpo.files import file_sha256, write_json

MANIFEST_SUFFIX = ".manifest"


def origin_path(pairs: Path) -> Path:
    """Where the manifest of a file of pairs lies."""
    return pairs.with_name(pairs.name + MANIFEST_SUFFIX)


def write_origin(pairs: Path, origin: dict[str, Any]) -> None:
    """Write the manifest of `pairs`, with the file's SHA-256."""
    write_json(origin_path(pairs), {"sha256": file_sha256(pairs), **origin})


def read_origin(source: str | None) -> dict[str, Any] | None:
    """The manifest of the file `source`; None without one, `{"changed": True}` if the file is no longer that file."""
    if source is None:
        return None
    path = Path(source).expanduser()
    try:
        origin: dict[str, Any] = json.loads(origin_path(path).read_text(encoding="utf-8"))
        return origin if origin.pop("sha256", None) == file_sha256(path) else {"changed": True}
    except (OSError, ValueError, AttributeError):
        return None
