"""The memory of a run over hundreds of steps on real lengths, against what `check` planned."""

import gzip
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROWS = Path(__file__).parents[3] / "shared" / "data" / "hh" / "full-hh-style.jsonl.gz"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ROWS.is_file(), reason="the real pairs are not beside this checkout"),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries manage freed memory in other ways"),
]

RECIPE = f"""
[model]
name = "./base"
[data]
train = "{ROWS}"
eval_share = 0.02
[train]
max_steps = 300
num_train_epochs = 2
batch_size = 16
eval_steps = 150
logging_steps = 1
[samples]
prompts = 0
"""


def texts() -> Iterator[str]:
    with gzip.open(ROWS, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["prompt"] + row["chosen"]


def write_base(folder: Path) -> None:
    """A random model with a small one's shapes, and a tokenizer that gives HH's rows the lengths of a usual one."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=8192, special_tokens=tiny.SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = tiny.CHATML
    tokenizer.save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)


def test_a_run_of_300_steps_of_16_real_pairs_stays_within_its_plan(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "qlora_dpo", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    planned = json.loads(run("check", "r.toml", "--json"))["memory"]["peak_bytes"]
    run("train", "r.toml", "-o", "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    peaks = {each["step"]: each["memory_bytes"] for each in map(json.loads, lines) if each["kind"] == "train"}
    print({step: round(peaks[step] / planned, 3) for step in (1, 10, 50, 100, 200, 300)})
    assert all(before <= after for before, after in pairwise(peaks.values()))
    assert peaks[300] <= 1.15 * planned
    assert peaks[300] <= 1.05 * peaks[200]
