"""Distributed training: ranks and collectives, and layers sharded by FSDP2 or ZeRO-3."""
