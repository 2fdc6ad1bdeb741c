"""`qlora-dpo export`: a GGUF file that reads back as the model, its tokenizer and its template."""

import copy
import json
from pathlib import Path
from typing import Any, get_args

import architectures
import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf.quants import dequantize
from saved_adapters import save_adapter, save_base
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from qlora_dpo.cli import main
from qlora_dpo.deploy import export as exporting
from qlora_dpo.deploy import gguf_file
from qlora_dpo.deploy.gguf_tensors import Quant, rope_factors, rope_permuted
from qlora_dpo.deploy.gguf_tokenizer import PRE_TOKENIZER_PATTERNS, convert_tokenizer
from qlora_dpo.deploy.modelfile import CHATML, ollama_modelfile
from qlora_dpo.errors import ModelError

TEXTS = (
    "The cat sat on the mat.",
    "How do I cook 12 eggs?\n\n\tThanks!",
    "naïve café – 東京 🙂",
    "  two  spaces ",
    "it's",
)
IDS = torch.arange(3, 43)[None]
WIDTH = {"llama": 16, "qwen2": 16, "qwen3": 128}
"""Of a head; transformers does not read it from a Qwen3's GGUF file and takes 128."""
UNIT = {"f16": 2**-11, "bf16": 2**-8}
"""Half a unit in the last place, relative to the number."""


@pytest.fixture(autouse=True, scope="module")
def no_bars() -> None:
    """As the command line does before transformers is imported."""
    disable_progress_bar()


@pytest.fixture(scope="module")
def models_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small model for each architecture, with the tests' tokenizer and 14 rows too many in its embeddings."""
    home = tmp_path_factory.mktemp("models")
    for name in ("llama", "qwen2", "qwen3"):
        config = copy.deepcopy(architectures.CONFIGS[name])
        config.update({"vocab_size": len(tiny.tokenizer()) + 14, "hidden_size": 64})
        config.head_dim = WIDTH[name]
        if name == "llama":
            config.attention_bias = True
        architectures.made(config).save_pretrained(home / name)
        tiny.tokenizer().save_pretrained(home / name)
    return home


