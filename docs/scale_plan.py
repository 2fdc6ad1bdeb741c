"""The arithmetic of docs/large-scale.md, 10 million pairs on 64 GPUs: `python docs/generate.py` writes its tables.

Bytes, seconds, pairs and operations. What was measured, what others state and what is assumed stand apart below.
"""

from collections.abc import Iterator
from dataclasses import dataclass

PAIRS, GPUS, GPUS_PER_NODE = 10_000_000, 64, 8
BATCH_PER_GPU = 16


@dataclass(frozen=True)
class Model:
    """A decoder's sizes, from its config.json."""

    name: str
    parameters: float
    layers: int
    width: int
    inner: int
    key_width: int
    """Width of the keys, and of the values, of all heads."""

    def lora_parameters(self, r: int = 16) -> int:
        """Parameters of an adapter on all linear layers: r * (inputs + outputs) of each."""
        projections = [
            *((self.width, self.width), (self.width, self.key_width), (self.width, self.key_width)),
            *((self.width, self.width), (self.width, self.inner), (self.width, self.inner), (self.inner, self.width)),
        ]
        return self.layers * sum(r * (inputs + outputs) for inputs, outputs in projections)


QWEN_05B = Model("Qwen2-0.5B", 494e6, 24, 896, 4864, 128)
LLAMA_8B = Model("Llama-3-8B", 8.03e9, 32, 4096, 14336, 1024)


@dataclass(frozen=True)
class Measured:
    """Figures of benchmarks/README.md, "160,000 pairs"; one core of its machine."""

    text_bytes: float = 256.7e6 / 160_000
    """Of a row of HH as JSON lines, per row."""
    kept_bytes: float = 169.3e6 / 160_000
    """Of token ids, lengths and digests in the cache, per row."""
    read_seconds: float = (178.4 - 24.0) / 144_000
    """CPU seconds of a cold reading, per row."""
    warm_seconds: float = (12.7 - 10.1) / 144_000
    """CPU seconds of a warm start beyond one of few rows, per row."""
    start_seconds: float = 10.1
    """CPU seconds from the command to the first step with few rows, of a tiny model."""
    resident_bytes: float = (1176 - 1148) * 2**20 / 144_000
    """Memory that grows with the rows, per row."""
    tokens: float = 271.0
    """Of a pair in packed rows, with what is shared counted once."""
    host_seconds: float = 0.27e-3
    """CPU seconds to read a pair's ids and lay them out as a row."""


MEASURED = Measured()
ANSWER_BYTES = 32 + 2 * 4  # a digest and two float32: preference/logp_table.py
RECORD_BYTES = ANSWER_BYTES + 8  # and a checksum: preference/logp_journal.py
PEAK = 989e12
"""Operations a second of an H100 SXM in bf16, dense, as NVIDIA's data sheet states them."""
LINK_BYTES = 50e9
"""Bytes a second of a 400 Gb/s InfiniBand port, one for each GPU, as its maker states them."""
UTILIZATION = 0.35
"""Assumed: no GPU step of this kind was measured here at that size. On a CPU it is 0.52 to 0.68."""
SAVE_MINUTES = 30.0
"""Assumed: how far apart `train.save_steps` puts the checkpoints."""


def operations(model: Model, tokens: float = MEASURED.tokens) -> float:
    """Of one pair in its first epoch: forward, backward to the inputs, and the reference's forward: 2 each a weight."""
    return 3 * 2 * model.parameters * tokens


def compute_seconds(model: Model) -> float:
    """Of one epoch on all GPUs, if nothing else took time."""
    return PAIRS * operations(model) / (GPUS * PEAK * UTILIZATION)


def host_seconds() -> float:
    """Of one epoch, to lay out each GPU's pairs in the process that feeds it; it is not overlapped with the GPU."""
    return PAIRS / GPUS * MEASURED.host_seconds


