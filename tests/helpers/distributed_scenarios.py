"""What several processes do together in tests: each scenario trains the tiny model, and writes what came of it.

`launched` starts them from a server that has imported everything once; alone, `scenario` says what to expect.
"""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_run
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fork_server import ForkedPython
from peft import PeftModel
from safetensors.torch import save_file

from qlora_dpo.errors import QloraDpoError
from qlora_dpo.files import write_json
from qlora_dpo.model.base import load_base
from qlora_dpo.model.decoder_layers import checkpointable_layers
from qlora_dpo.model.distributed import processes, sharding
from qlora_dpo.model.fused_lora import fuse_lora
from qlora_dpo.model.lora import attach_lora
from qlora_dpo.model.packed import attention
from qlora_dpo.preference import reference
from qlora_dpo.preference.reference import compute_reference_logps, model_logps
from qlora_dpo.preference.reference_adapter import ReferenceAdapter, clone_adapter
from qlora_dpo.preference.reference_cache import ReferenceLogpCache, read_logp_table
from qlora_dpo.recipe import Recipe
from qlora_dpo.recipe.model import ModelTable
from qlora_dpo.tracking.run_log import EVALUATION_SAMPLES, RunLog
from qlora_dpo.training import loop, reference_pass, train_step
from qlora_dpo.training.build_model import PreparedModel
from qlora_dpo.training.checkpoint.save import newest_valid
from qlora_dpo.training.loop import train_loop

