"""The libraries are imported without torch's compiler and without garbage collection, and work as they otherwise do."""

import subprocess
import sys
from pathlib import Path

import transformers
from transformers.utils.import_utils import fetch__all__

from qlora_dpo.cli.startup.libraries import _from_exports

IMPORTED = """
import gc, sys
from qlora_dpo.cli.startup.libraries import import_libraries
import_libraries()
print("torch._inductor.compile_fx" in sys.modules, sys.modules["torch"].compile.__module__)
print({"bitsandbytes", "peft", "torch", "transformers"} <= sys.modules.keys())
print(sys.modules["transformers.utils.import_utils"].fetch__all__.__module__)
print("_ExportsFinder" in [type(each).__name__ for each in sys.meta_path])
print(gc.isenabled(), gc.get_freeze_count() > 10**5)
import bitsandbytes, torch
weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
print((bitsandbytes.functional.dequantize_4bit(packed, state) - weight).abs().max().item() < 0.5)
"""


def test_imports_leave_the_compiler_for_later_and_collect_no_garbage() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "False torch",
        "True",
        "qlora_dpo.cli.startup.libraries",
        "False",
        "True True",
        "True",
    ]


def test_transformers_finds_the_same_exports_in_its_model_files() -> None:
    files = sorted(Path(transformers.__file__).parent.glob("models/*/*.py"))
    assert len(files) > 1000
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert fetch__all__(_from_exports(text)) == fetch__all__(text), file
