"""Several processes that train one model: ranks, collectives, FSDP2 and ZeRO."""
