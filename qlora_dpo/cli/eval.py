"""`qlora-dpo eval`: the figures of an adapter on all of its held-out pairs, and a gate."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qlora_dpo.adapter import Opened
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
def eval_(
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
    **more: Any,
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
    from qlora_dpo.evaluation.lm_eval_tasks import measure_tasks, task_manager
    from qlora_dpo.run_folder import described, newest
    from qlora_dpo.talk.judge import judge_at

    if judge is None and more["judge_model"] is not None:
        raise click.UsageError("--judge-model needs --judge")
    asked = judge_at(judge, more["judge_model"]) if judge is not None else None
    names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    manager = task_manager(names, more["task_path"]) if names else None
    folder = newest() if adapter is None else adapter.expanduser()
    _insist_on_an_adapter(folder)
    contents = {str(file): _plain_text(file) for file in texts}
    table, part = _data_table(folder, described(folder)[2], data, split, max_pairs)
    if max_length is not None:
        table = table.model_copy(update={"max_length": max_length})
    opened = open_adapter(folder, dtype)
    side = _pairs(opened, table, part)
    found = _figures(opened, side, contents)
    if asked is not None:
        found["judge"] = _judged(opened, side, asked, more["judge_prompts"], more["max_new_tokens"])
    if manager is not None:
        model, tokenizer, device = opened.model, opened.tokenizer, opened.device
        found["tasks"] = measure_tasks(model, tokenizer, device, manager, names, more["task_limit"], _say)
    if as_json:
        click.echo(json.dumps({"adapter": str(folder), **found}, ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        from qlora_dpo.report.eval_tables import judgement_tables

        Console().print(judgement_tables(found))
    if min_accuracy is not None and found["accuracy"] < min_accuracy:
        raise GateError(
            f"{folder}: the accuracy {found['accuracy']:.4f} of {found['pairs']} pairs is below --min-accuracy "
            f"{min_accuracy:g}"
        )


def _say(words: str) -> None:
    click.echo(words, err=True)


def _insist_on_an_adapter(folder: Path) -> None:
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.run_folder import CONFIG

    if not (folder / CONFIG).is_file():
        what = "is no adapter" if folder.is_dir() else "there is no such folder"
        raise RecipeError(
            f"{folder}: {what}; eval compares an adapter with its base, so name the folder of a run, as in adapters/hh"
        )


def _plain_text(file: Path) -> str:
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


def _data_table(
    folder: Path, recipe: "Recipe | None", data: str | None, split: str | None, max_pairs: int | None
) -> "tuple[DataTable, Any]":
    """What to read, and as which part; raises RecipeError where the options do not fit together."""
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.recipe.data import DataTable
    from qlora_dpo.recipe.tables import DATA_ENDINGS

    own = recipe.data if recipe is not None else None
    if data is None:
        if own is None:
            raise RecipeError(f"{folder}: comes without a recipe, so its held-out pairs are not known; add --data")
        if split is not None and own.held_out_share is not None:
            raise RecipeError(
                "--split: this run holds out a share of its training pairs, which have no split; leave it"
            )
        chosen = {"eval_split": split} if split else {}
        return own.model_copy(update={"max_eval_samples": max_pairs, **chosen}), "eval"
    if split is not None and data.endswith(DATA_ENDINGS):
        raise RecipeError(f"--split {split}: {data} is one file and has no splits; leave it out")
    place = Path(data).expanduser()
    name = str(place.resolve()) if place.exists() else data
    start = own or DataTable(train=name, eval=f"{name}/")
    default = "train" if place.is_file() or data.endswith(DATA_ENDINGS) else start.eval_split
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


def _pairs(opened: "Opened", table: "DataTable", part: Any) -> "PairSet":
    from qlora_dpo.data.audit import insist_on_few_bad_rows
    from qlora_dpo.data.encode import load_pairs
    from qlora_dpo.training.loss_columns import column_keys

    seed = opened.recipe.train.seed if opened.recipe is not None else 0
    pairs = load_pairs(table, part, opened.tokenizer, seed, column_keys(_objective(opened)))
    click.echo("\n".join(pairs.audit.lines()), err=True)
    insist_on_few_bad_rows(pairs.audit, table.max_bad_share)
    trained = opened.recipe.data if opened.recipe is not None else None
    if part == "train" and trained and (trained.train, trained.train_split) == (table.train, table.train_split):
        click.echo("it was trained on pairs of this source: the figures say little of other pairs", err=True)
    return pairs


def _judged(opened: "Opened", side: "PairSet", judge: "Judge", most: int, max_new_tokens: int) -> dict[str, Any]:
    """Win rates on the answers to the first prompts, each prompt once."""
    from qlora_dpo.model.lora import adapter_off
    from qlora_dpo.talk.generate import answers
    from qlora_dpo.talk.judge import Duel, duels_to_ask, judged, questions

    prompts = list({json.dumps(pair.prompt): pair.prompt for pair in side.pairs}.values())[:most]
    click.echo(f"base and tuned model answer {len(prompts)} prompts", err=True)
    with opened.device.autocast():
        tuned = answers(opened.model, opened.tokenizer, prompts, max_new_tokens)
        with adapter_off(opened.model):
            base = answers(opened.model, opened.tokenizer, prompts, max_new_tokens)
    duels = [Duel(each, a.text, b.text) for each, a, b in zip(prompts, tuned, base, strict=True)]
    asked = duels_to_ask(duels)
    characters = sum(len(question) for duel in asked for question in questions(duel))
    equal = f"; {len(duels) - len(asked)} prompts have equal answers and need none" if len(asked) < len(duels) else ""
    click.echo(f"the judge gets {2 * len(asked)} requests with {characters:,} characters in all{equal}", err=True)
    with click.progressbar(length=2 * len(asked), label="judging", file=sys.stderr) as bar:
        return judged(duels, judge, bar.update)


def _objective(opened: "Opened") -> "Objective":
    """The run's objective; DPO for an adapter that was made elsewhere."""
    from qlora_dpo.recipe.objective import Sigmoid

    return opened.recipe.objective if opened.recipe is not None else Sigmoid()


