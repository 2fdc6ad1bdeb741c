"""`qlora-dpo eval`: the figures of an adapter on all of its held-out pairs, and a gate."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.data.encode import PairSet
    from qlora_dpo.data.encoded import EncodedPair
    from qlora_dpo.recipe import Recipe
    from qlora_dpo.recipe.data import DataTable
    from qlora_dpo.recipe.objective import Objective
    from qlora_dpo.talk.judge import Judge


@click.command("eval", short_help="Judge an adapter on its held-out pairs.")
@click.argument("adapter", required=False, type=click.Path(path_type=Path))
@click.option("--data", metavar="FILE", help="Other pairs than the run's: a file, folder or hub data set.")
@click.option("--split", metavar="NAME", help="Another split of a hub data set or folder. [the recipe's]")
@click.option("--max-pairs", metavar="N", type=click.IntRange(min=1), help="Draw N pairs. [all]")
@click.option("--max-length", metavar="N", type=click.IntRange(min=1), help="Longest pair, in tokens. [the recipe's]")
@click.option(
    "--text",
    "texts",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Plain text of which base and tuned model's perplexity is compared: what is forgotten.",
)
@click.option(
    "--min-accuracy", metavar="X", type=click.FloatRange(0, 1), help="Exit with 3 if the accuracy is below X."
)
@click.option(
    "--judge",
    metavar="CMD|URL",
    help="Let an OpenAI-compatible server, or a command that reads stdin, judge answers of tuned and base model.",
)
@click.option("--judge-model", metavar="NAME", help="The server's model that judges.")
@click.option(
    "--judge-prompts",
    metavar="N",
    default=50,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many held-out prompts are answered and judged, each in two requests.",
)
@click.option(
    "--tasks", metavar="NAME,...", help="Tasks of lm-eval for base and tuned model (needs the extra `tasks`)."
)
@click.option("--task-limit", metavar="N", type=click.IntRange(min=1), help="Rows of each task. [all]")
@click.option(
    "--task-path",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Tasks of your own, as YAML files, which can run code.",
)
@click.option(
    "--max-new-tokens",
    default=256,
    show_default=True,
    type=click.IntRange(min=1),
    help="Longest answer that is judged, in tokens.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    show_default=True,
    help="What both models compute in.",
)
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
    **judge_and_task_options: Any,
) -> None:
    """Judge ADAPTER on all held-out pairs of its run, against its base; absent: the newest adapter.

    Accuracy with its 95 % interval, by length and with length taken out, loss, margin, calibration, KL to the base, and
    perplexity on the chosen answers. With --judge, also how often the tuned model's greedy answers win
    against the base's; OPENAI_API_KEY goes to the server if it is set.

    \b
    qlora-dpo eval adapters/hh
    qlora-dpo eval adapters/hh --judge http://127.0.0.1:8000/v1 --judge-model NAME
    qlora-dpo eval adapters/hh --data pairs.jsonl --text novel.txt --min-accuracy 0.6 --json
    """
    from qlora_dpo.adapter import open_adapter
    from qlora_dpo.errors import GateError
    from qlora_dpo.evaluation.lm_eval_tasks import evaluate_tasks, make_task_manager
    from qlora_dpo.run_folder import newest_adapter, read_run_metadata
    from qlora_dpo.talk.judge import make_judge

    if judge is None and judge_and_task_options["judge_model"] is not None:
        raise click.UsageError("--judge-model needs --judge")
    asked = make_judge(judge, judge_and_task_options["judge_model"]) if judge is not None else None
    names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    manager = make_task_manager(names, judge_and_task_options["task_path"]) if names else None
    folder = newest_adapter() if adapter is None else adapter.expanduser()
    _check_is_adapter(folder)
    contents = {str(file): _read_plain_text(file) for file in texts}
    table, part = _eval_data_table(folder, read_run_metadata(folder)[2], data, split, max_pairs)
    if max_length is not None:
        table = table.model_copy(update={"max_length": max_length})
    opened = open_adapter(folder, dtype)
    side = _load_eval_pairs(opened, table, part)
    found = _compute_metrics(opened, side, contents)
    if asked is not None:
        found["judge"] = _judge_completions(
            opened, side, asked, judge_and_task_options["judge_prompts"], judge_and_task_options["max_new_tokens"]
        )
    if manager is not None:
        model, tokenizer, device = opened.model, opened.tokenizer, opened.device
        found["tasks"] = evaluate_tasks(
            model, tokenizer, device, manager, names, judge_and_task_options["task_limit"], _echo_stderr
        )
    if as_json:
        click.echo(json.dumps({"adapter": str(folder), **found}, ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        from qlora_dpo.report.eval_tables import eval_metric_tables

        Console().print(eval_metric_tables(found))
    if min_accuracy is not None and found["accuracy"] < min_accuracy:
        raise GateError(
            f"{folder}: the accuracy {found['accuracy']:.4f} of {found['pairs']} pairs is below --min-accuracy "
            f"{min_accuracy:g}"
        )


def _echo_stderr(words: str) -> None:
    click.echo(words, err=True)


def _check_is_adapter(folder: Path) -> None:
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME

    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        what = "is no adapter" if folder.is_dir() else "there is no such folder"
        raise RecipeError(
            f"{folder}: {what}; eval compares an adapter with its base, so name the folder of a run, as in adapters/hh"
        )


def _read_plain_text(file: Path) -> str:
    """The text of `file`; raises RecipeError if there is none."""
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
    """What to read, and as which part; raises RecipeError where the options do not fit together."""
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.recipe.data import DataTable
    from qlora_dpo.recipe.tables import DATA_SUFFIXES

    own = recipe.data if recipe is not None else None
    if data is None:
        if own is None:
            raise RecipeError(f"{folder}: comes without a recipe, so its held-out pairs are not known; add --data")
        if split is not None and own.effective_eval_share is not None:
            raise RecipeError(
                "--split: this run holds out a share of its training pairs, which have no split; leave it"
            )
        chosen = {"eval_split": split} if split else {}
        return own.model_copy(update={"max_eval_samples": max_pairs, **chosen}), "eval"
    if split is not None and data.endswith(DATA_SUFFIXES):
        raise RecipeError(f"--split {split}: {data} is one file and has no splits; leave it out")
    place = Path(data).expanduser()
    name = str(place.resolve()) if place.exists() else data
    start = own or DataTable(train=name, eval=f"{name}/")
    default = "train" if place.is_file() or data.endswith(DATA_SUFFIXES) else start.eval_split
    return start.model_copy(
        update={
            "train": name,
            "train_split": split or default,
            "eval": f"{name}/",  # all of them are read, none held out
            "eval_share": None,
            "format": "auto",
            "max_train_samples": max_pairs,
            "revision": start.revision if own and name in (own.train, own.eval) else None,
        }
    ), "train"


def _load_eval_pairs(opened: "OpenedModel", table: "DataTable", part: Any) -> "PairSet":
    from qlora_dpo.data.audit import check_bad_share
    from qlora_dpo.data.encode import load_pairs
    from qlora_dpo.training.loss_columns import column_keys

    seed = opened.recipe.train.seed if opened.recipe is not None else 0
    pairs = load_pairs(table, part, opened.tokenizer, seed, column_keys(_objective_or_default(opened)))
    click.echo("\n".join(pairs.audit.lines()), err=True)
    check_bad_share(pairs.audit, table.max_bad_share)
    trained = opened.recipe.data if opened.recipe is not None else None
    if part == "train" and trained and (trained.train, trained.train_split) == (table.train, table.train_split):
        click.echo("it was trained on pairs of this source: the figures say little of other pairs", err=True)
    return pairs


def _judge_completions(
    opened: "OpenedModel", pair_set: "PairSet", judge: "Judge", max_prompts: int, max_new_tokens: int
) -> dict[str, Any]:
    """Win rates on the answers to the first prompts, each prompt once."""
    from qlora_dpo.model.lora import adapter_disabled
    from qlora_dpo.talk.generate import generate_greedy
    from qlora_dpo.talk.judge import CompletionPair, judge_pairs, judge_prompts, pairs_to_judge

    prompts = list({json.dumps(pair.prompt): pair.prompt for pair in pair_set.pairs}.values())[:max_prompts]
    click.echo(f"base and tuned model answer {len(prompts)} prompts", err=True)
    with opened.device.autocast():
        tuned = generate_greedy(opened.model, opened.tokenizer, prompts, max_new_tokens)
        with adapter_disabled(opened.model):
            base = generate_greedy(opened.model, opened.tokenizer, prompts, max_new_tokens)
    duels = [CompletionPair(each, a.text, b.text) for each, a, b in zip(prompts, tuned, base, strict=True)]
    asked = pairs_to_judge(duels)
    characters = sum(len(question) for duel in asked for question in judge_prompts(duel))
    equal = f"; {len(duels) - len(asked)} prompts have equal answers and need none" if len(asked) < len(duels) else ""
    click.echo(f"the judge gets {2 * len(asked)} requests with {characters:,} characters in all{equal}", err=True)
    with click.progressbar(length=2 * len(asked), label="judging", file=sys.stderr) as bar:
        return judge_pairs(duels, judge, bar.update)


def _objective_or_default(opened: "OpenedModel") -> "Objective":
    """The run's objective; DPO for an adapter that was made elsewhere."""
    from qlora_dpo.recipe.objective import Sigmoid

    return opened.recipe.objective if opened.recipe is not None else Sigmoid()


