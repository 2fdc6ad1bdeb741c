"""Several processes train one run to the figures and the adapter of one process, and end together."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import distributed_scenarios
import pytest
import tiny_run
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from fork_server import ForkedPython
from hypothesis import given
from hypothesis import strategies as st
from rank_results import Together, same
from safetensors.torch import load_file

from qlora_dpo.cli import main
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.model import device
from qlora_dpo.model.distributed import deepspeed_engine, processes
from qlora_dpo.model.gpu_specs import GPU_SPECS
from qlora_dpo.recipe.shipped import accelerate_configs
from qlora_dpo.training.oom_retry import row_attempts

pytestmark = tiny_run.LIBRARIES_WARN
HERE = Path(__file__).parents[1] / "helpers"


def environment(**changed: str) -> dict[str, str]:
    """That of a process whose tests and package are these."""
    path = os.pathsep.join((str(HERE.parents[1]), str(HERE)))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changed}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(request.param, tmp_path_factory.mktemp("several"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return {name: distributed_scenarios.scenario(name, folder / name) for name in distributed_scenarios.SCENARIOS}


@pytest.mark.parametrize("name", distributed_scenarios.SCENARIOS)
def test_several_processes_have_the_adapter_and_the_figures_of_one(
    name: str, several: Together, alone: dict[str, Any]
) -> None:
    several.insist_on_same(name, *alone[name])


def test_three_processes_that_cannot_have_the_same_share_have_the_adapter_of_one(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    assert distributed_scenarios.launched(3, tmp_path, does=distributed_scenarios.train_as_rank) == [0, 0, 0]
    for rank in range(3):
        assert tiny_run.all_apart(load_file(tmp_path / f"{rank}.safetensors"), alone["sigmoid"][0]) < 1e-5


@pytest.mark.parametrize("name", distributed_scenarios.SHARDED)
def test_sharded_each_keeps_a_part_of_the_layers_and_the_first_can_use_the_whole_model_alone(
    name: str, several: Together, alone: dict[str, Any]
) -> None:
    parts, whole = [found[name]["layer_bytes"] for found in several.found], alone[name][1]["layer_bytes"]
    assert sum(parts) == whole
    assert max(parts) <= 1.1 * whole / several.count
    for found, expected in zip(several.found[0][name]["asked"], alone[name][1]["asked"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_all_do_a_step_again_if_memory_runs_out_in_one(several: Together, alone: dict[str, Any]) -> None:
    adapter, facts = alone["sigmoid"]
    for found, theirs in zip(several.found, several.adapters(distributed_scenarios.OUT_OF_MEMORY), strict=True):
        assert tiny_run.all_apart(theirs, adapter) < 1e-5
        same(found[distributed_scenarios.OUT_OF_MEMORY], facts)
        assert found[distributed_scenarios.OUT_OF_MEMORY]["row_tokens"] == 30
        assert found[distributed_scenarios.OUT_OF_MEMORY]["said"] == [
            "step 1: out of memory with rows of 60 tokens; rows of 30 from here on"
        ]


def test_all_compute_the_first_step_again_until_its_gradient_overflows_in_none(
    several: Together, tmp_path: Path
) -> None:
    adapter, facts = distributed_scenarios.scenario(
        distributed_scenarios.OVERFLOW, tmp_path
    )  # without a scale, which changes no bit
    said = {tuple(found[distributed_scenarios.OVERFLOW]["said"]) for found in several.found}
    ((sentence,),) = said
    assert re.fullmatch(
        r"step 1 was computed \d+ times, since its gradient overflows fp16 at loss scales above [\d,]+", sentence
    )
    for found, theirs in zip(several.found, several.adapters(distributed_scenarios.OVERFLOW), strict=True):
        assert tiny_run.all_apart(theirs, adapter) < 1e-5
        assert found[distributed_scenarios.OVERFLOW]["num_tokens"] == facts["num_tokens"]
        assert found[distributed_scenarios.OVERFLOW]["first_step_grad"] == pytest.approx(
            facts["first_step_grad"], rel=1e-5
        )


def test_all_go_on_with_the_reference_in_smaller_rows_if_memory_runs_out_in_one(
    several: Together, tmp_path: Path
) -> None:
    expected = distributed_scenarios.asked_out_of_memory(tmp_path)
    assert (expected["computed"], expected["said"]) == (28, [])
    found = [each["asked out of memory"] for each in several.found]
    assert sum(each["computed"] for each in found) == 28
    for each in found:
        assert each["said"] == ["reference pass: out of memory with rows of 60 tokens; rows of 30 from here on"]
        for one, other in zip(each["logps"], expected["logps"], strict=True):
            assert one == pytest.approx(other, rel=1e-5)


def test_the_reference_is_asked_in_shares_and_once(several: Together, tmp_path: Path) -> None:
    expected = distributed_scenarios.asked_in_shares(tmp_path)
    assert expected["computed"] == 22
    shares = [found["shares"] for found in several.found]
    assert sum(share["computed"] for share in shares) == 22
    assert all(0 < share["computed"] < 22 for share in shares)
    for share in shares:
        assert share["stored"] == 22
        for one, other in zip(share["logps"], expected["logps"], strict=True):
            assert one == pytest.approx(other, rel=1e-5)


def test_a_loss_that_is_not_finite_ends_all_with_the_same_sentence(several: Together) -> None:
    sentences = {found["not finite"] for found in several.found}
    assert len(sentences) == 1
    assert re.fullmatch(r"step 1: the loss of row \d is not finite, so nothing was changed; .*", sentences.pop())


def test_all_stop_if_one_is_told_to_and_one_alone_goes_on(several: Together, alone: dict[str, Any]) -> None:
    folder = several.folder / "stopped"
    saved = folder / "checkpoints" / "step-000002"
    assert {found["stopped"] for found in several.found} == {
        f"stopped after step 2 as asked; {saved} is saved, --resume goes on from there"
    }
    assert distributed_scenarios.stopped(folder, resume=True) == ""
    assert tiny_run.all_apart(load_file(folder / "adapter.safetensors"), alone["sigmoid"][0]) < 1e-5


def test_processes_that_have_other_data_refuse_to_train(several: Together) -> None:
    assert {found["not the same"] for found in several.found} == {
        "the processes of this run do not have the same pairs; give all machines the same files"
    }


def test_sharded_a_process_without_memory_or_without_the_others_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "is_sharded", lambda: True)
    monkeypatch.setattr(processes.signal, "signal", lambda *ignored: None)

    def ended(error: Exception) -> str:
        with pytest.raises(QloraDpoError) as caught:
            for attempt in row_attempts("step 3", tiny_run.PACKED):
                with attempt:
                    raise error
        return str(caught.value)

    assert ended(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")) == (
        "step 3: out of memory, and with sharded weights nothing can be done again in smaller rows; lower "
        "train.micro_batch_tokens or data.max_length, or set train.gradient_checkpointing = true, and close other "
        "programs that hold memory"
    )
    assert ended(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4")) == (
        "another process of this run has ended; --resume goes on from the newest checkpoint, if there is one"
    )


def partitions(costs: list[int], count: int) -> list[list[int]]:
    """The items of each of `count` processes."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "world_size", lambda: count)
        for index in range(count):
            patch.setattr(processes, "rank", lambda index=index: index)
            found.append(list(processes.partition_by_cost(costs)))
    return found


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 6))
def test_each_pair_belongs_to_one_process_and_all_have_about_the_same(costs: list[int], count: int) -> None:
    shares = partitions(costs, count)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    # a pair is not divided, so a share may be off by one of them
    assert max(sum(costs[i] for i in share) for share in shares) <= sum(costs) / count + max(costs)


