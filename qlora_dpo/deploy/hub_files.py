"""Chooses the files of a finished folder that go to a hub: by name, without secrets, checkpoints or local paths."""

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import ModelError, RecipeError, RunError
from qlora_dpo.files import text_lines
from qlora_dpo.manifest import MANIFEST, find_damage
from qlora_dpo.recipe.tables import is_local_path
from qlora_dpo.redact import find_secret_line, redact_secrets
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTERS_DIR, AUDIT, METRICS

HubFileGroup = Literal["model", "card", "run", "samples"]

GROUP_PATTERNS: dict[HubFileGroup, tuple[str, ...]] = {
    "model": (
        *("*.safetensors", "*.safetensors.index.json", "*.gguf", "Modelfile"),
        *(
            "config.json",
            "generation_config.json",
            ADAPTER_CONFIG_NAME,
            "merge.json",
            "export.json",
            "run.json",
            "resolved.toml",
        ),
        *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "*.jinja"),
    ),
    "card": ("README.md", "report.html", "plots/*.svg", "plots/*.png"),
    "run": ("recipe.toml", "results.json", METRICS),
    "samples": ("samples.jsonl", AUDIT),
}
"""The files that may be pushed; everything else in a folder (checkpoints, trackers' files, notes) stays private."""

OUR_TEXT_FILES = ("run.json", "resolved.toml", "recipe.toml", "results.json", METRICS, "merge.json", "README.md")
"""Text files from which local paths and secrets are removed; one found in any other file ends the command."""

BINARY_SUFFIXES = (".safetensors", ".gguf", ".png", ".model")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: its name there, and its content as bytes or as a local file."""

    name: str
    content: Path | bytes

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def collect_hub_files(
    folder: Path, repository: str, groups: Collection[HubFileGroup], base: str | None, scrub: Callable[[str], str]
) -> list[HubFile]:
    """The files of `folder` that go to `repository`; `scrub` removes local paths from a text.

    `base` is the hub name of an adapter's base, if the run knew it as a folder. Raises RecipeError if there is nothing
    to push or the base has no name, ModelError if a file is damaged, RunError if a text contains a secret.
    """
    _check_finished(folder)
    paths = {path for group in groups for pattern in GROUP_PATTERNS[group] for path in folder.glob(pattern)}
    base_name = _base_name(folder, base) if (folder / ADAPTER_CONFIG_NAME).is_file() else None
    files = [_hub_file(path, folder, repository, base_name, scrub) for path in sorted(paths) if path.is_file()]
    if not files:
        raise RecipeError(f"{folder}: holds nothing of {', '.join(sorted(groups))}; choose other parts with --what")
    for file in files:
        _check_no_secrets(file, folder)
    model_names = {path.name for pattern in GROUP_PATTERNS["model"] for path in folder.glob(pattern)}
    listed = [file for file in files if file.name in model_names]
    return [*files, HubFile(MANIFEST, _manifest(listed))] if listed else files


def adapter_base_name(files: Sequence[HubFile]) -> str | None:
    """The base that the adapter config among `files` names; None if there is no adapter config."""
    config = next((file.content for file in files if file.name == ADAPTER_CONFIG_NAME), None)
    return str(json.loads(config)["base_model_name_or_path"]) if isinstance(config, bytes) else None


def _check_finished(folder: Path) -> None:
    if not folder.is_dir():
        raise RecipeError(f"{folder}: there is no such folder; name an adapter, a merged model or an export")
    required = {
        ADAPTER_CONFIG_NAME: ADAPTER_SAFE_WEIGHTS_NAME,
        "merge.json": "config.json",
        "export.json": "export.json",
    }
    for marker, required_file in required.items():
        if (folder / marker).is_file():
            if (folder / MANIFEST).is_file() and (damaged := find_damage(folder, required_file)):
                raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or make it again")
            return
    raise RecipeError(f"{folder}: is no adapter, no merged model and no export; name the folder of one")


def _base_name(folder: Path, base: str | None) -> str:
    """The name by which others can load an adapter's base."""
    if base is not None:
        return base
    config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    run = json.loads((folder / "run.json").read_text(encoding="utf-8")) if (folder / "run.json").is_file() else {}
    trained_on = run.get("base", {})
    named = trained_on.get("hub_id") or config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip():
        raise RecipeError(f"{folder}: its {ADAPTER_CONFIG_NAME} names no base; name it with --base OWNER/NAME")
    name = named
    if not is_local_path(name):
        return name
    if str(trained_on.get("name")).startswith("pypi:"):
        return str(trained_on["name"])
    raise RecipeError(
        f"{folder}: its base is the folder {sanitize_text(name)}, which nobody else can load; name its repository "
        "with --base OWNER/NAME, or push the merged model"
    )