def exported(model: Path, folder: Path, *options: str) -> Path:
    assert main(["export", str(model), "-o", str(folder), *options]) == 0
    return next(folder.glob("*.gguf"))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_transformers_loads_the_file_as_the_same_model(models_made: Path, tmp_path: Path, name: str) -> None:
    file = exported(models_made / name, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(models_made / name, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers does not read the biases of a Llama's attention from a GGUF file
    skipped = ("_proj.bias",) if name == "llama" else ()
    for own, parameter in ours.named_parameters():
        if not own.endswith(skipped or ("-",)):
            torch.testing.assert_close(theirs.get_parameter(own), parameter, rtol=UNIT["f16"], atol=2**-25)
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size"):
        assert getattr(theirs.config, key) == getattr(ours.config, key), key
    assert theirs.config.rope_parameters["rope_theta"] == ours.config.rope_parameters["rope_theta"]
    assert theirs.config.rms_norm_eps == pytest.approx(ours.config.rms_norm_eps)
    if name != "llama":
        with torch.no_grad():
            torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_reads_the_same_tokenizer_and_template(models_made: Path, tmp_path: Path, name: str) -> None:
    file = exported(models_made / name, tmp_path / "out")
    ours = tiny.tokenizer()
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == ours(text).input_ids, text
    chat = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": "sat."}]
    assert theirs.apply_chat_template(chat, tokenize=False) == ours.apply_chat_template(chat, tokenize=False)
    assert theirs.chat_template == ours.chat_template
    assert theirs.eos_token == ours.eos_token


def test_the_file_says_what_llama_cpp_asks_for(models_made: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(exported(models_made / "qwen3", tmp_path / "out"))
    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    config = json.loads((models_made / "qwen3" / "config.json").read_text())
    words = tiny.tokenizer()
    kinds = found.pop("tokenizer.ggml.token_type")
    assert [kinds[number] for number in (0, words.eos_token_id, 10, len(words))] == [3, 3, 1, 5]
    assert found.pop("tokenizer.ggml.tokens")[len(words) :] == [f"[PAD{len(words) + each}]" for each in range(14)]
    assert len(found.pop("tokenizer.ggml.merges")) == 141
    assert found.pop("qwen3.attention.layer_norm_rms_epsilon") == pytest.approx(config["rms_norm_eps"])
    assert found == {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": "qwen3",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "qwen3.vocab_size": len(words) + 14,
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 64,
        "qwen3.block_count": 2,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.rope.freq_base": 10000.0,
        "qwen3.rope.dimension_count": 128,
        "qwen3.attention.key_length": 128,
        "qwen3.attention.value_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": words.eos_token_id,
        "tokenizer.ggml.padding_token_id": words.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": words.chat_template,
    }


@pytest.mark.parametrize("quant", get_args(Quant))
def test_every_type_reads_back_within_its_rounding(models_made: Path, tmp_path: Path, quant: str) -> None:
    file = exported(models_made / "qwen2", tmp_path / "out", "--quant", quant)
    model = AutoModelForCausalLM.from_pretrained(models_made / "qwen2", dtype=torch.float32)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    down = found["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == quant.upper()
    wanted = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    there = dequantize(down.data, down.tensor_type).reshape(wanted.shape)
    if quant in UNIT:
        assert (np.abs(there - wanted) <= np.abs(wanted) * UNIT[quant] + 2**-25).all()
    else:
        # a block of 32 numbers is cut into 2^bits steps over twice its largest number, or over its range
        steps = 2 ** int(quant[1])
        blocks = wanted.reshape(-1, 32)
        reach = 2 * np.abs(blocks).max(1) if quant.endswith("0") else blocks.max(1) - blocks.min(1)
        assert (np.abs(there.reshape(-1, 32) - blocks) <= (1.1 * reach / (steps - 1))[:, None]).all()
    ends = found["token_embd.weight"].tensor_type.name
    assert ends == (quant.upper() if quant in UNIT else "Q8_0")
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["error"] <= gguf_file.MAX_QUANT_ERROR[quant]  # type: ignore[index]


def test_rows_are_ordered_so_that_neighbours_turn_together() -> None:
    rows = torch.arange(8.0)[:, None]  # two heads of four rows: transformers turns 0 with 2 and 1 with 3
    assert rope_permuted(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama_3_frequencies_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    factors = torch.from_numpy(rope_factors(rope, 128))
    assert factors.unique().numel() >= 8
    torch.testing.assert_close(plain / factors, theirs, rtol=1e-5, atol=0)


# --- what is refused


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["export", *map(str, arguments)])
    return code, capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_is_refused_with_the_command_to_merge_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tmp_path / "hh", save_base(tmp_path / "base"))
    assert refusal(capsys, adapter) == (
        2,
        f"qlora-dpo: {adapter}: is an adapter, and other engines run full models; write one first: qlora-dpo merge "
        f"{adapter}, and then: qlora-dpo export merged/hh",
    )


def test_a_merged_model_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "hh", save_base(tmp_path / "base"))
    assert main(["merge", "hh"]) == 0
    assert main(["export", "merged/hh"]) == 0
    assert sorted(each.name for each in (tmp_path / "exported" / "hh-f16").iterdir()) == [
        "export.json",
        "hh-f16.gguf",
        "manifest.json",
    ]
    assert main(["export", "merged/hh"]) == 1, "nothing is overwritten"
    assert main(["verify", "exported/hh-f16"]) == 0
    file = tmp_path / "exported" / "hh-f16" / "hh-f16.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert main(["verify", "exported/hh-f16"]) == 1


def test_another_architecture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    architectures.made(architectures.CONFIGS["gemma"]).save_pretrained(tmp_path / "gemma")
    tiny.tokenizer().save_pretrained(tmp_path / "gemma")
    assert refusal(capsys, tmp_path / "gemma", "-o", tmp_path / "out") == (
        1,
        f"qlora-dpo: {tmp_path / 'gemma'}: is of the kind gemma; llama, mistral, qwen2, qwen3, "
        "qwen3_moe, smollm3, gemma3_text, phi3, granite can be exported as GGUF",
    )
    assert not (tmp_path / "out").exists()


def test_a_file_that_reads_back_otherwise_is_not_kept(
    models_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = gguf_file.quantize_values
    monkeypatch.setattr(
        gguf_file,
        "quantize_values",
        lambda tensor, values: real(tensor, -values if "ffn_up" in tensor.name else values),
    )
    code, sentence = refusal(capsys, models_made / "qwen2", "-o", tmp_path / "out")
    assert (code, sentence) == (
        1,
        "qlora-dpo: qwen2-f16.gguf: model.layers.0.mlp.up_proj.weight reads back with an error of 2, at most 0.001 is "
        "f16's rounding; nothing was kept",
    )
    assert list(tmp_path.iterdir()) == []


# --- how tokenizers split text


def splitting(pre: Any, *, normalizer: Any = None, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    state = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    words = Tokenizer(
        models.BPE(
            vocab=state["model"]["vocab"],
            merges=[tuple(each) for each in state["model"]["merges"]],
            ignore_merges=ignore_merges,
        )
    )
    words.pre_tokenizer, words.decoder = pre, decoders.ByteLevel()
    if normalizer:
        words.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=words)


def split(expression: str) -> Any:
    whole = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([whole, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def test_each_way_to_split_has_its_name_in_llama_cpp() -> None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    patterns = ((split(PRE_TOKENIZER_PATTERNS[name]), name) for name in ("qwen2", "gpt-4o"))
    for pre, name in ((plain, "gpt-2"), (digits, "smollm"), *patterns):
        assert convert_tokenizer(splitting(pre), 500, "it").pre_tokenizer == name
    for name in ("llama-bpe", "tekken"):
        whole_words = splitting(split(PRE_TOKENIZER_PATTERNS[name]), ignore_merges=True)
        assert convert_tokenizer(whole_words, 500, "it").pre_tokenizer == name


@pytest.mark.parametrize(
    "unknown",
    [
        {"pre": pre_tokenizers.Whitespace()},
        {"pre": split(r"\d+")},
        {"pre": split(PRE_TOKENIZER_PATTERNS["llama-bpe"])},
        {"pre": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre": pre_tokenizers.ByteLevel(add_prefix_space=False), "normalizer": normalizers.Lowercase()},
    ],
)
def test_a_way_to_split_without_a_name_is_refused(unknown: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as raised:
        convert_tokenizer(splitting(**unknown), 500, "it")
    assert str(raised.value) == "it: its tokenizer splits or changes text in a way that has no name in GGUF"


def test_other_kinds_of_tokenizers_are_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(
        ModelError,
        match=r"^it: its tokenizer is of the kind WordLevel; byte-level BPE and SentencePiece's BPE are written",
    ):
        convert_tokenizer(words, 500, "it")
    with pytest.raises(ModelError, match=r"^it: its tokenizer has 400 words and its embedding matrix 300 rows$"):
        convert_tokenizer(tiny.tokenizer(), 300, "it")


# --- Ollama


def test_the_modelfile_has_template_system_prompt_and_stop(models_made: Path, tmp_path: Path) -> None:
    exported(models_made / "qwen2", tmp_path / "out", "--to", "ollama")
    assert (tmp_path / "out" / "Modelfile").read_text() == (
        f'FROM ./qwen2-f16.gguf\nTEMPLATE """{CHATML}"""\nSYSTEM """You are a helpful assistant."""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )


def test_a_template_that_is_no_chatml_is_left_to_ollama() -> None:
    words = tiny.tokenizer("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    assert ollama_modelfile("x.gguf", words) == 'FROM ./x.gguf\nPARAMETER stop "<|im_end|>"\n'


def test_a_full_disk_is_named_before_anything_is_written(
    models_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_dpo.errors import SourceError
    from qlora_dpo.files import check_disk_space

    monkeypatch.setattr(exporting, "check_disk_space", lambda output, needed: check_disk_space(output, 10**18))
    with pytest.raises(SourceError, match=r"out: needs 1,000,000,000,000\.0 MB and the disk has"):
        exporting.export_model(exporting.full_model(str(models_made / "qwen2")), tmp_path / "out", "gguf", "f16")
    assert not (tmp_path / "out").exists()
