"""The README.md of a merged model: what it is, how close it is to the trained one, how to load it."""

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from qlora_dpo.data.dialogue import printable
from qlora_dpo.recipe_tables import is_local

BITS = {"nf4": "4-bit", "fp4": "4-bit", "int8": "8-bit"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def merged_card(record: Mapping[str, Any]) -> str:
    """The model card for the record that merge.json holds; no path of the machine it was made on is in it."""
    base = record["base"]
    data = ModelCardData(
        base_model=base["hub_id"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "merged"],
        model_name=record["adapter"],
    )
    sections = [
        f"# {_words(record['adapter'])}, merged",
        f"`{_words(base['name'])}` with the LoRA adapter `{_words(record['adapter'])}`, as one full model in"
        f" {DTYPES[record['dtype']]}. {sum_in_words(record['onto'], base['quantization'])}",
        *([_words(base["note"])] if base["note"] else []),
        "## Against the adapter model",
        f"Measured on {record['measured_on']} ({record['tokens']} answer tokens), {record['computed_in']}.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in figure_lines(record))]),
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```',
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def sum_in_words(onto: str, quantization: str) -> str:
    """One sentence on what the update was added to."""
    match onto, quantization:
        case _, "none":
            base = "the weights it was trained on"
        case "trained", _:
            base = f"the dequantized {BITS[quantization]} weights it was trained on"
        case _:
            base = f"the original weights, not the {BITS[quantization]} ones it was trained on"
    return f"The update is added to {base}, in float32, and rounded once."


def figure_lines(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures with their names, as text."""
    before, after = record["trained_accuracy"], record["merged_accuracy"]
    measured = before is not None and after is not None
    return [
        ("KL(trained, merged), nats per token", f"{record['kl']:.2g}"),
        ("top-1 agreement", f"{record['top1']:.4f}"),
        (
            "preference accuracy, trained / merged",
            f"{before:.3f} / {after:.3f}" if measured else f"not measured: {_words(record['why_no_accuracy'])}",
        ),
    ]


def public_name(name: str) -> str:
    """A base's name without the folders it lies in."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_local(name) else name


def _words(text: str) -> str:
    """Text of others on one line, without meaning to markdown or a terminal."""
    return re.sub(r"([`|<>\[\]*])", "", " ".join(printable(text).split()))
