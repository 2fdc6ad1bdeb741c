#!/usr/bin/env bash
# Collects what a machine with torch, transformers, peft and accelerate, but without a network, lacks to run this
# project: wheels for Python 3.12 on Linux x86_64. Of bitsandbytes one CUDA library and the CPU's are kept, and pyarrow
# loses what reads from servers.
#
#   benchmarks/gpu_wheels.sh FOLDER [CUDA] [MORE...]
#
# CUDA is the library to keep, as bitsandbytes names it [cuda130]; MORE are further packages, such as wandb.
# Versions are those that pyproject.toml allows, and what these wheels ask for. PYTHON is the Python whose pip is used.
set -euo pipefail

folder=${1:?usage: gpu_wheels.sh FOLDER [CUDA] [MORE...]}
cuda=${2:-cuda130}
more=("${@:3}")
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
limit=$((60 * 1000 * 1000)) # what is carried to another machine has to be small

direct=(bitsandbytes trl datasets pyarrow pydantic tomli-w gguf starlette uvicorn)
indirect=(dill multiprocess pydantic-core annotated-types) # of datasets and pydantic; the machine has the others

download() {
    local platforms=() glibc
    for glibc in 17 24 26 27 28 31 34 35; do
        platforms+=(--platform "manylinux_2_${glibc}_x86_64")
    done
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "${platforms[@]}" --dest "$folder" "$@"
}

# prints the requirements of the named packages: of pyproject.toml, or with a folder, of the wheels in it
wanted() {
    "$python" - "$here/../pyproject.toml" "$@" << 'EOF_PYTHON'
import re
import sys
import tomllib
import zipfile
from pathlib import Path

project, folder, *names = sys.argv[1:]
if folder == "-":
    lines = tomllib.loads(Path(project).read_text())["project"]["dependencies"]
else:
    lines = []
    for wheel in Path(folder).glob("*.whl"):
        with zipfile.ZipFile(wheel) as packed:
            file = next(name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
            text = packed.read(file).decode()
        lines += re.findall(r"^Requires-Dist: ([^;\n]+)(?:;(?!.*extra).*)?$", text, re.M)
for name in names:
    said = [line for line in lines if re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") == name]
    print(re.sub(r"[ ()]|\[.*?\]", "", said[0]) if said else name)
EOF_PYTHON
}

mkdir -p "$folder"
if compgen -G "$folder/*.whl" > /dev/null; then
    echo "$folder holds wheels already; two versions of one package stop an install: name an empty folder" >&2
    exit 2
fi
mapfile -t requirements < <(wanted - "${direct[@]}")
download "${requirements[@]}" "${more[@]}"
mapfile -t requirements < <(wanted "$folder" "${indirect[@]}")
download "${requirements[@]}"
"$python" "$here/gpu_repack.py" "$folder"/bitsandbytes-*.whl --drop 'libbitsandbytes_*.so' --keep "$cuda." _cpu.
"$python" "$here/gpu_repack.py" "$folder"/pyarrow-*.whl --drop '*flight*' '*.h'

total=$(cat "$folder"/*.whl | wc -c)
ls -l "$folder" | awk 'NR > 1 { printf "%9.2f MB  %s\n", $5 / 1e6, $9 }'
awk "BEGIN { printf \"%9.2f MB  in all\n\", $total / 1e6 }"
# dill takes a package for somebody's own code, and pickles all of it, unless it lies in a folder of this name
site=/tmp/carried/site-packages
echo "install them there with"
echo "  python3 -m pip install --no-index --no-deps --target $site $folder/*.whl && export PYTHONPATH=\$PWD:$site"
if ((total > limit)); then
    echo "$folder holds $total bytes, more than $limit" >&2
    exit 1
fi
