"""Small bases and adapters on disk, made with the functions that `train` uses; B is random, so a merge has effect."""

import json
from pathlib import Path
from typing import Any

import tiny
import torch

from qlora_dpo import adapter, run_folder
from qlora_dpo.model import base, device, lora, sources
from qlora_dpo.model.quantized import dequantized
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import Quantization
from qlora_dpo.recipe.recipe import LoadedRecipe

WORDS = ("library", "garden", "ball", "rice", "cat", "dog", "mat", "book", "bird", "people")


def save_base(folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """A random small Qwen2 with biases that are not 0, saved as transformers does."""
    model = tiny.qwen2(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if not tied:
        model.config.tie_word_embeddings = False
        head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
        head.weight.data = torch.randn(head.weight.shape, generator=generator) * 0.02
        model.lm_head = head
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        elif parameter.dim() == 2:
            parameter.data *= 4  # flat logits would agree about nothing
    model.to(dtype).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def save_pairs(file: Path, count: int = 12) -> Path:
    """Pairs on everyday words, one JSON object per line."""
    rows = [
        {
            "prompt": f"How do I find the {WORDS[row % 10]} {row}?",
            "chosen": f"Ask the people at the {WORDS[(row + 3) % 10]}.",
            "rejected": f"I can't help you with that {WORDS[(row + 1) % 10]}.",
        }
        for row in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def save_adapter(
    folder: Path,
    base_folder: Path,
    quantization: Quantization = "nf4",
    *,
    target_modules: str | list[str] = "all-linear",
    size: float = 0.1,
) -> Path:
    """An adapter directory as a finished run leaves it; its update has `size` times the norm of each weight."""
    home = folder.parent
    train, heldout = save_pairs(home / "train.jsonl", 4), save_pairs(home / "heldout.jsonl")
    values: dict[str, Any] = {
        "model": {"name": str(base_folder), "quantization": quantization},
        "lora": {"r": 4, "lora_alpha": 12, "target_modules": target_modules},
        "data": {"train": str(train), "eval": str(heldout)},
    }
    loaded = LoadedRecipe(Recipe.model_validate(values), folder.with_suffix(".toml"), "# the recipe\n")
    run_folder.init_run_folder(folder, loaded, resume=False)
    source = sources.fetch_model(loaded.recipe.model)
    model = lora.attach_lora(
        base.load_base(source, loaded.recipe.model, device.select_device("fp32")), loaded.recipe.lora, seed=1
    )
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if hasattr(module, "lora_B"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            b.data = torch.randn(b.shape, generator=generator)
            inner = module.get_base_layer()
            weight = dequantized(inner) if quantization != "none" else inner.weight
            b.data *= size * weight.norm() / (3 * (b @ a).norm())
    adapter.save_adapter(folder, model, load_tokenizer(source), source)
    run = {"name": folder.name, "base": {"fingerprint": source.fingerprint}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def save_both(home: Path) -> Path:
    """A base with an adapter trained on it in NF4, and one trained in 32 bits: `home` with base, nf4 and none."""
    save_base(home / "base")
    save_adapter(home / "nf4", home / "base")
    save_adapter(home / "none", home / "base", "none")
    return home
