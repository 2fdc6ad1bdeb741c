"""Writes the model card of a run: the hub's metadata, results, samples, and how to load the adapter."""

import html
import json
import re
import shlex
import textwrap
from collections.abc import Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.recipe.model import QUANTIZATION_NAMES
from qlora_dpo.recipe.tables import is_local_path
from qlora_dpo.redact import redact_secrets
from qlora_dpo.report.objective_names import describe_objective, objective_tags
from qlora_dpo.report.run_files import RunFiles
from qlora_dpo.report.samples import format_prompt
from qlora_dpo.report.tables import answers_markdown, are_compared, epoch_table, escape_markdown, results_markdown
from qlora_dpo.run_folder import Record

CARD_SAMPLES = 3
FOUR_BIT_TYPES = ("nf4", "fp4")
TORCH_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
HUB_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
QUOTED_PATH_PATTERN = re.compile(r"""(["'])((?:~|[A-Za-z]:)?[/\\][^"'\n]*)\1""")
BARE_PATH_PATTERN = re.compile(r"""(?<![\w/\\.~])(?:-o)?((?:~|[A-Za-z]:)?[/\\][\w.~-][^\s"'`,;)\]]*)""")


def model_card(files: RunFiles, licence: str | None = None) -> str:
    """The text of a run's README.md, free of paths of the machine that it was made on.

    `licence` is the base model's, if it is known.
    """
    sections = [
        _intro_section(files.run, files.results, files.objective),
        _results_section(files.results, files.samples),
        f"## By epoch\n\n{epoch_table(files.records)}",
        _samples_section(files.samples[:CARD_SAMPLES]),
        _loading_section(files.run),
        _training_section(files.run, files.recipe_text),
    ]
    body = "\n".join(section for section in sections if section)
    metadata = _metadata(files.run, files.results, files.objective, licence)
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}"))


def parse_hub_id(name: str | None) -> str | None:
    """`name` if it can be an id on the hub; None if it is a path, a PyPI package or absent."""
    return name if name and not is_local_path(name) and HUB_ID_PATTERN.fullmatch(name) else None


def strip_local_paths(text: str) -> str:
    """`text` with every absolute path cut down to its last part, since a card is public."""
    text = text.replace("file://", "")
    text = QUOTED_PATH_PATTERN.sub(lambda match: f"{match[1]}{path_name(match[2])}{match[1]}", text)
    return BARE_PATH_PATTERN.sub(lambda match: match[0].replace(match[1], path_name(match[1])), text)


