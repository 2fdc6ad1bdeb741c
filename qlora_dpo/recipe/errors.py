"""Turns pydantic's errors about a recipe into sentences with file, line, key and what to write instead."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from qlora_dpo.files import text_lines
from qlora_dpo.recipe.data import MixTable
from qlora_dpo.recipe.former_keys import describe_former_key
from qlora_dpo.recipe.objective import OBJECTIVE_TABLES, PlainLoss, loss_types
from qlora_dpo.recipe.reference import REFERENCE_TABLES

FOREIGN_KEYS = {
    "lora_rank": ("LLaMA-Factory's", "lora.r"),
    "lora_r": ("axolotl's and TRL's", "lora.r"),
    "rank": ("torchtune's", "lora.r"),
    "alpha": ("torchtune's", "lora.lora_alpha"),
    "additional_target": ("LLaMA-Factory's", "lora.modules_to_save"),
    "lora_modules_to_save": ("axolotl's", "lora.modules_to_save"),
    "lora_target": ("LLaMA-Factory's", "lora.target_modules"),
    "lora_target_modules": ("axolotl's and TRL's", "lora.target_modules"),
    "lora_target_linear": ("axolotl's", 'lora.target_modules = "all-linear"'),
    "pref_beta": ("LLaMA-Factory's", "objective.beta"),
    "rl_beta": ("axolotl's", "objective.beta"),
    "dpo_beta": ("Soup's and unsloth's", "objective.beta"),
    "pref_ftx": ("LLaMA-Factory's", "objective.sft_weight"),
    "rpo_alpha": ("TRL's", "objective.sft_weight"),
    "dpo_label_smoothing": ("LLaMA-Factory's", "objective.label_smoothing"),
    "micro_batch_size": ("axolotl's", "train.micro_batch_tokens (tokens, not pairs)"),
    "per_device_train_batch_size": ("TRL's", "train.batch_size (pairs per optimizer step)"),
    "gradient_accumulation_steps": ("TRL's", "train.batch_size (pairs per optimizer step)"),
    "per_device_eval_batch_size": ("TRL's", "train.micro_batch_tokens"),
    "max_prompt_length": ("TRL's older", 'data.max_length with data.overlong = "cut_prompt"'),
    "cutoff_len": ("LLaMA-Factory's", "data.max_length"),
    "sequence_len": ("axolotl's", "data.max_length"),
    "max_seq_length": ("unsloth's", "data.max_length"),
    "truncation_mode": ("TRL's", "data.overlong"),
    "model_name_or_path": ("TRL's", "model.name"),
    "base_model": ("axolotl's", "model.name"),
    "load_in_4bit": ("transformers'", 'model.quantization = "nf4"'),
    "load_in_8bit": ("transformers'", 'model.quantization = "int8"'),
    "quantization_bit": ("LLaMA-Factory's", 'model.quantization = "nf4" or "int8"'),
    "quantization_type": ("LLaMA-Factory's", 'model.quantization = "nf4" or "fp4"'),
    "bnb_4bit_quant_type": ("transformers'", 'model.quantization = "nf4" or "fp4"'),
    "quant_method": ("ms-swift's", "model.quantization"),
    "bnb_4bit_use_double_quant": ("transformers'", "model.double_quant"),
    "torch_dtype": ("transformers'", "model.dtype"),
    "bf16": ("transformers'", 'model.dtype = "bf16"'),
    "fp16": ("transformers'", 'model.dtype = "fp16"'),
    "dataset": ("LLaMA-Factory's", "data.train"),
    "datasets": ("axolotl's", "data.train, or [[data.mix]] tables"),
    "interleave_probs": ("LLaMA-Factory's", "weight in [[data.mix]] tables"),
    "dataset_mixer": ("the alignment handbook's", "[[data.mix]] tables"),
    "dataset_config": ("TRL's", "data.config"),
    "subset": ("LLaMA-Factory's", "data.config"),
    "path": ("axolotl's and TRL's", "source in [[data.mix]], or data.train"),
    "dataset_name": ("TRL's", "data.train"),
    "max_samples": ("LLaMA-Factory's", "data.max_train_samples"),
    "num_epochs": ("axolotl's", "train.num_train_epochs"),
    "epochs": ("torchtune's", "train.num_train_epochs"),
    "lr": ("torchtune's", "train.learning_rate"),
    "lr_scheduler": ("axolotl's", "train.lr_scheduler_type"),
    "warmup_ratio": ("transformers' older", "train.warmup_steps"),
    "wandb_project": ("axolotl's", '[track] wandb = "PROJECT"'),
    "greater_is_better": ("transformers'", "train.metric_for_best_model (which way is better is known)"),
    "report_to": ("transformers'", '[track] wandb = "PROJECT", tensorboard = true, trackio = "PROJECT"'),
    "use_tensorboard": ("axolotl's", "[track] tensorboard = true"),
    "logging_dir": ("transformers'", '[track] tensorboard = "FOLDER"'),
    "trackio_project_name": ("axolotl's", '[track] trackio = "PROJECT"'),
    "output_dir": ("TRL's", "the command's -o DIR"),
    "pref_loss": ("LLaMA-Factory's", "objective.loss_type"),
    "rl": ("axolotl's", "objective.loss_type"),
    "rlhf_type": ("ms-swift's", "objective.loss_type"),
    "cpo_alpha": ("TRL's", "objective.sft_weight"),
    "simpo_gamma_beta_ratio": ("SimPO's scripts'", "objective.simpo_gamma (beta times that)"),
    "lora_model_dir": ("axolotl's", "lora.init_from"),
    "adapter_name_or_path": ("LLaMA-Factory's", "lora.init_from"),
    "model_adapter_name": ("TRL's older", "lora.init_from"),
    "ref_model": ("LLaMA-Factory's and ms-swift's", '[reference] kind = "model" with its name'),
    "ref_model_name_or_path": ("TRL's", '[reference] kind = "model" with its name'),
    "ref_model_adapters": ("LLaMA-Factory's", '[reference] kind = "adapter" with its path'),
    "ref_adapters": ("ms-swift's", '[reference] kind = "adapter" with its path'),
    "ref_adapter_name": ("TRL's older", '[reference] kind = "adapter" with its path'),
    "sync_ref_model": ("TRL's", '[reference] kind = "ema"'),
}

DISCRIMINATORS = {"objective": "loss_type", "reference": "kind"}
"""The tables with several sets of keys, and the key that chooses among them."""

UNSUPPORTED_KEYS = {
    "neftune_noise_alpha": (
        "noise on the embeddings moves every log-probability, and a pair is judged by small differences of those; "
        "lora.lora_dropout is drawn anew in each step instead"
    ),
    "noisy_embedding_alpha": "that is axolotl's name of NEFTune, whose noise moves what a pair is judged by",
}
"""Keys of other tools that have no counterpart, and why."""
MIX_PATH = ("data", "mix")
"""The table and key of a mixture."""

TYPE_NAMES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a string in quotes",
    "bool_type": "true or false",
    "list_type": "a list of strings",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "dict_type": "a table",
    "finite_number": "a finite number",
}


def describe_errors(
    error: ValidationError, recipe: type[BaseModel], path: str, text: str, overrides: Sequence[str]
) -> Iterator[str]:
    """Yield one line for every wrong key, in the order of the file."""
    problems_of: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for problem in error.errors(include_url=False):
        table, unknown_kind = str(problem["loc"][0]), problem["type"] in ("union_tag_invalid", "union_tag_not_found")
        keys = (table, DISCRIMINATORS[table]) if unknown_kind else _error_keys(problem["loc"])
        problems_of.setdefault(keys, []).append(dict(problem))
    lines = key_lines(text)
    placed = []
    for keys, problems in problems_of.items():
        line = lines.get(keys) or lines.get(keys[:3]) or lines.get(keys[:1]) or 0
        set_by_hand = [override for override in overrides if _override_keys(override)[:2] == keys[:2]]
        where = f"--set {set_by_hand[-1]}" if set_by_hand else f"{path}:{line}" if line else path
        placed.append((line, f"{where}: {_describe_problem(keys, problems, recipe)}"))
    return (sentence for _, sentence in sorted(placed))


def _override_keys(override: str) -> tuple[str, ...]:
    return tuple(override.split("=")[0].replace(" ", "").split("."))


def _error_keys(place: Sequence[str | int]) -> tuple[str, ...]:
    """Table and key of an error's location, in which pydantic puts the kind of objective or reference between them.

    For a table of a mixture its number and the key in it follow.
    """
    if tuple(place[:2]) == MIX_PATH and len(place) > 2:
        return (*MIX_PATH, *map(str, place[2:4]))
    names = [part for part in place if isinstance(part, str)]
    return tuple(names[:1] + names[2:3] if names[0] in DISCRIMINATORS else names[:2])


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line, counted from 1, of each table and each of its keys in TOML `text`."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    counts: dict[tuple[str, ...], int] = {}
    open_string = ""
    for number, line in enumerate(text_lines(text), 1):
        if open_string:
            open_string = "" if open_string in line else open_string
            continue
        if header := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]", line):
            table = _split_dotted(header[1])
            lines.setdefault(table, number)
            if line.lstrip().startswith("[["):
                counts[table] = counts.get(table, -1) + 1
                table = (*table, str(counts[table]))
                lines[table] = number
        elif pair := re.match(
            r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=(.*)""", line
        ):
            lines.setdefault((*table, *_split_dotted(pair[1])), number)
            for quotes in ('"' * 3, "'" * 3):
                open_string = quotes if pair[2].count(quotes) == 1 else open_string
    return lines


