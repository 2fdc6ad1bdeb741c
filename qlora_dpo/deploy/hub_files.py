"""What of a finished folder goes to a hub: chosen by name, without secrets, checkpoints and paths of this machine."""

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
from qlora_dpo.manifest import MANIFEST, find_damage
from qlora_dpo.recipe.tables import is_local_path
from qlora_dpo.redact import find_secret_line, redact_secrets
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

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
    "run": ("recipe.toml", "results.json", "metrics.jsonl"),
    "samples": ("samples.jsonl", "audit.json"),
}
"""A list of what may go, since whatever else lies in a folder (checkpoints, a tracker's files, notes) is nobody's."""

WRITTEN_BY_US = ("run.json", "resolved.toml", "recipe.toml", "results.json", "metrics.jsonl", "merge.json", "README.md")
"""Texts in which paths and secrets are taken out; in all others, one that is found ends the command."""

BINARY = (".safetensors", ".gguf", ".png", ".model")


@dataclass(frozen=True)
class HubFile:
    """One file of a repository: its name there, and its bytes or the file that holds them."""

    name: str
    content: Path | bytes

    @property
    def bytes(self) -> int:
        """How many it has."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def collect_hub_files(
    folder: Path, repository: str, what: Collection[HubFileGroup], base: str | None, scrub: Callable[[str], str]
) -> list[HubFile]:
    """The files of `folder` that go to `repository`, by name; `scrub` cuts paths of this machine down.

    `base` is the hub name of an adapter's base, where the run knew it as a folder. Raises RecipeError if there is
    nothing to push or the base cannot be named, ModelError if a file is damaged, RunError if a text holds a secret.
    """
    _check_finished(folder)
    found = sorted({file for each in what for pattern in GROUP_PATTERNS[each] for file in folder.glob(pattern)})
    files = [file for file in found if file.is_file()]
    name = _base_name(folder, base) if (folder / ADAPTER_CONFIG_NAME).is_file() else None
    pieces = [_piece(file, folder, repository, name, scrub) for file in files]
    if not pieces:
        raise RecipeError(f"{folder}: holds nothing of {', '.join(sorted(what))}; choose other parts with --what")
    for piece in pieces:
        _check_no_secrets(piece, folder)
    top = {file.name for pattern in GROUP_PATTERNS["model"] for file in folder.glob(pattern)}
    listed = [piece for piece in pieces if piece.name in top]
    return [*pieces, HubFile(MANIFEST, _manifest(listed))] if listed else pieces


def adapter_base_name(pieces: Sequence[HubFile]) -> str | None:
    """The base that an adapter among `pieces` names; None if there is none."""
    config = next((piece.content for piece in pieces if piece.name == ADAPTER_CONFIG_NAME), None)
    return str(json.loads(config)["base_model_name_or_path"]) if isinstance(config, bytes) else None


def _check_finished(folder: Path) -> None:
    if not folder.is_dir():
        raise RecipeError(f"{folder}: there is no such folder; name an adapter, a merged model or an export")
    kinds = {ADAPTER_CONFIG_NAME: ADAPTER_SAFE_WEIGHTS_NAME, "merge.json": "config.json", "export.json": "export.json"}
    for mark, needed in kinds.items():
        if (folder / mark).is_file():
            if (folder / MANIFEST).is_file() and (damaged := find_damage(folder, needed)):
                raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or make it again")
            return
    raise RecipeError(f"{folder}: is no adapter, no merged model and no export; name the folder of one")


def _base_name(folder: Path, base: str | None) -> str:
    """What others can load an adapter's base by."""
    if base is not None:
        return base
    config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
    run = json.loads((folder / "run.json").read_text(encoding="utf-8")) if (folder / "run.json").is_file() else {}
    trained = run.get("base", {})
    named = str(trained.get("hub_id") or config.get("base_model_name_or_path"))
    if not is_local_path(named):
        return named
    if str(trained.get("name")).startswith("pypi:"):
        return str(trained["name"])
    raise RecipeError(
        f"{folder}: its base is the folder {sanitize_text(named)}, which nobody else can load; name its repository with "
        "--base OWNER/NAME, or push the merged model"
    )


def _piece(file: Path, folder: Path, repository: str, base: str | None, scrub: Callable[[str], str]) -> HubFile:
    name = file.relative_to(folder).as_posix()
    if name == ADAPTER_CONFIG_NAME and base is not None:
        config = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
        return HubFile(name, (json.dumps(config, indent=2) + "\n").encode())
    if name not in WRITTEN_BY_US:
        return HubFile(name, file)
    text = file.read_text(encoding="utf-8")
    if name == "resolved.toml":
        text = tomli_w.dumps(_without_folders(tomllib.loads(text), base))
    elif name == "run.json":
        text = json.dumps(_run(json.loads(text), base), indent=2, ensure_ascii=False) + "\n"
    elif name == "README.md":
        own = f"adapters/{folder.resolve().name}"
        text = text.replace(f"qlora-dpo merge {own}\n", "").replace(own, repository)
        text = text.replace('"FOLDER"', f'"{repository}"')
        text = text.replace('"FOLDER_OF_THE_BASE"', f'"{base}"')
    return HubFile(name, redact_secrets(scrub(text)).encode())


def _without_folders(values: Any, base: str | None) -> Any:
    """The resolved recipe with every path cut down to ./NAME, and with the base as others can load it."""
    if isinstance(values, dict):
        cut = {key: _without_folders(value, None) for key, value in values.items()}
        if base is not None and not base.startswith("pypi:") and "model" in cut:
            cut["model"]["name"] = base
        return cut
    if isinstance(values, list):
        return [_without_folders(value, None) for value in values]
    if isinstance(values, str) and re.match(r"[/~]|\.{1,2}/|[A-Za-z]:[/\\]", values):
        return "./" + re.split(r"[/\\]", values.rstrip("/"))[-1]
    return values


def _run(run: Any, base: str | None) -> Any:
    known = run.get("base")
    if base is not None and isinstance(known, dict) and is_local_path(str(known.get("name"))):
        run["base"] = known | {"name": base, "hub_id": base}
    return run


def _check_no_secrets(piece: HubFile, folder: Path) -> None:
    """Raise RunError for a text that holds a token, a password, a secret of the environment, or this folder's path."""
    if piece.name.endswith(BINARY):
        return
    data = piece.content if isinstance(piece.content, bytes) else piece.content.read_bytes()
    text = data.decode("utf-8", errors="replace")
    for number, line in _suspicious(text, folder):
        raise RunError(f"{folder / piece.name}: {line} in line {number}; take it out, and push again. Nothing was sent")


def _suspicious(text: str, folder: Path) -> Iterator[tuple[int, str]]:
    found = find_secret_line(text)
    if found is not None:
        yield found, "there is what looks like a token or a password"
    # a folder right below the root, such as /tmp, tells nothing of anybody and is a word of many tokenizers
    places = {each for each in (folder.resolve().parent, Path.home(), Path.cwd()) if len(each.parts) > 2}
    for number, line in enumerate(text.splitlines(), start=1):
        if any(f"{place}/" in line for place in places):
            yield number, "there is a path of this machine"


def _manifest(pieces: list[HubFile]) -> bytes:
    """The manifest of what is sent, as `manifest.write_manifest` would write it for a folder."""
    listed = {}
    for piece in sorted(pieces, key=lambda each: each.name):
        if isinstance(piece.content, bytes):
            digest = hashlib.sha256(piece.content).hexdigest()
        else:
            with piece.content.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        listed[piece.name] = {"bytes": piece.bytes, "sha256": digest}
    return (json.dumps(listed, indent=2) + "\n").encode()
