"""Which compute dtype a CPU should train in: bf16 against fp32 on the same 4-bit model, the same pairs, in turn.

    python benchmarks/cpu_dtype.py            # 8 pairs of the quickstart; figures stand in benchmarks/README.md
    python benchmarks/cpu_dtype.py recipes/hh.toml --set model.name=FOLDER --set data.train=HH.jsonl.gz

Each round times one forward and backward pass of the recipe's first pairs in either dtype; medians of the rounds are
compared. Exactness is the cosine between the LoRA gradients and the largest change of an answer's log-probability.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor

from qlora_dpo.cli.startup.quiet import quiet_libraries
from qlora_dpo.data.encode import load_pairs
from qlora_dpo.model.base import load_base
from qlora_dpo.model.device import select_device
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora, trainable_parameters
from qlora_dpo.model.malloc import malloc_retain
from qlora_dpo.model.packed import attention
from qlora_dpo.model.quantized import cache_dequantized
from qlora_dpo.model.sources import fetch_model
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.pack import Packing, collate
from qlora_dpo.recipe import recipe

ROUNDS = 7


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/quickstart.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    quiet_libraries()
    malloc_retain()  # as in training
    asked = recipe.load_recipe(options.recipe, options.set).recipe
    source = fetch_model(asked.model)
    tokenizer = load_tokenizer(source)
    pairs = load_pairs(asked.data, "train", tokenizer, seed=0).encoded[: options.pairs]
    packing = Packing(2048, int(tokenizer.pad_token_id or 0), "spans")
    devices = {name: select_device(name) for name in ("bf16", "fp32")}
    batches = {name: collate(pairs, packing) for name in devices}  # each keeps its masks, which have a dtype
    models = {}
    for name, here in devices.items():
        base = load_base(source, asked.model, here)
        cache_dequantized(base, here.torch_dtype)
        attention.enable_packed_attention(base)
        models[name] = attach_lora(base, asked.lora, 0)
        fuse_lora(models[name], here.torch_dtype)
    for model in models.values():  # so that gradients of lora_A are not 0
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=1e-3, generator=torch.Generator().manual_seed(len(name)))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    gradients: dict[str, Tensor] = {}
    logps: dict[str, Tensor] = {}
    for _ in range(ROUNDS + 1):
        for name, model in models.items():
            model.zero_grad()
            started = time.perf_counter()
            scores = score_batch(model, batches[name], devices[name])
            (scores.chosen_logp_P - scores.rejected_logp_P).sum().backward()
            seconds[name].append(time.perf_counter() - started)
            gradients[name] = torch.cat(
                [parameter.grad.flatten() for parameter in trainable_parameters(model).values()]
            ).double()
            logps[name] = torch.cat([scores.chosen_logp_P, scores.rejected_logp_P]).detach()
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first round warms up
    cosine = torch.nn.functional.cosine_similarity(gradients["bf16"], gradients["fp32"], dim=0).item()
    change = ((logps["bf16"] - logps["fp32"]).abs() / logps["fp32"].abs()).max().item()
    tokens = batches["fp32"].input_ids_BL.numel()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(pairs)} pairs, a row of {tokens} tokens")
    for name, median in medians.items():
        print(f"{name}: {median:.2f} s forward and backward (median of {ROUNDS})")
    print(f"fp32 / bf16: {medians['fp32'] / medians['bf16']:.2f}")
    print(f"cosine of the gradients {cosine:.6f}; largest change of a log-probability {change:.2%}")


if __name__ == "__main__":
    main()
