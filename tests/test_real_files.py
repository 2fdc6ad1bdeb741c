"""Files of real preference data, whole: each trains from a recipe of two lines; every HH answer begins at its turn."""

import gzip
import json
from pathlib import Path

import jobs
import lively
import pytest
import tiny
from accelerate.state import AcceleratorState
from trl.data_utils import extract_prompt

from qlora_dpo.cli import main
from qlora_dpo.data.encode import load_pairs
from qlora_dpo.recipe_data import DataTable
from qlora_dpo.training.tracker import read

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = {
    "alpaca/instruction-data-with-preference.json": "alpaca",
    "hh/full-hh-style.jsonl.gz": "hh_prompt",
    "hh/helpful-base/test.jsonl.gz": "hh",
    "hh/helpful-online/test.jsonl.gz": "hh",
    "oasst/messages-pairs.jsonl.gz": "messages",
    "sharegpt/dpo_en_demo.json": "sharegpt",
    "sharegpt/dpo_zh_demo.json": "sharegpt",
    "sharegpt/kto_en_demo.json": "unpaired",
    "ultrafeedback/messages-eval.jsonl.gz": "chats",
    "ultrafeedback/messages-train.jsonl.gz": "chats",
}
pytestmark = [
    jobs.LIBRARIES_WARN,
    pytest.mark.skipif(not DATA.is_dir(), reason="real rows are not beside this checkout"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_trains_five_steps_from_a_recipe_of_two_lines(name: str, empty_folder: Path) -> None:
    AcceleratorState._reset_state(True)
    labelled = FILES[name] == "unpaired"  # answers one by one, for which there is no pairwise loss
    lively.qwen2().save_pretrained(empty_folder / "model")
    tiny.tokenizer().save_pretrained(empty_folder / "model")
    recipe = f'model.name = "./model"\ndata.train = "{DATA / name}"\n'
    (empty_folder / "two.toml").write_text(recipe)
    more = ["--set", "objective.loss_type=kto"] if labelled else []
    # the tiny tokenizer has few words, so that of the smallest files little fits, and several epochs make five steps
    more += ["--set", "train.logging_steps=1", "--set", "train.num_train_epochs=5"]
    assert main(["train", "two.toml", "--max-steps=5", *more]) == 0
    steps = [line for line in read(empty_folder / "adapters/two/metrics.jsonl") if line["kind"] == "train"]
    assert len(steps) == 5
    account = json.loads((empty_folder / "adapters/two/audit.json").read_text())
    assert account["train"]["used"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, shape in FILES.items() if shape == "hh"])
def test_the_boundary_is_exact_on_all_of_hh(name: str) -> None:
    tokenizer = tiny.tokenizer()
    table = DataTable(train=str(DATA / name), eval="./other.jsonl", max_length=100_000)
    held = load_pairs(table, "train", tokenizer, seed=0)
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
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
