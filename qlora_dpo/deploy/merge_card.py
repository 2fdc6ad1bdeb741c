"""The README.md of a merged model: what it is, how close it is to the trained one, how to load it."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.recipe.tables import is_local_path

BaseWeights = Literal["trained", "original"]
"""The weights that an adapter is added to: those it was trained against, or the original ones."""

METRIC_COLUMNS = (
    ("preference accuracy", "accuracy"),
    ("DPO loss at beta {beta:g}", "loss"),
    ("perplexity of chosen answers", "perplexity"),
)
DIGITS = {"accuracy": 3, "loss": 4, "perplexity": 3}
BITS = {"nf4": "4-bit", "fp4": "4-bit", "int8": "8-bit"}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def merged_card(record: Mapping[str, Any]) -> str:
    """The model card for the record in merge.json; it contains no local path."""
    base = record["base"]
    data = ModelCardData(
        base_model=base["hub_id"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "merged"],
        model_name=record["adapter"],
    )
    sections = [
        f"# {_plain(record['adapter'])}, merged",
        f"`{_plain(base['name'])}` with the LoRA adapter `{_plain(record['adapter'])}`, as one full model in"
        f" {DTYPES[record['dtype']]}. {describe_base(record['onto'], base['quantization'])}",
        *([_plain(base["note"])] if base["note"] else []),
        "## Against the adapter model",
        f"Measured on {record['measured_on']} ({record['tokens']} answer tokens), {record['computed_in']}.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in metric_lines(record))]),
        *_choice(record),
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```',
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def _choice(record: Mapping[str, Any]) -> list[str]:
    """The section with both bases side by side and the rule that chose one; empty if only one was measured."""
    if "candidates" not in record:
        return []
    head, *rows = (f"| {' | '.join(row)} |" for row in candidate_table(record["candidates"]))
    table = "\n".join([head, "|" + " --- |" * (head.count("|") - 1), *rows])
    return ["## The base it was added to", f"The rule: {record['rule']}. So: onto {record['onto']}.", table]


def describe_base(onto: BaseWeights, quantization: str) -> str:
    """One sentence about the weights that the update was added to."""
    match onto, quantization:
        case _, "none":
            base = "the weights it was trained on"
        case "trained", _:
            base = f"the dequantized {BITS[quantization]} weights it was trained on"
        case _:
            base = f"the original weights, not the {BITS[quantization]} ones it was trained on"
    return f"The update is added to {base}, in float32, and rounded once."


def metric_lines(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The metrics with their names, as text."""
    lines = [
        ("KL(trained, merged), nats per token", f"{record['kl']:.2g}"),
        ("top-1 agreement", f"{record['top1']:.4f}"),
    ]
    if (base_kl := record.get("base_kl")) is not None:
        lines.insert(1, ("KL(trained, base), nats per token", f"{base_kl:.2g}"))
    if compared := record.get("chats", {}).get("compared"):
        lines.append(("held-out chats, rendered by transformers", f"{compared} of {compared} have the trained tokens"))
    if record["why_no_accuracy"]:
        return [
            *lines,
            ("preference accuracy, trained / merged", f"not measured: {_plain(record['why_no_accuracy'])}"),
        ]
    for name, key in METRIC_COLUMNS:
        before, after = record[f"trained_{key}"], record[f"merged_{key}"]
        label = name.format(beta=record["beta"])
        lines.append((f"{label}, trained / merged", f"{before:.{DIGITS[key]}f} / {after:.{DIGITS[key]}f}"))
    return lines


def candidate_table(candidates: Mapping[BaseWeights, Mapping[str, Any]]) -> list[list[str]]:
    """The metrics of both bases and of the trained model itself, as rows of a table, header first."""
    first = next(iter(candidates.values()))
    measured = not first["why_no_accuracy"]
    trained = ("the adapter model", "trained", {**first, "kl": 0.0, "top1": 1.0})
    merged = [(f"merged onto {onto}", "merged", metrics) for onto, metrics in candidates.items()]
    rows = [["", "KL", "top-1", *(("accuracy", "loss", "perplexity") if measured else ())]]
    for name, prefix, metrics in [trained, *merged]:
        more = [f"{metrics[f'{prefix}_{key}']:.{DIGITS[key]}f}" for _, key in METRIC_COLUMNS] if measured else []
        rows.append([name, f"{metrics['kl']:.2g}", f"{metrics['top1']:.4f}", *more])
    return rows


def public_name(name: str) -> str:
    """A base's name without its parent folders."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_local_path(name) else name


def _plain(text: str) -> str:
    """Foreign text on one line, without markdown and terminal escapes."""
    return re.sub(r"([`|<>\[\]*])", "", " ".join(sanitize_text(text).split()))
