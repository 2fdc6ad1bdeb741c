"""Writes a full model as GGUF, with or without Ollama's Modelfile, and verifies the file."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from qlora_dpo.data.dialogue import Message
from qlora_dpo.data.encoded import TokenIds
from qlora_dpo.deploy.engine_chats import EngineChats, check_engine_chats
from qlora_dpo.deploy.gguf_file import check_architecture, verify_gguf, write_gguf
from qlora_dpo.deploy.gguf_tensors import Quant
from qlora_dpo.deploy.gguf_tokenizer import convert_tokenizer
from qlora_dpo.deploy.modelfile import ollama_modelfile
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.files import atomic_folder, atomic_write, check_disk_space, write_json
from qlora_dpo.manifest import write_manifest
from qlora_dpo.model import sources
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.run_folder import ADAPTER_CONFIG_NAME

ExportFormat = Literal["gguf", "ollama"]


@dataclass(frozen=True)
class ExportResult:
    """The exported model. `error` is the largest relative error of a tensor after reading the file back."""

    folder: Path
    file: Path
    bytes: int
    tensors: int
    error: float
    chats: EngineChats
    """Chats whose tokens llama.cpp was asked for."""


def full_model(model: str) -> ModelSource:
    """The source of the full model `model`, a folder or a hub name; raises RecipeError for an adapter."""
    folder = Path(model).expanduser()
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        raise RecipeError(
            f"{model}: is an adapter, and other engines run full models; write one first: qlora-dpo merge {model}, and "
            f"then: qlora-dpo export merged/{folder.resolve().name}"
        )
    name = str(folder) if folder.is_absolute() or not folder.is_dir() else f"./{folder}"
    return sources.fetch_model(ModelTable(name=name, quantization="none"))


def exported_name(source: ModelSource) -> str:
    """The name of the exported model: the last part of its folder or of its name on a hub."""
    return source.hub_id.rpartition("/")[2] if source.hub_id else source.folder.resolve().name


def export_model(
    source: ModelSource,
    output: Path,
    to: ExportFormat,
    quant: Quant,
    trained_chats: Sequence[tuple[list[Message], TokenIds]] = (),
) -> ExportResult:
    """Write the model of `source` into the new folder `output`; it is kept only if it reads back correctly.

    `trained_chats` are held-out prompts and the tokens that they had in training, which llama.cpp must have too.
    """
    name = exported_name(source)
    config: Any = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    check_architecture(config, source.name)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{source.name}: is stored quantized; export the model it was made from")
    tokenizer = load_tokenizer(source)
    gguf_tokenizer = convert_tokenizer(tokenizer, config.vocab_size, source.name)
    check_disk_space(output, sum(file.stat().st_size for file in source.folder.glob("*.safetensors")))
    with atomic_folder(output) as temporary:
        file = temporary / f"{name}-{quant}.gguf"
        planned = write_gguf(file, source.folder, config, gguf_tokenizer, quant, name)
        error = verify_gguf(file, planned, config, gguf_tokenizer, quant)
        chats = check_engine_chats(file, tokenizer, trained_chats)
        if to == "ollama":
            atomic_write(temporary / "Modelfile", ollama_modelfile(file.name, tokenizer))
        size = file.stat().st_size
        base = {"name": name, "hub_id": source.hub_id, "revision": source.revision, "fingerprint": source.fingerprint}
        record = {"model": base, "to": to, "quant": quant, "file": file.name}
        write_json(
            temporary / "export.json",
            record | {"bytes": size, "tensors": len(planned), "error": error, "chats": asdict(chats)},
        )
        write_manifest(temporary, [path for path in temporary.iterdir() if path.is_file()])
    return ExportResult(output, output / file.name, size, len(planned), error, chats)
