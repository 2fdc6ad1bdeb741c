"""Names that other tools have for quantization, adapters, optimizers, trackers: each leads to ours, or a reason."""

from pathlib import Path

import pytest

from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe import load_recipe

HEAD = '[model]\nname = "org/model"\n\n[data]\ntrain = "org/data"\n\n'


@pytest.mark.parametrize(
    ("table", "line", "says"),
    [
        (
            "train",
            "load_in_8bit = true",
            '[train] has no key "load_in_8bit": that is transformers\' name; here it is model.quantization = "int8"',
        ),
        (
            "train",
            'bnb_4bit_quant_type = "fp4"',
            '[train] has no key "bnb_4bit_quant_type": that is transformers\' name; here it is model.quantization = '
            '"nf4" or "fp4"',
        ),
        (
            "train",
            'report_to = "tensorboard"',
            '[train] has no key "report_to": that is transformers\' name; here it is [track] wandb = "PROJECT", '
            'tensorboard = true, trackio = "PROJECT"',
        ),
        (
            "train",
            "neftune_noise_alpha = 5",
            '[train] has no key "neftune_noise_alpha": noise on the embeddings moves every log-probability, and a pair '
            "is judged by small differences of those; lora.lora_dropout is drawn anew in each step instead",
        ),
        (
            "lora",
            'additional_target = "norm"',
            '[lora] has no key "additional_target": that is LLaMA-Factory\'s name; here it is lora.modules_to_save',
        ),
        (
            "lora",
            'lora_modules_to_save = ["norm"]',
            '[lora] has no key "lora_modules_to_save": that is axolotl\'s name; here it is lora.modules_to_save',
        ),
        (
            "lora",
            'layers_to_transform = "7-0"\ntarget_modules = ["q_proj"]',
            'lora.layers_to_transform is the string "7-0"; it must be a list of numbers, or the first and the last '
            'layer as in "0-7"',
        ),
        ("lora", "modules_to_save = []", "lora.modules_to_save is a list; it must be a list that is not empty"),
        (
            "track",
            "tensorboard = false",
            '[track] names no tracker; write wandb = "PROJECT", tensorboard = true or trackio = "PROJECT"',
        ),
    ],
)
def test_it_is_refused_with_what_to_write(table: str, line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f"{HEAD}[{table}]\n{line}\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(str(tmp_path / "r.toml"))
    place = 7 if says.startswith("[track]") else 8
    assert str(raised.value) == f"{tmp_path / 'r.toml'}:{place}: {says}"


def test_double_quantization_is_of_4_bits(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(HEAD)
    with pytest.raises(RecipeError) as raised:
        load_recipe(str(tmp_path / "r.toml"), ["model.quantization=int8", "model.double_quant=false"])
    assert str(raised.value) == (
        f'{tmp_path / "r.toml"}:1: [model] has double_quant = false, which only quantization = "nf4" or "fp4" reads, '
        'not "int8"; leave it out'
    )