def _split_dotted(name: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in name.split("."))


def _describe_problem(keys: tuple[str, ...], problems: list[dict[str, Any]], recipe: type[BaseModel]) -> str:
    first = problems[0]
    name = ".".join(keys)
    if keys[:2] == MIX_PATH and len(keys) > 2:
        return _describe_mix_problem(keys[3:], [{**problem, "loc": problem["loc"][3:]} for problem in problems])
    if keys[:1] == ("objective",):
        if first["type"] == "union_tag_invalid":
            return _unknown_loss(first["input"].get("loss_type"))
        if first["type"] == "extra_forbidden":
            return _unused_loss_key(keys[1], str(first["loc"][1]), recipe)
    if keys[:1] == ("reference",):
        kinds = ", ".join(f'"{kind}"' for kind in _reference_tables())
        match first["type"]:
            case "union_tag_not_found":
                return f'[reference] needs the key "kind", one of {kinds}'
            case "union_tag_invalid":
                return f"reference.kind is {_display_value(first['input'].get('kind'))}; it must be one of {kinds}"
            case "extra_forbidden":
                return _unused_reference_key(keys[1], str(first["loc"][1]), recipe)
    table = recipe.model_fields[keys[0]].annotation if keys and keys[0] in recipe.model_fields else None
    match first["type"]:
        case "extra_forbidden":
            known = _table_fields(table) if len(keys) > 1 else list(recipe.model_fields)
            return _unknown_key(keys, known, recipe)
        case "missing" if len(keys) == 1:
            return f"the recipe needs a table [{name}]"
        case "missing":
            return f'[{keys[0]}] needs the key "{keys[1]}"'
        case "value_error" if keys == ("lora", "init_lora_weights"):
            value, right = _display_value(first["input"]), first["ctx"]["error"]
            return f'{name} is {value}; it must be {right}: "default" or "gaussian"'
        case "value_error" if len(keys) == 1:
            return f"[{name}] {first['ctx']['error']}"
        case _:
            return f"{name} is {_display_value(first['input'])}; it must be {_expected(problems)}"


