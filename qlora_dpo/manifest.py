"""The manifest of a folder: its files with their bytes and SHA-256, written last, so that damage is found."""

import json
from collections.abc import Iterable
from pathlib import Path

from qlora_dpo.files import file_sha256, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path, files: Iterable[Path]) -> None:
    """Write the manifest of `folder`, which lists `files`."""
    write_json(
        folder / MANIFEST,
        {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in sorted(files)},
    )


def find_damage(folder: Path, required: str) -> str:
    """The first damage in `folder`, as a phrase; empty if all listed files are intact and `required` is one of them."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if Path(name).name != name:
                return f"{MANIFEST} names a file outside of the folder"
            if (folder / name).stat().st_size != expected["bytes"]:
                return f"{name} has not its size"
            if file_sha256(folder / name) != expected["sha256"]:
                return f"{name} has not its SHA-256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    return "" if required in manifest else f"{required} is not in the manifest"
