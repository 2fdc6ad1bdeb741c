"""Samples are drawn from the model's own distribution, each with random numbers of its own."""

from collections import Counter

import tiny
import torch

from qlora_dpo.talk.generate import sample_completions, tokenize_prompt
from qlora_dpo.talk.sampling import SamplingParams

PROMPTS = [[{"role": "user", "content": question}] for question in ("rice?", "Is it far to the garden?")]


def sampled(settings: SamplingParams, copies: int, batch_tokens: int = 2**20) -> list[list[tuple[int, ...]]]:
    """The ids of the samples of each prompt."""
    torch.manual_seed(0)
    model, tokenizer = tiny.qwen2().eval(), tiny.tokenizer()
    for parameter in model.parameters():
        parameter.data *= 4  # a distribution that is not flat
    ids = [tokenize_prompt(tokenizer, prompt) for prompt in PROMPTS]
    found: dict[int, list[tuple[int, ...]]] = {}
    for indices, completions in sample_completions(model, tokenizer, ids, copies, settings, ["a", "b"], batch_tokens):
        for index, of_prompt in zip(indices, completions, strict=True):
            found[index] = [each.ids for each in of_prompt]
    return [found[index] for index in range(len(PROMPTS))]


@torch.no_grad()
def test_first_tokens_are_as_frequent_as_likely() -> None:
    settings = SamplingParams(temperature=0.7, top_p=1.0, max_new_tokens=2, seed=5)
    copies = 4000
    samples = sampled(settings, copies)
    model, tokenizer = tiny.qwen2().eval(), tiny.tokenizer()
    for parameter in model.parameters():
        parameter.data *= 4
    for prompt, of_prompt in zip(PROMPTS, samples, strict=True):
        ids = torch.tensor([tokenize_prompt(tokenizer, prompt)])
        expected_V = (model(ids).logits[0, -1] / 0.7).softmax(-1)
        counts = Counter(each[0] for each in of_prompt)
        found_V = torch.tensor([counts[token] / copies for token in range(len(expected_V))])
        noise_V = (expected_V * (1 - expected_V) / copies).sqrt()
        assert ((found_V - expected_V).abs() <= 5 * noise_V + 1e-3).all()
        common = counts.most_common(1)[0][0]
        followers = [each[1] for each in of_prompt if each[0] == common and len(each) > 1]
        assert len(set(followers)) > 30  # 8, where each is drawn with the first token's random number again


def test_samples_depend_on_seed_prompt_and_number_but_not_on_the_batch() -> None:
    settings = SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=6, seed=5)
    together, apart = sampled(settings, 4), sampled(settings, 4, batch_tokens=1)
    assert together == apart
    assert len({ids for of_prompt in together for ids in of_prompt}) == 8
    assert sampled(SamplingParams(temperature=1.0, top_p=0.9, max_new_tokens=6, seed=6), 4) != together
    assert (
        sampled(SamplingParams(temperature=1.0, top_p=0.01, max_new_tokens=6, seed=5), 2)[0]
        == (sampled(SamplingParams(temperature=0, max_new_tokens=6), 2)[0])
    )