def _describe_mix_problem(keys: tuple[str, ...], problems: list[dict[str, Any]]) -> str:
    """The sentence about one table of a mixture, or about one of its keys."""
    first = problems[0]
    match first["type"]:
        case "extra_forbidden" if keys[0] in FOREIGN_KEYS:
            owner, ours = FOREIGN_KEYS[keys[0]]
            return f'[[data.mix]] has no key "{keys[0]}": that is {owner} name; here it is {ours}'
        case "extra_forbidden":
            known = list(MixTable.model_fields)
            close = difflib.get_close_matches(keys[0], known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"it has {', '.join(known)}"
            return f"[[data.mix]] has no key {_quote(keys[0])}; {hint}"
        case "missing":
            return f'[[data.mix]] needs the key "{keys[0]}"'
        case _:
            name = f"{keys[0]} in [[data.mix]]" if keys else "[[data.mix]]"
            return f"{name} is {_display_value(first['input'])}; it must be {_expected(problems)}"


def _unknown_loss(loss_type: object) -> str:
    known = [name for table in OBJECTIVE_TABLES for name in loss_types(table)]
    close = difflib.get_close_matches(str(loss_type), known, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"it must be one of {', '.join(known)}"
    return f"objective.loss_type is {_display_value(loss_type)}; {hint}"


def _unused_loss_key(key: str, kind: str, recipe: type[BaseModel]) -> str:
    """The sentence about a key of [objective] that its loss does not read: which losses do, or what was meant."""
    chosen = next(
        table for table in OBJECTIVE_TABLES if kind in (*loss_types(table), "plain" if table is PlainLoss else "")
    )
    readers = [name for table in OBJECTIVE_TABLES if key in table.model_fields for name in loss_types(table)]
    if readers:
        loss = "this loss" if chosen is PlainLoss else f'loss_type = "{loss_types(chosen)[0]}"'
        verb = "does" if len(readers) == 1 else "do"
        return f'[objective] has "{key}", which {loss} does not read; {", ".join(readers)} {verb}'
    return _unknown_key(("objective", key), list(chosen.model_fields), recipe)


def _reference_tables() -> dict[str, type[BaseModel]]:
    """The tables of [reference] by `kind`."""
    return {table.model_fields["kind"].annotation.__args__[0]: table for table in REFERENCE_TABLES}  # type: ignore[union-attr]


def _unused_reference_key(key: str, kind: str, recipe: type[BaseModel]) -> str:
    """The sentence about a key of [reference] that its kind does not read: which kinds do, or what was meant."""
    kinds = _reference_tables()
    if readers := [name for name, table in kinds.items() if key in table.model_fields]:
        verb = "does" if len(readers) == 1 else "do"
        return f'[reference] has "{key}", which kind = "{kind}" does not read; {", ".join(readers)} {verb}'
    return _unknown_key(("reference", key), list(kinds[kind].model_fields), recipe)


def _unknown_key(keys: tuple[str, ...], known: list[str], recipe: type[BaseModel]) -> str:
    place, key = (f"[{keys[0]}]", keys[1]) if len(keys) > 1 else ("a recipe", keys[0])
    if former := describe_former_key(".".join(keys)):
        return former
    if key in UNSUPPORTED_KEYS:
        return f'{place} has no key "{key}": {UNSUPPORTED_KEYS[key]}'
    if key in FOREIGN_KEYS:
        owner, ours = FOREIGN_KEYS[key]
        return f'{place} has no key "{key}": that is {owner} name; here it is {ours}'
    homes = [table for table, field in recipe.model_fields.items() if key in _table_fields(field.annotation)]
    homes += [
        name
        for name, tables in (("objective", OBJECTIVE_TABLES), ("reference", REFERENCE_TABLES))
        if any(key in table.model_fields for table in tables)
    ]
    if homes:
        return f'{place} has no key "{key}"; it belongs to [{"] or [".join(homes)}]'
    kind = "key" if len(keys) > 1 else "table"
    close = difflib.get_close_matches(key, known, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"it has {', '.join(known)}"
    return f"{place} has no {kind} {_quote(key)}; {hint}"


def _table_fields(annotation: Any) -> list[str]:
    """The keys of a table whose annotation is `Table` or `Table | None`; empty for a union of tables."""
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return list(kind.model_fields)
    return []


def _expected(problems: list[dict[str, Any]]) -> str:
    """The right values; the alternatives of a union are joined by "or"."""
    return " or ".join(dict.fromkeys(_expected_by_problem(problem) for problem in problems))


def _expected_by_problem(problem: dict[str, Any]) -> str:
    context = problem.get("ctx", {})
    if any(isinstance(part, int) for part in problem["loc"]):
        return "a list of strings that are not empty"
    match problem["type"]:
        case "literal_error":
            choices = str(context["expected"]).replace("'", '"')
            return "one of " + choices.replace(" or ", ", ") if " or " in choices else choices
        case "greater_than":
            return f"greater than {context['gt']}"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "less_than":
            return f"less than {context['lt']}"
        case "string_pattern_mismatch":
            return "64 hexadecimal digits in lower case"
        case "string_too_short":
            return "a string that is not empty"
        case "value_error":
            return str(context["error"])
        case "too_short":
            return "a list that is not empty"
        case kind:
            return TYPE_NAMES.get(kind, str(problem["msg"]))


def _display_value(value: object) -> str:
    """The value as the author of the recipe would recognize it, on one short line."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return f"the string {_quote(value)}"
        case dict():
            return "a table"
        case list():
            return "a list"
        case int() if abs(value) >= 10**18:
            return "a number with more than 18 digits"
        case int() | float():
            return str(value)
        case _:
            return f"the date or time {value}"


def _quote(text: str, max_length: int = 80) -> str:
    """`text` in double quotes, with line breaks and control characters written out."""
    return json.dumps(text if len(text) <= max_length else f"{text[:max_length]}...", ensure_ascii=False)
