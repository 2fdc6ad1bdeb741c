"""Pairs become the ids that the chat template gives: exact boundaries, end tokens, cuts and draws."""

import gzip
import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl.data_utils import extract_prompt

from qlora_dpo.data.encode import EQUAL_AS_WRITTEN, PairSet, encode_pairs, load_pairs, pair_num_tokens
from qlora_dpo.data.encoded import EncodedPair, digest_ids
from qlora_dpo.data.pairs import Pair
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.errors import DataError, ModelError
from qlora_dpo.recipe.data import DataTable

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real preference data is not beside this checkout")

ROLES = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + END }}{% endfor %}"
START = "{% if add_generation_prompt %}assistant: {% endif %}"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
PAIRS = [
    Pair((user("Is it late?"),), "No, it is early.", "Yes.", 1, {}),
    Pair((SYSTEM, user("Hi."), assistant("Hello."), user("世界 🦜?")), " spaced ", "ends\n", 2, {}),
    Pair((user("<|not special|> {{ jinja }}"),), "a" * 300, "Café\n\n\ttabs", 3, {}),
]


def ids(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **keys: Any) -> list[int]:
    """What `apply_chat_template` itself gives."""
    return list(tokenizer.apply_chat_template(chat, return_dict=False, **keys))


def whole(pair: Pair, answer: str) -> list[dict[str, str]]:
    return [*pair.prompt, assistant(answer)]


def encoded(tokenizer: PreTrainedTokenizerBase, pairs: list[Pair] = PAIRS) -> list[EncodedPair]:
    found = encode_pairs(pairs, tokenizer, detect_chat_format(tokenizer))
    assert not [each for each in found if isinstance(each, str)]
    return [each for each in found if isinstance(each, EncodedPair)]


def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that adds <|endoftext|> before every text, with a template that writes it as well, as Llama's do."""
    made = tiny.tokenizer("{{ bos_token }}" + tiny.CHATML)
    made.bos_token = "<|endoftext|>"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", made.bos_token_id)]
    )
    return made


@pytest.mark.parametrize("tokenizer", [tiny.tokenizer(), with_bos()], ids=["qwen2", "with bos"])
def test_ids_are_those_of_the_chat_template_up_to_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for pair, found in zip(PAIRS, encoded(tokenizer), strict=True):
        assert list(found.prompt) == ids(tokenizer, list(pair.prompt), add_generation_prompt=True)
        assert [*found.prompt, *found.chosen, *newline] == ids(tokenizer, whole(pair, pair.chosen))
        assert [*found.prompt, *found.rejected, *newline] == ids(tokenizer, whole(pair, pair.rejected))


def test_every_answer_decodes_to_its_text_and_the_end_token() -> None:
    tokenizer = tiny.tokenizer()
    for pair, found in zip(PAIRS, encoded(tokenizer), strict=True):
        assert tokenizer.decode(found.chosen) == pair.chosen + "<|im_end|>"
        assert tokenizer.decode(found.rejected) == pair.rejected + "<|im_end|>"


@pytest.mark.parametrize(
    ("template", "end", "trailing"),
    [
        (tiny.CHATML, "<|im_end|>", 1),
        (ROLES.replace("END", "'<|endoftext|>'") + START, "<|endoftext|>", 0),
        (ROLES.replace("END", "' <|im_end|>\n\n'") + START, "<|im_end|>", 1),
        (
            ROLES.replace("END", "'<|im_end|>\n'")
            + "{% if add_generation_prompt %}assistant: {% else %}<|endoftext|>{% endif %}",
            "<|im_end|>",
            2,
        ),
    ],
    ids=["ChatML", "end of text", "space before the end", "Phi-3: end of text after the last turn"],
)
def test_the_end_token_is_found_by_looking_at_the_template(template: str, end: str, trailing: int) -> None:
    tokenizer = tiny.tokenizer(template)
    form = detect_chat_format(tokenizer)
    assert (form.end_token_id, form.num_trailing, form.eos_appended) == (
        tokenizer.convert_tokens_to_ids(end),
        trailing,
        False,
    )
    assert form.note == ""
    for found in encoded(tokenizer, PAIRS[:1]):
        assert found.chosen[-1] == found.rejected[-1] == form.end_token_id


