"""Decodes on a CPU with fewer and larger operations than a model's own forward, for models whose layers are Llama's.

Weights that read the same input are joined in one product, in the form that is fastest on a CPU (decoder_products.py),
and keys and values are written in place. Those of a prompt are stored once for all of its completions. Under autocast
products are computed in its dtype, and everything else in float32.

In names: P prompts, C completions of a prompt, S = P * C slots for completions, R rows (slots still decoded), E width,
I width inside the MLP, H query heads, K key-value heads, G query heads for each of them, D width of a head, L tokens
of the longest prompt, T tokens of a completion, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import Linear, Linear4bit, Linear8bitLt, LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from qlora_dpo.model.cast_output import casts_output
from qlora_dpo.model.decoder_layers import unwrap_peft
from qlora_dpo.model.memory import free_ram_bytes
from qlora_dpo.talk.decoder_products import Product, fused_product, product_bytes

MODEL_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Models whose layers are those of `_Layer`; others decode with their own forward."""
MEMORY_SHARE = 0.25
"""Share of the free RAM that the copies of a model's weights may take."""
KEPT_SHARE = 0.75
"""The other prompts are dropped once this share or less is still being completed, since that copies the cache."""


@dataclass(frozen=True)
class _Norm:
    """An RMSNorm over the last dimension."""

    weight: Tensor
    epsilon: float

    def __call__(self, inputs: Tensor) -> Tensor:
        # torch's own takes three times as long for a few rows on a CPU
        normalized = inputs * inputs.square().mean(-1, keepdim=True).add_(self.epsilon).rsqrt_()
        return normalized.mul_(self.weight)


@dataclass(frozen=True)
class _Layer:
    """The parts of a decoder layer, and what scores are multiplied by. Only Qwen3 normalizes queries and keys."""

    input_norm: _Norm
    query_key_value: Product
    query_norm: _Norm | None
    key_norm: _Norm | None
    scaling: float
    attention_output: Product
    mlp_norm: _Norm
    gate_up: Product
    down: Product


