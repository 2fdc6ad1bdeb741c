"""A conversation in the terminal, or one answer to what came through a pipe.

Answers go to stdout; the header, labels and notes go to stderr.
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
    """Hold the conversation until the user leaves."""
    device = conversation.device
    _note(f"{conversation.title} · {device.name}, {device.compute_dtype} · /help lists commands, Ctrl+D leaves")
    if conversation.messages:
        _note(f"(goes on after {len(conversation.messages)} messages; /new begins anew)")
    with line_editing():
        _talk(conversation)


def _talk(conversation: Conversation) -> None:
    for line in _lines():
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
            _keep(conversation)


def reply_to_pipe(conversation: Conversation, text: str) -> None:
    """Write one answer to `text`, by the first voice, to stdout and nothing else."""
    add_user_message(conversation, text)
    _show(conversation, conversation.variants[0], next_seed(conversation), threading.Event())
    if conversation.messages[:-2]:
        _keep(conversation)


def _lines() -> Iterator[str]:
    """What the user types, line by line, until Ctrl+D; Ctrl+C clears the line."""
    while True:
        click.echo(err=True)
        try:
            yield read_message(_typed(), lambda: _typed("..."))
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            _note("\n(Ctrl+D or /quit leaves)")


def _typed(who: str = "you") -> str:
    label = _label(who)
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        click.echo(label, nl=False, err=True)
        return input()
    # readline counts the width of its prompt; these marks say that a colour takes none
    return input(re.sub(r"(\x1b\[[0-9;]*m)", "\x01\\1\x02", label))


def _answer(conversation: Conversation, question: str) -> None:
    """Show every voice's answer to `question`; one Ctrl+C stops them all."""
    try:
        if note := add_user_message(conversation, question):
            _note(f"({note})")
        seed = next_seed(conversation)
        with no_echo(), catch_ctrl_c() as stopped:
            for voice in conversation.variants:
                if not stopped.is_set():
                    click.echo(_label(voice), nl=False, err=True)
                    began = time.monotonic()
                    ended = _show(conversation, voice, seed, stopped)
                    _say_why_it_stopped(conversation, ended, stopped)
                    _note(f"({_figures(conversation.tally, time.monotonic() - began)})")
        _keep(conversation)
    except KeyboardInterrupt:
        _note("\n(stopped)")
    except QloraDpoError as error:
        _note(str(error))


def _show(conversation: Conversation, voice: ModelVariant, seed: int, stopped: threading.Event) -> bool:
    """Write the answer of `voice` as it comes; return False if it did not come to its own end."""
    ended = False
    with closing(stream_reply(conversation, voice, seed)) as pieces:
        while not stopped.is_set():
            try:
                click.echo(next(pieces), nl=False)
            except StopIteration as end:
                ended = bool(end.value)
                break
    click.echo()
    return ended


def _say_why_it_stopped(conversation: Conversation, ended: bool, stopped: threading.Event) -> None:
    if ended:
        return
    limit = conversation.settings.max_new_tokens
    if not stopped.is_set():
        _note(f"(stopped at max_new_tokens, {limit}; /set max_new_tokens {2 * limit} allows more)")
    elif conversation.messages and conversation.messages[-1]["role"] == "assistant":
        _note("(stopped; what was said is kept)")
    else:
        _note("(stopped before the first word; your message is taken back)")


def _figures(tally: TokenUsage, seconds: float) -> str:
    """What a reply took: tokens, tokens a second with the reading of the prompt, and what of that was remembered."""
    speed = f"{tally.completion_tokens} tokens, {tally.completion_tokens / max(seconds, 1e-9):.1f} tokens/s"
    return f"{speed}, {tally.cached_tokens} of {tally.prompt_tokens} prompt tokens reused"


def _keep(conversation: Conversation) -> None:
    if conversation.target and conversation.messages:
        save_chat(conversation)


def _label(who: str) -> str:
    return f"{_styled(who, fg=LABEL_COLOURS[who], bold=True)}: "


def _note(text: str) -> None:
    click.echo(_styled(sanitize_text(text), dim=True), err=True)


def _styled(text: str, fg: str | None = None, bold: bool | None = None, dim: bool | None = None) -> str:
    """`text` with colour; click takes it out again where there is no terminal."""
    return text if "NO_COLOR" in os.environ else click.style(text, fg=fg, bold=bold, dim=dim)
