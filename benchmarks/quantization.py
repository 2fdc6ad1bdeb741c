"""What each quantization costs the base, and what bitsandbytes' own 8-bit layers would change on top.

    python benchmarks/quantization.py         # prints a table; figures stand in benchmarks/README.md

Compared in float32 on the held-out pairs of the quickstart, answer token by answer token.
"""

from pathlib import Path

from transformers import PreTrainedModel

from qlora_dpo.cli.startup.quiet import quiet_libraries
from qlora_dpo.evaluation.merge_fidelity import compare_merged, record_trained
from qlora_dpo.evaluation.merge_texts import load_comparison_texts
from qlora_dpo.model.base import load_base
from qlora_dpo.model.device import select_device
from qlora_dpo.model.quantized import quantized_layers
from qlora_dpo.model.sources import fetch_model
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.recipe import recipe
from qlora_dpo.recipe.model import QUANTIZATION_NAMES


def main() -> None:
    """Measure and print."""
    quiet_libraries()
    asked = recipe.load_recipe("recipes/quickstart.toml").recipe
    source, here = fetch_model(asked.model), select_device("fp32")
    tokenizer = load_tokenizer(source)
    texts = load_comparison_texts(Path(), asked, tokenizer)

    def loaded(quantization: str) -> PreTrainedModel:
        return load_base(source, asked.model.model_copy(update={"quantization": quantization}), here)

    def compare(name: str, one: PreTrainedModel, other: PreTrainedModel) -> None:
        trained = record_trained(one, texts.encoded, int(tokenizer.pad_token_id or 0), here)
        found = compare_merged(trained, other, here, 0.1)
        print(f"| {name} | {found.kl:.2g} | {found.top1:.4f} |", flush=True)

    print(f"{texts.name}\n\n| | KL, nats per token | top-1 agreement |\n| --- | --- | --- |")
    dense = loaded("none")
    for quantization in QUANTIZATION_NAMES:
        compare(f"not quantized, {quantization}", dense, loaded(quantization))
    theirs = loaded("int8")
    for layer in quantized_layers(theirs).values():
        del layer.forward  # ours; what is left is bitsandbytes', which rounds the inputs too
    compare("int8, bitsandbytes' own layers in evaluation", loaded("int8"), theirs)


if __name__ == "__main__":
    main()
