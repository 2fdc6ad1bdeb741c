"""The on-disk cache of the reference's log-probabilities, shared by all runs that compute them alike.

P pairs. Log-probabilities are float32 sums over a completion, in nats, in the columns chosen and rejected.

Entries lie in immutable files named by their SHA-256, written about once a minute, and until then in a journal of each
process (logp_journal.py). sqlite3, one table with a commit per batch, was tried instead and is not used:

- The cache may lie on a disk that several nodes share (docs/slurm.md). SQLite's write-ahead log does not work there,
  because all its processes must be on one host (sqlite.org/wal.html), and its rollback journal relies on file locks,
  which network file systems often implement wrongly (sqlite.org/howtocorrupt.html, 2.1). Files that are written under
  a temporary name and renamed need no locks.
- Looking up 160,000 pairs takes SQLite 1.6 to 2.3 times as long, and adding a batch of 8 takes 1.0 ms with the
  write-ahead log and 13 ms with a rollback journal that survives a power cut, here 0.3 ms (benchmarks/README.md).
- A damaged file costs its own entries, a damaged database those of all runs; and SQLite does not notice a flipped bit
  within a row, so each row would need a checksum as well.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from qlora_dpo.data.encoded import EncodedPair, pair_digests
from qlora_dpo.errors import SourceError
from qlora_dpo.files import atomic_write, cache_home
from qlora_dpo.model.device import Device
from qlora_dpo.model.distributed import processes
from qlora_dpo.model.sources import ModelSource
from qlora_dpo.preference.logp_journal import LogpJournal, orphaned_journals
from qlora_dpo.preference.logp_table import EMPTY_LOGP_TABLE, DigestArray, LogpTable, make_logp_table
from qlora_dpo.preference.token_weights import TokenWeighting
from qlora_dpo.recipe.model import ModelTable

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SAVES = 60.0


def reference_cache_dir(
    source: ModelSource,
    table: ModelTable,
    device: Device,
    token_weighting: TokenWeighting | None = None,
    adapter: str = "",
) -> Path:
    """The cache folder of one reference: of its weights, quantization and arithmetic, and of the fingerprint of its
    adapter if it has one.

    The arithmetic is the device's name, its compute dtype and torch's version: in 16 bits another kernel changes a
    log-probability by a tenth of a nat, and the first loss would not be ln 2.

    Tokenizer, template, encoding and data are not part of the name, because each entry is found by the SHA-256 of its
    pair's token ids. An objective that weights tokens has a folder of its own. Learning rate, rank, seed, beta and the
    run's name do not matter.
    """
    key = {
        # 1: before quantized layers returned the compute dtype; 2: before scales and caps of logits were applied
        "format": 3,
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
    """The log-probabilities in one folder, open for the length of a run. An added entry survives a kill at once; about
    once a minute, and on leaving a `with`, the new entries are written as a file with its own checksum.

    `local_computed` counts the pairs that this rank has added.
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
        """Log-probabilities (P, 2) of `pairs` in float32 on the CPU, NaN where they are not known."""
        self.save()
        return torch.from_numpy(self.known.lookup(pair_digests(pairs)))

    def missing(self, pairs: Sequence[EncodedPair], among: NDArray[np.int64]) -> list[int]:
        """Those of the indices `among` whose pairs are not known."""
        self.save()
        unknown = np.isnan(self.known.lookup(pair_digests(pairs)[among])[:, 0])
        indices: list[int] = among[unknown].tolist()
        return indices

    def add(self, pairs: Sequence[EncodedPair], logps_P2: Tensor) -> None:
        """Add the log-probabilities (P, 2) of `pairs`. Raises SourceError for a full or read-only disk."""
        self.journal.add(pair_digests(pairs), logps_P2.numpy(force=True))
        added = dict(zip((pair.digest for pair in pairs), map(tuple, logps_P2.tolist()), strict=True))
        self.unsaved |= added
        self.local_computed += len(added)
        if time.monotonic() - self.saved_at > SECONDS_BETWEEN_SAVES:
            self.save()

    def all_gather(self, digest_P: DigestArray) -> None:
        """Exchange the entries of `digest_P`, this rank's pairs, with all ranks; each rank writes only its own."""
        if processes.world_size() == 1:
            return
        self.save()
        bytes_P32 = torch.from_numpy(np.frombuffer(digest_P.tobytes(), dtype=np.uint8).reshape(-1, 32).copy())
        gathered = processes.all_gather({"digest": bytes_P32, "logp": torch.from_numpy(self.known.lookup(digest_P))})
        digests = np.frombuffer(gathered["digest"].numpy().tobytes(), dtype="S32")
        self.known = self.known.merged_with(make_logp_table(digests, gathered["logp"].numpy()))

    def num_computed(self) -> int:
        """The number of pairs that all ranks have added."""
        return int(processes.all_reduce_sum([self.local_computed])[0])

    def save(self) -> None:
        """Write the entries added since the last call as a file and make them known."""
        if self.unsaved:
            table = make_logp_table(list(self.unsaved), list(self.unsaved.values()))
            write_logp_table(self.folder, table)
            self.known, self.unsaved = self.known.merged_with(table), {}
            self.journal.clear()
        self.saved_at = time.monotonic()


def read_logp_table(folder: Path) -> LogpTable:
    """All entries in `folder`. A file whose content does not match the SHA-256 in its name is reported and ignored."""
    tables = [EMPTY_LOGP_TABLE]
    for file in sorted(folder.glob("*.safetensors")):
        table = _read_file(file)
        if table is None:
            logger.warning(f"{file}: is damaged and not used; the log-probabilities it held are computed again")
        else:
            tables.append(table)
    return make_logp_table(
        np.concatenate([table.digest_P for table in tables]), np.concatenate([table.logp_P2 for table in tables])
    )


def _read_file(file: Path) -> LogpTable | None:
    """The entries of one file, or None if it is damaged."""
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != file.stem:
        return None
    try:
        tensors = load(content)
    except SafetensorError:
        return None
    return make_logp_table(tensors["digest"].numpy().view("S32").ravel(), tensors["logp"].numpy())


def write_logp_table(folder: Path, table: LogpTable) -> None:
    """Write `table` as one new file, named by the SHA-256 of its content; an empty table is not written."""
    if not len(table):
        return
    digest_P32 = np.frombuffer(table.digest_P.tobytes(), dtype=np.uint8).reshape(-1, 32)
    content = save({"digest": torch.from_numpy(digest_P32.copy()), "logp": torch.from_numpy(table.logp_P2)})
    atomic_write(folder / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)


def _recover_journals(folder: Path) -> None:
    """Turn the journals of killed runs into files. On a full disk they are left for the next run."""
    with orphaned_journals(folder) as journals, suppress(SourceError):
        for path, table in journals.items():
            write_logp_table(folder, table)
            path.unlink(missing_ok=True)
