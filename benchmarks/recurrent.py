"""A step of models with recurrent layers in packed rows, each prompt once, against padded batches.

    python benchmarks/recurrent.py DATA.jsonl.gz TOKENIZER     # HH rows, and a model folder whose tokenizer writes them

Random weights of a small shape of each family, float32, LoRA on all linear layers; both variants run the same pairs
forward and backward in one process, in turn. Their gradients are compared in the first round.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from qlora_dpo.cli.startup.quiet import quiet_libraries
from qlora_dpo.data.encode import encode_pairs
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.data.mixture import parse_sources
from qlora_dpo.data.templates.chat_format import detect_chat_format
from qlora_dpo.model import device, sources
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import Packing, collate, max_sequence_tokens, micro_batches
from qlora_dpo.preference.packing_choice import choose_packing
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.recipe.model import LoraTable, ModelTable

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
LINEAR = ["linear_attention"] * 3 + ["full_attention"]
MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5 (Gated DeltaNet)": (
        "Qwen3_5TextConfig",
        {
            "layer_types": LINEAR * 2,
            "num_hidden_layers": 8,
            "head_dim": 64,
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "LFM2 (short convolutions)": (
        "Lfm2Config",
        {"layer_types": ["conv", "conv", "full_attention", "conv"] * 2, "num_hidden_layers": 8},
    ),
    "Falcon-H1 (Mamba 2 beside attention)": (
        "FalconH1Config",
        {**MAMBA, "mamba_d_ssm": 1024, "head_dim": 64, "num_hidden_layers": 6},
    ),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    quiet_libraries()
    here = device.select_device("fp32")
    tokenizer = load_tokenizer(sources.fetch_model(ModelTable(name=asked.tokenizer)))
    rows = parse_sources(DataTable(train=asked.data), "train", {}).parsed.pairs[: 8 * asked.pairs]
    encoded = [
        pair for pair in encode_pairs(rows, tokenizer, detect_chat_format(tokenizer)) if isinstance(pair, EncodedPair)
    ]
    fitting = [pair for pair in encoded if max_sequence_tokens(pair) <= asked.max_length]
    pairs = fitting[: asked.pairs]
    print(f"{here.name}, fp32, {len(pairs)} pairs; torch {torch.__version__}, transformers {transformers.__version__}")
    print("| family | padded, s | packed, s | padded / packed | gradients apart |\n| --- | --- | --- | --- | --- |")
    for name, (kind, keys) in FAMILIES.items():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**{**SHAPE, **keys, "vocab_size": len(tokenizer)})
        model = attach_lora(AutoModelForCausalLM.from_config(config, dtype=torch.float32), LoraTable(), 0)
        model.config.use_cache = False
        fuse_lora(model, torch.float32)
        for weight in (each for key, each in model.named_parameters() if "lora_B" in key):
            torch.nn.init.normal_(weight, std=0.02)
        padded = Packing(2048, 0, backend=None)
        packed, reason = choose_packing(model.eval(), pairs, padded, here)
        assert packed.backend is not None, reason
        model.train()
        seconds: dict[str, list[float]] = {"padded": [], "packed": []}
        gradients = {}
        for _ in range(asked.rounds + 1):
            for variant, packing in (("padded", padded), ("packed", packed)):
                started = time.perf_counter()
                gradients[variant] = step(model, pairs, packing, here)
                seconds[variant].append(time.perf_counter() - started)
        apart = float((gradients["packed"] - gradients["padded"]).norm() / gradients["padded"].norm())
        one, other = (statistics.median(seconds[variant][1:]) for variant in ("padded", "packed"))
        print(f"| {name} | {one:.2f} | {other:.2f} | {one / other:.2f} | {apart:.1e} |", flush=True)


def step(model: Any, pairs: list[EncodedPair], packing: Packing, here: device.Device) -> torch.Tensor:
    """The gradient of the pairs' summed margins, forward and backward."""
    model.zero_grad()
    for group in micro_batches(pairs, packing):
        scores = score_batch(model, collate([pairs[place] for place in group], packing), here)
        (scores.chosen_logp_P - scores.rejected_logp_P).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


if __name__ == "__main__":
    main()
