"""`qlora-dpo pairs`: preference pairs of a model's own answers to prompts."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_dpo.cli.options import base_model_option, dtype_option
from qlora_dpo.cli.startup.libraries import import_libraries

if TYPE_CHECKING:
    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.on_policy.journal import Journal
    from qlora_dpo.on_policy.make import PairsResult
    from qlora_dpo.on_policy.prompts import AskedPrompt
    from qlora_dpo.on_policy.scores import Scorer
    from qlora_dpo.talk.sampling import SamplingParams

SCORERS = ("judge", "rule", "matches", "longer", "shorter", "implicit")
MANY_SAMPLES = 4
LARGE_EFFECT = 0.5
"""Cohen's d from which the lengths of chosen and rejected answers are told apart at a glance."""


@click.command("pairs", short_help="Make preference pairs of a model's own answers.")
@click.argument("prompts", metavar="PROMPTS")
@click.option(
    "-o",
    "--output",
    "out",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path),
    help="The pairs, as JSON lines; answers, scores and manifest are kept beside them.",
)
@click.option(
    "--model",
    metavar="MODEL",
    help="An adapter, a merged model, a hub name, or a recipe, whose base answers; absent: the newest adapter.",
)
@click.option("--base", is_flag=True, help="Answers of the adapter's base.")
@base_model_option
@click.option("--split", default="train", show_default=True, help="The split of a data set or folder of prompts.")
@click.option("--max-prompts", metavar="N", type=click.IntRange(min=1), help="Ask this many, drawn with --seed.")
@click.option(
    "--samples", metavar="K", type=click.IntRange(min=1), help="Answers to each prompt; 4, or 1 with --chosen alone."
)
@click.option("--temperature", default=0.9, show_default=True, type=float, help="0 takes the likeliest token.")
@click.option("--top-p", default=1.0, show_default=True, type=float, help="Share of probability that is drawn from.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all draws.")
@click.option("--judge", metavar="URL|CMD", help="Score by a judge, as in `eval`: each two answers, in both orders.")
@click.option("--judge-model", metavar="NAME", help="The model behind the judge's address.")
@click.option("--rule", metavar="FILE.py:NAME", help="Score by your function of messages and answer; its code is run.")
@click.option("--matches", metavar="REGEX", help="Score 1 where this is found.")
@click.option("--longer", is_flag=True, help="Prefer longer answers.")
@click.option("--shorter", is_flag=True, help="Prefer shorter answers.")
@click.option(
    "--implicit",
    metavar="ADAPTER",
    type=click.Path(path_type=Path),
    help="Score by an adapter's own reward, beta * log(pi/pi_ref).",
)
@click.option("--chosen", metavar="COLUMN", help="The data's own answers are chosen, the model's rejected.")
@click.option(
    "--pairing",
    type=click.Choice(["best_typical", "best_worst", "all"]),
    default="best_typical",
    show_default=True,
    help="The best answer with the one nearest to two deviations below the mean, with the worst, or all pairs.",
)
@dtype_option
@click.option("--rounds", metavar="N", type=click.IntRange(min=1), help="Sample, train --recipe, and ask again.")
@click.option("--recipe", metavar="RECIPE", help="What each of the --rounds trains; -o is then a folder.")
@click.option("--resume", is_flag=True, help="Go on with the answers and scores that are kept beside FILE.")
def pairs_command(
    prompts: str,
    out: Path,
    model: str | None,
    base: bool,
    base_model: str | None,
    split: str,
    max_prompts: int | None,
    samples: int | None,
    chosen: str | None,
    pairing: Any,
    dtype: str,
    rounds: int | None,
    recipe: str | None,
    resume: bool,
    judge_model: str | None,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    **scoring: Any,
) -> None:
    """Have a model answer PROMPTS several times, score the answers, and write pairs of them to FILE.

    PROMPTS is any data that a recipe can train on, of which the prompts are taken, rows with a prompt alone, or plain
    text with a prompt a line. Answers and scores are kept in FILE.answers and FILE.scores as they arrive, so --resume
    loses none. FILE.manifest says how the pairs were made, and a run that trains on FILE repeats that in run.json.

    \b
    qlora-dpo pairs asks.txt --model adapters/hh --judge http://127.0.0.1:8000/v1 --judge-model NAME -o own.jsonl
    qlora-dpo pairs asks.jsonl --model recipes/quickstart.toml --rule rules.py:score -o own.jsonl
    qlora-dpo pairs good.jsonl --model recipes/quickstart.toml --chosen chosen -o own.jsonl
    qlora-dpo pairs asks.jsonl --rounds 3 --recipe my-recipe.toml --rule rules.py:score -o adapters/rounds
    """
    from qlora_dpo.talk.sampling import SamplingParams

    out = out.expanduser()
    by = _scoring_option(scoring, judge_model, chosen)
    copies = samples or (1 if by is None else MANY_SAMPLES)
    settings = SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    _check_copies(copies, settings, chosen)
    _check_rounds(rounds, recipe, by, chosen, base)
    _check_output(out, resume, folder=rounds is not None)
    import_libraries()
    from qlora_dpo.on_policy.prompts import collect_prompts

    asked = collect_prompts(prompts, split, chosen, max_prompts, seed)
    early = _scorer_without_model(by, scoring, judge_model)  # a rule that cannot be read ends the command here
    click.echo(f"{prompts}: {len(asked):,} prompts, {copies} answers each, seed {seed}", err=True)
    origin = {"made_by": "qlora-dpo pairs", "prompts": {"source": prompts, "split": split}}

    def make_pairs(
        opened: "OpenedModel",
        asked: "Sequence[AskedPrompt]",
        out: Path,
        settings: "SamplingParams",
        off: bool = False,
        scorer: "Scorer | None" = early,
    ) -> "PairsResult":
        with _going_on(out):
            answers = _answer(opened, off, asked, copies, settings, out)
            scores = _score(asked, answers, scorer, out) if scorer is not None else None
        return _write(opened, asked, answers, scores, pairing, out, origin)

    if rounds is not None:
        from qlora_dpo.cli.pair_rounds import Rounds, rounds_table, run_rounds

        def reopen(target: str) -> "OpenedModel":
            return _open(target, False, base_model, dtype, None)[0]

        assert early is not None and recipe is not None  # noqa: S101 - _check_rounds
        plan = Rounds(out, recipe, rounds, early, reopen, make_pairs, settings)
        results = run_rounds(plan, model or recipe, asked)
        click.echo("\n".join(["", *rounds_table(results)]))
        return
    opened, off, scorer = _open(model, base, base_model, dtype, scoring["implicit"])
    make_pairs(opened, asked, out, settings, off, scorer or early)


