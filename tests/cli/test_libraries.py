"""The libraries are imported without torch's compiler and without garbage collection, and work as they otherwise do."""

import subprocess
import sys

IMPORTED = """
import gc, sys
from qlora_dpo.cli.libraries import import_libraries
import_libraries()
print("torch._inductor.compile_fx" in sys.modules, sys.modules["torch"].compile.__module__)
print({"bitsandbytes", "peft", "torch", "transformers"} <= sys.modules.keys())
print(gc.isenabled(), gc.get_freeze_count() > 10**5)
import bitsandbytes, torch
weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
print((bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().max().item() < 0.5)
"""


def test_imports_leave_the_compiler_for_later_and_collect_no_garbage() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False torch", "True", "True True", "True"]
