"""Repacks a wheel without the files that one machine does not need; its RECORD stays right.

    python benchmarks/gpu_repack.py WHEEL --drop 'libbitsandbytes_*.so' --keep cuda130 cpu

Files whose names match a pattern are left out, but for those that hold one of the kept words.
"""

import argparse
import base64
import csv
import hashlib
import io
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path


def main() -> None:
    """Repack in place and say what became of the bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--drop", nargs="+", required=True, metavar="PATTERN", help="names of files to leave out")
    parser.add_argument("--keep", nargs="*", default=[], metavar="WORD", help="what stays although it matches")
    asked = parser.parse_args()
    before = asked.wheel.stat().st_size
    left_out = repack(asked.wheel, asked.drop, asked.keep)
    print(f"{asked.wheel.name}: {len(left_out)} files left out, {before:,} -> {asked.wheel.stat().st_size:,} bytes")


def repack(wheel: Path, drop: Sequence[str], keep: Sequence[str] = ()) -> list[str]:
    """Rewrite `wheel` without what is dropped, and return those names.

    Raises SystemExit if no file holds one of the words to keep.
    """
    new = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old:
        names = [name for name in old.namelist() if any(fnmatch(Path(name).name, pattern) for pattern in drop)]
        for word in keep:
            if not any(word in Path(name).name for name in names):
                raise SystemExit(f"{wheel.name}: no file is for {word}; there are {', '.join(sorted(names))}")
        left_out = {name for name in names if not any(word in Path(name).name for word in keep)}
        with zipfile.ZipFile(new, "w") as packed:
            record = [_copied(old, each, packed) for each in old.infolist() if _stays(each.filename, left_out)]
            name = next(each for each in old.namelist() if each.endswith(".dist-info/RECORD"))
            packed.writestr(name, _csv([*record, (name, "", "")]), zipfile.ZIP_DEFLATED, 9)
    new.replace(wheel)
    return sorted(left_out)


def _stays(name: str, left_out: set[str]) -> bool:
    return name not in left_out and not name.endswith((".dist-info/RECORD", "/"))


def _copied(old: zipfile.ZipFile, each: zipfile.ZipInfo, packed: zipfile.ZipFile) -> tuple[str, str, str]:
    """Copy one file and return its line of RECORD: name, SHA-256 as the wheel format writes it, and bytes."""
    content = old.read(each)
    packed.writestr(each, content, zipfile.ZIP_DEFLATED, 9)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return each.filename, f"sha256={digest}", str(len(content))


def _csv(lines: Sequence[tuple[str, str, str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


if __name__ == "__main__":
    main()
