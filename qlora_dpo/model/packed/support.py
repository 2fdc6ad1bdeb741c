"""Which models may be given packed rows, and what makes a model take them."""

from typing import Any

from qlora_dpo.model.packed.attention import enable_packed_attention
from qlora_dpo.model.packed.recurrent import enable_packed_recurrence, recurrent_layers


def packing_unsupported_reason(model: Any) -> str:
    """Why `model` cannot train on packed rows; empty if no reason is known.

    Predicted from its class and config; `preference.packing_choice` verifies it on real pairs.
    """
    config = model.config.get_text_config()
    if not recurrent_layers(model):  # beside them, attention may need no positions, and no model has that flag
        if not getattr(model, "_supports_attention_backend", False):
            return f"{type(model).__name__} does not use transformers' attention interface"
        if not any("Rotary" in type(module).__name__ for module in model.modules()):
            return f"{type(model).__name__} has no rotary positions"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention scores"
    return ""


def enable_packed_rows(model: Any) -> str:
    """Have the attention and the recurrent layers of `model` take packed rows; without a layout they compute as before.

    Returns the name of the previous attention implementation.
    """
    enable_packed_recurrence(model)
    return enable_packed_attention(model)
