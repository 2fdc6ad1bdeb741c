"""`qlora-dpo merge`: adapter and base become one full model."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_dpo.cli.options import base_model_option
from qlora_dpo.cli.startup.libraries import import_libraries

if TYPE_CHECKING:
    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.deploy.merge import Dtype, MergeResult
    from qlora_dpo.evaluation.merge_fidelity import TrainedOutputs
    from qlora_dpo.evaluation.merge_texts import ComparisonTexts

EXPECTED_KL = 0.001
MAX_SHARE_OF_BASE_KL = 0.1
"""A merged model whose KL to the trained one is a larger share of the base's gets a sentence."""
NEGLIGIBLE_KL = 1e-6
"""Nats per token, of a run that has changed nothing that could be lost."""


@click.command("merge", short_help="Write an adapter, or several, and its base as one full model.")
@click.argument("adapters", metavar="[ADAPTER]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "output", metavar="DIR", type=click.Path(path_type=Path), help="Folder to write [merged/NAME]")
@base_model_option
@click.option("--weights", metavar="W,W", help="How much of each adapter is added, as in 0.7,0.3 [default: 1 for one]")
@click.option(
    "--onto",
    type=click.Choice(["trained", "original", "auto"]),
    default="trained",
    show_default=True,
    help="Add the update to the dequantized weights it was trained on, to the original ones, or to the better of both "
    "by a rule that is printed.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    default="bf16",
    show_default=True,
    help="What the float32 sum is rounded to, once.",
)
@click.option("--max-kl", type=click.FloatRange(min=0), help="Keep nothing above this KL to the trained model; exit 3.")
@click.option(
    "--min-agreement", type=click.FloatRange(0, 1), help="Keep nothing below this top-1 agreement with it; exit 3."
)
def merge_command(
    adapters: tuple[Path, ...],
    output: Path | None,
    weights: str | None,
    onto: Any,
    dtype: "Dtype",
    base_model: str | None,
    **thresholds: float | None,
) -> None:
    """Write ADAPTER and its base as one full model that any program loads; absent: the newest adapter.

    Several adapters of one base are added up, each with its weight, and compared on the held-out pairs of the first.

    \b
    qlora-dpo merge
    qlora-dpo merge adapters/hh -o merged/hh-best --onto auto --max-kl 0.3
    qlora-dpo merge adapters/hh adapters/tone --weights 0.7,0.3
    """
    import_libraries()
    from qlora_dpo.deploy import merge as merging
    from qlora_dpo.deploy.base_choice import MergeThresholds
    from qlora_dpo.deploy.merge_memory import check_merge_memory, estimate_merge_memory
    from qlora_dpo.deploy.weighted_adapters import parse_weights
    from qlora_dpo.model.device import TORCH_DTYPES
    from qlora_dpo.run_folder import newest_adapter

    first, *others = [folder.expanduser() for folder in adapters] or [newest_adapter()]
    adapter_weights = parse_weights([first, *others], weights)
    default = Path("merged") / "-".join(folder.resolve().name for folder in (first, *others))
    target = output.expanduser() if output else default
    merging.check_output_free(target)
    click.echo(f"merging {' and '.join(map(str, (first, *others)))} into {target}", err=True)
    opened = merging.open_for_merge(first, others, adapter_weights, base_model)
    needed = estimate_merge_memory(opened, TORCH_DTYPES[dtype], len(merging.candidate_bases(opened, onto)))
    click.echo("\n".join(needed.lines()), err=True)
    check_merge_memory(needed, opened, target)
    check = _make_checker(opened, first)
    merged = merging.merge_adapter(opened, target, onto, dtype, check, MergeThresholds(**thresholds))
    click.echo("\n".join(_result_lines(merged)))
    kl, base_kl = merged.metrics["kl"], merged.metrics["base_kl"]
    if merged.onto == "trained" and kl > max(MAX_SHARE_OF_BASE_KL * base_kl, NEGLIGIBLE_KL):
        click.echo(
            f"the merged model's KL to the trained one is {kl / base_kl:.0%} of the base's: rounding costs that much "
            "of what training has changed, and --dtype fp32 nothing",
            err=True,
        )
    if merged.onto == "trained" and merged.metrics["kl"] > EXPECTED_KL:
        click.echo(f"the KL is above the {EXPECTED_KL} that rounding explains; --dtype fp32 shows why", err=True)


def _make_checker(opened: "OpenedModel", folder: Path) -> "Callable[[Path], dict[str, Any]]":
    """A check that compares a written model with the adapter model, which its first call frees."""
    from functools import cache

    from qlora_dpo.evaluation.merge_fidelity import free_weights, record_trained
    from qlora_dpo.evaluation.merge_texts import load_comparison_texts

    @cache
    def trained_outputs() -> "tuple[ComparisonTexts, TrainedOutputs]":
        texts = load_comparison_texts(folder, opened.recipe, opened.tokenizer)
        click.echo(f"comparing on {texts.name}", err=True)
        outputs = record_trained(opened.model, texts.encoded, opened.tokenizer.pad_token_id or 0, opened.device)
        free_weights(outputs)
        return texts, outputs

    def check(written: Path) -> dict[str, Any]:
        return _compare_with_trained(opened, *trained_outputs(), written)

    return check


def _compare_with_trained(
    opened: "OpenedModel", texts: "ComparisonTexts", trained_outputs: "TrainedOutputs", written: Path
) -> dict[str, Any]:
    """Load the written model and compare it with the adapter model's outputs."""
    from dataclasses import asdict

    from qlora_dpo.evaluation.merge_chats import compare_chats, write_chats
    from qlora_dpo.evaluation.merge_fidelity import compare_merged
    from qlora_dpo.model.base import load_base
    from qlora_dpo.model.sources import ModelSource
    from qlora_dpo.recipe.model import ModelTable
    from qlora_dpo.talk.reward import adapter_beta

    unquantized = ModelTable(name=str(written), quantization="none")
    full = load_base(ModelSource("the merged model", written), unquantized, opened.device)
    beta = adapter_beta(opened.recipe)
    device = opened.device
    metrics = asdict(compare_merged(trained_outputs, full, device, beta))
    exact = ", so that only the weights differ" if device.compute_dtype == "fp32" else ", whose rounding adds to the KL"
    if texts.chats:
        write_chats(written, texts.chats)
    if texts.why_no_accuracy:
        metrics |= {name: None for name in metrics if name.startswith(("trained_", "merged_"))}
    return metrics | {
        "beta": beta,
        "measured_on": texts.name,
        "computed_in": f"both models computed in {device.compute_dtype} on {device.type.upper()}{exact}",
        "why_no_accuracy": texts.why_no_accuracy,
        "chats": asdict(compare_chats(written, texts.chats)),
    }


def _result_lines(merged: "MergeResult") -> list[str]:
    """The written files, how the model compares, and the next command."""
    from qlora_dpo.data.dialogue import sanitize_text
    from qlora_dpo.deploy.base_choice import RULE
    from qlora_dpo.deploy.merge_card import candidate_table, describe_base, metric_lines

    name = shlex.quote(str(merged.folder))
    files = "1 file" if merged.shards == 1 else f"{merged.shards} files"
    lines = metric_lines(merged.metrics)
    compared = f"{merged.metrics['measured_on']} ({merged.metrics['tokens']:,} answer tokens)"
    width = max(len(label) for label, _ in lines) + 3
    several = len(merged.candidates) > 1
    return [
        f"{merged.folder}: {merged.bytes / 1e6:,.1f} MB of {merged.dtype} weights in {files}",
        describe_base(merged.onto, merged.quantization),
        "",
        f"Compared with the adapter model on {compared},",
        f"{merged.metrics['computed_in']}:",
        *(sanitize_text(f"  {label:<{width}}{value}") for label, value in lines),
        *(["", *_align_columns(candidate_table(merged.candidates)), f"The rule: {RULE}."] if several else []),
        "",
        f"qlora-dpo chat {name}   # talk to it",
    ]


def _align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as aligned lines."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
