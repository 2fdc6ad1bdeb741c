"""Peak memory of writing a merged model, beside what `merge` states: `python benchmarks/merge_memory.py ADAPTER`."""

import argparse
import sys
import tempfile
from pathlib import Path

from qlora_dpo.cli.startup.quiet import quiet_libraries

quiet_libraries()
import torch  # noqa: E402

from qlora_dpo.deploy import merge, shards  # noqa: E402
from qlora_dpo.deploy.merge_memory import estimate_merge_memory  # noqa: E402


def resident(name: str) -> int:
    """Bytes of memory that Linux counts under `name`: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    """Open the adapter, write the merged model in bf16, print what was taken beyond the opened model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--shard", default=shards.MAX_SHARD_SIZE)
    parser.add_argument("--onto", default="trained", choices=("trained", "original"))
    parser.add_argument("--whole", action="store_true", help="load the whole model beside it, as a comparison")
    arguments = parser.parse_args()
    shards.MAX_SHARD_SIZE = arguments.shard
    opened = merge.open_for_merge(arguments.adapter)
    needed = estimate_merge_memory(opened, torch.bfloat16, 1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of loading is another matter
    before = resident("VmRSS")
    if arguments.whole:
        shards.base_tensors = lambda opened: None
    with tempfile.TemporaryDirectory() as work:
        shards.write_model(opened, Path(work), arguments.onto, torch.bfloat16)
    shard, layer = needed.shard_bytes / 1e6, needed.layer_bytes / 1e6
    print(f"stated {needed.writing_bytes / 1e6:.1f} MB: shard {shard:.1f}, layer {layer:.1f}")
    print(f"taken {(resident('VmHWM') - before) / 1e6:.1f} MB beyond the opened model's {before / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
