"""The model card of a run: its README.md, with the hub's metadata, the figures, samples and how to load the adapter."""

import html
import json
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.recipe.model import QUANTIZATION_NAMES
from qlora_dpo.recipe.tables import is_local_path
from qlora_dpo.redact import redact_secrets
from qlora_dpo.report.objective_names import describe_objective, objective_tags
from qlora_dpo.report.samples import format_prompt
from qlora_dpo.report.tables import answers_markdown, escape_markdown, results_markdown

CARD_SAMPLES = 3
FOUR_BIT_TYPES = ("nf4", "fp4")
TORCH_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
HUB_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
QUOTED_PATH_PATTERN = re.compile(r"""(["'])((?:~|[A-Za-z]:)?[/\\][^"'\n]*)\1""")
BARE_PATH_PATTERN = re.compile(r"""(?<![\w/\\.~])(?:-o)?((?:~|[A-Za-z]:)?[/\\][\w.~-][^\s"'`,;)\]]*)""")

Record = Mapping[str, Any]


def model_card(
    run: Record,
    results: Record,
    samples: Sequence[Record],
    epoch_table: str,
    recipe_text: str,
    objective: Record,
    licence: str | None = None,
) -> str:
    """The whole README.md of a run directory; no path of the machine it was made on is in it.

    `objective` is the recipe's table, and `licence` the base's, if it is known.
    """
    sections = [
        _intro_section(run, objective),
        _results_section(results, samples),
        f"## By epoch\n\n{epoch_table}",
        _samples_section(samples[:CARD_SAMPLES]),
        _loading_section(run),
        _training_section(run, recipe_text),
    ]
    body = "\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{_metadata(run, results, objective, licence).to_yaml()}\n---\n\n{body}"))


def parse_hub_id(name: str | None) -> str | None:
    """`name` if it can be a name on the hub, None if it is a path, a PyPI package or absent."""
    return name if name and not is_local_path(name) and HUB_ID_PATTERN.fullmatch(name) else None


def strip_local_paths(text: str) -> str:
    """`text` with every absolute path cut down to its last part: a card tells nothing about its author's disk."""
    text = text.replace("file://", "")
    text = QUOTED_PATH_PATTERN.sub(lambda found: f"{found[1]}{path_name(found[2])}{found[1]}", text)
    return BARE_PATH_PATTERN.sub(lambda found: found[0].replace(found[1], path_name(found[1])), text)


def code_block(text: str, language: str) -> str:
    """A code block with a fence longer than any run of backticks in `text`."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


def pre_block(text: str) -> str:
    """Text of a model or a data set in a block that it cannot leave: in HTML's <pre> markdown has no meaning."""
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
    kinds = {"accuracy": ("rewards/accuracies", "Preference accuracy"), "loss": ("loss", "Loss")}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=parse_hub_id(held_out) or "preference-pairs",
            dataset_name=f"{path_name(held_out)}, {results['pairs']['eval']} held-out pairs",
            metric_type=kind,
            metric_name=name,
            metric_value=round(last[f"eval_{key}"], 4),
        )
        for kind, (key, name) in kinds.items()
        if last.get(f"eval_{key}") is not None
    ]


def _intro_section(run: Record, objective: Record) -> str:
    base, data = run["base"], run["data"]
    kind = QUANTIZATION_NAMES.get(base["quantization"], f"in {run['device']['compute_dtype']}")
    double = ", double quantization" if base["quantization"] in FOUR_BIT_TYPES and base.get("double_quant") else ""
    lines = [
        f"# {escape_markdown(run['name'])}\n",
        f"A LoRA adapter for {_hub_link(base['hub_id'], base['name'])} ({kind}{double}), tuned with"
        f" {describe_objective(objective)} on {data['train_pairs']} preference pairs of"
        f" {_hub_link(data['train'], data['train'], 'datasets/')}.",
    ]
    if base.get("note"):
        lines.append(f"\nThe base: {escape_markdown(strip_local_paths(base['note']))}")
    return "\n".join(lines) + "\n"


