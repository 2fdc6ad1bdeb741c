"""The memory of a run over hundreds of steps on real lengths, against what `check` planned."""

import gzip
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
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
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)


def peak_by_hundred(process: "subprocess.Popen[bytes]", metrics: Path) -> dict[int, int]:
    """The most resident memory seen in each hundred of steps of a running `train`, from step 2 on, in bytes."""
    peaks: dict[int, int] = defaultdict(int)
    statm, page = Path(f"/proc/{process.pid}/statm"), os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        done = metrics.read_bytes().count(b'"kind": "train"') if metrics.is_file() else 0
        held = statm.read_bytes().split()
        if done and held:
            peaks[min(done, 299) // 100] = max(peaks[min(done, 299) // 100], int(held[1]) * page)
        time.sleep(0.02)
    return peaks


def test_a_run_of_300_steps_of_16_real_pairs_stays_within_its_plan(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    (tmp_path / "r.toml").write_text(RECIPE, encoding="utf-8")
    command = [sys.executable, "-m", "qlora_dpo"]
    check = subprocess.run([*command, "check", "r.toml", "--json"], cwd=tmp_path, capture_output=True, check=True)
    planned = json.loads(check.stdout)["memory"]["peak_bytes"]
    run = [*command, "train", "r.toml", "-o", "run"]
    said = tmp_path / "said.txt"
    with said.open("wb") as out, subprocess.Popen(run, cwd=tmp_path, stdout=out, stderr=out) as process:
        peaks = peak_by_hundred(process, tmp_path / "run" / "metrics.jsonl")
    assert process.returncode == 0, said.read_text(encoding="utf-8")
    print(f"planned {planned / 2**20:.0f} MiB, by hundred {[round(peak / 2**20) for peak in peaks.values()]}")
    assert max(peaks.values()) <= 1.15 * planned
    assert peaks[2] <= 1.05 * peaks[1]