def _scoring_option(scoring: dict[str, Any], judge_model: str | None, chosen: str | None) -> str | None:
    """The one option by which answers are scored; None if the data's answers are the chosen ones and none is named."""
    from qlora_dpo.errors import RecipeError

    named = [name for name in SCORERS if scoring[name]]
    if len(named) > 1:
        raise RecipeError(f"--{named[0]} and --{named[1]}: answers have one score; leave one of them out")
    if judge_model is not None and named != ["judge"]:
        raise RecipeError("--judge-model: names a model behind the address of --judge; add --judge http://...")
    if not named and chosen is None:
        raise RecipeError(
            "nothing says which answers are better; add --judge, --rule, --matches, --longer, --shorter or "
            "--implicit, or --chosen COLUMN for answers of the data"
        )
    return named[0] if named else None


def _check_copies(copies: int, settings: "SamplingParams", chosen: str | None) -> None:
    from qlora_dpo.errors import RecipeError

    if copies == 1 and chosen is None:
        raise RecipeError("--samples 1: a pair needs two answers; take 2 or more, or --chosen COLUMN")
    if copies > 1 and settings.temperature == 0:
        raise RecipeError(f"--temperature 0: all {copies} answers would be equal; take a higher one, or --samples 1")


def _check_rounds(rounds: int | None, recipe: str | None, by: str | None, chosen: str | None, base: bool) -> None:
    from qlora_dpo.errors import RecipeError

    if rounds is not None and base:
        raise RecipeError("--base: rounds go on from the model that answers; leave it out, or name a recipe as --model")

    if (rounds is None) != (recipe is None):
        given, missing = ("--rounds", "--recipe RECIPE") if recipe is None else ("--recipe", "--rounds N")
        raise RecipeError(f"{given}: rounds sample answers and train a recipe on them; add {missing}")
    if rounds is not None and (by in (None, "implicit") or chosen is not None):
        raise RecipeError(
            "--rounds: compares the held-out answers of each round with the start's, which needs --judge, --rule, "
            "--matches, --longer or --shorter, and no --chosen"
        )


