"""The reference policy: the same model with its adapter off or another one, asked once per pair, its answers on disk.

P pairs. Log-probabilities are float32 sums over an answer, in nats, in the columns chosen and rejected.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from qlora_dpo.data.encoded import EncodedPair, pair_digests
from qlora_dpo.errors import ModelError, SourceError
from qlora_dpo.files import atomic_write, cache_home
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference import rank_split
from qlora_dpo.preference.logp_journal import LogpJournal, orphaned_journals
from qlora_dpo.preference.logp_table import EMPTY_LOGP_TABLE, DigestArray, LogpTable, make_logp_table
from qlora_dpo.preference.logps import score_batch
from qlora_dpo.preference.objective import dpo
from qlora_dpo.preference.pack import MicroBatch, Packing, collate, micro_batches
from qlora_dpo.preference.reference_adapter import ADAPTER_OFF, ReferenceAdapter, as_reference
from qlora_dpo.preference.token_weights import TokenWeighting
from qlora_dpo.recipe.model import ModelTable

SECONDS_BETWEEN_SAVES = 60.0
GROUPING_BLOCK = 4096
"""Pairs that are sorted into rows together: as Python numbers those of HH take 40 MB."""


def reference_cache_dir(
    source: ModelSource,
    table: ModelTable,
    device: Device,
    token_weighting: TokenWeighting | None = None,
    adapter: str = "",
) -> Path:
    """Where the log-probabilities of this base lie: one folder per weights, quantization and arithmetic, and for a
    reference with an adapter per fingerprint of that.

    The arithmetic is the device's name, its compute dtype and torch's version: in 16 bits another kernel moves an
    answer by a tenth of a nat, and the first loss would not be ln 2.

    Tokenizer, template, encoding and data need no part in the name, because each entry is found by the SHA-256 of its
    pair's token ids. An objective that weighs tokens has answers of its own.
    Learning rate, rank, seed, beta and the run's name have no part in it at all.
    """
    key = {
        "format": 2,  # 1: before quantized layers returned the compute dtype
        "base": source.fingerprint,
        "quantization": table.quantization,
        "double_quant": table.double_quant and table.quantization in ("nf4", "fp4"),
        "device": device.name,
        "torch": torch.__version__,
        "compute_dtype": device.compute_dtype,
        "attention": device.attention,
        **({"counted": token_weighting.name} if token_weighting else {}),
        **({"adapter": adapter} if adapter else {}),
    }
    return cache_home() / "reference" / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


class ReferenceLogpCache:
    """The log-probabilities in one folder, for as long as a run lasts. What it adds outlives a kill at once; about once
    a minute, and when it leaves a `with`, it is written as a file with a checksum of its own.

    `computed` counts the pairs that were added.
    """

    def __init__(self, folder: Path) -> None:
        _recover_journals(folder)
        self.folder, self.known, self.journal = folder, read_logp_table(folder), LogpJournal(folder)
        self.unsaved: dict[bytes, tuple[float, float]] = {}
        self.local_computed, self.saved_at = 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.save()
        self.journal.close()

    def get(self, pairs: Sequence[EncodedPair]) -> Tensor:
        """Log-probabilities (P, 2) of `pairs`, NaN where they are not known, in float32 on the CPU."""
        self.save()
        return torch.from_numpy(self.known.lookup(pair_digests(pairs)))

    def missing(self, pairs: Sequence[EncodedPair], among: NDArray[np.int64]) -> list[int]:
        """Those of some pairs, given as indices, that are not known."""
        self.save()
        unknown = np.isnan(self.known.lookup(pair_digests(pairs)[among])[:, 0])
        indices: list[int] = among[unknown].tolist()
        return indices

    def add(self, pairs: Sequence[EncodedPair], logps_P2: Tensor) -> None:
        """Keep the log-probabilities (P, 2) of `pairs`, and write them if the last time was a minute ago."""
        self.journal.add(pair_digests(pairs), logps_P2.numpy(force=True))
        new = dict(zip((pair.digest for pair in pairs), map(tuple, logps_P2.tolist()), strict=True))
        self.unsaved |= new
        self.local_computed += len(new)
        if time.monotonic() - self.saved_at > SECONDS_BETWEEN_SAVES:
            self.save()

    def all_gather(self, digest_P: DigestArray) -> None:
        """Give what is known of some pairs to the other processes, and take theirs, which they keep themselves."""
        if processes.world_size() == 1:
            return
        self.save()
        bytes_P32 = torch.from_numpy(np.frombuffer(digest_P.tobytes(), dtype=np.uint8).reshape(-1, 32).copy())
        found = processes.all_gather({"digest": bytes_P32, "logp": torch.from_numpy(self.known.lookup(digest_P))})
        theirs = np.frombuffer(found["digest"].numpy().tobytes(), dtype="S32")
        self.known = self.known.merged_with(make_logp_table(theirs, found["logp"].numpy()))

    def num_computed(self) -> int:
        """How many pairs all processes have added."""
        return int(processes.all_reduce_sum([self.local_computed])[0])

    def save(self) -> None:
        """Write what was added since the last time as a file, and know it."""
        if self.unsaved:
            new = make_logp_table(list(self.unsaved), list(self.unsaved.values()))
            write_logp_table(self.folder, new)
            self.known, self.unsaved = self.known.merged_with(new), {}
            self.journal.clear()
        self.saved_at = time.monotonic()


def compute_reference_logps(
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    store: ReferenceLogpCache,
    packing: Packing,
    device: Device,
    advance: Callable[[int], None] = lambda pairs: None,
    reference: ReferenceAdapter = ADAPTER_OFF,
) -> Tensor:
    """Log-probabilities (P, 2) of `pairs` with the adapter off, or as it is `held`.

    What `store` does not know is computed and added there, so a run that is stopped goes on where it was. `advance` is
    told how many pairs are known, and then how many each batch finished. Of several processes each computes its own
    part, and learns the others'; if memory runs out in one, all raise, and what each has added stays.
    """
    own = rank_split.distinct_rank_indices(pairs)
    missing = store.missing(pairs, own)
    advance(len(pairs) - len(missing) * processes.world_size())
    groups: Iterable[list[int] | None] = _pair_groups(pairs, missing, packing)

    def compute() -> None:
        with store:
            for group in rank_split.pad_group_count(list(groups)) if processes.is_sharded() else groups:
                some = [pairs[index] for index in group or [0]]
                with as_reference(model, reference):
                    answers_P2 = model_logps(model, some, packing, device)
                if group is not None:
                    store.add(some, answers_P2)
                    advance(len(some) * processes.world_size())

    processes.run_or_raise_everywhere(compute)
    store.all_gather(pair_digests(pairs)[own])
    return store.get(pairs)


def _pair_groups(pairs: Sequence[EncodedPair], indices: Sequence[int], packing: Packing) -> Iterator[list[int]]:
    """Some of the pairs in micro-batches, as indices; a few thousand pairs are in memory at a time."""
    for start in range(0, len(indices), GROUPING_BLOCK):
        block = indices[start : start + GROUPING_BLOCK]
        yield from ([block[place] for place in group] for group in micro_batches([pairs[i] for i in block], packing))


def batch_reference_logps(
    model: nn.Module, batch: MicroBatch, device: Device, reference: ReferenceAdapter = ADAPTER_OFF
) -> Tensor:
    """Log-probabilities (P, 2) of a batch that is about to be trained on, by the reference, on the batch's device.

    One pass over each pair, as if it had been asked before; the row is the policy's own, so both round alike.
    """
    training = model.training
    model.eval()
    try:
        with as_reference(model, reference), torch.no_grad():
            scores = score_batch(model, batch, device, metrics=False)
    finally:
        model.train(training)
    return torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], dim=1)


def fresh_reference_logps(
    model: nn.Module, pairs: Sequence[EncodedPair], packing: Packing, device: Device, reference: ReferenceAdapter
) -> Tensor:
    """Log-probabilities (P, 2) of `pairs` by the reference as it is now, on the CPU; nothing is kept."""
    answers_P2 = torch.zeros(len(pairs), 2)
    for group in rank_split.pad_group_count(micro_batches(pairs, packing)):
        batch = collate([pairs[index] for index in group or [0]], packing).to(device.torch_device)
        asked_P2 = batch_reference_logps(model, batch, device, reference).cpu()
        if group is not None:
            answers_P2[group] = asked_P2
    return answers_P2


@torch.no_grad()
def model_logps(model: nn.Module, pairs: Sequence[EncodedPair], packing: Packing, device: Device) -> Tensor:
    """Log-probabilities (P, 2) of a few pairs by the model as it is now, on the CPU."""
    scores = score_batch(model, collate(pairs, packing).to(device.torch_device), device, metrics=False)
    return torch.stack([scores.chosen_logp_P, scores.rejected_logp_P], dim=1).cpu()


def read_logp_table(folder: Path) -> LogpTable:
    """All entries in `folder`. A file whose content is not what its name's SHA-256 says is left out, never used."""
    parts = []
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() != file.stem:
            continue
        try:
            tensors = load(content)
        except SafetensorError:
            continue
        parts.append(make_logp_table(tensors["digest"].numpy().view("S32").ravel(), tensors["logp"].numpy()))
    whole = [each for each in parts if len(each)] or [EMPTY_LOGP_TABLE]
    return make_logp_table(
        np.concatenate([each.digest_P for each in whole]), np.concatenate([each.logp_P2 for each in whole])
    )


