"""An adapter that a run is to go on from: what fits is put in bit for bit, what does not is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from two_runs import recipe, train

from qlora_dpo.errors import ModelError, QloraDpoError, RecipeError
from qlora_dpo.model.saved_adapter import (
    SavedAdapter,
    find_saved_adapter,
    load_adapter_weights,
    opened_by_peft,
)
from qlora_dpo.preference.start_checks import check_matches_peft, probe_logits
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME
from qlora_dpo.training.prepare import prepare_data

pytestmark = tiny_run.LIBRARIES_WARN

PAIR = tiny_run.pairs(1)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of this project's own, after two steps of SFT."""
    folder = tmp_path_factory.mktemp("trained") / "sft"
    train(folder, objective={"loss_type": "sft"})
    return folder


@pytest.fixture
def sft(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(trained, tmp_path / "sft")
    return tmp_path / "sft"


def rewrite(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def foreign(folder: Path, **values: Any) -> None:
    """As if another program had made it: PEFT's two files alone, with other values in its config."""
    for file in folder.iterdir():
        if file.name not in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    rewrite(folder / ADAPTER_CONFIG_NAME, **values)


def config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: foreign(folder, **values)


def base_in_run(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        run = json.loads((folder / "run.json").read_text())
        rewrite(folder / "run.json", base=run["base"] | values)

    return change


def cut(folder: Path) -> None:
    (folder / ADAPTER_SAFE_WEIGHTS_NAME).write_bytes((folder / ADAPTER_SAFE_WEIGHTS_NAME).read_bytes()[:-8])


def another_template(folder: Path) -> None:
    run = json.loads((folder / "run.json").read_text())
    rewrite(folder / "run.json", tokenizer=run["tokenizer"] | {"template": "0" * 64})


NOT_SHAPED: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no folder": (
        shutil.rmtree,
        {},
        "lora.init_from: {} is not a folder; name the folder of a finished run or of a PEFT adapter",
    ),
    "no adapter": (
        lambda folder: (folder / ADAPTER_SAFE_WEIGHTS_NAME).unlink(),
        {},
        "lora.init_from: {} has no adapter_config.json and adapter_model.safetensors; name the folder of a finished "
        "run or of a PEFT adapter",
    ),
    "damaged": (
        cut,
        {},
        "{}: is damaged: adapter_model.safetensors has not its size; take it from a backup, or train it again",
    ),
    "config damaged": (
        lambda folder: (foreign(folder), (folder / ADAPTER_CONFIG_NAME).write_text("{")),
        {},
        "{}/adapter_config.json: is damaged (JSONDecodeError); take it from a backup",
    ),
    "rank": (
        lambda folder: None,
        {"r": 8},
        "lora.r is 8, and {} was made with 4; write that in [lora], or leave lora.init_from out",
    ),
    "alpha": (
        lambda folder: None,
        {"lora_alpha": 16},
        "lora.lora_alpha is 16, and {} was made with 8; write that in [lora], or leave lora.init_from out",
    ),
    "rsLoRA": (
        config(use_rslora=True),
        {},
        "lora.use_rslora is false, and {} was made with true; write that in [lora], or leave lora.init_from out",
    ),
    "DoRA": (
        lambda folder: None,
        {"use_dora": True},
        "lora.use_dora is true, and {} was made with false; write that in [lora], or leave lora.init_from out",
    ),
    "ranks by module": (
        config(rank_pattern={"q_proj": 2}),
        {},
        'lora.rank_pattern is {{}}, and {} was made with {{"q_proj": 2}}; write that in [lora], or leave '
        "lora.init_from out",
    ),
    "of another kind": (
        config(peft_type="IA3"),
        {},
        "lora.init_from: {} is of PEFT's type IA3, not LORA",
    ),
    "single tokens": (
        config(trainable_token_indices=[1, 2]),
        {},
        "lora.init_from: {} has trainable_token_indices, which [lora] has no key for; name an adapter that is plain "
        "LoRA",
    ),
    "PiSSA": (
        config(init_lora_weights="pissa_niter_16"),
        {},
        'lora.init_from: {} has init_lora_weights = "pissa_niter_16", which changes the base itself; convert it with '
        "PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
    ),
    "of other weights": (
        base_in_run(fingerprint="0" * 64, name="Other/Model"),
        {},
        '{}: was trained on other weights (Other/Model) than model.name = "{base}" has; name its base there',
    ),
    "otherwise quantized": (
        base_in_run(quantization="nf4"),
        {},
        '{}: was trained with model.quantization = "nf4", and the recipe says "none"; write what it was trained with',
    ),
    "another template": (
        another_template,
        {},
        "{}: was trained with another chat template than the base has now; put that back",
    ),
}


@pytest.mark.parametrize("case", NOT_SHAPED)
def test_what_does_not_fit_is_refused_before_a_weight_is_loaded(case: str, sft: Path) -> None:
    change, lora, message = NOT_SHAPED[case]
    change(sft)
    with pytest.raises(QloraDpoError) as error:
        prepare_data(recipe(sft.parent, lora={"init_from": str(sft), **lora}))
    assert str(error.value) == message.format(sft, base=tiny_run.source().name)
    assert isinstance(error.value, RecipeError) == message.startswith("lora.")


def test_an_adapter_is_refused_under_the_key_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^reference\.path: .* is not a folder; "):
        prepare_data(recipe(tmp_path, reference={"kind": "adapter", "path": str(tmp_path / "none")}))


def test_other_layers_are_refused_with_an_example(sft: Path) -> None:
    model = tiny_run.fresh(tiny_run.recipe(lora={"target_modules": ["q_proj"]}))
    with pytest.raises(RecipeError) as error:
        load_adapter_weights(model, SavedAdapter(sft, ""))
    assert str(error.value) == (
        f"[lora] names other modules than {sft} has: "
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight is one that the recipe does not adapt; write its "
        "target_modules, layers and modules_to_save there"
    )


def test_a_tensor_of_another_size_or_without_a_number_is_named(sft: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    tensors, model = load_file(sft / ADAPTER_SAFE_WEIGHTS_NAME), tiny_run.fresh(tiny_run.recipe())
    save_file(tensors | {name: torch.zeros(4, 96)}, sft / ADAPTER_SAFE_WEIGHTS_NAME)
    with pytest.raises(ModelError) as error:
        load_adapter_weights(model, SavedAdapter(sft, ""))
    assert str(error.value) == (
        f"{sft}: {name} has the shape [4, 96], and this base needs [4, 128]; name the base that it was made for"
    )
    save_file(tensors | {name: torch.full((4, 128), torch.nan)}, sft / ADAPTER_SAFE_WEIGHTS_NAME)
    with pytest.raises(ModelError, match=r"lora_A\.weight is not finite; train it again with a lower rate"):
        load_adapter_weights(model, SavedAdapter(sft, ""))


@pytest.mark.parametrize("base", ["its folder", "nobody knows", "Another/Model", "a folder of other weights"])
def test_an_adapter_from_elsewhere_is_taken_for_its_base_by_name(base: str, sft: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    if base == "a folder of other weights":
        tiny.qwen2(seed=3).save_pretrained(other)
    name = {"its folder": tiny_run.source().name, "a folder of other weights": str(other)}.get(base, base)
    foreign(sft, base_model_name_or_path=name)
    what = recipe(tmp_path, lora={"init_from": str(sft)})
    if base == "a folder of other weights":
        with pytest.raises(ModelError) as error:
            prepare_data(what)
        assert str(error.value) == (
            f'{sft}: was made for {other}, and model.name is "{tiny_run.source().name}"; name its base there, or '
            "correct base_model_name_or_path in its adapter_config.json"
        )
    else:
        note = (
            f"{sft}: does not say by fingerprint what base it was made for; taken as made for {tiny_run.source().name}"
        )
        assert prepare_data(what).reference_spec.notes == ([] if base == "its folder" else [note])


def test_an_adapter_that_peft_made_is_gone_on_from(tmp_path: Path) -> None:
    shape = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.2)
    peft = tiny_run.stirred(get_peft_model(tiny_run.base_model(), shape))
    peft.save_pretrained(tmp_path / "peft")
    outcome = train(tmp_path / "on", reference={"kind": "adapter", "path": str(tmp_path / "peft")})
    assert outcome.state.evals[0]["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_what_is_put_in_is_what_peft_opens_and_the_base_is_left_as_it_was(sft: Path) -> None:
    base = tiny_run.base_model()
    before_LV = probe_logits(base, PAIR, tiny_run.CPU)
    with opened_by_peft(base, SavedAdapter(sft, "")) as opened:
        opened_LV = probe_logits(opened, PAIR, tiny_run.CPU)
    assert not torch.equal(opened_LV, before_LV)
    assert torch.equal(probe_logits(base, PAIR, tiny_run.CPU), before_LV)
    model = tiny_run.attach_lora(base, tiny_run.recipe().lora, seed=1)
    load_adapter_weights(model, SavedAdapter(sft, ""))
    check_matches_peft(model, opened_LV, PAIR, tiny_run.CPU, sft)
    twice = tiny_run.attach_lora(tiny_run.base_model(), tiny_run.recipe(lora={"lora_alpha": 16}).lora, seed=1)
    load_adapter_weights(twice, SavedAdapter(sft, ""))
    with pytest.raises(ModelError) as error:
        check_matches_peft(twice, opened_LV, PAIR, tiny_run.CPU, sft)
    assert str(error.value) == (
        f"{sft}: the model with this adapter differs from the one that PEFT opens, so training would not go on from "
        "it; merge it, and name the merged model as model.name"
    )


def test_the_fingerprint_is_of_numbers_and_scale_alone(sft: Path, tmp_path: Path) -> None:
    table = tiny_run.recipe().lora
    first = find_saved_adapter(sft, "lora.init_from", table).fingerprint
    foreign(sft, base_model_name_or_path="elsewhere")
    assert find_saved_adapter(sft, "lora.init_from", table).fingerprint == first
    rewrite(sft / ADAPTER_CONFIG_NAME, lora_alpha=16)
    scaled = table.model_copy(update={"lora_alpha": 16})
    assert find_saved_adapter(sft, "lora.init_from", scaled).fingerprint != first
    rewrite(sft / ADAPTER_CONFIG_NAME, lora_alpha=8)
    tensors = load_file(sft / ADAPTER_SAFE_WEIGHTS_NAME)
    save_file({name: 2 * value for name, value in tensors.items()}, sft / ADAPTER_SAFE_WEIGHTS_NAME)
    assert find_saved_adapter(sft, "lora.init_from", table).fingerprint != first
