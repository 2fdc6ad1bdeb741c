"""Whole runs on a generated model: stopped and resumed, of every kind, and under a planted ceiling."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_card
import gpu_made
import torch
from gpu_card import Form
from gpu_table import GIB, Report, gib, last_line
from safetensors.torch import load_file

from qlora_dpo.errors import EXIT_INTERRUPTED

STEPS, STOPPED_AT = 30, 5
PLANNED_WITHIN = 0.15
"""How far the planned memory may be from the measured peak."""
JUDGED_FROM = GIB // 2
"""Planned bytes from which that is judged: a tiny model's are blocks that the allocator rounds up."""
RESERVE = "framework's reserve"
"""The part of the plan that CUDA's context takes, which the allocator does not count."""
ON_A_GPU = torch.cuda.is_available()
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "int8": {"model": {"quantization": "int8"}},
    "dense": {"model": {"quantization": "none"}},
    "DoRA": {"lora": {"use_dora": True}},
    "recomputed": {"train": {"gradient_checkpointing": True}},
    "adamw_8bit": {"train": {"optim": "adamw_8bit"}},
}
"""What a run may be beside 4-bit LoRA with AdamW. No paged optimizer: managed memory can hang a card."""
CEILINGS = (0.85, 0.7, 0.55)
"""Shares of a run's peak that the allocator is told to keep to, one after another until rows halve."""


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    code: int
    err: str
    folder: Path
    seconds: float

    @property
    def facts(self) -> dict[str, Any]:
        """The content of run.json; empty where the run did not get so far."""
        file = self.folder / "run.json"
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [float(record["loss"]) for record in records(self.folder) if record["kind"] == "train"]

    @property
    def adapter(self) -> torch.Tensor:
        """All weights of the adapter in one vector."""
        weights = load_file(self.folder / "adapter_model.safetensors")
        return torch.cat([weights[name].flatten().double() for name in sorted(weights)])


