"""Tiny random models of the architectures that packed rows are promised for, and of some that they cannot serve."""

import copy
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, head_dim=12, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "gemma": GemmaConfig(**{**SHAPE, "num_key_value_heads": 1}, head_dim=24, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
}

NOT_SERVED: dict[str, Any] = {
    "a short window": MistralConfig(**SHAPE, sliding_window=8),
    "learned positions": GPT2Config(
        vocab_size=320, n_embd=48, n_layer=2, n_head=4, n_positions=512, bos_token_id=2, eos_token_id=2
    ),
    "slopes for positions": BloomConfig(
        vocab_size=320, hidden_size=48, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}


def made(config: Any, seed: int = 0) -> Any:
    """A random float32 model whose tokens matter to each other, frozen and in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.data = 0.15 * torch.randn_like(parameter)
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def tiny_config(kind: str, **changed: Any) -> Any:
    """A tiny config of the class `kind` ("Gemma2"), with `changed` keys; a key that is None is left to the class."""
    shape = {**SHAPE, "hidden_size": 32, "intermediate_size": 64, **changed}
    return getattr(transformers, f"{kind}Config")(**{key: value for key, value in shape.items() if value is not None})
