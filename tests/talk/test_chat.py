"""Chat: its commands, its history, its pipe and its terminal, with a small random model that is really run."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import tiny
import torch
from chat_sessions import ROOT, SETTINGS, Terminal, conversation, said
from fork_server import run_forked

from qlora_dpo.cli import main
from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import select_device
from qlora_dpo.talk.chat import run_chat
from qlora_dpo.talk.commands import COMMANDS, CommandResult, is_command, run_command
from qlora_dpo.talk.conversation import (
    Conversation,
    add_user_message,
    fit_to_context,
    next_seed,
    stream_reply,
    transcript,
    undo_last_turn,
)
from qlora_dpo.talk.generate import tokenize_prompt
from qlora_dpo.talk.sampling import SamplingParams
from qlora_dpo.talk.terminal import LONGEST_HELD, EscapeFilter

# PEFT asks transformers for a property by the name that transformers is about to drop


# commands


def test_help_names_every_command_once() -> None:
    lines = run_command(conversation(), "/help").text.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(COMMANDS)
    assert lines[0] == "  /help                show this list"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/sytem", "no command /sytem; did you mean /system?"),
        ("/sytem You are a cat.", "no command /sytem; did you mean /system?"),
        ("/exit", "no command /exit; did you mean /quit?"),
        ("/zzz", "no command /zzz; /help lists them"),
        ("/", "no command /; /help lists them"),
        ("/undo it", "/undo takes nothing after it"),
        ("/undo", "there is nothing to undo"),
        ("/retry", "there is nothing to retry"),
        ("/save", "write /save FILE, for example /save chat.json"),
        ("/save chat.json", "there is nothing to save yet"),
        ("/better", "write /better a FILE or /better b FILE, for example /better a pairs.jsonl"),
        ("/better c pairs.jsonl", "write /better a FILE or /better b FILE, for example /better a pairs.jsonl"),
        ("/better a pairs.jsonl", "there are no two answers to the last message; /retry gives another one"),
        ("/reward", "merged/tiny is a full model: there is no adapter to switch off"),
        ("/base", "merged/tiny is a full model: there is no adapter to switch off"),
        ("/both", "merged/tiny is a full model: there is no adapter to switch off"),
        ("/set", "temperature 1.0, top_p 0.9, max_new_tokens 8, seed 5"),
        ("/set temprature 1", "no setting temprature; did you mean temperature?"),
        ("/set colour red", "no setting colour; there are temperature, top_p, max_new_tokens, seed"),
        ("/set temperature", "write /set temperature VALUE; it is 1.0 now"),
        ("/set temperature hot", "temperature is hot; it must be a number"),
        ("/set max_new_tokens 1.5", "max_new_tokens is 1.5; it must be a whole number"),
        ("/set top_p 2", "top_p is 2.0; it must be above 0 and at most 1 (all tokens)"),
        ("/system", "no system prompt of yours is set"),
    ],
)
def test_a_command_that_cannot_be_carried_out_says_why_and_changes_nothing(
    line: str, told: str, empty_folder: Path
) -> None:
    held = conversation()
    assert run_command(held, line) == CommandResult(told)
    assert (held.settings, held.variants, held.messages, held.system) == (SETTINGS, ("model",), [], None)
    assert list(empty_folder.iterdir()) == []


def test_a_space_before_a_slash_makes_it_a_message() -> None:
    assert is_command("/etc is a folder")
    assert not is_command(" /etc is a folder")


def test_quit_leaves() -> None:
    assert run_command(conversation(), "/quit") == CommandResult("", "leave")


def test_set_changes_one_setting_in_either_spelling() -> None:
    held = conversation()
    assert run_command(held, "/set temperature 0.5") == CommandResult("temperature is 0.5 now")
    assert run_command(held, "/set top-p 1") == CommandResult("top_p is 1.0 now")
    assert held.settings == SamplingParams(0.5, 1.0, 8, 5)


def test_setting_the_seed_repeats_the_replies() -> None:
    held = conversation()
    first = said(held, "rice?")
    run_command(held, "/new")
    assert said(held, "rice?") != first
    run_command(held, "/new")
    run_command(held, "/set seed 5")
    assert said(held, "rice?") == first


def test_system_sets_shows_and_removes_the_prompt() -> None:
    held = conversation()
    assert run_command(held, "/system  You are a cat. ") == CommandResult("system prompt: You are a cat.")
    assert run_command(held, "/system") == CommandResult("system prompt: You are a cat.")
    held.messages.append({"role": "user", "content": "rice?"})
    assert transcript(held)[0] == {"role": "system", "content": "You are a cat."}
    assert run_command(held, "/system none") == CommandResult("system prompt removed")
    assert transcript(held) == [{"role": "user", "content": "rice?"}]


def test_a_system_prompt_changes_the_answer_as_in_a_new_conversation() -> None:
    greedy = SamplingParams(temperature=0, max_new_tokens=8, seed=0)
    held, fresh = conversation(settings=greedy), conversation(settings=greedy)
    without = said(held, "rice?")
    run_command(held, "/system You are a cat.")
    run_command(held, "/new")
    fresh.system = "You are a cat."
    assert said(held, "rice?") == said(fresh, "rice?") != without


def test_undo_takes_back_the_last_question_and_answer() -> None:
    held = conversation()
    said(held, "rice?")
    before = list(held.messages)
    said(held, "and  a very long question about " + "birds " * 20)
    told = "taken back: and a very long question about birds birds birds birds bi..."
    assert run_command(held, "/undo") == CommandResult(told)
    assert held.messages == before
    assert run_command(held, "/undo") == CommandResult("taken back: rice?")
    assert held.messages == []


def test_retry_asks_the_last_question_again_with_other_draws() -> None:
    held = conversation()
    first = said(held, "rice?")
    outcome = run_command(held, "/retry")
    assert (outcome, held.messages) == (CommandResult("", "answer", "rice?"), [])
    second = said(held, outcome.question)
    assert second != first
    assert held.messages == [{"role": "user", "content": "rice?"}, {"role": "assistant", "content": second[0]}]


def test_retry_at_temperature_0_warns_that_nothing_changes() -> None:
    held = conversation(settings=SamplingParams(temperature=0, max_new_tokens=4, seed=0))
    said(held, "rice?")
    told = "temperature is 0, so the answer is the same again"
    assert run_command(held, "/retry") == CommandResult(told, "answer", "rice?")


def test_base_answers_with_the_adapter_off_and_again_with_it() -> None:
    held, plain = conversation(adapter=True), conversation()
    tuned = said(held, "rice?")
    run_command(held, "/new")
    assert run_command(held, "/base") == CommandResult("the base model answers from here on")
    held.draws = 0
    assert said(held, "rice?") == said(plain, "rice?") != tuned
    run_command(held, "/new")
    assert run_command(held, "/base") == CommandResult("the tuned model answers from here on")
    held.draws = 0
    assert said(held, "rice?") == tuned


def test_both_answers_the_same_history_twice_and_keeps_the_tuned_answer() -> None:
    held, tuned = conversation(adapter=True), conversation(adapter=True)
    assert run_command(held, "/both") == CommandResult("the tuned and the base model answer from here on")
    for question in ("rice?", "Thank you"):
        two = said(held, question)
        assert two[0] != two[1]
        assert two[:1] == said(tuned, question)
    assert held.messages == tuned.messages
    assert run_command(held, "/both") == CommandResult("the tuned model answers from here on")
    assert held.variants == ("tuned",)


def test_save_writes_the_conversation_as_json_and_never_overwrites(empty_folder: Path) -> None:
    held = conversation()
    held.system = "Grüße"
    answer = said(held, "rice?")[0]
    assert run_command(held, "/save my chat.json") == CommandResult("saved 2 messages to my chat.json")
    text = Path("my chat.json").read_text(encoding="utf-8")
    assert json.loads(text) == {
        "model": "merged/tiny",
        "messages": [
            {"role": "system", "content": "Grüße"},
            {"role": "user", "content": "rice?"},
            {"role": "assistant", "content": answer},
        ],
    }
    said(held, "more")
    told = "my chat.json exists and is never overwritten; choose another name"
    assert run_command(held, "/save my chat.json") == CommandResult(told)
    assert Path("my chat.json").read_text(encoding="utf-8") == text
    assert run_command(held, "/save no/where.json") == CommandResult(
        "no/where.json cannot be written: No such file or directory"
    )


# history


def test_a_reply_that_is_stopped_is_kept_as_far_as_it_was_said() -> None:
    held = conversation()
    add_user_message(held, "rice?")
    with closing(stream_reply(held, "model", 1)) as pieces:
        heard = next(pieces) + next(pieces)
    assert held.messages == [{"role": "user", "content": "rice?"}, {"role": "assistant", "content": heard}]


def test_a_question_whose_answer_breaks_before_its_first_word_is_taken_back() -> None:
    held = conversation()
    said(held, "rice?")
    before = list(held.messages)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = held.model.register_forward_pre_hook(interrupt)
    add_user_message(held, "Thank you")
    with pytest.raises(KeyboardInterrupt):
        next(stream_reply(held, "model", 1))
    hook.remove()
    assert held.messages == before


def test_an_answer_that_ends_at_once_is_an_empty_message() -> None:
    held = conversation()
    held.model.generation_config.eos_token_id = list(range(400))
    assert said(held, "rice?") == [""]
    assert held.messages[-1] == {"role": "assistant", "content": ""}


def test_escapes_in_a_reply_are_neither_shown_nor_kept() -> None:
    held = conversation(settings=SamplingParams(temperature=0, max_new_tokens=30, seed=0))
    tokens = iter(tiny.tokenizer()("a\x1b[31mred\x1b]0;title\x07\u202e\x9b2Jb")["input_ids"] + [2])

    def dictate(module: object, given: object, logits: torch.Tensor) -> torch.Tensor:
        forced = torch.zeros_like(logits)
        forced[..., next(tokens)] = 1
        return forced

    held.model.lm_head.register_forward_hook(dictate)
    assert said(held, "rice?") == ["aredb"]
    assert held.messages[-1]["content"] == "aredb"


def test_the_oldest_messages_are_left_out_when_the_context_is_full_and_it_is_said() -> None:
    held = conversation()
    held.model.config.max_position_embeddings = 150
    notes = [note for number in range(8) if (note := ask_and_answer(held, f"{number}: {'rice ' * 8}"))]
    told = "the model reads 150 tokens at most: it no longer sees the first {} messages"
    assert notes == [told.format(notes[0].split()[-2]), *(told.format(note.split()[-2]) for note in notes[1:])]
    assert [int(note.split()[-2]) for note in notes] == sorted({int(note.split()[-2]) for note in notes})
    assert 1 <= len(notes) < 7
    assert len(transcript(held)) == 16


def ask_and_answer(held: Conversation, question: str) -> str:
    note = add_user_message(held, question)
    "".join(stream_reply(held, "model", next_seed(held)))
    return note


def test_a_message_that_alone_is_too_long_is_refused_and_taken_back() -> None:
    held = conversation()
    said(held, "rice?")
    before = list(held.messages)
    held.model.config.max_position_embeddings = 60
    with pytest.raises(RecipeError) as caught:
        add_user_message(held, "birds " * 60)
    assert re.fullmatch(
        r"this message makes 1\d\d tokens and a reply may take 8, but the model reads 60 at most; "
        r"shorten the message, or set max_new_tokens lower",
        str(caught.value),
    )
    assert (held.messages, held.num_dropped) == (before, 0)


def test_undo_lets_the_model_read_the_old_messages_again() -> None:
    held = conversation()
    for number in range(4):
        said(held, f"{number} rice?")
    held.num_dropped = 4
    undo_last_turn(held)
    assert (held.num_dropped, fit_to_context(held)) == (0, "")


# text that would steer the terminal

HOSTILE = [
    "plain text\n\twith a tab",
    "\x1b[31mred\x1b[0m and \x1b[2J\x1b[1;1Hgone",
    "\x9b31mred\x9bK",
    "\x1b]0;a title\x07after",
    "\x1b]8;;http://example.org\x1b\\link\x1b]8;;\x1b\\",
    "\x9d52;c;aGk=\x9cafter",
    "\x1bP1;2|private\x1b\\after\x90more\x9cend",
    "\x1b(B\x1b=\x1bcreset",
    "\u202eright to left\u2066x\u2069\u200f",
    "bell\x07 back\x08 return\r delete\x7f null\x00",
    "\x1b]0;never closed\nnext line",
    "\x1b\x1b[31mtwo",
    "\x1b]0;a\x1b[31mb\x07c",
    "\x1b[31\u00e9 broken",
    "ends in \x1b",
    "ends in \x1b[3",
    "ends in \x1b]0;title",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_however_text_is_split_what_is_shown_is_what_the_whole_would_show(text: str) -> None:
    for first in range(len(text) + 1):
        for second in range(first, len(text) + 1):
            filtered = EscapeFilter()
            pieces = [filtered.feed(part) for part in (text[:first], text[first:second], text[second:])]
            assert "".join(pieces) + filtered.flush() == sanitize_text(text)
    one_by_one = EscapeFilter()
    assert "".join(one_by_one.feed(letter) for letter in text) + one_by_one.flush() == sanitize_text(text)


def test_no_control_character_passes_the_filter() -> None:
    every = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F)]))
    filtered = EscapeFilter()
    shown = "".join(filtered.feed(letter + "x") for letter in every) + filtered.flush()
    assert set(shown) <= {"x", "\t", "\n"}


def test_a_string_that_is_never_closed_does_not_hold_the_text_back_for_ever() -> None:
    filtered = EscapeFilter()
    shown = filtered.feed("\x1b]0;" + "x" * LONGEST_HELD)
    assert shown == "0;" + "x" * LONGEST_HELD


# pipe and terminal


def piped(folders: Path, text: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return run_forked(["-m", "qlora_dpo", "chat", *arguments], input=text, text=False, cwd=folders, env=environment)


def test_a_pipe_gives_one_answer_on_stdout_and_nothing_else(folders: Path) -> None:
    asked = ["merged/tiny", "-s", "You are a cat.", "--temperature", "0", "--max-new-tokens", "6"]
    done = piped(folders, b" /help me\n", *asked)
    held = conversation(settings=SamplingParams(temperature=0, max_new_tokens=6, seed=0))
    held.device = select_device()
    held.system = "You are a cat."
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"{said(held, '/help me')[0]}\n"


@pytest.fixture
def pipe(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`echo TEXT | qlora-dpo chat ARGUMENTS` in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(folders)

    def run(text: bytes, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        code = main(["chat", *arguments])
        return (code, *capsys.readouterr())

    return run


def test_the_newest_adapter_answers_and_with_base_its_base_does(pipe: Callable[..., tuple[int, str, str]]) -> None:
    greedy = ["--temperature", "0", "--max-new-tokens", "6"]
    tuned, base, merged = (
        pipe(b"rice?", *greedy),
        pipe(b"rice?", *greedy, "--base"),
        pipe(b"rice?", "merged/tiny", *greedy),
    )
    assert [code for code, _, _ in (tuned, base, merged)] == [0, 0, 0]
    assert base[1] == merged[1] != tuned[1]


@pytest.mark.parametrize(
    ("text", "arguments", "told"),
    [
        (b" \n", [], 'stdin is empty; pipe a question in, as in: echo "How are you?" | qlora-dpo chat'),
        (b"\xff", [], "stdin is not UTF-8 text (byte 0); send the question as UTF-8"),
        (b"hi", ["--top-p", "0"], "top_p is 0.0; it must be above 0 and at most 1 (all tokens)"),
        (
            b"hi",
            ["merged/tiny", "--base"],
            "--base: merged/tiny is a full model, there is no adapter to switch off; leave --base out",
        ),
        (
            b"hi",
            ["merged/tiny", "--max-new-tokens", "2000"],
            "this message makes {tokens} tokens and a reply may take 2000, but the model reads 1024 at most; "
            "shorten the message, or set max_new_tokens lower",
        ),
    ],
)
def test_a_pipe_that_cannot_be_answered_is_a_sentence_and_code_2(
    text: bytes, arguments: list[str], told: str, pipe: Callable[..., tuple[int, str, str]]
) -> None:
    code, shown, notes = pipe(text, *arguments)
    tokens = len(tokenize_prompt(tiny.tokenizer(), [{"role": "user", "content": "hi"}]))
    # transformers' loading bar is off in a process of our own, as the test of the pipe shows
    assert (code, shown, notes.splitlines()[-1]) == (2, "", f"qlora-dpo: {told.format(tokens=tokens)}")


def test_no_stdin_at_all_is_an_empty_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat"]) == 2
    told = 'stdin is empty; pipe a question in, as in: echo "How are you?" | qlora-dpo chat'
    assert capsys.readouterr().err == f"qlora-dpo: {told}\n"


def test_ctrl_c_stops_the_reply_and_keeps_it_and_ctrl_d_leaves(folders: Path) -> None:
    with closing(Terminal(folders, "--max-new-tokens", "900", "--temperature", "0")) as terminal:
        hold_the_stopped_chat(terminal, folders)


def hold_the_stopped_chat(terminal: Terminal, folders: Path) -> None:
    header = terminal.until("\nyou: ")
    assert header.startswith("adapters/tiny · CPU, ")
    assert header.endswith(" · /help lists commands, Ctrl+D leaves\n\nyou: ")
    terminal.type("rice?\n")
    terminal.until("tuned: ")
    terminal.until_anything()  # the whole reply takes a third of a second
    terminal.type("\x03")
    terminal.until("\n(stopped; what was said is kept)\n")
    terminal.until("you: ")
    terminal.type("/save stopped.json\n")
    terminal.until("\nsaved 2 messages to stopped.json\n")
    kept = json.loads((folders / "stopped.json").read_text(encoding="utf-8"))["messages"]
    assert kept[0] == {"role": "user", "content": "rice?"}
    assert kept[1]["content"]
    terminal.until("you: ")
    terminal.type("half a line")
    terminal.until("half a line")
    time.sleep(0.3)  # a signal just before Python waits for a key is noticed with the next key only
    terminal.type("\x03")
    terminal.until("\n(Ctrl+D or /quit leaves)\n")
    terminal.until("you: ")
    terminal.type("\x04")
    assert terminal.code() == 0


def chat_of(lines: str, held: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold a whole chat whose user types `lines` and then leaves."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    run_chat(held)


def test_a_chat_writes_answers_to_stdout_and_all_else_to_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = conversation(adapter=True)
    chat_of("/both\n\nrice?\n/undo\n/quit\nnever read\n", held, monkeypatch)
    again = conversation(adapter=True)
    again.variants = ("tuned", "base")
    shown, notes = capsys.readouterr()
    assert shown == "".join(f"{answer}\n" for answer in said(again, "rice?"))
    cut = "(stopped at max_new_tokens, 8; /set max_new_tokens 16 allows more)\n(FIGURES)\n"
    found = re.findall(r"\((\d+) tokens, [\d.]+ tokens/s, (\d+) of (\d+) prompt tokens reused\)", notes)
    prompt = str(len(tokenize_prompt(held.tokenizer, [{"role": "user", "content": "rice?"}])))
    assert found == [("8", "0", prompt)] * 2
    assert re.sub(r"\(\d+ tokens, .*reused\)", "(FIGURES)", notes) == (
        f"merged/tiny · {held.device.name}, fp32 · /help lists commands, Ctrl+D leaves\n"
        "\nyou: the tuned and the base model answer from here on\n"
        "\nyou: \nyou: "
        f"tuned: {cut}base: {cut}"
        "\nyou: taken back: rice?\n"
        "\nyou: "
    )


def test_a_retry_in_a_chat_shows_another_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, again = conversation(), conversation()
    chat_of("rice?\n/retry\n", held, monkeypatch)
    want = []
    for _ in range(2):
        want += said(again, "rice?")
        undo_last_turn(again)
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in want)
    assert held.messages[-1]["content"] == want[1] != want[0]


def test_a_message_that_does_not_fit_leaves_the_chat_going(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = conversation()
    held.model.config.max_position_embeddings = 60
    chat_of(f"{'birds ' * 60}\n/undo\n", held, monkeypatch)
    shown, notes = capsys.readouterr()
    assert (shown, held.messages) == ("", [])
    assert notes.endswith(
        "shorten the message, or set max_new_tokens lower\n\nyou: there is nothing to undo\n\nyou: \n"
    )


def test_a_ctrl_c_in_a_forward_stops_only_the_reply(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = conversation()

    def press_twice(*_: object) -> None:
        hook.remove()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    hook = held.model.register_forward_pre_hook(press_twice)
    before = signal.getsignal(signal.SIGINT)
    chat_of("Thank you\nrice?\n", held, monkeypatch)
    assert signal.getsignal(signal.SIGINT) is before
    assert [message["content"] for message in held.messages[:-1]] == ["rice?"]
    assert "\n(stopped)\n" in capsys.readouterr().err


# names


QUESTION = "How do I keep a garden in a dry summer, and what would you plant first? " * 5


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (QUESTION, f'"{QUESTION[:100]}...": there is no such folder; if that is a question, pipe it in: echo "..." | '),
        ("What now?", '"What now?": there is no such folder; if that is a question, pipe it in: echo "..." | '),
        ("x" * 300, f"{'x' * 100}...: cannot be read (File name too long); name a folder that you may read"),
        ("~nobody-here/x", "~nobody-here/x: cannot be read (Could not determine home directory.); name a folder "),
        ("no\0name", "noname: there is no such folder; name an adapter, a merged model or a hub model"),
        ("./away", "./away: there is no such folder; name an adapter, a merged model or a hub model"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "serve"])
def test_what_is_no_model_is_told_before_anything_is_loaded(
    command: str, target: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"How?")))
    monkeypatch.setitem(sys.modules, "qlora_dpo.adapter", None)  # the module that imports torch
    assert main([command, target]) == 2
    assert capsys.readouterr().err.startswith(f"qlora-dpo: {says}")