def _figures(opened: "Opened", side: "PairSet", contents: dict[str, str]) -> dict[str, Any]:
    """Every figure, with what it was measured on and how."""
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.evaluation.adapter_eval import WINDOW, examine, read_text, windows_of
    from qlora_dpo.evaluation.eval_metrics import judgement
    from qlora_dpo.preference.packing_choice import choose_packing
    from qlora_dpo.preference.reference import Store, store_folder
    from qlora_dpo.recipe.train import TrainTable
    from qlora_dpo.run_folder import described
    from qlora_dpo.talk.generate import context_tokens
    from qlora_dpo.training.loss_columns import columns_of

    model, device, objective = opened.model, opened.device, _objective(opened)
    assert opened.folder is not None  # noqa: S101 - an adapter has one
    table = described(opened.folder)[0]
    budget = (opened.recipe.train if opened.recipe is not None else TrainTable()).row_tokens
    window = min(WINDOW, context_tokens(model) or WINDOW)
    windows: dict[str, list[EncodedPair]] = {}
    for name, text in contents.items():
        ids = opened.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows[name] = windows_of(tuple(ids), window)
        if not windows[name]:
            raise RecipeError(f"{name}: makes {len(ids)} tokens; --text needs two at least")
    everything = [*side.encoded, *(each for some in windows.values() for each in some)]
    packing, why = choose_packing(model, everything, budget, int(opened.tokenizer.pad_token_id or 0), device)
    click.echo(f"layout: {why}", err=True)
    steps = 3 * len(side.encoded)
    with click.progressbar(
        length=steps, label=f"asking base and tuned model of {len(side.encoded)} pairs", file=sys.stderr
    ) as bar:
        found = examine(
            model,
            side.encoded,
            columns_of(side.pairs, objective),
            objective,
            packing,
            lambda counted: Store(store_folder(opened.source, table, device, counted)),
            device,
            bar.update,
        )
    texts = {name: read_text(model, some, packing, device) for name, some in windows.items()}
    return {
        "data": {
            "source": side.audit.source,
            "rows": side.audit.rows,
            "used": side.audit.used,
            "dropped": {reason: len(rows) for reason, rows in side.audit.dropped.items()},
        },
        "objective": objective.model_dump(exclude_none=True),
        "computed_in": f"{device.compute_dtype} on {device.type.upper()}",
        **judgement(found, side.encoded, objective, texts),
    }
