"""Runs whose reference is an adapter, another model or a moving copy, and runs that go on from an adapter."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_run
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from two_runs import LN_2, recipe, train, trained_lines

from qlora_dpo import adapter, run_folder
from qlora_dpo.cli import main
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.files import cache_home
from qlora_dpo.model import sources
from qlora_dpo.preference import reference
from qlora_dpo.preference.reference import model_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache, reference_cache_dir
from qlora_dpo.recipe import load_recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.training.prepare import prepare_data
from qlora_dpo.training.run import TrainingResult

pytestmark = tiny_run.LIBRARIES_WARN

SFT = {"objective": {"loss_type": "sft"}}
SOFT = {"kind": "ema", "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 1}
# in float32 what rounds differently in another row
CLOSE = {"rel": 1e-5, "abs": 1e-4}


def frozen(folder: Path) -> dict[str, Any]:
    return {"kind": "adapter", "path": str(folder)}


def mean_logps(outcome: TrainingResult, model: Any) -> tuple[float, float]:
    """Mean log-probabilities of the held-out answers by `model`, as it is."""
    logps_P2 = model_logps(model, outcome.prepared.heldout.encoded, tiny_run.PACKED, tiny_run.CPU)
    chosen, rejected = logps_P2.mean(0).tolist()
    return chosen, rejected


def reference_of(record: dict[str, Any], beta: float = 0.1) -> tuple[float, float]:
    """The reference's mean log-probabilities, as an evaluation implies them: rewards are beta times log(pi/pi_ref)."""
    chosen, rejected = (
        record[f"eval_logps/{side}"] - record[f"eval_rewards/{side}"] / beta for side in ("chosen", "rejected")
    )
    return chosen, rejected


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def sft(home: Path) -> tuple[Path, TrainingResult]:
    """An adapter after two steps of SFT."""
    return home / "sft", train(home / "sft", **SFT)


# --- an adapter as reference


@pytest.mark.parametrize(
    ("quantization", "lora"),
    [
        ("none", {}),
        ("none", {"lora_dropout": 0.2, "use_rslora": True}),
        ("nf4", {"use_dora": True}),
        pytest.param("none", {"use_dora": True}, marks=pytest.mark.slow),
        pytest.param("nf4", {}, marks=pytest.mark.slow),
        pytest.param("nf4", {"lora_dropout": 0.2, "use_rslora": True}, marks=pytest.mark.slow),
    ],
)
def test_with_the_adapter_it_goes_on_from_as_reference_the_first_loss_is_ln_2(
    quantization: str, lora: dict[str, Any], tmp_path: Path
) -> None:
    tables = {"model": {"quantization": quantization}, "lora": lora}
    first = train(tmp_path / "sft", **SFT, **tables)
    second = train(tmp_path / "dpo", **tables, reference=frozen(tmp_path / "sft"))
    start, end = second.state.evals
    assert start["eval_loss"] == pytest.approx(LN_2, abs=1e-6)
    assert (start["eval_rewards/margins"], start["eval_ties"]) == (pytest.approx(0, abs=1e-5), 4)
    if "lora_dropout" not in lora:  # which the policy has in a training step, and the reference never
        assert trained_lines(tmp_path / "dpo")[0]["loss"] == pytest.approx(LN_2, abs=1e-5)
    # it went on from what SFT ended with, and the reference stayed that
    before = mean_logps(first, first.model)
    assert (start["eval_logps/chosen"], start["eval_logps/rejected"]) == pytest.approx(before, **CLOSE)
    assert reference_of(end) == pytest.approx(before, rel=1e-4, abs=1e-2)
    assert end["eval_logps/chosen"] != pytest.approx(before[0], abs=0.05)


def test_a_frozen_adapter_that_rides_along_is_the_one_that_was_asked_before(
    sft: tuple[Path, TrainingResult], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for epochs in (1, 2):
        monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / f"cache {epochs}"))
        table = {"num_train_epochs": epochs, "max_steps": 2}
        outcome = train(home / f"{epochs}-epochs", reference=frozen(sft[0]), train=table)
        assert outcome.reference_pairs_computed == 8 + 4
        ends.append(tiny_run.adapter(outcome.model))
    assert tiny_run.all_apart(*ends) < 1e-5


