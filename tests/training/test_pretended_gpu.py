"""The CUDA path on a CPU: whole runs on a pretended T4 (fp16), A10 and H100 (bf16), and what they are compared with.

`pretended_gpu.py` says what is pretended, and what none of this can prove: the kernels' own constraints and rounding,
speed, fragmentation, errors that CUDA reports late, NCCL and several GPUs. For those there is `pytest -m gpu`.
"""

import functools
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import cli_sandbox
import click
import pytest
import tiny
import tiny_run
import torch
import two_runs
from accelerate.state import AcceleratorState
from pretended_gpu import PretendedGPU, pretended_gpu
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from qlora_dpo.cli import main
from qlora_dpo.data.encode import load_pairs
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.errors import EXIT_INTERRUPTED
from qlora_dpo.model import device, sources
from qlora_dpo.model.base import load_base
from qlora_dpo.model.device import Device
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import adapter_disabled, attach_lora, trainable_parameters
from qlora_dpo.model.packed import attention
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.model.tokenizer import load_tokenizer
from qlora_dpo.planning.memory_advice import assess_fit
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import LossColumns, dpo
from qlora_dpo.preference.pack import Packing, collate
from qlora_dpo.preference.reference import compute_reference_logps
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.preference.token_weights import make_token_weighting
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.data import DataTable
from qlora_dpo.recipe.model import LoraTable, ModelTable
from qlora_dpo.recipe.objective import OBJECTIVE_TABLES, loss_types
from qlora_dpo.tracking.run_log import METRICS, RunLog, read_metrics
from qlora_dpo.training import evaluate as evaluation
from qlora_dpo.training import loop, reference_pass
from qlora_dpo.training.context import PreferenceDataset, TrainContext
from qlora_dpo.training.data_order import make_data_order
from qlora_dpo.training.loop import train_loop
from qlora_dpo.training.prepare import prepare_data
from qlora_dpo.training.run import RunHooks, RunOptions, TrainingResult, train_prepared
from qlora_dpo.training.train_step import StepResult

pytestmark = tiny_run.LIBRARIES_WARN

LN_2 = 0.6931471805599453
HOUSE_RULES = Path(__file__).parents[2] / "recipes" / "house_rules"


# whole commands: train, stop and resume, and what is done with the adapter

RECIPE = """
[model]
name = "./base"
quantization = "nf4"
[lora]
r = 4
lora_dropout = 0.1
[data]
train = "train.jsonl"
eval = "eval.jsonl"
max_length = 200
[train]
max_steps = 3
batch_size = 4
learning_rate = 1e-2
logging_steps = 1
[samples]
prompts = 1
max_new_tokens = 3
"""


@dataclass(frozen=True)
class Trained:
    """A folder with a finished run in `whole`, and one in `resumed` that was stopped after its first step."""

    card: str
    home: Path
    stopped: int

    def text(self, run: str, name: str) -> str:
        return (self.home / run / name).read_text(encoding="utf-8")


