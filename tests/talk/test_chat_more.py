"""Chat as a place where data comes from: rewards, votes, long messages, and a conversation that goes on another day."""

import io
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import tiny
import torch
from chat_sessions import Terminal, conversation, said
from saved_adapters import save_base
from server_process import adapted, save_adapted

from qlora_dpo.cli import main
from qlora_dpo.data.files import read_data_file
from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import select_device
from qlora_dpo.talk import chat_history as kept_module
from qlora_dpo.talk.chat_history import SavedChat, load_chat, save_chat
from qlora_dpo.talk.commands import COMMANDS, CommandResult, run_command
from qlora_dpo.talk.line_editor import completion_candidates, read_message
from qlora_dpo.talk.reward import implicit_reward
from qlora_dpo.talk.sampling import SamplingParams

ASKED = [{"role": "user", "content": "rice?"}]

# rewards


def test_the_reward_is_what_transformers_and_peft_alone_compute() -> None:
    model, words = adapted(), tiny.tokenizer()
    found = implicit_reward(model, words, select_device("fp32"), ASKED, "The library.")
    before = words.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([[*before, *words("The library.")["input_ids"], words.eos_token_id]])

    def logp() -> float:
        with torch.no_grad():
            logp_TV = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(float(logp_TV[place - 1, ids[0, place]]) for place in range(len(before), ids.shape[1]))

    tuned = logp()
    with model.disable_adapter():
        base = logp()
    assert (found.tuned, found.base) == pytest.approx((tuned, base), abs=1e-4)
    assert found.tokens == ids.shape[1] - len(before)
    assert found.at_beta(0.1) == pytest.approx(0.1 * (tuned - base), abs=1e-5)
    assert abs(tuned - base) > 1


def test_the_reward_of_an_adapter_that_does_nothing_is_0() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert implicit_reward(model, tiny.tokenizer(), select_device("fp32"), ASKED, "Yes.").at_beta(0.1) == 0


def test_the_end_token_of_an_answer_that_was_cut_off_is_not_scored() -> None:
    model, words = adapted(), tiny.tokenizer()
    whole, cut = (
        implicit_reward(model, words, select_device("fp32"), ASKED, "The library.", ended) for ended in (True, False)
    )
    assert whole.tokens == cut.tokens + 1
    with pytest.raises(RecipeError, match="the answer has no tokens to score"):
        implicit_reward(model, words, select_device("fp32"), ASKED, "", ended=False)


def test_reward_shows_every_voice_with_its_arithmetic() -> None:
    held = conversation(adapter=True)
    assert run_command(held, "/reward") == CommandResult("there is no answer yet")
    held.beta = 0.2
    run_command(held, "/both")
    answers = said(held, "rice?")
    lines = run_command(held, "/reward").text.splitlines()
    assert len(lines) == 2
    for line, voice, answer in zip(lines, ("tuned", "base"), answers, strict=True):
        found = implicit_reward(held.model, held.tokenizer, held.device, ASKED, answer, ended=False)
        figures = (
            f"{found.at_beta(0.2):+.3f} = 0.2 * ({found.tuned:.2f} - {found.base:.2f}) nats, {found.tokens} tokens"
        )
        assert line == f"{voice}: reward {figures}"


def test_where_beta_is_not_known_it_is_said() -> None:
    held = conversation(adapter=True)
    said(held, "rice?")
    last = run_command(held, "/reward").text.splitlines()[-1]
    assert last == "(what beta the adapter was trained with is not known; 0.1 is the usual one)"


# votes


def test_a_vote_between_tuned_and_base_is_a_pair_and_the_conversation_goes_on_from_it(empty_folder: Path) -> None:
    held = conversation(adapter=True)
    held.system = "You are a cat."
    run_command(held, "/both")
    tuned, base = said(held, "rice?")
    told = "appended to pairs.jsonl: b is better; the conversation goes on from it"
    assert run_command(held, "/better b pairs.jsonl") == CommandResult(told)
    assert read_data_file(Path("pairs.jsonl")).rows == [
        {
            "prompt": [{"role": "system", "content": "You are a cat."}, *ASKED],
            "chosen": [{"role": "assistant", "content": base.strip()}],
            "rejected": [{"role": "assistant", "content": tuned.strip()}],
            "chosen_by": "merged/tiny, adapter off",
            "rejected_by": "merged/tiny",
        }
    ]
    assert held.messages[-1]["content"] == base
    # the file is remembered, and the next pair has the whole conversation as its prompt
    said(held, "Thank you")
    assert run_command(held, "/better a").text.startswith("appended to pairs.jsonl: a is better")
    second = read_data_file(Path("pairs.jsonl")).rows[1]["prompt"]
    assert [turn["content"] for turn in second] == ["You are a cat.", "rice?", base, "Thank you"]