# name: tables of the recipe, training pairs, held-out pairs
SCENARIOS: dict[str, tuple[dict[str, dict[str, Any]], int, int]] = {
    "sigmoid": ({"train": {"num_train_epochs": 2}}, 10, 6),  # 4, 4 and 2 pairs a step
    "fewer pairs than processes": ({"train": {"batch_size": 1, "max_steps": 3}}, 4, 1),
    "aot": ({"objective": {"loss_type": "aot"}}, 9, 6),  # all pairs of a step together, of which the last has one
    "beta_dpo": ({"objective": {"loss_type": "beta_dpo"}}, 9, 3),
    "ema": ({"reference": {"kind": "ema", "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1}}, 10, 3),
}
LAST_LAYER = {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}
SHARDED: dict[str, tuple[dict[str, dict[str, Any]], int, int]] = {
    "sharded nf4": ({"model": {"quantization": "nf4"}, "train": {"num_train_epochs": 2}}, 10, 3),
    "sharded aot": ({"objective": {"loss_type": "aot"}, "lora": LAST_LAYER}, 9, 6),
    "sharded ema": ({**SCENARIOS["ema"][0], "lora": {"modules_to_save": ["norm"]}}, 5, 1),
}
"""These with the base's layers shared out among the processes, asked along with each step but the first."""
ZERO: dict[str, tuple[dict[str, dict[str, Any]], int, int]] = {
    **{name.replace("sharded", "zero3"): what for name, what in SHARDED.items()},
    "zero2": ({"train": {"num_train_epochs": 2, "weight_decay": 0.1}, "lora": {"loraplus_lr_ratio": 4.0}}, 10, 6),
    "zero2 ema": (SCENARIOS["ema"][0], 5, 1),
}
"""These with DeepSpeed, which not everyone has."""
SCENARIOS |= SHARDED
OUT_OF_MEMORY = "out of memory in one"
OVERFLOW = "a first scale that overflows"
STEEP = ({"objective": {"loss_type": "sppo_hard", "beta": 0.01}, "train": {"max_steps": 1}}, 10, 3)


def scenario(name: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Train as `name` says: the adapter, and the facts of the run."""
    known = {**SCENARIOS, **ZERO, OUT_OF_MEMORY: SCENARIOS["sigmoid"], OVERFLOW: STEEP}
    tables, train, heldout = known[name]
    train_table = {"micro_batch_tokens": 60, **tables.get("train", {})}
    what = tiny_run.recipe(**{**tables, "train": train_table})
    folder.mkdir(parents=True, exist_ok=True)
    in_layers = name.startswith(("sharded", "zero3"))
    if processes.world_size() > 1:
        ask_for(sharing(name))
    model = sharded(what) if processes.is_sharded() else tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder, train, heldout)
    if what.reference is not None:
        job = replace(job, reference_adapter=ReferenceAdapter(clone_adapter(model), what.reference))
    if in_layers:
        job.train.reference_P2[sorted(set(range(train)) - set(job.data_order.batch_indices(1)))] = torch.nan
        job = replace(job, sample_fn=asked_alone)
    said = list[str]()
    silent = not processes.is_main()
    with RunLog(folder, job.data_order.total_steps, silent=silent) as tracker, tiny_run.logged_sentences(said):
        state = train_loop(model, job, tiny_run.start(job), tracker)
    kept = layer_bytes(model)
    sharding.unshard_layers(model)
    if processes.is_main():  # from here on the first goes on alone
        model_logps(model, tiny_run.pairs(1), tiny_run.PACKED, tiny_run.CPU)
    processes.sharding_strategy.cache_clear()
    facts = {
        "evals": state.evals,
        "num_tokens": state.num_tokens,
        "first_step_grad": state.first_step_grad,
        "margin_mean": state.margin_mean,
        "row_tokens": state.row_tokens,
        "said": [each for each in said if "out of memory" in each or "was computed" in each],
        "layer_bytes": kept,
    }
    if in_layers and processes.is_main():
        facts["asked"] = [
            json.loads(line)["logp"][0] for line in (folder / EVALUATION_SAMPLES).read_text().splitlines()
        ]
    return tiny_run.adapter(model), facts


def layer_bytes(model: PeftModel) -> int:
    """Bytes of the frozen weights of decoder layers that this process holds."""
    frozen = [each for layer in checkpointable_layers(model) for each in layer.parameters() if not each.requires_grad]
    return sum(sharding.local_shard(each).numel() * each.element_size() for each in frozen)


def asked_alone(model: PeftModel) -> list[dict[str, Any]]:
    """What the first process, and no other, asks the model at an evaluation."""
    logp_P2 = model_logps(model, tiny_run.pairs(1), tiny_run.PACKED, tiny_run.CPU)
    return [{"prompt": [{"role": "user", "content": "?"}], "answer": "", "logp": logp_P2.tolist()}]


def sharing(name: str) -> str:
    """What the processes of a scenario share out, as `processes.sharding_strategy` has it."""
    return "fsdp2" if name in SHARDED else name.split()[0] if name in ZERO else ""


def ask_for(what: str) -> None:
    """Set what `accelerate launch` sets where its config file asks for `what`."""
    asks = {"": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": what[-1:]}
    os.environ.update(asks.get(what, zero))
    processes.sharding_strategy.cache_clear()
    assert processes.sharding_strategy() == what


def sharded(what: Recipe) -> PeftModel:
    """`jobs.fresh`, with the base's layers shared out."""
    table = ModelTable(name=what.model.name, quantization=what.model.quantization)
    base = load_base(tiny_run.source(), table, tiny_run.CPU)
    attention.enable_packed_attention(base)
    model = attach_lora(base, what.lora, what.train.seed)
    fuse_lora(model, torch.float32)
    sharding.shard_layers(model, tiny_run.CPU)
    return model


def asked_out_of_memory(folder: Path) -> dict[str, Any]:
    """Ask the reference about 22 pairs while the second process runs out of memory once, in its second row."""
    model, passes = tiny_run.fresh(tiny_run.recipe()), list[int]()
    whole, said = reference.model_logps, list[str]()

    def live(*what: Any) -> torch.Tensor:
        passes.append(len(what[1]))
        if processes.rank() == 1 and len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(*what)

    reference.model_logps = live
    rows, cache = replace(tiny_run.PACKED, token_budget=60), ReferenceLogpCache(folder)
    train, heldout = tiny_run.pairs(22), tiny_run.pairs(6, 1)
    with RunLog(folder, 1, silent=True) as run_log, tiny_run.logged_sentences(said):
        loaded = PreparedModel(model, rows, rows)
        reference_pass.fill_reference_cache(loaded, [train, heldout], tiny_run.CPU, cache, run_log)
    reference.model_logps = whole
    return {"logps": cache.get([*train, *heldout]).tolist(), "computed": cache.local_computed, "said": said}


def once_out_of_memory() -> None:
    """Let the second process run out of memory in its first forward pass of a step."""
    whole, failed = train_step.score_batch, list[bool]()

    def score(*arguments: Any, **keys: Any) -> Any:
        if processes.rank() == 1 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(*arguments, **keys)

    train_step.score_batch = score


def scale_from(first: float | None) -> None:
    """Let gradients be scaled from a first scale on, or not any more."""
    AcceleratorState._reset_state()
    loop.Accelerator = Accelerator if first is None else tiny_run.scaling(first)  # type: ignore[assignment, misc]


def asked_in_shares(folder: Path) -> dict[str, Any]:
    """Ask the reference about 23 pairs, two of which are the same, into one store."""
    model, pairs = tiny_run.fresh(tiny_run.recipe()), tiny_run.pairs(22)
    store = ReferenceLogpCache(folder)
    found_P2 = compute_reference_logps(model, [*pairs, pairs[3]], store, tiny_run.PACKED, tiny_run.CPU)
    processes.barrier()
    return {"logps": found_P2.tolist(), "computed": store.local_computed, "stored": len(read_logp_table(folder))}


def not_finite(folder: Path) -> str:
    """What a process says when one of the pairs, which one process alone has, has no finite loss."""
    what = tiny_run.recipe()
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder, 4, 2)
    job.train.reference_P2[job.data_order.batch_indices(1)[0]] = torch.inf
    with RunLog(folder, 1, silent=True) as tracker:
        try:
            train_loop(model, job, tiny_run.start(job), tracker)
        except QloraDpoError as error:
            return str(error)
    return ""


def stopped(folder: Path, name: str = "sigmoid", resume: bool = False) -> str:
    """What a process says when the second is told to end after the second step of a scenario; `resume` goes on."""
    tables, train, heldout = (SCENARIOS | ZERO)[name]
    what = tiny_run.recipe(**{**tables, "train": {**tables["train"], "micro_batch_tokens": 60}})
    folder.mkdir(parents=True, exist_ok=True)
    if processes.world_size() > 1:
        ask_for(sharing(name))
    model = tiny_run.fresh(what)
    job = tiny_run.job(model, what, folder, train, heldout)
    with RunLog(folder, job.data_order.total_steps, silent=not processes.is_main()) as tracker:
        said = tracker.step

        def step(number: int) -> None:
            said(number)
            if (number, processes.rank(), resume) == (2, 1, False):
                os.kill(os.getpid(), signal.SIGTERM)

        tracker.step = step  # type: ignore[method-assign]
        try:
            train_loop(
                model,
                replace(job, allowed_changes=("model.name",)),
                tiny_run.start(job),
                tracker,
                newest_valid(folder)[0] if resume else None,
            )
        except QloraDpoError as error:
            return str(error)
    if processes.is_main():
        save_file(tiny_run.adapter(model), folder / "adapter.safetensors")
    return ""


def not_the_same() -> str:
    """What a process says when the others have other pairs."""
    try:
        processes.check_same_on_all_ranks({"base": "ab" * 32, "pairs": f"{processes.rank():02x}" * 32})
    except QloraDpoError as error:
        return str(error)
    return ""


def work(rank: int, count: int, port: int, folder: Path, zero: bool) -> None:
    """Do all of it as process `rank` of `count`, and write what it has found; `zero`: what needs DeepSpeed."""
    set_rank(rank, count, port)
    found = dict[str, Any]()
    for name in ZERO if zero else SCENARIOS:
        adapter, found[name] = scenario(name, folder / name)
        save_file(adapter, folder / f"{name}.{rank}.safetensors")
    if zero:
        found["stopped"] = stopped(folder / "stopped", "zero2")
        found["resumed"] = stopped(folder / "stopped", "zero2", resume=True)
    else:
        found["stopped"] = stopped(folder / "stopped")
        once_out_of_memory()
        adapter, found[OUT_OF_MEMORY] = scenario(OUT_OF_MEMORY, folder / OUT_OF_MEMORY)
        save_file(adapter, folder / f"{OUT_OF_MEMORY}.{rank}.safetensors")
        scale_from(2.0**127)  # float32 ends at 2 ** 128
        adapter, found[OVERFLOW] = scenario(OVERFLOW, folder / OVERFLOW)
        save_file(adapter, folder / f"{OVERFLOW}.{rank}.safetensors")
        scale_from(None)
        found["shares"] = asked_in_shares(folder / "shares")
        found["asked out of memory"] = asked_out_of_memory(folder / f"asked-{rank}")
        found["not finite"], found["not the same"] = not_finite(folder / "wrong"), not_the_same()
    write_json(folder / f"{rank}.json", found)
    processes.destroy_process_group()


def train_as_rank(rank: int, count: int, port: int, folder: Path, zero: bool = False) -> None:
    """Train the first scenario as process `rank` of `count`, and save the adapter."""
    set_rank(rank, count, port)
    adapter, _ = scenario("sigmoid", folder)
    save_file(adapter, folder / f"{rank}.safetensors")
    processes.destroy_process_group()


def set_rank(rank: int, count: int, port: int) -> None:
    """Make this process `rank` of a group of `count`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    tiny_run.source()  # saved by each for itself; among several, transformers lets the first alone save
    processes.init_process_group(cpu=True)


RANK = """
import sys
from pathlib import Path
import distributed_scenarios
name, rank, count, port, folder, zero = sys.argv[1:]
getattr(distributed_scenarios, name)(int(rank), int(count), int(port), Path(folder), zero == "zero")
"""


def launched(count: int, folder: Path, zero: bool = False, does: Callable[..., None] = work) -> list[int | None]:
    """Let `count` processes do it; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tests = Path(__file__).parents[1]
    path = os.pathsep.join((str(tests.parent), str(tests / "helpers")))
    last = [str(count), port, str(folder), "zero" if zero else ""]
    ranks = [
        ForkedPython(
            ["-c", RANK, does.__name__, str(rank), *last],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(count)
    ]
    try:
        return [rank.wait(timeout=120) for rank in ranks]
    except subprocess.TimeoutExpired:  # some wait for others that are gone
        return [rank.poll() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(30)
