"""One profile of our step: what its time goes to, how often the host waits, and its share of the card's rate."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flops
import gpu_card
import gpu_made
import gpu_speed
import step
from gpu_card import Form
from gpu_speed import MFU, ON_A_GPU, Variant
from gpu_table import Report
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qlora_dpo.preference.pack import Packing, collate, micro_batches

KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "linear"),
    "attention": ("attention", "attn", "flash", "efficient"),
    "dequantization": ("dequant", "bitsandbytes"),
    "gathers and scatters": ("index", "gather", "scatter", "sort", "segment_reduce", "embedding", "repeat_interleave"),
    "copies and joins": ("copy_", "cat", "clone", "contiguous", "fill_", "zero_", "pad"),
}
"""What an operator's name has in it, or is for products; the rest is elementwise or sums."""
CONVERSIONS = "conversions between dtypes"
OTHERS = "elementwise and sums"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
MOST_WAITS = 10
"""Host waits of a micro-batch that the code aims at."""


def kind_of(name: str, parent: str = "") -> str:
    """What an operator does, from its name and that of the operator it was called by."""
    operator = name.split("::")[-1]
    if operator == "copy_" and parent.endswith("_to_copy"):
        return CONVERSIONS
    if operator.removesuffix("_") in KINDS["products"]:
        return "products"
    for kind, words in KINDS.items():
        if kind != "products" and any(word in name for word in words):
            return kind
    return OTHERS


def shares(events: Iterable[Any]) -> Counter[str]:
    """Microseconds by kind: of the GPU where there is one, else of the CPU."""
    found: Counter[str] = Counter()
    for event in events:
        # kernels are listed beside the operators that launched them
        spent = 0 if event.device_type != DeviceType.CPU else _spent(event)
        if spent > 0 and (ON_A_GPU or "::" in event.name):
            parent = event.cpu_parent.name if event.cpu_parent is not None else ""
            found[kind_of(event.name, parent)] += spent
    return found


def run(
    models: Path, form: Form, report: Report, shape: str, length: int, batch: int, rows: int, trace: Path | None
) -> None:
    """Time a step, then take one under the profiler."""
    with gpu_card.like(form):
        work = gpu_speed.bench(models, shape, form, gpu_made.pairs(batch, length))
        packing = Packing(rows, work.pad, work.here.attention)
        model = step.model_for(work, lean=True)
        known_P2 = gpu_speed.known_logps(work, model[0], packing)
        batches = [collate([work.pairs[i] for i in group], packing) for group in micro_batches(work.pairs, packing)]
        counted = flops.shape_of(work.source.folder)
        operations = sum(flops.ours(counted, each, recomputed=False, reference=False) for each in batches)
        timed = Variant("", lambda: step.our_step(model, work, packing, known_P2), operations)
        gpu_speed.measure([timed], 3)
        rate = gpu_card.product_rate(work.here, tiny=shape == "tiny")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_A_GPU else [])]
        with profile(activities=activities) as profiled:
            timed.take()
            gpu_card.wait()
    if trace is not None:
        profiled.export_chrome_trace(str(trace))
    _tell(report, work, timed, rate, profiled, batches)


def _tell(report: Report, work: step.Bench, timed: Variant, rate: float, profiled: Any, batches: list[Any]) -> None:
    if timed.median is None:
        report.check("a step", timed.failed, "fits", False)
        return
    tokens = sum(batch.input_ids_BL.numel() for batch in batches)
    report.say(
        f"{work.source.name}, {work.table.quantization}, {work.here.compute_dtype}, {work.here.name}, attention "
        f"{work.here.attention}; {len(work.pairs)} pairs in {len(batches)} rows, {tokens:,} tokens; "
        f"{timed.median:.3f} s a step, {timed.operations / 1e12:.2f} TFLOP; products reach {rate / 1e12:.2f} TFLOP/s"
    )
    found = shares(profiled.events())
    whole = sum(found.values())
    report.columns("time of the " + ("GPU" if ON_A_GPU else "CPU"), "ms a step", "share")
    for kind, spent in found.most_common():
        report.row(kind, f"{spent / 1e3:.2f}", f"{spent / whole:.1%}")
    busy = whole / 1e6 / timed.median
    report.row("all, beside the seconds of a step", f"{whole / 1e3:.2f}", f"{busy:.1%} busy")
    report.checks()
    if ON_A_GPU:
        _tell_waits(report, profiled, len(batches))
    judged = ON_A_GPU and work.here.compute_dtype == "bf16"
    report.target("MFU", 100 * timed.operations / timed.median / rate, MFU, " %", judged=judged)
    slowest = sorted(profiled.key_averages(), key=_spent, reverse=True)[:15]
    report.columns("the slowest operators", "ms a step", "calls")
    for each in slowest:
        report.row(f"`{each.key[:80]}`", f"{_spent(each) / 1e3:.2f}", each.count)


def _spent(event: Any) -> float:
    """Microseconds of an operator itself, without those that it calls."""
    return float(event.self_device_time_total if ON_A_GPU else event.self_cpu_time_total)


def _tell_waits(report: Report, profiled: Any, rows: int) -> None:
    """How often the host waits or copies, and how long."""
    for each in profiled.key_averages():
        if each.key.startswith(WAITS):
            often = each.count / rows
            report.row(each.key, f"{often:.1f} a micro-batch, {each.self_cpu_time_total / 1e3:.1f} ms a step", "", "")
    waits = sum(each.count for each in profiled.key_averages() if "Synchronize" in each.key) / rows
    report.row(
        "host waits a micro-batch", f"{waits:.1f}", f"at most {MOST_WAITS}", "yes" if waits <= MOST_WAITS else "NO"
    )
