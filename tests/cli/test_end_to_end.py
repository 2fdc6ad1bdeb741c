"""Whole commands as a user types them: train, merge, chat, again, interrupted and without network, on a local hub."""

import hashlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_sandbox import DATA, HH, MODEL, Workplace, closed_port, fill
from hub import Hub
from peft import PeftModel
from tiny_run import LIBRARIES_WARN
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from wandb_records import history, wandb_records

from qlora_dpo.adapter import open_model
from qlora_dpo.cli import main

pytestmark = LIBRARIES_WARN

STEPS = ("--max-steps", "8")
SMALLER = (
    "--set",
    "train.batch_size=8",
    "--set",
    "train.num_train_epochs=2",
    "--set",
    "train.eval_steps=6",
    "--set",
    "train.logging_steps=1",
    "--set",
    "train.warmup_steps=1",
    "--set",
    "samples.max_new_tokens=8",
)
TRAIN = ("train", HH, *STEPS, *SMALLER, "--set", "train.learning_rate=1e-3")
"""hh.toml in 8 steps: 48 pairs make 6 steps of 8 an epoch. The rate is high enough for a random model to move."""

SECRET = "hf_FakeFakeFakeFakeFake"

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "audit.json",
    "chat_template.jinja",
    "manifest.json",
    "metrics.jsonl",
    "recipe.toml",
    "report.html",
    "resolved.toml",
    "results.json",
    "run.json",
    "samples.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
}

TRL_NAMES = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
}
OF_A_STEP = {"learning_rate", "grad_norm", "num_tokens", "pairs_per_second", "tokens_per_second", "memory_bytes"}