def test_a_vote_between_two_tries_is_a_pair_too(empty_folder: Path) -> None:
    held = conversation()
    first = said(held, "rice?")[0]
    second = said(held, run_command(held, "/retry").question)[0]
    assert run_command(held, "/better a pairs.jsonl").text.startswith("appended")
    row = read_data_file(Path("pairs.jsonl")).rows[0]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == (first.strip(), second.strip())
    assert held.messages == [*ASKED, {"role": "assistant", "content": first}]


@pytest.mark.parametrize("line", ["/undo", "/new", "/system You are a dog."])
def test_answers_to_what_was_asked_before_are_not_voted_on(line: str, empty_folder: Path) -> None:
    held = conversation(adapter=True)
    run_command(held, "/both")
    said(held, "rice?")
    run_command(held, line)
    told = "there are no two answers to the last message; /both and /retry give another one"
    assert run_command(held, "/better a pairs.jsonl") == CommandResult(told)
    assert not Path("pairs.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pairs.txt", "pairs.txt: pairs are lines of JSON; give the file a name that ends in .jsonl"),
        ("no/pairs.jsonl", "no/pairs.jsonl: there is no folder no; make it first"),
    ],
)
def test_a_file_that_votes_cannot_go_to_is_refused(name: str, told: str, empty_folder: Path) -> None:
    held = conversation(adapter=True)
    run_command(held, "/both")
    said(held, "rice?")
    assert run_command(held, f"/better a {name}") == CommandResult(told)


