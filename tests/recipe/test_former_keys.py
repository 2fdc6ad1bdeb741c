"""A key that older versions had is explained to whoever still writes it; what an older version stored still opens."""

import json
import tomllib
from pathlib import Path

import pytest
import tiny_run

from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe import load_recipe
from qlora_dpo.recipe.former_keys import REMOVED_KEYS, RENAMED_KEYS, upgrade_stored_recipe
from qlora_dpo.recipe.grid import describe_changes, expand_grid, parse_axes
from qlora_dpo.recipe.recipe import check_keys, read_stored_recipe, resolved_toml
from qlora_dpo.run_folder import read_run_metadata
from qlora_dpo.training.checkpoint import save
from qlora_dpo.training.checkpoint.save import TrainState

HEAD = '[model]\nname = "org/model"\n[data]\ntrain = "org/data"\n'
OLD = {
    "watch": {
        "displacement_nats": 0.25,
        "kl_nats": 0.5,
        "length_correlation": 0.8,
        "vanishing_share": 0.5,
        "skipped_share": 0.1,
    },
    "samples": {"show": 3},
    "train": {"early_stopping_threshold": 0.0},
}
SENTENCES = {
    f"[watch]\n{key} = 0.3": (
        f'[watch] no longer has the key "{key}", which is now the constant {constant}; leave it out'
    )
    for key, constant in (
        ("displacement_nats", "0.25 nats per token"),
        ("kl_nats", "0.5 nats per token"),
        ("length_correlation", "0.8"),
        ("vanishing_share", "0.5"),
        ("skipped_share", "0.1"),
    )
} | {
    "[samples]\nshow = 0": '[samples] no longer has the key "show", which is gone: the first 3 prompts are shown, and '
    "samples.jsonl has all of them; leave it out",
    "[train]\nearly_stopping_threshold = 0.1": '[train] no longer has the key "early_stopping_threshold", which is '
    "gone: any improvement counts; leave it out",
    '[reference]\nkind = "model"\nname = "org/other"\ndouble_quant = true': "[reference] no longer has the key "
    '"double_quant", which is gone: the scales of an NF4 reference are always quantized a second time; leave it out',
    "[objective]\nbeta_end = 0.5": '[objective] no longer has the key "beta_end", which is gone: beta stays the same '
    "for the whole run; leave it out",
    '[objective]\nloss_type = "sum"\nloss_weights = { ipo = 1.0 }\nlosses = { ipo = 1.0 }': "[objective] no longer has "
    'the key "losses": it is now called objective.loss_weights, as in TRL',
    '[objective]\nloss_type = "alphapo"\nalpha = 0.5': '[objective] no longer has the key "alpha": it is now called '
    "objective.alphapo_alpha, as in TRL",
}


@pytest.mark.parametrize("lines", SENTENCES)
def test_a_former_key_in_a_recipe_is_explained_in_one_sentence(lines: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"{HEAD}{lines}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    assert str(error.value) == f"{path}:{4 + lines.count(chr(10)) + 1}: {SENTENCES[lines]}"


def test_every_former_key_has_its_sentence() -> None:
    keys = [f"{lines.partition(']')[0][1:]}.{lines.splitlines()[-1].partition(' ')[0]}" for lines in SENTENCES]
    assert sorted(keys) == sorted([*REMOVED_KEYS, *RENAMED_KEYS])


@pytest.mark.parametrize("option", ["--set", "--over"])
def test_a_former_key_in_an_option_is_explained_as_well(option: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD)
    with pytest.raises(RecipeError) as error:
        if option == "--set":
            load_recipe(str(path), ["watch.kl_nats=1"])
        else:
            expand_grid(str(path), (), parse_axes(["watch.kl_nats=[1, 2]"]))
    given = "watch.kl_nats=1" if option == "--set" else "watch.kl_nats"
    assert str(error.value) == f"{option} {given}: {SENTENCES[next(key for key in SENTENCES if 'kl_nats' in key)]}"


def test_a_changed_key_of_an_older_checkpoint_can_be_allowed_by_name() -> None:
    check_keys(["objective.beta_end"], (), "--allow")
    with pytest.raises(RecipeError) as error:
        check_keys(["objective.losses"], (), "--allow")
    assert str(error.value) == (
        '--allow objective.losses: [objective] no longer has the key "losses": it is now called '
        "objective.loss_weights, as in TRL"
    )


def older(recipe: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """The tables of a recipe as an older version stored them: with every removed key at its default."""
    return {name: {**OLD.get(name, {}), **table} for name, table in recipe.items()}


def test_what_an_older_run_stored_is_read_as_the_same_recipe() -> None:
    today = tiny_run.recipe(objective={"loss_type": "sum", "loss_weights": {"ipo": 1.0}})
    stored = older(today.model_dump(exclude_none=True))
    stored["objective"] = {"beta_end": 0.5, **stored["objective"], "losses": stored["objective"].pop("loss_weights")}
    assert read_stored_recipe(stored) == today
    alpha = older(tiny_run.recipe(objective={"loss_type": "alphapo"}).model_dump(exclude_none=True))
    alpha["objective"]["alpha"] = alpha["objective"].pop("alphapo_alpha")
    assert read_stored_recipe(alpha).objective.alphapo_alpha == 0.25  # type: ignore[union-attr]


def test_the_run_folder_of_an_older_version_opens(tmp_path: Path) -> None:
    today = tiny_run.recipe()
    text = resolved_toml(today).replace("[watch]\n", "[watch]\nkl_nats = 9.0\n")
    (tmp_path / "resolved.toml").write_text(text.replace("[train]\n", "[train]\nearly_stopping_threshold = 0.5\n"))
    (tmp_path / "run.json").write_text(json.dumps({"base": {}}))
    assert read_run_metadata(tmp_path)[2] == today


@pytest.mark.parametrize("name", ["resolved.toml", "best.toml"])
def test_training_on_an_older_stored_recipe_repeats_the_run_or_says_what_has_changed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(HEAD + "[watch]\nstop = []\nkl_nats = 0.5\n[samples]\nshow = 3\n")
    assert load_recipe(str(path)).recipe.samples.prompts == 3
    path.write_text(HEAD + "[watch]\nstop = []\nkl_nats = 0.75\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path))
    assert str(error.value).startswith(f'{path}:7: [watch] no longer has the key "kl_nats"')


def test_an_older_checkpoint_belongs_to_the_same_run_unless_a_removed_key_had_another_value() -> None:
    recipe = tiny_run.recipe().model_dump(exclude_none=True)
    was, now = TrainState(0, older(recipe), {}), TrainState(0, recipe, {})
    was.recipe["objective"]["beta_end"] = None
    assert save._resume_differences(was, now) == {}
    was.recipe["objective"]["beta_end"] = 0.5
    assert save._resume_differences(was, now) == {"objective.beta_end": "objective.beta_end was 0.5, is absent"}


def test_an_older_sweep_has_the_same_recipe_and_grid() -> None:
    recipe = tiny_run.recipe().model_dump(exclude_none=True)
    assert describe_changes(older(recipe), recipe) == []
    assert describe_changes({"objective.beta": [0.1]}, {"objective.beta": [0.1]}) == []


def test_today_stores_no_former_key() -> None:
    tables = tomllib.loads(resolved_toml(tiny_run.recipe()))
    assert upgrade_stored_recipe(tables) == tables
