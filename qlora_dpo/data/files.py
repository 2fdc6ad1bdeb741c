"""Reads local data files (JSON lines, JSON, CSV, Parquet, Arrow) into rows that know their place in the file."""

import gzip
import io
import zlib
from dataclasses import replace
from pathlib import Path

from qlora_dpo.data.reading.arrow_tables import arrow_rows as arrow_rows
from qlora_dpo.data.reading.arrow_tables import checked_table, read_arrow, read_parquet
from qlora_dpo.data.reading.csv_text import read_csv
from qlora_dpo.data.reading.file_rows import FileRows as FileRows
from qlora_dpo.data.reading.file_rows import Row as Row
from qlora_dpo.data.reading.file_rows import display_path as display_path
from qlora_dpo.data.reading.file_rows import json_type as json_type
from qlora_dpo.data.reading.file_rows import log_once as log_once
from qlora_dpo.data.reading.json_text import read_json_text
from qlora_dpo.data.reading.text_index import index_lines
from qlora_dpo.data.spool import SPOOL_MEMORY_BYTES, Spool
from qlora_dpo.errors import DataError, RecipeError
from qlora_dpo.files import file_sha256, read_error
from qlora_dpo.recipe.tables import DATA_SUFFIXES


def data_suffix(path: Path) -> str | None:
    """The suffix of a data file (.jsonl.gz, .csv, ...), or None if the format is not supported."""
    suffixes = [suffix for suffix in DATA_SUFFIXES if path.name.lower().endswith(suffix)]
    return max(suffixes, key=len, default=None)


def read_data_file(path: Path, split: str = "train") -> FileRows:
    """Read every row of a data file; of a JSON object that holds several splits, those of `split`.

    Blank and comment lines of JSON lines are skipped, and a CSV file's first line names its columns. Text is UTF-8,
    with or without a byte order mark. What was recognised beyond that is logged, a sentence each. Raises RecipeError
    for an unsupported name, SourceError if the disk fails, and DataError with file and line for content that is
    damaged or of another format.
    """
    kind = data_suffix(path)
    if kind is None:
        endings = ", ".join(DATA_SUFFIXES)
        raise RecipeError(
            f"{display_path(path)}: is not a data file that can be read; its name must end in one of {endings}"
        )
    name = display_path(path)
    read = _read_content(name, kind.removesuffix(".gz"), _open_spooled(path, kind), split)
    if not read.rows:
        raise DataError(f"{name}: holds no rows; a preference set has one pair per row")
    for note in read.notes:
        log_once(note)
    return replace(read, fingerprint=file_sha256(path) + (f" {split}" if read.has_splits else ""))


def _read_content(name: str, kind: str, content: Spool, split: str) -> FileRows:
    match kind:
        case ".parquet" | ".arrow":
            table = (read_parquet if kind == ".parquet" else read_arrow)(name, content.file)
            checked, notes = checked_table(name, table)
            return FileRows(name, arrow_rows(checked), None, notes=notes)
        case ".csv" | ".tsv":
            return read_csv(name, content, kind == ".tsv")
        case _:
            return read_json_text(name, index_lines(name, content), kind == ".json", split)


def _open_spooled(path: Path, kind: str) -> Spool:
    """The file's bytes, decompressed; a large file stays on disk."""
    name = display_path(path)
    try:
        if not kind.endswith(".gz"):
            small = path.stat().st_size <= SPOOL_MEMORY_BYTES
            return Spool(io.BytesIO(path.read_bytes()) if small else path.open("rb"))
        content = Spool()
        with gzip.open(path) as packed:
            while block := packed.read(2**20):
                content.append(block)
        content.file.seek(0)
        return content
    except FileNotFoundError as error:
        raise RecipeError(f"{name}: there is no such file; correct the path in the recipe") from error
    except EOFError as error:
        raise DataError(f"{name}: the gzip data ends too early; copy or download the file again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{name}: is not gzip data, or is damaged; take .gz off its name if it is plain text, "
            "else copy or download the file again"
        ) from error
    except OSError as error:
        raise read_error(error, name) from error
