"""The documents say what the program does."""

import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import get_args

import click
import pytest
from documents import ROOT, blocks

from qlora_dpo.cli import commands
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.data import MixTable
from qlora_dpo.recipe.objective import OBJECTIVE_TABLES
from qlora_dpo.recipe.reference import REFERENCE_TABLES

sys.path.insert(0, str(ROOT / "docs"))

from generate import references

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "adapters/README.md",
        *(ROOT / "recipes").glob("**/*.md"),
    ]
)


ROOMS = sorted(path.name for path in (ROOT / "qlora_dpo").iterdir() if (path / "__init__.py").is_file())


def typed(page: Path) -> list[str]:
    """What the page tells a reader to type after `qlora-dpo`, in code blocks and between backticks."""
    text = page.read_text(encoding="utf-8")
    spans = [
        *blocks(page),
        *re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)),
    ]
    found = [re.findall(r"(?:^|[\s/$])qlora-dpo +([^\n&|;#`]+)", span) for span in spans]
    return [line.strip() for lines in found for line in lines]


@pytest.mark.parametrize("name", references())
def test_the_generated_references_have_not_drifted(name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == references()[name], "run `python docs/generate.py`"


def test_every_command_line_in_the_documents_is_one_that_exists() -> None:
    for page in PAGES:
        if page.name == "cli.md":
            continue
        for line in typed(page):
            name, *words = shlex.split(line, posix=True)
            if name.startswith("-"):
                continue
            assert name in commands.commands, f"{page.name}: qlora-dpo {line}"
            command = commands.commands[name]
            if isinstance(command, click.Group) and words:
                assert words[0] in command.commands, f"{page.name}: qlora-dpo {line}"
                command = command.commands[words.pop(0)]
            options = {each for parameter in command.params for each in parameter.opts}
            for word in words:
                known = word.partition("=")[0] in {*options, "--help", "-h", "-"}
                assert known or not word.startswith("-"), f"{page.name}: qlora-dpo {line}: {word}"


def test_every_recipe_named_in_the_documents_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"\brecipes/[\w./-]+\.toml", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_every_path_of_the_package_named_in_the_documents_exists() -> None:
    comments = [ROOT / "pyproject.toml", ROOT / "setup.cfg", *(ROOT / "docs").glob("*.py")]
    for page in (*PAGES, *comments):
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"qlora_dpo/[\w./-]*\w/?", text)
        named += [f"qlora_dpo/{name}" for name in re.findall(rf"(?<![\w/.])(?:{'|'.join(ROOMS)})/\w+\.py", text)]
        for name in named if page.name != "CHANGELOG.md" else ():
            assert (ROOT / name).exists() or "*" in name, f"{page.name}: {name}"


def test_every_test_named_in_the_documents_exists() -> None:
    known = {path.name for path in (ROOT / "tests").rglob("*.py")}
    for page in PAGES:
        for name in re.findall(r"\btest_\w+\.py\b", page.read_text(encoding="utf-8")):
            assert name in known, f"{page.name}: {name}"


def test_every_link_within_the_documents_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_key_of_a_recipe_stands_in_a_shipped_recipe_or_in_a_guide() -> None:
    guides = [page for page in PAGES if page.name not in ("recipe.md", "cli.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    shown = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (*guides, *(ROOT / "recipes").glob("*.toml"), ROOT / "docs/losses.md")
    )
    words = set(re.findall(r"\w+", shown))
    assert [key for key in _every_key() if key.rpartition(".")[2] not in words] == []


def _every_key() -> list[str]:
    tables = {name: get_args(field.annotation) or (field.annotation,) for name, field in Recipe.model_fields.items()}
    tables |= {"objective": OBJECTIVE_TABLES, "reference": REFERENCE_TABLES, "data.mix": (MixTable,)}
    found = [
        f"{name}.{key}"
        for name, models in tables.items()
        for model in models
        for key in getattr(model, "model_fields", ())
    ]
    return sorted(set(found))


def test_the_readme_has_the_two_commands_that_ci_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("command one", "command two"):
        assert len(re.findall(rf"^<!-- {name} -->\n```\w*\n[^\n]+\n```$", text, flags=re.MULTILINE)) == 1, name


def test_every_marker_is_explained_to_contributors() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for marker in settings["markers"]:
        assert f"| `{marker.partition(':')[0]}` |" in told


def test_every_folder_is_in_the_wheel() -> None:
    """Folders of data too: setuptools takes them for packages, and warns of any that is not listed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    files = [*(ROOT / "qlora_dpo").rglob("*"), *(ROOT / "recipes").rglob("*")]
    folders = {path.parent for path in files if path.is_file() and "__pycache__" not in path.parts}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(listed) == {f"qlora_dpo.{name}" if name.startswith("recipes") else name for name in names}


def test_every_option_of_every_command_has_a_help_text() -> None:
    for name, command in commands.commands.items():
        for each in (command, *getattr(command, "commands", {}).values()):
            for parameter in each.params:
                if isinstance(parameter, click.Option):
                    assert parameter.help, f"{name} {each.name} {parameter.opts}"