def test_without_an_end_in_the_template_the_eos_token_is_added_and_said() -> None:
    tokenizer = tiny.tokenizer(ROLES.replace("END", "'\n'") + START)
    form = detect_chat_format(tokenizer)
    assert form.note == "the chat template ends no answer, so the end-of-text token is added to each"
    found = encoded(tokenizer, PAIRS[:1])[0]
    assert [*found.prompt, *found.chosen] == [*ids(tokenizer, whole(PAIRS[0], PAIRS[0].chosen)), tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            tiny.CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}",
            "the model's chat template does not write an answer behind the prompt as generation sees it (the prompt "
            "ends with '<|im_start|>assistant\\n<think>\\n'), so answers cannot be scored; name a model with another "
            "template",
        ),
        (
            "{{ raise_exception('No chats.') }}",
            "the model's chat template fails on a question and an answer: No chats.",
        ),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            "the model's chat template does not write an answer behind the prompt as generation sees it (the prompt "
            "ends with 'IS IT SO?'), so answers cannot be scored; name a model with another template",
        ),
    ],
)
def test_a_template_that_hides_answers_is_refused(template: str, message: str) -> None:
    with pytest.raises(ModelError) as refused:
        detect_chat_format(tiny.tokenizer(template))
    assert str(refused.value) == message


def test_a_template_without_any_end_is_refused() -> None:
    tokenizer = tiny.tokenizer(ROLES.replace("END", "'\n'") + START)
    tokenizer.eos_token = None
    with pytest.raises(ModelError) as refused:
        detect_chat_format(tokenizer)
    assert str(refused.value) == "the model's chat template ends no answer and its tokenizer has no end-of-text token"


def test_a_chat_that_the_template_refuses_is_dropped_alone() -> None:
    refusing = "{% if 'late' in messages[0]['content'] %}{{ raise_exception('No dates.') }}{% endif %}"
    tokenizer = tiny.tokenizer(refusing + tiny.CHATML)
    found = encode_pairs(PAIRS, tokenizer, detect_chat_format(tokenizer))
    assert found[0] == "chat template refuses it: No dates."
    assert found[1:] == encoded(tiny.tokenizer())[1:]


def test_answers_that_a_template_makes_equal_are_dropped() -> None:
    tokenizer = tiny.tokenizer(tiny.CHATML.replace("message['content']", "message['content'] | replace('!', '')"))
    pair = Pair((user("Is it late?"),), "No!", "No", 1, {})
    assert encode_pairs([pair], tokenizer, detect_chat_format(tokenizer)) == [EQUAL_AS_WRITTEN]


def test_the_digest_is_sha_256_of_lengths_and_ids() -> None:
    first = encoded(tiny.tokenizer())[0]
    content = b"".join(
        len(part).to_bytes(4, "little") + b"".join(each.to_bytes(4, "little") for each in part)
        for part in (first.prompt, first.chosen, first.rejected)
    )
    assert first.digest == hashlib.sha256(content).digest()
    assert digest_ids((1, 2), (3,), (4,)) != digest_ids((1,), (2, 3), (4,))


def load(rows: list[dict[str, Any]], part: Any = "train", seed: int = 0, **keys: Any) -> PairSet:
    """The pairs of `rows`, written to a file of the current folder."""
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    other: dict[str, Any] = (
        {"train": "p.jsonl", "eval": "q.jsonl"} if part == "train" else {"train": "q.jsonl", "eval": "p.jsonl"}
    )
    return load_pairs(DataTable(**other, **keys), part, tiny.tokenizer(), seed)


def row(number: int, answer: str = "No.") -> dict[str, str]:
    return {"prompt": f"Is {number} even?", "chosen": answer, "rejected": "Yes."}


