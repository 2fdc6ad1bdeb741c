"""Which attention a CPU should train with: scores multiplied out (eager) against torch's fused kernel (sdpa), in turn.

    python benchmarks/cpu_attention.py            # prints a table; figures stand in benchmarks/README.md

Each round times one forward and backward pass of 8 pairs of equal length with either backend, for several lengths;
medians of the rounds are compared. The pairs are random tokens: only their number matters for time.
"""

import statistics
import time
from dataclasses import replace

import torch

from qlora_dpo import recipe
from qlora_dpo.cli.quiet import silence
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.model.base import load_base, load_tokenizer
from qlora_dpo.model.device import choose
from qlora_dpo.model.lora import attach
from qlora_dpo.model.sources import fetch
from qlora_dpo.preference.logps import score
from qlora_dpo.preference.pack import collate
from qlora_dpo.training.run import pad_token_id

ROUNDS = 5
LENGTHS = (64, 128, 256, 512)
TOKENS = 1024  # of both sequences of all pairs


def main() -> None:
    """Measure and print."""
    silence()
    asked = recipe.load("recipes/quickstart.toml").recipe
    source = fetch(asked.model)
    pad = pad_token_id(load_tokenizer(source))
    here = choose()
    models = {
        backend: attach(load_base(source, asked.model, replace(here, attention=backend)), asked.lora, 0)
        for backend in ("eager", "sdpa")
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {here.compute_dtype}, {TOKENS} tokens a pass")
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(0)
        ids = [tuple(torch.randint(0, 4000, (length,), generator=generator).tolist()) for _ in range(TOKENS // length)]
        half = length // 2
        pairs = [EncodedPair(one[:half], one[half:], one[half:][::-1], 0, b"") for one in ids[::2]]
        batch = collate(pairs, pad)
        seconds: dict[str, list[float]] = {backend: [] for backend in models}
        for _ in range(ROUNDS + 1):
            for backend, model in models.items():
                started = time.perf_counter()
                score(model, batch, here).chosen_logp_P.sum().backward()
                seconds[backend].append(time.perf_counter() - started)
        eager, sdpa = (statistics.median(taken[1:]) for taken in seconds.values())  # the first round warms up
        print(f"length {length}: eager {eager:.2f} s, sdpa {sdpa:.2f} s, ratio {sdpa / eager:.2f}")


if __name__ == "__main__":
    main()
