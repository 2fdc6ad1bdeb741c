"""LoRA and QLoRA preference fine-tuning of causal language models, on hardware people own."""

__version__ = "0.1.0"
