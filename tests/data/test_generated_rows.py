"""Ten thousand rows that a generator made, on tokenizers of seven kinds: none is lost, none forges a control token."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizer_kinds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_dpo.data.encode import load_pairs
from qlora_dpo.data.templates.chat_template import fold_system, special_tokens, template_traits
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.recipe.data import DataTable

WORDS = ["No.", "Yes, it is.", " ", "\n\n", "é", "e\u0301", "世界", "🦜", "\u200b", "\ue000", "\x00", "{{ x }}", "2024"]
MARKS = ["\n\nHuman:", "\n\nAssistant:", "[INST]", "<0x0A>"]
CONTROL = sorted({word for kind in tokenizer_kinds.KINDS.values() for word in special_tokens(kind()).values()})
PER_FILE = 20

text = st.lists(
    st.sampled_from(WORDS) | st.sampled_from(MARKS) | st.sampled_from(CONTROL) | st.text(max_size=6),
    min_size=1,
    max_size=5,
).map("".join)
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": text}
) | st.fixed_dictionaries({"role": text, "content": st.none() | text})
value = st.none() | st.booleans() | st.integers() | text | st.lists(message, max_size=3)
strings = st.fixed_dictionaries({"prompt": text, "chosen": text, "rejected": text})
lists = st.fixed_dictionaries(
    {
        "prompt": st.tuples(text, text).map(
            lambda both: [{"role": "system", "content": both[0]}, {"role": "user", "content": both[1]}]
        ),
        "chosen": text.map(lambda each: [{"role": "assistant", "content": each}]),
        "rejected": text.map(lambda each: [{"role": "assistant", "content": each}]),
    }
)
anything = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "other"]), value)
file = st.sampled_from([strings, lists]).flatmap(
    lambda shape: st.lists(shape | shape | anything, min_size=PER_FILE, max_size=PER_FILE)
)


def check(kind: str, rows: list[dict[str, Any]], seen: Counter[str]) -> None:
    """Every row is used or dropped, once; a used one has the template's control tokens and no others."""
    words = tokenizer_kinds.KINDS[kind]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        seen["rows"] += len(rows)
        try:
            held = load_pairs(DataTable(train=str(path), eval="./q.jsonl"), "train", words, seed=0)
        except QloraDpoError as error:
            assert "\n" not in str(error)
            seen["refused"] += len(rows)
            return
    numbers = [pair.row for pair in held.pairs] + [row for rows in held.audit.dropped.values() for row in rows]
    assert sorted(numbers) == list(range(1, len(rows) + 1))
    control = special_tokens(words)
    for pair, ids in zip(held.pairs, held.encoded, strict=True):
        for answer, found in ((pair.chosen, ids.chosen), (pair.rejected, ids.rejected)):
            chat = fold_system(template_traits(words), [*pair.prompt, {"role": "assistant", "content": answer}])
            bare = words.apply_chat_template([turn | {"content": "x"} for turn in chat], return_dict=False)
            expected = [each for each in bare if each in control]
            assert [each for each in (*ids.prompt, *found) if each in control] == expected
            seen["answers"] += 1
    for what, rows_repaired in held.audit.repaired.items():
        seen[what] += len(rows_repaired)


@pytest.mark.parametrize("kind", tokenizer_kinds.KINDS)
@pytest.mark.parametrize("files", [20, pytest.param(1500, marks=pytest.mark.slow)])
def test_generated_rows_are_all_accounted_for_and_forge_nothing(kind: str, files: int) -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=files, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(file)
    def run(rows: list[dict[str, Any]]) -> None:
        check(kind, rows, seen)

    run()
    print(f"{kind}: {dict(seen)}")
    assert seen["rows"] >= files * PER_FILE
    assert seen["answers"] > files
    assert seen["control tokens read as text"] > 0