def _results_section(results: Record, samples: Sequence[Record]) -> str:
    pairs, answers = results["pairs"]["eval"], results.get("answers")
    text = f"## Results\n\nOn {pairs} held-out pairs; a tie counts as one half.\n\n{results_markdown(results)}"
    if signs := results.get("signs"):
        lines = [f"- Step {sign['step']}: {escape_markdown(sign['sentence'])}.\n" for sign in signs]
        text += "\nSigns of trouble that the run told of:\n\n" + "".join(lines)
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
            stopped = "" if sample.get(f"{who}_ended", True) else ", stopped by the token limit"
            parts.append(f"{who.capitalize()} ({sample[f'{who}_tokens']} tokens{stopped}):\n\n{pre_block(sample[who])}")
    return "\n".join(parts)


def _loading_section(run: Record) -> str:
    folder = f"adapters/{run['name']}"
    commands = "\n".join(f"qlora-dpo {verb} {shlex.quote(folder)}" for verb in ("chat", "merge"))
    return f"## Use\n\n{code_block(commands, 'sh')}\nOr with PEFT:\n\n{code_block(_peft_code(run, folder), 'python')}"


def _peft_code(run: Record, folder: str) -> str:
    base = run["base"]
    found = parse_hub_id(base["hub_id"])
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
    ]
    dtype = f"dtype=torch.{TORCH_DTYPE_NAMES[run['device']['compute_dtype']]}"
    kind = base["quantization"]
    if kind in FOUR_BIT_TYPES:
        lines[-1] += ", BitsAndBytesConfig"
        lines += [
            "",
            f"{kind} = BitsAndBytesConfig(",
            f'    load_in_4bit=True, bnb_4bit_quant_type="{kind}",',
            f"    bnb_4bit_use_double_quant={bool(base['double_quant'])}, bnb_4bit_compute_{dtype},",
            ")",
        ]
        dtype += f", quantization_config={kind}"
    elif kind == "int8":
        lines[-1] += ", BitsAndBytesConfig"
        lines += [
            "",
            "# bitsandbytes rounds the inputs of layers to 8 bits too; training did not, and a merged model does not",
            "int8 = BitsAndBytesConfig(load_in_8bit=True)",
        ]
        dtype += ", quantization_config=int8"
    revision = f", revision={json.dumps(base['revision'])}" if found and base.get("revision") else ""
    where = found or "FOLDER_OF_THE_BASE"
    lines += [
        "",
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(where)}{revision}, {dtype})",
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
    """What training went on from, and what the policy was compared with, where it is not a new adapter and the base."""
    start, reference = run.get("init_from"), run.get("reference", {"kind": "base"})
    told = [f"Training went on from the adapter {escape_markdown(start['name'])}."] if start else []
    match reference["kind"]:
        case "adapter":
            told.append(f"The reference is the adapter {escape_markdown(reference['name'])}.")
        case "model":
            told.append(f"The reference is {_hub_link(reference['hub_id'], reference['name'])}.")
        case "ema":
            steps = reference["ref_model_sync_steps"]
            told.append(
                f"The reference is a copy of the adapter that follows it {_every_steps(steps)}, by "
                f"{reference['ref_model_mixup_alpha']:g} of the way; evaluations compare with it as well."
            )
    return told


def _every_steps(steps: int) -> str:
    return "every step" if steps == 1 else f"every {steps} steps"


def _hub_link(hub: str | None, name: str, kind: str = "") -> str:
    """A link to the hub where there is something to link to, else the last part of a path in plain words."""
    found = parse_hub_id(hub)
    return f"[{found}](https://huggingface.co/{kind}{found})" if found else escape_markdown(path_name(name))


def path_name(path: str) -> str:
    """The last part of a path; a name that is no path comes back as it is."""
    if parse_hub_id(path):
        return path
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path
