"""Atomic writes of files and folders, their SHA-256, and the place of the cache."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_dpo.errors import SourceError


def cache_home() -> Path:
    """The cache folder: $QLORA_DPO_CACHE, or `qlora_dpo` in the user's cache folder."""
    if folder := os.environ.get("QLORA_DPO_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qlora_dpo"


@contextmanager
def translate_disk_errors(target: Path) -> Iterator[None]:
    """Raise SourceError, naming `target`, for the OSError of a full or read-only disk."""
    try:
        yield
    except OSError as error:
        match error.errno:
            case errno.ENOSPC | errno.EDQUOT:
                sentence = f"{target}: the disk is full; {_free_space_advice(target)}"
            case errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOTDIR:
                sentence = f"{target}: cannot be written ({error.strerror}); choose a folder that you may write to"
            case _:
                raise
        raise SourceError(sentence) from error


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
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
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


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON; raises ValueError for NaN and infinity."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which is renamed to `path` at the end, or removed after any error."""
    with translate_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
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