@pytest.mark.parametrize(
    ("costs", "shares"), [([3, 1], [[0], [1]]), ([1, 3], [[0], [1]]), ([2, 2, 2], [[0], [1, 2]]), ([9], [[], [0]])]
)
def test_a_pair_belongs_to_the_process_in_whose_part_its_middle_lies(costs: list[int], shares: list[list[int]]) -> None:
    assert partitions(costs, 2) == shares


@pytest.fixture
def recipe(empty_folder: Path) -> Path:
    """A recipe of 12 steps over the tiny model, beside its data."""
    for name, count in (("train", 12), ("eval", 3)):
        rows = [
            {"prompt": f"say {n} {n * 7}", "chosen": f"yes {n}", "rejected": f"no, not {n} {n}"} for n in range(count)
        ]
        (empty_folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = empty_folder / "r.toml"
    path.write_text(
        f'[model]\nname = "{tiny_run.source().name}"\nquantization = "none"\ndtype = "fp32"\n'
        '[lora]\nr = 4\nlora_alpha = 8\n[data]\ntrain = "train.jsonl"\neval = "eval.jsonl"\n'
        "[train]\nbatch_size = 3\nnum_train_epochs = 600\nlearning_rate = 1e-3\nlogging_steps = 1\nsave_steps = 4\n"
        'lr_scheduler_type = "constant"\neval_steps = 3000\n[samples]\nprompts = 1\nmax_new_tokens = 2\n'
    )
    return path


def lines_until(process: subprocess.Popen[str], beginning: str) -> Iterator[str]:
    """What a command says, up to a line with this beginning."""
    assert process.stderr is not None
    for line in process.stderr:
        yield line
        if line.startswith(beginning):
            return
    raise AssertionError(f"never said {beginning}")


def start(*arguments: str) -> subprocess.Popen[str]:
    command = ["-m", "qlora_dpo", "train", "r.toml", "-o", "two", *arguments]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return ForkedPython(command, cwd=Path.cwd(), env=environment(), **pipes)


def test_a_run_of_two_that_loses_one_ends_with_a_checkpoint_and_goes_on_alone(recipe: Path) -> None:
    process = start("--processes", "2")
    said = list(lines_until(process, "step 5/"))
    assert sum(line.startswith("recipe ") for line in said) == 1  # one of them speaks
    assert "processes   2, each with the whole base; they share a step's pairs\n" in said
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second[0]), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    told = [line for line in err.splitlines() if line.startswith("qlora-dpo:")]
    stopped = re.fullmatch(
        r"qlora-dpo: stopped after step (\d+), since another process of this run has ended; "
        r"two/checkpoints/step-\d+ is saved, --resume goes on from there",
        told[0],
    )
    assert stopped is not None, err
    assert told[1:] == [
        "qlora-dpo: process 1 was ended by SIGKILL, and the others with it; --resume goes on from the newest "
        "checkpoint, if there is one"
    ]

    assert main(["verify", "two"]) == 0
    steps = int(stopped[1]) + 3
    assert main(["train", "r.toml", "-o", "two", "--resume", "--max-steps", str(steps)]) == 0
    assert main(["train", "r.toml", "-o", "one", "--max-steps", str(steps)]) == 0
    two, one = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("two", "one"))
    assert tiny_run.all_apart(two, one) < 1e-5
    records = [json.loads(line) for line in Path("two/metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in records if each["kind"] == "train"] == list(range(1, steps + 1))


def test_what_cannot_be_done_by_several_is_refused_before_they_start(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["train", "r.toml", "--processes", "2", "--set", "train.engine=trl"]) == 2
    assert capsys.readouterr().err == 'qlora-dpo: several processes need train.engine = "qlora_dpo"; run TRL in one\n'
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "r.toml", "--processes", "2"]) == 2
    assert capsys.readouterr().err == (
        "qlora-dpo: --processes starts the processes, and this is one of them; leave it out; "
        "see qlora-dpo train --help\n"
    )