def test_pairs_and_ids_are_in_the_order_of_the_rows(empty_folder: Path) -> None:
    held = load([row(1), row(2, ""), row(3)])
    assert [pair.row for pair in held.pairs] == [pair.row for pair in held.encoded] == [1, 3]
    assert held.encoded == [
        replace(each, row=number) for each, number in zip(encoded(tiny.tokenizer(), held.pairs), (1, 3), strict=True)
    ]
    assert (held.audit.rows, held.audit.used, held.audit.not_sampled) == (3, 2, 0)
    assert held.audit.dropped == {"empty answer": (2,)}


def test_a_pair_of_exactly_max_length_is_used(empty_folder: Path) -> None:
    exact = pair_num_tokens(load([row(1)]).encoded[0])
    rows = [row(1), row(1, "No. No.")]
    held = load(rows, max_length=exact)
    assert [pair.row for pair in held.pairs] == [1]
    assert held.audit.dropped == {"longer than max_length": (2,)}


def test_a_draw_takes_the_rows_with_the_smallest_random_numbers(empty_folder: Path) -> None:
    generator = random.Random(7)
    draws = [generator.random() for _ in range(40)]
    smallest = sorted(sorted(range(1, 41), key=lambda number: draws[number - 1])[:5])
    held = load([row(number) for number in range(1, 41)], seed=7, max_train_samples=5)
    assert [pair.row for pair in held.pairs] == smallest
    assert (held.audit.used, held.audit.not_sampled) == (5, 35)


def test_a_row_that_becomes_unusable_moves_no_other_in_the_draw(empty_folder: Path) -> None:
    rows = [row(number) for number in range(1, 41)]
    before = [pair.row for pair in load(rows, "eval", seed=7, max_eval_samples=6).pairs]
    for spoilt in ("", "No. " * 400):
        rows[before[2] - 1]["chosen"] = spoilt
        after = [pair.row for pair in load(rows, "eval", seed=7, max_eval_samples=6).pairs]
        assert set(before) - set(after) == {before[2]}
        assert len(after) == 6


def test_another_seed_draws_other_rows_and_more_samples_keep_the_first(empty_folder: Path) -> None:
    rows = [row(number) for number in range(1, 41)]
    few = {pair.row for pair in load(rows, seed=1, max_train_samples=5).pairs}
    assert few < {pair.row for pair in load(rows, seed=1, max_train_samples=9).pairs}
    assert few != {pair.row for pair in load(rows, seed=2, max_train_samples=5).pairs}


def test_asking_for_more_samples_than_there_are_gives_all(empty_folder: Path) -> None:
    held = load([row(1), row(2)], max_train_samples=9)
    assert (held.audit.used, held.audit.not_sampled) == (2, 0)


LONG = {
    "prompt": [SYSTEM, user("old " * 30), assistant("older."), user("a b c d e f g h"), assistant("i"), user("Is it?")],
    "chosen": [assistant("No.")],
    "rejected": [assistant("Yes, it is.")],
}


def test_a_cut_prompt_keeps_the_system_turn_and_loses_the_oldest_turns_first(empty_folder: Path) -> None:
    full = pair_num_tokens(load([LONG]).encoded[0])
    held = load([LONG], max_length=full - 1, overlong="cut_prompt")
    assert held.pairs[0].prompt == (SYSTEM, *LONG["prompt"][3:])
    assert held.audit.repaired == {"prompt cut at the front": (1,)}
    assert held.encoded == encoded(tiny.tokenizer(), held.pairs)


def test_the_last_user_turn_is_cut_at_the_front_by_whole_tokens_and_no_more_than_needed(empty_folder: Path) -> None:
    long = {"prompt": "x y z " * 20 + "Is it?", "chosen": "No.", "rejected": "Yes."}
    full = pair_num_tokens(load([long]).encoded[0])
    for room in (full - 1, full - 7, full - 30):
        held = load([long], max_length=room, overlong="cut_prompt")
        left = held.pairs[0].prompt[0]["content"]
        assert long["prompt"].endswith(left)
        assert pair_num_tokens(held.encoded[0]) == room
        assert (held.pairs[0].chosen, held.pairs[0].rejected) == ("No.", "Yes.")