@dataclass
class FusedCache:
    """Keys and values of prompts and of their completions, which all have the same number of tokens."""

    prompt_keys: list[Tensor]
    """Of each layer (P, K, L, D), padded on the left."""
    prompt_values: list[Tensor]
    padding_P11L: Tensor | None
    """Added to the scores of prompt tokens: minus infinity for padding. None without padding."""
    length_P: Tensor
    copies: int
    keys: list[Tensor]
    """Of each layer (S, K, most tokens, D), of which the first `count` are written."""
    values: list[Tensor]
    count: int = 0

    def keep_rows(self, slot_R: Tensor) -> Tensor:
        """The slots of the rows that are still decoded, after the prompts without any were dropped if they are many."""
        prompts, number_R = (slot_R // self.copies).unique(return_inverse=True)
        if len(prompts) > KEPT_SHARE * len(self.length_P):
            return slot_R
        self._keep_prompts(prompts)
        kept_R: Tensor = number_R * self.copies + slot_R % self.copies
        return kept_R

    def append_completion(self, past: Any) -> None:
        """Append the only completion to the cache of its prompt, in the dtypes of that cache."""
        for index, (layer, keys, values) in enumerate(zip(past.layers, self.keys, self.values, strict=True)):
            decoded = keys[:, :, : self.count].to(layer.keys.dtype), values[:, :, : self.count].to(layer.values.dtype)
            past.update(*decoded, index)

    def _keep_prompts(self, prompts: Tensor) -> None:
        slots = (prompts[:, None] * self.copies + torch.arange(self.copies)).flatten()
        self.prompt_keys = [keys[prompts] for keys in self.prompt_keys]
        self.prompt_values = [values[prompts] for values in self.prompt_values]
        self.padding_P11L = None if self.padding_P11L is None else self.padding_P11L[prompts]
        self.length_P = self.length_P[prompts]
        self.keys = [_selected(keys, slots, self.count) for keys in self.keys]
        self.values = [_selected(values, slots, self.count) for values in self.values]


def _selected(stored: Tensor, slots: Tensor, count: int) -> Tensor:
    selected = stored.new_empty(len(slots), *stored.shape[1:])
    selected[:, :, :count] = stored[slots, :, :count]
    return selected


class FusedDecoder:
    """A model's weights as they were when it was built, the adapter merged unless it was disabled."""

    def __init__(self, model: Any, rows: int = 1, dtype: torch.dtype = torch.float32) -> None:
        """Copy the weights of `model`, for which `fused_decoder` has made sure that it is possible.

        `dtype` is that of the model's own products.
        """
        body = model.model
        config = model.config
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(config.num_key_value_heads)
        self.embedding = body.embed_tokens.weight.detach()
        self.rotary = body.rotary_emb
        self.layers = [_fused_layer(layer, rows, dtype) for layer in body.layers]
        self.norm = _norm(body.norm)
        self.head = fused_product([model.lm_head], rows, dtype)

    def cache(self, prompts: Sequence[tuple[DynamicCache, Sequence[int]]], copies: int, most: int) -> FusedCache:
        """A cache for `copies` completions of up to `most` tokens each, after prompts that the model has run.

        `prompts` are batches: their keys and values, padded on the left, and the length of each prompt.
        """
        lengths = [length for _, of_batch in prompts for length in of_batch]
        longest, slots = max(lengths), len(lengths) * copies
        length_P = torch.tensor(lengths)
        padded_PL = torch.arange(longest) < longest - length_P[:, None]
        padding = torch.zeros(padded_PL.shape).masked_fill(padded_PL, -torch.inf)[:, None, None]
        head_dim = prompts[0][0].layers[0].keys.shape[-1]
        return FusedCache(
            [_joined([past.layers[layer].keys for past, _ in prompts], longest) for layer in range(len(self.layers))],
            [_joined([past.layers[layer].values for past, _ in prompts], longest) for layer in range(len(self.layers))],
            padding if padded_PL.any() else None,
            length_P,
            copies,
            [torch.empty(slots, self.kv_heads, most, head_dim) for _ in self.layers],
            [torch.empty(slots, self.kv_heads, most, head_dim) for _ in self.layers],
        )

    @torch.no_grad()
    def next_logits(self, token_R: Tensor, cache: FusedCache, slot_R: Tensor) -> Tensor:
        """Append a token to each row's completion in `cache`; returns the logits (R, V) of the token after it."""
        with torch.autocast("cpu", enabled=False):
            return self._next_logits(token_R, cache, slot_R)

    def _next_logits(self, token_R: Tensor, cache: FusedCache, slot_R: Tensor) -> Tensor:
        hidden_RE = functional.embedding(token_R, self.embedding)
        position_R = cache.length_P[slot_R // cache.copies] + cache.count
        cos_R1D, sin_R1D = self.rotary(hidden_RE[:, None], position_R[:, None])
        half = cos_R1D.shape[-1] // 2
        sin_R1D = torch.cat([-sin_R1D[..., :half], sin_R1D[..., half:]], dim=-1)
        for index, layer in enumerate(self.layers):
            joined = layer.query_key_value(layer.input_norm(hidden_RE))
            joined = joined.view(len(token_R), -1, 2 * half)  # (R, H + 2 K, D)
            rotated, value_RKD = joined[:, : -self.kv_heads], joined[:, -self.kv_heads :]
            if layer.query_norm is not None and layer.key_norm is not None:
                queries, keys = rotated[:, : self.heads], rotated[:, self.heads :]
                rotated = torch.cat([layer.query_norm(queries), layer.key_norm(keys)], dim=1)
            rotated = rotated * cos_R1D + rotated.roll(half, -1) * sin_R1D
            place = slot_R if len(slot_R) < len(cache.keys[index]) else slice(None)  # a copy is faster than scattering
            cache.keys[index][place, :, cache.count] = rotated[:, self.heads :]
            cache.values[index][place, :, cache.count] = value_RKD
            attended = self._attend(rotated[:, : self.heads] * layer.scaling, cache, index, slot_R)
            hidden_RE = hidden_RE + layer.attention_output(attended)
            gate_RI, up_RI = layer.gate_up(layer.mlp_norm(hidden_RE)).chunk(2, dim=-1)
            hidden_RE = hidden_RE + layer.down(functional.silu(gate_RI) * up_RI)
        cache.count += 1
        logits_RV: Tensor = self.head(self.norm(hidden_RE))
        return logits_RV

    def _attend(self, query_RHD: Tensor, cache: FusedCache, index: int, slot_R: Tensor) -> Tensor:
        """The output (R, H * D) of attention to a row's prompt and its completion so far."""
        keys, values = cache.keys[index][:, :, : cache.count + 1], cache.values[index][:, :, : cache.count + 1]
        prompt_keys, prompt_values = cache.prompt_keys[index], cache.prompt_values[index]
        slots, kv_heads, _, width = keys.shape
        query = query_RHD
        if len(query_RHD) < slots:
            query = query_RHD.new_zeros(slots, *query_RHD.shape[1:]).index_copy_(0, slot_R, query_RHD)
        query = query.reshape(slots, kv_heads, -1, width)  # (S, K, G, D)
        prompt_scores = _by_prompt(query, cache.copies) @ prompt_keys.transpose(-1, -2)
        if cache.padding_P11L is not None:
            prompt_scores = prompt_scores + cache.padding_P11L
        scores = torch.cat([_by_slot(prompt_scores, cache.copies), query @ keys.transpose(-1, -2)], dim=-1)
        weights = scores.softmax(dim=-1)
        prompt_tokens = prompt_keys.shape[2]
        of_prompt = _by_prompt(weights[..., :prompt_tokens], cache.copies) @ prompt_values
        attended = _by_slot(of_prompt, cache.copies) + weights[..., prompt_tokens:] @ values
        attended = attended.reshape(slots, -1)
        return attended if len(query_RHD) == slots else attended[slot_R]


def _by_prompt(by_slot: Tensor, copies: int) -> Tensor:
    """(S, K, G, ...) as (P, K, C * G, ...): the queries of all completions of a prompt in one matrix."""
    if copies == 1:
        return by_slot
    slots, kv_heads, groups, width = by_slot.shape
    by_copy = by_slot.view(slots // copies, copies, kv_heads, groups, width)
    return by_copy.transpose(1, 2).reshape(slots // copies, kv_heads, copies * groups, width)


def _by_slot(by_prompt: Tensor, copies: int) -> Tensor:
    """(P, K, C * G, ...) as (S, K, G, ...)."""
    if copies == 1:
        return by_prompt
    prompts, kv_heads, rows, width = by_prompt.shape
    by_copy = by_prompt.view(prompts, kv_heads, copies, rows // copies, width)
    return by_copy.transpose(1, 2).reshape(prompts * copies, kv_heads, rows // copies, width)


def _joined(batches: Sequence[Tensor], longest: int) -> Tensor:
    """Keys or values of batches of prompts (p, K, tokens, D) in one (P, K, longest, D), float32, padded on the left."""
    if len(batches) == 1:
        return batches[0].float()
    joined = torch.zeros(sum(map(len, batches)), batches[0].shape[1], longest, batches[0].shape[3])
    start = 0
    for batch in batches:
        joined[start : start + len(batch), :, longest - batch.shape[2] :] = batch
        start += len(batch)
    return joined


def fused_decoder(model: Any, rows: int = 1) -> FusedDecoder | None:
    """A decoder with the weights that `model` has now, without an adapter that is disabled, for so many completions.

    None for models, devices and dtypes that it does not know, and if its copies of the weights take too much memory.
    Call it inside the device's autocast.
    """
    plain = unwrap_peft(model)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if dtype not in (torch.float32, torch.bfloat16) or type(plain).__name__ not in MODEL_CLASSES:
        return None
    if _has_hooks(model) or not _is_fusable(plain):
        return None
    linear = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    if sum(product_bytes(layer, dtype) for layer in linear) > MEMORY_SHARE * free_ram_bytes():
        return None
    with torch.autocast("cpu", enabled=False):
        return FusedDecoder(plain, rows, dtype)


def _is_fusable(model: Any) -> bool:
    """Whether every part is one that the decoder computes, on the CPU and with a float32 residual stream."""
    config, body, head = model.config, model.model, model.lm_head
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        return False
    if config.hidden_act != "silu" or type(body.embed_tokens) is not nn.Embedding:
        return False
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return False
    norms = [*(norm for layer in body.layers for norm in _norms(layer)), body.norm]
    weights = [body.embed_tokens.weight, head.weight, *(norm.weight for norm in norms)]
    if any(weight.dtype != torch.float32 or weight.device.type != "cpu" for weight in weights):
        return False
    # a norm that is trained in whole is wrapped by PEFT
    return all(type(norm) is type(body.norm) for norm in norms) and all(map(_is_plain, _linear_layers(body)))


def _has_hooks(model: nn.Module) -> bool:
    """Whether a module's input or output may be changed, other than to float32."""
    return any(
        module._forward_pre_hooks or (module._forward_hooks and not casts_output(module)) for module in model.modules()
    )


def _norms(layer: Any) -> list[Any]:
    of_attention = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    return [layer.input_layernorm, layer.post_attention_layernorm, *(norm for norm in of_attention if norm is not None)]


def _linear_layers(body: Any) -> list[Any]:
    layers = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        layers += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return layers


def _is_plain(layer: Any) -> bool:
    """Whether the layer is linear, dense or quantized, with plain LoRA or none, and computes in float32 or autocast."""
    base = layer
    if isinstance(layer, LoraLayer):
        base = layer.get_base_layer()
        is_plain_lora = type(layer) in (Linear, Linear4bit, Linear8bitLt) and not layer.lora_variant
        if not is_plain_lora or layer.merged or any(layer.lora_bias.values()):
            return False
    if type(base) is bnb.nn.Linear4bit:
        return bool(base.compute_dtype == torch.float32) or torch.is_autocast_enabled("cpu")
    return type(base) is bnb.nn.Linear8bitLt or (type(base) is nn.Linear and base.weight.dtype == torch.float32)


def _fused_layer(layer: Any, rows: int, dtype: torch.dtype) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        _norm(layer.input_layernorm),
        fused_product([attention.q_proj, attention.k_proj, attention.v_proj], rows, dtype),
        _norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        _norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        attention.scaling,
        fused_product([attention.o_proj], rows, dtype),
        _norm(layer.post_attention_layernorm),
        fused_product([mlp.gate_proj, mlp.up_proj], rows, dtype),
        fused_product([mlp.down_proj], rows, dtype),
    )


def _norm(norm: Any) -> _Norm:
    return _Norm(norm.weight.detach(), norm.variance_epsilon)