def _hub_file(path: Path, folder: Path, repository: str, base: str | None, scrub: Callable[[str], str]) -> HubFile:
    """The file as it is pushed: with the base's public name, and without local paths and secrets."""
    name = path.relative_to(folder).as_posix()
    if name == ADAPTER_CONFIG_NAME and base is not None:
        config = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        return HubFile(name, (json.dumps(config, indent=2) + "\n").encode())
    if name not in OUR_TEXT_FILES:
        return HubFile(name, path)
    text = path.read_text(encoding="utf-8")
    if name == "resolved.toml":
        text = tomli_w.dumps(_without_folders(tomllib.loads(text), base))
    elif name == "run.json":
        text = json.dumps(_with_public_base(json.loads(text), base), indent=2, ensure_ascii=False) + "\n"
    elif name == "README.md":
        local = f"{ADAPTERS_DIR}/{folder.resolve().name}"
        text = text.replace(f"qlora-dpo merge {local}\n", "").replace(local, repository)
        text = text.replace('"FOLDER"', f'"{repository}"')
        text = text.replace('"FOLDER_OF_THE_BASE"', f'"{base}"')
    return HubFile(name, redact_secrets(scrub(text)).encode())


def _without_folders(values: Any, base: str | None) -> Any:
    """The resolved recipe with every path cut to ./NAME, and with the base's public name."""
    if isinstance(values, dict):
        table = {key: _without_folders(value, None) for key, value in values.items()}
        if base is not None and not base.startswith("pypi:") and "model" in table:
            table["model"]["name"] = base
        return table
    if isinstance(values, list):
        return [_without_folders(value, None) for value in values]
    if isinstance(values, str) and re.match(r"[/~]|\.{1,2}/|[A-Za-z]:[/\\]", values):
        return "./" + re.split(r"[/\\]", values.rstrip("/"))[-1]
    return values


def _with_public_base(run: Any, base: str | None) -> Any:
    """run.json with the base's public name where it names a folder."""
    trained_on = run.get("base")
    if base is not None and isinstance(trained_on, dict) and is_local_path(str(trained_on.get("name"))):
        run["base"] = trained_on | {"name": base, "hub_id": base}
    return run


def _check_no_secrets(file: HubFile, folder: Path) -> None:
    """Raise RunError for a text with a token, a password, a secret of the environment, or a local path."""
    if file.name.endswith(BINARY_SUFFIXES):
        return
    data = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
    text = data.decode("utf-8", errors="replace")
    for number, problem in _find_secrets(text, folder):
        raise RunError(
            f"{folder / file.name}: {problem} in line {number}; take it out, and push again. Nothing was sent"
        )


def _find_secrets(text: str, folder: Path) -> Iterator[tuple[int, str]]:
    """Line number and problem of every secret and local path in `text`."""
    secret_line = find_secret_line(text)
    if secret_line is not None:
        yield secret_line, "there is what looks like a token or a password"
    # A folder right below the root, such as /tmp, reveals nothing and is a token of many tokenizers
    local_folders = {path for path in (folder.resolve().parent, Path.home(), Path.cwd()) if len(path.parts) > 2}
    for number, line in enumerate(text_lines(text), start=1):
        if any(f"{local_folder}/" in line for local_folder in local_folders):
            yield number, "there is a path of this machine"


def _manifest(files: list[HubFile]) -> bytes:
    """The manifest of the files, as `manifest.write_manifest` would write it for a folder."""
    entries = {}
    for file in sorted(files, key=lambda file: file.name):
        if isinstance(file.content, bytes):
            digest = hashlib.sha256(file.content).hexdigest()
        else:
            with file.content.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        entries[file.name] = {"bytes": file.bytes, "sha256": digest}
    return (json.dumps(entries, indent=2) + "\n").encode()
