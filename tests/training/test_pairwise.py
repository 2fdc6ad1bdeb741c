"""Every loss beside every reference, adapter and quantization, two of them at a time: it trains, or is refused."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations, cycle, product
from pathlib import Path
from typing import Any

import commands_in_process
import pytest
import tiny
import tiny_run
import varied_model
from cli_sandbox import rows

from qlora_dpo.recipe.objective import OBJECTIVE_TABLES, ReferenceFree, loss_types

pytestmark = tiny_run.LIBRARIES_WARN
TESTS = Path(__file__).parents[1]

LOSSES: dict[str, list[str]] = {loss: [] for table in OBJECTIVE_TABLES for loss in loss_types(table)} | {
    "robust": ["objective.label_smoothing=0.1"],
    "sum": ["objective.loss_weights={ sigmoid = 0.8, bco_pair = 0.2 }"],
    "odpo": ['objective.score_columns=["better", "worse"]'],
    "kto": ['data.train="./answers.jsonl"'],
}
REFERENCES = {
    "none_named": [],
    "base": ['reference.kind="base"'],
    "adapter": ['reference.kind="adapter"', 'reference.path="./starts/{adapter}-{quantization}"'],
    "model": ['reference.kind="model"', 'reference.name="./other"', 'reference.quantization="none"'],
    "nf4_model": ['reference.kind="model"', 'reference.name="./other"'],
    "ema": ['reference.kind="ema"', "reference.ref_model_sync_steps=1"],
}
ADAPTERS = {
    "plain": [],
    "dropout": ["lora.lora_dropout=0.3"],
    "gaussian": ['lora.init_lora_weights="gaussian"'],
    "rslora": ["lora.use_rslora=true"],
    "dora": ["lora.use_dora=true"],
    "loraplus": ["lora.loraplus_lr_ratio=16"],
    "patterns": ["lora.rank_pattern={ q_proj = 2 }", "lora.alpha_pattern={ v_proj = 9 }"],
    "some_layers": ['lora.target_modules=["q_proj", "v_proj"]', "lora.layers_to_transform=[1]"],
    "some_modules": ['lora.exclude_modules=["down_proj"]'],
    "with_norms": ['lora.modules_to_save=["norm"]'],
    "goes_on": ['lora.init_from="./starts/plain-{quantization}"'],
}
QUANTIZATIONS = {
    "none": ['model.quantization="none"'],
    "nf4": ['model.quantization="nf4"'],
    "nf4_once": ['model.quantization="nf4"', "model.double_quant=false"],
    "fp4": ['model.quantization="fp4"'],
    "int8": ['model.quantization="int8"'],
}
Case = tuple[str, str, str, str]
"""A loss, a reference, an adapter and a quantization."""
CHOICES: tuple[Sequence[str], ...] = (list(LOSSES), list(REFERENCES), list(ADAPTERS), list(QUANTIZATIONS))

NO_REFERENCE = {loss for table in OBJECTIVE_TABLES if issubclass(table, ReferenceFree) for loss in loss_types(table)}


def pairwise(*choices: Sequence[str]) -> list[tuple[str, ...]]:
    """Cases in which any two values of two choices meet: each is the one that brings most pairs that are missing."""
    missing = {
        ((a, x), (b, y))
        for (a, xs), (b, ys) in combinations(enumerate(choices), 2)
        for x, y in product(xs, ys)
    }  # fmt: skip
    found = []
    while missing:
        (a, x), (b, y) = min(missing)
        case: list[str | None] = [x if i == a else y if i == b else None for i in range(len(choices))]
        for i, values in enumerate(choices):
            if case[i] is None:
                case[i] = max(
                    values, key=lambda value, i=i, case=case: len(met([*case[:i], value, *case[i + 1 :]]) & missing)
                )
        whole = tuple(str(value) for value in case)
        missing -= met(whole)
        found.append(whole)
    return found


def met(case: Sequence[str | None]) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    """The pairs of values in a case, of which some may not be chosen yet."""
    chosen = [(i, value) for i, value in enumerate(case) if value is not None]
    return set(combinations(chosen, 2))


def quick() -> list[tuple[str, ...]]:
    """Every loss once, with the next reference, adapter and quantization; those without a reference also with one."""
    others = [cycle(values) for values in CHOICES[1:]]
    trained = [(loss, *map(next, others)) for loss in LOSSES if loss not in NO_REFERENCE]
    alone = [(loss, "none_named", next(others[1]), next(others[2])) for loss in LOSSES if loss in NO_REFERENCE]
    return [*trained, *alone, *((loss, "ema", "plain", "none") for loss in NO_REFERENCE)]


def settings(case: Sequence[str]) -> list[str]:
    loss, reference, adapter, quantization = case
    parts = [
        f"objective.loss_type={loss}",
        *LOSSES[loss],
        *REFERENCES[reference],
        *ADAPTERS[adapter],
        *QUANTIZATIONS[quantization],
    ]
    return [part.format(adapter=adapter, quantization=quantization) if "starts" in part else part for part in parts]


def refusal(case: Sequence[str]) -> str | None:
    """What is said of a case that cannot be; None if it trains."""
    loss, reference, _, _ = case
    if loss in NO_REFERENCE and reference != "none_named":
        return (
            f'pairs.toml: [reference] is not read by loss_type = "{loss}", which compares with no other model; leave '
            "the table out, or choose another loss_type"
        )
    return None


RECIPE = """
[model]
name = "./model"
dtype = "fp32"
[lora]
r = 4
[data]
train = "./pairs.jsonl"
[train]
batch_size = 4
learning_rate = 1e-3
max_steps = 2
logging_steps = 1
[samples]
prompts = 0
"""


def make_files(place: Path) -> None:
    for name, seed in (("model", 0), ("other", 1)):
        varied_model.qwen2(seed).save_pretrained(place / name)
        tiny.tokenizer().save_pretrained(place / name)
    scored = [{**row, "better": 2 + i % 3, "worse": i % 2} for i, row in enumerate(rows(12))]
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows(12)
        for side in ("chosen", "rejected")
    ]
    for name, content in (("pairs", scored), ("answers", labelled)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (place / "pairs.toml").write_text(RECIPE)


def outcomes(place: Path, cases: Sequence[Sequence[str]]) -> Iterator[tuple[Sequence[str], int, str, Path]]:
    """Each case with its exit code, what was said and its folder."""
    make_files(place)
    starts = {("plain", quantization) for _, _, adapter, quantization in cases if adapter == "goes_on"}
    starts |= {(adapter, quantization) for _, reference, adapter, quantization in cases if reference == "adapter"}
    starts |= {("plain", quantization) for adapter, quantization in starts if adapter == "goes_on"}
    commands = []
    for adapter, quantization in sorted(starts, key=lambda start: (start[0] == "goes_on", start)):
        command = ["train", "pairs.toml", "-o", f"starts/{adapter}-{quantization}", "--max-steps=1"]
        commands.append([*command, *sets(settings(("sft", "none_named", adapter, quantization)))])
    for i, case in enumerate(cases):
        commands.append(["train", "pairs.toml", "-o", f"adapters/run-{i}", *sets(settings(case))])
    found = commands_in_process.said(commands, place, commands_in_process.here(QLORA_DPO_CACHE=str(place / "cache")))
    assert [each.code for each in found[: len(starts)]] == [0] * len(starts), found[: len(starts)]
    for i, (case, each) in enumerate(zip(cases, found[len(starts) :], strict=True)):
        yield case, each.code, each.err, place / f"adapters/run-{i}"


def sets(parts: Sequence[str]) -> list[str]:
    return [word for part in parts for word in ("--set", part)]


def hold(case: Sequence[str], code: int, said: str, folder: Path) -> None:
    """A case either trained two steps into an adapter of its kind, or was refused and wrote nothing."""
    told = refusal(case)
    if told is not None:
        assert (code, said.splitlines()[-1]) == (2, f"qlora-dpo: {told}"), case
        assert not folder.exists(), case
        return
    assert code == 0, (case, said)
    lines: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 2, case
    assert all(math.isfinite(loss) for loss in losses), (case, losses)
    assert (folder / "adapter_model.safetensors").is_file(), case
    recipe = (folder / "resolved.toml").read_text()
    assert f'loss_type = "{case[0]}"' in recipe, case


def test_every_loss_trains_with_every_reference_adapter_and_quantization_or_is_refused(tmp_path: Path) -> None:
    cases = quick()
    assert all({case[i] for case in cases} == set(values) for i, values in enumerate(CHOICES))
    for case in outcomes(tmp_path, cases):
        hold(*case)


@pytest.mark.slow
def test_any_two_of_loss_reference_adapter_and_quantization_train_or_are_refused(tmp_path: Path) -> None:
    cases = pairwise(*CHOICES)
    wanted = {pair for case in product(*CHOICES) for pair in met(case)}
    assert {pair for case in cases for pair in met(case)} == wanted
    refused = 0
    for case in outcomes(tmp_path, cases):
        hold(*case)
        refused += refusal(case[0]) is not None
    print(f"pairwise: {len(cases)} runs, of which {refused} refused")