ZERO_3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
SHIPPED = {"ddp": "", "fsdp2-qlora": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
"""What the processes share out by each config file."""


@pytest.mark.parametrize("file", accelerate_configs(), ids=lambda file: file.stem)
def test_a_shipped_config_file_starts_processes_that_share_out_what_it_is_for(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = file.read_text().splitlines()[1].removeprefix("# accelerate launch ").replace("RECIPE", "r.toml")
    asked = launch_command_parser().parse_args(line.replace("recipes/accelerate", str(file.parent)).split())
    asked, *_ = _validate_launch_command(asked)
    assert (asked.num_processes, asked.training_script) == (2, "qlora_dpo")
    asked.deepspeed_fields_from_accelerate_config = ""  # what launch_command adds
    starts = prepare_deepspeed_cmd_env(asked)[1] if asked.use_deepspeed else prepare_multi_gpu_env(asked)
    for name, value in starts.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.sharding_strategy.cache_clear()
    try:
        assert processes.sharding_strategy() == SHIPPED[file.stem]
    finally:
        processes.sharding_strategy.cache_clear()


def test_all_config_files_are_shipped() -> None:
    assert [file.stem for file in accelerate_configs()] == list(SHIPPED)


@pytest.mark.parametrize(("found", "which"), [(None, "not installed"), ("0.18.9", "0.18.9")])
def test_without_a_deepspeed_that_was_tried_its_config_files_are_refused(
    found: str | None,
    which: str,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(package: str) -> str:
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(deepspeed_engine, "version", version)
    assert train_as_one_of_two(ZERO_3, monkeypatch) == 2
    assert capsys.readouterr().err == (
        f"qlora-dpo: accelerate's config file asks for DeepSpeed, which is {which}; install 0.19 or newer with: "
        "pip install 'qlora_dpo[deepspeed]'\n"
    )


def train_as_one_of_two(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `train` in the first of two processes that accelerate has started with this environment."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **environment}.items():
        monkeypatch.setenv(name, value)
    processes.sharding_strategy.cache_clear()
    try:
        return main(["train", "r.toml"])
    finally:
        processes.sharding_strategy.cache_clear()


def test_zero_2_is_refused_where_gradients_are_scaled(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_engine, "version", lambda _: "0.19.0")
    monkeypatch.setattr(device, "select_device", lambda _: device.device_for_gpu(GPU_SPECS["t4"]))
    assert train_as_one_of_two({**ZERO_3, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, monkeypatch) == 2
    assert capsys.readouterr().err == (
        "qlora-dpo: ZeRO-2 cannot step by the scaled gradients of fp16, in which Tesla T4 computes; take "
        'recipes/accelerate/ddp.yaml, set model.dtype = "fp32", or take GPUs with bf16\n'
    )


@pytest.mark.parametrize(
    ("asked", "changed", "sentence"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
            (),
            "accelerate's config file asks for DeepSpeed with zero_stage: 1; write zero_stage: 2 or 3 beside no "
            "deepspeed_config_file, as recipes/accelerate/zero2.yaml and zero3.yaml do",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            (),
            "accelerate's config file asks for DeepSpeed with zero_stage: not said; write zero_stage: 2 or 3 beside no "
            "deepspeed_config_file, as recipes/accelerate/zero2.yaml and zero3.yaml do",
        ),
        (
            {**ZERO_3, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            (),
            "accelerate's config file has offload_param_device: cpu, which is not supported; write none",
        ),
        (
            ZERO_3,
            ("model.quantization=int8",),
            'model.quantization = "int8" cannot be sharded, since its weights are integers with scales of their own; '
            'take "nf4", or recipes/accelerate/ddp.yaml',
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            (),
            "accelerate's config file asks for FSDP 1, which cannot shard beside a float32 adapter; write "
            "fsdp_version: 2, as recipes/accelerate/fsdp2-qlora.yaml does",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            (),
            "accelerate's config file has fsdp_offload_params: true, which is not supported; write false",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            ("model.quantization=int8",),
            'model.quantization = "int8" cannot be sharded, since its weights are integers with scales of their own; '
            'take "nf4", or recipes/accelerate/ddp.yaml',
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            ("model.quantization=nf4", "lora.use_dora=true"),
            "lora.use_dora reads whole 4-bit weights, which sharded layers do not have; leave it out, or take "
            "recipes/accelerate/ddp.yaml",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    asked: dict[str, str],
    changed: tuple[str, ...],
    sentence: str,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", **asked}.items():
        monkeypatch.setenv(name, value)
    processes.sharding_strategy.cache_clear()
    try:
        assert main(["train", "r.toml", *(word for each in changed for word in ("--set", each))]) == 2
    finally:
        processes.sharding_strategy.cache_clear()
    assert capsys.readouterr().err == f"qlora-dpo: {sentence}\n"