def train_stop_and_resume(card: str, home: Path) -> Trained:
    """`train` on a pretended card, on its own and stopped and resumed."""
    cli_sandbox.furnish(home, RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        with pretended_gpu(card):
            assert main(["train", "tiny.toml", "-o", "whole"]) == 0
        with pretended_gpu(card):
            stopped = main(["train", "tiny.toml", "-o", "resumed", "--max-hours", "1e-9"])
        with pretended_gpu(card):
            assert main(["train", "tiny.toml", "-o", "resumed", "--resume"]) == 0
    return Trained(card, home, stopped)


def insist_on_one_adapter(trained: Trained) -> None:
    assert trained.stopped == EXIT_INTERRUPTED
    whole, resumed = (trained.home / run / "adapter_model.safetensors" for run in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()


@pytest.fixture(scope="module", params=["t4", pytest.param("a10", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_stop_and_resume(request.param, tmp_path_factory.mktemp(request.param))


def test_a_run_that_was_stopped_ends_with_the_adapter_of_one_that_was_not(trained: Trained) -> None:
    insist_on_one_adapter(trained)


@pytest.mark.slow
def test_a_run_that_was_stopped_on_an_h100_does_so_too(tmp_path: Path) -> None:
    insist_on_one_adapter(train_stop_and_resume("h100", tmp_path))


ON_A_T4 = pytest.mark.parametrize("trained", ["t4"], indirect=True)


@pytest.fixture
def on_the_card(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trained]:
    """The folder with the finished run, and the card that it was trained on."""
    monkeypatch.chdir(trained.home)
    with pretended_gpu(trained.card):
        yield trained


def test_eval_finds_what_the_run_found(on_the_card: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "whole", "--json"]) == 0
    found, (*_, last) = (
        json.loads(capsys.readouterr().out),
        json.loads(on_the_card.text("whole", "results.json"))["evals"],
    )
    assert (found["loss"], found["kl"]) == (last["eval_loss"], last["eval_kl"])
    assert found["computed_in"] == f"{'fp16' if on_the_card.card == 't4' else 'bf16'} on CUDA"


def test_compare_chat_and_serve_answer_as_the_run_did(
    on_the_card: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = json.loads(on_the_card.text("whole", "samples.jsonl"))
    assert main(["compare", "whole", "--max-new-tokens", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["prompts"][0]
    assert said["prompt"] == sample["prompt"]
    assert [each["text"] for each in said["answers"]] == [sample["base"], sample["tuned"]]

    question = sample["prompt"][-1]["content"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{question}\n".encode())))
    assert main(["chat", "whole", "--temperature", "0", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip() == sample["tuned"].strip()

    served: list[str] = []

    def ask(address: str) -> None:
        asked = {"model": "whole", "messages": sample["prompt"], "temperature": 0, "max_tokens": 3}
        request = Request(
            f"{address}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urlopen(request, timeout=60) as answer:
                served.append(json.load(answer)["choices"][0]["message"]["content"])
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(click, "launch", lambda address: threading.Thread(target=ask, args=(address,)).start())
    assert main(["serve", "whole", "--port", "0", "--open"]) == 0
    assert served == [sample["tuned"]]


def test_merge_writes_a_model_that_agrees_with_the_adapter(on_the_card: Trained) -> None:
    assert main(["merge", "whole"]) == 0
    found = json.loads(on_the_card.text("merged/whole", "merge.json"))
    assert found["pairs"] == 2
    assert found["kl"] < 1e-5


@ON_A_T4
def test_check_describes_the_card_and_says_that_the_run_fits(
    on_the_card: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cards"] == ["Tesla T4, capability (7, 5), 15.0 GiB"]
    assert {each["what"]: each["yes"] for each in told["verdicts"]} == {
        "compute": True,
        "native bf16": False,
        "4-bit": True,
        "triton": False,
        "attention": True,
    }
    assert main(["check", "tiny.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"]["name"] == "Tesla T4"


@ON_A_T4
def test_more_processes_than_cards_are_refused(on_the_card: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny.toml", "--processes", "2"]) == 2
    told = "qlora-dpo: --processes 2: each takes a GPU, and this machine has 1; name at most 1\n"
    assert capsys.readouterr().err == told


@ON_A_T4
def test_a_sweep_trains_on_one_base_in_the_card(on_the_card: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--set", "train.max_steps=1", "--set", "samples.prompts=0"]
    assert main(["sweep", "tiny.toml", "--over", "lora.r=[4,2]", *settings, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["points"]
    assert (first["state"], second["state"]) == ("finished", "finished")
    peaks = [
        max(
            line["memory_bytes"]
            for line in read_metrics(Path("adapters/tiny-sweep", each["name"], METRICS))
            if "memory_bytes" in line
        )
        for each in (first, second)
    ]
    assert peaks[1] < peaks[0]  # a smaller rank, and nothing left of the first run


# quantizations, kinds of adapters, and recomputation

KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "DoRA": {"lora": {"use_dora": True}},
    "dropout, recomputed": {"lora": {"lora_dropout": 0.2}, "train": {"gradient_checkpointing": True}},
}
ON_CARDS = [
    *(("t4", "nf4", "plain"), ("t4", "int8", "dropout, recomputed")),
    *(("a10", "nf4", "DoRA"), ("a10", "fp4", "dropout, recomputed"), ("a10", "none", "plain")),
]
"""Cases in which each card, quantization and kind stands once or more; the others are slow."""
ALSO_ON_CARDS = [("t4", "nf4", "DoRA"), ("t4", "fp4", "plain"), ("a10", "int8", "plain")]


def trained_here(folder: Path, **tables: dict[str, Any]) -> TrainingResult:
    """Train the tiny model for two steps on the device that there is."""
    folder.mkdir(parents=True, exist_ok=True)
    what = two_runs.recipe(folder, **{**tables, "model": {"dtype": "auto", **tables.get("model", {})}})
    prepared = prepare_data(what)
    with RunLog(folder, 2) as tracker:
        return train_prepared(prepared, device.select_device(what.model.dtype), tracker, RunOptions(), RunHooks(), None)


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], float]:
    """The held-out loss after two steps on a CPU in float32, by quantization and kind of adapter."""

    @functools.cache
    def loss(quantization: str, kind: str) -> float:
        table = {"quantization": quantization, "dtype": "fp32"}
        outcome = trained_here(tmp_path_factory.mktemp("cpu"), model=table, **KINDS[kind])
        return float(outcome.state.evals[-1]["eval_loss"])

    return loss


@pytest.mark.parametrize(
    ("card", "quantization", "kind"),
    [*ON_CARDS, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALSO_ON_CARDS)],
)
def test_every_kind_of_adapter_learns_on_every_kind_of_base_what_it_learns_in_float32(
    card: str, quantization: str, kind: str, tmp_path: Path, in_float32: Callable[[str, str], float]
) -> None:
    with pretended_gpu(card) as gpu:
        state = trained_here(tmp_path, model={"quantization": quantization}, **KINDS[kind]).state
    first, last = state.evals
    assert first["eval_loss"] == pytest.approx(LN_2, abs=1e-6)
    # dropout draws other numbers than on a CPU
    exactness = 2e-2 if "dropout" in kind else {"t4": 2e-4, "a10": 4e-3}[card]
    assert last["eval_loss"] == pytest.approx(in_float32(quantization, kind), rel=exactness)
    assert state.skipped_steps == 0
    assert gpu.products == {}  # one arithmetic for base, reference and policy: nothing goes through the fused kernel


def test_an_8_bit_optimizer_learns_what_adamw_learns(tmp_path: Path) -> None:
    tables = {"lora": {"r": 64}}  # smaller matrices keep their moments in 32 bits
    expected = trained_here(tmp_path / "cpu", **tables).state.evals[-1]["eval_loss"]
    with pretended_gpu("t4"):
        state = trained_here(tmp_path / "t4", train={"optim": "adamw_8bit"}, **tables).state
    assert state.evals[-1]["eval_loss"] == pytest.approx(expected, rel=1e-2)


def test_another_model_as_reference_is_gone_before_the_base_comes(tmp_path: Path) -> None:
    table = {"kind": "model", "name": tiny_run.source().name, "quantization": "none"}
    with pretended_gpu("a10") as gpu:
        whole, found = reference_pass.precompute_with_reference_model, list[int]()

        def ask_other(*arguments: Any, **keys: Any) -> Any:
            before = gpu.memory.now
            asked = whole(*arguments, **keys)
            found.append(gpu.memory.now - before)
            return asked

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qlora_dpo.training.run.precompute_with_reference_model", ask_other)
            state = trained_here(tmp_path, reference=table).state
    assert found == [0]
    assert state.evals[0]["eval_loss"] == pytest.approx(LN_2, abs=1e-6)  # it is the base itself


# losses

LOSSES = [loss for table in OBJECTIVE_TABLES for loss in loss_types(table)]
NEEDED: dict[str, dict[str, Any]] = {
    "robust": {"label_smoothing": 0.1},
    "sum": {"loss_weights": {"sigmoid": 0.8, "ipo": 0.2}},
    "dpop": {"dpop_lambda": 1.0},
}
"""Keys of a loss that have no default; and 50 nats a nat, the default of DPO-Positive, would magnify any rounding."""
STEEP = {"sppo_hard": 1e-3, "cal_dpo": 1e-3, "ipo": 1e-3}
"""Losses whose gradients overflow fp16 at the loss scale that torch begins with, at a beta at which they do."""
OBJECTIVES = {loss: {"loss_type": loss, **NEEDED.get(loss, {})} for loss in LOSSES} | {
    f"{loss} at beta {beta:g}": {"loss_type": loss, "beta": beta} for loss, beta in STEEP.items()
}


@dataclass(frozen=True)
class Steps:
    """The loss of each of two steps, and how many of them were skipped."""

    losses: list[float]
    skipped: int


def two_steps(place: Device, folder: Path) -> dict[str, Steps]:
    """Two steps with every objective, each from the same pairs, adapter and base, of which one layer is enough."""
    base = tiny_run.base_model(place=place)
    del base.model.layers[1:]
    model = attach_lora(base, LoraTable(r=4), 0)
    fuse_lora(model, place.torch_dtype)
    start, found = tiny_run.adapter(model), {}
    for name, objective in OBJECTIVES.items():
        for parameter, value in zip(trainable_parameters(model).values(), start.values(), strict=True):
            parameter.data.copy_(value)
        found[name] = fitted(model, tiny_run.recipe(objective=objective, train={"max_steps": 2}), place, folder / name)
    return found


def fitted(model: Any, what: Recipe, place: Device, folder: Path) -> Steps:
    """Train on random pairs, which have all columns that an objective may read."""
    folder.mkdir(parents=True)
    packing = Packing(128, tiny_run.PAD, place.attention, make_token_weighting(what.objective))
    generator, sides, store = torch.Generator().manual_seed(0), [], ReferenceLogpCache(folder / "reference")
    for seed, count in ((0, 8), (1, 1)):
        pairs = tiny_run.pairs(count, seed)
        scores_P2 = torch.rand(count, 2, generator=generator).sort(1, descending=True).values
        label_P = torch.arange(count) % 2 == 0 if what.objective.loss_type == "kto" else None
        columns = LossColumns(None, None, scores_P2, label_P)
        sides.append(PreferenceDataset(pairs, compute_reference_logps(model, pairs, store, packing, place), columns))
    job = TrainContext(what, place, make_data_order(8, what.train), *sides, packing, folder, store)
    with RunLog(folder, 2) as tracker, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_evaluation", lambda *some: None)  # two thirds of the time, and the same for all
        state = train_loop(model, job, tiny_run.start(job), tracker)
    lines = [line for line in read_metrics(folder / METRICS) if line["kind"] == "train"]
    return Steps(tiny_run.column(lines, "loss"), state.skipped_steps)


@pytest.fixture(scope="module")
def by_objective(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Steps], dict[str, Steps]]:
    """Two steps with every objective: in fp16 on a T4, and in float32 on a CPU."""
    AcceleratorState._reset_state(True)
    in_float32 = two_steps(tiny_run.CPU, tmp_path_factory.mktemp("cpu"))
    with pretended_gpu("t4"):
        return two_steps(device.select_device("auto"), tmp_path_factory.mktemp("t4")), in_float32


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_takes_in_fp16_the_steps_that_it_takes_in_float32(
    name: str, by_objective: tuple[dict[str, Steps], dict[str, Steps]]
) -> None:
    in_fp16, in_float32 = (each[name] for each in by_objective)
    assert in_fp16.losses == pytest.approx(in_float32.losses, rel=1e-3)
    # where a slope is that steep, the scale found in the first step may be one halving too large for the second
    assert in_fp16.skipped <= ("at beta" in name)


# exactness


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """The tiny Qwen2 with five times its weights, so that its states and logits differ as those of a trained one do."""
    folder, model = tmp_path_factory.mktemp("base"), tiny.qwen2()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return sources.fetch_model(ModelTable(name=str(folder)))


def real_pairs(source: ModelSource, count: int) -> list[EncodedPair]:
    """Pairs of recipes/house_rules, which people wrote and SmolLM2 answered."""
    table = DataTable(train=str(HOUSE_RULES / "train.jsonl"), max_length=1024, max_train_samples=count)
    return list(load_pairs(table, "train", load_tokenizer(source), 0, {}).encoded)


def figures(source: ModelSource, quantization: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of real answers under a random adapter, and the gradient of their DPO loss.

    In float32 on the CPU, on a pretended card in 16 bits, with a loss scale in fp16.
    """
    place = device.select_device("auto" if device.has_gpu() else "fp32")
    base = load_base(source, ModelTable(name=source.name, quantization=quantization), place)
    attention.enable_packed_attention(base)
    model = attach_lora(base, LoraTable(r=4), 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainable_parameters(model).items():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    fuse_lora(model, place.torch_dtype)
    batch = collate(real_pairs(source, 16), Packing(4096, tiny_run.PAD, place.attention)).to(place.torch_device)
    with adapter_disabled(model), torch.no_grad():
        reference = score_batch(model, batch, place)
    found = score_batch(model.train(), batch, place)
    margin_P = found.chosen_logp_P - found.rejected_logp_P - reference.chosen_logp_P + reference.rejected_logp_P
    scale = 2.0**12 if place.needs_grad_scaler else 1.0
    (dpo(margin_P, 0.1).mean() * scale).backward()
    logps_P2 = torch.stack([found.chosen_logp_P, found.rejected_logp_P], 1)
    return logps_P2.detach().cpu(), (tiny_run.gradients(model) / scale).cpu()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("card", "apart", "cosine"), [("t4", 1e-4, 0.9999), ("a10", 5e-3, 0.98)])
def test_16_bits_give_the_log_probabilities_and_the_gradient_of_float32(
    card: str, apart: float, cosine: float, quantization: str, source: ModelSource
) -> None:
    """Measured: 2e-5 and 0.999998 in fp16 with a float32 stream, 2e-3 and 0.994 in bf16."""
    logps_P2, slope = figures(source, quantization)
    with pretended_gpu(card):
        found_P2, found = figures(source, quantization)
    assert tiny_run.apart(found_P2, logps_P2) < apart
    assert torch.cosine_similarity(found, slope, 0) > cosine
    assert found.norm() / slope.norm() == pytest.approx(1, abs=apart * 10)


# memory


@dataclass
class Room:
    """What the calls of a function took of the GPU's memory at most, beyond what was taken before."""

    taken: int = 0


def limited(patch: pytest.MonkeyPatch, gpu: PretendedGPU, module: Any, name: str, most: int | None) -> Room:
    """Let the calls of a function have `most` bytes beyond what was taken before; None for as many as they need."""
    whole, room = getattr(module, name), Room()

    def within(*arguments: Any, **keys: Any) -> Any:
        before = gpu.memory.now
        gpu.memory.reset_peak()
        gpu.memory.ceiling = None if most is None else before + most
        try:
            return whole(*arguments, **keys)
        finally:
            gpu.memory.ceiling = None
            room.taken = max(room.taken, gpu.memory.peak - before)

    patch.setattr(module, name, within)
    return room


@pytest.mark.parametrize(
    ("module", "name", "rows", "what"),
    [
        (loop, "accumulate_gradients", 256, "step 1"),
        (evaluation, "evaluate", 256, "evaluation after step 0"),
        # whose rows are as large as the plan allows; those of a step hold one pair, be they of 16 tokens or of 8
        (reference_pass, "compute_reference_logps", 16, "reference pass"),
    ],
    ids=["step", "evaluation", "reference"],
)
def test_where_memory_ends_rows_are_halved_and_the_adapter_is_that_of_a_run_in_such_rows(
    module: Any, name: str, rows: int, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def trained(run: str, tokens: int, most: int | None = None) -> tuple[dict[str, Tensor], int]:
        monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / run / "cache"))
        with pretended_gpu("t4") as gpu, pytest.MonkeyPatch.context() as patch, tiny_run.logged_sentences(said):
            room = limited(patch, gpu, module, name, most)
            outcome = trained_here(tmp_path / run, train={"micro_batch_tokens": tokens, "num_train_epochs": 2})
            return tiny_run.adapter(outcome.model), room.taken

    (_, whole), (adapter, half) = trained("whole", rows), trained("half", rows // 2)
    assert half < 0.9 * whole
    said.clear()
    found, taken = trained("limited", rows, (whole + half) // 2)
    (told,) = (each for each in said if "out of memory" in each)
    before = re.match(rf"{what}: out of memory with rows of (\d+) tokens", told)
    assert before is not None
    tokens = int(before[1])
    assert told == f"{what}: out of memory with rows of {tokens} tokens; rows of {tokens // 2} from here on"
    assert name == "compute_reference_logps" or tokens == rows
    assert taken < whole
    assert tiny_run.all_apart(found, adapter) == 0


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A Qwen2 of four layers: as in a real one, most of what a step takes is what layers keep."""
    folder, shape = tmp_path_factory.mktemp("deep"), tiny.qwen2().config.to_dict()
    shape |= {"num_hidden_layers": 4, "layer_types": None, "hidden_size": 128, "intermediate_size": 384}
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return sources.fetch_model(ModelTable(name=str(folder)))


@pytest.mark.parametrize(
    ("card", "quantization", "train"),
    [
        ("t4", "nf4", {}),
        pytest.param("t4", "none", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("a10", "int8", {}, marks=pytest.mark.slow),
    ],
)
def test_the_planned_bytes_are_the_counted_ones(
    card: str, quantization: str, train: dict[str, Any], deep: ModelSource, tmp_path: Path
) -> None:
    """All parts but two that nothing can count here: CUDA's context, and what fragmentation takes.

    Rows hold one pair each, as long as the longest, with which the plan reckons; layouts are proved on short ones. The
    second step has what the first has left to the optimizer.
    """
    lines = (HOUSE_RULES / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [row["chosen"][0]["content"] for row in map(json.loads, lines)]
    long = {"prompt": " ".join(texts[:2]), "chosen": " ".join(texts[2:4]), "rejected": " ".join(texts[4:6])}
    short = [{"prompt": "What now?", "chosen": text[:9], "rejected": text[-9:]} for text in texts[:8]]
    for name, rows in (("train", [long, long]), ("eval", short)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pretended_gpu(card) as gpu:
        what = tiny_run.recipe(
            model={"name": deep.name, "quantization": quantization, "dtype": "auto"},
            data={"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl"), "max_length": 1024},
            train={"batch_size": 1, "max_steps": 2, **train},
        )
        prepared, here = prepare_data(what), device.select_device("auto")
        memory, _ = assess_fit(prepared, what, here)
        with RunLog(tmp_path, 2) as tracker:
            train_prepared(prepared, here, tracker, RunOptions(), RunHooks(), None)
    planned = {
        name: each for name, each in memory.bytes_by_part.items() if not name.startswith(("framework", "fragmentation"))
    }
    assert sum(planned.values()) == pytest.approx(gpu.memory.peak, rel=0.1)


# waits

WAITS_OF_A_STEP = {"t4": 3, "a10": 2}
"""How often the host waits for the GPU in one step, however many micro-batches it has; numbers that may only fall.

Once for losses and figures of all pairs, once for the norm of the gradient, and in fp16 for whether it overflows.
"""


@pytest.mark.parametrize("card", ["t4", pytest.param("a10", marks=pytest.mark.slow)])
def test_the_host_waits_for_the_gpu_a_few_times_a_step_and_in_no_micro_batch(
    card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient, take_step, micro_batches, waits = loop.accumulate_gradients, loop._take_step, list[int](), list[int]()

    def counted_gradient(model: Any, job: Any, state: Any, packing: Any, backward: Any, *others: Any) -> StepResult:
        def counted_backward(loss: Tensor) -> None:
            micro_batches.append(gpu.waits.total())
            backward(loss)

        return gradient(model, job, state, packing, counted_backward, *others)

    def counted_step(at: Any) -> tuple[float, float]:
        before = gpu.waits.total()
        micro_batches.clear()
        taken = take_step(at)
        waits.append(gpu.waits.total() - before)
        assert len(micro_batches) > 2
        assert set(micro_batches) == {before}
        return taken

    monkeypatch.setattr(loop, "accumulate_gradients", counted_gradient)
    monkeypatch.setattr(loop, "_take_step", counted_step)
    with pretended_gpu(card) as gpu:
        table = {"micro_batch_tokens": 64, "max_steps": 3, "logging_steps": 3, "num_train_epochs": 2}
        trained_here(tmp_path, model={"quantization": "nf4"}, train=table)
    assert waits == [WAITS_OF_A_STEP[card]] * 3
