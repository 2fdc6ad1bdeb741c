"""`qlora-dpo compare`: base and adapters answer the same prompts side by side."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from qlora_dpo.adapter import Opened
    from qlora_dpo.data.dialogue import Message
    from qlora_dpo.talk.compare import Compared, Said

SAMPLES = 3


@click.command(short_help="Let base and adapters answer the same prompts side by side.")
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-p", "--prompt", "questions", metavar="TEXT", multiple=True, help="A question; several times for several."
)
@click.option(
    "--prompts",
    "file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help='Questions: JSON lines with "prompt" (text or messages), or plain text, one a line.',
)
@click.option("-s", "--system", metavar="TEXT", help="System prompt; absent: what the model's template puts there.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
@click.option("--tokens", is_flag=True, help="Show the reward of every token.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16", "fp32"]),
    default="auto",
    show_default=True,
    help="What all models compute in.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page that needs no network, too."
)
def compare(
    adapters: tuple[Path, ...],
    questions: tuple[str, ...],
    file: Path | None,
    system: str | None,
    max_new_tokens: int,
    tokens: bool,
    dtype: str,
    as_json: bool,
    html: Path | None,
) -> None:
    """Let the base and each ADAPTER answer the same prompts greedily, from one loaded model.

    Below each answer stands its implicit reward, beta * log(pi/pi_ref), under each adapter. Without prompts, the first
    held-out prompts of the first adapter's run are taken.

    \b
    qlora-dpo compare adapters/hh -p "How do I find the library?"
    qlora-dpo compare adapters/hh adapters/hh-fast --prompts asks.jsonl --html compared.html
    """
    from qlora_dpo.files import write_whole

    folders = [each.expanduser() for each in adapters]
    _insist_on_adapters(folders)
    prompts = _prompts(folders[0], questions, file, system)
    from qlora_dpo.talk import compare as comparing

    opened, speakers = comparing.open_several(folders, dtype)
    total = len(prompts) * (1 + len(speakers))
    with click.progressbar(length=total, label=f"writing {total} answers", file=sys.stderr) as bar:
        found = comparing.compare(opened, speakers, prompts, max_new_tokens, bar.update)
    record = {
        "base": opened.source.hub_id or Path(opened.source.name).name,
        "adapters": [{"name": each.name, "beta": each.beta} for each in speakers],
        "max_new_tokens": max_new_tokens,
        "computed_in": f"{opened.device.compute_dtype} on {opened.device.type.upper()}",
        "prompts": [_compared(each, opened, tokens) for each in found],
    }
    from qlora_dpo.report.compare_view import compared_columns, compared_page

    if html is not None:
        write_whole(html.expanduser(), compared_page(record))
        click.echo(f"{html}: written", err=True)
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False, allow_nan=False))
    else:
        from rich.console import Console

        Console().print(compared_columns(record["prompts"]))  # type: ignore[arg-type]


def _insist_on_adapters(folders: list[Path]) -> None:
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.run_folder import CONFIG

    for folder in folders:
        if not (folder / CONFIG).is_file():
            what = "is no adapter" if folder.is_dir() else "there is no such folder"
            raise RecipeError(f"{folder}: {what}; name folders of runs, as in adapters/hh")


def _prompts(folder: Path, questions: tuple[str, ...], file: Path | None, system: str | None) -> "list[list[Message]]":
    """The prompts that were given, else the first that the run of `folder` answered after training."""
    from qlora_dpo.errors import RecipeError

    prompts = [_asked(each) for each in questions]
    if file is not None:
        prompts += _read(file)
    samples = folder / "samples.jsonl"
    if not questions and file is None:
        if not samples.is_file() or not (prompts := _read(samples)[:SAMPLES]):
            raise RecipeError(f"{folder}: keeps no held-out prompts; give some with -p TEXT or --prompts FILE")
        click.echo(f"the first {len(prompts)} held-out prompts of {folder}", err=True)
    if system is None:
        return prompts
    return [[{"role": "system", "content": system}, *(t for t in each if t["role"] != "system")] for each in prompts]


def _asked(text: str) -> "list[Message]":
    from qlora_dpo.errors import RecipeError

    if not text.strip():
        raise RecipeError("-p: the prompt is empty; write a question")
    return [{"role": "user", "content": text}]


def _read(file: Path) -> "list[list[Message]]":
    """The prompts of a file; raises RecipeError with the line of what is none."""
    from qlora_dpo.data.dialogue import Unusable, check_roles
    from qlora_dpo.errors import RecipeError

    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}; name a file of prompts") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            prompts.append(_asked(line))
            continue
        try:
            prompt = json.loads(line)["prompt"]
            turns = (
                _asked(prompt)
                if isinstance(prompt, str)
                else [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in prompt]
            )
            check_roles(turns)
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"prompt": "TEXT"}, or a list of messages'
            raise RecipeError(f"{file}:{number}: is no prompt; write {wanted}") from error
        except Unusable as error:
            raise RecipeError(f"{file}:{number}: is no prompt: {error}") from error
        prompts.append(turns)
    if not prompts:
        raise RecipeError(f"{file}: holds no prompts; write one a line")
    return prompts


def _compared(each: "Compared", opened: "Opened", tokens: bool) -> dict[str, Any]:
    return {"prompt": list(each.prompt), "answers": [_said(said, opened, tokens) for said in each.said]}


def _said(said: "Said", opened: "Opened", tokens: bool) -> dict[str, Any]:
    record: dict[str, Any] = {
        "voice": said.voice,
        "text": said.answer.text,
        "tokens": said.answer.tokens,
        "ended": said.answer.ended,
        "rewards": {
            each.speaker.name: {"reward": each.total, "per_token": each.total / max(1, len(each.tokens))}
            for each in said.rewards
        },
    }
    if tokens:
        record["token_rewards"] = [
            {
                "token": opened.tokenizer.decode([token]),
                "rewards": {each.speaker.name: each.tokens[place] for each in said.rewards},
            }
            for place, token in enumerate(said.answer.ids)
        ]
    return record