def _check_output(out: Path, resume: bool, *, folder: bool) -> None:
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.on_policy.make import answers_path

    if folder:
        if out.exists() and not (resume and out.is_dir()):
            advice = "--resume goes on in it, or name another folder" if out.is_dir() else "name a new folder"
            raise RecipeError(f"{out}: exists; {advice}")
        return
    kept = out if out.exists() else answers_path(out)
    if out.is_dir():
        raise RecipeError(f"{out}: is a folder; name a file, as in -o own.jsonl")
    if out.suffix != ".jsonl":
        raise RecipeError(f"{out}: pairs are written as JSON lines; name a file that ends with .jsonl")
    if kept.exists() and not resume:
        raise RecipeError(f"{kept}: exists; --resume goes on with it, or name another file")


def _scorer_without_model(by: str | None, scoring: dict[str, Any], judge_model: str | None) -> "Scorer | None":
    from qlora_dpo.on_policy import scores
    from qlora_dpo.talk.judge import make_judge

    match by:
        case "judge":
            return scores.judge_scorer(make_judge(scoring["judge"], judge_model), scoring["judge"], judge_model)
        case "rule":
            click.echo(f"{scoring['rule']}: this function is run here, on every answer", err=True)
            return scores.rule_scorer(scoring["rule"])
        case "matches":
            return scores.pattern_scorer(scoring["matches"])
        case "longer" | "shorter":
            return scores.length_scorer(longer=by == "longer")
        case _:
            return None


def _open(
    model: str | None, base: bool, base_model: str | None, dtype: str, implicit: Path | None
) -> "tuple[OpenedModel, bool, Scorer | None]":
    """The model that answers, whether its adapter is off, and the scorer of `--implicit`."""
    from qlora_dpo.adapter import open_model
    from qlora_dpo.errors import RecipeError
    from qlora_dpo.on_policy.scores import implicit_scorer
    from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, find_model_folder
    from qlora_dpo.talk.compare import open_adapters

    if implicit is None:
        if model is not None and model.endswith(".toml"):
            return _open_base(model, dtype), False, None
        opened = open_model(model, dtype, base_model)
        if base and opened.table is None:
            raise RecipeError(f"--base: {model} is no adapter, so it has no base; leave --base out")
        return opened, base, None
    folder = find_model_folder(model) if model is None or not model.endswith(".toml") else None
    if folder is None or not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise RecipeError(
            f"--implicit {implicit}: scores answers of an adapter or of its base; name an adapter as --model, with "
            "--base for its base"
        )
    reward = implicit.expanduser()
    if not (reward / ADAPTER_CONFIG_NAME).is_file():
        raise RecipeError(f"--implicit {implicit}: is no adapter; name the folder of a run, as in adapters/hh")
    folders = [folder] if reward.resolve() == folder.resolve() else [folder, reward]
    opened, loaded = open_adapters(folders, dtype, base_model)
    judge: Any = opened.model
    scorer = implicit_scorer(
        judge, opened.tokenizer, opened.device, loaded[-1].beta, loaded[-1].name, loaded[-1].adapter_name
    )
    judge.set_adapter("default")
    return opened, base, scorer


def _open_base(recipe: str, dtype: str) -> "OpenedModel":
    """The base of a recipe, as the recipe loads it."""
    from qlora_dpo.adapter import OpenedModel
    from qlora_dpo.data.templates.template_settings import apply_template_settings
    from qlora_dpo.model import base, device, memory, sources
    from qlora_dpo.model.tokenizer import load_tokenizer
    from qlora_dpo.recipe.recipe import load_recipe

    table = load_recipe(recipe).recipe.model
    source, selected = sources.fetch_model(table), device.select_device(dtype)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(source)
    for sentence in apply_template_settings(tokenizer, table, source.name):
        click.echo(sentence, err=True)
    model = base.load_base(source, table, selected)
    memory.cache_at_first_use_if_fits(model, selected)
    return OpenedModel(model, tokenizer, selected, source)


