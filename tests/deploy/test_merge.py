"""`qlora-dpo merge`: the full model is the model that was trained, rounded once, and nothing is left behind if not."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from saved_adapters import save_adapter, save_base, save_both
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from qlora_dpo.adapter import OpenedModel, open_model
from qlora_dpo.cli import main
from qlora_dpo.deploy import merge as merging
from qlora_dpo.deploy import shards
from qlora_dpo.deploy.merge_card import BaseWeights
from qlora_dpo.errors import ModelError, RunError
from qlora_dpo.evaluation.merge_fidelity import compare_merged, record_trained
from qlora_dpo.evaluation.merge_texts import FALLBACK_SENTENCES, load_comparison_texts
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.model.quantized import dequantized, linear4bit_layers

Q_PROJ = "model.layers.0.self_attn.q_proj"
FIGURES = {
    "kl": 0.0,
    "top1": 1.0,
    "trained_accuracy": None,
    "merged_accuracy": None,
    "why_no_accuracy": "not asked for",
    "tokens": 1,
    "measured_on": "nothing",
    "computed_in": "nothing",
}
IDS = torch.arange(3, 43)[None]


def unchecked(folder: Path) -> Mapping[str, Any]:
    return FIGURES


@pytest.fixture(autouse=True, scope="module")
def no_bars() -> None:
    """As the command line does before transformers is imported."""
    disable_progress_bar()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with an adapter trained on it in NF4, and the same in 32 bits; no test writes into these."""
    return save_both(tmp_path_factory.mktemp("made"))


def merged(
    adapter: Path, output: Path, dtype: merging.Dtype = "bf16", onto: BaseWeights = "trained"
) -> tuple[OpenedModel, Any]:
    """The opened adapter, and the merged model as plain transformers loads it, in the dtype of its config."""
    opened = merging.open_for_merge(adapter)
    merging.merge_adapter(opened, output, onto, dtype, unchecked)
    return opened, AutoModelForCausalLM.from_pretrained(output)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_in_float32_the_merged_model_has_the_adapter_models_logits(
    place: Path, tmp_path: Path, quantization: str
) -> None:
    opened, full = merged(place / quantization, tmp_path / "m", "fp32")
    with torch.no_grad():
        wanted, found = opened.model(IDS).logits, full(IDS).logits
        with adapter_disabled(opened.model):
            before = opened.model(IDS).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 0.1, "the adapter must do something for this test to mean anything"


@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 8), ("fp16", 11)])
def test_every_weight_is_the_float32_sum_rounded_once(
    place: Path, tmp_path: Path, dtype: merging.Dtype, bits: int
) -> None:
    opened, full = merged(place / "nf4", tmp_path / "m", dtype)
    saved = load_file(place / "nf4" / "adapter_model.safetensors")
    layers = linear4bit_layers(opened.model.get_base_model())
    assert len(layers) == 14
    for name, layer in layers.items():
        name = name.removesuffix(".base_layer")
        a, b = (saved[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        exact = dequantized(layer).double() + 12 / 4 * (b.double() @ a.double())
        found = full.get_submodule(name).weight
        assert found.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        # half a unit in the last place, and a little for the float32 sum; 2^-25 is fp16's smallest step
        assert ((found.double() - exact).abs() <= exact.abs() * 2**-bits * 1.001 + 2**-25).all(), name


def test_in_bf16_it_agrees_with_the_trained_model_as_promised(place: Path, tmp_path: Path) -> None:
    opened, full = merged(place / "nf4", tmp_path / "m")
    texts = load_comparison_texts(place / "nf4", opened.recipe, opened.tokenizer)
    found = compare_merged(
        record_trained(opened.model, texts.encoded, 0, opened.device), full.float(), opened.device, 0.1
    )
    assert found.kl <= 0.001
    assert found.top1 >= 0.99


def test_peft_merges_its_own_dequantized_model_to_the_same_weights(place: Path, tmp_path: Path) -> None:
    _, full = merged(place / "nf4", tmp_path / "m", "fp32")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32, quantization_config=nf4)
    theirs = PeftModel.from_pretrained(base.dequantize(), place / "nf4").merge_and_unload()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(full.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


def test_merged_onto_the_weights_an_unquantized_run_trained_on_it_is_pefts_merge(place: Path, tmp_path: Path) -> None:
    _, full = merged(place / "none", tmp_path / "m", "fp32")
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, place / "none").merge_and_unload()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(full.get_parameter(name), parameter, atol=1e-7, rtol=1e-6)


def test_biases_embeddings_and_norms_are_the_bases_bit_for_bit_even_after_a_bf16_forward(
    place: Path, tmp_path: Path
) -> None:
    opened = merging.open_for_merge(place / "nf4")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        opened.model(IDS)
    merging.merge_adapter(opened, tmp_path / "m", "trained", "bf16", unchecked)
    before, after = stored(place / "base"), stored(tmp_path / "m")
    assert before.keys() == after.keys()
    untouched = [name for name in before if not name.endswith("proj.weight")]
    assert len(untouched) == 12, "6 biases, 5 norms and the embeddings"
    for name in untouched:
        assert torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)), name