def _compute_metrics(opened: "OpenedModel", pair_set: "PairSet", contents: dict[str, str]) -> dict[str, Any]:
    """Every figure, with what it was measured on and how."""
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.evaluation.adapter_eval import MAX_TEXT_WINDOW, score_adapter, score_text, text_windows
    from qlora_dpo.evaluation.eval_metrics import compute_eval_metrics
    from qlora_dpo.preference.pack import Packing
    from qlora_dpo.preference.packing_choice import choose_packing
    from qlora_dpo.preference.reference import ReferenceLogpCache, reference_cache_dir
    from qlora_dpo.recipe.train import TrainTable
    from qlora_dpo.run_folder import read_run_metadata
    from qlora_dpo.talk.generate import context_tokens
    from qlora_dpo.training.loss_columns import read_loss_columns

    model, device, objective = opened.model, opened.device, _objective_or_default(opened)
    assert opened.folder is not None  # noqa: S101 - an adapter has one
    table = read_run_metadata(opened.folder)[0]
    budget = (opened.recipe.train if opened.recipe is not None else TrainTable()).row_tokens
    window = min(MAX_TEXT_WINDOW, context_tokens(model) or MAX_TEXT_WINDOW)
    windows: dict[str, list[EncodedPair]] = {}
    for name, text in contents.items():
        ids = opened.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows[name] = text_windows(tuple(ids), window)
        if not windows[name]:
            raise RecipeError(f"{name}: makes {len(ids)} tokens; --text needs two at least")
    everything = [*pair_set.encoded, *(each for some in windows.values() for each in some)]
    packing, why = choose_packing(
        model, everything, Packing(budget, int(opened.tokenizer.pad_token_id or 0), backend=None), device
    )
    click.echo(f"layout: {why}", err=True)
    steps = 3 * len(pair_set.encoded)
    with click.progressbar(
        length=steps, label=f"asking base and tuned model of {len(pair_set.encoded)} pairs", file=sys.stderr
    ) as bar:
        found = score_adapter(
            model,
            pair_set.encoded,
            read_loss_columns(pair_set.pairs, objective),
            objective,
            packing,
            lambda counted: ReferenceLogpCache(reference_cache_dir(opened.source, table, device, counted)),
            device,
            bar.update,
        )
    texts = {name: score_text(model, some, packing, device) for name, some in windows.items()}
    return {
        "data": {
            "source": pair_set.audit.source,
            "rows": pair_set.audit.rows,
            "used": pair_set.audit.used,
            "dropped": {reason: len(rows) for reason, rows in pair_set.audit.dropped.items()},
        },
        "objective": objective.model_dump(exclude_none=True),
        "computed_in": f"{device.compute_dtype} on {device.type.upper()}",
        **compute_eval_metrics(found, pair_set.encoded, objective, texts),
    }
