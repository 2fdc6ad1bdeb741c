"""Keeps other libraries' notices, bars and telemetry out of what a command prints; runs before they are imported."""

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
    "TOKENIZERS_PARALLELISM": "true",  # unset, a tokenizer that was used before a fork warns
    "WANDB_SILENT": "true",
    "BITSANDBYTES_NOWELCOME": "1",
}

QUIET_LOGGERS = ("bitsandbytes", "bitsandbytes.backends.cpu.ops", "accelerate", "torch.distributed", "httpx")


def quiet_libraries() -> None:
    """Set what the libraries read at import; a variable that the user has set stays as it is."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for logger in QUIET_LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level when it is imported, which other libraries do where it is installed
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if not sys.warnoptions and os.environ.get("QLORA_DPO_TRACEBACK") != "1":
        warnings.simplefilter("ignore")