@dataclass(frozen=True)
class Done:
    """A finished command and the folder it wrote."""

    process: subprocess.CompletedProcess[str]
    folder: Path

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    @property
    def adapter(self) -> str:
        """The SHA-256 of the adapter's weights."""
        return hashlib.sha256((self.folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    root = tmp_path_factory.mktemp("hub")
    fill(root)
    with Hub(root) as hub:
        yield Workplace(tmp_path_factory.mktemp("work"), hub)


def finished(place: Workplace, folder: str, *arguments: str, cold: bool = False, **environment: str) -> Done:
    process = place.run(*arguments, cold=cold, **environment)
    assert process.returncode == 0, process.stderr
    return Done(process, place.folder / folder)


@pytest.fixture(scope="module")
def trained(place: Workplace) -> Done:
    return finished(place, "adapters/hh", *TRAIN, cold=True)  # as a user starts it; all others are forked


@pytest.fixture(scope="module")
def repeated(place: Workplace, trained: Done) -> Done:
    """`train` on the resolved.toml that the first run wrote, tracked by wandb."""
    resolved = "adapters/hh/resolved.toml"
    return finished(
        place,
        "adapters/again",
        *("train", resolved, "-o", "adapters/again", "--set", "track.wandb=tests"),
        WANDB_MODE="offline",
        HF_TOKEN=SECRET,
    )


@pytest.fixture(scope="module")
def faster(place: Workplace, trained: Done) -> Done:
    """Another learning rate in another folder, everything pinned, and the hub away."""
    commits = {
        key: place.hub.commit(kind, name)
        for key, kind, name in (("model", "models", MODEL), ("data", "datasets", DATA))
    }
    pinned = [word for key, commit in commits.items() for word in ("--set", f"{key}.revision={commit}")]
    rate = ("--set", "train.learning_rate=2e-3", "-o", "adapters/faster")
    return finished(place, "adapters/faster", *TRAIN, *pinned, *rate, HF_ENDPOINT=closed_port())


@pytest.fixture(scope="module")
def merged(place: Workplace, trained: Done) -> Done:
    return finished(place, "merged/hh", "merge", "adapters/hh")


def test_train_writes_the_adapter_directory(trained: Done) -> None:
    assert {each.name for each in trained.folder.iterdir() if each.name not in ("checkpoints", "plots")} == FILES
    assert (trained.folder / "recipe.toml").read_bytes() == Path(HH).read_bytes()
    config = trained.json("adapter_config.json")
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", MODEL)


def test_train_prints_its_result_and_nothing_else_on_stdout(trained: Done) -> None:
    out = trained.process.stdout
    assert out.splitlines()[0].strip() == "Held-out pairs: 12"
    assert out.rstrip().splitlines()[-2:] == [
        "qlora-dpo chat adapters/hh    # talk to it",
        "qlora-dpo merge adapters/hh   # write the full model",
    ]
    assert [word for word in ("pairs/s", "recipe  ", "reference", "rows read", "\x1b") if word in out] == []


def test_train_tells_its_plan_the_data_and_every_step_on_stderr(trained: Done, place: Workplace) -> None:
    told = trained.process.stderr
    assert f"base        {MODEL}: 4-bit NF4 with double quantization\n" in told
    assert f"{DATA}, split train: HH prompts" in told
    assert "reference: 60 pairs computed, 0 from the cache\n" in told
    assert [int(step) for step in re.findall(r"^step (\d)/8  loss", told, re.MULTILINE)] == list(range(1, 9))
    assert [int(step) for step in re.findall(r"^step (\d)/8  held-out loss", told, re.MULTILINE)] == [0, 6, 8]
    assert [word for word in ("Traceback", "Warning", "warning", "\x1b", str(place.folder)) if word in told] == []


def test_metrics_have_trls_names_for_every_step_and_evaluation(trained: Done) -> None:
    records = trained.lines("metrics.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    evals = [record for record in records if record["kind"] == "eval"]
    assert [record["step"] for record in steps] == list(range(1, 9))
    assert [record["step"] for record in evals] == [0, 6, 8]
    for record in steps:
        assert record.keys() >= TRL_NAMES | OF_A_STEP
    for record in evals:
        assert record.keys() >= {f"eval_{name}" for name in TRL_NAMES} | {"eval_pairs", "eval_ties"}
    assert steps[5]["epoch"] == 1.0


def test_the_loss_is_ln_2_and_margins_are_0_before_the_first_step(trained: Done) -> None:
    first = trained.lines("metrics.jsonl")[0]
    assert first["eval_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert (first["step"], first["eval_rewards/margins"], first["eval_ties"]) == (0, 0, 12)
    step = trained.lines("metrics.jsonl")[1]
    assert step["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert step["rewards/margins"] == pytest.approx(0, abs=1e-4)


def test_results_say_what_the_evaluations_found(trained: Done) -> None:
    results = trained.json("results.json")
    evals = [record for record in trained.lines("metrics.jsonl") if record["kind"] == "eval"]
    assert results["evals"] == [{key: value for key, value in record.items() if key != "kind"} for record in evals]
    lowest = min(evals, key=lambda record: record["eval_loss"])
    assert [results[name] for name in ("first", "best", "last")] == [0, lowest["step"], 8]
    assert results["pairs"] == {"train": 48, "eval": 12}
    assert results["baselines"]["longer"] + results["baselines"]["shorter"] == pytest.approx(1)
    assert lowest["eval_loss"] < 0.69


def test_run_json_says_how_the_run_came_to_be(trained: Done, place: Workplace) -> None:
    run = trained.json("run.json")
    assert (run["name"], run["status"], run["steps"], run["seed"]) == ("hh", "finished", 8, 42)
    assert run["base"]["hub_id"] == MODEL
    assert run["base"]["revision"] == place.hub.commit("models", MODEL)
    assert (run["base"]["quantization"], run["base"]["double_quant"]) == ("nf4", True)
    assert (run["data"]["train"], run["data"]["train_pairs"], run["data"]["eval_pairs"]) == (DATA, 48, 12)
    assert run["reference_pairs_computed"] == 60
    assert run["command"].startswith("qlora-dpo train ")
    assert run["device"]["dtype_reason"] and run["peak_bytes"] > 0
    assert run["seconds"]["total"] == pytest.approx(sum(run["seconds"].values()) - run["seconds"]["total"], abs=0.1)


def test_samples_hold_the_answers_of_base_and_tuned_to_held_out_prompts(trained: Done) -> None:
    samples = trained.lines("samples.jsonl")
    assert len(samples) == 3
    assert all(0 < sample[f"{who}_tokens"] <= 8 for sample in samples for who in ("base", "tuned"))
    assert all(sample["prompt"][-1]["role"] == "user" for sample in samples)


def test_the_card_has_the_table_of_epochs_and_no_path_of_this_machine(trained: Done, place: Workplace) -> None:
    card = (trained.folder / "README.md").read_text(encoding="utf-8")
    table = card.partition("## By epoch")[2].partition("## Samples")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2  # the head, and the evaluations after 1 epoch and at the end
    for column in (
        "Training Loss",
        "Validation Loss",
        "Rewards/accuracies",
        "Rewards/margins",
        "Logps/chosen",
        "Logits/chosen",
    ):
        assert column in rows[0]
    assert str(place.folder) not in card and str(Path(HH).parent) not in card and str(Path.home()) not in card
    assert f"base_model: {MODEL}" in card


def test_the_table_of_epochs_is_what_metrics_jsonl_says_step_by_step(trained: Done) -> None:
    card = (trained.folder / "README.md").read_text(encoding="utf-8")
    lines = [line for line in card.partition("## By epoch")[2].splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    records, loss_of, before = trained.lines("metrics.jsonl"), dict[int, float](), 0
    for record in (each for each in records if each["kind"] == "train"):
        loss_of |= dict.fromkeys(
            range(before + 1, record["step"] + 1), record["loss"]
        )  # a line is a mean since the last
        before = record["step"]
    evals = {record["step"]: record for record in records if record["kind"] == "eval"}
    names = {"Validation Loss": "eval_loss"} | {
        name: f"eval_{name[0].lower()}{name[1:]}" for name in head if "/" in name
    }
    assert len(names) >= 6
    for row, steps, epoch in zip(rows, (range(1, 7), range(7, 9)), ("1", "1.333"), strict=True):
        cells = dict(zip(head, row, strict=True))
        assert cells["Epoch"] == epoch
        assert float(cells["Training Loss"]) == pytest.approx(sum(loss_of[s] for s in steps) / len(steps), abs=6e-5)
        for name, key in names.items():
            figures = cells[name].replace("\\", "").removeprefix("+")
            assert float(figures) == pytest.approx(evals[steps[-1]][key], rel=6e-3, abs=6e-4), name


def test_another_learning_rate_asks_the_reference_nothing_and_needs_no_hub(trained: Done, faster: Done) -> None:
    run = faster.json("run.json")
    assert run["reference_pairs_computed"] == 0
    assert "reference: 0 pairs computed, 60 from the cache\n" in faster.process.stderr
    assert run["seconds"]["fetch"] + run["seconds"]["encode"] < 15
    assert faster.adapter != trained.adapter
    assert run["base"]["fingerprint"] == trained.json("run.json")["base"]["fingerprint"]


def test_train_on_resolved_toml_repeats_the_run(trained: Done, repeated: Done) -> None:
    assert repeated.adapter == trained.adapter
    named = {"eval_loss", "loss", "rewards/margins", "grad_norm"}
    losses = [
        [{name: record[name] for name in named & record.keys()} for record in run.lines("metrics.jsonl")]
        for run in (trained, repeated)
    ]
    assert losses[0] == losses[1]


def test_wandb_holds_the_names_of_metrics_jsonl_and_the_recipe_and_no_secret(repeated: Done) -> None:
    (file,) = (repeated.folder / "wandb").glob("offline-run-*/run-*.wandb")
    records = wandb_records(file)
    expected: dict[int, set[str]] = {}
    for each in repeated.lines("metrics.jsonl"):
        names = each.keys() - {"kind", "step"}
        if each["kind"] == "eval":
            names = names - {"seconds"} | {"eval_seconds"}
        expected.setdefault(each["step"], set()).update(names)
    assert {step: set(row) for step, row in history(records).items()} == expected
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.display_name) == ("tests", "again")
    assert (config["model"]["name"], config["train"]["batch_size"]) == (MODEL, 8)
    assert [
        each for each in repeated.folder.rglob("*") if each.is_file() and SECRET.encode() in each.read_bytes()
    ] == []


def test_an_interrupted_run_resumes_to_the_same_bytes(place: Workplace, trained: Done) -> None:
    folder = place.folder / "adapters" / "stopped"
    process = place.start(*TRAIN, "-o", "adapters/stopped")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/8"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    stopped = re.fullmatch(
        r"qlora-dpo: stopped (?:after|within) step \d[^;]*; adapters/stopped/checkpoints/step-00000(\d) is saved, "
        "--resume goes on from there",
        err.splitlines()[-1],
    )
    assert stopped is not None, err
    assert not (folder / "adapter_model.safetensors").exists()

    resolved = (folder / "resolved.toml").read_bytes()
    again = (*TRAIN, "-o", "adapters/stopped", "--resume")
    changed = place.run(*again, "--set", "train.learning_rate=5e-4")
    assert (changed.returncode, changed.stderr.splitlines()[-1]) == (
        1,
        f"qlora-dpo: adapters/stopped/checkpoints/step-00000{stopped[1]}: belongs to another run; changed since: "
        "train.learning_rate was 0.001, is 0.0005; put it back, or go on with --allow train.learning_rate",
    )
    assert (folder / "resolved.toml").read_bytes() == resolved

    resumed = finished(place, "adapters/stopped", *again)
    assert resumed.adapter == trained.adapter
    records = resumed.lines("metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 9))
    assert [record["step"] for record in resumed.json("results.json")["evals"]] == [0, 6, 8]


def test_merge_writes_a_model_that_agrees_with_the_adapter(merged: Done) -> None:
    names = {each.name for each in merged.folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "README.md"} <= names
    assert any(name.endswith(".safetensors") for name in names)
    assert merged.process.stdout.startswith("merged/hh: ")
    assert merged.process.stdout.rstrip().endswith("qlora-dpo chat merged/hh   # talk to it")
    kl = re.search(r"nats per token +(\S+)", merged.process.stdout)
    agreement = re.search(r"top-1 agreement +(\S+)", merged.process.stdout)
    assert kl and float(kl[1]) <= 0.001
    assert agreement and float(agreement[1]) > 0.95  # a random model's two likeliest tokens are often close


def asked(place: Workplace, *arguments: str) -> str:
    """What chat answers, greedily, to the second held-out prompt of the run."""
    question = "What can I see near the school?"
    process = place.run("chat", *arguments, "--max-new-tokens", "8", "--temperature", "0", stdin=f"{question}\n")
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


def test_chat_answers_a_pipe_as_the_samples_of_the_run_say(place: Workplace, trained: Done) -> None:
    samples = {each["prompt"][-1]["content"]: each for each in trained.lines("samples.jsonl")}
    before = len(place.hub.log)
    assert asked(place, "adapters/hh") == f"{samples['What can I see near the school?']['tuned']}\n"
    assert place.hub.log[before:] == []  # the base is opened at the commit it was trained on, which is in the cache


def test_chat_answers_from_a_merged_folder(place: Workplace, merged: Done) -> None:
    assert asked(place, "merged/hh").strip() != ""


def test_chat_answers_from_a_hub_name(place: Workplace) -> None:
    assert asked(place, MODEL).strip() != ""


def test_peft_and_transformers_load_what_is_written_and_their_logits_are_ours(
    place: Workplace, trained: Done, merged: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(place.folder / "hf" / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
    config = trained.json("adapter_config.json")
    name, commit = config["base_model_name_or_path"], config["revision"]
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        name, revision=commit, cache_dir=cache, quantization_config=nf4, dtype=torch.float32
    )
    # in training mode bitsandbytes leaves the weights as they are, and without dropout it computes the same
    peft = PeftModel.from_pretrained(base, trained.folder).train()
    full = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    ours, ours_merged = (open_model(str(each.folder), "fp32").model for each in (trained, merged))

    chat = [{"role": "user", "content": "How do I find the mill?"}]
    ids = AutoTokenizer.from_pretrained(merged.folder).apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        tuned, written = ours(**ids).logits, ours_merged(**ids).logits
        assert torch.equal(peft(**ids).logits, tuned)
        assert torch.equal(full(**ids).logits, written)
        with peft.disable_adapter():
            moved = float((peft(**ids).logits - tuned).abs().max())
    assert float((written - tuned).abs().max()) < 0.2 * moved


HEAVY = ("transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "wandb")


def test_a_dry_run_prints_the_plan_loads_no_library_and_writes_nothing(place: Workplace, tmp_path: Path) -> None:
    code = (
        "import sys; from qlora_dpo.cli import main; code = main(sys.argv[1:]);"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    asked = len(place.hub.log)
    done = subprocess.run(
        [sys.executable, "-c", code, "train", HH, "--dry-run", "--max-steps", "3"],
        cwd=tmp_path,
        env=place.environment(HF_HOME=str(tmp_path / "hf"), QLORA_DPO_CACHE=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    told = done.stdout.splitlines()
    assert told[:2] == [f"recipe      {HH}", f"base        {MODEL}: 4-bit NF4 with double quantization"]
    assert told[-1] == "output      adapters/hh"
    assert (list(tmp_path.iterdir()), len(place.hub.log)) == ([], asked)


def test_a_dry_run_on_a_t4_plans_fp16_with_a_grad_scaler_and_no_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # what torch says of a T4, too
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=15 * 2**30))
    assert main(["train", HH, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:6] == [
        f"base        {MODEL}: 4-bit NF4 with double quantization",
        "device      Tesla T4 (cuda, 15 GiB)",
        "compute     fp16 + GradScaler: capability (7, 5) is below (8, 0), where bf16 is only emulated",
        "adapter     float32 weights, gradients and optimizer state; float32 loss and log-softmax",
        "attention   batched: SDPA over padded spans, since flash attention needs capability (8, 0); Triton not used",
    ]
