"""GGUF of the families beyond Llama and Qwen: tensors, fields, and what llama.cpp would compute otherwise."""

import json
from pathlib import Path
from typing import Any

import architectures
import gguf
import gguf_models
import numpy as np
import pytest
import tiny
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import normalizers

from qlora_dpo.cli import main
from qlora_dpo.deploy.gguf_file import check_architecture
from qlora_dpo.deploy.gguf_tokenizer import convert_tokenizer
from qlora_dpo.errors import ModelError


def exported(name: str, home: Path) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]], dict[str, Any]]:
    """Tensors of the model by transformers' names, those of the file by llama.cpp's, and the file's fields."""
    folder = gguf_models.save_gguf_model(name, home / "model")
    assert main(["export", str(folder), "-o", str(home / "out")]) == 0
    reader = gguf.GGUFReader(next((home / "out").glob("*.gguf")))
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    values = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in reader.tensors
    }
    return load_file(folder / "model.safetensors"), values, fields


@pytest.mark.parametrize("name", gguf_models.EXPORTED)
def test_every_family_is_written_and_reads_back(name: str, tmp_path: Path) -> None:
    stored, written, fields = exported(name, tmp_path)
    assert sum(value.size for value in stored.values()) == sum(
        value.size for key, value in written.items() if not key.startswith("rope_")
    )
    assert fields["general.architecture"] in (
        "llama",
        "qwen2",
        "qwen3",
        "qwen3moe",
        "smollm3",
        "gemma3",
        "phi3",
        "granite",
    )


def test_gemmas_norms_are_stored_as_what_they_multiply_by(tmp_path: Path) -> None:
    stored, written, fields = exported("Gemma 3", tmp_path)
    for theirs, ours in (("blk.1.attn_q_norm", "layers.1.self_attn.q_norm"), ("output_norm", "norm")):
        np.testing.assert_allclose(written[f"{theirs}.weight"], stored[f"model.{ours}.weight"] + 1, rtol=1e-6)
    assert fields["gemma3.attention.sliding_window"] == 16
    assert fields["gemma3.rope.freq_base"] == 1e6


def test_experts_are_stacked_in_their_order(tmp_path: Path) -> None:
    stored, written, fields = exported("Qwen3-MoE", tmp_path)
    for theirs, ours in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        wanted = np.stack([stored[f"model.layers.1.mlp.experts.{number}.{ours}.weight"] for number in range(4)])
        np.testing.assert_allclose(written[f"blk.1.ffn_{theirs}_exps.weight"], wanted, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(written["blk.0.ffn_gate_inp.weight"], stored["model.layers.0.mlp.gate.weight"])
    counts = [fields[f"qwen3moe.expert_{name}"] for name in ("count", "used_count", "feed_forward_length")]
    assert counts == [4, 2, 32]


def test_granites_scales_and_phis_factors_are_written(tmp_path: Path) -> None:
    _, _, fields = exported("Granite 3", tmp_path / "granite")
    found = [
        fields[f"granite.{name}"] for name in ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
    ]
    assert found == pytest.approx([0.1, 12.0, 0.22, 8.0])
    _, written, fields = exported("Phi-4-mini", tmp_path / "phi")
    assert written["rope_factors_short.weight"].tolist() == [1.0, 1.5]
    assert written["rope_factors_long.weight"].tolist() == [1.0, 3.0]
    assert (fields["phi3.rope.dimension_count"], fields["phi3.rope.scaling.original_context_length"]) == (4, 256)
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + np.log(2) / np.log(256)) ** 0.5)


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        (
            "Mistral",
            {"sliding_window": 16},
            "has a sliding window of 16 tokens, which llama.cpp does not read for mistral",
        ),
        ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0]}, "rotary positions in other layers than llama.cpp's SmolLM3"),
        ("Gemma 3", {"query_pre_attn_scalar": 20}, "scales its attention by another number"),
        ("Gemma 3", {"final_logit_softcapping": 30.0}, "has soft caps"),
        ("Gemma 3", {"layer_types": ["full_attention"] * 6}, "its sliding windows in other layers"),
        ("Qwen3-MoE", {"norm_topk_prob": False}, "does not normalize the weights of its experts"),
        ("Qwen3-MoE", {"mlp_only_layers": [0]}, "has layers without experts"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(name: str, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError) as error:
        check_architecture(gguf_models.gguf_config(name, **changed), "it")
    assert reason in str(error.value)
    assert str(error.value).endswith("so it would answer otherwise there; nothing was written")


@pytest.mark.parametrize(("kind", "adds_space"), [("prepended", True), ("replaced", False), ("metaspace", False)])
def test_sentencepieces_tokens_have_scores_types_and_spaces(kind: Any, adds_space: bool) -> None:
    words = gguf_models.sentencepiece(kind)
    made = convert_tokenizer(words, len(words) + 2, "it")
    assert (made.merges, made.adds_space, made.pre_tokenizer, made.unk) == (
        [],
        adds_space,
        "default",
        words.unk_token_id,
    )
    assert made.scores is not None
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    merged = [made.tokens.index("".join(merge)) for merge in merges]
    scores = [made.scores[token] for token in merged]
    assert scores == sorted(scores, reverse=True)
    assert min(made.scores) < min(scores)
    kinds = [made.token_types[words.convert_tokens_to_ids(token)] for token in ("<unk>", "<s>", "<0x0A>", "▁the")]
    assert kinds == [2, 3, 6, 1]
    assert made.token_types[-1] == 5


def test_a_sentencepiece_model_is_exported_with_its_tokens(tmp_path: Path) -> None:
    words = gguf_models.sentencepiece("prepended")
    architectures.made(gguf_models.gguf_config("Mistral", vocab_size=len(words))).save_pretrained(tmp_path / "m")
    words.save_pretrained(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), "-o", str(tmp_path / "out")]) == 0
    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.add_space_prefix"]) == ("llama", True)
    assert len(fields["tokenizer.ggml.scores"]) == len(words)
    assert "tokenizer.ggml.merges" not in fields


def test_where_answers_end_with_another_token_than_texts_engines_are_told_both() -> None:
    words = tiny.tokenizer()
    end = words.convert_tokens_to_ids("<|im_end|>")
    assert (words.eos_token_id, convert_tokenizer(words, 500, "it").end_of_turn) == (end, None)
    words.eos_token = "<|endoftext|>"
    assert convert_tokenizer(words, 500, "it").end_of_turn == end
    words.chat_template = None
    assert convert_tokenizer(words, 500, "it").end_of_turn is None


def test_a_sentencepiece_that_changes_text_is_refused() -> None:
    words = gguf_models.sentencepiece("replaced")
    words.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.Lowercase()])
    with pytest.raises(ModelError, match="splits or changes text in a way that has no name in GGUF"):
        convert_tokenizer(words, len(words), "it")
