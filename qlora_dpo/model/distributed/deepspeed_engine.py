"""DeepSpeed, where accelerate's config file asks for its ZeRO-2 or ZeRO-3; imported nowhere else.

DeepSpeed's own loop takes a step inside of the backward pass, before anyone has seen whether loss and gradient are
finite, so here it is given one thing at a time: frozen layers to share out (shard_zero3.py), or a gradient that has
been judged, to step by (training/zero2_optimizer.py).
"""

import io
import os
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qlora_dpo.errors import RecipeError
from qlora_dpo.model.device import Device

MIN_DEEPSPEED_VERSION = (0, 19)


def require_deepspeed() -> None:
    """Raise RecipeError with the command that installs DeepSpeed if it is missing, or is older than what was tried."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = "not installed"
    if found == "not installed" or tuple(int(part) for part in found.split(".")[:2]) < MIN_DEEPSPEED_VERSION:
        raise RecipeError(
            f"accelerate's config file asks for DeepSpeed, which is {found}; "
            f"install {'.'.join(map(str, MIN_DEEPSPEED_VERSION))} or newer with: pip install 'qlora_dpo[deepspeed]'"
        )


def check_no_grad_scaler(device: Device) -> None:
    """Raise RecipeError where ZeRO-2 would be handed scaled gradients.

    Its optimizer holds stretches of all weights in a row instead of the adapter's weights, so a GradScaler finds no
    gradient to unscale: all would be clipped and stepped by as if they were 65,536 times as large.
    """
    if device.needs_grad_scaler:
        raise RecipeError(
            f"ZeRO-2 cannot step by the scaled gradients of fp16, in which {device.name} computes; take "
            'recipes/accelerate/ddp.yaml, set model.dtype = "fp32", or take GPUs with bf16'
        )


def initialize_engine(stage: int, device: Device, **what: Any) -> Any:
    """DeepSpeed's engine of a model, with an optimizer or without one, among the processes that there are."""
    require_deepspeed()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it looks for a GPU, and warns
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    with redirect_stdout(io.StringIO()):  # notices of what it builds
        import deepspeed

        engine, *_ = deepspeed.initialize(config=config, dist_init_required=False, **what)
    return engine
