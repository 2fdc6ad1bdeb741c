"""How much of an adapter a merge into 16 bits keeps: python benchmarks/merge_rounding.py ADAPTER

Prints, for the run in the folder ADAPTER, whose base is stored in bf16 and not quantized, the size of its update, what
rounding to the nearest loses of it, and the KL to the exact sum on held-out answers of the base, and of the sum rounded
in either way.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from qlora_dpo.adapter import open_adapter
from qlora_dpo.data.encode import load_pairs
from qlora_dpo.deploy.merged_weights import adapted_layers, add_delta_weight, base_layer_weight
from qlora_dpo.deploy.rounding import stochastic_round
from qlora_dpo.model.base import load_base
from qlora_dpo.model.lora import adapter_disabled

MAX_ANSWERS = 32


def main() -> None:
    """Measure the adapter that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    arguments = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    opened = open_adapter(arguments.adapter, "fp32")
    assert opened.recipe is not None and opened.table is not None
    supervised = opened.recipe.objective.loss_type == "sft"
    heldout = load_pairs(opened.recipe.data, "eval", opened.tokenizer, opened.recipe.train.seed, supervised=supervised)
    merged: nn.Module = load_base(opened.source, opened.table, opened.device)
    updates, lost, sums = [], [], {}
    for name, layer in adapted_layers(opened.model).items():
        before = base_layer_weight(layer)
        exact = add_delta_weight(layer, before.clone())
        sums[f"{name}.weight"] = exact
        updates.append(float((exact - before).norm() / before.norm()))
        lost.append(float((exact.to(dtype).float() - exact).norm() / (exact - before).norm()))
    print(f"update: {sum(updates) / len(updates):.2e} of a layer's weights")
    print(f"rounded to the nearest: off by {sum(lost) / len(lost):.0%} of the update")
    sequences = [torch.tensor([[*pair.prompt, *pair.chosen]]) for pair in heldout.encoded[:MAX_ANSWERS]]
    answers = [len(pair.chosen) for pair in heldout.encoded[:MAX_ANSWERS]]
    with torch.no_grad():
        exact_logps = [_log_probs(opened.model, ids, count) for ids, count in zip(sequences, answers, strict=True)]
        with adapter_disabled(opened.model):
            base_logps = [_log_probs(opened.model, ids, count) for ids, count in zip(sequences, answers, strict=True)]
        _print_kl("base", exact_logps, base_logps)
        for kind in ("nearest", "stochastic"):
            for name, exact in sums.items():
                rounded = exact.to(dtype) if kind == "nearest" else stochastic_round(exact, dtype, name)
                merged.get_parameter(name).data = rounded.float()
            logps = [_log_probs(merged, ids, count) for ids, count in zip(sequences, answers, strict=True)]
            _print_kl(kind, exact_logps, logps)


def _log_probs(model: nn.Module, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Log-probabilities of all tokens at the last `count` places of a sequence."""
    logits: torch.Tensor = model(ids, use_cache=False).logits[0, -count - 1 : -1].float()
    return logits.log_softmax(-1)


def _print_kl(name: str, exact: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    total = sum(float((one.exp() * (one - two)).sum()) for one, two in zip(exact, other, strict=True))
    print(f"KL(exact, {name}): {total / sum(map(len, exact)):.2e} nats a token")


if __name__ == "__main__":
    main()
