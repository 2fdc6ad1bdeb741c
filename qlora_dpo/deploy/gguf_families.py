"""The model types that are written as GGUF: their architectures in llama.cpp, and what these cannot compute."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf

GEMMA_3_PATTERN = 6
"""llama.cpp lets every sixth layer of a Gemma 3 attend to everything; the others have its sliding window."""
SMOLLM_3_PATTERN = 4
"""Every fourth layer of a SmolLM3 has no rotary positions in llama.cpp."""


def _nothing(writer: gguf.GGUFWriter, config: Any) -> None:
    """No fields beyond those of every model."""


def _no_obstacle(config: Any) -> str:
    return ""


@dataclass(frozen=True)
class GgufFamily:
    """How a model type of transformers is written."""

    architecture: gguf.MODEL_ARCH
    permutes: bool = False
    """True if the two rows of each rotary pair of queries and keys are adjacent in llama.cpp."""
    norm_offset: float = 0.0
    """What is added to the weights of norms, which Gemma stores as their difference to 1."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    obstacle: Callable[[Any], str] = _no_obstacle
    """Why llama.cpp would compute something else for a config; empty if it would not."""
    write_fields: Callable[[gguf.GGUFWriter, Any], None] = _nothing


def rope_of(config: Any) -> Mapping[str, Any]:
    """The rotary positions of the layers that attend to everything."""
    rope: Mapping[str, Any] = config.rope_parameters
    full: Mapping[str, Any] = rope.get("full_attention", rope)
    return full


def rotary_dim(config: Any) -> int:
    """The dimensions of a head that are rotated."""
    return int(head_dim_of(config) * rope_of(config).get("partial_rotary_factor", 1.0))


def head_dim_of(config: Any) -> int:
    """The width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _window_obstacle(config: Any) -> str:
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", window is not None)
    if uses and window is not None and window < config.max_position_embeddings:
        return f"has a sliding window of {window} tokens, which llama.cpp does not read for {config.model_type}"
    return ""


def _smollm3_obstacle(config: Any) -> str:
    wanted = [int((layer + 1) % SMOLLM_3_PATTERN != 0) for layer in range(config.num_hidden_layers)]
    return (
        "" if list(config.no_rope_layers) == wanted else "has rotary positions in other layers than llama.cpp's SmolLM3"
    )


def _gemma3_obstacle(config: Any) -> str:
    kinds = ["full_attention", *["sliding_attention"] * (GEMMA_3_PATTERN - 1)]
    if list(config.layer_types) != [
        kinds[(layer + 1) % GEMMA_3_PATTERN > 0] for layer in range(config.num_hidden_layers)
    ]:
        return "has its sliding windows in other layers than llama.cpp's Gemma 3"
    if config.query_pre_attn_scalar != head_dim_of(config):
        return "scales its attention by another number than llama.cpp's Gemma 3"
    if config.final_logit_softcapping or config.attn_logit_softcapping:
        return "has soft caps, which llama.cpp's Gemma 3 has not"
    local = config.rope_parameters.get("sliding_attention", {"rope_theta": 10_000.0, "rope_type": "default"})
    if (local["rope_theta"], local["rope_type"]) != (10_000.0, "default"):
        return "has other rotary positions in its windows than llama.cpp's Gemma 3"
    return ""


def _qwen3_moe_obstacle(config: Any) -> str:
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        return "has layers without experts, which llama.cpp's Qwen3-MoE has not"
    if not config.norm_topk_prob:
        return "does not normalize the weights of its experts, as llama.cpp's Qwen3-MoE does"
    return _window_obstacle(config)


def _write_gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)


def _write_granite(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _write_phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = rope_of(config)
    writer.add_sliding_window(config.sliding_window or 0)
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    writer.add_rope_scaling_orig_ctx_len(original)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        factor = rope.get("attention_factor") or (
            1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
        )
        writer.add_rope_scaling_attn_factors(factor)


def _write_qwen3_moe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


GGUF_FAMILIES = {
    "llama": GgufFamily(gguf.MODEL_ARCH.LLAMA, permutes=True),
    "mistral": GgufFamily(gguf.MODEL_ARCH.LLAMA, permutes=True, obstacle=_window_obstacle),
    "qwen2": GgufFamily(gguf.MODEL_ARCH.QWEN2, obstacle=_window_obstacle),
    "qwen3": GgufFamily(gguf.MODEL_ARCH.QWEN3, obstacle=_window_obstacle),
    "qwen3_moe": GgufFamily(gguf.MODEL_ARCH.QWEN3MOE, obstacle=_qwen3_moe_obstacle, write_fields=_write_qwen3_moe),
    "smollm3": GgufFamily(gguf.MODEL_ARCH.SMOLLM3, permutes=True, obstacle=_smollm3_obstacle),
    "gemma3_text": GgufFamily(
        gguf.MODEL_ARCH.GEMMA3,
        norm_offset=1.0,
        rope_types=("default", "linear"),
        obstacle=_gemma3_obstacle,
        write_fields=_write_gemma3,
    ),
    "phi3": GgufFamily(gguf.MODEL_ARCH.PHI3, rope_types=("default", "longrope"), write_fields=_write_phi3),
    "granite": GgufFamily(gguf.MODEL_ARCH.GRANITE, permutes=True, write_fields=_write_granite),
}
"""By `model_type` of the config."""
