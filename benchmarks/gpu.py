"""The step on a GPU: Qwen2-0.5B's shape with random weights, against TRL, in fp16 as on a T4 and in bf16.

    python benchmarks/gpu.py                        # needs a CUDA device; tables as benchmarks/step.py prints them
    python benchmarks/gpu.py --device cpu --tiny    # the same code on a small model, to see that it runs

`fp16` is capped to what a T4 (sm_75) can do: no flash attention, no cuDNN attention, no Triton. Then the peak memory of
a step of 16 pairs under a cap of 15 GiB, for several lengths. The pairs are random ids as long as HH's.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import step
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from qlora_dpo.cli.quiet import silence
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model import device
from qlora_dpo.model.base import load_tokenizer
from qlora_dpo.model.sources import Source
from qlora_dpo.recipe_model import ModelTable
from qlora_dpo.recipe_train import TrainTable

CAP = 15 * 2**30
LENGTHS = (512, 1024, 2048)
SHAPE: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
TINY = {**SHAPE, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2} | {
    "num_attention_heads": 4
}


def main() -> None:
    """Measure and print."""
    silence()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 64")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --device cpu --tiny shows that the benchmark runs")
    with tempfile.TemporaryDirectory() as work:
        source = _model(Path(work), TINY if asked.tiny else SHAPE)
        for dtype in ("fp16", "bf16") if asked.device == "cuda" else ("bf16",):
            with _as_on_a_t4(dtype == "fp16" and asked.device == "cuda") as capped:
                _compare(source, dtype, capped, asked)
        _memory(source, asked)


def _compare(source: Source, dtype: Any, capped: bool, asked: argparse.Namespace) -> None:
    bench = _bench(source, dtype, capped, _pairs(asked.batch, 512))
    steps = step.steps_of(bench, ("trl-4", "trl-1", "trl-best", "trl-compact", "packed", "lean", "cached"))
    seconds = step.timed(bench, steps, asked.rounds + 1)
    step.report(bench, {name: taken[1:] for name, taken in seconds.items()}, 512)


def _memory(source: Source, asked: argparse.Namespace) -> None:
    """Peak memory of a step whose pairs are as long as may be."""
    print(f"\n4-bit NF4, {asked.batch} pairs a step, rows of {TrainTable().row_tokens} tokens or one pair")
    print("| longest sequence, tokens | peak, GiB |\n|---|---|")
    if asked.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / torch.cuda.get_device_properties(0).total_memory))
    for length in LENGTHS:
        dtype: Any = "fp16" if asked.device == "cuda" else "fp32"
        with _as_on_a_t4(asked.device == "cuda") as capped:
            bench = _bench(source, dtype, capped, _pairs(asked.batch, length, full=True))
            steps = step.steps_of(bench, ("cached",))
            if asked.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step.timed(bench, steps, 1)
        print(f"| {length} | {step.peak(bench.here) / 2**30:.2f} |")


def _bench(source: Source, dtype: Any, capped: bool, pairs: Sequence[EncodedPair]) -> step.Bench:
    here = device.choose(dtype)
    here = replace(here, attention="batched", triton=False) if capped else here
    tokenizer: Any = load_tokenizer(source)
    table = ModelTable(name=str(source.folder))
    return step.Bench(source, table, here, tokenizer, pairs, best=4, budget=TrainTable().row_tokens, pad=0)


@contextmanager
def _as_on_a_t4(capped: bool) -> Iterator[bool]:
    """Leave only the attention kernels that capability (7, 5) has."""
    kernels = torch.backends.cuda
    before = kernels.flash_sdp_enabled(), kernels.cudnn_sdp_enabled()
    kernels.enable_flash_sdp(before[0] and not capped)
    kernels.enable_cudnn_sdp(before[1] and not capped)
    try:
        yield capped
    finally:
        kernels.enable_flash_sdp(before[0])
        kernels.enable_cudnn_sdp(before[1])


def _model(folder: Path, shape: dict[str, Any]) -> Source:
    """A random model of this shape with a tokenizer that knows single letters."""
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**shape)).to(torch.bfloat16).save_pretrained(folder)
    letters = {"<pad>": 0, "<end>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5}
    words = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return Source("Qwen2-0.5B's shape" if shape is SHAPE else "a tiny Qwen2", folder, "")


def _pairs(count: int, longest: int, *, full: bool = False) -> list[EncodedPair]:
    """Random ids; lengths as HH's in Qwen2 tokens (medians: prompt 102, answers 50), or as long as may be if `full`."""
    draw = random.Random(0)

    def ids(length: float) -> tuple[int, ...]:
        return tuple(draw.randrange(6, 500) for _ in range(max(1, int(length))))

    pairs = []
    for row in range(count):
        prompt = ids(longest / 2) if full else ids(min(longest / 2, draw.lognormvariate(4.6, 0.8)))
        room = longest - len(prompt)
        answers = [ids(room) if full else ids(min(room, draw.lognormvariate(3.6, 0.8))) for _ in range(2)]
        pairs.append(EncodedPair(prompt, answers[0], answers[1], row, b""))
    median = statistics.median(len(pair.prompt) for pair in pairs)
    print(f"\n{count} pairs of random ids, up to {longest} tokens, median prompt {median:.0f}")
    return pairs


if __name__ == "__main__":
    main()
