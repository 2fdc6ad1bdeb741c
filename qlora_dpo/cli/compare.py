"""`qlora-dpo compare`: base and adapters answer the same prompts side by side."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_dpo.cli.options import base_model_option, dtype_option
from qlora_dpo.cli.startup.libraries import import_libraries

if TYPE_CHECKING:
    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.data.dialogue import Message
    from qlora_dpo.data.files import Row
    from qlora_dpo.talk.compare import ComparedReplies, ScoredReply

DEFAULT_PROMPTS = 3


@click.command("compare", short_help="Let base and adapters answer the same prompts side by side.")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-p", "--prompt", "questions", metavar="TEXT", multiple=True, help="A question; several times for several."
)
@click.option(
    "--prompts",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help='Questions: a data file with "prompt" (text or messages), or plain text, one a line.',
)
@click.option("-s", "--system", metavar="TEXT", help="System prompt; absent: what the model's template puts there.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
@click.option("--tokens", is_flag=True, help="Show the reward of every token.")
@dtype_option
@base_model_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page that needs no network, too."
)
def compare_command(
    adapters: tuple[Path, ...],
    max_new_tokens: int,
    tokens: bool,
    dtype: str,
    as_json: bool,
    html: Path | None,
    base_model: str | None,
    **prompt_options: Any,
) -> None:
    """Let the base and each ADAPTER answer the same prompts greedily, from one loaded model.

    Below each answer stands its implicit reward, beta * log(pi/pi_ref), under each adapter. Without prompts, the first
    held-out prompts of the first adapter's run are taken.

    \b
    qlora-dpo compare adapters/hh -p "How do I find the library?"
    qlora-dpo compare adapters/hh adapters/hh-fast --prompts asks.jsonl --html compared.html
    """
    from qlora_dpo.files import atomic_write

    folders = [folder.expanduser() for folder in adapters]
    _check_adapters(folders)
    prompts = _collect_prompts(folders[0], **prompt_options)
    import_libraries()
    from qlora_dpo.talk import compare as comparing

    opened, loaded = comparing.open_adapters(folders, dtype, base_model)
    total = len(prompts) * (1 + len(loaded))
    with click.progressbar(length=total, label=f"writing {total} answers", file=sys.stderr) as bar:
        compared = comparing.compare_replies(opened, loaded, prompts, max_new_tokens, bar.update)
    record = {
        "base": opened.source.hub_id or Path(opened.source.name).name,
        "adapters": [{"name": adapter.name, "beta": adapter.beta} for adapter in loaded],
        "max_new_tokens": max_new_tokens,
        "computed_in": f"{opened.device.compute_dtype} on {opened.device.type.upper()}",
        "prompts": [_prompt_record(comparison, opened, tokens) for comparison in compared],
    }
    from qlora_dpo.report.compare_view import comparison_columns, comparison_page

    if html is not None:
        atomic_write(html.expanduser(), comparison_page(record))
        click.echo(f"{html}: written", err=True)
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        Console().print(comparison_columns(record["prompts"]))  # type: ignore[arg-type]


def _check_adapters(folders: list[Path]) -> None:
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME

    for folder in folders:
        if not (folder / ADAPTER_CONFIG_NAME).is_file():
            problem = "is no adapter" if folder.is_dir() else "there is no such folder"
            raise RecipeError(f"{folder}: {problem}; name folders of runs, as in adapters/hh")


def _collect_prompts(
    folder: Path, questions: tuple[str, ...], file: Path | None, system: str | None
) -> "list[list[Message]]":
    """The prompts of the options; without any, the first ones that the run in `folder` sampled after training."""
    from qlora_dpo.errors import RecipeError

    prompts = [_user_message(text) for text in questions]
    if file is not None:
        prompts += _read_prompts(file)
    samples = folder / "samples.jsonl"
    if not questions and file is None:
        if not samples.is_file() or not (prompts := _read_prompts(samples)[:DEFAULT_PROMPTS]):
            raise RecipeError(f"{folder}: keeps no held-out prompts; give some with -p TEXT or --prompts FILE")
        click.echo(f"the first {len(prompts)} held-out prompts of {folder}", err=True)
    if system is None:
        return prompts
    return [
        [{"role": "system", "content": system}, *(turn for turn in prompt if turn["role"] != "system")]
        for prompt in prompts
    ]


def _user_message(text: str) -> "list[Message]":
    from qlora_dpo.errors import RecipeError

    if not text.strip():
        raise RecipeError("-p: the prompt is empty; write a question")
    return [{"role": "user", "content": text}]


def _read_prompts(file: Path) -> "list[list[Message]]":
    """The prompts of a data file's rows or of a text's lines; raises RecipeError with the place of one that is none."""
    from qlora_dpo.data.files import data_suffix, read_data_file
    from qlora_dpo.data.text_prompts import read_prompt_lines

    path = file.expanduser()
    if data_suffix(path):
        rows = read_data_file(path)
        return [_row_prompt(row, rows.location(number)) for number, row in enumerate(rows.rows, 1)]
    return [_user_message(line) for line in read_prompt_lines(file)]


def _row_prompt(row: "Row", place: str) -> "list[Message]":
    """The column `prompt` of a row, text or messages; raises RecipeError if it is no prompt."""
    from qlora_dpo.data.dialogue import InvalidRow, check_roles
    from qlora_dpo.errors import RecipeError

    try:
        prompt = row["prompt"]
        turns = (
            _user_message(prompt)
            if isinstance(prompt, str)
            else [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in prompt]
        )
        check_roles(turns)
    except (ValueError, KeyError, TypeError) as error:
        example = '{"prompt": "TEXT"}, or a list of messages'
        raise RecipeError(f"{place}: is no prompt; write {example}") from error
    except InvalidRow as error:
        raise RecipeError(f"{place}: is no prompt: {error}") from error
    return turns


def _prompt_record(comparison: "ComparedReplies", opened: "OpenedModel", tokens: bool) -> dict[str, Any]:
    return {
        "prompt": list(comparison.prompt),
        "answers": [_reply_record(reply, opened, tokens) for reply in comparison.replies],
    }


def _reply_record(reply: "ScoredReply", opened: "OpenedModel", tokens: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "voice": reply.variant,
        "text": reply.completion.text,
        "tokens": reply.completion.tokens,
        "ended": reply.completion.ended,
        "rewards": {},
    }
    for adapter, reward in reply.rewards:
        total = reward.at_beta(adapter.beta)
        record["rewards"][adapter.name] = {"reward": total, "per_token": total / max(1, reward.tokens)}
    if tokens:
        per_token = {adapter.name: reward.per_token(adapter.beta) for adapter, reward in reply.rewards}
        record["token_rewards"] = [
            {
                "token": opened.tokenizer.decode([token]),
                "rewards": {name: rewards[index] for name, rewards in per_token.items()},
            }
            for index, token in enumerate(reply.completion.ids)
        ]
    return record
