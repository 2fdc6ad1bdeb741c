"""The reference cache against sqlite3: adding log-probabilities batch by batch, and looking all of them up again.

`python benchmarks/reference_cache.py --folder DIR` works in a temporary folder below DIR, so that the disk is chosen.
The sqlite table has a row per pair: its digest as key, and both float32 with a CRC-32, since sqlite itself does not
notice a flipped bit. Look-ups read the whole table into a dict, the fastest of three ways that were tried (one SELECT a
pair and one for 4,096 pairs take 7 and 3 times as long).
"""

import argparse
import sqlite3
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from qlora_dpo.data.encoded import EncodedPair, pair_digests
from qlora_dpo.preference.reference_cache import ReferenceLogpCache

BATCH_PAIRS = 8
UNKNOWN = np.full(2, np.nan, dtype=np.float32).tobytes()
SQLITE_MODES = (("WAL", "NORMAL"), ("DELETE", "OFF"), ("DELETE", "NORMAL"))
"""Journal mode and `synchronous`. The first is not for network disks, the second not safe against a power cut."""


def main() -> None:
    """Print a table of milliseconds a batch, and seconds to open and look up, for the cache and each sqlite mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=160_000)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    pairs = [EncodedPair((), (), (), row, generator.bytes(32)) for row in range(options.pairs)]
    logps_P2 = torch.from_numpy(generator.standard_normal((options.pairs, 2), dtype=np.float32))
    print("| | ms to add a batch | the longest | s to open and look up | ratio |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        files = _measure_files(Path(folder) / "files", pairs, logps_P2)
        print(_line("files and journal", files, files[2]))
        for journal_mode, synchronous in SQLITE_MODES:
            file = Path(folder) / f"{journal_mode}-{synchronous}.sqlite"
            figures = _measure_sqlite(file, journal_mode, synchronous, pairs, logps_P2)
            print(_line(f"sqlite, {journal_mode}, synchronous {synchronous}", figures, files[2]), flush=True)


Figures = tuple[float, float, float]
"""Milliseconds to add a batch, on average and at most, and seconds to open and look up."""


def _measure_files(folder: Path, pairs: list[EncodedPair], logps_P2: torch.Tensor) -> Figures:
    with ReferenceLogpCache(folder) as cache:
        mean, longest = _time_batches(cache.add, pairs, logps_P2)
    began = time.perf_counter()
    known_P2 = ReferenceLogpCache(folder).get(pairs)
    seconds = time.perf_counter() - began
    assert torch.equal(known_P2, logps_P2)
    return mean, longest, seconds


def _measure_sqlite(
    file: Path, journal_mode: str, synchronous: str, pairs: list[EncodedPair], logps_P2: torch.Tensor
) -> Figures:
    connection = _connect(file, journal_mode, synchronous)
    connection.execute("CREATE TABLE logps (digest BLOB PRIMARY KEY, logp BLOB) WITHOUT ROWID")

    def add(batch: list[EncodedPair], batch_P2: torch.Tensor) -> None:
        values = [row.tobytes() for row in batch_P2.numpy()]
        checked = [value + _crc(pair.digest + value) for pair, value in zip(batch, values, strict=True)]
        connection.execute("BEGIN IMMEDIATE")
        rows = ((pair.digest, value) for pair, value in zip(batch, checked, strict=True))
        connection.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?)", rows)
        connection.execute("COMMIT")

    mean, longest = _time_batches(add, pairs, logps_P2)
    connection.close()
    began = time.perf_counter()
    connection = _connect(file, journal_mode, synchronous)
    known = {
        digest: value[:8]
        for digest, value in connection.execute("SELECT digest, logp FROM logps")
        if _crc(digest + value[:8]) == value[8:]
    }
    digests = [digest.ljust(32, b"\0") for digest in pair_digests(pairs).tolist()]
    known_P2 = np.frombuffer(b"".join(known.get(digest, UNKNOWN) for digest in digests), dtype=np.float32)
    seconds = time.perf_counter() - began
    connection.close()
    assert np.array_equal(known_P2.reshape(-1, 2), logps_P2.numpy())
    return mean, longest, seconds


def _time_batches(
    add: Callable[[list[EncodedPair], torch.Tensor], None], pairs: list[EncodedPair], logps_P2: torch.Tensor
) -> tuple[float, float]:
    """Mean and longest milliseconds to add a batch."""
    milliseconds = []
    for start in range(0, len(pairs), BATCH_PAIRS):
        began = time.perf_counter()
        add(pairs[start : start + BATCH_PAIRS], logps_P2[start : start + BATCH_PAIRS])
        milliseconds.append(1000 * (time.perf_counter() - began))
    return sum(milliseconds) / len(milliseconds), max(milliseconds)


def _connect(file: Path, journal_mode: str, synchronous: str) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=60, isolation_level=None)
    connection.execute(f"PRAGMA journal_mode = {journal_mode}")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    return connection


def _crc(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def _line(name: str, figures: Figures, reference_seconds: float) -> str:
    mean, longest, seconds = figures
    return f"| {name} | {mean:.2f} | {longest:.1f} | {seconds:.2f} | {seconds / reference_seconds:.1f} |"


if __name__ == "__main__":
    main()
