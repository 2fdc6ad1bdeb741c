"""`qlora-dpo merge`: adapter and base become one full model."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qlora_dpo.adapter import Opened
    from qlora_dpo.deploy.merge import Dtype, Merged, Onto

EXPECTED_KL = 0.001


@click.command(short_help="Write an adapter and its base as one full model.")
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
@click.option("-o", "output", metavar="DIR", type=click.Path(path_type=Path), help="Folder to write [merged/NAME]")
@click.option(
    "--onto",
    type=click.Choice(["trained", "original"]),
    default="trained",
    show_default=True,
    help="Add the update to the dequantized weights it was trained on, or to the original ones.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="What the float32 sum is rounded to, once.",
)
def merge(adapter: Path | None, output: Path | None, onto: "Onto", dtype: "Dtype") -> None:
    """Write ADAPTER and its base as one full model that any program loads; absent: the newest adapter.

    \b
    qlora-dpo merge
    qlora-dpo merge adapters/hh -o merged/hh-original --onto original
    """
    from qlora_dpo.adapter import newest
    from qlora_dpo.deploy import merge as merging

    folder = newest() if adapter is None else adapter.expanduser()
    target = output.expanduser() if output else Path("merged") / folder.resolve().name
    merging.claim(target)
    click.echo(f"merging {folder} into {target}", err=True)
    opened = merging.open_for_merge(folder)
    merged = merging.merge(opened, target, onto, dtype, lambda written: _figures(opened, folder, written))
    click.echo("\n".join(_result(merged)))
    if onto == "trained" and merged.figures["kl"] > EXPECTED_KL:
        click.echo(f"the KL is above the {EXPECTED_KL} that rounding explains; --dtype fp32 shows why", err=True)


def _figures(opened: "Opened", folder: Path, written: Path) -> dict[str, Any]:
    """Load the model that was written and compare it with the adapter model."""
    from dataclasses import asdict

    from qlora_dpo.model.base import load_base
    from qlora_dpo.model.sources import Source
    from qlora_dpo.recipe_model import ModelTable
    from qlora_dpo.training.agreement import measure
    from qlora_dpo.training.yardstick import texts_for

    texts = texts_for(folder, opened.recipe, opened.tokenizer)
    click.echo(f"comparing on {texts.name}", err=True)
    plain = ModelTable(name=str(written), quantization="none")
    full = load_base(Source("the merged model", written, ""), plain, opened.device)
    found = measure(opened.model, full, texts.encoded, opened.tokenizer.pad_token_id or 0, opened.device)
    here = opened.device
    exact = ", so that only the weights differ" if here.compute_dtype == "fp32" else ", whose rounding adds to the KL"
    figures = asdict(found) | {
        "measured_on": texts.name,
        "computed_in": f"both models computed in {here.compute_dtype} on {here.type.upper()}{exact}",
        "why_no_accuracy": texts.why_no_accuracy,
    }
    return figures | ({"trained_accuracy": None, "merged_accuracy": None} if texts.why_no_accuracy else {})


def _result(merged: "Merged") -> list[str]:
    """What was written, how it compares, and what to type next."""
    from qlora_dpo.data.dialogue import printable
    from qlora_dpo.deploy.card import figure_lines, sum_in_words

    name = shlex.quote(str(merged.folder))
    files = "1 file" if merged.shards == 1 else f"{merged.shards} files"
    lines = figure_lines(merged.figures)
    compared = f"{merged.figures['measured_on']} ({merged.figures['tokens']:,} answer tokens)"
    width = max(len(label) for label, _ in lines) + 3
    chat = f"qlora-dpo chat {name}"
    return [
        f"{merged.folder}: {merged.bytes / 1e6:,.1f} MB of {merged.dtype} weights in {files}",
        sum_in_words(merged.onto, merged.quantization),
        "",
        f"Compared with the adapter model on {compared},",
        f"{merged.figures['computed_in']}:",
        *(printable(f"  {label:<{width}}{value}") for label, value in lines),
        "",
        f"{chat}   # talk to it",
    ]
