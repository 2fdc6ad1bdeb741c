"""Base and adapters answer the same prompts from one loaded model, and every answer is scored under every adapter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.adapter import OpenedModel, open_adapter
from qlora_dpo.adapter_weights import add_adapter, check_undamaged
from qlora_dpo.data.dialogue import Message, sanitize_text
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.model.sources import find_base
from qlora_dpo.recipe import Recipe
from qlora_dpo.talk.generate import Completion, generate_greedy, tokenize_prompt
from qlora_dpo.talk.reward import ImplicitReward, adapter_beta, rewards_per_adapter, use_adapter


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter of the loaded model: its name for the user, its name in PEFT, and the beta of its run."""

    name: str
    adapter_name: str
    beta: float


@dataclass(frozen=True)
class ScoredReply:
    """A completion of one model variant ("base" or an adapter), and its reward under every adapter."""

    variant: str
    completion: Completion
    rewards: tuple[tuple[LoadedAdapter, ImplicitReward], ...]


@dataclass(frozen=True)
class ComparedReplies:
    """A prompt and all replies to it, the base's first."""

    prompt: Sequence[Message]
    replies: tuple[ScoredReply, ...]


def open_adapters(
    folders: Sequence[Path], dtype: str, base_model: str | None = None
) -> tuple[OpenedModel, list[LoadedAdapter]]:
    """Load the base once, with every adapter of `folders` attached.

    Raises ModelError if one was trained on another base, or if its tensors do not fit.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise RecipeError(f"{folders[0]}: an adapter is named twice; name each once")
    opened = open_adapter(folders[0], dtype, base_model)
    adapters = [LoadedAdapter(names[0], "default", adapter_beta(opened.recipe))]
    for number, (folder, name) in enumerate(zip(folders[1:], names[1:], strict=True), 2):
        recipe = _attach_adapter(opened, folder, f"adapter_{number}", base_model)
        adapters.append(LoadedAdapter(name, f"adapter_{number}", adapter_beta(recipe)))
    opened.model.eval()
    return opened, adapters


def _attach_adapter(opened: OpenedModel, folder: Path, adapter_name: str, base_model: str | None) -> Recipe | None:
    """Attach the adapter of `folder` to the loaded model under `adapter_name`, and return its recipe."""
    assert opened.table is not None  # noqa: S101 - it is an adapter
    saved, first = find_base(folder, base_model), opened.table
    if (saved.source.fingerprint, saved.table.quantization) != (opened.source.fingerprint, first.quantization):
        raise ModelError(
            f"{folder}: is an adapter of {sanitize_text(saved.source.name)} ({saved.table.quantization}), and "
            f"{opened.folder} one of {sanitize_text(opened.source.name)} ({first.quantization}); compare adapters of "
            "one base"
        )
    check_undamaged(folder)
    add_adapter(opened.model, folder, adapter_name)
    return saved.recipe


def compare_replies(
    opened: OpenedModel,
    adapters: Sequence[LoadedAdapter],
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda replies: None,
) -> list[ComparedReplies]:
    """Greedy replies of the base and all adapters to `prompts`; `advance` receives the number of new replies."""
    model: Any = opened.model
    variants: list[LoadedAdapter | None] = [None, *adapters]
    adapter_names = [adapter.adapter_name for adapter in adapters]
    completions: list[list[Completion]] = []
    with opened.device.autocast():
        for variant in variants:
            with use_adapter(model, variant.adapter_name if variant else None):
                completions.append(generate_greedy(model, opened.tokenizer, prompts, max_new_tokens))
            advance(len(prompts))
        compared = []
        for prompt, *of_prompt in zip(prompts, *completions, strict=True):
            ids = tokenize_prompt(opened.tokenizer, prompt)
            replies = []
            for variant, completion in zip(variants, of_prompt, strict=True):
                rewards = rewards_per_adapter(model, adapter_names, ids, completion.ids)
                scored = tuple(zip(adapters, rewards, strict=True))
                replies.append(ScoredReply(variant.name if variant else "base", completion, scored))
            compared.append(ComparedReplies(prompt, tuple(replies)))
    return compared