def test_answers_of_an_adapter_are_found_again_by_its_content(
    sft: tuple[Path, TrainingResult], home: Path, tmp_path: Path, own_cache: Path
) -> None:
    assert train(home / "once", reference=frozen(sft[0])).reference_pairs_computed == 12
    moved = home / "moved"
    moved.mkdir()
    for file in sft[0].iterdir():
        if file.is_file() and file.name != ".lock":
            (moved / file.name).write_bytes(file.read_bytes())
    assert train(home / "twice", reference=frozen(moved), objective={"beta": 0.3}).reference_pairs_computed == 0
    assert train(home / "the-base").reference_pairs_computed == 12
    # the same shape with other numbers is another reference
    weights = load_file(moved / run_folder.ADAPTER_SAFE_WEIGHTS_NAME)
    save_file(
        {name: 2 * value for name, value in weights.items()},
        moved / run_folder.ADAPTER_SAFE_WEIGHTS_NAME,
        {"format": "pt"},
    )
    (moved / "manifest.json").unlink()
    assert train(home / "changed", reference=frozen(moved)).reference_pairs_computed == 12


def test_the_cache_of_another_adapter_is_never_taken_for_this_ones(
    sft: tuple[Path, TrainingResult], home: Path, own_cache: Path
) -> None:
    other = train(home / "other", train={"seed": 7}, **SFT)
    found = {
        reference_cache_dir(
            tiny_run.source(),
            recipe(home).model,
            tiny_run.CPU,
            adapter=run.prepared.reference_spec.init_adapter.fingerprint,
        )
        for name, folder in (("one", sft[0]), ("two", home / "other"))
        if (run := train(home / name, reference=frozen(folder))).prepared.reference_spec.init_adapter
    }
    assert len(found) == 2
    assert reference_cache_dir(tiny_run.source(), recipe(home).model, tiny_run.CPU) not in found
    assert other.prepared.reference_spec.init_adapter is None


# --- going on from an adapter with another reference


