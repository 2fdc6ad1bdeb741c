"""`qlora-dpo init`: writes a recipe to start from, based on a shipped one."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import click

from qlora_dpo.recipe.shipped import recipe_purpose, shipped_recipes

DEFAULT_TEMPLATE = "your-own-jsonl"
"""The template to use without `--template`."""


def _template_help() -> str:
    """Name and first line of every shipped recipe, in 80 columns."""
    lines = "".join(f"\n{name:<18}{recipe_purpose(file)[:60]}" for name, file in shipped_recipes().items())
    return f"\b\nTemplates:{lines}"


@click.command("init", short_help="Write a commented recipe to start from.", epilog=_template_help())
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--template", metavar="NAME", help=f"Shipped recipe to start from [{DEFAULT_TEMPLATE}]")
@click.option("--model", metavar="NAME", help="Base model to use instead: a hub name or a folder.")
@click.option("--data", metavar="SOURCE", help="Pairs to use instead: a file, a folder or a hub data set.")
def init_command(path: Path | None, template: str | None, model: str | None, data: str | None) -> None:
    """Write a commented recipe to PATH [recipe.toml, or the template's name]; an existing file is never overwritten.

    \b
    qlora-dpo init my-recipe.toml --data my-pairs.jsonl
    qlora-dpo init --template ultrafeedback --model Qwen/Qwen2-1.5B-Instruct
    """
    import os

    from qlora_dpo.errors import RecipeError
    from qlora_dpo.files import atomic_write
    from qlora_dpo.recipe.recipe import check_recipe

    source = _find_template(template or DEFAULT_TEMPLATE)
    file = _output_file(path, f"{template or 'recipe'}.toml")
    if os.path.lexists(file):
        raise RecipeError(f"{file}: exists already and is not overwritten; name another file")
    text = _fill_template(source, file, model, data)
    check_recipe(str(file), text)
    for missing in _missing_data(data):
        click.echo(f"{missing}: does not exist yet", err=True)
    atomic_write(file, text)
    click.echo(f"{file}: written; next: qlora-dpo check {shlex.quote(str(file))}")


def _find_template(name: str) -> Path:
    """The shipped recipe with that name; raises RecipeError, with a suggestion, if there is none."""
    import difflib

    from qlora_dpo.errors import RecipeError

    known = shipped_recipes()
    name = Path(name).name.removesuffix(".toml")
    if name in known:
        return known[name]
    matches = difflib.get_close_matches(name, known, 1)
    guess = f"did you mean {matches[0]}? There are" if matches else "there are"
    raise RecipeError(f"--template {name}: no such recipe is shipped; {guess} {', '.join(known)}")


def _output_file(path: Path | None, name: str) -> Path:
    """The file to write: `path`, or the file `name` in it if it is a folder."""
    from qlora_dpo.errors import RecipeError

    file = Path(name) if path is None else path.expanduser()
    file = file / name if file.is_dir() else file
    if file.suffix != ".toml":
        raise RecipeError(f"{file}: a recipe's name ends in .toml; name it {file.name}.toml")
    return file


def _fill_template(source: Path, file: Path, model: str | None, data: str | None) -> str:
    """The text to write to `file`: the template, with paths, model and data replaced."""
    import tomllib

    import tomli_w

    from qlora_dpo.errors import RecipeError
    from qlora_dpo.recipe.edit import edit_table

    text = source.read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    # data beside the template are not beside the new recipe
    absolute_paths = {
        key: str((source.parent / value).resolve())
        for key, value in _relative_data_paths(tables["data"], source.parent)
    }
    text = edit_table(text, "data", absolute_paths)
    for mix_source in tables["data"].get("mix", ()):
        for _, value in _relative_data_paths({"train": mix_source["source"]}, source.parent):
            text = text.replace(f'"{value}"', tomli_w.dumps({"a": str((source.parent / value).resolve())})[4:].strip())
    if model is not None:
        text = edit_table(text, "model", _model_keys(model, file), removed=("revision", "sha256"))
    if data is not None and "mix" in tables["data"]:
        raise RecipeError(f"--data {data}: the template {source.stem} mixes several sources; name them in its tables")
    if data is not None:
        template_keys = (
            *("eval", "eval_share", "train_split", "eval_split"),
            *("revision", "config", "data_dir", "format", "columns"),
        )
        text = edit_table(text, "data", {"train": _relative_to_recipe(data, file)}, removed=template_keys)
    text = text.replace(f"recipes/{source.name}", shlex.quote(str(file)))
    changes = " and ".join(
        change for change, value in (("another model", model), ("other data", data)) if value is not None
    )
    note = f" with {changes}; expected results below are the template's" if changes else ""
    return f"# From the template {source.stem}{note}.\n#\n{text}"


def _model_keys(model: str, file: Path) -> dict[str, str]:
    """Keys of the `model` table; for a `pypi:` model that a shipped recipe uses, its SHA-256 as well."""
    import tomllib

    tables = (tomllib.loads(shipped.read_text(encoding="utf-8"))["model"] for shipped in shipped_recipes().values())
    known = next((table["sha256"] for table in tables if table["name"] == model and "sha256" in table), None)
    return {"name": _relative_to_recipe(model, file)} | ({"sha256": known} if known else {})


def _relative_data_paths(table: dict[str, object], folder: Path) -> Iterator[tuple[str, str]]:
    for key in ("train", "eval"):
        value = table.get(key)
        if isinstance(value, str) and value.startswith("./") and (folder / value).exists():
            yield key, value


def _relative_to_recipe(name: str, file: Path) -> str:
    """A path relative to the current folder as one relative to the recipe's folder; a hub name is unchanged."""
    import os

    from qlora_dpo.recipe.tables import is_local_path

    path = Path(name).expanduser()
    if name.startswith(("/", "~")) or not (is_local_path(name) or path.exists()):
        return name
    relative = os.path.relpath(path.resolve(), file.resolve().parent)
    return relative if relative.startswith("..") else f"./{relative}"


def _missing_data(data: str | None) -> Iterator[str]:
    from qlora_dpo.recipe.tables import is_local_path

    if data is not None and is_local_path(data) and not Path(data).expanduser().exists():
        yield data
