"""Tiny random models of the architectures that packed rows are promised for, and of some that they cannot serve."""

import copy
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
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
    "a short window": MistralConfig(**SHAPE, sliding_window=8),
}

NOT_SERVED: dict[str, Any] = {
    "capped scores": Gemma2Config(**SHAPE, head_dim=12),
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


MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
MIXER = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
STATE = {"state_size": 8, "bos_token_id": 2}
LINEAR = {
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
NEMOTRON = {
    "head_dim": 8,
    "layers_block_type": ["mamba", "attention"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "ssm_state_size": 8,
    "chunk_size": 16,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "DeepseekV3": {
        **MLA,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 2,
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "Qwen3Next": {**LINEAR, "num_experts": 0, "mlp_only_layers": [0, 1]},
    "Bamba": {**MIXER, "attn_layer_indices": [1]},
    "Llama4Text": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 1,
    },
    "Phimoe": {"num_local_experts": 2, "num_experts_per_tok": 2, "router_jitter_noise": 0.3, "input_jitter_noise": 0.3},
    "Mamba": STATE,
    "Mamba2": {**STATE, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "FalconH1": {**MIXER, "mamba_d_ssm": 64, "head_dim": 8},
    "Falcon": {"alibi": False, "hidden_dropout": 0.1, "hidden_size": 64},
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "bos_token_id": 2, "dropout": 0.2, "num_key_value_heads": None},
    "SeedOss": {"head_dim": 8, "attention_dropout": 0.2, "residual_dropout": 0.2},
    "BioGpt": {"bos_token_id": 2, "num_key_value_heads": None},
    "Starcoder2": {"residual_dropout": 0.2, "embedding_dropout": 0.2, "attention_dropout": 0.2},
    "Phi3": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attention_dropout": 0.2, "bos_token_id": 2},
}
"""Families that trained wrongly or not at all, with the keys of their tiny configs."""


def family(kind: str, **changed: Any) -> Any:
    """A tiny random model of `FAMILIES`."""
    return made(tiny_config(kind, **FAMILIES[kind], **changed))
