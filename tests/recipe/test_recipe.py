"""A recipe is a value: checked, frozen, complete, and read before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe import Recipe, load_recipe, shipped
from qlora_dpo.recipe import recipe as recipe_module
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.recipe import find_recipe, resolved_toml
from qlora_dpo.recipe.tables import is_local_path

SMALLEST = '[model]\nname = "org/base"\n[data]\ntrain = "org/pairs"\n'
SHIPPED = list(shipped.shipped_recipes().values())


def write(folder: Path, text: str = SMALLEST, name: str = "mine.toml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_only_the_model_and_the_data_have_no_default(tmp_path: Path) -> None:
    expected = Recipe(model=ModelTable(name="org/base"), data=DataTable(train="org/pairs"))
    assert load_recipe(write(tmp_path)).recipe == expected


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path)).recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lora.r = 8  # type: ignore[misc]


def test_the_run_is_named_after_the_file(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, name="my.rules.toml")).name == "my.rules"


def test_a_recipe_keeps_its_own_text_and_what_was_set(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, SMALLEST + "# a note\n"), ["lora.r=8"])
    assert (loaded.text, loaded.overrides) == (SMALLEST + "# a note\n", ("lora.r=8",))


@pytest.mark.parametrize(
    ("assignment", "table", "key", "value"),
    [
        ("lora.r=8", "lora", "r", 8),
        (" lora . r = 8 ", "lora", "r", 8),
        ("objective.beta=1", "objective", "beta", 1.0),
        ("train.learning_rate=2e-4", "train", "learning_rate", 2e-4),
        ("train.gradient_checkpointing=true", "train", "gradient_checkpointing", True),
        ("train.micro_batch_tokens=auto", "train", "micro_batch_tokens", "auto"),
        ("train.micro_batch_tokens=512", "train", "micro_batch_tokens", 512),
        ("data.train_split=train[:100]", "data", "train_split", "train[:100]"),
        ("data.train_split=plain word", "data", "train_split", "plain word"),
        ('data.train_split="quoted"', "data", "train_split", "quoted"),
        ("data.train_split=a=b", "data", "train_split", "a=b"),
        ('lora.target_modules=["q_proj", "v_proj"]', "lora", "target_modules", ["q_proj", "v_proj"]),
    ],
)
def test_a_value_set_by_hand_is_read_as_toml_and_wins(
    tmp_path: Path, assignment: str, table: str, key: str, value: object
) -> None:
    recipe = load_recipe(write(tmp_path, SMALLEST + "[lora]\nr = 4\n"), [assignment]).recipe
    assert recipe.model_dump()[table][key] == value


def test_the_last_of_two_values_set_for_a_key_wins(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path), ["lora.r=8", "lora.r=32"]).recipe.lora.r == 32


def test_setting_a_key_can_add_an_absent_table(tmp_path: Path) -> None:
    track = load_recipe(write(tmp_path), ["track.wandb=project"]).recipe.track
    assert track is not None and track.wandb == "project"


def test_a_path_in_a_recipe_starts_at_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path / "recipes",
        '[model]\nname = "../base"\n[data]\ntrain = "./pairs.jsonl"\neval = "held/out.csv"\n',
    )
    monkeypatch.chdir("/")
    recipe = load_recipe(path).recipe
    assert recipe.model.name == str(tmp_path / "base")
    assert recipe.data.train == str(tmp_path / "recipes/pairs.jsonl")
    assert recipe.data.eval == str(tmp_path / "recipes/held/out.csv")


def test_a_path_set_by_hand_starts_at_the_current_folder(empty_folder: Path) -> None:
    path = write(
        empty_folder / "recipes", '[model]\nname = "org/base"\n[data]\ntrain = "./a.jsonl"\neval = "b.jsonl"\n'
    )
    data = load_recipe(path, ["data.train=./mine.jsonl"]).recipe.data
    assert data.train == str(empty_folder / "mine.jsonl")
    assert data.eval == str(empty_folder / "recipes/b.jsonl")


@pytest.mark.parametrize("name", ["./a", "../a", "/a", "~/a", ".", "..", "a.jsonl", "b/c.parquet", "x.json.gz"])
def test_a_path_is_told_from_a_hub_name(name: str) -> None:
    assert is_local_path(name)


@pytest.mark.parametrize("name", ["org/name", "name", "org/name.with.dots", "org/jsonl", "pypi:a==1"])
def test_a_hub_name_is_told_from_a_path(name: str) -> None:
    assert not is_local_path(name)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    assert load_recipe(str(path)).name == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_says_what_hardware_and_command(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[:2]
    told = "\n".join(header)
    assert "# What " in told and "# Hardware " in told
    assert f"# Command   qlora-dpo train recipes/{path.name}" in told


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_resolved_text_reads_back_to_the_same_value(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path)).recipe
    assert load_recipe(write(tmp_path, resolved_toml(recipe))).recipe == recipe


def test_the_resolved_text_keeps_what_is_hard_to_write(tmp_path: Path) -> None:
    nasty = 'a "quote"\\, a\ttab, a\nline, \u2028, é, \x07 and ]'
    given = Recipe(
        model=ModelTable(name="org/base"),
        data=DataTable(train="org/pairs", train_split=nasty),
        objective=recipe_module.Sigmoid(beta=1e-300, label_smoothing=0.1 + 0.2),
    )
    assert load_recipe(write(tmp_path, resolved_toml(given))).recipe == given


def test_the_resolved_text_holds_every_key_that_has_a_value(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path)).recipe
    text = resolved_toml(recipe)
    for table, keys in recipe.model_dump(exclude_none=True).items():
        assert f"[{table}]" in text
        assert all(f"\n{key} = " in text or f"[{table}.{key}]" in text for key in keys)


def test_a_byte_order_mark_is_no_part_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "notepad.toml"
    path.write_text(SMALLEST, encoding="utf-8-sig")
    assert load_recipe(str(path)).text == SMALLEST


@pytest.mark.parametrize("name", ["recipes/quickstart.toml", "quickstart.toml", "recipes/hh.toml"])
def test_a_shipped_recipe_is_found_from_any_folder(empty_folder: Path, name: str) -> None:
    assert find_recipe(name).read_text(encoding="utf-8").startswith("# ")


def test_a_file_of_the_user_comes_before_a_shipped_recipe(empty_folder: Path) -> None:
    write(empty_folder / "recipes", name="hh.toml")
    assert find_recipe("recipes/hh.toml").read_text(encoding="utf-8") == SMALLEST


def test_recipes_are_found_in_a_checkout_and_in_an_installed_package(
    empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = empty_folder / "site-packages" / "qlora_dpo"
    monkeypatch.setattr(shipped, "__file__", str(package / "recipe" / "shipped.py"))
    write(package / "recipes", name="installed.toml")
    write(package.parent / "recipes", name="checkout.toml")
    assert find_recipe("recipes/installed.toml") == package / "recipes/installed.toml"
    assert find_recipe("recipes/checkout.toml") == package.parent / "recipes/checkout.toml"


@pytest.mark.parametrize("name", ["elsewhere/hh.toml", "/recipes/hh.toml", "../hh.toml"])
def test_a_path_to_another_folder_never_finds_a_shipped_recipe(empty_folder: Path, name: str) -> None:
    with pytest.raises(RecipeError) as refused:
        find_recipe(name)
    names = ", ".join(sorted({f"recipes/{path.name}" for path in SHIPPED}))
    assert str(refused.value) == f"{name}: there is no such recipe; shipped with this version: {names}"


def test_reading_a_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from qlora_dpo.recipe import load_recipe; load_recipe(sys.argv[1]);"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'accelerate', 'bitsandbytes', 'numpy', 'rich'};"
        "sys.stdout.write(' '.join(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code, write(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
