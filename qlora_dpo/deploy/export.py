"""Writes a full model as GGUF, with or without Ollama's Modelfile, and checks what was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from qlora_dpo.deploy.gguf_file import insist_on_architecture, read_back, write_gguf
from qlora_dpo.deploy.gguf_tensors import Quant
from qlora_dpo.deploy.gguf_tokenizer import words_of
from qlora_dpo.deploy.modelfile import modelfile
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.files import insist_on_space, whole_folder, write_json, write_whole
from qlora_dpo.manifest import write_manifest
from qlora_dpo.model import sources
from qlora_dpo.model.base import load_tokenizer
from qlora_dpo.model.sources import Source
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.run_folder import CONFIG

To = Literal["gguf", "ollama"]


@dataclass(frozen=True)
class Exported:
    """What was written. `error` is the largest relative error of a tensor after reading the file back."""

    folder: Path
    file: Path
    bytes: int
    tensors: int
    error: float


def full_model(model: str) -> Source:
    """The full model that `model`, a folder or a hub name, is; raises RecipeError for an adapter."""
    folder = Path(model).expanduser()
    if (folder / CONFIG).is_file():
        raise RecipeError(
            f"{model}: is an adapter, and other engines run full models; write one first: qlora-dpo merge {model}, and "
            f"then: qlora-dpo export merged/{folder.resolve().name}"
        )
    name = str(folder) if folder.is_absolute() or not folder.is_dir() else f"./{folder}"
    return sources.fetch(ModelTable(name=name, quantization="none"))


def name_of(source: Source) -> str:
    """What the exported model is called: the last part of its folder or of its name on a hub."""
    return source.hub_id.rpartition("/")[2] if source.hub_id else source.folder.resolve().name


def export(source: Source, output: Path, to: To, quant: Quant) -> Exported:
    """Write the model of `source` into the new folder `output`, read it back, and keep it only if it is right."""
    name = name_of(source)
    config: Any = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    insist_on_architecture(config, source.name)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{source.name}: is stored quantized; export the model it was made from")
    tokenizer = load_tokenizer(source)
    words = words_of(tokenizer, config.vocab_size, source.name)
    insist_on_space(output, sum(file.stat().st_size for file in source.folder.glob("*.safetensors")))
    with whole_folder(output) as temporary:
        file = temporary / f"{name}-{quant}.gguf"
        planned = write_gguf(file, source.folder, config, words, quant, name)
        error = read_back(file, planned, config, words, quant)
        if to == "ollama":
            write_whole(temporary / "Modelfile", modelfile(file.name, tokenizer))
        size = file.stat().st_size
        facts = {"bytes": size, "tensors": len(planned), "error": error}
        base = {"name": name, "hub_id": source.hub_id, "revision": source.revision, "fingerprint": source.fingerprint}
        write_json(temporary / "export.json", {"model": base, "to": to, "quant": quant, "file": file.name, **facts})
        write_manifest(temporary, [each for each in temporary.iterdir() if each.is_file()])
    return Exported(output, output / file.name, size, len(planned), error)
