"""A conversation in the terminal, or one reply to a message from a pipe.

Replies go to stdout; the header, labels and notes go to stderr.
"""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import click

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.talk.chat_history import save_chat
from qlora_dpo.talk.commands import is_command, run_command
from qlora_dpo.talk.conversation import Conversation, ModelVariant, add_user_message, next_seed, stream_reply
from qlora_dpo.talk.generate import TokenUsage
from qlora_dpo.talk.line_editor import line_editing, read_message
from qlora_dpo.talk.terminal import catch_ctrl_c, no_echo

LABEL_COLOURS = {"you": "cyan", "...": "cyan", "tuned": "green", "model": "green", "base": "yellow"}


def run_chat(conversation: Conversation) -> None:
    """Run the conversation until the user leaves."""
    device = conversation.device
    _note(f"{conversation.title} · {device.name}, {device.compute_dtype} · /help lists commands, Ctrl+D leaves")
    if conversation.messages:
        _note(f"(goes on after {len(conversation.messages)} messages; /new begins anew)")
    with line_editing():
        _message_loop(conversation)


def _message_loop(conversation: Conversation) -> None:
    for line in _read_lines():
        if not is_command(line):
            if line.strip():
                _answer(conversation, line.strip())
            continue
        outcome = run_command(conversation, line)
        if outcome.text:
            _note(outcome.text)
        if outcome.then == "leave":
            break
        if outcome.then == "answer":
            _answer(conversation, outcome.question)
        elif outcome.text:
            _save(conversation)


def reply_to_pipe(conversation: Conversation, text: str) -> None:
    """Write the first variant's reply to `text` to stdout, and nothing else."""
    add_user_message(conversation, text)
    _show_reply(conversation, conversation.variants[0], next_seed(conversation), threading.Event())
    if conversation.messages[:-2]:
        _save(conversation)


def _read_lines() -> Iterator[str]:
    """Messages and commands as the user types them, until Ctrl+D; Ctrl+C clears the line."""
    while True:
        click.echo(err=True)
        try:
            yield read_message(_prompt_line(), lambda: _prompt_line("..."))
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            _note("\n(Ctrl+D or /quit leaves)")


def _prompt_line(speaker: str = "you") -> str:
    label = _label(speaker)
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        click.echo(label, nl=False, err=True)
        return input()
    # readline counts the width of its prompt; these marks say that a colour takes none
    return input(re.sub(r"(\x1b\[[0-9;]*m)", "\x01\\1\x02", label))


def _answer(conversation: Conversation, question: str) -> None:
    """Show every variant's reply to `question`; one Ctrl+C stops them all."""
    try:
        if note := add_user_message(conversation, question):
            _note(f"({note})")
        seed = next_seed(conversation)
        with no_echo(), catch_ctrl_c() as stopped:
            for variant in conversation.variants:
                if stopped.is_set():
                    break
                click.echo(_label(variant), nl=False, err=True)
                start = time.monotonic()
                ended = _show_reply(conversation, variant, seed, stopped)
                if not ended:
                    _note_why_stopped(conversation, stopped)
                _note(f"({_usage_text(conversation.usage, time.monotonic() - start)})")
        _save(conversation)
    except KeyboardInterrupt:
        _note("\n(stopped)")
    except QloraDpoError as error:
        _note(str(error))


def _show_reply(conversation: Conversation, variant: ModelVariant, seed: int, stopped: threading.Event) -> bool:
    """Write the reply of `variant` as it grows; return False if the model did not end it itself."""
    ended = False
    with closing(stream_reply(conversation, variant, seed)) as chunks:
        while not stopped.is_set():
            try:
                click.echo(next(chunks), nl=False)
            except StopIteration as end:
                ended = bool(end.value)
                break
    click.echo()
    return ended


def _note_why_stopped(conversation: Conversation, stopped: threading.Event) -> None:
    limit = conversation.settings.max_new_tokens
    if not stopped.is_set():
        _note(f"(stopped at max_new_tokens, {limit}; /set max_new_tokens {2 * limit} allows more)")
    elif conversation.messages and conversation.messages[-1]["role"] == "assistant":
        _note("(stopped; what was said is kept)")
    else:
        _note("(stopped before the first word; your message is taken back)")


def _usage_text(usage: TokenUsage, seconds: float) -> str:
    """Tokens of a reply, tokens per second including the prompt's forward pass, and cached prompt tokens."""
    speed = f"{usage.completion_tokens} tokens, {usage.completion_tokens / max(seconds, 1e-9):.1f} tokens/s"
    return f"{speed}, {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens reused"


def _save(conversation: Conversation) -> None:
    if conversation.target and conversation.messages:
        save_chat(conversation)


def _label(speaker: str) -> str:
    return f"{_styled(speaker, fg=LABEL_COLOURS[speaker], bold=True)}: "


def _note(text: str) -> None:
    click.echo(_styled(sanitize_text(text), dim=True), err=True)


def _styled(text: str, fg: str | None = None, bold: bool | None = None, dim: bool | None = None) -> str:
    """`text` with colour, which click strips where there is no terminal."""
    return text if "NO_COLOR" in os.environ else click.style(text, fg=fg, bold=bold, dim=dim)
