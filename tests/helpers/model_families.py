"""Tiny random models of the families that people tune, and what training, merging and export make of each.

P pairs, L tokens, V vocabulary; 2 columns: chosen, rejected.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import architectures
import tiny
import tiny_run
import torch
from accelerate.state import AcceleratorState
from architectures import GPT, LINEAR, MIXER, NEMOTRON
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_dpo.cli import main
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model import sources
from qlora_dpo.model.base import load_base
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import adapter_disabled, attach_lora
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import dpo
from qlora_dpo.preference.pack import Packing, collate, micro_batches
from qlora_dpo.preference.packing_choice import choose_packing
from qlora_dpo.preference.reference import model_logps
from qlora_dpo.recipe.model import LoraTable, ModelTable

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Family:
    """A family by its name in the table, its config class in transformers, and the keys of a tiny config of it."""

    name: str
    kind: str
    keys: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """A tiny config with the family's own traits."""
        return architectures.tiny_config(self.kind, **{"vocab_size": 400, "num_attention_heads": 4, **self.keys})


FAMILIES = (
    Family("Llama 2", "Llama", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    Family(
        "Llama 3.1, 3.2",
        "Llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    Family("SmolLM2", "Llama", {"tie_word_embeddings": True, "num_attention_heads": 4, "head_dim": 8}),
    Family(
        "SmolLM3", "SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "tie_word_embeddings": True}
    ),
    Family("Qwen2, Qwen2.5", "Qwen2", {"tie_word_embeddings": True, "vocab_size": 414}),  # more rows than tokens
    Family("Qwen3", "Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    Family(
        "Qwen3-MoE",
        "Qwen3Moe",
        {"head_dim": 8, **MOE, "hidden_size": 64, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    Family("Qwen3.5, dense", "Qwen3_5Text", LINEAR),
    Family("Qwen3-Next", "Qwen3Next", {**LINEAR, "num_experts": 0, "mlp_only_layers": [0, 1]}),
    Family("Gemma", "Gemma", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    Family("Gemma 2", "Gemma2", {**GEMMA, **WINDOWS, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
    Family(
        "Gemma 3",
        "Gemma3Text",
        {
            **GEMMA,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "sliding_window": 16,
            "rope_parameters": {"full_attention": {**ROTARY, "rope_theta": 1e6}, "sliding_attention": ROTARY},
        },
    ),
    Family(
        "Gemma 3n",
        "Gemma3nText",
        {
            "head_dim": 8,
            **WINDOWS,
            "vocab_size_per_layer_input": 400,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "intermediate_size": [64, 64],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    Family(
        "Gemma 4",
        "Gemma4Text",
        {
            "head_dim": 8,
            "global_head_dim": 8,
            **WINDOWS,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 400,
            "num_kv_shared_layers": 0,
        },
    ),
    Family("Mistral", "Mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    Family("Mistral 7B v0.1, with its window", "Mistral", {"sliding_window": 16, "tie_word_embeddings": False}),
    Family("Ministral", "Ministral", {"head_dim": 8, **WINDOWS}),
    Family("Ministral 3", "Ministral3", {"head_dim": 8}),
    Family("Mixtral", "Mixtral", {"num_local_experts": 4}),
    Family("Phi-2", "Phi", {"bos_token_id": 2}),
    Family("Phi-3", "Phi3", {"bos_token_id": 2, "sliding_window": None, "tie_word_embeddings": False}),
    Family(
        "Phi-4-mini",
        "Phi3",
        {
            "bos_token_id": 2,
            "tie_word_embeddings": True,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                **ROTARY,
                "rope_type": "longrope",
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [1.0, 3.0],
                "original_max_position_embeddings": 256,
            },
        },
    ),
    Family("OLMo 2", "Olmo2", {}),
    Family("OLMo 3", "Olmo3", WINDOWS),
    Family("OLMoE", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family(
        "Granite 3",
        "Granite",
        {
            "logits_scaling": 8.0,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "Granite 4, hybrid",
        "GraniteMoeHybrid",
        {
            **MIXER,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 64,
            "logits_scaling": 8.0,
            "position_embedding_type": None,
        },
    ),
    Family("LFM2", "Lfm2", {"layer_types": ["conv", "full_attention"], "tie_word_embeddings": True}),
    Family("Falcon-H1", "FalconH1", {**MIXER, "mamba_d_ssm": 64, "head_dim": 8}),
    Family("Nemotron 3 and H", "NemotronH", NEMOTRON),
    Family("Nemotron (Minitron)", "Nemotron", {}),
    Family("Cohere", "Cohere", {"logit_scale": 0.0625}),
    Family("Cohere 2", "Cohere2", {"logit_scale": 0.25, **WINDOWS}),
    Family("GPT-OSS", "GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, **WINDOWS}),
    Family("EXAONE 4", "Exaone4", WINDOWS),
    Family("GLM 4", "Glm4", {"head_dim": 8, "partial_rotary_factor": 0.5}),
    Family("StableLM", "StableLm", {"partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    Family("Falcon", "Falcon", {"alibi": False, "multi_query": True, "hidden_size": 64}),
    Family("GPT-2", "GPT2", GPT),
    Family("GPT-NeoX (Pythia)", "GPTNeoX", {"bos_token_id": 2, "num_key_value_heads": None}),
    Family("OPT", "OPT", architectures.FAMILIES["OPT"]),
    Family("BLOOM", "Bloom", {"num_key_value_heads": None}),
    Family("StarCoder2", "Starcoder2", {}),
    Family("Seed-OSS", "SeedOss", {"head_dim": 8}),
    Family("Apertus", "Apertus", {}),
    Family("ERNIE 4.5", "Ernie4_5", {"head_dim": 8}),
    Family("HunYuan, dense", "HunYuanDenseV1", {"head_dim": 8}),
    Family("DeepSeek V3", "DeepseekV3", architectures.FAMILIES["DeepseekV3"]),
)  # fmt: skip


def save_family(family: Family, folder: Path) -> Path:
    """A random model of the family with a tokenizer, as a folder of transformers."""
    architectures.made(family.config()).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def _stirred(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def _plain_logps(model: Any, pairs: list[EncodedPair]) -> Tensor:
    """Log-probabilities (P, 2), one sequence at a time, by the model's own forward pass."""

    def of(prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
        ids_1L = torch.tensor([[*prompt, *answer]])
        logp_LV = model(input_ids=ids_1L, use_cache=False).logits[0].float().log_softmax(-1)
        picked: Tensor = logp_LV[len(prompt) - 1 : -1].gather(1, ids_1L[0, len(prompt) :, None]).sum()
        return picked

    return torch.stack([torch.stack([of(p.prompt, p.chosen), of(p.prompt, p.rejected)]) for p in pairs])


def _two_steps(model: Any, logps: Any, reference_P2: Tensor) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of two steps of gradient descent on the DPO loss of all pairs."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for _ in range(2):
        model.zero_grad()
        logp_P2 = logps()
        ratio_P2 = logp_P2 - reference_P2
        loss = dpo(ratio_P2[:, 0] - ratio_P2[:, 1], 0.1).mean()
        loss.backward()
        gradients = {name: value.grad.detach().clone() for name, value in parameters.items() if value.grad is not None}
        yield float(loss.detach()), gradients
        with torch.no_grad():
            for name, gradient in gradients.items():
                parameters[name] -= 0.5 * gradient


def step_errors(folder: Path) -> tuple[str, float, float]:
    """The packing of a family, and the largest relative errors of loss and gradients in two steps."""
    source = sources.fetch_model(ModelTable(name=str(folder)))
    base = load_base(source, ModelTable(name=str(folder), quantization="none"), tiny_run.CPU)
    model = _stirred(attach_lora(base, LoraTable(r=4), 0))
    start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    pairs = tiny_run.pairs(6, longest_prompt=30, longest_answer=20)
    padded = Packing(256, tiny_run.PAD, backend=None)
    packing, reason = choose_packing(model, pairs, padded, tiny_run.CPU)
    fuse_lora(model, torch.float32)
    reference_P2 = torch.zeros(len(pairs), 2)
    for group in micro_batches(pairs, packing):
        with adapter_disabled(model), torch.no_grad():
            reference_P2[group] = model_logps(model, [pairs[i] for i in group], packing, tiny_run.CPU).float()

    def ours() -> Tensor:
        parts = {}
        for group in micro_batches(pairs, packing):
            scores = score_batch(model, collate([pairs[i] for i in group], packing), tiny_run.CPU)
            for place, index in enumerate(group):
                parts[index] = torch.stack([scores.chosen_logp_P[place], scores.rejected_logp_P[place]])
        return torch.stack([parts[index] for index in range(len(pairs))])

    plain_base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
    plain = attach_lora(plain_base, LoraTable(r=4), 0).eval()  # PEFT's own layers, which are not fused here
    with torch.no_grad():
        for name, value in plain.named_parameters():
            if value.requires_grad:
                value.copy_(start[name])
        with plain.disable_adapter():
            plain_reference_P2 = _plain_logps(plain, pairs)
    both = zip(
        _two_steps(model, ours, reference_P2),
        _two_steps(plain, lambda: _plain_logps(plain, pairs), plain_reference_P2),
        strict=True,
    )
    loss_error = gradient_error = 0.0
    for (loss, gradients), (expected, plain_gradients) in both:
        loss_error = max(loss_error, abs(loss - expected) / expected)
        gradient_error = max(gradient_error, tiny_run.all_apart(gradients, plain_gradients))
    kind = "packed" if packing.backend is not None else reason.removeprefix("padded batches, since ")
    return kind, loss_error, gradient_error


RECIPE = """
[model]
name = {model}
quantization = "{quantization}"
dtype = "fp32"
[lora]
r = 4
[data]
train = "./pairs.jsonl"
eval_share = 0.3
max_length = 100
[train]
learning_rate = 1e-3
batch_size = 4
max_steps = 2
[samples]
prompts = 1
max_new_tokens = 3
"""


def run_family(family: Family, home: Path) -> tuple[str, float, int, str]:
    """Train, in 16 and in 4 bits, merge, answer and export a family in `home` by the commands that users type.

    Returns what stays as it is in 4 bits, the KL of the merge, the tokens of a reply, and whether a GGUF was written.
    """
    rows = [{"prompt": f"the cat {n}?", "chosen": "on the mat", "rejected": f"no {n}"} for n in range(16)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder = save_family(family, home / "base")
    for quantization in ("none", "nf4"):
        recipe = home / f"{quantization}.toml"
        text = RECIPE.format(model=json.dumps(str(folder)), quantization=quantization)
        recipe.write_text(text, encoding="utf-8")
        AcceleratorState._reset_state(True)
        with tiny_run.logged_sentences() as said:
            assert main(["train", str(recipe), "-o", str(home / quantization)]) == 0, family.name
        results = json.loads((home / quantization / "results.json").read_text(encoding="utf-8"))
        assert [record["step"] for record in results["evals"]] == [0, 2]
    kept = [sentence for sentence in said if sentence.startswith("quantization: ")]
    assert main(["merge", str(home / "none"), "-o", str(home / "merged"), "--dtype", "fp32"]) == 0
    record = json.loads((home / "merged" / "merge.json").read_text(encoding="utf-8"))
    samples = (home / "none" / "samples.jsonl").read_text(encoding="utf-8")
    reply = json.loads(samples.splitlines()[0])["tuned_tokens"]
    exported = main(["export", str(home / "merged"), "--to", "gguf", "--quant", "f16", "-o", str(home / "gguf")])
    return "; ".join(kept), record["kl"], reply, "yes" if exported == 0 else "no"
