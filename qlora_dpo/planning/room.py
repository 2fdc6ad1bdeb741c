"""The former place of `assess_fit`, which cli/train.py still imports from here."""

from qlora_dpo.planning.memory_advice import assess_fit

__all__ = ["assess_fit"]
