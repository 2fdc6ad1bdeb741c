"""`qlora-dpo eval`: the metrics of an adapter on held-out pairs, and a gate."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_dpo.cli.options import base_model_option, dtype_option
from qlora_dpo.cli.startup.libraries import import_libraries

if TYPE_CHECKING:
    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.data.encode import PairSet
    from qlora_dpo.data.encoded import EncodedPair
    from qlora_dpo.recipe import Recipe
    from qlora_dpo.recipe.data import DataTable
    from qlora_dpo.recipe.objective import Objective
    from qlora_dpo.talk.judge import Judge


@click.command("eval", short_help="Evaluate an adapter on its held-out pairs.")
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
@click.option("--data", metavar="FILE", help="Pairs to use instead of the run's: a file, folder or hub data set.")
@click.option("--split", metavar="NAME", help="Another split of a hub data set or folder. [the recipe's]")
@click.option("--max-pairs", metavar="N", type=click.IntRange(min=1), help="Evaluate N pairs drawn at random. [all]")
@click.option("--max-length", metavar="N", type=click.IntRange(min=1), help="Longest pair, in tokens. [the recipe's]")
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Plain text on which to compare the perplexity of base and tuned model, to see forgetting.",
)
@click.option(
    "--min-accuracy", metavar="X", type=click.FloatRange(0, 1), help="Exit with 3 if the accuracy is below X."
)
@click.option(
    "--judge",
    metavar="CMD|URL",
    help="OpenAI-compatible server, or command that reads stdin, to compare answers of tuned and base model.",
)
@click.option("--judge-model", metavar="NAME", help="Model of the server to use as judge.")
@click.option(
    "--judge-prompts",
    metavar="N",
    default=50,
    show_default=True,
    type=click.IntRange(min=1),
    help="Number of held-out prompts to answer and judge, with two requests each.",
)
@click.option(
    "--tasks", metavar="NAME,...", help="Tasks of lm-eval to run on base and tuned model (needs the extra `tasks`)."
)
@click.option(
    "--task-limit", metavar="N", type=click.IntRange(min=1), help="Largest number of rows of each task. [all]"
)
@click.option(
    "--task-path",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder with tasks of your own as YAML files; they can run code.",
)
@click.option(
    "--max-new-tokens",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest answer to judge, in tokens.",
)
@dtype_option
@base_model_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def eval_command(
    adapter: Path | None,
    data: str | None,
    split: str | None,
    max_pairs: int | None,
    max_length: int | None,
    texts: tuple[Path, ...],
    min_accuracy: float | None,
    dtype: str,
    as_json: bool,
    judge: str | None,
    tasks: str | None,
    base_model: str | None,
    **judge_and_task_options: Any,
) -> None:
    """Evaluate ADAPTER, by default the newest one, and its base on all held-out pairs of its run.

    Prints accuracy with its 95 % interval, by length and controlled for length, loss, margin, calibration, KL to the
    base, and perplexity on the chosen answers; with --judge also how often the tuned model's greedy answers win against
    the base's. OPENAI_API_KEY is sent to the judge's server if it is set.

    \b
    qlora-dpo eval adapters/hh
    qlora-dpo eval adapters/hh --judge http://127.0.0.1:8000/v1 --judge-model NAME
    qlora-dpo eval adapters/hh --data pairs.jsonl --text novel.txt --min-accuracy 0.6 --json
    """
    import_libraries()
    from qlora_dpo.adapter import open_adapter
    from qlora_dpo.errors import GateError, RecipeError
    from qlora_dpo.evaluation.lm_eval_tasks import evaluate_tasks, make_task_manager
    from qlora_dpo.run_folder import newest_adapter, read_run_metadata
    from qlora_dpo.talk.judge import make_judge

    if judge is None and judge_and_task_options["judge_model"] is not None:
        raise click.UsageError("--judge-model needs --judge")
    judge_client = make_judge(judge, judge_and_task_options["judge_model"]) if judge is not None else None
    task_names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    manager = make_task_manager(task_names, judge_and_task_options["task_path"]) if task_names else None
    folder = newest_adapter() if adapter is None else adapter.expanduser()
    _check_is_adapter(folder)
    contents = {str(file): _read_plain_text(file) for file in texts}
    table, part = _eval_data_table(folder, read_run_metadata(folder, base_model)[2], data, split, max_pairs)
    if max_length is not None:
        table = table.model_copy(update={"max_length": max_length})
    opened = open_adapter(folder, dtype, base_model)
    pair_set = _load_eval_pairs(opened, table, part)
    if min_accuracy is not None and not pair_set.pairs[0].rejected:
        raise RecipeError(
            f"{pair_set.audit.source}: its rows have one answer each, so --min-accuracy has nothing to judge"
        )
    metrics = _compute_metrics(opened, pair_set, contents)
    if judge_client is not None:
        max_prompts, max_new_tokens = judge_and_task_options["judge_prompts"], judge_and_task_options["max_new_tokens"]
        metrics["judge"] = _judge_completions(opened, pair_set, judge_client, max_prompts, max_new_tokens)
    if manager is not None:
        model, tokenizer, device = opened.model, opened.tokenizer, opened.device
        limit = judge_and_task_options["task_limit"]
        metrics["tasks"] = evaluate_tasks(model, tokenizer, device, manager, task_names, limit)
    if as_json:
        click.echo(json.dumps({"adapter": str(folder), **metrics}, ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        from qlora_dpo.report.eval_tables import eval_metric_tables

        Console().print(eval_metric_tables(metrics))
    if min_accuracy is not None and metrics["accuracy"] < min_accuracy:
        raise GateError(
            f"{folder}: the accuracy {metrics['accuracy']:.4f} of {metrics['pairs']} pairs is below --min-accuracy "
            f"{min_accuracy:g}"
        )


def _check_is_adapter(folder: Path) -> None:
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME

    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        problem = "is no adapter" if folder.is_dir() else "there is no such folder"
        raise RecipeError(
            f"{folder}: {problem}; eval compares an adapter with its base, so name the folder of a run, as in "
            "adapters/hh"
        )


def _read_plain_text(file: Path) -> str:
    """The text of `file`; raises RecipeError if it is empty, not UTF-8 or cannot be read."""
    from qlora_dpo.errors import RecipeError

    try:
        text = file.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: is not UTF-8 text (byte {error.start}); --text takes plain text") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}; --text takes plain text") from error
    if not text.strip():
        raise RecipeError(f"{file}: is empty; --text takes plain text")
    return text


def _eval_data_table(
    folder: Path, recipe: "Recipe | None", data: str | None, split: str | None, max_pairs: int | None
) -> "tuple[DataTable, Any]":
    """The data to read, and as which part; raises RecipeError for options that contradict each other."""
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.recipe.data import DataTable
    from qlora_dpo.recipe.tables import has_data_suffix

    run_data = recipe.data if recipe is not None else None
    if data is None:
        if run_data is None:
            raise RecipeError(f"{folder}: comes without a recipe, so its held-out pairs are not known; add --data")
        if split is not None and run_data.effective_eval_share is not None:
            raise RecipeError(
                "--split: this run holds out a share of its training pairs, which have no split; leave it out"
            )
        eval_split = {"eval_split": split} if split else {}
        return run_data.model_copy(update={"max_eval_samples": max_pairs, **eval_split}), "eval"
    may_hold_splits = data.lower().endswith((".json", ".json.gz"))
    if split is not None and has_data_suffix(data) and not may_hold_splits:
        raise RecipeError(f"--split {split}: {data} is one file and has no splits; leave it out")
    path = Path(data).expanduser()
    name = str(path.resolve()) if path.exists() else data
    table = run_data or DataTable(train=name, eval=f"{name}/")
    default_split = "train" if path.is_file() or has_data_suffix(data) else table.eval_split
    return table.model_copy(
        update={
            "train": name,
            "train_split": split or default_split,
            "eval": f"{name}/",  # any other name, so that no share of the pairs is held out
            "eval_share": None,
            "format": "auto",
            "max_train_samples": max_pairs,
            "revision": table.revision if run_data and name in (run_data.train, run_data.eval) else None,
        }
    ), "train"


def _load_eval_pairs(opened: "OpenedModel", table: "DataTable", part: Any) -> "PairSet":
    from qlora_dpo.data.audit import check_bad_share
    from qlora_dpo.data.encode import load_pairs
    from qlora_dpo.training.loss_columns import column_keys

    seed = opened.recipe.train.seed if opened.recipe is not None else 0
    objective = _objective_or_default(opened)
    supervised = objective.loss_type == "sft"
    pairs = load_pairs(table, part, opened.tokenizer, seed, column_keys(objective), supervised=supervised)
    click.echo("\n".join(pairs.audit.lines()), err=True)
    check_bad_share(pairs.audit, table.max_bad_share)
    run_data = opened.recipe.data if opened.recipe is not None else None
    if part == "train" and run_data and (run_data.train, run_data.train_split) == (table.train, table.train_split):
        click.echo("the adapter was trained on pairs of this source: the figures say little about others", err=True)
    return pairs


def _judge_completions(
    opened: "OpenedModel", pair_set: "PairSet", judge: "Judge", max_prompts: int, max_new_tokens: int
) -> dict[str, Any]:
    """Win rates of the tuned model's answers to the first `max_prompts` distinct prompts."""
    from qlora_dpo.model.lora import adapter_disabled
    from qlora_dpo.talk.generate import generate_greedy
    from qlora_dpo.talk.judge import CompletionPair, judge_pairs, judge_prompts, pairs_to_judge

    prompts = list({json.dumps(pair.prompt): pair.prompt for pair in pair_set.pairs}.values())[:max_prompts]
    click.echo(f"answering {len(prompts)} prompts with base and tuned model", err=True)
    with opened.device.autocast():
        tuned = generate_greedy(opened.model, opened.tokenizer, prompts, max_new_tokens)
        with adapter_disabled(opened.model):
            base = generate_greedy(opened.model, opened.tokenizer, prompts, max_new_tokens)
    pairs = [CompletionPair(prompt, a.text, b.text) for prompt, a, b in zip(prompts, tuned, base, strict=True)]
    different = pairs_to_judge(pairs)
    requests, equal = 2 * len(different), len(pairs) - len(different)
    characters = sum(len(request) for pair in different for request in judge_prompts(pair))
    note = f"; {equal} prompts have equal answers and need none" if equal else ""
    click.echo(f"the judge gets {requests} requests with {characters:,} characters in all{note}", err=True)
    with click.progressbar(length=requests, label="judging", file=sys.stderr) as bar:
        return judge_pairs(pairs, judge, bar.update)


