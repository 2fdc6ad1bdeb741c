"""Atomic writes of files and folders, their SHA-256, and the place of the cache."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_dpo.errors import QloraDpoError, RecipeError, SourceError

MAX_SHOWN_PATH = 120
"""Characters of a path that a message shows."""


def cache_home() -> Path:
    """The cache folder: $QLORA_DPO_CACHE, or `qlora_dpo` in the user's cache folder."""
    if folder := os.environ.get("QLORA_DPO_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora_dpo"


@contextmanager
def translate_disk_errors(target: Path) -> Iterator[None]:
    """Raise SourceError, or RecipeError for a name that is too long, for an OSError of writing to `target`."""
    try:
        yield
    except OSError as error:
        if (translated := disk_error(error, str(target))) is None:
            raise
        raise translated from error


def disk_error(error: OSError, target: str) -> QloraDpoError | None:
    """The error of this project for one of the operating system about the file `target`; None for any other."""
    shown = target if len(target) <= MAX_SHOWN_PATH else f"{target[:MAX_SHOWN_PATH]}..."
    in_cache = Path(target).absolute().is_relative_to(cache_home().absolute())
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return SourceError(f"{shown}: the disk is full; {_free_space_advice(Path(target))}")
        case errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOTDIR:
            advice = "set QLORA_DPO_CACHE to a folder" if in_cache else "choose a folder"
            return SourceError(f"{shown}: cannot be written ({error.strerror}); {advice} that you may write to")
        case errno.EFBIG:
            return SourceError(
                f"{shown}: would be larger than a file may be here; choose another disk, or raise the limit (ulimit -f)"
            )
        case errno.ENAMETOOLONG:
            return RecipeError(f"{shown}: is too long for the name of a file (255 bytes at most); name a shorter one")
        case errno.EISDIR:
            return SourceError(f"{shown}: is a folder; name a file")
        case _:
            return None


def read_error(error: OSError, name: str) -> QloraDpoError:
    """The error of this project for one of the operating system about reading the file or folder `name`."""
    too_long = disk_error(error, name) if error.errno == errno.ENAMETOOLONG else None
    return too_long or SourceError(f"{name}: cannot be read: {error.strerror}")


def check_disk_space(target: Path, needed: int) -> None:
    """Raise SourceError if the disk of `target`, which need not exist yet, has fewer than `needed` bytes free."""
    home = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise SourceError(
            f"{target}: needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB free; "
            f"{_free_space_advice(target)}"
        )


def _free_space_advice(target: Path) -> str:
    cached = target.absolute().is_relative_to(cache_home().absolute())
    return "free some space" + (", or set QLORA_DPO_CACHE to another disk" if cached else "")


def atomic_write(path: Path, content: bytes | str) -> None:
    """Write `path` under a temporary name, flush it to disk, and rename it: readers see all of it or nothing."""
    data = content.encode() if isinstance(content, str) else content
    with translate_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=_temporary_prefix(path), dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)


def _temporary_prefix(path: Path) -> str:
    """What the temporary name of `path` begins with; short enough to be a name wherever that of `path` is one."""
    return f".{path.name[:40]}."


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; raises ValueError for NaN and infinity."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def cached_record_path(folder: str, key: Sequence[Any], libraries: Sequence[str]) -> Path:
    """Where the cache keeps a record on `key`, of JSON's types, made with the installed versions of these libraries."""
    text = json.dumps([[version(name) for name in libraries], *key])
    return cache_home() / folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read_cached_record(path: Path) -> dict[str, Any] | None:
    """The record that `write_cached_record` wrote to `path`; None if there is none, or a damaged one."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        record: dict[str, Any] = kept["record"]
        return record if kept["digest"] == _digest(record) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cached_record(path: Path, record: dict[str, Any]) -> None:
    """Keep a record with its SHA-256, unless the disk is full or read-only, or a figure is no number."""
    with suppress(SourceError, ValueError):
        write_json(path, {"digest": _digest(record), "record": record})


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is renamed to `path` at the end, or removed after any error."""
    with translate_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(path), dir=path.parent))
        try:
            yield temporary
            temporary.chmod(0o755)
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)
                    _fsync_file(file)
            _fsync_folder(temporary)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _fsync_folder(path.parent)


def path_exists(path: Path) -> bool:
    """True if `path` exists and may be looked at; False too if no file can have that name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def text_lines(text: str) -> list[str]:
    r"""The lines of `text`, which only "\n" and "\r\n" end.

    `str.splitlines` also splits at U+2028, U+2029, U+0085 and the like, which JSON and TOML allow inside a string.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