def test_a_chat_becomes_training_data(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = conversation(adapter=True, settings=SamplingParams(temperature=1.5, top_p=1, max_new_tokens=12, seed=3))
    run_command(held, "/both")
    for number in range(15):
        said(held, f"And bird {number}?")
        assert run_command(held, f"/better {'ab'[number % 2]} pairs.jsonl").text.startswith("appended"), number
        if number % 3:
            run_command(held, "/new")
    save_base(empty_folder / "small")
    Path("recipe.toml").write_text(
        '[model]\nname = "./small"\nquantization = "none"\n[lora]\nr = 2\n'
        '[data]\ntrain = "./pairs.jsonl"\neval_share = 0.3\nmax_length = 512\n[train]\nbatch_size = 4\n'
    )
    assert main(["train", "recipe.toml", "-o", "adapters/chatted"]) == 0, capsys.readouterr().err
    audit = json.loads(Path("adapters/chatted/audit.json").read_text())
    assert (audit["train"]["used"] + audit["eval"]["used"], audit["train"]["dropped"]) == (15, {})


# what is typed


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one', "", "two", 'three"""'], "one\n\ntwo\nthree"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
        (['"""', "/etc is a folder", '"""'], " /etc is a folder"),
    ],
)
def test_a_message_may_have_several_lines(lines: list[str], text: str) -> None:
    rest: Iterator[str] = iter(lines[1:])
    assert read_message(lines[0], lambda: next(rest)) == text
    assert list(rest) == []


def test_commands_settings_and_files_are_completed(empty_folder: Path) -> None:
    Path("pairs.jsonl").touch()
    Path("parts").mkdir()
    assert completion_candidates("", "/re") == ["/retry", "/reward"]
    assert completion_candidates("", "/be") == ["/better "]
    assert completion_candidates("", "/") == [f"{name} " if COMMANDS[name][0] else name for name in COMMANDS]
    assert completion_candidates("/set ", "to") == ["top_p "]
    assert completion_candidates("/better ", "") == ["a ", "b "]
    assert completion_candidates("/better a ", "pa") == ["pairs.jsonl", "parts/"]
    assert completion_candidates("/save ", "pai") == ["pairs.jsonl"]
    assert completion_candidates("tell me about ", "/re") == []
    assert completion_candidates("", "re") == []


# another day


@pytest.fixture
def home(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_adapted(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_conversation_is_kept_for_its_owner_alone_and_comes_back(own_cache: Path) -> None:
    held = conversation()
    held.target, held.system = "/models/tiny", "Grüße"
    said(held, "rice?")
    save_chat(held)
    assert load_chat() == SavedChat("/models/tiny", "Grüße", held.messages)
    assert (own_cache / "last_chat.json").stat().st_mode & 0o777 == 0o600
    assert [each.name for each in own_cache.iterdir()] == ["last_chat.json"]


def test_a_pipe_goes_on_with_c_from_any_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held = conversation(adapter=True, settings=SamplingParams(temperature=0, max_new_tokens=4, seed=0))
    held.target, held.system = str(home / "mine"), "You are a cat."
    said(held, "rice?")
    save_chat(held)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Thank you")))
    assert main(["chat", "-c", "--temperature", "0", "--max-new-tokens", "4"]) == 0
    shown = capsys.readouterr().out
    after = load_chat()
    assert (after.model, after.system, after.messages[:2]) == (held.target, held.system, held.messages)
    assert [turn["content"] for turn in after.messages[2:]] == ["Thank you", shown.removesuffix("\n")]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"model": "x", "system": null, "messages": [1]}',
        '{"model": "x", "system": null, "messages": [{"role": "user", "content": "q"}]}',
        '{"model": "x", "system": null, "messages": [{"role": "system", "content": "q"}]}',
    ],
)
def test_a_damaged_conversation_is_refused(text: str, own_cache: Path) -> None:
    own_cache.mkdir()
    (own_cache / "last_chat.json").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_chat()
    told = f"-c: {own_cache}/last_chat.json is damaged; leave -c out to begin a new conversation"
    assert str(caught.value) == told


def test_there_may_be_nothing_to_go_on_with(own_cache: Path) -> None:
    with pytest.raises(RecipeError, match=r"^-c: there is no conversation to go on with; leave -c out to begin one$"):
        load_chat()


def test_a_chat_in_the_terminal_is_edited_completed_and_goes_on_with_c(home: Path, own_cache: Path) -> None:
    with closing(Terminal(home, "mine", "--max-new-tokens", "4", "--temperature", "0")) as terminal:
        terminal.until("you: ")
        terminal.type("/bo\t\n")
        terminal.until("the tuned and the base model answer from here on")
        terminal.until("you: ")
        terminal.type('"""first\nsecond"""\n')
        terminal.until("base: ")
        assert re.search(r"\(4 tokens, [\d.]+ tokens/s, 0 of \d+ prompt tokens reused\)", terminal.until("reused)"))
        terminal.until("you: ")
        terminal.type("/better b pairs.js\x15/better b pairs.jsonl\n")
        terminal.until("appended to pairs.jsonl: b is better; the conversation goes on from it")
        terminal.until("you: ")
        terminal.type("\x04")
        assert terminal.code() == 0
    assert load_chat().messages[0]["content"] == "first\nsecond"
    row = json.loads((home / "pairs.jsonl").read_text(encoding="utf-8"))
    assert [turn["content"].strip() for turn in load_chat().messages[1:]] == [row["chosen"][0]["content"]]
    assert (own_cache / "chat_lines").stat().st_mode & 0o777 == 0o600
    with closing(Terminal(home, "-c", "--max-new-tokens", "4")) as terminal:
        terminal.until("(goes on after 2 messages; /new begins anew)")
        terminal.until("you: ")
        terminal.type("\x1b[A\n")  # the arrow key brings back what was typed in the chat before
        terminal.until("there are no two answers to the last message; /both and /retry give another one")
        terminal.until("you: ")
        terminal.type("\x04")
        assert terminal.code() == 0


def test_keeping_never_ends_a_chat(own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    held = conversation()
    held.target = "x"
    said(held, "rice?")
    save_chat(held)
    assert own_cache.read_text() == "a file where the folder should be"
    assert kept_module.input_history_file() == own_cache / "chat_lines"
    assert os.environ["QLORA_DPO_CACHE"] == str(own_cache)