def _objective_or_default(opened: "OpenedModel") -> "Objective":
    """The run's objective; DPO for an adapter that was trained elsewhere."""
    from qlora_dpo.recipe.objective import Sigmoid

    return opened.recipe.objective if opened.recipe is not None else Sigmoid()


def _compute_metrics(opened: "OpenedModel", pair_set: "PairSet", contents: dict[str, str]) -> dict[str, Any]:
    """Every metric, with the data, objective and dtype that it was measured with."""
    from qlora_dpo.data.encoded import have_rejected, pairs_without_rejected
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.evaluation.adapter_eval import MAX_TEXT_WINDOW, EvalPairs, score_adapter, score_text, text_windows
    from qlora_dpo.evaluation.eval_metrics import compute_eval_metrics
    from qlora_dpo.preference.pack import Packing
    from qlora_dpo.preference.packing_choice import choose_packing
    from qlora_dpo.preference.reference_cache import ReferenceLogpCache, reference_cache_dir
    from qlora_dpo.recipe.train import TrainTable
    from qlora_dpo.talk.generate import context_tokens
    from qlora_dpo.training.loss_columns import read_loss_columns

    model, device, objective = opened.model, opened.device, _objective_or_default(opened)
    table = opened.table
    assert table is not None  # noqa: S101 - an adapter has one
    row_tokens = (opened.recipe.train if opened.recipe is not None else TrainTable()).row_tokens
    window = min(MAX_TEXT_WINDOW, context_tokens(model) or MAX_TEXT_WINDOW)
    windows: dict[str, list[EncodedPair]] = {}
    for name, text in contents.items():
        ids = opened.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows[name] = text_windows(tuple(ids), window)
        if not windows[name]:
            raise RecipeError(f"{name}: has {len(ids)} tokens; --text needs at least two")
    encoded = pair_set.encoded if have_rejected(pair_set.encoded) else pairs_without_rejected(pair_set.encoded)
    sequences = [*encoded, *(window for text in windows.values() for window in text)]
    padded = Packing(row_tokens, int(opened.tokenizer.pad_token_id or 0), backend=None)
    packing, reason = choose_packing(model, sequences, padded, device)
    click.echo(f"layout: {reason}", err=True)
    pairs = EvalPairs(encoded, read_loss_columns(pair_set.pairs, objective), objective)
    count = len(encoded)
    with click.progressbar(
        length=3 * count, label=f"scoring {count} pairs with base and tuned model", file=sys.stderr
    ) as bar:
        scores = score_adapter(
            model,
            pairs,
            packing,
            lambda weighting: ReferenceLogpCache(reference_cache_dir(opened.source, table, device, weighting)),
            device,
            bar.update,
        )
    texts = {name: score_text(model, text, packing, device) for name, text in windows.items()}
    return {
        "data": {
            "source": pair_set.audit.source,
            "rows": pair_set.audit.rows,
            "used": pair_set.audit.used,
            "dropped": {reason: len(rows) for reason, rows in pair_set.audit.dropped.items()},
        },
        "objective": objective.model_dump(exclude_none=True),
        "computed_in": f"{device.compute_dtype} on {device.type.upper()}",
        **compute_eval_metrics(scores, encoded, objective, texts),
    }
