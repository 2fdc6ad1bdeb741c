"""The table [reference] and lora.init_from: what is read, and what is refused in which words."""

from pathlib import Path

import pytest

from qlora_dpo.cli import main
from qlora_dpo.errors import RecipeError
from qlora_dpo.recipe import Recipe, load_recipe
from qlora_dpo.recipe.reference import AdapterReference, ModelReference

BOTH = '[model]\nname = "./m"\n[data]\ntrain = "./t.jsonl"\n'
ONE_OF = '"base", "adapter", "model", "ema"'
REFUSED = {
    "no kind": ('[reference]\npath = "x"\n', f':5: [reference] needs the key "kind", one of {ONE_OF}'),
    "unknown kind": (
        '[reference]\nkind = "emma"\n',
        f':6: reference.kind is the string "emma"; it must be one of {ONE_OF}',
    ),
    "no table": ('[[reference]]\nkind = "ema"\n', ":5: reference is a list; it must be a table"),
    "no path": ('[reference]\nkind = "adapter"\n', ':5: [reference] needs the key "path"'),
    "a key of another kind": (
        '[reference]\nkind = "base"\npath = "x"\n',
        ':7: [reference] has "path", which kind = "base" does not read; adapter does',
    ),
    "unknown key": (
        '[reference]\nkind = "ema"\nref_model_sync_stepps = 2\n',
        ':7: [reference] has no key "ref_model_sync_stepps"; did you mean "ref_model_sync_steps"?',
    ),
    "TRL's switch": (
        '[reference]\nkind = "ema"\nsync_ref_model = true\n',
        ':7: [reference] has no key "sync_ref_model": that is TRL\'s name; here it is [reference] kind = "ema"',
    ),
    "axolotl's name": (
        '[lora]\nlora_model_dir = "x"\n',
        ':6: [lora] has no key "lora_model_dir": that is axolotl\'s name; here it is lora.init_from',
    ),
    "no step of alpha": (
        '[reference]\nkind = "ema"\nref_model_mixup_alpha = 0\n',
        ":7: reference.ref_model_mixup_alpha is 0; it must be greater than 0.0",
    ),
    "a package without a pin": (
        '[reference]\nkind = "model"\nname = "pypi:x"\n',
        ':5: [reference] is a PyPI package: pin it as "pypi:NAME==VERSION" and give reference.sha256 of its GGUF file',
    ),
    "a folder with a revision": (
        '[reference]\nkind = "model"\nname = "./x"\nrevision = "main"\n',
        ":5: [reference] has a revision, which only a hub model takes; leave it out",
    ),
    "a loss that reads none": (
        '[objective]\nloss_type = "simpo"\n[reference]\nkind = "base"\n',
        ':7: [reference] is not read by loss_type = "simpo", which compares with no other model; leave the table out, '
        "or choose another loss_type",
    ),
    "TRL's engine": (
        '[train]\nengine = "trl"\n[reference]\nkind = "ema"\n',
        ':7: [reference] has kind = "ema", and train.engine = "trl" knows the base alone as reference of an adapter '
        'here; leave the table out, or set train.engine = "qlora_dpo"',
    ),
    "weights from two places": (
        '[lora]\ninit_from = "a"\ninit_lora_weights = "gaussian"\n',
        ":5: [lora] has init_lora_weights beside init_from, whose weights are not drawn; leave one of them out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_mistake_is_named_with_line_and_remedy(
    case: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = REFUSED[case]
    Path("bad.toml").write_text(BOTH + text)
    assert main(["train", "bad.toml"]) == 2
    assert capsys.readouterr().err.splitlines() == [f"qlora-dpo: bad.toml{message}"]


@pytest.mark.parametrize("loss", ["simpo", "alphapo", "cpo", "orpo", "sft"])
def test_no_loss_without_reference_takes_one(loss: str) -> None:
    values = {
        "model": {"name": "./m"},
        "data": {"train": "./t.jsonl"},
        "objective": {"loss_type": loss},
        "reference": {"kind": "base"},
    }
    with pytest.raises(ValueError, match=f'is not read by loss_type = "{loss}"'):
        Recipe.model_validate(values)


def test_paths_start_at_the_recipe_and_those_set_by_hand_at_the_current_folder(empty_folder: Path) -> None:
    Path("recipes").mkdir()
    file = Path("recipes/a.toml")
    file.write_text(BOTH + '[lora]\ninit_from = "../adapters/x"\n[reference]\nkind = "adapter"\npath = "y"\n')
    read = load_recipe(str(file)).recipe
    assert read.lora.init_from == str(empty_folder / "adapters" / "x")
    assert read.reference == AdapterReference(kind="adapter", path=str(empty_folder / "recipes" / "y"))
    read = load_recipe(str(file), ["reference.path=adapters/y"]).recipe
    assert read.reference == AdapterReference(kind="adapter", path=str(empty_folder / "adapters" / "y"))
    read = load_recipe(str(file), ["reference={ kind = 'model', name = './z' }"]).recipe
    assert read.reference == ModelReference(kind="model", name=str(empty_folder / "recipes" / "z"))


@pytest.mark.parametrize("key", ["lora.init_from", "model.name", "data.train"])
def test_the_home_of_nobody_is_refused(key: str, empty_folder: Path) -> None:
    Path("a.toml").write_text(BOTH)
    with pytest.raises(RecipeError) as error:
        load_recipe("a.toml", [f"{key}=~nobody-here/x"])
    assert str(error.value) == f"{key} is ~nobody-here/x, and there is no such home folder; write the full path"


def test_the_policy_starts_from_the_reference_unless_told_otherwise() -> None:
    def read(**tables: object) -> Recipe:
        return Recipe.model_validate({"model": {"name": "./m"}, "data": {"train": "./t.jsonl"}, **tables})

    frozen = {"kind": "adapter", "path": "/a"}
    assert (read().init_from, read().starts_as_reference) == (None, True)
    for tables, init_from, same in (
        ({"reference": frozen}, "/a", True),
        ({"reference": frozen, "lora": {"init_from": "/a"}}, "/a", True),
        ({"reference": frozen, "lora": {"init_from": "/b"}}, "/b", False),
        ({"lora": {"init_from": "/b"}}, "/b", False),
        ({"reference": {"kind": "base"}, "lora": {"init_from": "/b"}}, "/b", False),
        ({"reference": {"kind": "model", "name": "./m"}}, None, False),
        ({"reference": {"kind": "ema"}, "lora": {"init_from": "/b"}}, "/b", True),
    ):
        found = read(**tables)
        assert (found.init_from, found.starts_as_reference) == (init_from, same), tables


def test_an_unknown_key_of_the_reference_cannot_be_allowed(empty_folder: Path) -> None:
    from qlora_dpo.recipe.recipe import check_keys

    check_keys(["reference.path", "reference.ref_model_sync_steps", "lora.init_from"], (), "--allow")
    with pytest.raises(RecipeError, match=r"^--allow reference\.pathh: a recipe has no such key; did you mean "):
        check_keys(["reference.pathh"], (), "--allow")
