"""A model folder that could run code, is pickled, or points elsewhere is refused by name before a weight is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from qlora_dpo.errors import ModelError
from qlora_dpo.model.base import load_base
from qlora_dpo.model.sources import ModelSource, fetch_model
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.recipe.model import ModelTable

pytestmark = tiny_run.LIBRARIES_WARN

CODE = "raise SystemExit('this code was run')\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model."""
    shutil.copytree(tiny_run.source().folder, tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        fetch_model(ModelTable(name=str(folder)))
    return str(error.value)


def test_a_model_that_needs_its_own_code_is_refused_and_the_code_not_run(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(CODE)
    change(folder / "config.json", model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    assert refused(folder) == (
        f"{folder}: needs code from its own repository to run, and such code is never run; name a model that "
        "transformers itself knows"
    )


def test_code_beside_a_model_that_transformers_knows_is_not_run(folder: Path) -> None:
    (folder / "modeling_own.py").write_text(CODE)
    (folder / "tokenization_own.py").write_text(CODE)
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", None]})
    source = fetch_model(ModelTable(name=str(folder)))
    assert type(load_base(source, ModelTable(name=str(folder), quantization="none"), tiny_run.CPU)).__name__ == (
        "Qwen2ForCausalLM"
    )
    try:
        load_tokenizer(ModelSource("own", folder))
    except ModelError as error:
        assert "cannot be loaded" in str(error)


@pytest.mark.parametrize(
    "place", ["../elsewhere.safetensors", "/etc/passwd", "sub/x.safetensors", "missing.safetensors"]
)
def test_an_index_that_names_files_elsewhere_is_refused(place: str, folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors", "x": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(folder) == (
        f"{folder}: its model.safetensors.index.json names {place!r}, which is not a file of the folder; get the model "
        "again, or name another one"
    )


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'])
def test_a_damaged_index_is_named(content: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    assert refused(folder).startswith(f"{folder}: its config.json or its index is damaged (")


def test_pickled_weights_are_refused_with_what_to_do(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refused(folder) == (
        f"{folder}: is not a model folder: it has pickled weights only, which can run code; convert them to "
        "safetensors first"
    )