def records(folder: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl that are whole."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def apart(one: Run, other: Run) -> float:
    """Relative L2 distance of two adapters."""
    return float((one.adapter - other.adapter).norm() / other.adapter.norm())


@dataclass(frozen=True)
class Place:
    """Where commands run, and in which form of the card."""

    work: Path
    models: Path
    form: Form
    batch: int

    def train(self, recipe: Path, name: str, *words: str, stop_at: int | None = None, **more: int) -> Run:
        """Train in the folder `name`; with `stop_at`, SIGTERM is sent after that step."""
        began, folder = time.monotonic(), self.work / name
        command = gpu_card.command(self.form, ["train", str(recipe), "-o", str(folder), *words], **more)
        log = self.work / f"{name}.err"
        with log.open("w+", encoding="utf-8") as err:
            process = subprocess.Popen(
                command, cwd=self.work, env=gpu_card.environment(self.work), stdout=subprocess.DEVNULL, stderr=err
            )
            try:
                if stop_at is not None:
                    self._stop(process, folder, stop_at)
                process.wait()
            finally:
                process.kill()
        return Run(process.returncode, log.read_text(encoding="utf-8"), folder, time.monotonic() - began)

    @staticmethod
    def _stop(process: "subprocess.Popen[bytes]", folder: Path, step: int) -> None:
        while process.poll() is None:
            if any(record["kind"] == "train" and record["step"] >= step for record in records(folder)):
                process.send_signal(signal.SIGTERM)
                return
            time.sleep(0.02)

    def run(self, *words: str, given: str = "") -> "subprocess.CompletedProcess[str]":
        """Run another command to its end."""
        return subprocess.run(
            gpu_card.command(self.form, words),
            cwd=self.work,
            env=gpu_card.environment(self.work),
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )

    def planned(self, recipe: Path) -> tuple[int | None, str]:
        """Bytes that `check` plans for the tensors of a run, and why there is no plan."""
        done = self.run("check", str(recipe), "--json")
        try:
            memory = json.loads(done.stdout)["memory"]
        except (ValueError, KeyError):
            return None, last_line(done.stderr)
        reserved = sum(size for part, size in memory["parts"].items() if part.startswith(RESERVE))
        return memory["needed_bytes"] - reserved, ""

    def recipe(self, shape: str, longest: int, name: str = "r", **tables: Mapping[str, Any]) -> Path:
        """A recipe for the random model of this shape in the dtype of the form; `tables` are laid over it."""
        # on a GPU "auto" has to choose right by itself
        dtype = {} if ON_A_GPU else {"dtype": gpu_card.dtype_of(self.form)}
        model = {**dtype, **tables.pop("model", {})}
        folder = gpu_made.source(self.models, shape).folder
        train = {"batch_size": self.batch, **tables.pop("train", {})}
        return gpu_made.recipe(self.work / f"{name}.toml", folder, longest, model=model, train=train, **tables)


def train(place: Place, report: Report, shape: str, longest: int) -> None:
    """A whole run, the same stopped by SIGTERM and resumed, and its plan."""
    recipe = place.recipe(shape, longest, train={"max_steps": STEPS})
    planned, why = place.planned(recipe)
    whole = place.train(recipe, "whole")
    report.checks()
    report.check("guards pass, exit code of train", f"{whole.code} {why_failed(whole)}", "0", whole.code == 0)
    if whole.code:
        return
    _tell_learning(report, whole)
    _tell_memory(report, whole, planned, why)
    stopped = place.train(recipe, "stopped", stop_at=STOPPED_AT)
    at = len(stopped.losses)
    report.check(
        "exit code after SIGTERM",
        f"{stopped.code} at step {at}",
        str(EXIT_INTERRUPTED),
        stopped.code == EXIT_INTERRUPTED,
    )
    resumed = place.train(recipe, "stopped", "--resume")
    report.check("exit code of --resume", f"{resumed.code} {why_failed(resumed)}", "0", resumed.code == 0)
    if resumed.code == 0:
        _tell_resume(report, resumed, whole)
    facts = whole.facts
    report.say(
        f"\n{facts['device']['name']}, {facts['device']['compute_dtype']}, attention {facts['device']['attention']}, "
        f"rows of {facts['row_tokens']:,} tokens; seconds {facts['seconds']}; of the process {whole.seconds:.0f}"
    )
    for line in told(whole.err, "layout", "memory", "lora", "weights"):
        report.say(f"- {line}")


def told(err: str, *starts: str) -> list[str]:
    """The lines in which a run says what it has decided."""
    return [line for line in err.splitlines() if line.startswith(starts)]


def why_failed(run: Run) -> str:
    """The last words of a run that failed."""
    return last_line(run.err) if run.code else ""


def _tell_learning(report: Report, run: Run) -> None:
    losses = run.losses
    last = sum(losses[-3:]) / len(losses[-3:])
    report.check(
        "loss, first and mean of the last three", f"{losses[0]:.4f}, {last:.4f}", "falls", last < losses[0] - 0.05
    )
    skipped = [record["skipped_steps"] for record in records(run.folder) if "skipped_steps" in record]
    if skipped:
        report.check("steps skipped since the scale overflowed", skipped[-1], "under a tenth", skipped[-1] < STEPS / 10)


def _tell_memory(report: Report, run: Run, planned: int | None, why: str) -> None:
    """The peak beside the plan."""
    peak = int(run.facts["peak_bytes"])
    if planned is None:
        report.check("planned memory", why, "a plan", False)
        return
    ratio = planned / peak
    report.check(
        "planned and measured peak, GiB",
        f"{gib(planned)} / {gib(peak)} = {ratio:.2f}",
        f"within {PLANNED_WITHIN:.0%}",
        _as_planned(planned, peak),
    )


def _as_planned(planned: int, peak: int) -> bool | None:
    """Whether the peak is the planned one; None where it is not judged: a CPU's is that of the whole process."""
    if not ON_A_GPU or planned < JUDGED_FROM:
        return None
    return abs(planned / peak - 1) <= PLANNED_WITHIN


def _tell_resume(report: Report, resumed: Run, whole: Run) -> None:
    """How far a resumed run is from the whole one: no bit where the kernels keep an order, else rounding."""
    distance = apart(resumed, whole)
    told = "the same bits" if distance == 0 else f"relative L2 distance {distance:.1e}"
    report.check("adapter, resumed against whole", told, "at most 2e-2", distance <= 2e-2)


def variants(place: Place, report: Report, shape: str, longest: int, names: Sequence[str]) -> None:
    """A short run of every other kind, with its plan; 8-bit AdamW is stopped and resumed as well."""
    if unknown := [name for name in names if name not in VARIANTS]:
        raise SystemExit(f"no variant {unknown[0]}; there are {', '.join(VARIANTS)}")
    report.columns("variant", "exit", "loss, first and last", "planned, GiB", "peak, GiB", "planned / peak", "s", "")
    for name in names:
        if name == "adamw_8bit" and not ON_A_GPU:
            report.row(name, "", "", "", "", "", "", "skipped: bitsandbytes' optimizers need a CUDA device")
            continue
        tables = {**VARIANTS[name]}
        tables["train"] = {"max_steps": STEPS // 2, **tables.get("train", {})}
        recipe = place.recipe(shape, longest, name=name, **tables)
        planned, why = place.planned(recipe)
        run = place.train(recipe, f"{name}-run")
        if run.code:
            report.failed.append(name)
            report.row(name, run.code, "", gib(planned or 0), "", "", f"{run.seconds:.0f}", why_failed(run))
            continue
        peak, losses = int(run.facts["peak_bytes"]), run.losses
        ratio = (planned or 0) / peak
        if losses[-1] >= losses[0] or _as_planned(planned or 0, peak) is False:
            report.failed.append(name)
        remark = why or (_resumed(place, recipe, run, report) if name == "adamw_8bit" else "")
        ends = f"{losses[0]:.4f}, {losses[-1]:.4f}"
        report.row(name, 0, ends, gib(planned or 0), gib(peak), f"{ratio:.2f}", f"{run.seconds:.0f}", remark)


def _resumed(place: Place, recipe: Path, whole: Run, report: Report) -> str:
    """The same run stopped and resumed, in words."""
    stopped = place.train(recipe, "stopped-8bit", stop_at=STOPPED_AT)
    resumed = place.train(recipe, "stopped-8bit", "--resume")
    if (stopped.code, resumed.code) != (EXIT_INTERRUPTED, 0):
        report.failed.append("adamw_8bit, resumed")
        return f"stopped with {stopped.code}, resumed with {resumed.code}: {why_failed(resumed)}"
    return f"stopped at step {len(stopped.losses)}; resumed, {apart(resumed, whole):.1e} from the whole run"


def ceiling(place: Place, report: Report, shape: str, longest: int) -> None:
    """Less memory than the plan knows of: rows halve, and the run ends as it would have."""
    recipe = place.recipe(shape, longest, name="ceiling", train={"max_steps": 6, "gradient_checkpointing": False})
    free = place.train(recipe, "free")
    report.checks()
    report.check("exit code without a ceiling", f"{free.code} {why_failed(free)}", "0", free.code == 0)
    if free.code:
        return
    halved = re.compile(r"out of memory with rows of [\d,]+ tokens; rows of [\d,]+ from here on")
    rows, peak = int(free.facts["row_tokens"]), int(free.facts["peak_bytes"])
    for share in CEILINGS:
        limit = {"ceiling": int(share * peak)} if ON_A_GPU else {"rows_above": int(rows * share * 0.3)}
        words = f"{share:.0%} of {peak / GIB:.2f} GiB" if ON_A_GPU else f"rows of {limit['rows_above']:,} tokens"
        run = place.train(recipe, f"under-{share:g}", **limit)
        said = halved.findall(run.err)
        if said or run.code:
            break
        report.check(f"a ceiling at {words}", "fits", "", None)
    found = said[0] if said else why_failed(run) or "none of them is too low"
    report.check(f"a ceiling at {words}", found, "rows halve", bool(said))
    report.check("exit code under it", f"{run.code} {why_failed(run)}", "0", run.code == 0)
    if run.code == 0:
        moved = max(abs(one - other) for one, other in zip(run.losses, free.losses, strict=True))
        report.check("losses, largest difference", f"{moved:.1e}", "at most 5e-2", moved <= 5e-2)
        report.check(
            "adapters, relative L2 distance", f"{apart(run, free):.1e}", "at most 1e-1", apart(run, free) <= 0.1
        )
