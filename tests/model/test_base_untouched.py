"""Opening, chatting, evaluating and merging leave every tensor of the base as it was, to the bit."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from saved_adapters import save_adapter, save_base

from qlora_dpo.adapter import OpenedModel, open_adapter
from qlora_dpo.deploy import shards
from qlora_dpo.evaluation.merge_fidelity import compare_merged, record_trained
from qlora_dpo.model.quantized import linear4bit_layers
from qlora_dpo.recipe.model import Quantization
from qlora_dpo.talk.generate import generate_greedy

pytestmark = [tiny_run.LIBRARIES_WARN, pytest.mark.filterwarnings("ignore::UserWarning")]

ASKED = [[{"role": "user", "content": "How do I find the library?"}]] * 3


def digests(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of every tensor that is not the adapter's, 4-bit weights with their scales."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    for name, layer in linear4bit_layers(model).items():
        state: Any = layer.weight.quant_state
        tensors |= {f"{name}.absmax": state.absmax, f"{name}.code": state.code}
        if state.nested:
            tensors |= {f"{name}.offset": state.offset, f"{name}.absmax2": state.state2.absmax}
    return {
        name: hashlib.sha256(
            str(tensor.dtype).encode() + tensor.detach().cpu().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
        if tensor.dim() and tensor.numel()
    }


def chat(opened: OpenedModel, folder: Path) -> None:
    with opened.device.autocast():
        assert len(generate_greedy(opened.model, opened.tokenizer, ASKED, 8)) == 3


def evaluate(opened: OpenedModel, folder: Path) -> None:
    compare_merged(record_trained(opened.model, tiny_run.pairs(4), 0, opened.device), opened.model, opened.device, 0.1)


def merge(opened: OpenedModel, folder: Path) -> None:
    chat(opened, folder)
    shards.write_model(opened, folder, "trained", torch.bfloat16)


@pytest.mark.parametrize("use", [chat, evaluate, merge])
@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        *((quantization, "fp32") for quantization in ("nf4", "fp4", "int8", "none")),
        ("nf4", "bf16"),
        *(pytest.param(quantization, "bf16", marks=pytest.mark.slow) for quantization in ("fp4", "int8", "none")),
    ],
)
def test_the_base_is_the_same_before_and_after(
    use: Callable[[OpenedModel, Path], None], quantization: Quantization, dtype: str, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.iterdir()}
    opened = open_adapter(save_adapter(tmp_path / "a", base, quantization), dtype)
    before = digests(opened.model)
    assert len(before) > 20
    (tmp_path / "out").mkdir()
    use(opened, tmp_path / "out")
    assert digests(opened.model) == before
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in base.iterdir()} == files
