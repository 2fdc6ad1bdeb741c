"""Collects preference pairs from chat and serve, as JSON lines that `train` reads."""

import errno
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path

from qlora_dpo.data.dialogue import InvalidRow, Message, check_roles, sanitize_text
from qlora_dpo.errors import RecipeError, SourceError
from qlora_dpo.files import translate_disk_errors


def check_pair_file(path: Path) -> None:
    """Raise RecipeError or SourceError if pairs cannot be appended to `path`; the file is not created."""
    if path.suffix != ".jsonl":
        raise RecipeError(f"{path}: pairs are lines of JSON; give the file a name that ends in .jsonl")
    if not path.parent.is_dir():
        raise RecipeError(f"{path}: there is no folder {path.parent}; make it first")
    if path.exists() and not path.is_file():
        raise RecipeError(f"{path}: is no file; choose another name")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SourceError(f"{path}: cannot be written; choose a file that you may write to")


def append_pair(path: Path, prompt: Sequence[Message], chosen: tuple[str, str], rejected: tuple[str, str]) -> None:
    """Append a pair as message lists; `chosen` and `rejected` are each a reply's text and the model that wrote it.

    The line is written in one call, under a lock, and synced to the disk. Raises RecipeError if `train` could not use
    the pair.
    """
    check_pair_file(path)
    try:
        check_roles(prompt)
    except InvalidRow as error:
        raise RecipeError(f"this is no preference pair: {error}") from error
    if not all(sanitize_text(turn["content"]).strip() for turn in prompt):
        raise RecipeError("this is no preference pair: empty turn in the prompt")
    # White space around an answer is not part of the preference, and can merge with the template's tokens before it
    texts = {"chosen": sanitize_text(chosen[0]).strip(), "rejected": sanitize_text(rejected[0]).strip()}
    if not all(texts.values()):
        raise RecipeError("this is no preference pair: empty answer")
    if texts["chosen"] == texts["rejected"]:
        raise RecipeError("this is no preference pair: equal answers")
    row = {
        "prompt": [{"role": turn["role"], "content": sanitize_text(turn["content"])} for turn in prompt],
        **{name: [{"role": "assistant", "content": text}] for name, text in texts.items()},
        "chosen_by": chosen[1],
        "rejected_by": rejected[1],
    }
    _append(path, json.dumps(row, ensure_ascii=False))


def _append(path: Path, line: str) -> None:
    """Append the whole line or nothing."""
    with translate_disk_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            end = os.fstat(handle).st_size
            unterminated = end > 0 and os.pread(handle, 1, end - 1) != b"\n"  # as some editors leave the last line
            data = f"{chr(10) if unterminated else ''}{line}\n".encode()
            try:
                if os.write(handle, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
