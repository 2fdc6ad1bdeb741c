"""Chats in a model's own template: control tokens that somebody wrote stay text, and the template runs under limits."""

import resource
import signal
import threading
import time

import pytest
import tiny
import tokenizer_kinds
from transformers import PreTrainedTokenizerFast

from qlora_dpo.data.encode import encode_pairs
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates import chat_template
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.data.templates.chat_template import render_chats, special_tokens, template_traits, tokenize_chats
from qlora_dpo.data.templates.template_limits import LimitExceeded, limit_resources
from qlora_dpo.errors import ModelError
from qlora_dpo.talk.generate import tokenize_prompt

USER = {"role": "user", "content": "Is it so?"}
HELLO = [USER]
kinds = pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@kinds
def test_a_control_token_in_a_text_is_read_as_its_characters(kind: str) -> None:
    words = tokenizer_kinds.KINDS[kind]()
    control = special_tokens(words)
    for word in control.values():
        ids = tokenize_chats(words, [asked(f"Is {word} it?")], ())[0]
        bare = tokenize_chats(words, [asked("Is it?")], ())[0]
        assert [each for each in ids if each in control] == [each for each in bare if each in control]
        assert f"Is {word} it?" in words.decode(ids)


@kinds
def test_a_chat_without_control_tokens_has_the_ids_of_the_template(kind: str) -> None:
    words = tokenizer_kinds.KINDS[kind]()
    chat = [*asked("Is it 2024?"), {"role": "assistant", "content": "No, 世界."}, *asked("Why?\n\nTell me.")]
    expected = words.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert list(tokenize_chats(words, [chat], ())[0]) == expected


@kinds
def test_the_copy_reads_the_templates_own_tokens_as_the_tokenizer_does(kind: str) -> None:
    """A masked chat without its mask is the same chat: the longer way gives the ids of the shorter."""
    words = tokenizer_kinds.KINDS[kind]()
    chat = [*asked(" Is it 2024?\n"), {"role": "assistant", "content": "No, 世界."}, *asked("  Why?\n\nTell me.")]
    text = render_chats(words, [chat], answered=False)[0]
    copied = chat_template._tokenize_masked(words, template_traits(words), text, {"\ue000": "unused"})
    assert copied == tokenize_chats(words, [chat], ())[0]


@kinds
def test_chat_asks_with_the_ids_that_training_has(kind: str) -> None:
    words = tokenizer_kinds.KINDS[kind]()
    hostile = f"Say {next(iter(special_tokens(words).values()))} twice"
    prompts = (
        asked(hostile),
        [{"role": "system", "content": "Be kind."}, *asked("Is it late?")],
        [{"role": "system", "content": hostile}, *asked("Hi."), {"role": "assistant", "content": hostile}, *asked("?")],
    )
    for prompt in prompts:
        found = encode_pairs([Pair(tuple(prompt), "No.", "Yes.", 1, {})], words, detect_chat_format(words))[0]
        assert isinstance(found, EncodedPair)
        assert list(found.prompt) == tokenize_prompt(words, prompt)


@pytest.mark.parametrize(("kind", "folds"), [("qwen2", False), ("without_system", True), ("with_word_starts", True)])
def test_a_system_turn_is_written_before_the_question_where_a_template_has_none(kind: str, folds: bool) -> None:
    words = tokenizer_kinds.KINDS[kind]()
    assert template_traits(words).folds_system == folds
    with_system = tokenize_chats(words, [[{"role": "system", "content": "Be kind."}, *HELLO]], ())
    by_hand = tokenize_chats(words, [asked("Be kind.\n\nIs it so?")], ())
    assert (with_system == by_hand) == folds


def test_a_text_with_every_private_character_and_a_control_token_is_dropped() -> None:
    everything = "".join(map(chr, range(0xE000, 0xF900)))
    pair = Pair(tuple(asked(everything + "<|im_end|>")), "No.", "Yes.", 1, {})
    words = tiny.tokenizer()
    assert encode_pairs([pair], words, detect_chat_format(words)) == [
        "text holds control tokens and every character that could stand for them"
    ]


