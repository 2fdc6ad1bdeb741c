"""Writes tests/requirements.lock: every package the suite runs with, by version and SHA-256, as pip resolves it now.

python tests/write_requirements_lock.py
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = Path(__file__).with_name("requirements.lock")


def main() -> None:
    resolve = ("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "-e", f"{ROOT}[dev]")
    done = subprocess.run([sys.executable, "-m", "pip", *resolve], stdout=subprocess.PIPE, text=True, check=True)
    pinned = []
    for each in json.loads(done.stdout)["install"]:
        name, version = each["metadata"]["name"].lower().replace("_", "-"), each["metadata"]["version"]
        if name != "qlora-dpo":
            digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
            pinned.append(f"{name}=={version.partition('+')[0]} --hash=sha256:{digest}")
    where = (
        f"CPython {'.'.join(platform.python_version_tuple()[:2])}, {platform.system()} {platform.machine()}, CPU torch"
    )
    head = f"# What the suite was last locked to ({where}); written by tests/write_requirements_lock.py\n"
    LOCK.write_text(head + "".join(f"{line}\n" for line in sorted(pinned)))
    print(f"{LOCK}: {len(pinned)} packages")


if __name__ == "__main__":
    main()