@contextmanager
def _going_on(out: Path) -> Iterator[None]:
    """Say that what is done so far is kept, if the work ends before its end."""
    from qlora_dpo.errors import Interrupted, QloraDpoError
    from qlora_dpo.on_policy.make import answers_path

    kept = f"what is done so far is kept in {answers_path(out).name}, and --resume goes on"
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped; {kept}") from error
    except QloraDpoError as error:
        raise type(error)(f"{error}; {kept}") from error


def _answer(
    opened: "OpenedModel",
    off: bool,
    asked: "Sequence[AskedPrompt]",
    copies: int,
    settings: "SamplingParams",
    out: Path,
) -> "Journal":
    from contextlib import nullcontext

    from qlora_dpo.model.lora import adapter_disabled
    from qlora_dpo.on_policy import make

    started, model = time.monotonic(), opened.model
    switched = adapter_disabled(model) if off else nullcontext()
    with switched, _progress(len(asked), "answering") as advance:
        answers = make.answer_prompts(opened, off, asked, copies, settings, out, advance)
    tokens = sum(answer["tokens"] for of_prompt in answers.records.values() for answer in of_prompt)
    count = sum(map(len, answers.records.values()))
    click.echo(f"{count:,} answers with {tokens:,} tokens, {time.monotonic() - started:.0f} s", err=True)
    return answers


def _score(asked: "Sequence[AskedPrompt]", answers: "Journal", scorer: "Scorer", out: Path) -> "Journal":
    from qlora_dpo.on_policy import make

    if scorer.settings["by"] == "judge":
        per_prompt = (make.most_answers(answers) - 1) * make.most_answers(answers)
        click.echo(f"the judge gets at most {len(asked) * per_prompt:,} requests", err=True)
    with _progress(len(asked), f"scoring by {scorer.settings['by']}") as advance:
        return make.score_answers(asked, answers, scorer, out, advance)


@contextmanager
def _progress(length: int, label: str) -> Iterator[Callable[[int], None]]:
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield bar.update


def _write(
    opened: "OpenedModel",
    asked: "Sequence[AskedPrompt]",
    answers: "Journal",
    scores: "Journal | None",
    pairing: Any,
    out: Path,
    origin: dict[str, Any],
) -> "PairsResult":
    from qlora_dpo.on_policy import make

    def count_tokens(text: str) -> int:
        return len(opened.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    result = make.write_pairs(asked, answers, scores, pairing, count_tokens, out, origin)
    for journal in filter(None, (answers, scores)):
        journal.close()
    _report(result, asked, out)
    return result


def _report(result: "PairsResult", asked: "Sequence[AskedPrompt]", out: Path) -> None:
    """Print how many pairs there are, how their sides differ, and what gave none; raises DataError without a pair."""
    from qlora_dpo.errors import DataError

    choice = result.choice
    left_out = "; ".join(f"{count:,} {reason}" for reason, count in choice.left_out.most_common())
    if not choice.pairs:
        raise DataError(f"{out}: is not written, since there are no pairs: {left_out}; take more --samples")
    used = len({pair.prompt.digest for pair in choice.pairs})
    click.echo(f"{out}: {len(choice.pairs):,} pairs of {used:,} of {len(asked):,} prompts")
    for side, tokens in (("chosen", result.chosen_tokens), ("rejected", result.rejected_tokens)):
        scores = [score for pair in choice.pairs if (score := getattr(pair, side).score) is not None]
        mean = f", mean score {statistics.fmean(scores):.3f}" if scores else ""
        click.echo(f"  {side:<8}  {statistics.fmean(tokens):6.1f} tokens on average{mean}")
    if (effect := result.effect) is not None:
        longer, large = "longer" if effect > 0 else "shorter", abs(effect) >= LARGE_EFFECT
        told = f": the chosen answers are {longer}, which training will learn too" if large else ""
        click.echo(f"  lengths   Cohen's d {effect:+.2f}{told}")
    if left_out:
        click.echo(f"  left out  {left_out}")