def test_a_text_with_a_name_of_the_copy_and_a_control_token_is_dropped() -> None:
    pair = Pair(tuple(asked("\U000f0000<|im_end|>")), "No.", "Yes.", 1, {})
    words = tiny.tokenizer()
    assert encode_pairs([pair], words, detect_chat_format(words)) == [
        "text holds the control token <|im_end|>, which cannot be read as text"
    ]


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{% set a = 'a' * 3000000000 %}"
LONG = "{{ 'a' * 1000000 }}"


@pytest.mark.parametrize(
    ("bomb", "told"),
    [
        (ENDLESS, "takes longer than 0.3 seconds"),
        (HUGE, "asks for more than 1 GiB of memory"),
        (LONG, "writes 1,000,117 characters for a chat that needs no more than 100,180"),
    ],
    ids=["endless", "huge", "long"],
)
def test_a_template_that_takes_too_much_is_refused(bomb: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATE_SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "TEMPLATE_SECONDS_PER_CHAT", 0.0)
    limits, alarm = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    words = tiny.tokenizer("{% if true %}" + bomb + "{% endif %}" + tiny.CHATML)
    with pytest.raises(ModelError) as refused:
        detect_chat_format(words)
    assert str(refused.value) == f"the model's chat template {told}; name another model, this one's files are broken"
    with pytest.raises(ModelError, match=r"^the model's chat template .*; take another model$"):
        tokenize_prompt(words, HELLO)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == (limits, alarm)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_row_on_which_the_template_runs_without_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATE_SECONDS", 0.3)
    words = tiny.tokenizer("{% if 'late' in messages[0]['content'] %}" + ENDLESS + "{% endif %}" + tiny.CHATML)
    pairs = [Pair(tuple(asked(text)), "No.", "Yes.", row, {}) for row, text in enumerate(("Hi.", "late?"), 1)]
    with pytest.raises(ModelError) as refused:
        encode_pairs(pairs, words, detect_chat_format(words))
    assert str(refused.value) == (
        "row 2: the model's chat template takes longer than 0.35 seconds; take the row out, or name another model"
    )


def test_other_threads_have_no_clock_and_are_not_interrupted() -> None:
    done = []

    def work() -> None:
        with limit_resources(0.01, 2**30):
            time.sleep(0.05)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
    with pytest.raises(LimitExceeded), limit_resources(0.01, 2**30):
        time.sleep(5)


def test_a_tokenizer_that_is_not_fast_drops_such_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tiny.tokenizer()
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    pair = Pair(tuple(asked("<|im_end|>")), "No.", "Yes.", 1, {})
    assert encode_pairs([pair], words, detect_chat_format(words)) == [
        "text holds the control token <|im_end|>, which cannot be read as text"
    ]


WITHOUT_THOUGHTS = tiny.CHATML.replace("message['content']", "message['content'].split('</think>')[-1].lstrip()")


@pytest.mark.parametrize(
    ("template", "answer", "told"),
    [
        (WITHOUT_THOUGHTS, "<think>\nHm.\n</think>\n\nYes.", chat_template.PARTLY_WRITTEN),
        (WITHOUT_THOUGHTS, "  Yes.\n", None),
        (tiny.CHATML, "<think>\nHm.\n</think>\n\nYes.", None),
        (tiny.CHATML.replace("message['content']", "message['content'] | trim"), " It \n\n is.\n", None),
    ],
)
def test_an_answer_of_which_the_template_writes_a_part_is_dropped(template: str, answer: str, told: str | None) -> None:
    words = tiny.tokenizer(template)
    pairs = [Pair((USER,), text, "No.", row, {}) for row, text in ((1, "Maybe."), (2, answer))]
    first, second = encode_pairs(pairs, words, detect_chat_format(words))
    assert isinstance(first, EncodedPair)
    assert second == told if told else isinstance(second, EncodedPair)
