"""`qlora-dpo merge`: adapter and base become one full model."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.deploy.merge import Dtype, MergeResult
    from qlora_dpo.evaluation.merge_fidelity import TrainedOutputs
    from qlora_dpo.evaluation.merge_texts import ComparisonTexts
    from qlora_dpo.recipe import Recipe

EXPECTED_KL = 0.001


@click.command("merge", short_help="Write an adapter, or several, and its base as one full model.")
@click.argument("adapters", metavar="[ADAPTER]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "output", metavar="DIR", type=click.Path(path_type=Path), help="Folder to write [merged/NAME]")
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
    max_kl: float | None,
    min_agreement: float | None,
) -> None:
    """Write ADAPTER and its base as one full model that any program loads; absent: the newest adapter.

    Several adapters of one base are added up, each with its weight, and compared on the held-out pairs of the first.

    \b
    qlora-dpo merge
    qlora-dpo merge adapters/hh -o merged/hh-best --onto auto --max-kl 0.3
    qlora-dpo merge adapters/hh adapters/tone --weights 0.7,0.3
    """
    from qlora_dpo.deploy import merge as merging
    from qlora_dpo.deploy.base_choice import MergeThresholds
    from qlora_dpo.deploy.merge_memory import check_merge_memory, estimate_merge_memory
    from qlora_dpo.deploy.weighted_adapters import parse_weights, weighted_name
    from qlora_dpo.model.device import TORCH_DTYPES
    from qlora_dpo.run_folder import newest_adapter

    first, *others = [each.expanduser() for each in adapters] or [newest_adapter()]
    each_weight = parse_weights([first, *others], weights)
    target = (
        output.expanduser() if output else Path("merged") / "-".join(each.resolve().name for each in (first, *others))
    )
    merging.check_output_free(target)
    click.echo(f"merging {' and '.join(map(str, (first, *others)))} into {target}", err=True)
    opened = merging.open_for_merge(first, others, each_weight)
    room = estimate_merge_memory(opened, TORCH_DTYPES[dtype], len(merging.candidate_bases(opened, onto)))
    click.echo("\n".join(room.lines()), err=True)
    check_merge_memory(room, opened, target)
    bars = MergeThresholds(max_kl, min_agreement)
    name = weighted_name([first, *others], each_weight) if weights else None
    merged = merging.merge_adapter(opened, target, onto, dtype, _make_checker(opened, first), bars, name)
    click.echo("\n".join(_result_lines(merged)))
    if merged.onto == "trained" and merged.figures["kl"] > EXPECTED_KL:
        click.echo(f"the KL is above the {EXPECTED_KL} that rounding explains; --dtype fp32 shows why", err=True)


def _make_checker(opened: "OpenedModel", folder: Path) -> "Callable[[Path], dict[str, Any]]":
    """What loads a model that was written and compares it with the adapter model, which is let go at the first call."""
    from functools import cache

    from qlora_dpo.evaluation.merge_fidelity import free_weights, record_trained
    from qlora_dpo.evaluation.merge_texts import load_comparison_texts

    @cache
    def trained_outputs() -> "tuple[ComparisonTexts, TrainedOutputs]":
        texts = load_comparison_texts(folder, opened.recipe, opened.tokenizer)
        click.echo(f"comparing on {texts.name}", err=True)
        seen = record_trained(opened.model, texts.encoded, opened.tokenizer.pad_token_id or 0, opened.device)
        free_weights(seen)
        return texts, seen

    def check(written: Path) -> dict[str, Any]:
        texts, seen = trained_outputs()
        return _compare_with_trained(opened, texts, seen, written)

    return check


def _compare_with_trained(
    opened: "OpenedModel", texts: "ComparisonTexts", trained_outputs: "TrainedOutputs", written: Path
) -> dict[str, Any]:
    """Load the model that was written and compare it with what the adapter model said."""
    from dataclasses import asdict

    from qlora_dpo.evaluation.merge_fidelity import compare_merged
    from qlora_dpo.model.base import load_base
    from qlora_dpo.model.sources import ModelSource
    from qlora_dpo.recipe.model import ModelTable

    plain = ModelTable(name=str(written), quantization="none")
    full = load_base(ModelSource("the merged model", written, ""), plain, opened.device)
    beta = _beta_or_default(opened.recipe)
    found = asdict(compare_merged(trained_outputs, full, opened.device, beta))
    here = opened.device
    exact = ", so that only the weights differ" if here.compute_dtype == "fp32" else ", whose rounding adds to the KL"
    if texts.why_no_accuracy:
        found |= {name: None for name in found if name.startswith(("trained_", "merged_"))}
    return found | {
        "beta": beta,
        "measured_on": texts.name,
        "computed_in": f"both models computed in {here.compute_dtype} on {here.type.upper()}{exact}",
        "why_no_accuracy": texts.why_no_accuracy,
    }


def _beta_or_default(recipe: "Recipe | None") -> float:
    """The run's beta; DPO's own where its loss has none."""
    from qlora_dpo.recipe.objective import Sigmoid

    return getattr(recipe and recipe.objective, "beta", None) or Sigmoid().beta


def _result_lines(merged: "MergeResult") -> list[str]:
    """What was written, how it compares, and what to type next."""
    from qlora_dpo.data.dialogue import sanitize_text
    from qlora_dpo.deploy.base_choice import RULE
    from qlora_dpo.deploy.merge_card import candidate_table, describe_base, metric_lines

    name = shlex.quote(str(merged.folder))
    files = "1 file" if merged.shards == 1 else f"{merged.shards} files"
    lines = metric_lines(merged.figures)
    compared = f"{merged.figures['measured_on']} ({merged.figures['tokens']:,} answer tokens)"
    width = max(len(label) for label, _ in lines) + 3
    both = len(merged.candidates) > 1
    return [
        f"{merged.folder}: {merged.bytes / 1e6:,.1f} MB of {merged.dtype} weights in {files}",
        describe_base(merged.onto, merged.quantization),
        "",
        f"Compared with the adapter model on {compared},",
        f"{merged.figures['computed_in']}:",
        *(sanitize_text(f"  {label:<{width}}{value}") for label, value in lines),
        *(["", *_align_columns(candidate_table(merged.candidates)), f"The rule: {RULE}."] if both else []),
        "",
        f"qlora-dpo chat {name}   # talk to it",
    ]


def _align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as aligned lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
