"""Preference pairs that people make while they talk are data that `train` takes as it is."""

import json
import threading
from pathlib import Path

import pytest
from saved_adapters import save_base

from qlora_dpo.cli import main
from qlora_dpo.errors import SourceError
from qlora_dpo.talk import collect
from qlora_dpo.talk.collect import append_pair

RECIPE = """
[model]
name = "./small"
quantization = "none"
[lora]
r = 2
[data]
train = "./pairs.jsonl"
eval_share = 0.25
max_length = 128
[train]
num_train_epochs = 1
batch_size = 4
"""


def test_what_was_voted_for_trains(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_base(empty_folder / "small")
    for number in range(12):
        earlier = [{"role": "user", "content": f"rice {number}?"}, {"role": "assistant", "content": "Yes."}]
        system = [{"role": "system", "content": "You are a cat."}] if number % 2 else []
        prompt = [*system, *(earlier if number % 3 else []), {"role": "user", "content": f"And bird {number}?"}]
        append_pair(Path("pairs.jsonl"), prompt, ("The library.", "tuned"), (f"I can't {number}.", "base"))
    Path("recipe.toml").write_text(RECIPE)
    assert main(["train", "recipe.toml", "-o", "adapters/voted"]) == 0, capsys.readouterr().err
    assert (empty_folder / "adapters/voted/adapter_model.safetensors").is_file()
    audit = json.loads((empty_folder / "adapters/voted/audit.json").read_text())
    assert audit["train"]["used"] + audit["eval"]["used"] == 12


def test_pairs_written_at_once_do_not_tear_each_other(tmp_path: Path) -> None:
    file, prompt = tmp_path / "pairs.jsonl", [{"role": "user", "content": "rice?"}]

    def write(number: int) -> None:
        for _ in range(10):
            append_pair(file, prompt, (f"{number} " * 3000, "tuned"), ("no", "base"))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 80
    assert {row["chosen"][0]["content"][0] for row in rows} == set("01234567")


def test_a_disk_that_fills_up_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, prompt = tmp_path / "pairs.jsonl", [{"role": "user", "content": "rice?"}]
    append_pair(file, prompt, ("yes", "tuned"), ("no", "base"))
    before = file.read_bytes()
    real = collect.os.write
    monkeypatch.setattr(collect.os, "write", lambda handle, data: real(handle, data[:10]))
    with pytest.raises(SourceError, match="the disk is full"):
        append_pair(file, prompt, ("yes", "tuned"), ("no", "base"))
    assert file.read_bytes() == before
