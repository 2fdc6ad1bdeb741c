"""Starts DeepSpeed engines for ZeRO-2 and ZeRO-3; the only module that imports DeepSpeed's entry points.

DeepSpeed's own training loop takes the optimizer step before loss and gradient can be checked for NaN and infinity.
Here an engine does one thing only: it shards frozen layers (zero3.py), or it takes a step with a gradient that has been
checked (training/zero2_optimizer.py).
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
    """Raise RecipeError with the install command if DeepSpeed is missing or older than the tested version."""
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        installed = "not installed"
    if installed == "not installed" or tuple(map(int, installed.split(".")[:2])) < MIN_DEEPSPEED_VERSION:
        raise RecipeError(
            f"accelerate's config file asks for DeepSpeed, which is {installed}; "
            f"install {'.'.join(map(str, MIN_DEEPSPEED_VERSION))} or newer with: pip install 'qlora_dpo[deepspeed]'"
        )


def check_no_grad_scaler(device: Device) -> None:
    """Raise RecipeError if ZeRO-2 would get scaled gradients.

    Its optimizer holds slices of one flat buffer instead of the adapter's parameters, so a GradScaler finds no gradient
    to unscale: clipping and step would use gradients 65,536 times too large.
    """
    if device.needs_grad_scaler:
        raise RecipeError(
            f"ZeRO-2 cannot step by the scaled gradients of fp16, in which {device.name} computes; take "
            'recipes/accelerate/ddp.yaml, set model.dtype = "fp32", or take GPUs with bf16'
        )


def initialize_engine(stage: int, device: Device, **arguments: Any) -> Any:
    """A DeepSpeed engine in the existing process group; `arguments` are those of `deepspeed.initialize`."""
    require_deepspeed()
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed looks for a GPU and warns
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    with redirect_stdout(io.StringIO()):  # build notices
        import deepspeed

        engine, *_ = deepspeed.initialize(config=config, dist_init_required=False, **arguments)
    return engine