def test_a_cut_goes_between_characters_where_tokens_split_them(empty_folder: Path) -> None:
    long = {"prompt": "🦜世" * 20 + "Is it?", "chosen": "No.", "rejected": "Yes."}
    full = pair_num_tokens(load([long]).encoded[0])
    for room in range(full - 12, full):
        held = load([long], max_length=room, overlong="cut_prompt")
        assert long["prompt"].endswith(held.pairs[0].prompt[0]["content"])
        assert room - 3 <= pair_num_tokens(held.encoded[0]) <= room


@pytest.mark.parametrize(
    ("part", "share", "told"),
    [
        ("eval", 0.01, "leaves no held-out pair of its 3; raise it, or name the held-out pairs in data.eval"),
        ("train", 0.99, "leaves no training pair of its 3; lower it, or name the held-out pairs in data.eval"),
    ],
)
def test_a_share_that_leaves_one_side_without_pairs_is_refused(
    part: Any, share: float, told: str, empty_folder: Path
) -> None:
    rows = ({"prompt": f"Question {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(3))
    Path("few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        load_pairs(DataTable(train="few.jsonl", eval_share=share), part, tiny.tokenizer(), seed=0)
    assert str(error.value) == f"few.jsonl: data.eval_share = {share} of its prompts {told}"


def test_short_pairs_are_not_cut(empty_folder: Path) -> None:
    held = load([row(1)], overlong="cut_prompt")
    assert held.audit.repaired == {}
    assert held.pairs == load([row(1)]).pairs


@needs_shared
@pytest.mark.parametrize("overlong", ["drop", "cut_prompt"])
def test_real_hh_rows_are_all_accounted_for_and_end_with_the_end_token(overlong: Any) -> None:
    tokenizer = tiny.tokenizer()
    source = str(SHARED / "hh/helpful-base/test.jsonl.gz")
    table = DataTable(train=source, eval="./other.jsonl", overlong=overlong, max_length=700, max_train_samples=600)
    held = load_pairs(table, "train", tokenizer, seed=3)
    account = held.audit
    assert account.rows == 2_354
    assert account.rows == account.used + account.not_sampled + sum(map(len, account.dropped.values()))
    assert account.used == len(held.pairs) == 600
    assert ("prompt cut at the front" in account.repaired) == (overlong == "cut_prompt")
    for pair, found in zip(held.pairs, held.encoded, strict=True):
        assert pair_num_tokens(found) <= 700
        text = tokenizer.apply_chat_template(whole(pair, pair.chosen), tokenize=False)
        assert tokenizer.decode([*found.prompt, *found.chosen]) + "\n" == text
        assert found.chosen[-1] == found.rejected[-1] == tokenizer.eos_token_id


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", ["hh/helpful-base/test.jsonl.gz", "hh/helpful-online/test.jsonl.gz"])
def test_the_boundary_is_exact_on_all_of_hh(name: str) -> None:
    tokenizer = tiny.tokenizer()
    table = DataTable(train=str(SHARED / name), eval="./other.jsonl", max_length=100_000)
    held = load_pairs(table, "train", tokenizer, seed=0)
    with gzip.open(SHARED / name, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    cut_elsewhere = 0
    for pair, found in zip(held.pairs, held.encoded, strict=True):
        row = rows[pair.row - 1]
        by_trl = extract_prompt({"chosen": row["chosen"], "rejected": row["rejected"]})
        begun = by_trl["prompt"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
        for ids, text in ((found.chosen, pair.chosen), (found.rejected, pair.rejected)):
            assert tokenizer.decode(ids) == f"{text}{tokenizer.eos_token}"
        assert row["chosen"][begun:].strip() == pair.chosen
        assert row["rejected"][begun:].strip() == pair.rejected
        shown = tokenizer.apply_chat_template(pair.prompt, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(found.prompt) == shown
        cut_elsewhere += by_trl["chosen"].strip() != pair.chosen
    print(f"{name}: {len(held.pairs)} pairs, every boundary exact; TRL cuts {cut_elsewhere} elsewhere")
    assert len(held.pairs) > 1_000
    assert cut_elsewhere > 0