def test_float32_norms_are_rounded_once(tmp_path: Path) -> None:
    save_base(tmp_path / "base", dtype=torch.float32)
    save_adapter(tmp_path / "a", tmp_path / "base")
    merged(tmp_path / "a", tmp_path / "m")
    before, after = stored(tmp_path / "base"), stored(tmp_path / "m")
    for name in (each for each in before if not each.endswith("proj.weight")):
        assert torch.equal(before[name].bfloat16(), after[name]), name


def test_tied_embeddings_stay_tied_without_a_second_copy(place: Path, tmp_path: Path) -> None:
    _, full = merged(place / "nf4", tmp_path / "m")
    assert "lm_head.weight" not in stored(tmp_path / "m")
    assert full.lm_head.weight is full.model.embed_tokens.weight


def test_an_untied_model_keeps_head_and_embeddings(tmp_path: Path) -> None:
    save_base(tmp_path / "base", tied=False)
    save_adapter(tmp_path / "a", tmp_path / "base")
    merged(tmp_path / "a", tmp_path / "m")
    before, after = stored(tmp_path / "base"), stored(tmp_path / "m")
    assert not torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(before[name], after[name])


def test_layers_without_adapter_are_merged_as_they_were_trained_on(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "a", tmp_path / "base", target_modules=["q_proj"])
    opened, full = merged(tmp_path / "a", tmp_path / "m", "fp32")
    with torch.no_grad():
        torch.testing.assert_close(full(IDS).logits, opened.model(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_config_and_card_describe_a_dense_model_and_name_no_folder_of_this_machine(
    place: Path, tmp_path: Path, dtype: merging.Dtype, name: str
) -> None:
    _, full = merged(place / "nf4", tmp_path / "m", dtype)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == name
    assert full.dtype == getattr(torch, name)
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in full.modules())
    assert not {"quantization_config", "_name_or_path"} & config.keys()
    for file in (tmp_path / "m").iterdir():
        if file.suffix != ".safetensors":
            text = file.read_text()
            assert str(place) not in text and str(tmp_path) not in text, file.name


def test_tokenizer_template_and_generation_config_come_along(place: Path, tmp_path: Path) -> None:
    merged(place / "nf4", tmp_path / "m")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "m" / name).is_file(), name
    chat = [{"role": "user", "content": "The cat"}]
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "m", place / "base"))
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)


def test_the_weights_are_sharded(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_SIZE", "100KB")
    opened = merging.open_for_merge(place / "nf4")
    result = merging.merge_adapter(opened, tmp_path / "m", "trained", "bf16", unchecked)
    assert result.shards == len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)(IDS).logits
        assert (logits - opened.model(IDS).logits).abs().max() < 0.1