def write_logp_table(folder: Path, entries: LogpTable) -> None:
    """Write `entries` as one new file, named by the SHA-256 of its content; nothing is written for no entries."""
    if not len(entries):
        return
    digest_P32 = np.frombuffer(entries.digest_P.tobytes(), dtype=np.uint8).reshape(-1, 32)
    content = save({"digest": torch.from_numpy(digest_P32.copy()), "logp": torch.from_numpy(entries.logp_P2)})
    atomic_write(folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)


def _recover_journals(folder: Path) -> None:
    """Write what killed runs have left in their journals as files of their own."""
    with orphaned_journals(folder) as journals, suppress(SourceError):  # without room they are left for the next run
        for path, entries in journals.items():
            write_logp_table(folder, entries)
            path.unlink(missing_ok=True)


def probe_logits(model: nn.Module, pair: EncodedPair, device: Device) -> Tensor:
    """Logits (L, V) of one pair's prompt and chosen answer, as the model itself computes them."""
    ids = torch.tensor([pair.prompt + pair.chosen], device=device.torch_device)
    with torch.no_grad(), device.autocast():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def check_adapter_off_is_base(
    model: nn.Module, base_logits_LV: Tensor, pair: EncodedPair, packing: Packing, device: Device, *, fresh: bool = True
) -> None:
    """Prove that adapter-off is the base as loaded, bit for bit, and that our log-probabilities are the model's own.

    `base_logits_LV` is the `probe_logits` of the base before the adapter was attached. With a fresh adapter, adapter-on must be
    the same too. Raises ModelError.
    """
    with adapter_disabled(model):
        if not torch.equal(probe_logits(model, pair, device), base_logits_LV):
            raise ModelError(
                "with its adapter off the model differs from the base as loaded, so it cannot be the DPO reference; "
                "use an adapter that leaves the base as it is"
            )
    if fresh and not torch.equal(probe_logits(model, pair, device), base_logits_LV):
        raise ModelError("the untrained adapter changes the model, so the first loss would not be ln 2")
    own_L = base_logits_LV.float().log_softmax(-1)[len(pair.prompt) - 1 : -1]
    own = own_L.gather(-1, torch.tensor(pair.chosen, device=own_L.device)[:, None]).sum().item()
    with adapter_disabled(model):
        ours = model_logps(model, [pair], packing, device)[0, 0].item()
    # one answer alone, which in 16 bits moves by more than many together
    if not math.isclose(ours, own, rel_tol=3 * device.tolerance, abs_tol=10 * device.tolerance):
        raise ModelError(
            f"the log-probability of a probe answer is {own:.4f} by the model and {ours:.4f} by this program: the "
            "model changes its logits after the output head, which is not supported yet"
        )


