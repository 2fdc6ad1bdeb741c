"""Writes a GGUF file tensor by tensor, and verifies it: every token and every value is read back and compared."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from qlora_dpo.deploy.gguf_families import GGUF_FAMILIES, head_dim_of, rope_of, rotary_dim
from qlora_dpo.deploy.gguf_tensors import GgufTensor, Quant, plan_tensors, quantize_values, tensor_values
from qlora_dpo.deploy.gguf_tokenizer import GgufTokenizer
from qlora_dpo.errors import ModelError

FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}

MAX_QUANT_ERROR: dict[Quant, float] = {
    "f16": 1e-3,
    "bf16": 4e-3,
    "q8_0": 0.02,
    "q5_1": 0.08,
    "q5_0": 0.08,
    "q4_1": 0.16,
    "q4_0": 0.16,
}
"""Largest relative L2 error of a tensor that rounding explains: twice that of normally distributed weights."""


def check_architecture(config: Any, name: str) -> None:
    """Raise ModelError for a model that cannot be exported as GGUF."""
    if config.model_type not in GGUF_FAMILIES:
        known = ", ".join(GGUF_FAMILIES)
        raise ModelError(f"{name}: is of the kind {config.model_type}; {known} can be exported as GGUF")
    family, rope = GGUF_FAMILIES[config.model_type], rope_of(config)["rope_type"]
    if rope not in family.rope_types:
        raise ModelError(f'{name}: scales its rotary positions by "{rope}", which is not exported')
    if obstacle := family.obstacle(config):
        raise ModelError(f"{name}: {obstacle}, so it would answer otherwise there; nothing was written")


def write_gguf(
    file: Path, folder: Path, config: Any, tokenizer: GgufTokenizer, quant: Quant, name: str
) -> list[GgufTensor]:
    """Write the model in `folder` as one GGUF file, with one tensor at a time in memory."""
    planned = plan_tensors(folder, config, quant, name)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[GGUF_FAMILIES[config.model_type].architecture])
    _write_metadata(writer, config, quant, name)
    _write_tokenizer(writer, tokenizer)
    for tensor in planned:
        # The writer computes the bytes of a row from the NumPy type
        writer.add_tensor_info(
            tensor.name, _stored_shape(tensor), np.dtype(_numpy_type(tensor)), tensor.bytes, raw_dtype=tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in planned:
        writer.write_tensor_data(quantize_values(tensor, tensor_values(tensor, config)))
    writer.close()
    return planned


def verify_gguf(file: Path, planned: list[GgufTensor], config: Any, tokenizer: GgufTokenizer, quant: Quant) -> float:
    """The largest relative error of a tensor in `file`; raises ModelError if the file differs from what was written."""
    reader = gguf.GGUFReader(file)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    merges_field = reader.get_field("tokenizer.ggml.merges")
    merges = merges_field.contents() if merges_field else []
    template = reader.get_field("tokenizer.chat_template")
    same_vocabulary = tokens == tokenizer.tokens and merges == tokenizer.merges
    if not same_vocabulary or (template and template.contents()) != tokenizer.template:
        raise ModelError(f"{file.name}: its tokenizer reads back otherwise than it was written; nothing was kept")
    written = {tensor.name: tensor for tensor in reader.tensors}
    if written.keys() != {tensor.name for tensor in planned}:
        raise ModelError(f"{file.name}: has other tensors than were written; nothing was kept")
    worst = 0.0
    for tensor in planned:
        values = tensor_values(tensor, config)
        read_back = dequantize(written[tensor.name].data, tensor.type).reshape(values.shape)
        error = float(np.linalg.norm(read_back - values) / (np.linalg.norm(values) or 1.0))
        if not error <= MAX_QUANT_ERROR[quant]:
            raise ModelError(
                f"{file.name}: {tensor.hf_name} reads back with an error of {error:.2g}, at most "
                f"{MAX_QUANT_ERROR[quant]} is {quant}'s rounding; nothing was kept"
            )
        worst = max(worst, error)
    return worst


def _write_metadata(writer: gguf.GGUFWriter, config: Any, quant: Quant, name: str) -> None:
    rope, head_dim = rope_of(config), head_dim_of(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(rotary_dim(config))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    GGUF_FAMILIES[config.model_type].write_fields(writer, config)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: GgufTokenizer) -> None:
    # GGUF's names for SentencePiece and for byte-level BPE
    writer.add_tokenizer_model("llama" if tokenizer.scores is not None else "gpt2")
    writer.add_tokenizer_pre(tokenizer.pre_tokenizer)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.token_types)
    if tokenizer.scores is not None:
        writer.add_token_scores(tokenizer.scores)
        writer.add_add_space_prefix(tokenizer.adds_space)
    else:
        writer.add_token_merges(tokenizer.merges)
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos),
        (writer.add_eos_token_id, tokenizer.eos),
        (writer.add_pad_token_id, tokenizer.pad),
        (writer.add_unk_token_id, tokenizer.unk),
        (writer.add_eot_token_id, tokenizer.end_of_turn),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(False)  # the chat template writes it
    if tokenizer.template:
        writer.add_chat_template(tokenizer.template)


def _numpy_type(tensor: GgufTensor) -> type:
    match tensor.type:
        case gguf.GGMLQuantizationType.F32:
            return np.float32
        case gguf.GGMLQuantizationType.F16:
            return np.float16
        case _:
            return np.uint8


def _stored_shape(tensor: GgufTensor) -> tuple[int, ...]:
    """The shape in elements, or in bytes for a type that packs its elements."""
    if _numpy_type(tensor) is np.uint8:
        return tuple(gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type))
    return tensor.shape
