"""Writes preference pairs that people make while they talk: lines of JSON that `train` reads as they are."""

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
    """Raise RecipeError or SourceError if pairs cannot be appended to `path`; a file that is not there stays so."""
    if path.suffix != ".jsonl":
        raise RecipeError(f"{path}: pairs are lines of JSON; give the file a name that ends in .jsonl")
    if not path.parent.is_dir():
        raise RecipeError(f"{path}: there is no folder {path.parent}; make it first")
    if path.exists() and not path.is_file():
        raise RecipeError(f"{path}: is no file; choose another name")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SourceError(f"{path}: cannot be written; choose a file that you may write to")


def append_pair(path: Path, prompt: Sequence[Message], chosen: tuple[str, str], rejected: tuple[str, str]) -> None:
    """Append a pair as message lists; `chosen` and `rejected` are each an answer and who gave it.

    The line is written at once, under a lock, and flushed to the disk. Raises RecipeError if the pair could not be
    trained on.
    """
    check_pair_file(path)
    try:
        check_roles(prompt)
    except InvalidRow as unusable:
        raise RecipeError(f"this is no preference pair: {unusable}") from unusable
    if not all(sanitize_text(turn["content"]).strip() for turn in prompt):
        raise RecipeError("this is no preference pair: empty turn in the prompt")
    # white space around an answer is nobody's preference, and can merge with the tokens of the template before it
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
    """Add a line whole or not at all."""
    with translate_disk_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            end = os.fstat(handle).st_size
            torn = end > 0 and os.pread(handle, 1, end - 1) != b"\n"  # an editor left the last line open
            data = f"{chr(10) if torn else ''}{line}\n".encode()
            try:
                if os.write(handle, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
