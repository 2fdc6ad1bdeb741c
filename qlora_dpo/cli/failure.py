"""Reports why a command failed: one sentence per problem on stderr, and the exit code."""

import errno
import os
import traceback
from pathlib import Path

import click

from qlora_dpo.cli.launch import report_to_launcher
from qlora_dpo.errors import (
    EXIT_DOES_NOT_FIT,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    REDUCE_MEMORY_ADVICE,
    ProcessEndedError,
    QloraDpoError,
    is_out_of_memory,
)
from qlora_dpo.files import cache_home, disk_error
from qlora_dpo.tracking.console import printable

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


def report_error(error: BaseException) -> int:
    """Write the reason to stderr and return the exit code; with QLORA_DPO_TRACEBACK=1 write the traceback too."""
    if os.environ.get("QLORA_DPO_TRACEBACK") == "1":
        click.echo(printable("".join(traceback.format_exception(error))), err=True, nl=False)
    text, code = _sentence_and_exit_code(error)
    if not isinstance(error, ProcessEndedError):
        report_to_launcher(printable(text))
    for line in printable(text).splitlines():
        click.echo(f"qlora-dpo: {line}", err=True)
    return code


def error_sentence(error: BaseException) -> str:
    """The sentences that `report_error` would write, on one line."""
    return printable("; ".join(_sentence_and_exit_code(error)[0].splitlines()))


def _sentence_and_exit_code(error: BaseException) -> tuple[str, int]:
    """The sentences and the exit code for `error`."""
    match error:
        case QloraDpoError():
            return str(error), error.exit_code
        case click.exceptions.NoArgsIsHelpError():
            return f"name a command; {_help_hint(error)}", error.exit_code
        case click.UsageError():
            sentence = _one_line(error.format_message()).rstrip(".")
            return f"{sentence}{' -' if sentence.endswith('?') else ';'} {_help_hint(error)}", error.exit_code
        case click.ClickException():
            return _one_line(error.format_message()), error.exit_code
        case click.Abort() | KeyboardInterrupt():
            return "interrupted", EXIT_INTERRUPTED
        case _ if is_out_of_memory(error):
            return f"out of memory ({_one_line(error) or 'no details'}); {REDUCE_MEMORY_ADVICE}", EXIT_DOES_NOT_FIT
        case OSError() if error.errno in DISK_FULL_ERRNOS:
            prefix = f"{error.filename}: " if error.filename else ""
            return f"{prefix}the disk is full; free some space, or set QLORA_DPO_CACHE to another disk", EXIT_FAILURE
        case OSError(errno=errno.ENAMETOOLONG | errno.EFBIG | errno.EROFS | errno.EACCES | errno.EPERM):
            return _system_error(error)
        case _:
            return f"{_unexpected_error_text(error)}; set QLORA_DPO_TRACEBACK=1 to see where it came from", EXIT_FAILURE


def _system_error(error: OSError) -> tuple[str, int]:
    """The sentence and the exit code for a file that the operating system refuses to read or write."""
    name = str(error.filename or error.filename2 or "a file")
    if error.errno in (errno.ENAMETOOLONG, errno.EFBIG) and (translated := disk_error(error, name)):
        return str(translated), translated.exit_code
    advice = "look at its permissions, or name another"
    if Path(name).absolute().is_relative_to(cache_home().absolute()):
        advice = "set QLORA_DPO_CACHE to a folder that you may read and write"
    return f"{name}: cannot be read or written ({error.strerror}); {advice}", EXIT_FAILURE


def _help_hint(error: click.UsageError) -> str:
    return f"see {error.ctx.command_path if error.ctx else 'qlora-dpo'} --help"


def _unexpected_error_text(error: BaseException) -> str:
    return f"something went wrong that this program does not foresee: {type(error).__name__}: {_one_line(error)}"


def _one_line(message: object, max_characters: int = 300) -> str:
    """`message` as one line of at most `max_characters` characters."""
    line = " ".join(str(message).split())
    return line if len(line) <= max_characters else f"{line[:max_characters]}..."
