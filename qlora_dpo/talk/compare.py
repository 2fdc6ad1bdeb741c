"""Base and adapters answer the same prompts from one loaded model, and each adapter says how it values each answer.

A tokens of an answer, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from qlora_dpo.adapter import OpenedModel, open_adapter
from qlora_dpo.data.dialogue import Message, sanitize_text
from qlora_dpo.errors import ModelError, RecipeError
from qlora_dpo.manifest import MANIFEST, find_damage
from qlora_dpo.model.lora import adapter_disabled
from qlora_dpo.model.sources import fetch_model
from qlora_dpo.recipe import Recipe
from qlora_dpo.run_folder import ADAPTER_SAFE_WEIGHTS_NAME, read_run_metadata
from qlora_dpo.talk.generate import Completion, generate_greedy, tokenize_prompt

DEFAULT_BETA = 0.1
"""Of an adapter that comes without a recipe, or whose objective has none: DPO's default."""


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter of the loaded model: as people call it, as PEFT does, and the beta of its run."""

    name: str
    peft_name: str
    beta: float


@dataclass(frozen=True)
class TokenRewards:
    """The implicit reward of one answer under one adapter: beta * log(pi/pi_ref) of each token, in nats."""

    speaker: LoadedAdapter
    tokens: tuple[float, ...]

    @property
    def total(self) -> float:
        """Of the whole answer."""
        return sum(self.tokens)


@dataclass(frozen=True)
class ScoredReply:
    """What one voice answered to a prompt, and the answer's reward under every adapter."""

    voice: str
    answer: Completion
    rewards: tuple[TokenRewards, ...]


@dataclass(frozen=True)
class ComparedReplies:
    """A prompt and all answers to it: the base's first."""

    prompt: Sequence[Message]
    said: tuple[ScoredReply, ...]


def open_adapters(folders: Sequence[Path], dtype: str) -> tuple[OpenedModel, list[LoadedAdapter]]:
    """Load the base once, with every adapter of `folders` on it.

    Raises ModelError if one was trained on another base, or if its tensors do not fit.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise RecipeError(f"{folders[0]}: an adapter is named twice; name each once")
    opened = open_adapter(folders[0], dtype)
    speakers = [LoadedAdapter(names[0], "default", _beta(opened.recipe))]
    for number, (folder, name) in enumerate(zip(folders[1:], names[1:], strict=True), 2):
        recipe = _attach_beside(opened, folder, f"adapter_{number}")
        speakers.append(LoadedAdapter(name, f"adapter_{number}", _beta(recipe)))
    opened.model.eval()
    return opened, speakers


def _beta(recipe: Recipe | None) -> float:
    return float(getattr(recipe.objective, "beta", DEFAULT_BETA)) if recipe is not None else DEFAULT_BETA


def _attach_beside(opened: OpenedModel, folder: Path, peft_name: str) -> Recipe | None:
    """Attach the adapter of `folder` to the model that is loaded, and return its recipe."""
    assert opened.folder is not None  # noqa: S101 - it is an adapter
    table, run, recipe = read_run_metadata(folder)
    first = read_run_metadata(opened.folder)[0]
    source = fetch_model(table)
    if (source.fingerprint, table.quantization) != (opened.source.fingerprint, first.quantization):
        raise ModelError(
            f"{folder}: is an adapter of {sanitize_text(source.name)} ({table.quantization}), and {opened.folder} one of "
            f"{sanitize_text(opened.source.name)} ({first.quantization}); compare adapters of one base"
        )
    if run is not None and source.fingerprint != run["base"]["fingerprint"]:
        raise ModelError(f"{folder}: was trained on other weights of {source.name} than are there now")
    if (folder / MANIFEST).is_file() and (damaged := find_damage(folder, required=ADAPTER_SAFE_WEIGHTS_NAME)):
        raise ModelError(f"{folder}: is damaged: {damaged}; take it from a backup, or train again with --resume")
    try:
        with safe_open(folder / ADAPTER_SAFE_WEIGHTS_NAME, framework="pt") as file:
            saved = set(file.keys())
        opened.model.load_adapter(str(folder), adapter_name=peft_name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{folder}: the adapter cannot be attached to its base: {sanitize_text(first_line)}"
        ) from error
    placed = set(get_peft_model_state_dict(opened.model, adapter_name=peft_name, save_embedding_layers=False))
    if misplaced := saved ^ placed:
        raise ModelError(f"{folder}: {len(misplaced)} tensors do not fit the base, for example {min(misplaced)}")
    return recipe


@contextmanager
def use_adapter(model: PeftModel, speaker: LoadedAdapter | None) -> Iterator[None]:
    """Let one adapter of the model speak, or, with None, its base."""
    if speaker is None:
        with adapter_disabled(model):
            yield
        return
    model.set_adapter(speaker.peft_name)
    model.requires_grad_(False)
    yield


def compare_replies(
    opened: OpenedModel,
    speakers: Sequence[LoadedAdapter],
    prompts: Sequence[Sequence[Message]],
    max_new_tokens: int,
    advance: Callable[[int], None] = lambda answers: None,
) -> list[ComparedReplies]:
    """Greedy answers of base and all speakers to `prompts`; `advance` is told how many answers are done."""
    model: Any = opened.model
    everyone: list[LoadedAdapter | None] = [None, *speakers]
    spoken: list[list[Completion]] = []
    with opened.device.autocast():
        for speaker in everyone:
            with use_adapter(model, speaker):
                spoken.append(generate_greedy(model, opened.tokenizer, prompts, max_new_tokens))
            advance(len(prompts))
        found = []
        for number, prompt in enumerate(prompts):
            ids = tokenize_prompt(opened.tokenizer, prompt)
            said = [
                ScoredReply(
                    speaker.name if speaker else "base",
                    replies[number],
                    rewards_per_adapter(model, speakers, ids, replies[number].ids),
                )
                for speaker, replies in zip(everyone, spoken, strict=True)
            ]
            found.append(ComparedReplies(prompt, tuple(said)))
    return found


def rewards_per_adapter(
    model: Any, speakers: Sequence[LoadedAdapter], prompt: Sequence[int], answer: Sequence[int]
) -> tuple[TokenRewards, ...]:
    """The implicit reward of `answer` under every speaker; call it inside the device's autocast."""
    if not answer:
        return tuple(TokenRewards(speaker, ()) for speaker in speakers)
    with use_adapter(model, None):
        base_A = _logps(model, prompt, answer)
    found = []
    for speaker in speakers:
        with use_adapter(model, speaker):
            ratio_A = _logps(model, prompt, answer) - base_A
        found.append(TokenRewards(speaker, tuple((speaker.beta * ratio_A).tolist())))
    return tuple(found)


@torch.no_grad()
def _logps(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Log-probability of each token of `answer` (A,), in float64 on the CPU."""
    place = model.get_input_embeddings().weight.device
    ids = torch.tensor([[*prompt, *answer]], device=place)
    logits_AV = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
    target_A = torch.tensor(answer, device=place)[:, None]
    logp_A: torch.Tensor = logits_AV.log_softmax(-1).gather(-1, target_A)[:, 0]
    return logp_A.double().cpu()