def check_first_loss(policy_P2: Tensor, reference_P2: Tensor, beta: float, device: Device) -> None:
    """Prove that an untrained policy has the reference's log-probabilities, so that the first loss is ln 2.

    In float32 the loss must be ln 2 to 1e-4; in 16 bits another row may round differently, so the log-probabilities
    may differ by 2 % of their L2 norm. Raises ModelError.
    """
    drift_P2 = policy_P2 - reference_P2
    loss = dpo(drift_P2[:, 0] - drift_P2[:, 1], beta).mean().item()
    exact = abs(loss - math.log(2)) <= 1e-4
    close = bool(drift_P2.norm() <= device.tolerance * reference_P2.norm())
    if not (exact or (close and device.compute_dtype != "fp32")):
        raise ModelError(
            f"the first DPO loss would be {loss:.6f} instead of ln 2 = 0.693147: the cached reference does not belong "
            f"to this model; delete {cache_home() / 'reference'} and start again"
        )


def check_matches_peft(
    model: nn.Module, peft_logits_LV: Tensor, pair: EncodedPair, device: Device, folder: Path
) -> None:
    """Prove that an adapter put into `model` is the one in `folder`, bit for bit; before anything is made lean.

    `peft_logits_LV` is the `probe_logits` of the base with that adapter as PEFT itself opens it. Raises ModelError.
    """
    if not torch.equal(probe_logits(model, pair, device), peft_logits_LV):
        raise ModelError(
            f"{folder}: the model with this adapter differs from the one that PEFT opens, so training would not go on "
            "from it; merge it, and name the merged model as model.name"
        )


def check_cached_logps(fresh_P2: Tensor, cached_P2: Tensor, device: Device) -> None:
    """Prove that the reference still says what the cache has of a few pairs, where the first loss is not ln 2.

    They may differ by what rounding explains: 1e-4 of their L2 norm in float32, 2 % in 16 bits. Raises ModelError.
    """
    if not bool((fresh_P2 - cached_P2).norm() <= device.tolerance * cached_P2.norm()):
        raise ModelError(
            f"the reference gives log-probabilities of {fresh_P2.sum():.4f} nats to a few pairs, and the cache has "
            f"{cached_P2.sum():.4f}: it does not belong to this reference; delete {cache_home() / 'reference'} and "
            "start again"
        )