def test_evaluating_and_training_before_the_merge_changes_no_bit(place: Path, tmp_path: Path) -> None:
    merged(place / "nf4", tmp_path / "plain")
    opened = merging.open_for_merge(place / "nf4")
    for name, parameter in opened.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    opened.model.train()(IDS).logits.sum().backward()
    opened.model.eval()
    with torch.no_grad():
        opened.model(IDS)
        with adapter_disabled(opened.model):
            opened.model(IDS)
    merging.merge_adapter(opened, tmp_path / "used", "trained", "bf16", unchecked)
    plain, used = stored(tmp_path / "plain"), stored(tmp_path / "used")
    assert all(torch.equal(plain[name], used[name]) for name in plain)


# --- what it costs to merge onto something else


def test_onto_original_is_the_original_plus_the_update_and_reports_the_larger_kl(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for onto in ("trained", "original"):
        assert main(["merge", str(place / "nf4"), "-o", str(tmp_path / onto), "--onto", onto]) == 0
    trained, original = (json.loads((tmp_path / onto / "merge.json").read_text()) for onto in ("trained", "original"))
    assert trained["kl"] <= 0.001
    assert original["kl"] > 100 * trained["kl"]
    assert original["top1"] < trained["top1"]
    saved, before = load_file(place / "nf4" / "adapter_model.safetensors"), stored(place / "base")
    a, b = (saved[f"base_model.model.{Q_PROJ}.lora_{side}.weight"] for side in "AB")
    wanted = before[f"{Q_PROJ}.weight"].float() + 12 / 4 * (b @ a)
    found = stored(tmp_path / "original")[f"{Q_PROJ}.weight"].float()
    torch.testing.assert_close(found, wanted, atol=0, rtol=2**-7)  # one of the two neighbours in bf16
    assert "the original weights, not the 4-bit ones it was trained on" in capsys.readouterr().out


# --- the command


def test_the_command_tells_what_it_wrote_and_how_close_it_is(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").symlink_to(place)
    assert main(["merge", "adapters/nf4", "--dtype", "fp32"]) == 0
    told = capsys.readouterr()
    record = json.loads((tmp_path / "merged/nf4/merge.json").read_text())
    accuracy, loss, perplexity = (
        f"{record[f'trained_{name}']:.{digits}f} / {record[f'merged_{name}']:.{digits}f}"
        for name, digits in (("accuracy", 3), ("loss", 4), ("perplexity", 3))
    )
    assert told.out == (
        f"merged/nf4: {record['bytes'] / 1e6:.1f} MB of fp32 weights in 1 file\n"
        "The update is added to the dequantized 4-bit weights it was trained on, in float32, and rounded once.\n"
        "\n"
        f"Compared with the adapter model on 12 held-out pairs of the run ({record['tokens']} answer tokens),\n"
        "both models computed in fp32 on CPU, so that only the weights differ:\n"
        f"  KL(trained, merged), nats per token              {record['kl']:.2g}\n"
        f"  KL(trained, base), nats per token                {record['base_kl']:.2g}\n"
        "  top-1 agreement                                  1.0000\n"
        "  held-out chats, rendered by transformers         12 of 12 have the trained tokens\n"
        f"  preference accuracy, trained / merged            {accuracy}\n"
        f"  DPO loss at beta 0.1, trained / merged           {loss}\n"
        f"  perplexity of chosen answers, trained / merged   {perplexity}\n"
        "\n"
        "qlora-dpo chat merged/nf4   # talk to it\n"
    )
    head, memory, disk, tail = told.err.splitlines()
    assert (head, tail) == ("merging adapters/nf4 into merged/nf4", "comparing on 12 held-out pairs of the run")
    assert memory.startswith("memory: the model as trained has 0.2 MB; writing takes at most 0.4 MB more ")
    assert disk == "disk: 0.4 MB"
    assert record["trained_accuracy"] == record["merged_accuracy"]
    assert record["bytes"] == (tmp_path / "merged/nf4/model.safetensors").stat().st_size
    assert record["kl"] < 1e-8
    assert "KL(trained, merged)" in (tmp_path / "merged/nf4/README.md").read_text()
    assert open_model("merged/nf4").folder == Path("merged/nf4")


def test_the_newest_adapter_is_merged_by_default(
    place: Path, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge"]) == 1
    assert capsys.readouterr().err == (
        "qlora-dpo: adapters: holds no adapter; train one first: qlora-dpo train recipes/quickstart.toml\n"
    )
    (empty_folder / "adapters").symlink_to(place)
    (place / "none" / "adapter_config.json").touch()
    assert main(["merge"]) == 0
    assert (empty_folder / "merged" / "none" / "config.json").is_file()


def test_it_never_overwrites(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        target = tmp_path / name
        assert main(["merge", str(place / "nf4"), "-o", str(target)]) == 1
        assert capsys.readouterr().err == (
            f"qlora-dpo: {target}: is there already and is not overwritten; name another folder with -o DIR\n"
        )
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "full", "note.txt"]
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "note.txt").read_text() == "mine"


def test_an_empty_folder_may_be_filled(place: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    merged(place / "nf4", tmp_path / "m")
    assert (tmp_path / "m" / "config.json").is_file()


# --- nothing is left behind


def test_if_the_check_raises_nothing_is_left(place: Path, tmp_path: Path) -> None:
    def refuses(folder: Path) -> Mapping[str, Any]:
        assert (folder / "model.safetensors").is_file()
        raise RunError("no")

    with pytest.raises(RunError, match=r"^no$"):
        merging.merge_adapter(merging.open_for_merge(place / "nf4"), tmp_path / "m", "trained", "bf16", refuses)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kl", "sentence"),
    [
        (0.2, "the merged model is not the trained one: KL 0.2 nats per token, at most 0.005 is rounding; "),
        (math.nan, "the merged model gives no finite log-probabilities in bf16; "),
    ],
)
def test_a_model_that_is_not_the_trained_one_is_not_kept(place: Path, tmp_path: Path, kl: float, sentence: str) -> None:
    with pytest.raises(ModelError) as raised:
        merging.merge_adapter(
            merging.open_for_merge(place / "nf4"), tmp_path / "m", "trained", "bf16", lambda _: {**FIGURES, "kl": kl}
        )
    assert str(raised.value) == f"{sentence}nothing was kept"
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    save_adapter(tmp_path / "a", tmp_path / "base")
    with pytest.raises(ModelError) as raised:
        merged(tmp_path / "a", tmp_path / "m", "fp16")
    assert str(raised.value) == (
        "model.norm.weight has values that torch.float16 cannot hold or that are not finite; try --dtype bf16"
    )
    assert not (tmp_path / "m").exists()


def test_a_foreign_adapter_with_rank_patterns_is_merged_as_peft_merges_it(own: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(own.parent / "base", dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 16},
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    theirs = get_peft_model(base, config)
    theirs.save_pretrained(own.parent / "foreign")
    opened, full = merged(own.parent / "foreign", own.parent / "m", "fp32")
    assert opened.recipe is None
    for name, parameter in theirs.merge_and_unload().named_parameters():
        torch.testing.assert_close(full.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


# --- the figures


def test_a_model_agrees_with_itself_and_its_kl_is_zero(place: Path) -> None:
    opened = merging.open_for_merge(place / "nf4")
    pairs = load_comparison_texts(place / "nf4", opened.recipe, opened.tokenizer).encoded
    found = compare_merged(record_trained(opened.model, pairs, 0, opened.device), opened.model, opened.device, 0.1)
    assert (found.kl, found.top1, found.pairs) == (0.0, 1.0, 12)
    assert found.trained_accuracy == found.merged_accuracy
    assert found.tokens == sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)


def test_the_figures_are_those_of_the_full_logits_one_sequence_at_a_time(place: Path) -> None:
    opened = merging.open_for_merge(place / "nf4")
    other = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32).eval()
    pairs = load_comparison_texts(place / "nf4", opened.recipe, opened.tokenizer).encoded
    kl, same, right, tokens = 0.0, 0, {"trained": 0, "merged": 0}, 0
    with torch.no_grad():
        for pair in pairs:
            logps: dict[str, list[float]] = {"trained": [], "merged": [], "reference": []}
            for answer in (pair.chosen, pair.rejected):
                ids = torch.tensor([pair.prompt + answer])
                rows = slice(len(pair.prompt) - 1, -1)
                by_model = {"trained": opened.model(ids).logits, "merged": other(ids).logits}
                with adapter_disabled(opened.model):
                    by_model["reference"] = opened.model(ids).logits
                logp = {name: logits[0, rows].double().log_softmax(-1) for name, logits in by_model.items()}
                for name, values in logp.items():
                    logps[name].append(values[range(len(answer)), answer].sum().item())
                kl += (logp["trained"].exp() * (logp["trained"] - logp["merged"])).sum().item()
                same += int((logp["trained"].argmax(-1) == logp["merged"].argmax(-1)).sum())
                tokens += len(answer)
            for name in right:
                reward = [logps[name][side] - logps["reference"][side] for side in (0, 1)]
                right[name] += reward[0] > reward[1]
    found = compare_merged(record_trained(opened.model, pairs, 0, opened.device), other, opened.device, 0.1)
    assert found.kl == pytest.approx(kl / tokens, rel=1e-4)
    assert found.top1 == same / tokens
    assert found.trained_accuracy == right["trained"] / 12
    assert found.merged_accuracy == right["merged"] / 12


def test_an_untrained_adapter_has_an_accuracy_of_one_half_as_all_pairs_tie(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_adapter(tmp_path / "a", tmp_path / "base", size=0.0)
    opened = merging.open_for_merge(tmp_path / "a")
    pairs = load_comparison_texts(tmp_path / "a", opened.recipe, opened.tokenizer).encoded
    assert (
        compare_merged(
            record_trained(opened.model, pairs, 0, opened.device), opened.model, opened.device, 0.1
        ).trained_accuracy
        == 0.5
    )


def test_without_its_data_a_run_is_compared_on_its_samples_and_no_accuracy_is_claimed(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own.parent / "heldout.jsonl").unlink()
    sample = {"prompt": [{"role": "user", "content": "The cat?"}], "tuned": "On the mat.", "base": "In the garden."}
    (own / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    assert main(["merge", str(own), "-o", str(own.parent / "m")]) == 0
    record = json.loads((own.parent / "m" / "merge.json").read_text())
    assert record["measured_on"] == "1 sample prompts of the run"
    assert record["trained_accuracy"] is record["merged_accuracy"] is None
    assert record["why_no_accuracy"] == (
        "the held-out pairs cannot be read (heldout.jsonl: there is no such file; correct the path in the recipe)"
    )
    assert "preference accuracy, trained / merged   not measured: the held-out pairs" in capsys.readouterr().out
    assert str(own.parent) not in (own.parent / "m" / "README.md").read_text()


Nothing = Literal["no samples", "damaged samples"]


@pytest.mark.parametrize("nothing", ["no samples", "damaged samples"])
def test_without_anything_it_is_compared_on_built_in_sentences(own: Path, nothing: Nothing) -> None:
    if nothing == "damaged samples":
        (own / "samples.jsonl").write_text('{"prompt": ')
    texts = load_comparison_texts(own, None, AutoTokenizer.from_pretrained(own))
    assert texts.name == f"{len(FALLBACK_SENTENCES)} built-in sentences"
    assert texts.why_no_accuracy == "the adapter comes without a recipe"
    assert len(texts.encoded) == len(FALLBACK_SENTENCES)
