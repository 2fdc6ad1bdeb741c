"""Reads what the user types: lines with editing, history and completion, and messages of several lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_dpo.talk.chat_history import input_history_file
from qlora_dpo.talk.commands import COMMANDS
from qlora_dpo.talk.sampling import SAMPLING_PARAM_NAMES

FENCE = '"""'
MAX_HISTORY_LINES = 1000
MAX_COMPLETIONS = 100


@contextmanager
def line_editing() -> Iterator[None]:
    """While open, lines can be edited and completed, and earlier ones recalled, including those of earlier chats."""
    try:
        import readline
    except ImportError:  # Python was built without it; input() still reads lines
        yield
        return
    terminal = sys.stdin.isatty()
    if terminal:
        readline.set_completer(complete_word)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        readline.set_history_length(MAX_HISTORY_LINES)
        with suppress(OSError):
            readline.read_history_file(input_history_file())
    try:
        yield
    finally:
        if terminal:
            with suppress(OSError):
                input_history_file().parent.mkdir(parents=True, exist_ok=True)
                input_history_file().touch(mode=0o600)
                readline.write_history_file(input_history_file())


def read_message(first: str, more: Callable[[], str]) -> str:
    r"""The message that begins with the line `first`; `more` reads another line.

    A line that ends in a backslash continues in the next one. A line that begins with three quotes starts a message
    that goes on until a line ends with three quotes.
    """
    if first.lstrip().startswith(FENCE):
        lines = [first.lstrip().removeprefix(FENCE)]
        while not lines[-1].rstrip().endswith(FENCE):
            lines.append(more())
        lines[-1] = lines[-1].rstrip().removesuffix(FENCE)
        text = "\n".join(lines).strip("\n")
        return f" {text}" if text.startswith("/") else text  # a space keeps it from being read as a command
    lines = [first]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(more())
    return "\n".join(lines)


def complete_word(word: str, state: int) -> str | None:
    """Readline's completer: the candidate number `state` for `word`, None after the last one."""
    import readline

    candidates = completion_candidates(readline.get_line_buffer()[: readline.get_begidx()], word)
    return candidates[state] if state < len(candidates) else None


def completion_candidates(before: str, word: str) -> list[str]:
    """Completions of `word` after the text `before`: commands, settings and files."""
    match before.split():
        case [] if word.startswith("/") and not before:
            return [f"{name} " if COMMANDS[name][0] else name for name in COMMANDS if name.startswith(word)]
        case ["/set"]:
            return [f"{name} " for name in SAMPLING_PARAM_NAMES if name.startswith(word)]
        case ["/system"]:
            return ["none"] if "none".startswith(word) else []
        case ["/better"]:
            return [f"{side} " for side in ("a", "b") if side.startswith(word)]
        case ["/save"] | ["/better", _]:
            return _files(word)
        case _:
            return []


def _files(word: str) -> list[str]:
    """Files and folders whose path begins with `word`."""
    folder, _, start = word.rpartition("/")
    home = Path(f"{folder}/" if "/" in word else ".").expanduser()
    with suppress(OSError):
        paths = sorted((path for path in home.iterdir() if path.name.startswith(start)), key=lambda path: path.name)
        prefix = f"{folder}/" if "/" in word else ""
        return [f"{prefix}{path.name}{'/' if path.is_dir() else ''}" for path in paths[:MAX_COMPLETIONS]]
    return []