def test_going_on_from_an_adapter_leaves_the_base_as_reference(sft: tuple[Path, TrainingResult], home: Path) -> None:
    folder, first = sft
    outcome = train(home / "init", lora={"init_from": str(folder)})
    start = outcome.state.evals[0]
    heldout = outcome.prepared.heldout.encoded
    base_P2 = model_logps(tiny_run.base_model(), heldout, tiny_run.PACKED, tiny_run.CPU)
    sft_P2 = model_logps(first.model, heldout, tiny_run.PACKED, tiny_run.CPU)
    margin_P = (sft_P2 - base_P2)[:, 0] - (sft_P2 - base_P2)[:, 1]
    assert reference_of(start) == pytest.approx(tuple(base_P2.mean(0).tolist()), rel=1e-4, abs=1e-2)
    expected = torch.nn.functional.softplus(-0.1 * margin_P).mean().item()
    assert start["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - LN_2) > 1e-3


@pytest.mark.parametrize("kind", ["adapter", "ema"])
def test_trained_norms_belong_to_the_adapter_that_is_the_reference(kind: str, home: Path) -> None:
    with_norms = {"modules_to_save": ["norm"]}
    first = train(home / f"norms-{kind}", lora=with_norms, **SFT)
    table = frozen(home / f"norms-{kind}") if kind == "adapter" else SOFT
    lora = {**with_norms, "init_from": str(home / f"norms-{kind}")}
    outcome = train(home / f"on-norms-{kind}", lora=lora, reference=table)
    start, end = outcome.state.evals[0], outcome.state.evals[-1]
    assert start["eval_loss"] == pytest.approx(LN_2, abs=1e-6)
    assert reference_of(start) == pytest.approx(mean_logps(first, first.model), **CLOSE)
    assert (reference_of(end) == pytest.approx(reference_of(start), **CLOSE)) is (kind == "adapter")


def test_policy_and_reference_may_be_two_adapters(sft: tuple[Path, TrainingResult], home: Path) -> None:
    folder, first = sft
    other = train(home / "dpo-once", reference=frozen(folder))
    outcome = train(home / "dpo-again", lora={"init_from": str(home / "dpo-once")}, reference=frozen(folder))
    start = outcome.state.evals[0]
    assert (start["eval_logps/chosen"], start["eval_logps/rejected"]) == pytest.approx(
        mean_logps(other, other.model), **CLOSE
    )
    assert reference_of(start) == pytest.approx(mean_logps(first, first.model), rel=1e-4, abs=1e-2)


def test_an_adapter_may_go_on_with_a_loss_without_reference(sft: tuple[Path, TrainingResult], home: Path) -> None:
    outcome = train(home / "simpo", lora={"init_from": str(sft[0])}, objective={"loss_type": "simpo"})
    assert outcome.state.evals[0]["eval_logps/chosen"] == pytest.approx(mean_logps(sft[1], sft[1].model)[0], **CLOSE)


def test_both_engines_go_on_from_an_adapter_alike(sft: tuple[Path, TrainingResult], home: Path) -> None:
    tables = {"lora": {"init_from": str(sft[0])}, "objective": {"loss_type": "sigmoid"}}
    ours = train(home / "own-engine", **tables)
    trls = train(home / "trl-engine", **tables, train={"engine": "trl"})
    assert trls.state.evals[0]["eval_loss"] == pytest.approx(ours.state.evals[0]["eval_loss"], abs=1e-6)
    assert tiny_run.all_apart(tiny_run.adapter(trls.model), tiny_run.adapter(ours.model)) < 1e-3


def test_what_is_saved_in_the_end_stands_on_the_base_alone(sft: tuple[Path, TrainingResult], home: Path) -> None:
    outcome = train(home / "alone", reference=frozen(sft[0]))
    opened = adapter.open_adapter(home / "alone", "fp32")
    pairs = outcome.prepared.heldout.encoded
    torch.testing.assert_close(
        model_logps(opened.model, pairs, tiny_run.PADDED, tiny_run.CPU),
        model_logps(outcome.model, pairs, tiny_run.PADDED, tiny_run.CPU),
        rtol=1e-5,
        atol=1e-4,
    )
    assert opened.run is not None
    assert opened.run["reference"] == {"kind": "adapter", **opened.run["init_from"]}


# --- another model


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same family with other weights."""
    folder = tmp_path_factory.mktemp("other")
    tiny.qwen2(seed=5).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def named(folder: Path) -> dict[str, Any]:
    return {"kind": "model", "name": str(folder), "quantization": "none"}


def test_another_model_is_asked_about_all_pairs_before_the_first_step(
    other_model: Path, home: Path, own_cache: Path
) -> None:
    outcome = train(home / "beside", reference=named(other_model), train={"max_steps": 1})
    assert outcome.reference_pairs_computed == 4 + 4  # one step's pairs and the held-out ones
    outcome = train(home / "beside-again", reference=named(other_model))
    assert outcome.reference_pairs_computed == 4
    model = AutoModelForCausalLM.from_pretrained(other_model).eval()
    padded_P2 = model_logps(model, outcome.prepared.heldout.encoded, tiny_run.PADDED, tiny_run.CPU)
    for record in outcome.state.evals:
        assert reference_of(record) == pytest.approx(tuple(padded_P2.mean(0).tolist()), rel=1e-4, abs=1e-2)
    assert train(home / "from-cache", reference=named(other_model)).reference_pairs_computed == 0


def test_another_model_that_does_not_fit_goes_on_in_smaller_rows(
    other_model: Path, home: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, asked = reference.model_logps, list[int]()

    def live(*what: Any) -> torch.Tensor:
        asked.append(len(what[1]))
        if len(asked) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(*what)

    monkeypatch.setattr(reference, "model_logps", live)
    outcome = train(home / "halved", reference=named(other_model))
    assert "reference pass: out of memory with rows of 128 tokens; rows of 64 from here on\n" in capsys.readouterr().err
    assert outcome.reference_pairs_computed == 8 + 4
    model = AutoModelForCausalLM.from_pretrained(other_model).eval()
    padded_P2 = model_logps(model, outcome.prepared.heldout.encoded, tiny_run.PADDED, tiny_run.CPU)
    assert reference_of(outcome.state.evals[0]) == pytest.approx(tuple(padded_P2.mean(0).tolist()), rel=1e-4, abs=1e-2)


def test_the_base_as_another_model_is_the_base(home: Path) -> None:
    beside = train(home / "itself", reference=named(Path(tiny_run.source().name)))
    alone = train(home / "by-default")
    assert beside.state.evals[0]["eval_loss"] == pytest.approx(LN_2, abs=1e-5)
    assert tiny_run.all_apart(tiny_run.adapter(beside.model), tiny_run.adapter(alone.model)) < 1e-4


def test_a_cache_that_is_not_the_models_own_is_refused(other_model: Path, home: Path, own_cache: Path) -> None:
    prepared = prepare_data(recipe(home))
    table = ModelTable(name=str(other_model), quantization="none")
    pairs = [*prepared.train.encoded, *prepared.heldout.encoded]
    with ReferenceLogpCache(reference_cache_dir(sources.fetch_model(table), table, tiny_run.CPU)) as store:
        store.add(pairs, torch.full((len(pairs), 2), -7.0))
    with pytest.raises(ModelError) as error:
        train(home / "spoilt", reference=named(other_model))
    told = str(error.value)
    assert told.startswith("the reference gives log-probabilities of -")
    assert told.endswith(
        " nats to a few pairs, and the cache has -56.0000: it does not belong to this reference; delete "
        f"{cache_home() / 'reference'} and start again"
    )


def test_a_model_with_another_vocabulary_is_refused(home: Path, tmp_path: Path) -> None:
    tiny.qwen2(vocab_size=401).save_pretrained(tmp_path)
    words = tiny.tokenizer()
    words.add_tokens(["<|more|>"])
    words.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as error:
        prepare_data(recipe(home, reference=named(tmp_path)))
    assert str(error.value) == (
        f"reference.name = {tmp_path}: its tokenizer has another vocabulary than {tiny_run.source().name} has, so it "
        "would be asked about other texts; name a model of the same family"
    )


def test_another_chat_template_or_end_token_is_no_other_vocabulary(home: Path, tmp_path: Path) -> None:
    tiny.qwen2().save_pretrained(tmp_path)
    words = tiny.tokenizer(chat_template=None)
    words.eos_token = "<|endoftext|>"
    words.save_pretrained(tmp_path)
    assert prepare_data(recipe(home, reference=named(tmp_path))).reference_spec.reference_model is not None


# --- a copy that follows


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_copy_that_follows_starts_as_the_policy(
    goes_on: bool, sft: tuple[Path, TrainingResult], home: Path, own_cache: Path
) -> None:
    lora = {"init_from": str(sft[0])} if goes_on else {}
    outcome = train(home / f"ema-{goes_on}", lora=lora, reference=SOFT, train={"max_steps": 4, "num_train_epochs": 2})
    assert outcome.state.evals[0]["eval_loss"] == pytest.approx(LN_2, abs=1e-6)
    losses = tiny_run.column(trained_lines(home / f"ema-{goes_on}"), "loss")
    assert losses[0] == pytest.approx(LN_2, abs=1e-5)
    assert losses[1] != pytest.approx(LN_2, abs=1e-5)
    assert outcome.reference_pairs_computed == 0
    assert not (own_cache / "reference").exists()


def test_after_a_hard_update_every_log_ratio_is_0_again(home: Path) -> None:
    hard = {"kind": "ema", "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    outcome = train(
        home / "hard",
        reference=hard,
        train={"max_steps": 4, "num_train_epochs": 2, "eval_steps": 1, "lr_scheduler_type": "constant"},
    )
    losses = tiny_run.column(trained_lines(home / "hard"), "loss")
    at_ln_2 = [math.isclose(loss, LN_2, abs_tol=1e-5) for loss in losses]
    assert at_ln_2 == [True, False, True, False]
    assert [math.isclose(each["eval_loss"], LN_2, abs_tol=1e-5) for each in outcome.state.evals] == [
        *(True, False, True, False, True),
    ]


def test_a_copy_that_hardly_follows_is_the_frozen_start(home: Path) -> None:
    still = {"kind": "ema", "ref_model_mixup_alpha": 1e-9, "ref_model_sync_steps": 1}
    follows, fixed = train(home / "hardly", reference=still), train(home / "fixed")
    assert tiny_run.all_apart(tiny_run.adapter(follows.model), tiny_run.adapter(fixed.model)) < 1e-4
    assert follows.state.evals[-1]["eval_loss"] == pytest.approx(fixed.state.evals[-1]["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("loss", ["aot", "beta_dpo"])
def test_losses_over_a_whole_step_ask_a_moving_reference_however_it_is_split(loss: str, home: Path) -> None:
    ends = []
    for tokens in (60, 4096):
        table = {"micro_batch_tokens": tokens, "max_steps": 4, "num_train_epochs": 2}
        outcome = train(home / f"{loss}-{tokens}", objective={"loss_type": loss}, reference=SOFT, train=table)
        ends.append(tiny_run.adapter(outcome.model))
    assert tiny_run.all_apart(*ends) < 1e-4


def test_a_reference_that_would_never_move_is_refused(home: Path) -> None:
    with pytest.raises(RecipeError) as error:
        train(home / "never", reference={"kind": "ema"})
    assert str(error.value) == (
        "reference.ref_model_sync_steps is 512, and the run has 2 steps, so the reference would never move; write a "
        "smaller number"
    )


# --- what a run says of it


def test_run_json_and_card_name_start_and_reference(sft: tuple[Path, TrainingResult], home: Path) -> None:
    from qlora_dpo.report.card import _start_and_reference_lines
    from qlora_dpo.training.prepare import reference_metadata

    def told(**tables: Any) -> tuple[dict[str, Any], list[str]]:
        what = recipe(home, **tables)
        found = reference_metadata(what, prepare_data(what).reference_spec)
        return found, _start_and_reference_lines(found)

    plain, said = told()
    assert (plain, said) == ({"init_from": None, "reference": {"kind": "base"}}, [])
    found, said = told(reference=frozen(sft[0]))
    start = found["init_from"]
    assert start.keys() == {"name", "fingerprint"}
    assert found["reference"] == {"kind": "adapter", **start}
    assert said == ["Training went on from the adapter sft.", "The reference is the adapter sft."]
    found, said = told(reference=SOFT, lora={"init_from": str(sft[0])})
    assert found == {"init_from": start, "reference": SOFT}
    assert said == [
        "Training went on from the adapter sft.",
        "The reference is a copy of the adapter that follows it every step, by 0.6 of the way; evaluations compare "
        "with it as well.",
    ]
    found, said = told(reference=named(Path(tiny_run.source().name)))
    assert found["reference"]["fingerprint"] == tiny_run.source().fingerprint
    assert said == [f"The reference is {Path(tiny_run.source().name).name}."]
    assert told(objective={"loss_type": "simpo"})[0]["reference"] == {"kind": "none"}


def test_the_two_stages_by_command_and_the_plan_in_words(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe(empty_folder)
    Path("sft.toml").write_text(
        f'[model]\nname = "{tiny_run.source().name}"\n[lora]\nr = 4\n'
        '[data]\ntrain = "./train.jsonl"\neval = "./eval.jsonl"\n'
        '[objective]\nloss_type = "sft"\n[train]\nlearning_rate = 1e-2\nbatch_size = 4\n'
        "[samples]\nprompts = 1\nmax_new_tokens = 2\n"
    )
    dpo = ["sft.toml", "--set", "objective.loss_type=sigmoid", "--set", "reference.kind=adapter"]
    assert main(["train", *dpo, "--set", "reference.path=adapters/sft", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    path = empty_folder / "adapters" / "sft"
    assert f"target_modules all-linear, starting from {path}\n" in plan
    assert f"objective   sigmoid DPO, beta 0.1; the reference is the adapter of {path}, which stays as it is\n" in plan
    assert main(["train", "sft.toml"]) == 0
    assert main(["train", *dpo, "--set", "reference.path=adapters/sft", "-o", "adapters/dpo"]) == 0
    assert "step 0/2  held-out loss 0.6931  accuracy 0.500  margin +0.000  4 pairs\n" in capsys.readouterr().err
    assert main(["merge", "adapters/dpo"]) == 0
    again = load_recipe("adapters/dpo/resolved.toml").recipe
    assert (again.init_from, again.starts_as_reference) == (str(path), True)
