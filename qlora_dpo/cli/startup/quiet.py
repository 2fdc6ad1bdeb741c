"""Keeps notices, progress bars and telemetry of libraries out of the output; runs before they are imported."""

import logging
import os
import sys
import warnings

QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "true",  # if it is unset, tokenizers warns after a fork
    "WANDB_SILENT": "true",
    "BITSANDBYTES_NOWELCOME": "1",
}

QUIET_LOGGERS = ("bitsandbytes", "bitsandbytes.backends.cpu.ops", "accelerate", "torch.distributed", "httpx")


def quiet_libraries() -> None:
    """Set logger levels, and the variables that libraries read at import, except those that the user has set."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # a filter, since DeepSpeed sets the level of its logger at import, and other libraries import it if it is installed
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if not sys.warnoptions and os.environ.get("QLORA_DPO_TRACEBACK") != "1":
        warnings.simplefilter("ignore")
