"""What the reference adds to a step of the first epoch, by part, and what policy and reference could share of it.

    python benchmarks/first_epoch.py MODEL HH.jsonl.gz      # a model folder, and preference data

A step runs the reference forward, and the policy forward and backward. One layer and the head of the model, with
random weights, are timed on rows of several sizes as `qlora-dpo check` does; the last column is what the whole model
takes with the reference for each second without it. Shared by both passes are the embeddings and the first layer's
first norm, since its q, k and v have adapters.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoConfig

from qlora_dpo.cli.startup.quiet import quiet_libraries
from qlora_dpo.model import device
from qlora_dpo.planning.layer_timing import LayerTiming, measure_layer_timing
from qlora_dpo.preference.pack import Packing
from qlora_dpo.recipe import Recipe
from qlora_dpo.training.prepare import PreparedData, prepare_data

ROWS = (1024, 2048, 4096)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    quiet_libraries()
    data = {"train": asked.data, "eval_share": 0.1, "max_train_samples": 400, "max_length": 512}
    recipe = Recipe.model_validate({"model": {"name": asked.model, "quantization": "none"}, "data": data})
    prepared, here = prepare_data(recipe), device.select_device("fp32")
    config = AutoConfig.from_pretrained(asked.model)
    print(f"{here.name}, {here.compute_dtype}; microseconds a token (layer, shared part) and a state (head)")
    print("| tokens in a row | layer, forward | layer, step | head, forward | head, step | with / without |")
    print("| --- | --- | --- | --- | --- | --- |")
    pairs = prepared.train.encoded
    states = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    tokens = states + sum(len(pair.prompt) for pair in pairs)
    for row_tokens in ROWS:
        packing = replace(prepared.padded, token_budget=row_tokens, backend="spans")
        timings = [_timing(prepared, here, packing) for _ in range(asked.rounds)]
        parts = [
            statistics.median(1e6 * getattr(timing, name) for timing in timings)
            for name in ("layer_forward", "layer_step", "head_forward", "head_step")
        ]
        reference = config.num_hidden_layers * tokens * parts[0] + states * parts[2]
        policy = config.num_hidden_layers * tokens * parts[1] + states * parts[3]
        told = " | ".join(f"{part:.1f}" for part in parts)
        print(f"| {row_tokens:,} | {told} | {1 + reference / policy:.3f} |", flush=True)
    print(f"embeddings and a norm: {1e6 * _shared_seconds(config):.2f} microseconds a token, once for each pass")


def _timing(prepared: PreparedData, here: device.Device, packing: Packing) -> LayerTiming:
    return measure_layer_timing(prepared.source, prepared.recipe, here, prepared.train.encoded, packing, dense=False)


def _shared_seconds(config: Any) -> float:
    """Seconds a token of what both passes compute alike."""
    embedding, norm = torch.nn.Embedding(config.vocab_size, config.hidden_size), torch.nn.RMSNorm(config.hidden_size)
    ids = torch.randint(config.vocab_size, (2048,))
    seconds = list[float]()
    with torch.no_grad():
        for _ in range(20):
            started = time.perf_counter()
            norm(embedding(ids))
            seconds.append((time.perf_counter() - started) / len(ids))
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
