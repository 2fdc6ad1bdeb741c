"""A tiny model whose answers vary: as initialized, a random model mostly repeats its last token."""

import tiny
import torch


def qwen2(seed: int = 0) -> tiny.Qwen2ForCausalLM:
    """The tiny Qwen2 with large random weights on top, so that every prompt and every token changes what follows."""
    model = tiny.qwen2(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model