def steps() -> int:
    """Optimizer steps of one epoch."""
    return -(-PAIRS // (GPUS * BATCH_PER_GPU))


def sync_seconds(model: Model) -> float:
    """Of one epoch, to add up the float32 gradients of all GPUs in each step: a ring passes them nearly twice."""
    return steps() * 2 * (GPUS - 1) / GPUS * 4 * model.lora_parameters() / LINK_BYTES


def epoch_seconds(model: Model) -> float:
    """Of one epoch, the three parts one after another."""
    return compute_seconds(model) + host_seconds() + sync_seconds(model)


def checkpoint_bytes(model: Model) -> int:
    """Of adapter and both moments of AdamW, in float32."""
    return 3 * 4 * model.lora_parameters()


def cold_reading_seconds(cores: int = 1) -> float:
    """Of reading all rows once, shared out to so many processes of one core."""
    return PAIRS * MEASURED.read_seconds / cores


def warm_start_seconds() -> float:
    """From the command to the first step, in every process, with all rows in the cache."""
    return MEASURED.start_seconds + PAIRS * MEASURED.warm_seconds


def lost_seconds(model: Model) -> float:
    """Of training that a kill without a signal costs on average, at most half of an epoch."""
    return min(30 * SAVE_MINUTES, epoch_seconds(model) / 2)


def lines() -> Iterator[str]:
    """The tables of the page."""
    yield f"| {PAIRS:,} pairs | bytes | how |"
    yield "| --- | --- | --- |"
    m = MEASURED
    for name, size, how in (
        ("rows as JSON lines", PAIRS * m.text_bytes, f"{m.text_bytes:,.0f} a row"),
        ("token ids in the cache, whole", PAIRS * m.kept_bytes, f"{m.kept_bytes:,.0f} a row"),
        ("and again in parts, for a reading that is killed", PAIRS * m.kept_bytes, "the same"),
        ("memory that grows with the pairs, a process", PAIRS * m.resident_bytes, f"{m.resident_bytes:,.0f} a row"),
        ("the same, a node", GPUS_PER_NODE * PAIRS * m.resident_bytes, f"{GPUS_PER_NODE} processes"),
        ("reference log-probabilities, on disk", PAIRS * ANSWER_BYTES, f"{ANSWER_BYTES} a pair"),
        ("their journal between two saves", 60 * PAIRS / epoch_seconds(QWEN_05B) * RECORD_BYTES, "a minute, 0.5B"),
    ):
        yield f"| {name} | {shown_bytes(size)} | {how} |"
    yield ""
    yield f"| one epoch on {GPUS} GPUs | {QWEN_05B.name} | {LLAMA_8B.name} |"
    yield "| --- | --- | --- |"
    both = (QWEN_05B, LLAMA_8B)
    for name, values in (
        ("operations of a pair", [f"{operations(each) / 1e12:.2f} T" for each in both]),
        (f"steps of {GPUS * BATCH_PER_GPU:,} pairs", [f"{steps():,}"] * 2),
        ("computing", [shown_seconds(compute_seconds(each)) for each in both]),
        ("laying out rows, on the CPUs", [shown_seconds(host_seconds())] * 2),
        ("adding up gradients", [shown_seconds(sync_seconds(each)) for each in both]),
        ("together", [shown_seconds(epoch_seconds(each)) for each in both]),
        ("a checkpoint", [shown_bytes(checkpoint_bytes(each)) for each in both]),
        ("reading the first time, one process", [shown_seconds(cold_reading_seconds())] * 2),
        ("the same by 64 processes, a file each", [shown_seconds(cold_reading_seconds(64))] * 2),
        ("a start with a full cache", [shown_seconds(warm_start_seconds())] * 2),
        ("a restart after SIGTERM", [shown_seconds(warm_start_seconds())] * 2),
        ("after a kill", [shown_seconds(warm_start_seconds() + lost_seconds(each)) for each in both]),
    ):
        yield f"| {name} | {' | '.join(values)} |"


def shown_bytes(size: float) -> str:
    """Bytes as GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def shown_seconds(seconds: float) -> str:
    """Seconds as hours, minutes or seconds."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
