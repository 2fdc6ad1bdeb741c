"""What a user reads when a command fails: one sentence a problem on stderr, and the exit code."""

import errno
import os
import traceback

import click

from qlora_dpo.cli.launch import leave_word
from qlora_dpo.errors import (
    DOES_NOT_FIT,
    FAILED,
    INTERRUPTED,
    LESS_MEMORY,
    ProcessEndedError,
    QloraDpoError,
    is_out_of_memory,
)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def report(error: BaseException) -> int:
    """Write what went wrong to stderr and return the exit code; the traceback only if QLORA_DPO_TRACEBACK=1."""
    if os.environ.get("QLORA_DPO_TRACEBACK") == "1":
        click.echo(_printable("".join(traceback.format_exception(error))), err=True, nl=False)
    text, code = _explained(error)
    if not isinstance(error, ProcessEndedError):
        leave_word(_printable(text))
    for line in _printable(text).splitlines():
        click.echo(f"qlora-dpo: {line}", err=True)
    return code


def sentence_of(error: BaseException) -> str:
    """What `report` would write of it, on one line."""
    return _printable("; ".join(_explained(error)[0].splitlines()))


def _explained(error: BaseException) -> tuple[str, int]:
    """The sentences and the exit code for `error`."""
    match error:
        case QloraDpoError():
            return str(error), error.exit_code
        case click.exceptions.NoArgsIsHelpError():
            return f"name a command; {_help_for(error)}", error.exit_code
        case click.UsageError():
            sentence = _one_line(error.format_message()).rstrip(".")
            return f"{sentence}{' -' if sentence.endswith('?') else ';'} {_help_for(error)}", error.exit_code
        case click.ClickException():
            return _one_line(error.format_message()), error.exit_code
        case click.Abort() | KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case _ if is_out_of_memory(error):
            return f"out of memory ({_one_line(error) or 'no details'}); {LESS_MEMORY}", DOES_NOT_FIT
        case OSError() if error.errno in FULL_DISK:
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}the disk is full; free some space, or set QLORA_DPO_CACHE to another disk", FAILED
        case _:
            return f"{_unexpected(error)}; set QLORA_DPO_TRACEBACK=1 to see where it came from", FAILED


def _help_for(error: click.UsageError) -> str:
    return f"see {error.ctx.command_path if error.ctx else 'qlora-dpo'} --help"


def _unexpected(error: BaseException) -> str:
    return f"something went wrong that this program does not foresee: {type(error).__name__}: {_one_line(error)}"


def _one_line(words: object, most: int = 300) -> str:
    """`words` as one line of at most `most` characters."""
    line = " ".join(str(words).split())
    return line if len(line) <= most else f"{line[:most]}..."


def _printable(text: str) -> str:
    """`text` without secrets and what could steer the terminal: it may quote a file, an address or a hub's answer."""
    from qlora_dpo.data.dialogue import printable
    from qlora_dpo.redact import redacted

    return printable(redacted(text))