def code_block(text: str, language: str) -> str:
    """A markdown code block, whose fence is longer than any run of backticks in `text`."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def pre_block(text: str) -> str:
    """Untrusted text in an HTML <pre>, which it cannot break out of, since markdown is not interpreted there."""
    lines = [part for line in sanitize_text(text).strip().splitlines() for part in textwrap.wrap(line, 96) or [""]]
    return f"<pre>{html.escape(chr(10).join(lines) or '(nothing)')}</pre>\n"


def _metadata(run: Record, results: Record, objective: Record, licence: str | None) -> ModelCardData:
    base, data = run["base"], run["data"]
    datasets = [name for name in dict.fromkeys((data["train"], data.get("eval"))) if parse_hub_id(name)]
    return ModelCardData(
        base_model=parse_hub_id(base["hub_id"]),
        license=licence,
        datasets=datasets or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", *objective_tags(objective), *(["qlora"] if base["quantization"] in FOUR_BIT_TYPES else [])],
        model_name=run["name"],
        eval_results=_eval_results(run, results),
    )


def _eval_results(run: Record, results: Record) -> list[EvalResult]:
    last = next(record for record in results["evals"] if record["step"] == results["last"])
    held_out = run["data"].get("eval") or run["data"]["train"]
    counted = "pairs" if are_compared(results["evals"]) else "answers"
    metrics = {
        "accuracy": ("rewards/accuracies", "Preference accuracy"),
        "perplexity": ("perplexity", "Perplexity"),
        "loss": ("loss", "Loss"),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=parse_hub_id(held_out) or ("preference-pairs" if counted == "pairs" else "answers"),
            dataset_name=f"{path_name(held_out)}, {results['pairs']['eval']} held-out {counted}",
            metric_type=metric_type,
            metric_name=name,
            metric_value=round(last[f"eval_{key}"], 4),
        )
        for metric_type, (key, name) in metrics.items()
        if last.get(f"eval_{key}") is not None
    ]


def _intro_section(run: Record, results: Record, objective: Record) -> str:
    counted = "preference pairs" if are_compared(results.get("evals") or []) else "answers"
    base, data = run["base"], run["data"]
    storage = QUANTIZATION_NAMES.get(base["quantization"], f"in {run['device']['compute_dtype']}")
    double = ", double quantization" if base["quantization"] in FOUR_BIT_TYPES and base.get("double_quant") else ""
    lines = [
        f"# {escape_markdown(run['name'])}\n",
        f"A LoRA adapter for {_hub_link(base['hub_id'], base['name'])} ({storage}{double}), tuned with"
        f" {describe_objective(objective)} on {data['train_pairs']} {counted} of"
        f" {_hub_link(data['train'], data['train'], 'datasets/')}.",
    ]
    if base.get("note"):
        lines.append(f"\nThe base: {escape_markdown(strip_local_paths(base['note']))}")
    return "\n".join(lines) + "\n"


def _results_section(results: Record, samples: Sequence[Record]) -> str:
    pairs, answers = results["pairs"]["eval"], results.get("answers")
    counted = "pairs; a tie counts as one half" if are_compared(results["evals"]) else "answers"
    text = f"## Results\n\nOn {pairs} held-out {counted}.\n\n{results_markdown(results)}"
    if signs := results.get("signs"):
        lines = [f"- Step {sign['step']}: {escape_markdown(sign['sentence'])}.\n" for sign in signs]
        text += "\nSigns of trouble during the run:\n\n" + "".join(lines)
    if answers:
        text += f"\nGreedy answers to held-out prompts:\n\n{answers_markdown(answers, samples)}"
    return text


def _samples_section(samples: Sequence[Record]) -> str:
    if not samples:
        return ""
    parts = ["## Samples\n\nHeld-out prompts, answered greedily.\n"]
    for sample in samples:
        parts.append(f"Prompt:\n\n{pre_block(format_prompt(sample['prompt']))}")
        for who in ("base", "tuned"):
            ending = "" if sample.get(f"{who}_ended", True) else ", stopped by the token limit"
            parts.append(f"{who.capitalize()} ({sample[f'{who}_tokens']} tokens{ending}):\n\n{pre_block(sample[who])}")
    return "\n".join(parts)


def _loading_section(run: Record) -> str:
    folder = f"adapters/{run['name']}"
    commands = "\n".join(f"qlora-dpo {verb} {shlex.quote(folder)}" for verb in ("chat", "merge"))
    return f"## Use\n\n{code_block(commands, 'sh')}\nOr with PEFT:\n\n{code_block(_peft_code(run, folder), 'python')}"


def _peft_code(run: Record, folder: str) -> str:
    base = run["base"]
    hub_id = parse_hub_id(base["hub_id"])
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
    ]
    dtype = f"dtype=torch.{TORCH_DTYPE_NAMES[run['device']['compute_dtype']]}"
    quantization = base["quantization"]
    if quantization in FOUR_BIT_TYPES:
        lines[-1] += ", BitsAndBytesConfig"
        lines += [
            "",
            f"{quantization} = BitsAndBytesConfig(",
            f'    load_in_4bit=True, bnb_4bit_quant_type="{quantization}",',
            f"    bnb_4bit_use_double_quant={bool(base['double_quant'])}, bnb_4bit_compute_{dtype},",
            ")",
        ]
        dtype += f", quantization_config={quantization}"
    elif quantization == "int8":
        lines[-1] += ", BitsAndBytesConfig"
        lines += [
            "",
            "# bitsandbytes also rounds the inputs of layers to 8 bits; training did not, nor does a merged model",
            "int8 = BitsAndBytesConfig(load_in_8bit=True)",
        ]
        dtype += ", quantization_config=int8"
    revision = f", revision={json.dumps(base['revision'])}" if hub_id and base.get("revision") else ""
    name = hub_id or "FOLDER_OF_THE_BASE"
    lines += [
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(name)}{revision}, {dtype})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(folder)})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})",
    ]
    return "\n".join(lines)


def _training_section(run: Record, recipe_text: str) -> str:
    device = run["device"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    facts = [
        f"Seed {run['seed']}, {run['steps']} steps, compute in {device['compute_dtype']}"
        f" on {escape_markdown(device['name'])}, {run['seconds']['total'] / 60:.1f} minutes in all.",
        *_start_and_reference_lines(run),
        f"Versions: {escape_markdown(versions)}.",
    ]
    return "\n".join(
        [
            "## How it was made\n",
            code_block(strip_local_paths(run["command"]), "sh"),
            "\n".join(facts) + "\n",
            "The recipe:\n",
            code_block(strip_local_paths(redact_secrets(sanitize_text(recipe_text))), "toml"),
        ]
    )


def _start_and_reference_lines(run: Record) -> list[str]:
    """The adapter that training started from, if any, and the reference, if it is not the base."""
    start, reference = run.get("init_from"), run.get("reference", {"kind": "base"})
    lines = [f"Training went on from the adapter {escape_markdown(start['name'])}."] if start else []
    match reference["kind"]:
        case "adapter":
            lines.append(f"The reference is the adapter {escape_markdown(reference['name'])}.")
        case "model":
            lines.append(f"The reference is {_hub_link(reference['hub_id'], reference['name'])}.")
        case "ema":
            steps = reference["ref_model_sync_steps"]
            lines.append(
                f"The reference is a copy of the adapter that follows it {_every_steps(steps)}, by "
                f"{reference['ref_model_mixup_alpha']:g} of the way; evaluations compare with it as well."
            )
    return lines


def _every_steps(steps: int) -> str:
    return "every step" if steps == 1 else f"every {steps} steps"


def _hub_link(hub: str | None, name: str, kind: str = "") -> str:
    """A link to the hub; without a hub id, the last part of the path in `name`."""
    hub_id = parse_hub_id(hub)
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})" if hub_id else escape_markdown(path_name(name))


def path_name(path: str) -> str:
    """The last part of a path; a hub id is returned unchanged."""
    if parse_hub_id(path):
        return path
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path
