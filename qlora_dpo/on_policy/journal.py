"""A file that grows by a line for each prompt, and from which work goes on after it was killed at any moment.

The first line holds the settings that all others were made with.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_dpo.errors import RecipeError, RunError
from qlora_dpo.files import translate_disk_errors


class Journal:
    """The records of a file by the digest of their prompt; `append` writes a new one before it returns."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Read `path`, or begin it.

        A last line that was not written whole is dropped. Raises RecipeError if its records were made with other
        settings, RunError if it is damaged.
        """
        self.path = path
        self.records: dict[str, Any] = {}
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        with translate_disk_errors(path):
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            lines = [self._parse(number, line) for number, line in enumerate(whole.splitlines(), 1)]
            if lines:
                self._check_settings(lines[0].get("settings"))
            self.records = {line["prompt"]: line["record"] for line in lines[1:]}
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(len(whole))
        if not lines:
            self._write({"settings": self.settings})

    def append(self, prompt: str, record: Any) -> None:
        """Add the record of a prompt, and flush it to disk."""
        self._write({"prompt": prompt, "record": record})
        self.records[prompt] = record

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        with translate_disk_errors(self.path):
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = json.loads(line)
            if isinstance(value, dict) and ("settings" if number == 1 else "record") in value:
                return value
        except ValueError:
            pass
        raise RunError(f"{self.path}:{number}: is damaged; delete this line to have its prompt done again")

    def _check_settings(self, found: Any) -> None:
        if found == self.settings:
            return
        known, wanted = _flat(found if isinstance(found, dict) else {}), _flat(self.settings)
        other = [name for name in {**wanted, **known} if known.get(name) != wanted.get(name)]
        raise RecipeError(
            f"{self.path}: was made with another {', another '.join(other)}; take these settings again, delete it, or "
            "name another -o"
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all groups by their own names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat
